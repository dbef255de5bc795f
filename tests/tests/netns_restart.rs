//! The agent and weir-dns killed, stopped and started again under load: what is lost. Each "nothing is
//! lost" says how many were tried.
//!
//! Seen failing: build `weir-agent --features broken-detach-first` into a folder with the other
//! programs, and run `WEIR_BIN_DIR=… cargo test --test netns_restart nothing_is_lost`.

#![allow(
    clippy::unwrap_used,
    reason = "a test, and clippy.toml excuses only its test functions"
)]

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde_json::Value;
use weir_tests::load::{Load, Tally};
use weir_tests::node::{Family, Node, NodeOptions};
use weir_tests::shop::{DNS, Shop, WEB, WEB_NAME};

/// Connections per second, of all clients together: the first that the harness sustains by itself.
const RATES: [u32; 7] = [1000, 800, 600, 400, 300, 200, 100];
/// Lookups per second.
const LOOKUPS: u32 = 200;
/// Load wants the machine for itself.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn is_long() -> bool {
    std::env::var_os("WEIR_LONG").is_some()
}

/// HTTP from all clients but the last and DNS from the last, while `meanwhile` runs.
fn under_load(
    shop: &mut Shop,
    rate: u32,
    seconds: u32,
    meanwhile: impl FnOnce(&mut Node),
) -> Ended {
    let (asker, clients) = shop.clients.split_last().unwrap();
    let each = rate / u32::try_from(clients.len()).unwrap();
    let http = format!("--kind http --target {WEB} --rate {each} --seconds {seconds}");
    let dns =
        format!("--kind dns --target {DNS} --name {WEB_NAME} --rate {LOOKUPS} --seconds {seconds}");
    let loads: Vec<_> = clients
        .iter()
        .map(|c| Load::start(c, &http).unwrap())
        .collect();
    let lookups = Load::start(asker, &dns).unwrap();
    meanwhile(&mut shop.node);
    let mut connections = Tally::default();
    for load in loads {
        connections += load.finish().unwrap();
    }
    let lookups = lookups.finish().unwrap();
    Ended {
        connections,
        lookups,
    }
}

/// What became of connections and lookups side by side.
#[derive(Debug)]
struct Ended {
    connections: Tally,
    lookups: Tally,
}

/// The kernel's numbers of every pinned link and table, by the name of the pin.
fn pinned(node: &Node) -> BTreeMap<String, u64> {
    let weir = node.machine().bpffs().path().join("weir");
    let number = |kind: &str, pin: &Path| {
        let mut bpftool = Command::new("bpftool");
        let said = bpftool
            .args(["-j", kind, "show", "pinned"])
            .arg(pin)
            .output();
        let said: Value = serde_json::from_slice(&said.unwrap().stdout).unwrap();
        said["id"].as_u64().unwrap()
    };
    let mut found = BTreeMap::new();
    for (folder, kind) in [(weir.join("links"), "link"), (weir, "map")] {
        for entry in fs::read_dir(folder).unwrap() {
            let entry = entry.unwrap();
            if entry.file_type().unwrap().is_file() {
                let name = entry.file_name().into_string().unwrap();
                found.insert(format!("{kind} {name}"), number(kind, &entry.path()));
            }
        }
    }
    found
}

fn assert_verified(node: &Node) {
    let said = node.weir("verify").output().unwrap();
    let table = String::from_utf8_lossy(&said.stdout);
    assert!(said.status.success(), "{table}");
}

/// Can the first client fetch this address?
fn reaches(shop: &Shop, target: &str) -> bool {
    let mut curl = shop.clients[0].command("curl");
    curl.args(["-s", "-o", "/dev/null", "--max-time", "2"]);
    let ended = curl.arg(format!("http://{target}/")).status();
    ended.unwrap().success()
}

#[test]
fn nothing_is_lost_while_the_agent_is_killed_every_second() {
    let _alone = alone();
    let seconds = if is_long() { 60 } else { 20 };
    let mut shop = Shop::open(NodeOptions::named("kill"), 3, 3).unwrap();
    shop.wait_for_names().unwrap();
    // A control that is as long as the run shows whether the machine itself holds out.
    let control = if is_long() { seconds } else { 6 };
    // Agents that start cost as much as the load: those of another node are killed meanwhile.
    let mut bystander = Node::prepare(NodeOptions::named("bystander")).unwrap();
    bystander.start_agent().unwrap();
    let rate = RATES.into_iter().find(|rate| {
        let ended = under_load(&mut shop, *rate, control, |_| {
            for _ in 1..control {
                std::thread::sleep(Duration::from_secs(1));
                bystander.kill_agent().unwrap();
                bystander.start_agent().unwrap();
            }
        });
        let is_on_time = ended.connections.took_ms < u64::from(control) * 1100;
        println!("control, agents of another node killed, {rate}/s: {ended:?}");
        is_on_time && ended.connections.failed() == 0 && ended.lookups.failed() == 0
    });
    let rate = rate.expect("the harness sustains no rate even while this agent lives");
    drop(bystander);

    for (when, seconds) in [(Kill::EverySecond, seconds), (Kill::OnceReady, seconds / 2)] {
        lose_nothing(&mut shop, rate, seconds, when);
    }
}

/// When the agent is killed.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Kill {
    EverySecond,
    /// A slow machine never gets that far within a second.
    OnceReady,
}

