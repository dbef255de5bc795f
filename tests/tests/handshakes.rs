//! Ring 1: what is promised to a connection between its SYN and the acknowledgement of the first answer, and what nobody may
//! do to one who does not know its numbers, on the host.

#![allow(clippy::unwrap_used, reason = "a test that fails should say where")]

use std::net::IpAddr;
use std::sync::atomic::Ordering::Relaxed;

use weir_common::event::Hook;
use weir_common::service::{FrontendKey, Generation, Scope};
use weir_common::way::{Mark, Plan, WayState};
use weir_common::{DropReason, Port, Protocol};
use weir_datapath::{Scratch, Verdict};
use weir_tests::bytes::{Bytes, marked};
use weir_tests::edges::{received, sent, tcp, udp};
use weir_tests::fragments::split;
use weir_tests::frames::{ACK, FIN, Ip, L3, RST, SYN, Transport};
use weir_tests::model::wire::{Packet, Tuple};
use weir_tests::stories::decide;
use weir_tests::tables::{Memory, Room};
use weir_tests::world;
use weir_tests::world::{
    BACKEND_PORT, FAMILIES, Family, Host, NAT_PORT, NEAR, REMOTE, SERVICE_PORT, SHARED, UPLINK,
    node_port,
};

const CLIENT: u16 = 5000;

/// A node where the service with a choice has a port, too.
fn world() -> Memory {
    let mut memory = world::world();
    for family in FAMILIES {
        let inside = FrontendKey {
            addr: SHARED.addr(family),
            port: Port::from(SERVICE_PORT),
            protocol: Protocol::TCP,
            ..FrontendKey::default()
        };
        let frontend = memory.frontends[&inside];
        let outside = FrontendKey {
            addr: Host::Node.addr(family),
            port: Port::from(node_port(SHARED)),
            scope: Scope::EXTERNAL,
            ..inside
        };
        memory.frontends.insert(outside.of_nodes(), frontend);
    }
    memory
}

/// A packet meets a program: the verdict, and its ends after it.
fn meet(memory: &Memory, hook: Hook, packet: &Bytes) -> (Verdict, Tuple) {
    let mut packet = packet.clone();
    let verdict = decide(hook, &mut packet, memory, &mut Scratch::default());
    (verdict, Packet::read(&packet.frame).unwrap().tuple)
}

/// The client outside sends to a port of the node.
fn asks(memory: &Memory, family: Family, transport: &Transport) -> (Verdict, Tuple) {
    let ip = Ip::between(Host::World.ip(family), Host::Node.ip(family));
    meet(
        memory,
        Hook::FROM_NET,
        &Bytes::new(UPLINK, ip.frame(transport)),
    )
}

/// A backend answers it.
fn answers(memory: &Memory, backend: IpAddr, family: Family, flags: u8) -> (Verdict, Tuple) {
    let ip = Ip::between(backend, Host::World.ip(family));
    let frame = ip.frame(&tcp(BACKEND_PORT, CLIENT, flags));
    meet(memory, Hook::TO_NET, &marked(UPLINK, frame, Mark::REPLY))
}

/// The number of the backend that a client was given.
fn number(memory: &Memory, family: Family, given: IpAddr) -> u32 {
    let of = |host: Host| {
        memory
            .backends
            .values()
            .filter(move |row| row.addr == host.addr(family))
    };
    let host = [Host::A, Host::C]
        .into_iter()
        .find(|host| host.ip(family) == given);
    of(host.unwrap()).next().unwrap().id
}

/// A backend changes its state.
fn turn(memory: &mut Memory, id: u32, into: fn(Generation) -> Generation) {
    let now = memory.live.get_mut(&id).unwrap();
    *now = into(*now);
}

