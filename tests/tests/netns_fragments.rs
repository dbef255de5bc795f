//! Ring 4: datagrams and echoes larger than the MTU, between real sockets: through the node's uplink, node
//! ports, and out of order. Those between pods and through services are in `netns_datapath.rs`.

#![allow(clippy::unwrap_used, reason = "a test that fails should say where")]

use std::net::{SocketAddr, UdpSocket};
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::Duration;

use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrStorage, sendto, socket,
};
use weir_tests::fragments::{DESTINATION_OPTIONS, extend, part, split};
use weir_tests::frames::{Ip, L3, Transport};
use weir_tests::netns::{End, Netns, link};
use weir_tests::node::{Family, Node, NodeOptions, Pod};
use weir_tests::traffic::{
    PATIENCE, SILENCE, any, drops, eventually, is_echoed_with, recent_drops, udp_socket,
};
use weir_tests::workloads::Workload;

/// The node's ends of the uplink, and the world's.
const NODE: [&str; 2] = ["198.51.100.2", "2001:db8:1::2"];
const WORLD: [&str; 2] = ["198.51.100.1", "2001:db8:1::1"];
/// A host behind the world's router.
const BEYOND: [&str; 2] = ["203.0.113.2", "2001:db8:2::2"];
/// Bytes of a datagram: one packet, one and a fragment, many, nearly all that there can be.
const SIZES: [usize; 5] = [1400, 1473, 4000, 8000, 60_000];

/// A node with an uplink, and what is behind it.
struct Site {
    node: Node,
    world: Netns,
    beyond: Netns,
}

fn at(ip: &str, port: u16) -> SocketAddr {
    SocketAddr::new(ip.parse().unwrap(), port)
}

impl Site {
    fn new(name: &str) -> Self {
        let mut node = Node::prepare(NodeOptions::named(name)).unwrap();
        let (world, beyond) = (Netns::new("world").unwrap(), Netns::new("beyond").unwrap());
        let netns = node.machine().netns();
        let end = |netns, device, addresses| End {
            netns,
            device,
            addresses,
        };
        link(
            end(netns, "eth0", &["198.51.100.2/24", "2001:db8:1::2/64"]),
            end(&world, "node", &["198.51.100.1/24", "2001:db8:1::1/64"]),
        )
        .unwrap();
        link(
            end(&world, "far", &["203.0.113.1/24", "2001:db8:2::1/64"]),
            end(&beyond, "far", &["203.0.113.2/24", "2001:db8:2::2/64"]),
        )
        .unwrap();
        for sysctl in ["net.ipv4.ip_forward", "net.ipv6.conf.all.forwarding"] {
            world.set_sysctl(sysctl, "1").unwrap();
        }
        netns.ip("route del default").unwrap();
        netns.ip("-6 route del default").unwrap();
        for (ours, theirs) in WORLD.iter().zip(["203.0.113.1", "2001:db8:2::1"]) {
            netns.add_route("default", ours.parse().unwrap()).unwrap();
            beyond
                .add_route("default", theirs.parse().unwrap())
                .unwrap();
        }
        node.start_agent().unwrap();
        node.start_dns().unwrap();
        node.wait_ready().unwrap();
        let site = Self {
            node,
            world,
            beyond,
        };
        let are_there = |hooks: &String| {
            ["uplink-eth0-in", "uplink-eth0-out"]
                .iter()
                .all(|hook| hooks.contains(hook))
        };
        let hooks = || {
            let verify = site.node.ask("verify").unwrap();
            let hooks = verify["hooks"].as_array().unwrap().iter();
            hooks
                .filter(|hook| hook["problem"].is_null())
                .map(|hook| hook["hook"].to_string())
                .collect()
        };
        eventually("the uplink has its programs", PATIENCE, hooks, are_there).unwrap();
        site
    }

    fn pod(&self, name: &str) -> Pod {
        self.node.run_pod(Workload::named("shop", name)).unwrap()
    }

