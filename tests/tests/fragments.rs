//! Rings 1 and 2: fragments and extension headers on the host, beyond the edges and stories that the other tests run.

#![allow(clippy::unwrap_used, reason = "a test that fails should say where")]

use std::sync::atomic::Ordering::Relaxed;

use proptest::prelude::*;
use weir_common::DropReason;
use weir_common::event::Hook;
use weir_common::way::Way;
use weir_datapath::{Scratch, Verdict};
use weir_tests::bytes::Bytes;
use weir_tests::edges::{received, sent, tcp, udp};
use weir_tests::fragments::{
    DESTINATION_OPTIONS, FRAGMENT, HOP_BY_HOP, ROUTING, extend, part, split,
};
use weir_tests::frames::{ACK, Echo, Ip, L3, SYN, Transport};
use weir_tests::mix::Arrival;
use weir_tests::stories::decide;
use weir_tests::tables::Memory;
use weir_tests::world::{
    BACKEND_PORT, FAMILIES, Family, Host, NEAR, REMOTE, SERVICE_PORT, UPLINK, node_port, world,
};

/// How long fragments may follow, in nanoseconds.
const LIFE: u64 = 30_000_000_000;
const UNKNOWN: Verdict = Verdict::Drop(DropReason::Fragment);
const TO_B: Verdict = Verdict::Redirect(1002);

fn meets(memory: &Memory, arrival: &Arrival) -> (Verdict, Bytes) {
    let mut packet = arrival.packet.clone();
    let verdict = decide(arrival.hook, &mut packet, memory, &mut Scratch::default());
    if matches!(verdict, Verdict::Drop(_)) {
        assert_eq!(packet, arrival.packet, "a dropped packet is not changed");
    }
    (verdict, packet)
}

fn verdict(memory: &Memory, arrival: &Arrival) -> Verdict {
    meets(memory, arrival).0
}

fn with(arrival: &Arrival, frame: Vec<u8>) -> Arrival {
    let mut arrival = arrival.clone();
    arrival.packet.frame = frame;
    arrival
}

/// The same in fragments.
fn parts(arrival: &Arrival, identification: u32, size: usize) -> Vec<Arrival> {
    let frames = split(&arrival.packet.frame, identification, size);
    frames
        .into_iter()
        .map(|frame| with(arrival, frame))
        .collect()
}

fn long_udp(ports: (u16, u16)) -> Transport {
    Transport::Udp {
        ports,
        payload: (0..100).collect(),
    }
}

fn long_tcp(ports: (u16, u16), flags: u8) -> Transport {
    Transport::Tcp {
        ports,
        flags,
        payload: (0..100).collect(),
    }
}

#[test]
fn each_fragment_goes_the_way_of_the_first_and_is_counted_with_its_own_length() {
    for family in FAMILIES {
        for (is_tcp, size) in [(false, 8), (false, 48), (true, 24), (true, 64)] {
            let memory = world();
            let question = |ports| {
                if is_tcp {
                    long_tcp(ports, ACK)
                } else {
                    long_udp(ports)
                }
            };
            let opening = if is_tcp {
                tcp(1000, SERVICE_PORT, SYN)
            } else {
                udp(1000, SERVICE_PORT)
            };
            let answer = if is_tcp {
                tcp(BACKEND_PORT, 1000, SYN | ACK)
            } else {
                udp(BACKEND_PORT, 1000)
            };
            assert_eq!(
                verdict(&memory, &sent(Host::A, NEAR, family, &opening)),
                TO_B
            );
            let answer = sent(Host::B, Host::A, family, &answer);
            assert_eq!(verdict(&memory, &answer), Verdict::Redirect(1001));
            if !is_tcp {
                let third = sent(Host::A, NEAR, family, &opening);
                assert_eq!(verdict(&memory, &third), TO_B);
            }
            let count = || {
                let ways = memory.ways.borrow();
                let mut ways = ways.values().filter(|way| way.backend != 0);
                let sum = |way: &Way| (way.packets.load(Relaxed), way.bytes.load(Relaxed));
                let found: Vec<_> = ways
                    .by_ref()
                    .filter(|way| way.step.addr == Host::B.addr(family))
                    .map(|way| sum(way))
                    .collect();
                assert_eq!(found.len(), 1, "the way there");
                found[0]
            };
            let before = count();
            let whole = sent(Host::A, NEAR, family, &question((1000, SERVICE_PORT)));
            let mut direct = Ip::between(Host::A.ip(family), Host::B.ip(family));
            direct.source_mac = Host::A.mac();
            let direct = split(&direct.frame(&question((1000, BACKEND_PORT))), 5, size);
            let (mut packets, mut bytes) = before;
            for (arrival, wanted) in parts(&whole, 5, size).iter().zip(direct) {
                let (verdict, after) = meets(&memory, arrival);
                assert_eq!(
                    (verdict, after.frame),
                    (TO_B, wanted),
                    "{family:?} {is_tcp} {size}"
                );
                packets += 1;
                bytes += (arrival.packet.frame.len() - L3) as u64;
            }
            assert_eq!(count(), (packets, bytes), "{family:?} {is_tcp} {size}");
        }
    }
}