#[test]
fn a_handshake_goes_on_with_whom_its_syn_has_reached() {
    let port = node_port(SHARED);
    for family in FAMILIES {
        let mut memory = world();
        let (verdict, tuple) = asks(&memory, family, &tcp(CLIENT, port, SYN));
        assert_eq!(verdict, Verdict::Pass);
        let id = number(&memory, family, tuple.to.ip());
        let given = tuple.to;
        let (verdict, tuple) = answers(&memory, given.ip(), family, SYN | ACK);
        assert_eq!((verdict, tuple.from.port()), (Verdict::Pass, port));
        // It drains now: new connections go to the other one.
        turn(&mut memory, id, Generation::drained);
        let (verdict, tuple) = asks(&memory, family, &tcp(CLIENT + 1, port, SYN));
        assert_eq!(verdict, Verdict::Pass);
        assert_ne!(tuple.to, given, "a new one");
        for flags in [ACK, ACK, FIN | ACK] {
            let (verdict, tuple) = asks(&memory, family, &tcp(CLIENT, port, flags));
            assert_eq!((verdict, tuple.to), (Verdict::Pass, given), "{flags}");
        }
        // What was drawn is needed no more.
        assert!(memory.choices.borrow().is_empty());
    }
}

#[test]
fn a_handshake_whose_backend_is_gone_is_refused() {
    let port = node_port(SHARED);
    for family in FAMILIES {
        let mut memory = world();
        let (_, tuple) = asks(&memory, family, &tcp(CLIENT, port, SYN));
        let id = number(&memory, family, tuple.to.ip());
        assert_eq!(
            answers(&memory, tuple.to.ip(), family, SYN | ACK).0,
            Verdict::Pass
        );
        turn(&mut memory, id, Generation::gone);
        let (verdict, _) = asks(&memory, family, &tcp(CLIENT, port, ACK));
        assert_eq!(verdict, Verdict::Refuse(DropReason::BackendGone));
    }
}

/// Another pod has the address and the number of the one that the SYN was for.
#[test]
fn a_repeated_syn_is_for_the_backend_that_is_there_by_then() {
    let port = node_port(SHARED);
    for family in FAMILIES {
        let mut memory = world();
        let given = asks(&memory, family, &tcp(CLIENT, port, SYN)).1.to;
        let id = number(&memory, family, given.ip());
        turn(&mut memory, id, Generation::next);
        for flags in [SYN, ACK, FIN | ACK] {
            let (verdict, tuple) = asks(&memory, family, &tcp(CLIENT, port, flags));
            assert_eq!((verdict, tuple.to), (Verdict::Pass, given), "{flags}");
            if flags == SYN {
                let (verdict, _) = answers(&memory, given.ip(), family, SYN | ACK);
                assert_eq!(verdict, Verdict::Pass);
            }
        }
    }
}

/// Without room, after a RST: the RST was another backend's.
#[test]
fn a_syn_that_leads_elsewhere_begins_there() {
    let port = node_port(SHARED);
    for family in FAMILIES {
        let mut memory = world();
        let given = asks(&memory, family, &tcp(CLIENT, port, SYN)).1.to;
        memory.room = Room::Full;
        let answered = |flags| answers(&memory, given.ip(), family, flags).0;
        assert_eq!(answered(SYN | ACK), Verdict::Pass);
        let (verdict, _) = asks(&memory, family, &tcp(CLIENT, port, ACK));
        assert_eq!((verdict, answered(RST)), (Verdict::Pass, Verdict::Pass));
        let id = number(&memory, family, given.ip());
        turn(&mut memory, id, Generation::next);
        memory.now.set(2_000_000_000);
        let (verdict, tuple) = asks(&memory, family, &tcp(CLIENT, port, SYN));
        assert_eq!((verdict, tuple.to), (Verdict::Pass, given));
        let plans = memory.plans.borrow();
        let states = |plan: &Plan| (plan.way.state.load(Relaxed), plan.back.state.load(Relaxed));
        for plan in plans.values().filter(|it| it.way.backend == id) {
            let (there, back) = states(plan);
            assert_eq!((there | back) & (WayState::RESET | WayState::PROVEN), 0);
            assert_eq!(plan.way.seen.load(Relaxed), 2_000_000_000);
        }
        assert!(plans.values().any(|it| it.way.backend == id));
    }
}

