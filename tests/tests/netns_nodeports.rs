//! Ring 4: Services beyond their cluster IP, from real sockets to real sockets: node ports, host ports,
//! session affinity, changes of type.

#![allow(clippy::unwrap_used, reason = "a test that fails should say where")]

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::time::Duration;

use weir_tests::node::{Node, NodeOptions, Pod, binary};
use weir_tests::traffic::{Answer, PATIENCE, ask_tcp, ask_udp, eventually};
use weir_tests::workloads::{Transport, Workload};

const V4: &str = "10.96.0.80";
const V6: &str = "fd00:10:96::80";
/// How long the agent may take to see a manifest and write its rows.
const SOON: Duration = Duration::from_secs(3);

/// What a request came to that nobody answered.
const REFUSED: &str = "refused";
const SILENCE: &str = "silence";

/// What makes two versions of the Service `web` different.
#[derive(Clone, Copy)]
struct Version<'a> {
    kind: &'a str,
    port: u16,
    tcp: Option<u16>,
    udp: Option<u16>,
    more: &'a str,
}

const NODE_PORT: Version<'static> = Version {
    kind: "NodePort",
    port: 80,
    tcp: Some(30_080),
    udp: Some(30_081),
    more: "",
};

fn service(version: Version<'_>) -> String {
    let Version {
        kind, port, more, ..
    } = version;
    let node_port = |number: Option<u16>| match number {
        Some(number) => format!(", nodePort: {number}"),
        None => String::new(),
    };
    let (tcp, udp) = (node_port(version.tcp), node_port(version.udp));
    format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: web, namespace: shop}}\nspec:\n  \
         type: {kind}\n  clusterIPs: ['{V4}', '{V6}']\n  ipFamilyPolicy: RequireDualStack\n  \
         selector: {{role: backend}}\n{more}  ports:\n  \
         - {{name: web, port: {port}, targetPort: 8080, protocol: TCP{tcp}}}\n  \
         - {{name: feed, port: {port}, targetPort: 8081, protocol: UDP{udp}}}\n"
    )
}

fn backend(name: &str) -> Workload {
    Workload::named("shop", name)
        .label("role", "backend")
        .port(Transport::Tcp, 8080)
        .port(Transport::Udp, 8081)
}

/// A node with another one that is only declared, and a client.
fn node(name: &str) -> (Node, Pod) {
    let node = Node::start(NodeOptions::named(name)).unwrap();
    let declared = [
        (name, ["192.0.2.1", "2001:db8::1"]),
        ("other", ["192.0.2.2", "2001:db8::2"]),
    ];
    for (name, [v4, v6]) in declared {
        let text = format!(
            "apiVersion: v1\nkind: Node\nmetadata: {{name: {name}}}\nstatus:\n  addresses:\n  \
             - {{type: InternalIP, address: {v4}}}\n  - {{type: InternalIP, address: '{v6}'}}\n"
        );
        node.write_manifest(&format!("node-{name}.yaml"), &text)
            .unwrap();
    }
    let client = node.run_pod(Workload::named("shop", "client")).unwrap();
    (node, client)
}

/// The same with the Service `web` in a version, and so many backends of it.
fn shop(name: &str, version: Version<'_>, backends: usize) -> (Node, Vec<Pod>, Pod) {
    let (node, client) = node(name);
    node.write_manifest("web.yaml", &service(version)).unwrap();
    let pods = (0..backends)
        .map(|n| node.run_pod(backend(&format!("web-{n}"))).unwrap())
        .collect();
    node.wait_for_service("shop/web", backends, PATIENCE)
        .unwrap();
    (node, pods, client)
}

fn at(address: &str, port: u16) -> SocketAddr {
    SocketAddr::new(address.parse().unwrap(), port)
}

/// An HTTP request of a process of a pod: who answered, or how curl ended.
fn curl(pod: &Pod, target: SocketAddr) -> String {
    let mut curl = pod.command("curl");
    curl.args(["-sS", "--max-time", "2"])
        .arg(format!("http://{target}/"));
    let output = curl.output().unwrap();
    match output.status.code() {
        Some(0) => who(&String::from_utf8_lossy(&output.stdout)),
        code => failure(code).to_owned(),
    }
}

/// The same of a process of the node.
fn curl_on(node: &Node, target: SocketAddr, options: &[&str]) -> String {
    static RUN: AtomicU32 = AtomicU32::new(0);
    let mut curl = node
        .machine()
        .launch(&format!("curl-{}", RUN.fetch_add(1, Relaxed)), "curl")
        .args(["-sS", "--max-time", "2"])
        .args(options)
        .arg(format!("http://{target}/"))
        .spawn()
        .unwrap();
    let status = curl.wait(Duration::from_secs(5)).unwrap();
    match status.code() {
        Some(0) => who(&curl.log()),
        code => failure(code).to_owned(),
    }
}

