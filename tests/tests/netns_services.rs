//! Ring 4: Services of type ClusterIP, from real sockets to real sockets, at the socket and packet by packet.

#![allow(clippy::unwrap_used, reason = "a test that fails should say where")]

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use weir_tests::node::{Family, Node, NodeOptions, Pod};
use weir_tests::traffic::{
    Answer, Conversation, PATIENCE, any, ask_tcp, ask_udp, eventually, exchange, udp_socket,
};
use weir_tests::workloads::{Transport, Workload};

const V4: &str = "10.96.0.80";
const V6: &str = "fd00:10:96::80";
const ADDRESSES: [&str; 2] = [V4, V6];
/// How long the agent may take to see a manifest and write its rows.
const SOON: Duration = Duration::from_secs(1);

/// A Service with both families, TCP and UDP on the same port.
fn service(name: &str, v4: &str, v6: &str, selector: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: shop}}\nspec:\n  \
         clusterIPs: ['{v4}', '{v6}']\n  ipFamilyPolicy: RequireDualStack\n  \
         selector: {{{selector}}}\n  ports:\n  \
         - {{name: web, port: 80, targetPort: 8080, protocol: TCP}}\n  \
         - {{name: feed, port: 80, targetPort: 8081, protocol: UDP}}\n"
    )
}

fn backend(name: &str) -> Workload {
    Workload::named("shop", name)
        .label("role", "backend")
        .port(Transport::Tcp, 8080)
        .port(Transport::Udp, 8081)
}

/// A node with the Service `web`, so many backends of it, and a client.
fn shop(name: &str, backends: usize) -> (Node, Vec<Pod>, Pod) {
    let node = Node::start(NodeOptions::named(name)).unwrap();
    node.write_manifest("web.yaml", &service("web", V4, V6, "role: backend"))
        .unwrap();
    let pods = (0..backends)
        .map(|n| node.run_pod(backend(&format!("web-{n}"))).unwrap())
        .collect();
    let client = node.run_pod(Workload::named("shop", "client")).unwrap();
    node.wait_for_service("shop/web", backends, PATIENCE)
        .unwrap();
    (node, pods, client)
}

fn at(address: &str) -> SocketAddr {
    SocketAddr::new(address.parse().unwrap(), 80)
}

