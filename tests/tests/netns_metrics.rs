//! What Prometheus and probes get of a real agent: pages that the tools accept, and counters that move.

#![allow(
    clippy::unwrap_used,
    reason = "a test, and clippy.toml excuses only its test functions"
)]

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use weir_tests::node::{Family, Node, NodeOptions, Source};
use weir_tests::shop::Shop;
use weir_tests::workloads::{Transport, Workload};

/// A policy that lets nothing in.
const HUSH: &str = "\
kind: NetworkPolicy
apiVersion: networking.k8s.io/v1
metadata: {name: hush, namespace: shop}
spec:
  podSelector: {matchLabels: {app: quiet}}
  policyTypes: [Ingress]
";

/// `promtool`, which `cargo xtask setup` unpacks into `target/tools`.
fn promtool() -> PathBuf {
    let tools = std::env::var_os("WEIR_TOOLS_DIR").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/tools"),
        PathBuf::from,
    );
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain([tools.clone(), tools.join("usr/bin")])
        .map(|folder| folder.join("promtool"))
        .find(|file| file.is_file())
        .unwrap_or_else(|| {
            panic!(
                "no promtool in PATH or {}: run `cargo xtask setup`, which fetches it",
                tools.display()
            )
        })
}

/// The page as a client that accepts `accept` gets it, with its type.
fn page(node: &Node, accept: &str) -> (String, String) {
    let mut curl = node.machine().netns().command("curl");
    curl.args(["-sf", "-w", "\n%{content_type}", "-H"]);
    curl.arg(format!("Accept: {accept}"));
    let output = curl.arg("http://127.0.0.1:9660/metrics").output().unwrap();
    assert!(output.status.success(), "{}", output.status);
    let text = String::from_utf8(output.stdout).unwrap();
    let (page, kind) = text.rsplit_once('\n').unwrap();
    (page.to_owned(), kind.to_owned())
}

fn probe(node: &Node, path: &str) -> (String, String) {
    let mut curl = node.machine().netns().command("curl");
    curl.args(["-s", "-w", "\n%{http_code}"]);
    let output = curl.arg(format!("http://127.0.0.1:9660{path}")).output();
    let text = String::from_utf8(output.unwrap().stdout).unwrap();
    let (said, code) = text.rsplit_once('\n').unwrap();
    (code.to_owned(), said.trim().to_owned())
}

/// The value of the sample whose line begins with this.
fn sample(node: &Node, begins: &str) -> f64 {
    let page = node.metrics().unwrap();
    let line = page.lines().find(|l| l.starts_with(begins));
    let line = line.unwrap_or_else(|| panic!("no {begins} in\n{page}"));
    line.rsplit(' ').next().unwrap().parse().unwrap()
}

#[test]
fn promtool_finds_no_fault_with_the_page() {
    let node = Node::start(NodeOptions::named("promtool")).unwrap();
    let (text, kind) = page(&node, "text/plain");
    assert!(kind.starts_with("text/plain; version=0.0.4"), "{kind}");
    let mut checker = Command::new(promtool())
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = checker.stdin.take().unwrap();
    stdin.write_all(text.as_bytes()).unwrap();
    drop(stdin);
    let said = checker.wait_with_output().unwrap();
    let faults = String::from_utf8_lossy(&said.stderr);
    assert!(
        said.status.success() && faults.is_empty(),
        "{faults}\n{text}"
    );
    let samples = text.lines().filter(|l| !l.starts_with('#')).count();
    assert!(samples > 50, "only {samples} samples");
    println!("promtool: 0 faults in {samples} samples");
}

#[test]
fn a_scraper_that_reads_openmetrics_gets_it() {
    let node = Node::start(NodeOptions::named("openmetrics")).unwrap();
    // As Prometheus asks.
    let accept = "application/openmetrics-text;version=1.0.0;q=0.75,text/plain;version=0.0.4;q=0.5";
    let (text, kind) = page(&node, accept);
    assert!(kind.starts_with("application/openmetrics-text"), "{kind}");
    assert!(text.ends_with("# EOF\n"), "{text}");
}

#[test]
fn counters_move_with_traffic_and_say_why_packets_were_dropped() {
    let mut shop = Shop::open(NodeOptions::named("counters"), 1, 1).unwrap();
    shop.node.write_manifest("hush.yaml", HUSH).unwrap();
    let quiet = Workload::named("shop", "quiet").port(Transport::Tcp, 80);
    shop.backends.push(shop.node.run_pod(quiet).unwrap());
    let balanced = "weir_socket_translations_total";
    let denied = "weir_drops_total{reason=\"ingress_denied\"}";
    let before = (sample(&shop.node, balanced), sample(&shop.node, denied));
    for _ in 0..10 {
        shop.still_serves().unwrap();
    }
    let address = shop.backends[1].address(Family::V4).unwrap();
    let mut curl = shop.clients[0].command("curl");
    curl.args(["-s", "--max-time", "1", &format!("http://{address}/")]);
    assert!(!curl.status().unwrap().success());
    let after = (sample(&shop.node, balanced), sample(&shop.node, denied));
    assert!(
        after.0 >= before.0 + 10.0,
        "{balanced}: {before:?} {after:?}"
    );
    assert!(after.1 > before.1, "{denied}: {before:?} {after:?}");
    assert_eq!(sample(&shop.node, "weir_pods "), 3.0);
    assert_eq!(sample(&shop.node, "weir_not_ready_reasons "), 0.0);
}

const NOWHERE: &str = "\
apiVersion: v1
kind: Config
current-context: nowhere
clusters: [{name: nowhere, cluster: {server: 'http://127.0.0.1:1'}}]
contexts: [{name: nowhere, context: {cluster: nowhere, user: nobody}}]
users: [{name: nobody, user: {token: none}}]
";

#[test]
fn a_node_that_is_not_ready_says_why_and_is_alive() {
    let mut node = Node::prepare(NodeOptions::named("unready")).unwrap();
    let kubeconfig = node.machine().dir().join("kubeconfig");
    std::fs::write(&kubeconfig, NOWHERE).unwrap();
    node.options.source = Source::Kube {
        kubeconfig,
        api_server: "http://127.0.0.1:1".into(),
    };
    node.start_agent().unwrap();
    let patience = Duration::from_secs(10);
    let log = "weir-agent runs";
    node.agent().unwrap().wait_for_log(log, patience).unwrap();
    let deadline = Instant::now() + patience;
    let why = loop {
        let (code, why) = probe(&node, "/readyz");
        assert_eq!(code, "503", "{why}");
        // Before the first attempt nothing is known to be wrong.
        if why.contains("Connection refused") {
            break why;
        }
        assert!(Instant::now() < deadline, "no cause in {why:?}");
    };
    for kind in ["Service", "EndpointSlice", "Pod", "NetworkPolicy"] {
        let reason = format!("{kind} objects are not synced yet");
        assert!(why.contains(&reason), "{why}");
    }
    assert!(why.contains("--kube-api-server"), "{why}");
    assert_eq!(probe(&node, "/healthz"), ("200".into(), "ok".into()));
    let said = node.weir("status").output().unwrap();
    assert_eq!(said.status.code(), Some(1), "weir status agrees");

    // The same node with a source that answers.
    node.kill_agent().unwrap();
    node.options.source = Source::Manifests;
    node.start_agent().unwrap();
    node.wait_ready().unwrap();
    assert_eq!(probe(&node, "/readyz"), ("200".into(), "ok".into()));
}