    /// A service of UDP with a node port that leads to port 9000.
    fn serve(&self, name: &str, node_port: u16, more: &str) {
        let text = format!(
            "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: shop}}\nspec:\n  \
             type: NodePort\n  ipFamilyPolicy: RequireDualStack\n  ipFamilies: [IPv4, IPv6]\n  \
             {more}\n  ports:\n  \
             - {{port: 90, targetPort: 9000, nodePort: {node_port}, protocol: UDP}}\n"
        );
        let file = format!("{name}.yaml");
        self.node.write_manifest(&file, &text).unwrap();
    }

    /// Is nothing dropped that should not be?
    fn lost_none(&self) {
        for reason in ["fragment", "malformed", "no_flow", "extension_header"] {
            let recent = recent_drops(&self.node, reason).unwrap();
            let many = drops(&self.node, reason).unwrap();
            assert_eq!(many, 0, "{reason}: {recent:?}");
        }
    }
}

fn set_offload(pod: &Pod, offload: &str) {
    let mut ethtool = pod.netns().command("ethtool");
    ethtool.args(["-K", "eth0", "tx", offload]);
    assert!(ethtool.output().unwrap().status.success());
}

/// Sends every datagram back to who sent it, until nothing comes for a while.
fn echo(netns: &Netns, port: u16) {
    for ip in ["0.0.0.0", "::"] {
        // One beside the other.
        netns.set_sysctl("net.ipv6.bindv6only", "1").unwrap();
        let socket = udp_socket(netns, at(ip, port), 10 * PATIENCE).unwrap();
        std::thread::spawn(move || {
            let mut bytes = vec![0; 65_536];
            while let Ok((length, from)) = socket.recv_from(&mut bytes) {
                socket.send_to(&bytes[..length], from).ok();
            }
        });
    }
}

/// Does a datagram of so many bytes come back, whole and from where it was sent?
fn comes_back(socket: &UdpSocket, size: usize) -> bool {
    let sent: Vec<u8> = (0..size).map(|at| (at % 251) as u8).collect();
    socket.send(&sent).unwrap();
    let mut received = vec![0; 65_536];
    match socket.recv(&mut received) {
        Ok(length) => {
            assert!(received[..length] == sent[..], "{length} of {size} bytes");
            true
        }
        Err(_) => false,
    }
}

fn speak(netns: &Netns, target: SocketAddr, patience: Duration) -> UdpSocket {
    let socket = udp_socket(netns, any(target), patience).unwrap();
    socket.connect(target).unwrap();
    socket
}

#[test]
fn what_a_pod_sends_out_of_the_cluster_comes_back_whole() {
    let site = Site::new("fragments-out");
    let pod = site.pod("client");
    echo(&site.world, 9000);
    for theirs in WORLD {
        for offload in ["on", "off"] {
            set_offload(&pod, offload);
            let socket = speak(pod.netns(), at(theirs, 9000), PATIENCE);
            for size in SIZES {
                for _ in 0..3 {
                    assert!(
                        comes_back(&socket, size),
                        "{size} bytes to {theirs}, tx {offload}"
                    );
                }
            }
            let theirs = theirs.parse().unwrap();
            let is_echoed = is_echoed_with(pod.netns(), theirs, 4000, PATIENCE);
            assert!(is_echoed.unwrap(), "ping -s 4000 {theirs}, tx {offload}");
        }
    }
    site.lost_none();
}

#[test]
fn a_node_port_takes_datagrams_of_every_size() {
    let site = Site::new("fragments-in");
    let pod = site.pod("web");
    echo(pod.netns(), 9000);
    echo(&site.world, 9000);
    site.serve("web", 30_081, "selector: {app: web}");
    echo(site.node.machine().netns(), 9000);
    // The backend is the world's server, or the node's own; these services select nothing.
    for (name, port, addresses) in [("far", 30_091, WORLD), ("host", 30_101, NODE)] {
        site.serve(name, port, "");
        for (family, ip) in ["IPv4", "IPv6"].iter().zip(addresses) {
            let slice = format!(
                "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {{name: {name}-{}, \
                 namespace: shop, labels: {{kubernetes.io/service-name: {name}}}}}\naddressType: {family}\n\
                 endpoints:\n- {{addresses: ['{ip}'], conditions: {{ready: true}}}}\nports:\n\
                 - {{port: 9000, protocol: UDP}}\n",
                family.to_lowercase()
            );
            let file = format!("{name}-{family}.yaml");
            site.node.write_manifest(&file, &slice).unwrap();
        }
    }
    for name in ["shop/web", "shop/far", "shop/host"] {
        site.node.wait_for_service(name, 1, PATIENCE).unwrap();
    }
    for ours in NODE {
        for port in [30_081, 30_091, 30_101] {
            let target = at(ours, port);
            let ask = || comes_back(&speak(&site.beyond, target, SILENCE), 8);
            eventually(
                &format!("the backend of {target} is known"),
                PATIENCE,
                ask,
                |is_there| *is_there,
            )
            .unwrap();
            for offload in ["on", "off"] {
                set_offload(&pod, offload);
                let socket = speak(&site.beyond, target, PATIENCE);
                for size in SIZES {
                    assert!(
                        comes_back(&socket, size),
                        "{size} bytes to {target}, tx {offload}"
                    );
                }
            }
        }
    }
    site.lost_none();
}

