//! Ring 4: asking the cluster's DNS is up to NetworkPolicy, whichever of its addresses is asked, and the node's own
//! traffic with its pods never comes from those addresses. What DNS answers is in `netns_dns`.

#![allow(
    clippy::unwrap_used,
    reason = "a test, and clippy.toml excuses only its test functions"
)]

use std::process::Command;
use std::thread;
use std::time::Duration;

use weir_tests::node::{CLUSTER_DNS, Family, Node, NodeOptions, Pod};
use weir_tests::traffic::{Answer, PATIENCE, SILENCE, ask_tcp, eventually};
use weir_tests::workloads::{Transport, Workload};

const NAME: &str = "kube-dns.kube-system.svc.cluster.local";
const OBJECTS: &str = "
apiVersion: v1
kind: Service
metadata: {name: kube-dns, namespace: kube-system, labels: {k8s-app: kube-dns}}
spec:
  clusterIPs: ['10.96.0.10', 'fd00:10:96::10']
  ipFamilyPolicy: RequireDualStack
  ports: [{name: dns, port: 53, protocol: UDP}, {name: dns-tcp, port: 53, protocol: TCP}]
---
apiVersion: v1
kind: Namespace
metadata: {name: kube-system, labels: {kubernetes.io/metadata.name: kube-system}}
";
const DENY: &str = "
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: deny, namespace: shop}
spec: {podSelector: {matchLabels: {app: isolated}}, policyTypes: [Ingress, Egress]}
";
/// What everybody writes who denies egress, for UDP and TCP, or for one of them.
fn allow_dns(protocols: &[&str]) -> String {
    let ports: Vec<String> = protocols
        .iter()
        .map(|protocol| format!("{{port: 53, protocol: {protocol}}}"))
        .collect();
    format!(
        "{DENY}---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {{name: allow-dns, namespace: shop}}
spec:
  podSelector: {{}}
  policyTypes: [Egress]
  egress:
  - to:
    - namespaceSelector: {{matchLabels: {{kubernetes.io/metadata.name: kube-system}}}}
      podSelector: {{matchLabels: {{k8s-app: kube-dns}}}}
    ports: [{}]
",
        ports.join(", ")
    )
}

/// Where DNS is asked: at the Service and at the node's own addresses.
const SERVERS: [&str; 4] = [
    CLUSTER_DNS,
    "fd00:10:96::10",
    "169.254.53.53",
    "fd57:6569:7200::53",
];

/// Every way in which a pod can ask, and whether it was answered: at each server over UDP and TCP, from a socket
/// that the hooks see and packet by packet.
fn asked(pod: &Pod) -> Vec<(String, bool)> {
    let mut ways = Vec::new();
    for server in SERVERS {
        for transport in ["+notcp", "+tcp"] {
            let at_socket = pod.command("dig");
            ways.push((format!("{server} {transport} at the socket"), at_socket));
            let by_packet = pod.netns().command("dig");
            ways.push((format!("{server} {transport} by packet"), by_packet));
        }
    }
    let ask = |way: String, mut dig: Command| {
        let words = way.split_whitespace().take(2).collect::<Vec<_>>();
        dig.arg(format!("@{}", words[0])).arg(words[1]);
        dig.args(["+short", "+time=1", "+tries=1", NAME, "A"]);
        let output = dig.output().unwrap();
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        (way, said.trim() == CLUSTER_DNS)
    };
    thread::scope(|scope| {
        let running: Vec<_> = ways
            .into_iter()
            .map(|(way, dig)| scope.spawn(move || ask(way, dig)))
            .collect();
        running.into_iter().map(|it| it.join().unwrap()).collect()
    })
}

/// The ways that do not do as `expected`.
fn otherwise(pod: &Pod, expected: impl Fn(&str) -> bool) -> Vec<String> {
    let ways = asked(pod);
    assert_eq!(ways.len(), 16);
    let wrong = ways
        .into_iter()
        .filter(|(way, answered)| *answered != expected(way));
    wrong.map(|(way, _)| way).collect()
}