#[test]
fn a_fragment_follows_only_its_own_first_one() {
    for family in FAMILIES {
        let whole = sent(Host::B, Host::Far, family, &long_udp((1000, 7)));
        let [first, second, ..] = &parts(&whole, 5, 24)[..] else {
            panic!("in parts");
        };
        let other = parts(&whole, 6, 24).swap_remove(1);
        let elsewhere = sent(Host::B, Host::World, family, &long_udp((1000, 7)));
        let of_another = sent(Host::A, Host::Far, family, &long_udp((1000, 7)));
        let cases = [
            ("its own", second.clone(), Verdict::Pass),
            ("of another identification", other, UNKNOWN),
            (
                "to another",
                parts(&elsewhere, 5, 24).swap_remove(1),
                UNKNOWN,
            ),
            (
                "of another pod",
                parts(&of_another, 5, 24).swap_remove(1),
                UNKNOWN,
            ),
        ];
        for (name, arrival, wanted) in cases {
            let memory = world();
            assert_eq!(
                verdict(&memory, second),
                UNKNOWN,
                "nothing came before {name}"
            );
            assert_eq!(verdict(&memory, first), Verdict::Pass);
            assert_eq!(verdict(&memory, &arrival), wanted, "{name} ({family:?})");
        }
        if family == Family::V4 {
            let memory = world();
            assert_eq!(verdict(&memory, first), Verdict::Pass);
            let mut tcp = second.clone();
            tcp.packet.frame[L3 + 9] = 6;
            assert_eq!(verdict(&memory, &tcp), UNKNOWN, "of another protocol");
        } else {
            // The first one says what the packet is (RFC 8200 section 4.5).
            let memory = world();
            assert_eq!(verdict(&memory, first), Verdict::Pass);
            let mut tcp = second.clone();
            tcp.packet.frame[L3 + 40] = 6;
            assert_eq!(verdict(&memory, &tcp), Verdict::Pass);
            assert!(
                memory.ways.borrow().keys().all(|key| key.protocol.0 == 17),
                "of another next header"
            );
        }
        // The same packet at another device, or at the other program of this one.
        let to_b = received(Host::Far, Host::B, family, &long_udp((1000, 7)));
        let [first, second, ..] = &parts(&to_b, 5, 24)[..] else {
            panic!("in parts");
        };
        let memory = world();
        assert_eq!(verdict(&memory, first), Verdict::Pass);
        assert_eq!(verdict(&memory, second), Verdict::Pass);
        let stranger = received(Host::World, Host::B, family, &long_udp((1000, 7)));
        let strange = parts(&stranger, 5, 24).swap_remove(1);
        assert_eq!(verdict(&memory, &strange), UNKNOWN, "of another sender");
        let keys: Vec<_> = memory.fragments.borrow().keys().copied().collect();
        assert_eq!(keys.len(), 1);
        assert_eq!((keys[0].ifindex, keys[0].hook), (1002, Hook::TO_POD));
        for change in [|key: &mut u32| *key += 1, |key: &mut u32| *key = UPLINK] {
            let (mut key, row) = (keys[0], memory.fragments.borrow()[&keys[0]]);
            change(&mut key.ifindex);
            let other = world();
            other.fragments.borrow_mut().insert(key, row);
            assert_eq!(verdict(&other, second), UNKNOWN);
        }
        let (mut key, row) = (keys[0], memory.fragments.borrow()[&keys[0]]);
        key.hook = Hook::FROM_POD;
        let other = world();
        other.fragments.borrow_mut().insert(key, row);
        assert_eq!(verdict(&other, second), UNKNOWN);
    }
}

