//! Ring 1: what ends a connection, on the host.

#![allow(clippy::unwrap_used, reason = "a test that fails should say where")]

use std::sync::atomic::Ordering::Relaxed;

use weir_common::DropReason;
use weir_common::counter::Counter;
use weir_common::event::Hook;
use weir_common::way::{Mark, WayState};
use weir_datapath::{Scratch, Verdict};
use weir_tests::bytes::{Bytes, marked};
use weir_tests::edges::{received, sent, tcp, udp};
use weir_tests::fragments::split;
use weir_tests::frames::{ACK, FIN, Ip, L3, RST, SYN, Transport};
use weir_tests::mix::Arrival;
use weir_tests::stories::decide;
use weir_tests::tables::{Memory, Room, copy};
use weir_tests::world::{
    BACKEND_PORT, Family, Host, NEAR, REMOTE, SERVICE_PORT, UPLINK, node_port, world,
};

/// What a pod sends to a server outside, and what that answers.
fn there(flags: u8) -> Arrival {
    sent(Host::A, Host::Far, Family::V6, &tcp(1000, 80, flags))
}

fn back(flags: u8) -> Arrival {
    received(Host::Far, Host::A, Family::V6, &tcp(80, 1000, flags))
}

fn passes(memory: &Memory, arrival: &Arrival) {
    let mut packet = arrival.packet.clone();
    let verdict = decide(arrival.hook, &mut packet, memory, &mut Scratch::default());
    assert_eq!(verdict, Verdict::Pass);
}

/// After a handshake.
fn connected() -> Memory {
    let memory = world();
    for arrival in [there(SYN), back(SYN | ACK), there(ACK)] {
        passes(&memory, &arrival);
    }
    memory
}

/// The states of the opener's way and of the other one.
fn states(memory: &Memory) -> [u32; 2] {
    let ways = memory.ways.borrow();
    assert_eq!(ways.len(), 2);
    assert!(memory.plans.borrow().is_empty());
    let mut states: Vec<u32> = ways.values().map(|way| way.state.load(Relaxed)).collect();
    states.sort_unstable_by_key(|state| state & WayState::OPENER == 0);
    [states[0], states[1]]
}

fn closed(memory: &Memory) -> [bool; 2] {
    states(memory).map(WayState::is_closed)
}

#[test]
fn a_reset_ends_only_what_stays_silent() {
    for (rst, goes_on) in [(there(RST), back(ACK)), (back(RST), there(ACK))] {
        let memory = connected();
        passes(&memory, &rst);
        assert_eq!(closed(&memory), [true; 2]);
        // An end that does not take it for the other's, or whose packets were on the way.
        passes(&memory, &goes_on);
        assert_eq!(closed(&memory), [false; 2]);
        passes(&memory, &rst);
        passes(&memory, &rst);
        assert_eq!(closed(&memory), [true; 2]);
    }
}

#[test]
fn one_goodbye_closes_one_half_and_the_last_acknowledgement_ends_it() {
    for (first, answer, last) in [
        (there(FIN | ACK), back(ACK), back(FIN | ACK)),
        (back(FIN | ACK), there(ACK), there(FIN | ACK)),
    ] {
        let memory = connected();
        for (arrival, is_heard) in [
            (&first, false),
            (&first, false),
            (&answer, true),
            (&first, true),
        ] {
            passes(&memory, arrival);
            let states = states(&memory);
            assert_eq!(states.map(WayState::is_half_closed), [true; 2]);
            assert_eq!(closed(&memory), [false; 2]);
            let heard = states[0] | states[1];
            assert_eq!(heard & WayState::FIN_HEARD != 0, is_heard);
        }
        passes(&memory, &last);
        assert_eq!(closed(&memory), [true; 2]);
        // What is sent again is no acknowledgement.
        passes(&memory, &last);
        assert_eq!(closed(&memory), [true; 2]);
        let acknowledgement = if first.hook == Hook::FROM_POD {
            there(ACK)
        } else {
            back(ACK)
        };
        // Of what came before the goodbye.
        let mut earlier = acknowledgement.clone();
        earlier.packet.frame[L3 + 40 + 11] = 1;
        passes(&memory, &earlier);
        assert_eq!(closed(&memory), [true; 2]);
        passes(&memory, &acknowledgement);
        assert!(memory.ways.borrow().is_empty());
    }
}

