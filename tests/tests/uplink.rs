//! Ring 2: packets through the node's uplink, on the host.

#![allow(clippy::unwrap_used, reason = "a test that fails should say where")]

use std::net::IpAddr;

use weir_common::DropReason;
use weir_common::event::Hook;
use weir_common::node::Features;
use weir_common::service::Generation;
use weir_common::way::Mark;
use weir_datapath::{Scratch, Verdict};
use weir_tests::bytes::{Bytes, marked};
use weir_tests::edges::{sent, tcp, udp};
use weir_tests::fragments::{is_folded, split};
use weir_tests::frames::{ACK, Echo, Ip, L3, SYN, Transport, checksums_are_right};
use weir_tests::stories::{Story, decide, stories};
use weir_tests::tables::Memory;
use weir_tests::world::{BACKEND_PORT, FAMILIES, Family, Host, REMOTE, UPLINK, node_port, world};

#[test]
fn every_story_ends_as_it_should() {
    let stories = stories();
    assert!(stories.len() > 15, "{}", stories.len());
    for Story { name, steps } in stories {
        let memory = world();
        for (number, step) in steps.into_iter().enumerate() {
            let mut packet = step.packet.clone();
            let mut scratch = Scratch::default();
            let verdict = decide(step.hook, &mut packet, &memory, &mut scratch);
            let at = format!("{name}, step {number} ({})", step.hook.label());
            assert_eq!(verdict, step.verdict, "{at}");
            if !matches!(verdict, Verdict::Drop(_)) {
                let says = step.says.unwrap_or(Mark::of(step.packet.mark));
                assert_eq!(Mark::of(packet.mark), says, "{at}");
            }
            if let Some(after) = &step.after {
                let is_right = is_folded(after) || checksums_are_right(after);
                assert!(is_right, "{at}: the test's own frame");
                assert_eq!(&packet.frame, after, "{at}");
            } else if matches!(verdict, Verdict::Pass) {
                assert_eq!(packet.frame, step.packet.frame, "{at}");
            }
        }
    }
}

/// What no program can read is dropped where it would leave with somebody's address, and only there.
#[test]
fn what_nobody_has_to_translate_leaves_unread() {
    for family in FAMILIES {
        let memory = world();
        let ip = Ip::between(Host::Farther.ip(family), Host::World.ip(family));
        let whole = ip.frame(&udp(5000, 53));
        let cut = ip.frame(&tcp(5000, 80, ACK));
        let cut = cut[..cut.len() - 10].to_vec();
        // A later fragment of a process of the node, from an address that the uplink does not leave with.
        let mut own = Bytes::new(UPLINK, split(&whole, 1, 8)[1].clone());
        own.received_by = 0;
        let former = |device| marked(device, cut.clone(), Mark::FORMER);
        for (packet, verdict) in [
            (own, Verdict::Pass),
            (former(UPLINK + 1), Verdict::Pass),
            (former(UPLINK), Verdict::Drop(DropReason::Malformed)),
        ] {
            let mut scratch = Scratch::default();
            let found = decide(Hook::TO_NET, &mut packet.clone(), &memory, &mut scratch);
            assert_eq!(found, verdict, "{packet:02x?}");
        }
    }
}