#[test]
fn a_first_fragment_that_is_dropped_speaks_for_nobody() {
    for family in FAMILIES {
        let answer = Transport::Echo {
            way: Echo::Reply,
            identifier: 9,
        };
        let ip = Ip::between(Host::Far.ip(family), Host::B.ip(family));
        let mut reply = received(Host::Far, Host::B, family, &answer);
        reply.packet.frame = ip.with_more(reply.packet.frame, &[1; 50]);
        for (whole, reason) in [
            (
                sent(Host::C, Host::B, family, &long_udp((1000, 7))),
                DropReason::EgressDenied,
            ),
            (reply, DropReason::NoFlow),
        ] {
            let memory = world();
            for (place, arrival) in parts(&whole, 5, 24).iter().enumerate() {
                let wanted = if place == 0 {
                    Verdict::Drop(reason)
                } else {
                    UNKNOWN
                };
                assert_eq!(verdict(&memory, arrival), wanted, "{family:?} {place}");
            }
            assert!(memory.fragments.borrow().is_empty());
            assert!(memory.plans.borrow().is_empty() && memory.ways.borrow().is_empty());
        }
    }
}

#[test]
fn fragments_may_follow_for_thirty_seconds() {
    for family in FAMILIES {
        let memory = world();
        let whole = sent(Host::B, Host::Far, family, &long_udp((1000, 7)));
        let [first, second, ..] = &parts(&whole, 5, 24)[..] else {
            panic!("in parts");
        };
        memory.now.set(LIFE);
        assert_eq!(verdict(&memory, first), Verdict::Pass);
        memory.now.set(2 * LIFE);
        assert_eq!(verdict(&memory, second), Verdict::Pass);
        memory.now.set(2 * LIFE + 1);
        assert_eq!(verdict(&memory, second), UNKNOWN);
        // The number is another packet's by then, and each first one begins anew.
        let other = sent(Host::B, Host::Far, family, &long_udp((1001, 8)));
        let other = parts(&other, 5, 24);
        assert_eq!(verdict(&memory, &other[0]), Verdict::Pass);
        memory.now.set(3 * LIFE + 1);
        assert_eq!(verdict(&memory, &other[1]), Verdict::Pass);
        assert_eq!(verdict(&memory, &other[0]), Verdict::Pass);
        memory.now.set(4 * LIFE + 1);
        assert_eq!(verdict(&memory, &other[1]), Verdict::Pass);
    }
}

