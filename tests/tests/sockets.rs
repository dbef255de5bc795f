//! Ring 1: what the socket hooks decide, case by case, on the host.

#![allow(clippy::unwrap_used, reason = "a test that fails should say where")]

use std::rc::Rc;

use weir_common::service::{
    FrontendFlags, FrontendKey, Generation, NodeAddress, NodeFlags, Scope, SocketSide,
};
use weir_common::way::Peer;
use weir_common::{Addr, Port, Protocol, limits};
use weir_datapath::socket::{Address, Call, connect, name, sendmsg};
use weir_tests::tables::Memory;
use weir_tests::world::{
    BACKEND_PORT, FAMILIES, Family, HOST_PORT, Host, NEAR, NODE_PORT, OWN_NODE_PORT, SERVICE_PORT,
    SHARED, world,
};

/// A socket call on paper.
struct Paper {
    cookie: u64,
    network: u64,
    protocol: Protocol,
    peer: Peer,
}

impl Address for Paper {
    fn cookie(&self) -> u64 {
        self.cookie
    }
    fn protocol(&self) -> Protocol {
        self.protocol
    }
    fn network(&self) -> u64 {
        self.network
    }
    fn peer(&self) -> Peer {
        self.peer
    }
    fn set_peer(&mut self, peer: &Peer) {
        self.peer = *peer;
    }
}

fn paper(cookie: u64, protocol: Protocol, addr: Addr, port: u16) -> Paper {
    let port = Port::from(port);
    Paper {
        cookie,
        network: 7,
        protocol,
        peer: Peer { addr, port },
    }
}

#[test]
fn a_socket_reaches_a_backend_and_sees_the_service() {
    for family in FAMILIES {
        for protocol in [Protocol::TCP, Protocol::UDP] {
            let memory = world();
            let mut call = paper(1, protocol, NEAR.addr(family), SERVICE_PORT);
            assert_eq!(connect(&mut call, &memory), Call::Proceed);
            assert_eq!(call.peer.addr, Host::B.addr(family));
            assert_eq!(call.peer.port, Port::from(BACKEND_PORT));
            name(&mut call, &memory);
            assert_eq!(call.peer.addr, NEAR.addr(family));
            assert_eq!(call.peer.port, Port::from(SERVICE_PORT));
            // Another socket speaks to the pod itself.
            let mut other = paper(2, protocol, Host::B.addr(family), BACKEND_PORT);
            name(&mut other, &memory);
            assert_eq!(other.peer.addr, Host::B.addr(family));
        }
    }
}

/// A connected UDP socket of the node's own processes is one that the agent ends when its backend goes, as long as it leads there.
#[test]
fn what_a_process_of_the_node_is_connected_to_is_kept() {
    for family in FAMILIES {
        let mut memory = world();
        memory.network = 7;
        let kept = |memory: &Memory| -> Vec<(u64, Addr, u16)> {
            let rows = memory.connected.borrow();
            let rows = rows.iter();
            rows.map(|(cookie, row)| (*cookie, row.addr, row.port.into()))
                .collect()
        };
        let (service, pod) = (NEAR.addr(family), Host::B.addr(family));
        // Of another network namespace, of TCP, and one that is not connected.
        let mut of_pod = paper(2, Protocol::UDP, service, SERVICE_PORT);
        of_pod.network = 8;
        let mut of_tcp = paper(3, Protocol::TCP, service, SERVICE_PORT);
        let mut sends = paper(4, Protocol::UDP, service, SERVICE_PORT);
        assert_eq!(connect(&mut of_pod, &memory), Call::Proceed);
        assert_eq!(connect(&mut of_tcp, &memory), Call::Proceed);
        assert_eq!(sendmsg(&mut sends, &memory), Call::Proceed);
        assert_eq!(kept(&memory), []);
        let mut call = paper(1, Protocol::UDP, service, SERVICE_PORT);
        assert_eq!(connect(&mut call, &memory), Call::Proceed);
        assert_eq!(kept(&memory), [(1, pod, BACKEND_PORT)]);
        // To the pod itself: whatever becomes of the service is nothing to it.
        let mut call = paper(1, Protocol::UDP, pod, BACKEND_PORT);
        assert_eq!(connect(&mut call, &memory), Call::Proceed);
        assert_eq!(kept(&memory), []);
    }
}

