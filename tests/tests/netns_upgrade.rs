//! Agents of other versions in place of the one that runs, and back, under load: what is lost, and what slips through.
//! One has programs and tables that are laid out differently; the other is from before the shared blocks and holds its
//! programs by two links of tcx for each device.
//!
//! Seen failing: build `weir-agent --features other-layout,broken-take-over-first` as
//! `weir-agent-other-layout` into a folder with the other programs, and run
//! `WEIR_BIN_DIR=… cargo test --test netns_upgrade`.

#![allow(
    clippy::unwrap_used,
    reason = "a test, and clippy.toml excuses only its test functions"
)]

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use weir_cni::attachment::DEVICE_PREFIX;
use weir_tests::load::{Load, Tally};
use weir_tests::node::{Node, NodeOptions, binary};
use weir_tests::not_run::not_run;
use weir_tests::shop::{DNS, Shop, WEB, WEB_NAME};
use weir_tests::workloads::Workload;

/// Connections per second, of all clients together: the first that the harness sustains by itself.
const RATES: [u32; 4] = [500, 300, 200, 100];
/// Lookups per second.
const LOOKUPS: u32 = 100;
/// Connections per second that policy forbids.
const FORBIDDEN: u32 = 20;
const SECONDS: u32 = 20;

const POLICY: &str = "\
kind: NetworkPolicy
apiVersion: networking.k8s.io/v1
metadata: {name: web, namespace: shop}
spec:
  podSelector: {matchLabels: {app: web}}
  ingress: [{from: [{podSelector: {matchLabels: {app: client}}}]}]
";

/// What a connection that is opened while agents take over may meet.
#[derive(Clone, Copy, Eq, PartialEq)]
enum Openings {
    /// Nothing.
    Once,
    /// The agent before ours kept one row for both directions of a conversation, where we keep two, and went from device
    /// to device when it took over. Meanwhile an answer could meet programs that had not seen the question, and the
    /// question had to be sent again, a second later.
    MayBeSentAgain,
}

impl Openings {
    /// How long nothing happens after an agent took over.
    const fn pause(self) -> Duration {
        match self {
            Self::Once => Duration::ZERO,
            Self::MayBeSentAgain => Duration::from_millis(2500),
        }
    }

    /// How long a client waits, in milliseconds.
    const fn patience(self) -> u32 {
        match self {
            Self::Once => 1000,
            Self::MayBeSentAgain => 4000,
        }
    }
}

#[derive(Debug)]
struct Ended {
    connections: Tally,
    lookups: Tally,
    forbidden: Tally,
}

fn under_load(
    shop: &mut Shop,
    stranger: &weir_tests::node::Pod,
    rate: u32,
    seconds: u32,
    openings: Openings,
    meanwhile: impl FnOnce(&mut Node),
) -> Ended {
    let (asker, clients) = shop.clients.split_last().unwrap();
    let each = rate / u32::try_from(clients.len()).unwrap();
    let patience = openings.patience();
    let http = format!(
        "--kind http --target {WEB} --rate {each} --seconds {seconds} --patience {patience}"
    );
    let dns =
        format!("--kind dns --target {DNS} --name {WEB_NAME} --rate {LOOKUPS} --seconds {seconds}");
    let forbidden = format!("--kind http --target {WEB} --rate {FORBIDDEN} --seconds {seconds}");
    let loads: Vec<_> = clients
        .iter()
        .map(|c| Load::start(c, &http).unwrap())
        .collect();
    let lookups = Load::start(asker, &dns).unwrap();
    let forbidden = Load::start(stranger, &forbidden).unwrap();
    meanwhile(&mut shop.node);
    let mut connections = Tally::default();
    for load in loads {
        connections += load.finish().unwrap();
    }
    Ended {
        connections,
        lookups: lookups.finish().unwrap(),
        forbidden: forbidden.finish().unwrap(),
    }
}

/// The names of the pinned tables.
fn tables(node: &Node) -> BTreeSet<String> {
    let pins = fs::read_dir(node.machine().bpffs().path().join("weir")).unwrap();
    let files = pins.filter_map(|pin| {
        let pin = pin.unwrap();
        let is_file = pin.file_type().unwrap().is_file();
        is_file.then(|| pin.file_name().into_string().unwrap())
    });
    files.collect()
}

#[test]
fn nothing_is_lost_while_agents_of_two_layouts_take_over_from_each_other() {
    let other = binary("weir-agent-other-layout");
    take_turns("upgrade", &other, Openings::Once, |_, _| {});
}

#[test]
fn nothing_is_lost_while_agents_before_and_after_the_shared_blocks_take_over_from_each_other() {
    let test =
        "nothing_is_lost_while_agents_before_and_after_the_shared_blocks_take_over_from_each_other";
    let former = binary("weir-agent-tcx");
    if !former.exists() {
        not_run(
            test,
            &"there is no weir-agent-tcx; `cargo xtask build` makes it of the history",
        );
        return;
    }
    take_turns(
        "tcx",
        &former,
        Openings::MayBeSentAgain,
        |node, is_former| {
            // One link for each side of each device, or none: what is of the former kind goes with its agent. That one says
            // that it is ready a little before its programs are in place.
            let devices = node
                .machine()
                .netns()
                .ip("-br link show type veth")
                .unwrap();
            let devices = devices.lines().filter(|it| it.starts_with(DEVICE_PREFIX));
            let devices = devices.count();
            assert!(devices > 0);
            let expected = if is_former { 2 * devices } else { 0 };
            let end = Instant::now() + Duration::from_secs(5);
            while links(node) != expected {
                assert!(
                    Instant::now() < end,
                    "{} links of {devices} devices",
                    links(node)
                );
                std::thread::sleep(Duration::from_millis(20));
            }
        },
    );
}

