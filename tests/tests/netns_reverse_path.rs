//! Ring 4: nodes that filter reverse paths as strictly as the kernel can, on every device, and that take nothing in with an
//! address of their own. Every way of a conversation on which a node's stack sees a packet passes that.
//!
//! Seen failing: an agent that turns the filter off, as all did up to 60a8515; `enter` of `datapath/src/plan.rs` with
//! `Hook::FROM_POD` in place of `Hook::TO_NET`.

#![allow(
    clippy::unwrap_used,
    reason = "a test, and clippy.toml excuses only its test functions"
)]

use std::fs;
use std::net::SocketAddr;
use std::path::Path;

use weir_tests::lan::Pair;
use weir_tests::machine::Machine;
use weir_tests::netns::Netns;
use weir_tests::node::{Family, Pod, binary};
use weir_tests::traffic::{Answer, PATIENCE, ask_tcp, ask_udp, is_echoed};
use weir_tests::workloads::{Transport, Workload};

const WORLD: &str = "10.210.0.200";
const HERE: &str = "10.96.0.31";
const THERE: &str = "10.96.0.33";
/// A port that nobody serves, at the node and at the pods.
const CLOSED: u16 = 9;

/// A Service of what is in `slice`, and for a port that its endpoints have not.
fn service(name: &str, ip: &str, node_port: u16, policy: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: shop}}\nspec:\n  type: NodePort\n  \
         clusterIP: {ip}\n  externalTrafficPolicy: {policy}\n  ports:\n  \
         - {{name: web, port: 80, targetPort: 8080, nodePort: {node_port}}}\n  \
         - {{name: feed, port: 81, targetPort: 8081, protocol: UDP, nodePort: {}}}\n  \
         - {{name: none, port: 82, targetPort: {CLOSED}, protocol: UDP, nodePort: {}}}\n",
        node_port + 1,
        node_port + 2,
    )
}

fn slice(service: &str, pod: &Pod, node: &str) -> String {
    let ip = pod.address(Family::V4).unwrap();
    format!(
        "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {{name: {service}-1, namespace: shop, \
         labels: {{kubernetes.io/service-name: {service}}}}}\naddressType: IPv4\n\
         endpoints: [{{addresses: ['{ip}'], nodeName: {node}, conditions: {{ready: true}}}}]\nports:\n\
         - {{name: web, port: 8080}}\n- {{name: feed, port: 8081, protocol: UDP}}\n\
         - {{name: none, port: {CLOSED}, protocol: UDP}}\n"
    )
}

/// What the kernel of a namespace holds of its IPv4 devices: the value of a setting, by device.
fn values(netns: &Netns, key: &str) -> Vec<(String, String)> {
    let read = || {
        let devices = fs::read_dir("/proc/sys/net/ipv4/conf").unwrap();
        let devices = devices.map(|it| it.unwrap().path());
        let value = |path: &Path| {
            fs::read_to_string(path.join(key))
                .unwrap()
                .trim()
                .to_owned()
        };
        let name = |path: &Path| path.file_name().unwrap().to_string_lossy().into_owned();
        devices.map(|it| (name(&it), value(&it))).collect()
    };
    netns.run(read).unwrap()
}

/// How many packets the filter of reverse paths has dropped in a namespace.
fn filtered(netns: &Netns) -> u64 {
    let text = || fs::read_to_string("/proc/thread-self/net/netstat").unwrap();
    let text = netns.run(text).unwrap();
    let mut lines = text.lines().filter(|it| it.starts_with("TcpExt:"));
    let mut words = || lines.next().unwrap().split(' ');
    let (names, numbers) = (words(), words());
    let mut found = names
        .zip(numbers)
        .filter(|(name, _)| *name == "IPReversePathFilter");
    found.next().unwrap().1.parse().unwrap()
}