/// Whoever accepts connections asks for the name of each, and none of them is ours.
#[test]
fn a_name_costs_no_look_up_at_a_port_that_no_backend_has() {
    let memory = world();
    let asks = |memory: &Memory, port| {
        let mut call = paper(2, Protocol::TCP, Host::B.addr(Family::V4), port);
        let before = memory.looked.get();
        name(&mut call, memory);
        assert_eq!(call.peer.addr, Host::B.addr(Family::V4));
        memory.looked.get() - before
    };
    assert_eq!(asks(&memory, BACKEND_PORT), 0);
    let mut call = paper(1, Protocol::TCP, NEAR.addr(Family::V4), SERVICE_PORT);
    assert_eq!(connect(&mut call, &memory), Call::Proceed);
    assert_eq!(asks(&memory, BACKEND_PORT), 1);
    for other in [BACKEND_PORT ^ 1, BACKEND_PORT ^ 64, 40_000, u16::MAX] {
        assert_eq!(asks(&memory, other), 0, "{other}");
    }
}

/// Beside sockets that earlier programs have translated, the table of ports is new and says nothing.
#[test]
fn an_empty_table_of_ports_hides_no_name() {
    let memory = world();
    let mut call = paper(1, Protocol::TCP, NEAR.addr(Family::V4), SERVICE_PORT);
    assert_eq!(connect(&mut call, &memory), Call::Proceed);
    let rows = (0..limits::UNUSED_PORTS).map(|row| (row, Rc::default()));
    memory.unused_ports.replace(rows.collect());
    name(&mut call, &memory);
    assert_eq!(call.peer.addr, NEAR.addr(Family::V4));
}

#[test]
fn an_unconnected_socket_keeps_its_backend_while_that_is_current() {
    let mut memory = world();
    let reached = |memory: &Memory, random| {
        memory.random.set(random);
        let mut call = paper(1, Protocol::UDP, SHARED.addr(Family::V4), SERVICE_PORT);
        assert_eq!(sendmsg(&mut call, memory), Call::Proceed);
        call.peer.addr
    };
    let (a, c) = (Host::A.addr(Family::V4), Host::C.addr(Family::V4));
    assert_eq!(reached(&memory, 0), a);
    assert_eq!(reached(&memory, 1), a);
    memory.live.insert(4, Generation(5));
    assert_eq!(reached(&memory, 0), c, "a datagram, and it drains");
    memory.live.insert(4, Generation(8));
    assert_eq!(reached(&memory, 0), c);
    let sockets = memory.sockets.borrow();
    assert_eq!(
        sockets
            .keys()
            .filter(|key| key.side == SocketSide::FORWARD)
            .count(),
        1
    );
}

/// Who is connected hears of no change: what a pod sends by such a socket is translated packet by packet.
#[test]
fn a_pods_connected_datagram_socket_is_left_to_the_packets() {
    for family in FAMILIES {
        let mut memory = world();
        memory.network = 7;
        let reached = |memory: &Memory, protocol, network, service: Host| {
            let mut call = paper(1, protocol, service.addr(family), SERVICE_PORT);
            call.network = network;
            assert_eq!(connect(&mut call, memory), Call::Proceed);
            call.peer.addr
        };
        let (service, backend) = (NEAR.addr(family), Host::B.addr(family));
        let (udp, tcp) = (Protocol::UDP, Protocol::TCP);
        assert_eq!(reached(&memory, udp, 8, NEAR), service);
        assert!(memory.sockets.borrow().is_empty());
        assert_eq!(reached(&memory, tcp, 8, NEAR), backend);
        assert_eq!(reached(&memory, udp, 7, NEAR), backend);
        // The node's own server of names.
        let flag = |memory: &mut Memory, flags| {
            for (key, frontend) in &mut memory.frontends {
                if key.addr == service {
                    frontend.flags = flags;
                }
            }
        };
        flag(&mut memory, FrontendFlags::OWN_DNS);
        assert_eq!(reached(&memory, udp, 8, NEAR), backend);
        flag(&mut memory, 0);
        memory.network = 0;
        assert_eq!(
            reached(&memory, udp, 8, NEAR),
            backend,
            "nobody knows who we are"
        );
    }
}