#[test]
fn fragments_do_not_contradict_the_first_one() {
    for family in FAMILIES {
        for transport in [long_udp((1000, 7)), long_tcp((1000, 7), SYN)] {
            let whole = sent(Host::B, Host::Far, family, &transport);
            let frame = &whole.packet.frame;
            let piece = |start, length, more| with(&whole, part(frame, 5, start, length, more));
            let memory = world();
            assert_eq!(verdict(&memory, &piece(0, 40, true)), Verdict::Pass);
            for start in [8, 16, 24, 32] {
                for length in [8, 72] {
                    let overlapping = piece(start, length, true);
                    assert_eq!(
                        verdict(&memory, &overlapping),
                        UNKNOWN,
                        "{family:?} {start}"
                    );
                }
            }
            for start in [40, 48] {
                assert_eq!(verdict(&memory, &piece(start, 8, true)), Verdict::Pass);
            }
            // The same again says nothing new; other ports do, and change nothing.
            assert_eq!(verdict(&memory, &piece(0, 40, true)), Verdict::Pass);
            let rows = memory.fragments.borrow().clone();
            for ports in [(1001, 7), (1000, 8)] {
                let other = match &transport {
                    Transport::Udp { .. } => long_udp(ports),
                    _ => long_tcp(ports, SYN),
                };
                let other = sent(Host::B, Host::Far, family, &other);
                let other = with(&other, part(&other.packet.frame, 5, 0, 40, true));
                assert_eq!(verdict(&memory, &other), UNKNOWN, "{ports:?}");
            }
            assert_eq!(*memory.fragments.borrow(), rows);
            assert_eq!(verdict(&memory, &piece(40, 8, true)), Verdict::Pass);
        }
        // Of IPv6 the protocol is what the first one says.
        if family == Family::V6 {
            let memory = world();
            let first = |transport: &Transport| {
                let whole = sent(Host::B, Host::Far, family, transport);
                with(&whole, part(&whole.packet.frame, 5, 0, 40, true))
            };
            assert_eq!(
                verdict(&memory, &first(&long_udp((1000, 7)))),
                Verdict::Pass
            );
            assert_eq!(verdict(&memory, &first(&long_tcp((1000, 7), SYN))), UNKNOWN);
        }
    }
}

#[test]
fn fragments_of_answers_are_answers() {
    for family in FAMILIES {
        let memory = world();
        let echo = |way| Transport::Echo { way, identifier: 9 };
        let asked = sent(Host::B, Host::Far, family, &echo(Echo::Request));
        assert_eq!(verdict(&memory, &asked), Verdict::Pass);
        let ip = Ip::between(Host::Far.ip(family), Host::B.ip(family));
        let mut reply = received(Host::Far, Host::B, family, &echo(Echo::Reply));
        reply.packet.frame = ip.with_more(reply.packet.frame, &[1; 50]);
        let parts = parts(&reply, 5, 24);
        for arrival in &parts {
            assert_eq!(verdict(&memory, arrival), Verdict::Pass);
        }
        // When the conversation is forgotten meanwhile, what is left of the answer opens none.
        memory.ways.borrow_mut().clear();
        memory.plans.borrow_mut().clear();
        let no_flow = Verdict::Drop(DropReason::NoFlow);
        assert_eq!(verdict(&memory, &parts[1]), no_flow);
    }
}

/// Only the last part of a segment says where it ends, which its receiver is to acknowledge.
#[test]
fn an_answer_in_fragments_does_not_say_where_it_ends() {
    for family in FAMILIES {
        let memory = world();
        let asked = sent(Host::A, Host::Far, family, &tcp(1000, 80, SYN));
        assert_eq!(verdict(&memory, &asked), Verdict::Pass);
        let end = || {
            let plans = memory.plans.borrow();
            assert_eq!(plans.len(), 1);
            let plan = plans.values().next().unwrap();
            plan.way.others_end.load(Relaxed)
        };
        let whole = received(Host::Far, Host::A, family, &long_tcp((80, 1000), SYN | ACK));
        for arrival in parts(&whole, 5, 64) {
            assert_eq!(verdict(&memory, &arrival), Verdict::Pass);
            assert_eq!(end(), 0);
        }
        assert_eq!(memory.ways.borrow().len(), 0);
        assert_eq!(verdict(&memory, &whole), Verdict::Pass);
        assert_eq!(memory.ways.borrow().len(), 2);
    }
}

#[test]
fn a_node_and_its_pods_may_send_fragments_to_each_other() {
    for family in FAMILIES {
        let memory = world();
        for whole in [
            received(Host::Node, Host::C, family, &long_udp((1000, 7))),
            sent(Host::C, Host::Node, family, &long_udp((1000, 7))),
        ] {
            for arrival in parts(&whole, 5, 24) {
                assert_eq!(verdict(&memory, &arrival), Verdict::Pass);
            }
        }
        assert_eq!(memory.fragments.borrow().len(), 2);
    }
}