#[test]
fn a_pod_asks_dns_if_policy_lets_it() {
    let node = Node::start(NodeOptions::named("dnspolicy")).unwrap();
    node.write_manifest("cluster.yaml", OBJECTS).unwrap();
    let isolated = Workload::named("shop", "isolated").label("app", "isolated");
    let isolated = node.run_pod(isolated).unwrap();
    let free = node.run_pod(Workload::named("shop", "free")).unwrap();
    let expect = |what: &str, policy: &str, expected: fn(&str) -> bool| {
        node.write_manifest("policy.yaml", policy).unwrap();
        let look = || otherwise(&isolated, expected);
        eventually(what, PATIENCE, look, |wrong| wrong.is_empty()).unwrap();
        assert_eq!(look(), [""; 0], "{what}, and it stays so");
    };
    expect("no policy", "", |_| true);
    expect("default deny", DENY, |_| false);
    assert_eq!(otherwise(&free, |_| true), [""; 0], "a pod without policy");
    expect("DNS over UDP", &allow_dns(&["UDP"]), |way| {
        way.contains("+notcp")
    });
    expect("DNS", &allow_dns(&["UDP", "TCP"]), |_| true);
}

/// As on most nodes, no address of the node's own is on its loopback device: the kernel would then prefer one of
/// weir-dns's there as the source of what the node sends to its pods.
#[test]
fn a_node_reaches_its_isolated_pods_from_its_own_address() {
    let mut node = Node::prepare(NodeOptions::named("dnssource")).unwrap();
    {
        let netns = node.machine().netns();
        for words in [
            "link add eth0 type veth peer name eth1",
            "link set eth0 up",
            "link set eth1 up",
            "addr flush dev lo scope global",
            "addr add 192.0.2.1/24 dev eth0",
            "-6 addr add 2001:db8::1/64 dev eth0 nodad",
            "route add default dev eth0 src 192.0.2.1",
            "-6 route replace default dev eth0 src 2001:db8::1",
            // As an earlier version left them.
            "addr add 169.254.53.53/32 dev lo",
            "-6 addr add fd57:6569:7200::53/128 dev lo nodad",
        ] {
            netns.ip(words).unwrap();
        }
    }
    node.start_agent().unwrap();
    node.start_dns().unwrap();
    node.wait_ready().unwrap();
    node.write_manifest("cluster.yaml", OBJECTS).unwrap();
    node.write_manifest("policy.yaml", DENY).unwrap();
    let isolated = Workload::named("shop", "isolated")
        .label("app", "isolated")
        .port(Transport::Tcp, 80);
    let isolated = node.run_pod(isolated).unwrap();
    let other = node.run_pod(Workload::named("shop", "other")).unwrap();
    for (family, source) in [(Family::V4, "192.0.2.1"), (Family::V6, "2001:db8::1")] {
        let address = isolated.address(family).unwrap();
        let to = (address, 80).into();
        let from_other = || ask_tcp(other.netns(), to, SILENCE);
        let denied = |answer: &Answer| *answer == Answer::Silence;
        eventually("denied", PATIENCE, from_other, denied).unwrap();
        let mut ip = node.machine().netns().command("ip");
        let route = ip.args(["route", "get", &address.to_string()]).output();
        let route = String::from_utf8(route.unwrap().stdout).unwrap();
        assert!(route.contains(&format!("src {source} ")), "{route}");
        let answer = ask_tcp(node.machine().netns(), to, Duration::from_secs(2));
        assert_eq!(
            answer,
            Answer::By("isolated".into()),
            "a probe of {address}"
        );
    }
    let look = || otherwise(&other, |_| true);
    eventually("DNS", PATIENCE, look, |wrong| wrong.is_empty()).unwrap();
}