/// With the node's address: it keeps the port that it has, also when it would be given another one by now.
#[test]
fn a_handshake_keeps_its_port_of_the_node() {
    for family in FAMILIES {
        let mut memory = world();
        let port = node_port(REMOTE);
        let leaves = |memory: &Memory, flags| {
            let ip = Ip::between(Host::World.ip(family), Host::Far.ip(family));
            let frame = ip.frame(&tcp(CLIENT, BACKEND_PORT, flags));
            meet(
                memory,
                Hook::TO_NET,
                &marked(UPLINK, frame, Mark::TRANSLATED),
            )
        };
        let returns = |memory: &Memory, flags| {
            let ip = Ip::between(Host::Far.ip(family), Host::Node.ip(family));
            let frame = ip.frame(&tcp(BACKEND_PORT, NAT_PORT, flags));
            meet(memory, Hook::FROM_NET, &Bytes::new(UPLINK, frame))
        };
        assert_eq!(
            asks(&memory, family, &tcp(CLIENT, port, SYN)).0,
            Verdict::Pass
        );
        assert_eq!(
            leaves(&memory, SYN).1.from,
            (Host::Node.ip(family), NAT_PORT).into()
        );
        let (verdict, tuple) = returns(&memory, SYN | ACK);
        assert_eq!((verdict, tuple.to.port()), (Verdict::Pass, CLIENT));
        let choices = memory.choices.borrow().clone();
        let choice = choices.values().next().unwrap();
        assert_eq!((choices.len(), u16::from(choice.port)), (1, NAT_PORT));
        memory.config.last_port = NAT_PORT + 999;
        assert_eq!(leaves(&memory, ACK).1.from.port(), NAT_PORT);
        assert!(memory.choices.borrow().is_empty());
    }
}

/// A pod has asked from every port that there is: whoever opens something to a server of the node is nobody's answer.
#[test]
fn a_syn_from_outside_answers_no_pod() {
    for family in FAMILIES {
        let memory = world();
        let ip = Ip::between(Host::A.ip(family), Host::World.ip(family));
        let frame = ip.frame(&tcp(1000, 80, SYN));
        let left = meet(&memory, Hook::TO_NET, &marked(UPLINK, frame, Mark::LEAVING));
        assert_eq!(left.1.from.port(), NAT_PORT);
        let returns = |flags| {
            let ip = Ip::between(Host::World.ip(family), Host::Node.ip(family));
            let frame = ip.frame(&tcp(80, NAT_PORT, flags));
            meet(&memory, Hook::FROM_NET, &Bytes::new(UPLINK, frame))
                .1
                .to
        };
        let (node, pod) = (Host::Node.ip(family), Host::A.ip(family));
        assert_eq!(returns(SYN), (node, NAT_PORT).into());
        assert_eq!(returns(SYN | ACK), (pod, 1000).into());
    }
}

/// Whoever wants no more of what was answered says so to whom it was sent.
#[test]
fn an_opener_elsewhere_may_break_off() {
    let no_flow = Verdict::Drop(DropReason::NoFlow);
    for family in FAMILIES {
        let memory = world();
        let port = node_port(SHARED);
        let rst = tcp(CLIENT, port, RST);
        assert_eq!(asks(&memory, family, &rst).0, no_flow, "of nothing");
        let given = asks(&memory, family, &tcp(CLIENT, port, SYN)).1.to;
        assert_eq!(
            answers(&memory, given.ip(), family, SYN | ACK).0,
            Verdict::Pass
        );
        let (verdict, tuple) = asks(&memory, family, &rst);
        assert_eq!((verdict, tuple.to), (Verdict::Pass, given));
        assert!(memory.ways.borrow().is_empty(), "nothing is made of it");
        // The same at the pod itself.
        let memory = world();
        let asks = |flags| received(Host::Far, Host::A, family, &tcp(CLIENT, 80, flags));
        let answer = sent(Host::A, Host::Far, family, &tcp(80, CLIENT, SYN | ACK));
        assert_eq!(meet(&memory, Hook::TO_POD, &asks(RST).packet).0, no_flow);
        for (hook, arrival) in [
            (Hook::TO_POD, asks(SYN)),
            (Hook::FROM_POD, answer),
            (Hook::TO_POD, asks(RST)),
        ] {
            assert_eq!(meet(&memory, hook, &arrival.packet).0, Verdict::Pass);
        }
        assert!(memory.ways.borrow().is_empty(), "nothing is made of it");
    }
}