#[test]
fn what_comes_into_the_node_is_remembered_only_if_it_is_translated() {
    for family in FAMILIES {
        let memory = world();
        for (to, port, known) in [
            (Host::Node, 9, 0),
            (Host::B, 9, 0),
            (Host::Node, node_port(REMOTE), 1),
        ] {
            let ip = Ip::between(Host::World.ip(family), to.ip(family));
            let whole = Arrival {
                hook: Hook::FROM_NET,
                packet: Bytes::new(UPLINK, ip.frame(&long_udp((1000, port)))),
            };
            for arrival in parts(&whole, 5, 24) {
                let (verdict, after) = meets(&memory, &arrival);
                assert_eq!(verdict, Verdict::Pass);
                assert_eq!(after.frame != arrival.packet.frame, known == 1);
            }
            assert_eq!(memory.fragments.borrow().len(), known);
        }
    }
}

#[test]
fn an_error_about_a_first_fragment_belongs_to_its_conversation() {
    for (family, length) in [(Family::V4, 28), (Family::V6, 56)] {
        let memory = world();
        let whole = sent(Host::B, Host::Far, family, &long_udp((1000, 7)));
        for (part, wanted) in parts(&whole, 5, 24)
            .iter()
            .zip([Verdict::Pass, Verdict::Drop(DropReason::NoFlow)])
        {
            assert_eq!(verdict(&memory, part), Verdict::Pass);
            let quoted = part.packet.frame[L3..L3 + length].to_vec();
            let error = Transport::Unreachable { quoted };
            let error = received(Host::World, Host::B, family, &error);
            assert_eq!(verdict(&memory, &error), wanted, "{family:?}");
        }
    }
}

#[test]
fn an_atomic_fragment_is_a_whole_packet() {
    let memory = world();
    let whole = sent(Host::B, Host::Far, Family::V6, &long_udp((1000, 7)));
    let length = whole.packet.frame.len() - L3 - 40;
    let atomic = |length| with(&whole, part(&whole.packet.frame, 5, 0, length, false));
    assert_eq!(verdict(&memory, &atomic(length)), Verdict::Pass);
    assert!(memory.fragments.borrow().is_empty());
    let malformed = Verdict::Drop(DropReason::Malformed);
    assert_eq!(verdict(&memory, &atomic(length - 1)), malformed);
}

#[test]
fn a_segment_above_64_kib_may_say_so() {
    let long = |length: usize| Transport::Tcp {
        ports: (1000, SERVICE_PORT),
        flags: ACK,
        payload: vec![7; length],
    };
    let jumbo = [0, 0xc2, 4, 0, 1, 0x12, 0];
    let malformed = Verdict::Drop(DropReason::Malformed);
    for (length, option, wanted) in [
        (70_000, jumbo, TO_B),
        // Neither has it a length, nor is it that long.
        (70, jumbo, malformed),
    ] {
        let whole = sent(Host::A, NEAR, Family::V6, &long(length));
        let mut frame = extend(&whole.packet.frame, &[(HOP_BY_HOP, &option)]);
        frame[L3 + 4..L3 + 6].fill(0);
        let arrival = with(&whole, frame);
        let memory = world();
        let (verdict, after) = meets(&memory, &arrival);
        assert_eq!(verdict, wanted, "{length}");
        if wanted == TO_B {
            assert_eq!(
                after.frame[L3 + 48 + 2..L3 + 48 + 4],
                BACKEND_PORT.to_be_bytes()
            );
            let plans = memory.plans.borrow();
            let plan = plans.values().next().unwrap();
            assert_eq!(plan.way.bytes.load(Relaxed), length as u64 + 20 + 48);
        }
    }
}