/// How curl ended.
fn failure(code: Option<i32>) -> &'static str {
    match code {
        Some(7) => REFUSED,
        Some(28) => SILENCE,
        _ => "failed in another way",
    }
}

/// The first word of an answer is the name of who gave it.
fn who(answer: &str) -> String {
    answer.split_whitespace().next().unwrap_or("").to_owned()
}

/// Datagrams to a target: how many of 20 were answered.
fn datagrams(load: &mut std::process::Command, target: SocketAddr) -> serde_json::Value {
    let output = load
        .args(["--kind", "udp", "--rate", "100", "--seconds", "0.2"])
        .args(["--target", &target.to_string()])
        .output()
        .unwrap();
    let said: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    said["outcomes"]["ok"].clone()
}

#[test]
fn a_node_port_answers_at_every_node_for_pods_and_for_processes_of_the_node() {
    let (node, _pods, client) = shop("nodeport", NODE_PORT, 1);
    let web = || Answer::By("web-0".into());
    for address in ["192.0.2.1", "2001:db8::1", "192.0.2.2", "2001:db8::2"] {
        let (tcp, udp) = (at(address, 30_080), at(address, 30_081));
        assert_eq!(curl(&client, tcp), "web-0", "pod to {tcp}");
        assert_eq!(curl_on(&node, tcp, &[]), "web-0", "node to {tcp}");
        assert_eq!(
            ask_tcp(client.netns(), tcp, PATIENCE),
            web(),
            "packets to {tcp}"
        );
        assert_eq!(
            ask_udp(client.netns(), udp, PATIENCE),
            web(),
            "packets to {udp}"
        );
        let mut load = client.command(binary("weir-load").to_str().unwrap());
        assert_eq!(datagrams(&mut load, udp), 20, "datagrams to {udp}");
    }
    for address in ["127.0.0.1", "::1"] {
        let target = at(address, 30_080);
        assert_eq!(curl_on(&node, target, &[]), "web-0", "{target}");
        assert_eq!(curl(&client, target), REFUSED, "a pod's own {target}");
    }
    // A port that no Service has, and an address that no node has.
    assert_eq!(curl_on(&node, at("192.0.2.1", 30_079), &[]), REFUSED);
    assert_ne!(
        curl(&client, at(V4, 30_080)),
        "web-0",
        "a cluster IP has no node port"
    );
}

#[test]
fn a_client_keeps_its_backend_while_affinity_is_on() {
    const ON: &str = "  sessionAffinity: ClientIP\n";
    let on = Version {
        more: ON,
        ..NODE_PORT
    };
    let (node, mut pods, client) = shop("affinity", on, 3);
    let targets = [at(V4, 80), at(V6, 80), at("192.0.2.1", 30_080)];
    let names = |ask: &dyn Fn() -> Answer| -> BTreeSet<String> {
        let answers = (0..20).map(|_| ask());
        answers
            .map(|answer| match answer {
                Answer::By(name) => name,
                other => panic!("{other:?}"),
            })
            .collect()
    };
    let of_process = |target| names(&|| Answer::By(curl(&client, target)));
    let of_packets = |target| names(&|| ask_tcp(client.netns(), target, PATIENCE));
    for target in targets {
        assert_eq!(of_process(target).len(), 1, "at the socket, {target}");
        assert_eq!(of_packets(target).len(), 1, "packet by packet, {target}");
    }
    // All ways to a port of a Service in a family are one.
    assert_eq!(of_process(targets[0]), of_process(targets[2]));
    assert_eq!(of_packets(targets[0]), of_packets(targets[2]));

    // The backend that it has goes: another one is kept from then on.
    let had = of_process(targets[0]).pop_first().unwrap();
    let gone = pods
        .iter()
        .position(|pod| pod.workload.name == had)
        .unwrap();
    node.delete_pod(pods.remove(gone)).unwrap();
    node.wait_for_service("shop/web", 2, SOON).unwrap();
    let after = of_process(targets[0]);
    assert!(
        after.len() == 1 && !after.contains(&had),
        "{had}, then {after:?}"
    );

    // Off, and on again.
    let seconds = |wanted: u64| {
        node.wait_for("affinity is switched", SOON, "services", |rows| {
            rows.iter()
                .filter(|row| row["service"] == "shop/web")
                .all(|row| row["affinity_seconds"] == wanted)
        })
        .unwrap();
    };
    node.write_manifest("web.yaml", &service(NODE_PORT))
        .unwrap();
    seconds(0);
    for target in targets {
        // Not both in 20: odds of 1 in 2^19 against.
        assert_eq!(of_process(target).len(), 2, "at the socket, {target}");
        assert_eq!(of_packets(target).len(), 2, "packet by packet, {target}");
    }
    node.write_manifest("web.yaml", &service(on)).unwrap();
    seconds(10_800);
    for target in targets {
        assert_eq!(of_process(target).len(), 1, "at the socket, {target}");
    }
}