/// A process of the node has a connection without us, and somebody writes a SYN of its client to the node port that leads to it.
#[test]
fn a_process_of_the_node_answers_a_node_port_once_it_has_said_so() {
    for family in FAMILIES {
        let memory = hostnet(family);
        let port = node_port(REMOTE);
        let says = |memory: &Memory, flags| process_says(memory, family, flags, 2);
        assert_eq!(
            asks(&memory, family, &tcp(CLIENT, port, SYN)).0,
            Verdict::Pass
        );
        for flags in [ACK, FIN | ACK, ACK] {
            assert_eq!(says(&memory, flags), BACKEND_PORT, "{flags}");
        }
        assert_eq!(says(&memory, SYN | ACK), port);
        assert_eq!(says(&memory, ACK), port);
    }
}

/// A node whose own process, in its host network, is the backend of [`REMOTE`].
fn hostnet(family: Family) -> Memory {
    let mut memory = world();
    let far = Host::Far.addr(family);
    for row in memory.backends.values_mut().filter(|row| row.addr == far) {
        row.addr = Host::Node.addr(family);
    }
    memory
}

/// What the process sends to the client, which acknowledges up to a number: from which port it leaves.
fn process_says(memory: &Memory, family: Family, flags: u8, acknowledges: u32) -> u16 {
    let ip = Ip::between(Host::Node.ip(family), Host::World.ip(family));
    let mut frame = ip.frame(&tcp(BACKEND_PORT, CLIENT, flags));
    let tcp = L3 + if family == Family::V4 { 20 } else { 40 };
    frame[tcp + 8..tcp + 12].copy_from_slice(&acknowledges.to_be_bytes());
    let packet = Bytes {
        received_by: 0,
        ..Bytes::new(UPLINK, frame)
    };
    meet(memory, Hook::TO_NET, &packet).1.from.port()
}

/// Of a connection that is over the last acknowledgement may be lost behind us.
#[test]
fn a_repeated_goodbye_to_a_process_of_the_node_is_answered_by_the_node_port() {
    let port = node_port(REMOTE);
    for family in FAMILIES {
        let memory = hostnet(family);
        let asks = |flags| asks(&memory, family, &tcp(CLIENT, port, flags)).0;
        assert_eq!(asks(SYN), Verdict::Pass);
        assert_eq!(process_says(&memory, family, SYN | ACK, 2), port);
        assert_eq!(asks(ACK), Verdict::Pass);
        assert_eq!(process_says(&memory, family, FIN | ACK, 2), port);
        for _ in 0..3 {
            assert_eq!(asks(FIN | ACK), Verdict::Pass);
            assert_eq!(process_says(&memory, family, ACK, 2), port);
        }
    }
}

/// The client asks the process at its own address, from the port from which it, or somebody in its name, has asked the node port.
#[test]
fn who_asks_a_process_of_the_node_itself_is_answered_by_it() {
    let port = node_port(REMOTE);
    for family in FAMILIES {
        let memory = hostnet(family);
        let asks = |port, flags| asks(&memory, family, &tcp(CLIENT, port, flags));
        assert_eq!(asks(port, SYN).0, Verdict::Pass);
        // Not to this SYN.
        for flags in [SYN | ACK, RST | ACK] {
            assert_eq!(process_says(&memory, family, flags, 2000), BACKEND_PORT);
        }
        assert_eq!(process_says(&memory, family, SYN | ACK, 2), port);
        // As long as the client may go on there, nobody takes that away from it.
        assert_eq!(asks(BACKEND_PORT, SYN).1.to.port(), BACKEND_PORT);
        assert_eq!(process_says(&memory, family, SYN | ACK, 2), port);
        memory.now.set(memory.now.get() + 3_100_000_000);
        assert_eq!(asks(BACKEND_PORT, SYN).1.to.port(), BACKEND_PORT);
        for flags in [SYN | ACK, ACK] {
            assert_eq!(process_says(&memory, family, flags, 2), BACKEND_PORT);
        }
    }
}

/// Nothing is known of a connection any more, here as there: its client is told at once, by a RST that acknowledges nothing.
#[test]
fn who_goes_on_where_nobody_knows_of_it_is_told() {
    let port = node_port(REMOTE);
    for family in FAMILIES {
        let memory = hostnet(family);
        let (verdict, _) = asks(&memory, family, &tcp(CLIENT, port, ACK));
        assert_eq!(verdict, Verdict::Pass);
        assert_eq!(process_says(&memory, family, ACK, 2), BACKEND_PORT);
        assert_eq!(process_says(&memory, family, RST, 0), port);
    }
}

