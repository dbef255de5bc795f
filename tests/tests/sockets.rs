//! Ring 1: what the socket hooks decide, case by case, on the host.

use weir_common::flow::Peer;
use weir_common::service::{Generation, SocketSide};
use weir_common::{Addr, Port, Protocol};
use weir_datapath::socket::{Address, Call, connect, name, sendmsg};
use weir_tests::tables::Memory;
use weir_tests::world::{BACKEND_PORT, FAMILIES, Family, Host, NEAR, SERVICE_PORT, SHARED, world};

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
    memory.live.insert(4, Generation(1));
    assert_eq!(reached(&memory, 0), c);
    memory.live.insert(4, Generation(2));
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