/// A conversation through a service, of datagrams, of which either way is pushed out: the next packet of its opener, a
/// second later at most, makes both again.
#[test]
fn a_way_that_was_pushed_out_is_made_again() {
    for lost in [Hook::FROM_POD, Hook::TO_POD] {
        let memory = world();
        let question = sent(Host::A, REMOTE, Family::V6, &udp(1000, SERVICE_PORT));
        let answer = received(Host::Far, Host::A, Family::V6, &udp(BACKEND_PORT, 1000));
        for arrival in [&question, &answer, &question] {
            passes(&memory, arrival);
        }
        memory.ways.borrow_mut().retain(|key, _| key.hook != lost);
        assert_eq!(memory.ways.borrow().len(), 1);
        memory.now.set(memory.now.get() + 1_100_000_000);
        let is_translated = || {
            let mut seen = answer.packet.clone();
            let verdict = decide(answer.hook, &mut seen, &memory, &mut Scratch::default());
            verdict == Verdict::Pass && seen.frame != answer.packet.frame
        };
        // An answer may come before the opener says anything.
        assert!(lost == Hook::TO_POD || is_translated());
        for arrival in [&question, &answer, &question] {
            passes(&memory, arrival);
        }
        assert_eq!(memory.counted(Counter::WaysLost), 1);
        assert_eq!(memory.ways.borrow().len(), 2, "{}", lost.label());
        assert!(is_translated(), "{}", lost.label());
    }
}

/// Anybody on the wire may send a SYN in anybody's name, and an open port answers it. Only who has had the answer, and goes
/// on, has a connection.
#[test]
fn what_is_opened_from_elsewhere_has_ways_when_its_opener_goes_on() {
    for (port, backend) in [(node_port(NEAR), Host::B), (node_port(REMOTE), Host::Far)] {
        let memory = world();
        let asks = |n: u16, flags| {
            let ip = Ip::between(Host::World.ip(Family::V6), Host::Node.ip(Family::V6));
            let packet = Bytes::new(UPLINK, ip.frame(&tcp(n, port, flags)));
            Arrival {
                hook: Hook::FROM_NET,
                packet,
            }
        };
        let answers = |n: u16, flags| {
            let ip = Ip::between(backend.ip(Family::V6), Host::World.ip(Family::V6));
            let packet = marked(UPLINK, ip.frame(&tcp(BACKEND_PORT, n, flags)), Mark::REPLY);
            Arrival {
                hook: Hook::TO_NET,
                packet,
            }
        };
        for n in 1..=1_000 {
            passes(&memory, &asks(n, SYN));
            passes(&memory, &answers(n, SYN | ACK));
            passes(&memory, &answers(n, SYN | ACK));
        }
        assert!(memory.ways.borrow().is_empty());
        passes(&memory, &asks(7, ACK));
        passes(&memory, &answers(7, ACK));
        assert_eq!(memory.ways.borrow().len(), 2);
        assert_eq!(memory.plans.borrow().len(), 999);
        // What the server says is no proof: it acknowledges a guess, too (RFC 5961 section 5).
        passes(&memory, &answers(8, ACK));
        assert_eq!(memory.ways.borrow().len(), 2);
        assert_eq!(memory.plans.borrow().len(), 999);
        assert_eq!(memory.counted(Counter::FlowsAnswered), 1_000);
    }
}