/// Who asks again does not put off the moment from which the RST is believed.
#[test]
fn a_client_that_asks_again_after_a_reset_comes_to_another_backend() {
    let port = node_port(SHARED);
    for family in FAMILIES {
        let mut memory = world();
        let given = established(&memory, family);
        let id = number(&memory, family, given.to.ip());
        turn(&mut memory, id, Generation::drained);
        let asks = |flags| asks(&memory, family, &tcp(CLIENT, port, flags)).1;
        assert_eq!(asks(RST), given);
        for (after, is_the_same) in [(1.0, true), (1.0, true), (0.9, true), (0.2, false)] {
            let passed = (after * 1e9) as u64;
            memory.now.set(memory.now.get() + passed);
            assert_eq!(asks(SYN) == given, is_the_same, "{after}");
        }
    }
}

/// A goodbye of before a RST and a SYN is none of the connection that begins with them.
#[test]
fn a_connection_that_begins_again_has_said_no_goodbye() {
    let port = node_port(SHARED);
    for family in FAMILIES {
        let memory = world();
        let given = established(&memory, family);
        let states = || {
            let ways = memory.ways.borrow();
            let all = ways.values().map(|way| way.state.load(Relaxed));
            all.fold(0, |all, state| all | state)
        };
        let (verdict, _) = answers(&memory, given.to.ip(), family, FIN | ACK);
        assert_eq!(verdict, Verdict::Pass);
        assert_ne!(states() & WayState::GOODBYES, 0);
        for flags in [RST, SYN] {
            assert_eq!(asks(&memory, family, &tcp(CLIENT, port, flags)).1, given);
        }
        assert_eq!(states() & WayState::GOODBYES, 0);
        assert_eq!(asks(&memory, family, &tcp(CLIENT, port, ACK)).1, given);
        assert_eq!(states() & WayState::ENDING, 0);
    }
}

/// The table gives the memory of a row that it has pushed out to the next one at once.
#[test]
fn what_was_drawn_for_another_one_is_not_believed() {
    let port = node_port(SHARED);
    for family in FAMILIES {
        let mut memory = world();
        let given = asks(&memory, family, &tcp(CLIENT, port, SYN)).1;
        assert_eq!(
            answers(&memory, given.to.ip(), family, SYN | ACK).0,
            Verdict::Pass
        );
        let id = number(&memory, family, given.to.ip());
        turn(&mut memory, id, Generation::drained);
        let ack = tcp(CLIENT, port, ACK);
        for row in memory.choices.borrow_mut().values_mut() {
            row.used ^= 1;
        }
        assert_ne!(asks(&memory, family, &ack).1, given);
    }
}

/// A choice is kept where there was one, and for connections: what is kept of others takes their room.
#[test]
fn what_was_not_drawn_is_not_kept() {
    for family in FAMILIES {
        let memory = world();
        for arrival in [
            received(Host::Far, Host::B, family, &tcp(1000, 80, SYN)),
            sent(Host::B, Host::Far, family, &tcp(80, 1000, SYN | ACK)),
            sent(Host::A, NEAR, family, &udp(1000, SERVICE_PORT)),
            sent(Host::B, Host::A, family, &udp(BACKEND_PORT, 1000)),
        ] {
            let (verdict, _) = meet(&memory, arrival.hook, &arrival.packet);
            assert!(!matches!(verdict, Verdict::Drop(_)), "{verdict:?}");
        }
        assert_eq!(memory.choices.borrow().len(), 0);
    }
}

/// A client that is established, of the way that its packets go.
fn established(memory: &Memory, family: Family) -> Tuple {
    let port = node_port(SHARED);
    let given = asks(memory, family, &tcp(CLIENT, port, SYN)).1;
    assert_eq!(
        answers(memory, given.to.ip(), family, SYN | ACK).0,
        Verdict::Pass
    );
    assert_eq!(asks(memory, family, &tcp(CLIENT, port, ACK)).1, given);
    assert_eq!(memory.ways.borrow().len(), 2);
    given
}