#[test]
fn a_backend_that_drains_keeps_its_connections_and_gets_nothing_new() {
    for family in FAMILIES {
        let id = if family == Family::V4 { 2 } else { 12 };
        let ask = |memory: &Memory, transport: Transport| {
            let ip = Ip::between(Host::World.ip(family), Host::Node.ip(family));
            let mut packet = Bytes::new(UPLINK, ip.frame(&transport));
            decide(Hook::FROM_NET, &mut packet, memory, &mut Scratch::default())
        };
        let port = node_port(REMOTE);
        let mut memory = world();
        assert_eq!(ask(&memory, tcp(5000, port, SYN)), Verdict::Pass);
        let ip = Ip::between(Host::Far.ip(family), Host::World.ip(family));
        let answer = ip.frame(&tcp(BACKEND_PORT, 5000, SYN | ACK));
        let mut answer = marked(UPLINK, answer, Mark::REPLY);
        let verdict = decide(Hook::TO_NET, &mut answer, &memory, &mut Scratch::default());
        assert_eq!(verdict, Verdict::Pass);
        for transport in [tcp(5000, port, ACK), udp(5000, port)] {
            assert_eq!(ask(&memory, transport), Verdict::Pass);
        }
        let nothing = Verdict::Refuse(DropReason::NoBackend);
        let gone = Verdict::Refuse(DropReason::BackendGone);
        // The backend's generation from now on; what becomes of a segment of the connection that is there, of a new
        // connection, and of a datagram to where one went before.
        let steps = [
            (9, [Verdict::Pass, nothing, nothing]),
            // Usable again in time: it is the same one.
            (8, [Verdict::Pass; 3]),
            (9, [Verdict::Pass, nothing, nothing]),
            (10, [gone, nothing, nothing]),
            (13, [gone, nothing, nothing]),
            (12, [gone, Verdict::Pass, Verdict::Pass]),
            (0, [gone, nothing, nothing]),
        ];
        for (client, (generation, expected)) in (6000..).zip(steps) {
            memory.live.insert(id, Generation(generation));
            let asked = [
                tcp(5000, port, ACK),
                tcp(client, port, SYN),
                udp(5000, port),
            ];
            let verdicts = asked.map(|transport| ask(&memory, transport));
            assert_eq!(verdicts, expected, "{generation}");
        }
    }
}

/// What an earlier program has let a pod send goes as the conversation goes: with the node's address if the pod began it, and as
/// it is if somebody outside has asked the pod itself.
#[test]
fn what_an_earlier_program_has_passed_goes_the_way_of_its_conversation() {
    for family in FAMILIES {
        for is_asked in [false, true] {
            let memory = world();
            let (pod, outside) = (Host::B.ip(family), Host::World.ip(family));
            let there = sent(Host::B, Host::World, family, &udp(4000, 53));
            let ip = Ip::between(outside, pod).frame(&udp(53, 4000));
            let back = Bytes {
                received_by: UPLINK,
                ..Bytes::new(Host::B.ifindex().unwrap(), ip)
            };
            let back = (Hook::TO_POD, back);
            let there = (there.hook, there.packet);
            let first = if is_asked { &back } else { &there };
            for (hook, packet) in [first, &there, &back, &there] {
                let mut packet = packet.clone();
                let verdict = decide(*hook, &mut packet, &memory, &mut Scratch::default());
                assert_eq!(verdict, Verdict::Pass);
            }
            assert_eq!(memory.ways.borrow().len(), 2);
            let frame = Ip::between(pod, outside).frame(&udp(4000, 53));
            let mut packet = marked(UPLINK, frame.clone(), Mark::FORMER);
            let verdict = decide(Hook::TO_NET, &mut packet, &memory, &mut Scratch::default());
            assert_eq!(verdict, Verdict::Pass);
            assert_eq!(packet.frame == frame, is_asked, "{family:?}");
        }
    }
}

#[test]
fn what_an_earlier_program_has_passed_does_not_leave_with_a_pods_address() {
    for family in FAMILIES {
        let memory = world();
        let leave = |from: Host, to: Host, transport: &Transport| {
            let frame = Ip::between(from.ip(family), to.ip(family)).frame(transport);
            let mut packet = marked(UPLINK, frame.clone(), Mark::FORMER);
            let mut scratch = Scratch::default();
            let verdict = decide(Hook::TO_NET, &mut packet, &memory, &mut scratch);
            let source = match family {
                Family::V4 => &packet.frame[26..30],
                Family::V6 => &packet.frame[22..38],
            };
            let is_nodes = match Host::Node.ip(family) {
                IpAddr::V4(ip) => ip.octets() == *source,
                IpAddr::V6(ip) => ip.octets() == *source,
            };
            assert!(checksums_are_right(&packet.frame));
            (verdict, packet.frame != frame, is_nodes)
        };
        let new = leave(Host::B, Host::World, &udp(4000, 53));
        assert_eq!(new, (Verdict::Pass, true, true), "{family:?}");
        for (case, from, to, transport) in [
            ("to a pod elsewhere", Host::B, Host::Far, tcp(1, 2, ACK)),
            ("translated by it", Host::Node, Host::World, tcp(1, 2, ACK)),
            ("no pod's", Host::Farther, Host::World, tcp(1, 2, ACK)),
        ] {
            let (verdict, is_changed, _) = leave(from, to, &transport);
            assert_eq!((verdict, is_changed), (Verdict::Pass, false), "{case}");
        }
        // Somebody outside has asked the pod itself: its answers are no conversation of its own.
        let ip = Ip::between(Host::World.ip(family), Host::B.ip(family));
        let device = Host::B.ifindex().unwrap();
        let mut asked = Bytes::new(device, ip.frame(&tcp(5000, 80, SYN)));
        let verdict = decide(Hook::TO_POD, &mut asked, &memory, &mut Scratch::default());
        assert_eq!(verdict, Verdict::Pass);
        let mut answer = sent(Host::B, Host::World, family, &tcp(80, 5000, SYN | ACK)).packet;
        let verdict = decide(
            Hook::FROM_POD,
            &mut answer,
            &memory,
            &mut Scratch::default(),
        );
        assert_eq!(verdict, Verdict::Pass);
        let (verdict, is_changed, _) = leave(Host::B, Host::World, &tcp(80, 5000, ACK));
        assert_eq!((verdict, is_changed), (Verdict::Pass, false));
        let unknown = leave(Host::B, Host::World, &tcp(81, 5000, SYN | ACK));
        assert_eq!(unknown.0, Verdict::Drop(DropReason::NoFlow));
    }
}

