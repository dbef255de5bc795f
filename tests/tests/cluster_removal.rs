//! A node of a real cluster after Weir, against what it was before: nothing is left and nothing is missing.

#![allow(clippy::unwrap_used, reason = "a test that fails should say where")]

use std::path::Path;
use std::time::{Duration, Instant};

use weir_tests::cluster::census::Census;
use weir_tests::cluster::kills::{self, Unrest};
use weir_tests::cluster::options::{Cni, Dns, Options, Proxy};
use weir_tests::cluster::programs::Programs;
use weir_tests::cluster::{Cluster, End};

const NODES: [&str; 2] = ["n1", "n2"];
/// What the kernel, the runtime and the kubelet may take to tidy up after pods.
const SETTLING: Duration = Duration::from_secs(60);
/// Settings that an agent changes, and those that the kernel changes along, as no node has them.
const UNUSUAL: [&str; 7] = [
    "net.ipv4.ip_forward=0",
    "net.ipv4.conf.all.accept_redirects=0",
    "net.ipv4.conf.lo.forwarding=1",
    "net.ipv4.conf.all.rp_filter=1",
    "net.ipv6.conf.all.forwarding=0",
    "net.ipv6.conf.default.accept_ra=1",
    "net.ipv6.conf.lo.forwarding=1",
];
/// Pods on both nodes, a Service with a port of the nodes, a policy.
const WORKLOAD: &str = include_str!("manifests/workload.yaml");

const CLEANUP: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../deploy/cleanup.yaml");

#[test]
fn a_node_without_weir_is_what_it_was_before() {
    let Some(programs) = Programs::for_test("a_node_without_weir_is_what_it_was_before") else {
        return;
    };
    let options = Options {
        cni: Cni::None,
        proxy: Proxy::None,
        dns: Dns::None,
        ..Options::of_test("gone")
    };
    let cluster = Cluster::up(options, programs, End::TakenDown).unwrap();
    for node in NODES {
        let run = |words: &[&str]| {
            let status = cluster.inside(node).unwrap().args(words).status();
            assert!(status.unwrap().success(), "{node}: {words:?}");
        };
        run(&[&["sysctl", "-q", "-w"], &UNUSUAL[..]].concat());
        // The runtime makes it for the first pod, whatever its network, and leaves it there, empty.
        run(&["mkdir", "-p", "/var/lib/cni/results"]);
    }
    let before = NODES.map(|node| Census::of(&cluster, node).unwrap());

    cluster.install_weir().unwrap();
    let kubectl = cluster.kubectl();
    kubectl.apply(WORKLOAD).unwrap();
    let wait = ["rollout", "status", "deployment/echo", "--timeout=120s"];
    kubectl.run(&wait).unwrap();
    // What was before is what was before the first agent.
    let unrest = Unrest {
        kill_agents: Some(1),
        kill_dns: None,
    };
    let (_, tolls) = kills::during(&cluster, unrest, || {
        std::thread::sleep(Duration::from_millis(1500));
    })
    .unwrap();
    assert!(tolls.are_enough(), "{tolls}");
    let installed = NODES.map(|node| Census::of(&cluster, node).unwrap());
    for (node, (before, installed)) in NODES.iter().zip(before.iter().zip(&installed)) {
        let difference = before.difference(installed);
        for what in [
            "weir_from_pod",
            "weir_to_pod",
            "weir_to_net",
            "weir_from_net",
            "route 10.244.",
            "/opt/cni/bin/weir-cni",
            "/etc/cni/net.d/05-weir.conflist",
            "/sys/fs/bpf/weir",
            "/run/weir/cni.sock",
            "/var/lib/weir",
            "sysctl net/ipv4/ip_forward = 1",
            "table inet weir",
            "connect4",
            "169.254.53.53",
        ] {
            let is_seen = difference.iter().any(|it| it.contains(what));
            assert!(
                is_seen,
                "{node}: the census does not see {what}: {difference:#?}"
            );
        }
    }

    kubectl
        .run_with_input(&["delete", "--wait", "-f", "-"], WORKLOAD)
        .unwrap();
    let gone = ["wait", "--for=delete", "pod", "--all", "--timeout=120s"];
    kubectl.run(&gone).unwrap();
    let said = cluster.remove_weir(Path::new(CLEANUP)).unwrap();
    for (node, before) in NODES.iter().zip(&before) {
        let deadline = Instant::now() + SETTLING;
        let difference = loop {
            let after = Census::of(&cluster, node).unwrap();
            let difference = before.difference(&after);
            if difference.is_empty() || Instant::now() > deadline {
                break difference;
            }
            std::thread::sleep(Duration::from_millis(500));
        };
        let difference = difference.join("\n  ");
        assert_eq!(
            difference,
            "",
            "{node}, of {} things:\n  {difference}\n{said}",
            before.len()
        );
        println!("{node}: {} things, each as before", before.len());
    }
}