/// Anybody may write a RST and a SYN. A connection that goes on is the same after them, whatever has become of its service.
#[test]
fn a_reset_and_a_syn_end_nothing_that_goes_on() {
    let port = node_port(SHARED);
    for family in FAMILIES {
        for is_reset in [false, true] {
            let mut memory = world();
            let given = established(&memory, family);
            let id = number(&memory, family, given.to.ip());
            turn(&mut memory, id, Generation::drained);
            if is_reset {
                assert_eq!(asks(&memory, family, &tcp(CLIENT, port, RST)).1, given);
                memory.now.set(memory.now.get() + 1_000_000_000);
            }
            for flags in [SYN, ACK] {
                assert_eq!(asks(&memory, family, &tcp(CLIENT, port, flags)).1, given);
            }
            // What stays silent was ended by it.
            memory.now.set(memory.now.get() + 1_000_000_000);
            assert_eq!(asks(&memory, family, &tcp(CLIENT, port, RST)).1, given);
            memory.now.set(memory.now.get() + 3_100_000_000);
            assert_ne!(asks(&memory, family, &tcp(CLIENT, port, SYN)).1, given);
        }
    }
}

/// Its rows need not wait for three hours: its opener has heard that it is over.
#[test]
fn a_connection_that_is_refused_is_over() {
    for family in FAMILIES {
        let mut memory = world();
        let given = established(&memory, family);
        let id = number(&memory, family, given.to.ip());
        turn(&mut memory, id, Generation::gone);
        let (verdict, _) = asks(&memory, family, &tcp(CLIENT, node_port(SHARED), ACK));
        assert_eq!(verdict, Verdict::Refuse(DropReason::BackendGone));
        let ways = memory.ways.borrow();
        let mut states = ways.values().map(|way| way.state.load(Relaxed));
        assert!(states.all(|state| state & WayState::RESET != 0));
    }
}

#[test]
fn nothing_leaves_untranslated_by_a_device_that_is_no_uplink_any_more() {
    for family in FAMILIES {
        let mut memory = world();
        memory.uplinks.clear();
        for transport in [tcp(1000, 80, SYN), udp(1000, 53)] {
            for (mark, reason) in [
                (Mark::LEAVING, DropReason::NotTranslatable),
                (Mark::TRANSLATED, DropReason::NotTranslatable),
                (Mark::REPLY, DropReason::NoFlow),
            ] {
                let ip = Ip::between(Host::A.ip(family), Host::World.ip(family));
                let packet = marked(UPLINK, ip.frame(&transport), mark);
                let (verdict, _) = meet(&memory, Hook::TO_NET, &packet);
                assert_eq!(verdict, Verdict::Drop(reason));
                // Nor any part of it.
                for part in split(&ip.frame(&transport), 5, 8) {
                    let mut packet = marked(UPLINK, part, mark);
                    let verdict =
                        decide(Hook::TO_NET, &mut packet, &memory, &mut Scratch::default());
                    assert!(matches!(verdict, Verdict::Drop(_)), "{mark:?}");
                }
            }
        }
    }
}

/// Which backend is the client's next is what opened last, not what goes on.
#[test]
fn a_segment_does_not_renew_session_affinity() {
    let port = node_port(SHARED);
    for family in FAMILIES {
        let mut memory = world();
        for frontend in memory.frontends.values_mut() {
            frontend.affinity = 100;
        }
        memory.affinity.borrow_mut().clear();
        let given = asks(&memory, family, &tcp(CLIENT, port, SYN)).1.to;
        let answered = answers(&memory, given.ip(), family, SYN | ACK).0;
        assert_eq!(answered, Verdict::Pass);
        let id = number(&memory, family, given.ip());
        turn(&mut memory, id, Generation::drained);
        let next = asks(&memory, family, &tcp(CLIENT + 1, port, SYN)).1.to;
        assert_ne!(next, given);
        assert_eq!(asks(&memory, family, &tcp(CLIENT, port, ACK)).1.to, given);
        let affinity = memory.affinity.borrow();
        let backends: Vec<u32> = affinity.values().map(|row| row.backend).collect();
        assert_eq!(backends, [number(&memory, family, next.ip())]);
    }
}
