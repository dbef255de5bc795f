//! Ring 1: ports of nodes and session affinity packet by packet, on the host.

#![allow(clippy::unwrap_used, reason = "a test that fails should say where")]

use weir_common::service::{Backend, FrontendKey, Generation, Scope};
use weir_common::way::{Mark, Peer};
use weir_common::{Port, Protocol};
use weir_datapath::service::frontend;
use weir_datapath::{Scratch, Verdict, from_net, from_pod, to_net};
use weir_tests::bytes::Bytes;
use weir_tests::edges::{sent, tcp, udp};
use weir_tests::frames::{ACK, Ip, SYN, Transport};
use weir_tests::mix::as_sent;
use weir_tests::model::wire::Packet;
use weir_tests::tables::Memory;
use weir_tests::world::{
    BACKEND_PORT, FAMILIES, Family, HOST_PORT, Host, NODE_PORT, OWN_NODE_PORT, SERVICE_PORT,
    STICKY, UPLINK, world,
};

/// Where a pod's packet goes.
fn goes(memory: &Memory, pod: Host, to: Host, family: Family, transport: &Transport) -> Peer {
    let arrival = sent(pod, to, family, transport);
    let mut scratch = Scratch::default();
    let mut packet = arrival.packet.clone();
    let verdict = from_pod(&mut packet, memory, &mut scratch);
    assert!(!matches!(verdict, Verdict::Drop(_)), "{verdict:?}");
    as_sent(scratch.trace.tuple, &packet).destination()
}

#[test]
fn a_packet_to_a_port_of_nodes_goes_to_a_backend() {
    let cases = [
        (Host::Node, NODE_PORT, Some(Host::B)),
        (Host::OtherNode, NODE_PORT, Some(Host::B)),
        (Host::Node, OWN_NODE_PORT, Some(Host::Far)),
        (Host::OtherNode, OWN_NODE_PORT, None),
        (Host::Node, HOST_PORT, Some(Host::Far)),
        (Host::Node, 30_079, None),
    ];
    for (at, port, backend) in cases {
        for family in FAMILIES {
            for transport in [tcp(1000, port, SYN), udp(1000, port)] {
                let memory = world();
                // A pod is never its own backend here.
                let client = match backend {
                    Some(Host::B) => Host::A,
                    _ => Host::B,
                };
                let peer = goes(&memory, client, at, family, &transport);
                let wanted = match backend {
                    Some(backend) => (backend.addr(family), Port::from(BACKEND_PORT)),
                    None => (at.addr(family), Port::from(port)),
                };
                assert_eq!((peer.addr, peer.port), wanted, "{at:?} {port} {family:?}");
            }
        }
    }
}

#[test]
fn from_outside_only_ports_of_this_node_are_services() {
    let cases = [
        ("a node port here", Host::Node, NODE_PORT, true),
        (
            "on its way to another node",
            Host::OtherNode,
            NODE_PORT,
            false,
        ),
        (
            "a node port of this node only",
            Host::Node,
            OWN_NODE_PORT,
            true,
        ),
        ("a host port", Host::Node, HOST_PORT, true),
        ("a host port of no node", Host::World, HOST_PORT, false),
        ("a cluster IP", STICKY, SERVICE_PORT, false),
    ];
    for (name, at, port, is_service) in cases {
        for family in FAMILIES {
            let memory = world();
            for protocol in [Protocol::TCP, Protocol::UDP, Protocol::SCTP] {
                let asked = FrontendKey {
                    addr: at.addr(family),
                    port: Port::from(port),
                    protocol,
                    scope: Scope::EXTERNAL,
                    pad: [0; 4],
                };
                let found = frontend(&memory, &asked, &asked.addr);
                let expected = is_service && protocol != Protocol::SCTP;
                assert_eq!(found.is_some(), expected, "{name} {family:?}");
            }
        }
    }
}

#[test]
fn packets_of_a_client_go_to_the_backend_that_it_had() {
    for family in FAMILIES {
        let mut memory = world();
        // A had B, C had a pod of another node; the dice say otherwise.
        memory.random.set(1);
        for port in 1000..1010 {
            let syn = udp(port, SERVICE_PORT);
            let peer = goes(&memory, Host::A, STICKY, family, &syn);
            assert_eq!(peer.addr, Host::B.addr(family));
        }
        let id = if family == Family::V4 { 6 } else { 16 };
        memory.live.insert(id, Generation(12));
        let peer = goes(&memory, Host::A, STICKY, family, &udp(2000, SERVICE_PORT));
        assert_eq!(peer.addr, Host::Far.addr(family), "another generation");
        memory.random.set(0);
        let peer = goes(&memory, Host::A, STICKY, family, &udp(2001, SERVICE_PORT));
        assert_eq!(peer.addr, Host::Far.addr(family), "and stays there");
    }
}

/// A pod in the host network has its node's address. What comes in for it goes there, with a mark if it leaves again; this
/// node's own answers without one, and is found by its port.
#[test]
fn a_port_of_nodes_leads_to_the_host_network() {
    for family in FAMILIES {
        for (host, mark) in [
            (Host::OtherNode, Mark::TRANSLATED),
            (Host::Node, Mark::NONE),
        ] {
            let mut memory = world();
            let is_remote = |row: &&mut Backend| row.addr == Host::Far.addr(family);
            for row in memory.backends.values_mut().filter(is_remote) {
                row.addr = host.addr(family);
            }
            let answers = |memory: &Memory, to, port| {
                let ip = Ip::between(host.ip(family), to);
                let frame = ip.frame(&tcp(BACKEND_PORT, port, SYN | ACK));
                let mut packet = Bytes {
                    received_by: 0,
                    ..Bytes::new(UPLINK, frame.clone())
                };
                let verdict = to_net(&mut packet, memory, &mut Scratch::default());
                assert_eq!(verdict, Verdict::Pass, "{family:?}");
                (packet.frame != frame).then(|| Packet::read(&packet.frame).unwrap().tuple)
            };
            let (client, node) = (Host::World.ip(family), Host::Node.ip(family));
            assert_eq!(answers(&memory, client, 1000), None, "nobody has asked");
            let frame = Ip::between(client, node).frame(&tcp(1000, OWN_NODE_PORT, SYN));
            let mut packet = Bytes::new(UPLINK, frame);
            let verdict = from_net(&mut packet, &memory, &mut Scratch::default());
            assert_eq!(verdict, Verdict::Pass, "{family:?}");
            assert_eq!(Mark::of(packet.mark), mark);
            let tuple = Packet::read(&packet.frame).unwrap().tuple;
            assert_eq!(tuple.to, (host.ip(family), BACKEND_PORT).into());
            if host == Host::Node {
                let answer = answers(&memory, client, 1000).unwrap();
                assert_eq!(answer.from, (node, OWN_NODE_PORT).into());
                assert_eq!(answer.to, (client, 1000).into());
                // What the process says to others is its own.
                assert_eq!(answers(&memory, client, 1001), None);
            }
        }
    }
}