/// The backend speaks, twice, while the way of its answers is gone: that opens a conversation of its own, under the same
/// key. Its opener's next packet says whose it is.
#[test]
fn an_answer_without_its_way_does_not_stay_a_conversation_of_its_own() {
    let memory = world();
    let question = sent(Host::A, REMOTE, Family::V6, &udp(1000, SERVICE_PORT));
    let answer = received(Host::Far, Host::A, Family::V6, &udp(BACKEND_PORT, 1000));
    for arrival in [&question, &answer, &question] {
        passes(&memory, arrival);
    }
    memory
        .ways
        .borrow_mut()
        .retain(|key, _| key.hook != Hook::TO_POD);
    for _ in 0..20 {
        passes(&memory, &answer);
    }
    assert_eq!(memory.ways.borrow().len(), 3, "two of the answers' own");
    memory.now.set(memory.now.get() + 1_100_000_000);
    passes(&memory, &question);
    let mut seen = answer.packet.clone();
    let verdict = decide(answer.hook, &mut seen, &memory, &mut Scratch::default());
    assert_eq!(verdict, Verdict::Pass);
    assert_ne!(seen.frame, answer.packet.frame, "it comes from the service");
}

#[test]
fn a_goodbye_that_its_sender_goes_on_after_was_not_his() {
    let numbered = |mut arrival: Arrival, first: u32| {
        arrival.packet.frame[L3 + 40 + 4..L3 + 40 + 8].copy_from_slice(&first.to_be_bytes());
        arrival
    };
    let memory = connected();
    passes(&memory, &numbered(there(FIN | ACK), 1_000));
    for (first, is_false) in [(900, false), (1_001, false), (5_000, true)] {
        passes(&memory, &numbered(there(ACK), first));
        assert_eq!(
            states(&memory).map(WayState::is_half_closed),
            [!is_false; 2]
        );
    }
    assert_eq!(states(&memory)[0] & WayState::ENDING, 0);
}

#[test]
fn who_says_goodbye_at_once_waits_for_both_acknowledgements() {
    let memory = connected();
    let acknowledging = |mut arrival: Arrival, number: u32| {
        arrival.packet.frame[L3 + 40 + 8..L3 + 40 + 12].copy_from_slice(&number.to_be_bytes());
        arrival
    };
    // The acknowledgement of either goodbye, by where the other's segments end.
    let end = |arrival: &Arrival| {
        let bytes = arrival.packet.frame[L3 + 40 + 4..L3 + 40 + 8].try_into();
        let payload = arrival.packet.frame.len() - L3 - 40 - 20;
        u32::from_be_bytes(bytes.unwrap()) + payload as u32 + 1
    };
    let (first, second) = (there(FIN | ACK), back(FIN | ACK));
    let (first_end, second_end) = (end(&first), end(&second));
    passes(&memory, &acknowledging(first, 7));
    passes(&memory, &acknowledging(second, 7));
    passes(&memory, &acknowledging(there(ACK), second_end));
    assert_eq!(closed(&memory), [true; 2]);
    passes(&memory, &acknowledging(back(ACK), first_end));
    assert!(memory.ways.borrow().is_empty());
}

/// A stream that began before there was a service, and one whose service is gone: kube-proxy forgets both.
#[test]
fn a_stream_hears_of_services_that_come_and_go() {
    let question = sent(Host::B, REMOTE, Family::V6, &udp(1000, SERVICE_PORT));
    let service = REMOTE.addr(Family::V6);
    let mut memory = world();
    let all = memory.frontends.clone();
    let is_sent_to_backend = |memory: &Memory| {
        memory.now.set(memory.now.get() + 1_100_000_000);
        let mut packet = question.packet.clone();
        let verdict = decide(question.hook, &mut packet, memory, &mut Scratch::default());
        assert_eq!(verdict, Verdict::Pass);
        packet.frame != question.packet.frame
    };
    memory.frontends.retain(|key, _| key.addr != service);
    for _ in 0..4 {
        assert!(!is_sent_to_backend(&memory));
    }
    memory.frontends.clone_from(&all);
    for _ in 0..4 {
        assert!(is_sent_to_backend(&memory));
    }
    memory.frontends.retain(|key, _| key.addr != service);
    assert!(!is_sent_to_backend(&memory));
}

