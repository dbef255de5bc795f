//! The `weir` command against a real agent: what it shows, in both formats, and how it ends.

#![allow(
    clippy::unwrap_used,
    reason = "a test, and clippy.toml excuses only its test functions"
)]

use std::net::SocketAddr;
use std::process::Output;
use std::time::{Duration, Instant};

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

/// A pod of a node that there is not, and its policy.
const FAR: &str = "\
kind: Pod
apiVersion: v1
metadata: {name: far, namespace: shop, labels: {app: far}}
spec: {nodeName: elsewhere, containers: []}
status: {phase: Running, podIP: 10.99.0.9, podIPs: [{ip: 10.99.0.9}]}
---
kind: NetworkPolicy
apiVersion: networking.k8s.io/v1
metadata: {name: far, namespace: shop}
spec:
  podSelector: {matchLabels: {app: far}}
  ingress:
  - from: [{podSelector: {matchLabels: {app: web}}}]
    ports: [{port: 80}]
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

/// Of a pod of this node and one of another, by name, by address, by Service, both ways.
#[test]
fn why_something_may_pass_is_explained_as_the_packets_say() {
    let mut shop = Shop::open(NodeOptions::named("cli-why"), 1, 1).unwrap();
    shop.node.write_manifest("hush.yaml", HUSH).unwrap();
    shop.node.write_manifest("far.yaml", FAR).unwrap();
    let quiet = Workload::named("shop", "quiet")
        .label("app", "quiet")
        .port(Transport::Tcp, 80);
    shop.backends.push(shop.node.run_pod(quiet).unwrap());
    shop.still_serves().unwrap();
    let quiet = shop.backends[1].address(Family::V4).unwrap();
    let explain = |from: &str, to: &str, format: &str| {
        asked(&shop, &format!("policy explain {from} {to} -o {format}"))
    };
    let denied = || {
        let mut curl = shop.clients[0].command("curl");
        curl.args(["-s", "--max-time", "1", &format!("http://{quiet}/")]);
        !curl.status().unwrap().success()
    };

    let said = explain("shop/client-0", "shop/quiet:80", "json");
    assert_eq!(said.status.code(), Some(1), "{}", text(&said.stderr));
    let explained: Value = serde_json::from_slice(&said.stdout).unwrap();
    let case = &explained["cases"][0];
    assert_eq!(case["allowed"], false, "{case}");
    assert_eq!(case["egress"]["why"], "open");
    assert_eq!(case["ingress"]["why"], "isolated");
    assert_eq!(case["ingress"]["isolated_by"][0], "shop/hush");
    assert!(denied(), "the policy denies what it is said to deny");
    let table = text(&explain("shop/client-0", &format!("{quiet}:80"), "table").stdout);
    println!("{table}");
    for word in [
        "DENIED",
        "shop/client-0",
        "isolated by shop/hush",
        "kind: NetworkPolicy",
    ] {
        assert!(table.contains(word), "no {word:?}:\n{table}");
    }

    // What would change is said before it does.
    let yaml = case["yaml"].as_str().unwrap();
    let new = tempfile::tempdir().unwrap();
    std::fs::write(new.path().join("help.yaml"), yaml).unwrap();
    let new = new.path().display();
    let said = asked(&shop, &format!("policy diff -f {new}"));
    let table = text(&said.stdout);
    println!("{table}");
    assert!(said.status.success(), "{table}{}", text(&said.stderr));
    let words = "shop/client-0\n  -> shop/quiet\n     opens TCP 80\n1 change between 4 pods";
    assert!(table.starts_with(words), "{table}");
    let said = asked(&shop, &format!("policy diff --whole -f {new}"));
    let table = text(&said.stdout);
    assert!(
        table.contains("-> shop/far") && table.contains("opens everything"),
        "{table}"
    );

    // What is said to help does.
    shop.node.write_manifest("help.yaml", yaml).unwrap();
    let deadline = Instant::now() + Duration::from_secs(10);
    while !explain("shop/client-0", "shop/quiet:80", "table")
        .status
        .success()
    {
        assert!(Instant::now() < deadline, "{yaml}");
        std::thread::sleep(Duration::from_millis(50));
    }
    assert!(!denied(), "the policy allows what it is said to allow");

    let lines = |from: &str, to: &str| {
        let said = explain(from, to, "table");
        (said.status.code(), text(&said.stdout) + &text(&said.stderr))
    };
    for (from, to, code, words) in [
        ("shop/client-0", WEB, 0, "is an address of Service shop/web"),
        ("shop/client-0", "svc/shop/web:80", 0, "-> shop/web-0"),
        (
            "shop/client-0",
            "shop/client-0:80",
            0,
            "a pod and itself: always allowed",
        ),
        ("203.0.113.9", "shop/web-0:80", 0, "203.0.113.9 (outside)"),
        // On a node of which only the objects are known.
        (
            "shop/client-0",
            "shop/far:80",
            1,
            "the pod at the other end has app=client, not app=web",
        ),
        (
            "shop/web-0",
            "shop/far:80",
            0,
            "allowed by shop/far spec.ingress[0]",
        ),
        ("shop/web-0", "shop/far:81", 1, "it is for TCP 80 only"),
        (
            "shop/client-0",
            "shop/nobody:80",
            2,
            "there is no pod shop/nobody",
        ),
        (
            "shop/client-0",
            "example.org:80",
            2,
            "getent ahosts example.org",
        ),
        ("shop/client-0", "svc/shop/web:81", 2, "it has 80/TCP"),
    ] {
        let (found, said) = lines(from, to);
        assert!(
            found == Some(code) && said.contains(words),
            "{from} {to}: {found:?} {said}"
        );
    }
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