/// Runs a command and returns what it printed; it must succeed.
fn output(mut command: std::process::Command) -> String {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn pods_reach_a_service_at_the_socket_and_see_its_address_as_their_peer() {
    let (_node, pods, client) = shop("socket", 2);
    for address in ADDRESSES {
        let mut by = BTreeMap::<String, u32>::new();
        for _ in 0..20 {
            let mut curl = client.command("curl");
            curl.args([
                "-sS",
                "--max-time",
                "2",
                "-w",
                "%{remote_ip} %{remote_port}",
            ])
            .arg(format!("http://{}/", at(address)));
            let said = output(curl);
            let (body, peer) = said.split_once('\n').unwrap();
            assert_eq!(peer, format!("{address} 80"), "getpeername is the service");
            *by.entry(body.split(' ').next().unwrap().to_owned())
                .or_default() += 1;
        }
        // Both, each with odds of 1 in 2^20 against.
        assert_eq!(by.len(), pods.len(), "{by:?}");

        let mut load = client.command(weir_tests::node::binary("weir-load").to_str().unwrap());
        load.args(["--kind", "udp", "--rate", "200", "--seconds", "0.5"])
            .args(["--target", &at(address).to_string()]);
        let said: serde_json::Value = serde_json::from_str(&output(load)).unwrap();
        assert_eq!(
            (&said["attempted"], &said["outcomes"]["ok"]),
            (&100.into(), &100.into()),
            "{address}: {said}"
        );
    }
}

#[test]
fn a_process_of_the_node_reaches_a_service() {
    let (node, _pods, _client) = shop("host", 2);
    for address in ADDRESSES {
        let mut curl = node
            .machine()
            .launch("curl", "curl")
            .args(["-sS", "--max-time", "2", "-w", "%{remote_ip}\n"])
            .arg(format!("http://{}/", at(address)))
            .spawn()
            .unwrap();
        let status = curl.wait(Duration::from_secs(5)).unwrap();
        let log = curl.log();
        assert!(status.success(), "{address}: {log}");
        assert!(log.contains("web-") && log.contains(address), "{log}");
    }
}

#[test]
fn the_packet_path_is_complete_without_the_socket_hooks() {
    let (_node, pods, client) = shop("packets", 3);
    for offload in ["on", "off"] {
        for pod in pods.iter().chain([&client]) {
            let mut ethtool = pod.netns().command("ethtool");
            ethtool.args(["-K", "eth0", "tx", offload]);
            output(ethtool);
        }
        for address in ADDRESSES {
            let target = at(address);
            let mut by = BTreeMap::<String, u32>::new();
            for _ in 0..30 {
                for ask in [ask_tcp, ask_udp] {
                    match ask(client.netns(), target, PATIENCE) {
                        Answer::By(name) => *by.entry(name).or_default() += 1,
                        other => panic!("{target}, tx {offload}: {other:?}"),
                    }
                }
            }
            assert_eq!(by.values().sum::<u32>(), 60);
            assert_eq!(by.len(), 3, "{by:?}");
            let mut long = Conversation::open_in(client.netns(), target, PATIENCE).unwrap();
            assert_eq!(long.peer().unwrap(), target);
            let first = long.ask().unwrap();
            for _ in 0..20 {
                assert_eq!(long.ask().unwrap(), first, "a connection stays");
            }
        }
    }
}

/// Hairpin: its connected socket is translated packet by packet. The policy lets the pod speak to nobody, "but cannot block
/// access to itself".
#[test]
fn a_pod_reaches_itself_through_its_own_service() {
    let (node, pods, _client) = shop("itself", 1);
    let closed = "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\n\
         metadata: {name: closed, namespace: shop}\nspec: {podSelector: {}, \
         policyTypes: [Ingress, Egress]}\n";
    node.write_manifest("closed.yaml", closed).unwrap();
    let pod = &pods[0];
    let outside = || ask_udp(pod.netns(), at("10.96.0.81"), PATIENCE);
    eventually("the policy holds", PATIENCE, outside, |answer| {
        !matches!(answer, Answer::By(_))
    })
    .unwrap();
    for address in ADDRESSES {
        for offload in ["on", "off"] {
            let mut ethtool = pod.netns().command("ethtool");
            ethtool.args(["-K", "eth0", "tx", offload]);
            output(ethtool);
            let socket = udp_socket(pod.netns(), any(at(address)), PATIENCE).unwrap();
            socket.connect(at(address)).unwrap();
            for _ in 0..5 {
                assert_eq!(
                    exchange(&socket).unwrap(),
                    "web-0",
                    "{address}, tx {offload}"
                );
            }
            assert_eq!(socket.peer_addr().unwrap(), at(address));
            let answer = ask_tcp(pod.netns(), at(address), PATIENCE);
            assert_eq!(
                answer,
                Answer::By("web-0".into()),
                "{address}, tx {offload}"
            );
        }
    }
}

#[test]
fn a_service_without_endpoints_refuses_at_once() {
    let (_node, _pods, client) = shop("nobody", 0);
    for address in ADDRESSES {
        let mut curl = client.command("curl");
        let said = curl
            .args(["-sS", "--max-time", "2", "-w", "%{time_total}"])
            .arg(format!("http://{}/", at(address)))
            .output()
            .unwrap();
        // 7: failed to connect, not 28: timed out.
        assert_eq!(said.status.code(), Some(7), "{address}: {said:?}");
        let took: f64 = String::from_utf8_lossy(&said.stdout).parse().unwrap();
        assert!(took < 1.0, "{took} s");
    }
}

#[test]
fn a_removed_backend_is_never_reached_again_and_a_new_one_is() {
    let (node, mut pods, client) = shop("changes", 2);
    let removed = pods.remove(0);
    let gone = removed.workload.name.clone();
    // The object goes and the server stays: only the datapath keeps packets from it.
    let manifest = node.manifests().join("pods/shop.web-0.yaml");
    std::fs::rename(&manifest, node.machine().dir().join("web-0")).unwrap();
    node.wait_for_service("shop/web", 1, SOON).unwrap();
    let mut asked = 0;
    for address in ADDRESSES {
        for _ in 0..50 {
            for ask in [ask_tcp, ask_udp] {
                let answer = ask(client.netns(), at(address), PATIENCE);
                assert_eq!(answer, Answer::By("web-1".into()));
                asked += 1;
            }
        }
    }
    println!("{asked} requests, none to the removed {gone}");
    assert_eq!(asked, 200);

    pods.push(node.run_pod(backend("web-2")).unwrap());
    node.wait_for_service("shop/web", 2, SOON).unwrap();
    for address in ADDRESSES {
        eventually(
            "the new backend answers",
            SOON,
            || ask_tcp(client.netns(), at(address), PATIENCE),
            |answer| *answer == Answer::By("web-2".into()),
        )
        .unwrap();
    }
}

#[test]
fn a_sender_with_a_fixed_port_moves_to_a_living_backend_within_a_second() {
    let (node, mut pods, client) = shop("fixed", 1);
    for (address, port) in [(V4, 4444), (V6, 4446)] {
        let unspecified: IpAddr = if address == V4 {
            Ipv4Addr::UNSPECIFIED.into()
        } else {
            Ipv6Addr::UNSPECIFIED.into()
        };
        let from = SocketAddr::new(unspecified, port);
        let before = pods.pop().unwrap();
        let old = before.workload.name.clone();

        // At the socket, with sendmsg.
        let log = node.machine().dir().join(format!("datagrams-{port}"));
        let mut sender = client
            .launch("datagrams", weir_tests::node::binary("weir-datagrams"))
            .args(["--from", &from.to_string(), "--count", "1500"])
            .args(["--target", &at(address).to_string()])
            .log_to(&log)
            .spawn()
            .unwrap();
        sender.wait_for_log(&old, PATIENCE).unwrap();
        // And packet by packet, with a connected socket.
        let local = SocketAddr::new(unspecified, port + 1);
        let socket = udp_socket(client.netns(), local, Duration::from_millis(50)).unwrap();
        socket.connect(at(address)).unwrap();
        assert_eq!(exchange(&socket).unwrap(), old);

        let new = format!("web-{port}");
        pods.push(node.run_pod(backend(&new)).unwrap());
        node.delete_pod(before).unwrap();
        eventually(
            "the connected socket is answered by the new backend",
            SOON,
            || exchange(&socket).ok(),
            |by| by.as_deref() == Some(&*new),
        )
        .unwrap();
        sender.wait_for_log(&new, SOON).unwrap();
        let from_others = sender
            .log()
            .lines()
            .filter(|l| *l != "ready" && !l.contains(&format!(" {}", at(address))))
            .count();
        assert_eq!(from_others, 0, "answers come from the service's address");
        // No answer of the old one after the first of the new one.
        let said = sender.log();
        let after = said.split_once(&new).unwrap().1;
        assert!(!after.contains(&old), "{said}");
    }
}

#[test]
fn two_services_share_their_pods() {
    let (node, _pods, client) = shop("shared", 2);
    let others = ["10.96.0.81", "fd00:10:96::81"];
    node.write_manifest(
        "also.yaml",
        &service("also", others[0], others[1], "role: backend"),
    )
    .unwrap();
    node.wait_for_service("shop/also", 2, SOON).unwrap();
    for address in ADDRESSES.iter().chain(&others) {
        for ask in [ask_tcp, ask_udp] {
            let answer = ask(client.netns(), at(address), PATIENCE);
            assert!(matches!(answer, Answer::By(_)), "{address}: {answer:?}");
        }
    }
    // One source port to the same backends through both: the answers come from the service asked.
    for (one, other) in [(V4, others[0]), (V6, others[1])] {
        let sockets = [one, other].map(|address| {
            let local = SocketAddr::new(any(at(address)).ip(), 0);
            let socket = udp_socket(client.netns(), local, PATIENCE).unwrap();
            socket.connect(at(address)).unwrap();
            socket
        });
        for socket in &sockets {
            for _ in 0..10 {
                exchange(socket).unwrap();
            }
        }
    }
}

#[test]
fn a_pod_reaches_itself_through_its_service_at_the_socket() {
    let (_node, pods, _client) = shop("itself", 1);
    for address in ADDRESSES {
        let mut curl = pods[0].command("curl");
        curl.args(["-sS", "--max-time", "2"])
            .arg(format!("http://{}/", at(address)));
        let said = output(curl);
        assert!(said.starts_with("web-0 "), "{said}");
    }
}

#[test]
fn pods_reach_each_other_and_their_node_directly() {
    let (node, pods, client) = shop("direct", 1);
    for family in [Family::V4, Family::V6] {
        let address = pods[0].address(family).unwrap();
        for (ask, port) in [
            (ask_tcp as fn(&_, _, _) -> _, 8080),
            (ask_udp as fn(&_, _, _) -> _, 8081),
        ] {
            let target = SocketAddr::new(address, port);
            assert_eq!(
                ask(client.netns(), target, PATIENCE),
                Answer::By("web-0".into()),
                "pod to pod"
            );
            assert_eq!(
                ask(node.machine().netns(), target, PATIENCE),
                Answer::By("web-0".into()),
                "node to pod"
            );
        }
        // Nobody listens there: the answer is the pod's own, through the datapath.
        let closed = SocketAddr::new(address, 9);
        assert_eq!(ask_tcp(client.netns(), closed, PATIENCE), Answer::Refused);
        let socket = udp_socket(client.netns(), any(closed), PATIENCE).unwrap();
        socket.connect(closed).unwrap();
        let error = exchange(&socket).unwrap_err();
        assert_eq!(
            error.kind(),
            ErrorKind::ConnectionRefused,
            "an ICMP error about a flow reaches its opener"
        );
    }
}