/// Rows are pushed out one by one. One socket may ask two services that lead to one backend, and is answered as it asked.
#[test]
fn an_answer_has_the_name_that_was_asked_last() {
    let mut memory = world();
    let services = [NEAR, SHARED].map(|service| service.addr(Family::V4));
    // Both lead to B.
    let (near, shared) = (services[0], services[1]);
    let of = |memory: &Memory, addr| {
        let row = memory
            .frontends
            .iter()
            .find(|(key, row)| key.addr == addr && row.segment.len > 0);
        *row.unwrap().1
    };
    let run = of(&memory, near).segment;
    for (key, frontend) in &mut memory.frontends {
        if key.addr == shared {
            frontend.segment = run;
        }
    }
    let named = |service| {
        let mut call = paper(1, Protocol::UDP, service, SERVICE_PORT);
        assert_eq!(sendmsg(&mut call, &memory), Call::Proceed);
        name(&mut call, &memory);
        call.peer.addr
    };
    for service in [near, shared, near, shared] {
        assert_eq!(named(service), service);
        let mut sockets = memory.sockets.borrow_mut();
        if service == shared {
            sockets.retain(|key, _| key.side == SocketSide::FORWARD);
        }
    }
}

/// Two ports of one service may lead to one port of its pods.
#[test]
fn an_answer_has_the_port_that_was_asked_last() {
    for family in FAMILIES {
        let mut memory = world();
        let addr = NEAR.addr(family);
        let mut of = FrontendKey {
            addr,
            port: Port::from(SERVICE_PORT),
            protocol: Protocol::UDP,
            scope: Scope::INTERNAL,
            pad: [0; 4],
        };
        let frontend = memory.frontends[&of];
        of.port = Port::from(SERVICE_PORT + 1);
        memory.frontends.insert(of, frontend);
        for port in [0, 1, 0, 0, 1].map(|more| SERVICE_PORT + more) {
            let mut call = paper(1, Protocol::UDP, addr, port);
            assert_eq!(sendmsg(&mut call, &memory), Call::Proceed);
            assert_eq!(call.peer.addr, Host::B.addr(family));
            name(&mut call, &memory);
            assert_eq!(call.peer.port, Port::from(port));
        }
    }
}

#[test]
fn a_socket_call_to_a_service_without_backends_is_refused_and_others_are_left_alone() {
    let memory = world();
    let empty = Host::Service(3).addr(Family::V6);
    for protocol in [Protocol::TCP, Protocol::UDP] {
        let mut call = paper(1, protocol, empty, SERVICE_PORT);
        assert_eq!(connect(&mut call, &memory), Call::Refuse);
        assert_eq!(sendmsg(&mut call, &memory), Call::Refuse);
        assert_eq!(call.peer.addr, empty);
    }
    for (protocol, port) in [(Protocol::ICMP, SERVICE_PORT), (Protocol::TCP, 81)] {
        let mut call = paper(1, protocol, empty, port);
        assert_eq!(connect(&mut call, &memory), Call::Proceed);
        assert_eq!(call.peer.addr, empty);
    }
    assert!(memory.sockets.borrow().is_empty());
}