#[test]
fn fragments_may_stand_behind_options_and_options_in_fragments() {
    let options = [0, 1, 4, 0, 0, 0, 0];
    let whole = sent(Host::A, NEAR, Family::V6, &long_udp((1000, SERVICE_PORT)));
    let mut direct = Ip::between(Host::A.ip(Family::V6), Host::B.ip(Family::V6));
    direct.source_mac = Host::A.mac();
    let direct = direct.frame(&long_udp((1000, BACKEND_PORT)));
    let before = |frame: &[u8]| extend(frame, &[(DESTINATION_OPTIONS, &options)]);
    let memory = world();
    for (part, wanted) in split(&whole.packet.frame, 5, 24)
        .iter()
        .zip(split(&direct, 5, 24))
    {
        let arrival = with(&whole, before(part));
        let (verdict, after) = meets(&memory, &arrival);
        assert_eq!((verdict, after.frame), (TO_B, before(&wanted)));
    }
    let (whole, direct) = (with(&whole, before(&whole.packet.frame)), before(&direct));
    for (arrival, wanted) in parts(&whole, 6, 24).iter().zip(split(&direct, 6, 24)) {
        let (verdict, after) = meets(&memory, arrival);
        assert_eq!((verdict, after.frame), (TO_B, wanted));
    }
    // The whole chain of headers is in the first one (RFC 7112).
    let cut = with(&whole, part(&whole.packet.frame, 7, 0, 8, true));
    assert_eq!(verdict(&memory, &cut), Verdict::Drop(DropReason::Malformed));
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 300,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    /// Whatever a pod writes between its addresses and its payload: nothing panics, what is dropped is as it was, and
    /// what goes on has the pod's own address.
    #[test]
    fn a_pod_speaks_for_itself_whatever_its_headers_say(
        is_v4: bool,
        headers in proptest::collection::vec(
            (
                prop::sample::select(vec![HOP_BY_HOP, ROUTING, FRAGMENT, DESTINATION_OPTIONS, 50, 6, 17]),
                prop_oneof![Just(vec![0; 7]), proptest::collection::vec(any::<u8>(), 7..40)],
            ),
            0..4,
        ),
        pieces in proptest::collection::vec((0usize..10, 0usize..80, any::<bool>(), 0u32..3), 0..12),
        spoiled in proptest::collection::vec((L3 + 1..L3 + 140, any::<u8>()), 0..3),
        cut in prop_oneof![3 => Just(0usize), 1 => 0usize..200],
        says in prop_oneof![3 => Just(None), 1 => prop::option::of(0u8..40)],
        source in prop::sample::select(vec![Host::B, Host::B, Host::B, Host::A, Host::Far, Host::World]),
    ) {
        let family = if is_v4 { Family::V4 } else { Family::V6 };
        let memory = world();
        let own: &[u8] = if is_v4 { &[10, 0, 0, 2] } else { &Host::B.addr(family).0 };
        let mut ip = Ip::between(source.ip(family), Host::World.ip(family));
        ip.source_mac = Host::B.mac();
        let whole = ip.frame(&long_udp((1000, 7)));
        for (start, length, more, number) in [(0, 24, true, 0)].into_iter().chain(pieces) {
            let start = start * 8;
            let length = length.min(100 - start);
            let mut frame = part(&whole, number, start, length, more);
            if family == Family::V6 {
                let headers: Vec<_> = headers.iter().map(|(n, says)| (*n, &says[..])).collect();
                frame = extend(&frame, &headers);
            }
            if let Some(length) = says {
                frame[if is_v4 { L3 + 3 } else { L3 + 5 }] = length;
            }
            for (at, value) in &spoiled {
                if let Some(byte) = frame.get_mut(*at) {
                    *byte = *value;
                }
            }
            frame.truncate(frame.len() - cut.min(frame.len() / 3));
            let before = Bytes::new(1002, frame);
            for hook in [Hook::FROM_POD, Hook::FROM_NET, Hook::TO_NET, Hook::TO_POD] {
                let mut packet = before.clone();
                if hook == Hook::TO_NET {
                    packet.mark = weir_common::way::Mark::LEAVING.bits();
                    packet.ifindex = UPLINK;
                }
                let marked = packet.clone();
                let verdict = decide(hook, &mut packet, &memory, &mut Scratch::default());
                if matches!(verdict, Verdict::Drop(_)) {
                    prop_assert_eq!(&packet, &marked);
                } else if hook == Hook::FROM_POD {
                    let at = if is_v4 { 12..16 } else { 8..24 };
                    let says = &packet.frame[L3..][at];
                    prop_assert_eq!(says, own);
                }
            }
        }
    }
}