/// One socket of a pod asks a service, and another one, with the same port, its backend itself: as libraries do that connect
/// and such that do not.
#[test]
fn a_port_may_ask_a_service_and_then_its_backend() {
    let question = sent(Host::A, REMOTE, Family::V6, &udp(1000, SERVICE_PORT));
    let direct = sent(Host::A, Host::Far, Family::V6, &udp(1000, BACKEND_PORT));
    let answer = received(Host::Far, Host::A, Family::V6, &udp(BACKEND_PORT, 1000));
    // As plans, and as ways.
    for times in [1, 3] {
        let memory = world();
        for (asked, is_service) in [(&question, true), (&direct, false), (&question, true)] {
            for _ in 0..times {
                passes(&memory, asked);
                let mut seen = answer.packet.clone();
                let verdict = decide(answer.hook, &mut seen, &memory, &mut Scratch::default());
                assert_eq!(verdict, Verdict::Pass);
                assert_eq!(seen.frame != answer.packet.frame, is_service);
            }
        }
        let rows = memory.ways.borrow().len() + memory.plans.borrow().len();
        assert!(rows <= 2, "{rows}");
    }
}

/// Of datagrams from outside, too, somebody has to have answered, or there are many: their senders may not be who they say.
#[test]
fn three_datagrams_in_anybodys_name_make_no_ways() {
    let memory = world();
    for n in 1_000..2_000 {
        let asks = received(Host::Far, Host::B, Family::V6, &udp(n, 53));
        for _ in 0..3 {
            passes(&memory, &asks);
        }
    }
    assert!(memory.ways.borrow().is_empty());
    let asks = received(Host::Far, Host::B, Family::V6, &udp(7, 53));
    for _ in 0..17 {
        passes(&memory, &asks);
    }
    assert_eq!(
        memory.ways.borrow().len(),
        2,
        "a stream that nobody answers"
    );
    let asks = received(Host::Far, Host::B, Family::V6, &udp(8, 53));
    let answers = sent(Host::B, Host::Far, Family::V6, &udp(53, 8));
    for arrival in [&asks, &answers, &asks] {
        passes(&memory, arrival);
    }
    assert_eq!(memory.ways.borrow().len(), 4);
}

/// An acknowledgement that does not know what the SYN|ACK said comes from somebody who has not had it.
#[test]
fn a_guessed_acknowledgement_makes_no_ways() {
    let acknowledging = |number: u32| {
        let mut arrival = received(Host::Far, Host::B, Family::V6, &tcp(9, 80, ACK));
        arrival.packet.frame[L3 + 40 + 8..L3 + 40 + 12].copy_from_slice(&number.to_be_bytes());
        arrival
    };
    let memory = world();
    passes(
        &memory,
        &received(Host::Far, Host::B, Family::V6, &tcp(9, 80, SYN)),
    );
    let mut answer = sent(Host::B, Host::Far, Family::V6, &tcp(80, 9, SYN | ACK));
    answer.packet.frame[L3 + 40 + 4..L3 + 40 + 8].copy_from_slice(&70_000_u32.to_be_bytes());
    passes(&memory, &answer);
    // The answer, of 60 bytes, ends with 70,001.
    for guess in [1, 60_000, 70_000, 70_062, 0x8000_0000, u32::MAX] {
        passes(&memory, &acknowledging(guess));
        assert!(memory.ways.borrow().is_empty(), "{guess}");
    }
    passes(&memory, &acknowledging(70_001));
    assert_eq!(memory.ways.borrow().len(), 2);
}

/// A refusal is no answer: who guesses at a closed port has no connection, however often he does.
#[test]
fn what_is_refused_makes_no_ways() {
    let memory = world();
    let guess = |flags| received(Host::Far, Host::B, Family::V6, &tcp(9, 80, flags));
    let refusal = sent(Host::B, Host::Far, Family::V6, &tcp(80, 9, RST));
    for flags in [ACK, ACK, SYN, ACK] {
        passes(&memory, &guess(flags));
        passes(&memory, &refusal);
        assert!(memory.ways.borrow().is_empty());
    }
    // A pod's own connection neither.
    let guess_of_pod = sent(Host::B, Host::Far, Family::V6, &tcp(11, 80, ACK));
    let refusal = received(Host::Far, Host::B, Family::V6, &tcp(80, 11, RST));
    for _ in 0..3 {
        passes(&memory, &guess_of_pod);
        passes(&memory, &refusal);
        assert!(memory.ways.borrow().is_empty());
    }
    // In midstream, where no SYN|ACK was seen, the first answer has to be acknowledged.
    let mut answer = sent(Host::B, Host::Far, Family::V6, &tcp(80, 9, ACK));
    answer.packet.frame[L3 + 40 + 4..L3 + 40 + 8].copy_from_slice(&70_000_u32.to_be_bytes());
    passes(&memory, &answer);
    passes(&memory, &guess(ACK));
    assert!(memory.ways.borrow().is_empty());
    let mut heard = guess(ACK);
    heard.packet.frame[L3 + 40 + 8..L3 + 40 + 12].copy_from_slice(&70_000_u32.to_be_bytes());
    passes(&memory, &heard);
    assert_eq!(memory.ways.borrow().len(), 2);
}