#[test]
fn ports_of_nodes_lead_to_backends_at_the_addresses_of_nodes_alone() {
    let cases = [
        ("this node", Host::Node, NODE_PORT, Some(Host::B)),
        ("another node", Host::OtherNode, NODE_PORT, Some(Host::B)),
        (
            "this node, only here",
            Host::Node,
            OWN_NODE_PORT,
            Some(Host::Far),
        ),
        (
            "another node is asked itself",
            Host::OtherNode,
            OWN_NODE_PORT,
            None,
        ),
        ("no node", Host::World, NODE_PORT, None),
        ("a pod", Host::A, NODE_PORT, None),
        ("a service", NEAR, NODE_PORT, None),
        ("another port", Host::Node, 30_079, None),
        ("a host port", Host::Node, HOST_PORT, Some(Host::Far)),
        ("a host port of no node", Host::World, HOST_PORT, None),
    ];
    for (name, at, port, backend) in cases {
        for family in FAMILIES {
            let memory = world();
            let mut call = paper(1, Protocol::TCP, at.addr(family), port);
            assert_eq!(connect(&mut call, &memory), Call::Proceed);
            let wanted = match backend {
                Some(backend) => (backend.addr(family), Port::from(BACKEND_PORT)),
                None => (at.addr(family), Port::from(port)),
            };
            assert_eq!(
                (call.peer.addr, call.peer.port),
                wanted,
                "{name} {family:?}"
            );
        }
    }
}

#[test]
fn loopback_is_the_nodes_for_its_own_processes_alone() {
    let unspecified = [Addr::ABSENT, Addr::v4([0; 4])];
    let v6 = Addr::from(std::net::Ipv6Addr::LOCALHOST);
    for loopback in [Addr::v4([127, 0, 0, 1]), v6] {
        let mut memory = world();
        memory.network = 7;
        let own = NodeAddress {
            flags: NodeFlags::OWN,
        };
        memory.nodes.insert(loopback, own);
        let is_moved = |memory: &Memory, network, at| {
            let mut call = paper(1, Protocol::TCP, at, NODE_PORT);
            call.network = network;
            assert_eq!(connect(&mut call, memory), Call::Proceed);
            call.peer.addr != at
        };
        assert!(is_moved(&memory, 7, loopback), "a process of the node");
        assert!(!is_moved(&memory, 8, loopback), "a process of a pod");
        for addr in unspecified {
            assert!(!is_moved(&memory, 8, addr), "not the key of nodes");
        }
        memory.network = 0;
        assert!(!is_moved(&memory, 7, loopback), "nobody knows who we are");
    }
}

/// A world in which [`SHARED`], with two backends, has session affinity; and a way to ask it.
fn sticky(seconds: u32) -> Memory {
    let mut memory = world();
    for (key, frontend) in &mut memory.frontends {
        if FAMILIES
            .iter()
            .any(|family| SHARED.addr(*family) == key.addr)
        {
            frontend.affinity = seconds;
        }
    }
    memory
}

fn backend_of(memory: &Memory, network: u64, family: Family, random: u32) -> Addr {
    memory.random.set(random);
    // Another socket every time.
    let cookie = memory.sockets.borrow().len() as u64 + 100;
    let mut call = paper(cookie, Protocol::TCP, SHARED.addr(family), SERVICE_PORT);
    call.network = network;
    assert_eq!(connect(&mut call, memory), Call::Proceed);
    call.peer.addr
}

#[test]
fn a_client_keeps_its_backend_until_it_was_away_too_long() {
    const SECOND: u64 = 1_000_000_000;
    for family in FAMILIES {
        let (a, c) = (Host::A.addr(family), Host::C.addr(family));
        let memory = sticky(10);
        assert_eq!(backend_of(&memory, 7, family, 1), c);
        assert_eq!(backend_of(&memory, 8, family, 0), a, "another client");
        for _ in 0..5 {
            // Every connection begins the time anew.
            memory.now.set(memory.now.get() + 9 * SECOND);
            assert_eq!(backend_of(&memory, 7, family, 0), c);
        }
        memory.now.set(memory.now.get() + 10 * SECOND);
        assert_eq!(backend_of(&memory, 7, family, 0), c, "not over yet");
        memory.now.set(memory.now.get() + 10 * SECOND + 1);
        assert_eq!(backend_of(&memory, 7, family, 0), a, "over");
    }
}

