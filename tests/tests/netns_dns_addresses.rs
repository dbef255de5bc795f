//! Ring 4: the addresses at which weir-dns answers stay on the node, whoever takes them off, and a node that lacks a
//! family goes without its address. Who may ask there is in `netns_dns_policy`.

#![allow(
    clippy::unwrap_used,
    reason = "a test, and clippy.toml excuses only its test functions"
)]

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use weir_agent::conditions::Board;
use weir_agent::kernel::netlink::dns_addresses::keep_dns_addresses;
use weir_tests::netns::Netns;
use weir_tests::node::{CLUSTER_DNS, Node, NodeOptions};
use weir_tests::traffic::{PATIENCE, eventually};
use weir_tests::workloads::Workload;

const V4: &str = "169.254.53.53";
const V6: &str = "fd57:6569:7200::53";
/// Sooner than any audit: somebody was heard.
const AT_ONCE: Duration = Duration::from_secs(2);

/// Whether the server at this address answers a process of the namespace.
fn answers(netns: &Netns, server: &str) -> bool {
    let mut dig = netns.command("dig");
    dig.args([&format!("@{server}"), "+short", "+time=1", "+tries=1"]);
    dig.args(["kube-dns.kube-system.svc.cluster.local", "A"]);
    let said = dig.output().unwrap();
    String::from_utf8_lossy(&said.stdout).trim() == CLUSTER_DNS
}

#[test]
fn an_address_that_is_taken_off_is_put_back_and_lookups_go_on() {
    let node = Node::start(NodeOptions::named("dnskept")).unwrap();
    let netns = node.machine().netns();
    let client = node.run_pod(Workload::named("shop", "client")).unwrap();
    for (server, length) in [(V4, 32), (V6, 128)] {
        let asked = || answers(client.netns(), server);
        eventually("an answer", PATIENCE, asked, |it| *it).unwrap();
        for _ in 0..5 {
            netns
                .ip(&format!("addr del {server}/{length} dev lo"))
                .unwrap();
            eventually("an answer again", AT_ONCE, asked, |it| *it).unwrap();
        }
    }
    let there = netns.ip("addr show dev lo").unwrap();
    assert!(
        there.contains(&format!("inet {V4}/32 scope host")),
        "{there}"
    );
    assert!(there.contains("deprecated"), "{there}");
}

#[test]
fn a_node_without_ipv6_answers_over_ipv4_and_over_both_once_it_has_it() {
    let mut node = Node::prepare(NodeOptions::named("dnsv4")).unwrap();
    node.options.pod_cidrs = vec!["10.244.1.0/24".into()];
    node.options.service_cidrs = vec!["10.96.0.0/16".into()];
    let disabled = "net.ipv6.conf.all.disable_ipv6";
    node.machine().netns().set_sysctl(disabled, "1").unwrap();
    node.start_agent().unwrap();
    node.start_dns().unwrap();
    node.wait_ready().unwrap();
    {
        let netns = node.machine().netns();
        let client = node.run_pod(Workload::named("shop", "client")).unwrap();
        let asked = || answers(client.netns(), CLUSTER_DNS);
        eventually("an answer to a pod", PATIENCE, asked, |it| *it).unwrap();
        assert!(answers(netns, V4));
        assert!(!answers(netns, V6));
        netns.set_sysctl(disabled, "0").unwrap();
        let asked = || answers(netns, V6);
        eventually("an answer over IPv6", 2 * AT_ONCE, asked, |it| *it).unwrap();
    }
    let log = node.agent().unwrap().log();
    assert_eq!(log.matches("the node lacks the family").count(), 1, "{log}");
}

#[test]
fn an_address_that_cannot_be_put_there_is_a_condition_while_it_is_wanted() {
    let netns = Netns::new("dnsrefused").unwrap();
    netns.ip("link set lo up").unwrap();
    // No device has a multicast address of its own.
    let wanted: Vec<IpAddr> = [V4, "ff02::5353"].map(|ip| ip.parse().unwrap()).into();
    let board = Arc::new(Board::default());
    let faults = || -> Vec<String> {
        let all = board.all();
        all.iter()
            .map(|it| format!("{} {}", it.condition.about.fault(), it.condition.about))
            .collect()
    };
    let until = async |what: &str, expected: &[&str]| {
        for _ in 0..500 {
            if faults() == expected {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("in vain: {what}, {:?}", board.all());
    };
    let reporter = board.reporter("dns addresses");
    let watched = async {
        until("it is said", &["DnsAddress ff02::5353"]).await;
        let there = netns.ip("addr show dev lo").unwrap();
        assert!(there.contains(V4), "{there}");
        let unwanted = "net.ipv6.conf.lo.disable_ipv6";
        netns.set_sysctl(unwanted, "1").unwrap();
        until("nobody asks there", &[]).await;
    };
    netns
        .block_on(|| async {
            tokio::select! {
                () = keep_dns_addresses(wanted, Duration::from_millis(200), reporter) => {}
                () = watched => {}
            }
        })
        .unwrap();
}