#[test]
fn every_way_passes_the_strictest_filter_of_reverse_paths() {
    // As each machine on this layer 2 has it.
    let pair = Pair::start("strict").unwrap();
    let world = Machine::new("world").unwrap();
    pair.lan.plug(&world, &[&format!("{WORLD}/24")]).unwrap();
    let mut world_server = world
        .launch("world-echo", binary("weir-echo"))
        .args(["--name", "world", "--tcp", "8080", "--udp", "8081"])
        .spawn()
        .unwrap();
    world_server.wait_for_log("ready", PATIENCE).unwrap();
    let pod = |on, name: &str| {
        let workload = Workload::named("shop", name)
            .port(Transport::Tcp, 8080)
            .port(Transport::Udp, 8081);
        pair.run_pod(on, workload).unwrap()
    };
    let (client, here, there) = (pod(0, "client"), pod(0, "here"), pod(1, "there"));
    for (name, ip, node_port, policy, (backend, on)) in [
        ("here", HERE, 30_080, "Cluster", (&here, 0)),
        ("there", THERE, 30_084, "Cluster", (&there, 1)),
        ("own", "10.96.0.35", 30_088, "Local", (&here, 0)),
    ] {
        let of_node = service(name, ip, node_port, policy);
        pair.write_manifest(&format!("{name}.yaml"), &of_node)
            .unwrap();
        let endpoints = slice(name, backend, &pair.places[on].name);
        pair.write_manifest(&format!("{name}-1.yaml"), &endpoints)
            .unwrap();
    }
    for node in &pair.nodes {
        for service in ["shop/here", "shop/there", "shop/own"] {
            node.wait_for_service(service, 1, PATIENCE).unwrap();
        }
        let netns = node.machine().netns();
        let all = ("all".to_owned(), "1".to_owned());
        assert!(
            values(netns, "rp_filter").contains(&all),
            "an agent has changed it"
        );
        let accept_local = values(netns, "accept_local");
        assert!(accept_local.iter().any(|it| it.0.starts_with("weir")));
        assert!(
            accept_local.iter().all(|it| it.1 == "0"),
            "{accept_local:?}"
        );
    }

    let at = |ip: &str, port| SocketAddr::new(ip.parse().unwrap(), port);
    let of = |pod: &Pod, port| SocketAddr::new(pod.address(Family::V4).unwrap(), port);
    let node = |number, port| pair.on_node(number, Family::V4, port).unwrap();
    let (pods, outside) = (client.netns(), world.netns());
    let nodes = [0, 1].map(|on| pair.nodes[on].machine().netns());
    // Who asks, the first of three ports in a row (TCP, UDP, a closed one where there is one), and who answers.
    let ways = [
        ("pod to pod here", pods, of(&here, 8080), None, "here"),
        ("pod to pod there", pods, of(&there, 8080), None, "there"),
        ("pod to world", pods, at(WORLD, 8080), None, "world"),
        ("pod to service here", pods, at(HERE, 80), Some(82), "here"),
        (
            "pod to service there",
            pods,
            at(THERE, 80),
            Some(82),
            "there",
        ),
        ("hairpin", here.netns(), at(HERE, 80), Some(82), "here"),
        (
            "hairpin at a node",
            here.netns(),
            node(0, 30_080),
            Some(30_082),
            "here",
        ),
        (
            "pod to its node, pod here",
            pods,
            node(0, 30_080),
            Some(30_082),
            "here",
        ),
        (
            "pod to its node, pod there",
            pods,
            node(0, 30_084),
            Some(30_086),
            "there",
        ),
        (
            "pod to another node, pod here",
            pods,
            node(1, 30_080),
            Some(30_082),
            "here",
        ),
        (
            "pod to another node, pod there",
            pods,
            node(1, 30_084),
            Some(30_086),
            "there",
        ),
        (
            "world to node, pod here",
            outside,
            node(0, 30_080),
            Some(30_082),
            "here",
        ),
        (
            "world to node, pod elsewhere",
            outside,
            node(0, 30_084),
            Some(30_086),
            "there",
        ),
        (
            "world to the other node",
            outside,
            node(1, 30_080),
            Some(30_082),
            "here",
        ),
        (
            "world to node, Local",
            outside,
            node(0, 30_088),
            Some(30_090),
            "here",
        ),
        ("node to its pod", nodes[0], of(&here, 8080), None, "here"),
        (
            "node to a pod there",
            nodes[0],
            of(&there, 8080),
            None,
            "there",
        ),
        ("node to world", nodes[0], at(WORLD, 8080), None, "world"),
    ];
    let mut wrong = Vec::new();
    for (name, from, target, closed, who) in ways {
        let next = SocketAddr::new(target.ip(), target.port() + 1);
        // Errors of ICMP: a pod's, or the world's, about a datagram that was translated wherever this one is.
        let closed = SocketAddr::new(target.ip(), closed.unwrap_or(CLOSED));
        let asked = [
            (
                "TCP",
                ask_tcp(from, target, PATIENCE),
                Answer::By(who.into()),
            ),
            ("UDP", ask_udp(from, next, PATIENCE), Answer::By(who.into())),
            ("ICMP", ask_udp(from, closed, PATIENCE), Answer::Refused),
        ];
        let lost = asked
            .into_iter()
            .filter(|(_, said, expected)| said != expected);
        wrong.extend(lost.map(|(what, said, _)| format!("{name}, {what}: {said:?}")));
    }
    for target in [of(&here, 0), of(&there, 0), at(WORLD, 0)] {
        assert!(is_echoed(pods, target.ip(), PATIENCE).unwrap(), "{target}");
    }
    assert_eq!(wrong, [""; 0]);
    assert_eq!(
        nodes.map(filtered),
        [0; 2],
        "packets that the filter has dropped"
    );
    // Which would be seen: the other's loopback is no way back to the world.
    let spoofed = "route add 10.210.0.200 dev lo";
    nodes[0].ip(spoofed).unwrap();
    let said = ask_udp(outside, node(0, 30_081), PATIENCE);
    assert_eq!(said, Answer::Silence);
    assert_ne!(filtered(nodes[0]), 0);
}