/// A SYN in anybody's name takes a port of the node where its backend is elsewhere, and keeps it from others for three
/// seconds, however often it is answered. A pod's keeps it for as long as its SYN is sent again, and so does who has
/// acknowledged the answer, where there was no room for ways.
#[test]
fn syns_in_anybodys_name_hold_no_port_for_long() {
    const SECOND: u64 = 1_000_000_000;
    for (client, mark, is_proven, is_held) in [
        (Host::World, Mark::TRANSLATED, false, false),
        (Host::World, Mark::TRANSLATED, true, true),
        (Host::A, Mark::LEAVING, false, true),
    ] {
        let mut memory = world();
        let sends = |memory: &Memory, host: Host, number, flags, mark| {
            let ip = Ip::between(host.ip(Family::V4), Host::Far.ip(Family::V4));
            let frame = ip.frame(&tcp(number, BACKEND_PORT, flags));
            let mut packet = marked(UPLINK, frame, mark);
            decide(Hook::TO_NET, &mut packet, memory, &mut Scratch::default())
        };
        // There is one port.
        assert_eq!(sends(&memory, client, 1, SYN, mark), Verdict::Pass);
        memory.room = Room::Full;
        let none = Verdict::Drop(DropReason::NoNatPort);
        for seconds in [0, 2, 3] {
            memory.now.set(seconds * SECOND);
            let ip = Ip::between(Host::Far.ip(Family::V4), Host::Node.ip(Family::V4));
            let port = memory.config.first_port;
            let answer = ip.frame(&tcp(BACKEND_PORT, port, SYN | ACK));
            passes(
                &memory,
                &Arrival {
                    hook: Hook::FROM_NET,
                    packet: Bytes::new(UPLINK, answer),
                },
            );
            let other = sends(&memory, Host::World, 2, SYN, Mark::TRANSLATED);
            assert_eq!(other, none, "{seconds}");
            if is_proven && seconds == 0 {
                assert_eq!(sends(&memory, client, 1, ACK, mark), Verdict::Pass);
            }
        }
        memory.now.set(3 * SECOND + 1);
        memory.room = Room::Plenty;
        let other = sends(&memory, Host::World, 2, SYN, Mark::TRANSLATED);
        assert_eq!(other == none, is_held, "{client:?} {is_proven}");
    }
}

/// A pod that is set up anew keeps its address and has another device.
#[test]
fn packets_follow_a_pod_to_its_new_device() {
    for family in [Family::V4, Family::V6] {
        for (who, after) in [(Host::A, 1101), (Host::B, 1102)] {
            let mut memory = world();
            let decided = |memory: &Memory, arrival: &Arrival| {
                let mut packet = arrival.packet.clone();
                decide(arrival.hook, &mut packet, memory, &mut Scratch::default())
            };
            let there = |flags| sent(Host::A, Host::B, family, &tcp(1000, 80, flags));
            let back = |flags| sent(Host::B, Host::A, family, &tcp(80, 1000, flags));
            assert_eq!(decided(&memory, &there(SYN)), Verdict::Redirect(1002));
            assert_eq!(decided(&memory, &back(SYN | ACK)), Verdict::Redirect(1001));

            let device = memory.devices.remove(&who.ifindex().unwrap()).unwrap();
            memory.devices.insert(after, device);
            memory.pods.get_mut(&who.addr(family)).unwrap().ifindex = after;
            memory.epoch += 1;
            let arrival = if who == Host::A {
                back(ACK)
            } else {
                there(ACK)
            };
            for _ in 0..2 {
                assert_eq!(decided(&memory, &arrival), Verdict::Redirect(after));
            }
        }
    }
}