#[test]
fn a_router_that_wants_smaller_fragments_has_them() {
    let site = Site::new("fragments-mtu");
    let pod = site.pod("client");
    echo(&site.beyond, 9000);
    for netns in [&site.world, &site.beyond] {
        netns.ip("link set far mtu 1300").unwrap();
    }
    for theirs in BEYOND {
        let socket = speak(pod.netns(), at(theirs, 9000), SILENCE);
        // With IPv4 the router cuts them smaller; with IPv6 it says so, and they are sent again.
        let mut tries = (0..4).map(|_| comes_back(&socket, 8000));
        assert!(tries.any(|came| came), "{theirs}");
    }
    site.lost_none();
}

#[test]
fn what_comes_before_its_first_fragment_is_dropped_by_name() {
    let site = Site::new("fragments-late");
    let pod = site.pod("client");
    echo(&site.world, 9000);
    for (family, theirs) in [Family::V4, Family::V6].into_iter().zip(WORLD) {
        let ours = pod.address(family).unwrap();
        let theirs = at(theirs, 9000);
        let socket = udp_socket(pod.netns(), (ours, 4000).into(), SILENCE).unwrap();
        let datagram = Transport::Udp {
            ports: (4000, 9000),
            payload: (0..4000u32).map(|at| at as u8).collect(),
        };
        let frame = Ip::between(ours, theirs.ip()).frame(&datagram);
        let family = match theirs {
            SocketAddr::V4(_) => AddressFamily::Inet,
            SocketAddr::V6(_) => AddressFamily::Inet6,
        };
        let raw = pod.netns().run(|| socket_of(family)).unwrap().unwrap();
        let to = SockaddrStorage::from(SocketAddr::new(theirs.ip(), 0));
        let comes_back = |number, order: [usize; 3]| {
            let parts = split(&frame, number, 1400);
            assert_eq!(parts.len(), order.len());
            for place in order {
                let packet = &parts[place][L3..];
                sendto(raw.as_raw_fd(), packet, &to, MsgFlags::empty()).unwrap();
            }
            socket
                .recv(&mut [0; 8000])
                .is_ok_and(|length| length == 4000)
        };
        assert!(comes_back(1, [0, 1, 2]));
        assert!(comes_back(2, [0, 2, 1]), "the first one is first");
        let before = drops(&site.node, "fragment").unwrap();
        assert!(!comes_back(3, [1, 0, 2]));
        assert!(!comes_back(4, [2, 1, 0]));
        assert_eq!(drops(&site.node, "fragment").unwrap() - before, 3);
        assert!(comes_back(5, [0, 1, 2]));
    }
}

fn socket_of(family: AddressFamily) -> nix::Result<OwnedFd> {
    socket(
        family,
        SockType::Raw,
        SockFlag::SOCK_CLOEXEC,
        SockProtocol::Raw,
    )
}