fn lose_nothing(shop: &mut Shop, rate: u32, seconds: u32, when: Kill) {
    let before = pinned(&shop.node);
    let accepted = shop.accepted().unwrap();
    let ready_before = ready(&mut shop.node);
    let mut kills = 0;
    let ended = under_load(shop, rate, seconds, |node| {
        let start = Instant::now();
        let end = start + Duration::from_secs((seconds - 1).into());
        while Instant::now() < end {
            match when {
                Kill::EverySecond => {
                    let next = start + Duration::from_secs(kills + 1);
                    std::thread::sleep(next.saturating_duration_since(Instant::now()));
                }
                Kill::OnceReady => node.wait_ready().unwrap(),
            }
            node.kill_agent().unwrap();
            node.start_agent().unwrap();
            kills += 1;
        }
    });
    shop.node.wait_ready().unwrap();
    let ready = ready(&mut shop.node) - ready_before;
    println!("{when:?}: {rate}/s, {kills} kills, {ready} agents became ready: {ended:?}");
    // Whose loss it is, if there is one: the datapath counts every packet that it drops.
    println!("weir drops since the node began: {:?}", drops(&shop.node));
    assert!(kills >= 3, "only {kills} kills");
    assert_eq!(ended.connections.failed(), 0, "{:?}", ended.connections);
    assert_eq!(ended.lookups.failed(), 0, "{:?}", ended.lookups);
    let accepted = shop.accepted().unwrap() - accepted;
    assert_eq!(
        accepted, ended.connections.attempted,
        "accepted by backends"
    );
    assert_eq!(
        pinned(&shop.node),
        before,
        "links and tables are the same ones"
    );
    assert_verified(&shop.node);
}

/// Packets dropped, by reason.
fn drops(node: &Node) -> BTreeMap<String, u64> {
    let drops = node.ask("drops").unwrap();
    let totals = drops["totals"].as_array().unwrap().iter();
    let counted = totals.map(|t| {
        let reason = t["reason"].as_str().unwrap().to_owned();
        (reason, t["packets"].as_u64().unwrap())
    });
    counted.filter(|(_, packets)| *packets > 0).collect()
}

/// How many agents have become ready since the node was made.
fn ready(node: &mut Node) -> usize {
    let log = node.agent().unwrap().log();
    log.lines().filter(|l| l.ends_with("line: ready")).count()
}

#[test]
fn a_stopped_agent_leaves_everything_and_the_next_picks_up_what_changed() {
    let service = |name: &str, address: &str| {
        format!(
            "kind: Service\napiVersion: v1\nmetadata: {{name: {name}, namespace: shop}}\n\
             spec: {{clusterIP: {address}, selector: {{app: web}}, ports: [{{port: 80}}]}}\n"
        )
    };
    let mut shop = Shop::open(NodeOptions::named("stop"), 2, 1).unwrap();
    let second = Duration::from_secs(10);
    shop.node
        .write_manifest("old.yaml", &service("old", "10.96.0.30"))
        .unwrap();
    shop.node.wait_for_service("shop/old", 2, second).unwrap();
    assert!(reaches(&shop, "10.96.0.30"));
    let before = pinned(&shop.node);

    let status = shop.node.agent().unwrap().stop(second).unwrap();
    assert_eq!(status.code(), Some(0), "SIGTERM is an order, not a fault");
    assert_eq!(pinned(&shop.node), before);
    for _ in 0..50 {
        shop.still_serves().unwrap();
    }
    assert!(reaches(&shop, "10.96.0.30"));

    // Nobody watches: a Service goes, another comes, and a backend ends.
    fs::remove_file(shop.node.manifests().join("old.yaml")).unwrap();
    shop.node
        .write_manifest("new.yaml", &service("new", "10.96.0.31"))
        .unwrap();
    let ended = shop.backends.remove(0);
    let address = ended.address(Family::V4).unwrap();
    shop.node.delete_pod(ended).unwrap();

    shop.node.start_agent().unwrap();
    shop.node.wait_ready().unwrap();
    shop.node.wait_for_service("shop/new", 1, second).unwrap();
    shop.node.wait_for_service("shop/web", 1, second).unwrap();
    assert!(reaches(&shop, "10.96.0.31"));
    assert!(
        !reaches(&shop, "10.96.0.30"),
        "a deleted Service is still served"
    );
    for _ in 0..20 {
        shop.still_serves().unwrap();
    }
    let pods = shop.node.ask("endpoints").unwrap().to_string();
    assert!(!pods.contains(&format!("\"{address}\"")), "{pods}");
    assert_verified(&shop.node);
}

#[test]
fn lookups_while_weir_dns_is_killed_need_one_retry_at_most() {
    let _alone = alone();
    let kills = if is_long() { 10 } else { 3 };
    let mut shop = Shop::open(NodeOptions::named("dns-kill"), 1, 1).unwrap();
    shop.wait_for_names().unwrap();
    let seconds = 3 * (kills + 1);
    // A resolver asks again after a second (`options timeout:1`).
    let words = format!(
        "--kind dns --target {DNS} --name {WEB_NAME} --rate 100 --seconds {seconds} \
         --retry-after 1000"
    );
    let load = Load::start(&shop.clients[0], &words).unwrap();
    let start = Instant::now();
    for kill in 1..=kills {
        let next = start + Duration::from_secs(3 * kill);
        std::thread::sleep(next.saturating_duration_since(Instant::now()));
        shop.node.dns().unwrap().kill().unwrap();
        shop.node.start_dns().unwrap();
    }
    let tally = load.finish().unwrap();
    println!("{kills} kills of weir-dns: {tally:?}");
    assert_eq!(tally.attempted, 100 * seconds);
    assert_eq!(tally.failed(), 0, "lost after one retry: {tally:?}");
}