/// Links that are pinned for pods' devices.
fn links(node: &Node) -> usize {
    let pins = fs::read_dir(node.machine().bpffs().path().join("weir/links")).unwrap();
    let pins = pins.map(|pin| pin.unwrap().file_name().into_string().unwrap());
    let of_devices = pins.filter(|pin| pin.starts_with(DEVICE_PREFIX) && !pin.starts_with("weir_"));
    of_devices.count()
}

/// An agent of the other version in place of ours, and back, again and again. What is on the node after each turn is
/// looked at.
fn take_turns(name: &str, other: &Path, openings: Openings, look: impl Fn(&Node, bool)) {
    let mut shop = Shop::open(NodeOptions::named(name), 3, 3).unwrap();
    let stranger = Workload::named("shop", "stranger").label("app", "stranger");
    let stranger = shop.node.run_pod(stranger).unwrap();
    shop.node.write_manifest("policy.yaml", POLICY).unwrap();
    shop.node
        .wait_for("the policy", Duration::from_secs(10), "policy", |rows| {
            rows.iter().any(|row| row.to_string().contains("shop/web"))
        })
        .unwrap();
    shop.wait_for_names().unwrap();
    let rate = RATES.into_iter().find(|rate| {
        let ended = under_load(&mut shop, &stranger, *rate, 4, openings, |_| {});
        println!("control, {rate}/s: {ended:?}");
        ended.connections.failed() + ended.lookups.failed() == 0
    });
    let rate = rate.expect("the harness sustains no rate even while nothing happens");

    let ours = tables(&shop.node);
    let accepted = shop.accepted().unwrap();
    let sent_again = shop.sent_again().unwrap();
    let versions: [PathBuf; 2] = [other.to_owned(), binary("weir-agent")];
    let mut turns = 0;
    let ended = under_load(&mut shop, &stranger, rate, SECONDS, openings, |node| {
        let end = Instant::now() + Duration::from_secs((SECONDS - 2).into());
        // Back as often as there, so that the node ends as it began.
        while Instant::now() < end || turns % 2 == 1 {
            let stopped = node.agent().unwrap().stop(Duration::from_secs(10)).unwrap();
            assert!(stopped.success(), "{stopped}");
            node.options.agent = versions[turns % 2].clone();
            node.start_agent().unwrap();
            node.wait_ready().unwrap();
            look(node, turns % 2 == 0);
            turns += 1;
            // What is sent again is not to meet the next one.
            std::thread::sleep(openings.pause());
        }
    });
    println!("{turns} agents took over: {rate}/s: {ended:?}");
    // Denials are the stranger's, and pods say things to the link that nobody should hear.
    let drops = shop.node.ask("drops").unwrap();
    let drops = drops["totals"].as_array().unwrap().iter();
    let unexpected: Vec<_> = drops
        .filter(|total| total["packets"] != 0)
        .filter(|total| {
            let reason = total["reason"].as_str().unwrap();
            let is_answer = reason == "no_flow" && openings == Openings::MayBeSentAgain;
            !is_answer && !["ingress_denied", "martian", "not_for_pod"].contains(&reason)
        })
        .collect();
    assert!(unexpected.is_empty(), "{unexpected:?}");
    assert!(turns >= 4, "only {turns} agents");
    // A connection survives the loss of a packet; an upgrade costs none.
    let sent_again = shop.sent_again().unwrap() - sent_again;
    println!("{sent_again} openings were sent again");
    if openings == Openings::Once {
        assert_eq!(sent_again, 0);
    }
    assert_eq!(ended.connections.failed(), 0, "{:?}", ended.connections);
    assert_eq!(ended.lookups.failed(), 0, "{:?}", ended.lookups);
    assert_eq!(ended.forbidden.succeeded(), 0, "{:?}", ended.forbidden);
    assert!(ended.forbidden.attempted >= u64::from(FORBIDDEN * SECONDS));
    let accepted = shop.accepted().unwrap() - accepted;
    // What was sent again may have been heard twice.
    let expected = ended.connections.attempted;
    assert!(
        accepted == expected || (openings == Openings::MayBeSentAgain && accepted > expected),
        "backends accepted {accepted}, not {expected}"
    );
    let said = shop.node.weir("verify").output().unwrap();
    let table = String::from_utf8_lossy(&said.stdout);
    assert!(said.status.success(), "{table}");

    // Tables of the other layout go when the kernel has let go of their programs.
    let end = Instant::now() + Duration::from_secs(60);
    while tables(&shop.node) != ours {
        assert!(
            Instant::now() < end,
            "{:?} instead of {ours:?}",
            tables(&shop.node)
        );
        std::thread::sleep(Duration::from_millis(200));
    }
}