/// A node that puts fragments together, because its firewall looks at whole packets, and takes them apart again for a pod's
/// device: what it makes then was still not made by it, and whom the policy shuts out stays outside. Of IPv6 the kernel does not
/// keep by which device that came.
#[test]
fn what_the_node_takes_apart_again_is_still_from_outside() {
    let site = Site::new("fragments-again");
    let chain = "{ type filter hook prerouting priority 0; }";
    let rules = format!(
        "add table inet tracks; add chain inet tracks first {chain}; \
         add rule inet tracks first ct state invalid counter"
    );
    let mut nft = site.node.machine().netns().command("nft");
    assert!(nft.arg(rules).status().unwrap().success());
    site.node
        .write_manifest(
            "shut.yaml",
            "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: shut, namespace: shop}\n\
             spec: {podSelector: {matchLabels: {app: shut}}, policyTypes: [Ingress]}\n",
        )
        .unwrap();
    let (open, shut) = (site.pod("open"), site.pod("shut"));
    // What the node's own sockets send is its own, in pieces too.
    echo(shut.netns(), 9001);
    for family in [Family::V4, Family::V6] {
        let target = SocketAddr::new(shut.address(family).unwrap(), 9001);
        let netns = site.node.machine().netns();
        let socket = speak(netns, target, PATIENCE);
        for size in SIZES {
            assert!(
                comes_back(&socket, size),
                "{size} bytes of the node to {target}"
            );
        }
        let is_echoed = is_echoed_with(netns, target.ip(), 4000, PATIENCE);
        assert!(is_echoed.unwrap(), "ping -s 4000 {target}");
    }
    for (family, (ours, theirs)) in [Family::V4, Family::V6]
        .into_iter()
        .zip(NODE.iter().zip(WORLD))
    {
        let theirs = theirs.parse().unwrap();
        let raw_family = match family {
            Family::V4 => AddressFamily::Inet,
            Family::V6 => AddressFamily::Inet6,
        };
        let raw = site.world.run(|| socket_of(raw_family)).unwrap().unwrap();
        for pod in [&open, &shut] {
            let pods = pod.address(family).unwrap();
            let prefix = if pods.is_ipv4() { 32 } else { 128 };
            let to = format!("{pods}/{prefix}");
            site.world.add_route(&to, ours.parse().unwrap()).unwrap();
        }
        let mut number = 0;
        // Pieces that the kernel passes on as they were, and such that it has to cut anew.
        let mut hears = |pod: &Pod, size: usize, length: u32| {
            number += 1;
            let pods = pod.address(family).unwrap();
            let socket = udp_socket(pod.netns(), (pods, 9000).into(), SILENCE).unwrap();
            let datagram = Transport::Udp {
                ports: (4000, 9000),
                payload: (0..length).map(|at| at as u8).collect(),
            };
            let mut frame = Ip::between(theirs, pods).frame(&datagram);
            let to = SockaddrStorage::from(SocketAddr::new(pods, 0));
            // With options in the part that is cut, the kernel's own pieces are shorter than what came.
            let mut parts = split(&frame, number, size);
            if family == Family::V6 && parts.len() == 2 {
                frame = extend(&frame, &[(DESTINATION_OPTIONS, &[0, 1, 4, 0, 0, 0, 0])]);
                let rest = frame.len() - L3 - 40 - size;
                parts = vec![
                    part(&frame, number, 0, size, true),
                    part(&frame, number, size, rest, false),
                ];
            }
            for part in parts {
                sendto(raw.as_raw_fd(), &part[L3..], &to, MsgFlags::empty()).unwrap();
            }
            socket.recv(&mut [0; 8000]).is_ok()
        };
        let is_open = || hears(&open, 1400, 2832);
        eventually("the open one hears it", PATIENCE, is_open, |it| *it).unwrap();
        let denied = || drops(&site.node, "ingress_denied").unwrap();
        let is_denied = || {
            let before = denied();
            (hears(&shut, 1400, 100), denied() > before)
        };
        eventually("the policy holds", PATIENCE, is_denied, |it| {
            *it == (false, true)
        })
        .unwrap();
        for (size, length) in [
            (1400, 2832),
            (1400, 2840),
            (1448, 2000),
            (720, 2848),
            (64, 2000),
            (1352, 4000),
        ] {
            assert!(
                hears(&open, size, length),
                "{family:?}: {length} bytes in pieces of {size}"
            );
            let before = denied();
            assert!(
                !hears(&shut, size, length),
                "{family:?}: {length} bytes in pieces of {size}"
            );
            assert!(
                denied() > before,
                "{family:?}: {length} bytes in pieces of {size}"
            );
        }
    }
}