/// Only the last part of a segment says where it ends.
#[test]
fn a_goodbye_in_fragments_is_not_noted() {
    let memory = connected();
    let before = states(&memory);
    let goodbye = Transport::Tcp {
        ports: (1000, 80),
        flags: FIN | ACK,
        payload: vec![7; 100],
    };
    let whole = sent(Host::A, Host::Far, Family::V6, &goodbye);
    for frame in split(&whole.packet.frame, 5, 64) {
        let mut part = whole.clone();
        part.packet.frame = frame;
        passes(&memory, &part);
    }
    assert_eq!(states(&memory), before);
    passes(&memory, &whole);
    assert_ne!(states(&memory), before);
}

/// Anybody may write anybody's address into a datagram. Sixteen of them cost a plan; who sends more without an answer, as logs
/// and media do, has rows like others.
#[test]
fn a_stream_from_outside_that_nobody_answers_has_ways_after_sixteen_datagrams() {
    for family in [Family::V4, Family::V6] {
        for first_room in [Room::Plenty, Room::Full] {
            let mut memory = world();
            let ip = Ip::between(Host::World.ip(family), Host::Node.ip(family));
            let frame = ip.frame(&udp(1000, node_port(REMOTE)));
            let packet = Bytes::new(UPLINK, frame);
            let hook = Hook::FROM_NET;
            let datagram = Arrival { hook, packet };
            for _ in 0..16 {
                passes(&memory, &datagram);
                assert_eq!(memory.plans.borrow().len(), 1);
                assert!(memory.ways.borrow().is_empty());
            }
            // Without room it stays what it is.
            memory.room = first_room;
            passes(&memory, &datagram);
            memory.room = Room::Plenty;
            passes(&memory, &datagram);
            assert!(memory.plans.borrow().is_empty());
            assert_eq!(memory.ways.borrow().len(), 2);
        }
    }
}

/// A question, sent twice, and then the answer, before which policy has changed, so that it is judged.
fn answered(meanwhile: fn(&Memory)) -> Memory {
    let mut memory = world();
    let question = sent(Host::A, REMOTE, Family::V6, &udp(1000, SERVICE_PORT));
    passes(&memory, &question);
    passes(&memory, &question);
    memory.epoch += 1;
    memory.meanwhile.set(Some(meanwhile));
    let answer = received(Host::Far, Host::A, Family::V6, &udp(BACKEND_PORT, 1000));
    passes(&memory, &answer);
    assert!(memory.meanwhile.get().is_none(), "it was judged");
    memory
}

/// The kernel gives a row that was pushed out to another key at once, also while a program looks at it.
#[test]
fn nothing_is_noted_in_a_row_that_has_become_anothers_meanwhile() {
    let mut memory = connected();
    memory.epoch += 1;
    memory.meanwhile.set(Some(|memory| {
        for way in memory.ways.borrow().values() {
            way.echo.fetch_xor(1, Relaxed);
        }
    }));
    passes(&memory, &there(ACK));
    assert!(memory.meanwhile.get().is_none(), "it was judged");
    for way in memory.ways.borrow().values() {
        assert_eq!(way.epoch.load(Relaxed), memory.epoch - 1);
    }

    let memory = answered(|memory| {
        for plan in memory.plans.borrow().values() {
            plan.back.echo.fetch_xor(1, Relaxed);
        }
    });
    assert!(memory.ways.borrow().is_empty());
}

#[test]
fn two_cpus_with_one_answer_make_two_ways() {
    let memory = answered(|memory| {
        for plan in memory.plans.borrow().values() {
            let way = copy(&plan.way);
            memory.ways.borrow_mut().insert(plan.key, way.into());
        }
    });
    assert_eq!(memory.ways.borrow().len(), 2);
    assert!(memory.plans.borrow().is_empty());
}
