//! The `weir` command against a real agent: what it shows, in both formats, and how it ends.

#![allow(
    clippy::unwrap_used,
    reason = "a test, and clippy.toml excuses only its test functions"
)]

use std::net::SocketAddr;
use std::process::Output;

use serde_json::Value;
use weir_tests::node::{Family, NodeOptions};
use weir_tests::shop::{Shop, WEB};
use weir_tests::traffic::{Conversation, PATIENCE};
use weir_tests::workloads::{Transport, Workload};

/// Every question that an agent answers, and words that the table for people must have.
const QUESTIONS: [(&str, &[&str]); 7] = [
    ("status", &["node cli", "ready", "3 pods", "weir_from_pod"]),
    ("services", &["shop/web", WEB]),
    ("endpoints", &["shop/web-0", "shop/client-0", "shop/quiet"]),
    ("policy", &["shop/hush", "ingress", "shop/quiet"]),
    ("flows", &["shop/client-0", "shop/web-0"]),
    ("drops", &["shop/hush", "shop/client-0", "shop/quiet"]),
    ("verify", &["The kernel holds exactly what it should."]),
];

const HUSH: &str = "\
kind: NetworkPolicy
apiVersion: networking.k8s.io/v1
metadata: {name: hush, namespace: shop}
spec:
  podSelector: {matchLabels: {app: quiet}}
  policyTypes: [Ingress]
";

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn asked(shop: &Shop, words: &str) -> Output {
    shop.node.weir(words).output().unwrap()
}

#[test]
fn every_question_is_answered_for_people_and_for_programs() {
    let mut shop = Shop::open(NodeOptions::named("cli"), 1, 1).unwrap();
    shop.node.write_manifest("hush.yaml", HUSH).unwrap();
    let quiet = Workload::named("shop", "quiet").port(Transport::Tcp, 80);
    shop.backends.push(shop.node.run_pod(quiet).unwrap());
    shop.still_serves().unwrap();
    // A conversation that is not over.
    let web = shop.backends[0].address(Family::V4).unwrap();
    let target = SocketAddr::new(web, 80);
    let mut open = Conversation::open_in(shop.clients[0].netns(), target, PATIENCE).unwrap();
    assert_eq!(open.ask().unwrap(), "web-0");
    let quiet = shop.backends[1].address(Family::V4).unwrap();
    let mut denied = shop.clients[0].command("curl");
    denied.args(["-s", "--max-time", "1", &format!("http://{quiet}/")]);
    assert!(!denied.status().unwrap().success(), "the policy denies it");

    for (question, words) in QUESTIONS {
        let said = asked(&shop, question);
        let table = text(&said.stdout);
        assert!(said.status.success(), "{question}: {}", text(&said.stderr));
        for word in words {
            assert!(
                table.contains(word),
                "{question} says no {word:?}:\n{table}"
            );
        }
        let said = asked(&shop, &format!("{question} -o json"));
        let parsed = serde_json::from_slice::<Value>(&said.stdout);
        assert!(parsed.is_ok(), "{question}: {}", text(&said.stdout));
        assert!(said.stderr.is_empty(), "{}", text(&said.stderr));
    }
    let policy = shop.node.ask("policy").unwrap();
    assert_eq!(policy[0]["policy"], "shop/hush");
    assert_eq!(policy[0]["pods"][0], "shop/quiet");
    let drops = shop.node.ask("drops").unwrap();
    let recent = drops["recent"].as_array().unwrap();
    assert!(
        recent.iter().any(|d| {
            d["source"]["name"] == "shop/client-0" && d["destination"]["name"] == "shop/quiet"
        }),
        "{drops}"
    );
}

#[test]
fn a_node_that_lacks_a_hook_differs_and_says_which() {
    let shop = Shop::open(NodeOptions::named("cli-drift"), 1, 1).unwrap();
    let bpffs = shop.node.machine().bpffs().path();
    let pin = bpffs.join("weir/links/weir_connect6");
    // The agent repairs it every few seconds: a look right after that finds nothing wrong.
    let said = (0..3)
        .map(|_| {
            std::fs::remove_file(&pin).unwrap();
            asked(&shop, "verify")
        })
        .find(|said| !said.status.success())
        .unwrap();
    assert_eq!(said.status.code(), Some(1), "{}", text(&said.stdout));
    assert!(text(&said.stdout).contains("weir_connect6"));
    assert!(text(&said.stdout).contains("differs from what it should hold"));
}

#[test]
fn without_an_agent_every_question_ends_in_2_and_one_line_that_says_what_to_look_at() {
    let mut shop = Shop::open(NodeOptions::named("cli-down"), 1, 1).unwrap();
    shop.node.kill_agent().unwrap();
    for (question, _) in QUESTIONS {
        for format in ["table", "json"] {
            let said = asked(&shop, &format!("{question} -o {format}"));
            let complaint = text(&said.stderr);
            assert_eq!(said.status.code(), Some(2), "{question}: {complaint}");
            assert!(said.stdout.is_empty(), "{}", text(&said.stdout));
            assert_eq!(complaint.lines().count(), 1, "{complaint}");
            assert!(
                complaint.contains("is weir-agent running on this node?"),
                "{complaint}"
            );
        }
    }
}

#[test]
fn the_doctor_needs_no_agent_and_names_what_is_missing() {
    let node = weir_tests::node::Node::prepare(NodeOptions::named("doctor")).unwrap();
    let bpffs = node.machine().bpffs().path().join("weir");
    let cgroup = node.machine().cgroup().path();
    let (bpffs, cgroup) = (bpffs.display(), cgroup.display());
    let well = node.weir(&format!("doctor --bpffs {bpffs} --cgroup {cgroup}"));
    let said = { well }.output().unwrap();
    let checks = text(&said.stdout);
    assert!(said.status.success(), "{checks}{}", text(&said.stderr));
    assert!(checks.lines().all(|l| l.starts_with("ok ")), "{checks}");

    let ill = node.weir(&format!("doctor --bpffs /tmp --cgroup {cgroup}"));
    let said = { ill }.output().unwrap();
    let checks = text(&said.stdout);
    assert_eq!(said.status.code(), Some(1), "{checks}");
    let missing: Vec<_> = checks
        .lines()
        .filter(|l| l.starts_with("MISSING"))
        .collect();
    assert_eq!(missing.len(), 1, "{checks}");
    assert!(missing[0].contains("mount -t bpf"), "{checks}");
}