#[test]
fn the_families_of_a_client_have_backends_of_their_own() {
    let memory = sticky(10);
    assert_eq!(
        backend_of(&memory, 7, Family::V4, 1),
        Host::C.addr(Family::V4)
    );
    assert_eq!(
        backend_of(&memory, 7, Family::V6, 0),
        Host::A.addr(Family::V6)
    );
    assert_eq!(
        backend_of(&memory, 7, Family::V4, 0),
        Host::C.addr(Family::V4)
    );
}

#[test]
fn a_backend_that_is_gone_or_not_behind_the_address_any_more_is_not_kept() {
    let family = Family::V4;
    let (a, c) = (Host::A.addr(family), Host::C.addr(family));
    let key = FrontendKey {
        addr: SHARED.addr(family),
        port: Port::from(SERVICE_PORT),
        protocol: Protocol::TCP,
        scope: Scope::INTERNAL,
        pad: [0; 4],
    };

    let mut memory = sticky(10);
    assert_eq!(backend_of(&memory, 7, family, 1), c);
    memory.live.insert(5, Generation(16));
    assert_eq!(backend_of(&memory, 7, family, 0), a, "another generation");

    let mut memory = sticky(10);
    assert_eq!(backend_of(&memory, 7, family, 1), c);
    memory.frontends.get_mut(&key).unwrap().segment.len = 1;
    assert_eq!(backend_of(&memory, 7, family, 0), a, "alive, behind others");

    let mut memory = sticky(10);
    assert_eq!(backend_of(&memory, 7, family, 1), c);
    memory.frontends.get_mut(&key).unwrap().affinity = 0;
    assert_eq!(backend_of(&memory, 7, family, 0), a, "switched off");

    let mut memory = sticky(10);
    assert_eq!(backend_of(&memory, 7, family, 1), c);
    memory.frontends.get_mut(&key).unwrap().service += 1000;
    assert_eq!(backend_of(&memory, 7, family, 0), a, "another service");

    let mut memory = sticky(10);
    assert_eq!(backend_of(&memory, 7, family, 1), c);
    memory.frontends.get_mut(&key).unwrap().port = Port::from(81);
    assert_eq!(backend_of(&memory, 7, family, 0), a, "another port of it");
}

#[test]
fn a_remembered_backend_is_found_wherever_it_stands_in_its_run() {
    let family = Family::V4;
    for len in [1, 2, 3, 7, 64, 1000] {
        let mut memory = sticky(10);
        let key = FrontendKey {
            addr: SHARED.addr(family),
            port: Port::from(SERVICE_PORT),
            protocol: Protocol::TCP,
            scope: Scope::INTERNAL,
            pad: [0; 4],
        };
        let frontend = memory.frontends.get_mut(&key).unwrap();
        frontend.segment = weir_common::service::Segment { start: 5000, len };
        for n in 0..len {
            // Two ports of each address.
            let [_, _, high, low] = (n / 2).to_be_bytes();
            let row = weir_common::service::Backend {
                addr: Addr::v4([10, 5, high, low]),
                port: Port::from(8080 + (n % 2) as u16),
                flags: 0,
                id: 5000 + n,
            };
            memory.backends.insert(5000 + n, row);
            memory.live.insert(5000 + n, Generation(4));
        }
        for n in (0..len).step_by(1 + len as usize / 50) {
            let ask = |random| {
                memory.random.set(random);
                let mut call = paper(1, Protocol::TCP, SHARED.addr(family), SERVICE_PORT);
                call.network = 1000 + u64::from(n);
                assert_eq!(connect(&mut call, &memory), Call::Proceed);
                (call.peer.addr, call.peer.port)
            };
            assert_eq!(ask(n), ask(n + 1), "{n} of {len}");
        }
    }
}