#[test]
fn host_ports_are_told_apart_by_address_and_protocol() {
    let (node, client) = node("hostport");
    let pod = |name: &str| Workload::named("shop", name);
    let run = |workload| node.run_pod(workload).unwrap();
    let (tcp, udp) = (Transport::Tcp, Transport::Udp);
    let _pods = [
        run(pod("a").host_port(tcp, 8080, 9000, "127.0.0.1")),
        run(pod("b").host_port(tcp, 8080, 9000, "192.0.2.1")),
        run(pod("c").host_port(udp, 8080, 9000, "192.0.2.1")),
    ];
    let everywhere = run(pod("d").host_port(tcp, 8080, 9001, ""));
    let _stolen = run(pod("e").host_port(tcp, 8080, 9002, "203.0.113.1"));
    for (name, rows) in [("a", 1), ("b", 2), ("c", 2), ("d", 4), ("e", 2)] {
        let owner = format!("hostport shop/{name}");
        node.wait_for(&owner, PATIENCE, "services", |all| {
            all.iter().filter(|row| row["service"] == *owner).count() >= rows
        })
        .unwrap();
    }
    let by = |name: &str| Answer::By(name.into());
    let (loopback, own) = (at("127.0.0.1", 9000), at("192.0.2.1", 9000));
    assert_eq!(curl_on(&node, loopback, &[]), "a");
    // As conformance does it: from an address of the node to its loopback.
    let bound = curl_on(&node, loopback, &["--interface", "192.0.2.1"]);
    assert_eq!(bound, "a");
    assert_eq!(curl_on(&node, own, &[]), "b");
    assert_eq!(curl(&client, own), "b");
    assert_eq!(curl(&client, loopback), REFUSED, "a pod's own loopback");
    assert_eq!(ask_tcp(client.netns(), own, PATIENCE), by("b"));
    assert_eq!(ask_udp(client.netns(), own, PATIENCE), by("c"));
    let mut load = client.command(binary("weir-load").to_str().unwrap());
    assert_eq!(datagrams(&mut load, own), 20);
    for address in ["127.0.0.1", "::1", "192.0.2.1", "2001:db8::1"] {
        let target = at(address, 9001);
        assert_eq!(curl_on(&node, target, &[]), "d", "{target}");
    }
    // Another node has host ports of its own; an address of no node has none.
    assert_ne!(curl(&client, at("192.0.2.2", 9001)), "d");
    assert_ne!(curl(&client, at("203.0.113.1", 9002)), "e");

    node.delete_pod(everywhere).unwrap();
    eventually(
        "the host port is gone with its pod",
        SOON,
        || curl_on(&node, at("192.0.2.1", 9001), &[]),
        |answer| *answer == REFUSED,
    )
    .unwrap();
}

#[test]
fn a_service_follows_its_type_and_its_ports() {
    let cluster_ip = Version {
        kind: "ClusterIP",
        tcp: None,
        udp: None,
        ..NODE_PORT
    };
    let renumbered = Version {
        port: 81,
        tcp: Some(30_090),
        ..NODE_PORT
    };
    let external_name = "apiVersion: v1\nkind: Service\nmetadata: {name: web, namespace: shop}\n\
                         spec: {type: ExternalName, externalName: example.com}\n"
        .to_owned();
    let (node, _pods, client) = shop("types", cluster_ip, 1);
    let own = "192.0.2.1";
    // The version, then where it answers and where it does not.
    let versions = [
        (
            "ClusterIP",
            service(cluster_ip),
            vec![at(V4, 80)],
            vec![at(own, 30_080)],
        ),
        (
            "NodePort",
            service(NODE_PORT),
            vec![at(V4, 80), at(own, 30_080)],
            vec![at(V4, 81)],
        ),
        (
            "other numbers",
            service(renumbered),
            vec![at(V4, 81), at(own, 30_090)],
            vec![at(V4, 80), at(own, 30_080)],
        ),
        (
            "ExternalName",
            external_name,
            vec![],
            vec![at(V4, 81), at(own, 30_090)],
        ),
        (
            "ClusterIP again",
            service(cluster_ip),
            vec![at(V4, 80)],
            vec![at(own, 30_080)],
        ),
    ];
    for (name, text, answers, silent) in versions {
        node.write_manifest("web.yaml", &text).unwrap();
        for target in answers {
            eventually(
                &format!("{name}: {target} answers"),
                SOON,
                || curl(&client, target),
                |answer| *answer == "web-0",
            )
            .unwrap();
        }
        for target in silent {
            eventually(
                &format!("{name}: {target} does not answer"),
                SOON * 2,
                || curl(&client, target),
                |answer| *answer != "web-0",
            )
            .unwrap();
        }
    }
}