#[test]
fn without_masquerading_pods_keep_their_addresses() {
    for family in FAMILIES {
        let mut memory = world();
        memory.config.features &= !Features::MASQUERADE;
        let frame = sent(Host::B, Host::World, family, &udp(4000, 53))
            .packet
            .frame;
        let ifindex = Host::B.ifindex().unwrap();
        for (hook, packet) in [
            (Hook::FROM_POD, Bytes::new(ifindex, frame.clone())),
            (Hook::TO_NET, marked(UPLINK, frame.clone(), Mark::PASSED)),
        ] {
            let mut packet = packet;
            let verdict = decide(hook, &mut packet, &memory, &mut Scratch::default());
            assert_eq!((verdict, &packet.frame), (Verdict::Pass, &frame));
            assert_eq!(Mark::of(packet.mark), Mark::PASSED);
        }
        let plans = memory.plans.borrow();
        assert!(plans.keys().all(|answer| answer.hook == Hook::TO_POD));
    }
}

/// What the node itself sends is looked at where it may be an answer to what was asked through a node port: the rest of its
/// traffic costs nothing more.
#[test]
fn of_the_nodes_own_packets_few_are_looked_at() {
    use weir_datapath::l3::Family as Read;
    const ASKED: u16 = 9000;
    for family in FAMILIES {
        let read = if family == Family::V4 {
            Read::V4
        } else {
            Read::V6
        };
        let ip = Ip::between(Host::Node.ip(family), Host::World.ip(family));
        let may_be = |frame: Vec<u8>| {
            let packet = Bytes::new(UPLINK, frame);
            read.may_be(&packet, |port| u16::from(port) == ASKED)
        };
        let error = Transport::Unreachable {
            quoted: vec![0x45; 48],
        };
        let echo = |way| Transport::Echo { way, identifier: 9 };
        let long = Transport::Udp {
            ports: (80, 80),
            payload: vec![7; 100],
        };
        for (transport, expected) in [
            (tcp(ASKED, 80, ACK), true),
            (tcp(80, ASKED, ACK), false),
            (udp(ASKED, 80), true),
            (udp(80, ASKED), false),
            (error, true),
            (echo(Echo::Request), false),
            (echo(Echo::Reply), false),
            (Transport::Sctp { ports: (ASKED, 80) }, false),
        ] {
            let whole = ip.frame(&transport);
            assert_eq!(may_be(whole.clone()), expected, "{transport:?}");
            // Where the transport header begins says the header.
            if family == Family::V4 {
                let mut ip = ip.clone();
                ip.options = 8;
                assert_eq!(may_be(ip.frame(&transport)), expected, "{transport:?}");
            }
            assert!(!may_be(whole[..L3 + 5].to_vec()));
            let body = if family == Family::V4 { 20 } else { 40 };
            assert!(!may_be(whole[..L3 + body + 1].to_vec()));
        }
        for frame in split(&ip.frame(&long), 5, 64) {
            assert!(may_be(frame));
        }
    }
}
