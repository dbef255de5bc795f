//! Ring 1: a pod that opens too much harms itself alone, on the host.

#![allow(clippy::unwrap_used, reason = "a test that fails should say where")]

use std::sync::atomic::Ordering::Relaxed;

use weir_common::counter::Counter;
use weir_common::event::Hook;
use weir_common::limits::{
    POD_OPENINGS, POD_OPENINGS_PER_SECOND, POD_STREAMS, POD_TCP_WAYS, STREAM_SECONDS,
};
use weir_common::nat::PortRange;
use weir_common::share::{Share, row};
use weir_common::way::Mark;
use weir_common::{DropReason, Protocol};
use weir_datapath::share;
use weir_datapath::{Scratch, Verdict};
use weir_tests::bytes::marked;
use weir_tests::edges::{received, sent, tcp, udp};
use weir_tests::frames::{ACK, FIN, Ip, SYN, Transport};
use weir_tests::mix::Arrival;
use weir_tests::stories::decide;
use weir_tests::tables::Memory;
use weir_tests::world::{BACKEND_PORT, Family, Host, REMOTE, SERVICE_PORT, UPLINK, world};

const SECOND: u64 = 1_000_000_000;
const LIMITED: Verdict = Verdict::Drop(DropReason::PodLimit);

fn of(memory: &Memory, arrival: &Arrival) -> Verdict {
    let mut packet = arrival.packet.clone();
    decide(arrival.hook, &mut packet, memory, &mut Scratch::default())
}

/// One of many conversations: the port at its opener, of which there are more than ports.
fn number(n: u32) -> (u16, u16) {
    ((n % 50_000) as u16 + 1_000, (n / 50_000) as u16 + 1_000)
}

fn asks(who: Host, n: u32) -> Arrival {
    let (from, to) = number(n);
    sent(who, Host::Far, Family::V6, &udp(from, to))
}

fn opens(who: Host, n: u32, flags: u8) -> Arrival {
    let (from, to) = number(n);
    sent(who, Host::Far, Family::V6, &tcp(from, to, flags))
}

fn is_answered(who: Host, n: u32, flags: u8) -> Arrival {
    let (from, to) = number(n);
    received(Host::Far, who, Family::V6, &tcp(to, from, flags))
}

fn held(memory: &Memory, who: Host) -> i64 {
    let shares = memory.shares.borrow();
    let share = &shares[&row(who.ifindex().unwrap())];
    share.rows.load(Relaxed) as i64
}

#[test]
fn a_flood_of_questions_is_the_flooders_own_affair() {
    let tcp = |who, n| opens(who, n, SYN);
    // A SYN that is sent again is the same one; a datagram is not.
    for (open, again) in [(asks as fn(Host, u32) -> Arrival, 0), (tcp, 1)] {
        let memory = world();
        let flood = |at: u32| {
            let passed = (at..at + 50_000).filter(|n| of(&memory, &open(Host::B, *n)) != LIMITED);
            passed.count()
        };
        memory.now.set(3_600 * SECOND);
        assert_eq!(flood(0), POD_OPENINGS as usize);
        let passed = usize::from(of(&memory, &open(Host::B, 0)) == Verdict::Pass);
        assert_eq!(passed, again);
        assert_eq!(of(&memory, &open(Host::A, 0)), Verdict::Pass);
        memory.now.set(memory.now.get() + SECOND);
        let gained = flood(50_000);
        assert!(
            gained.abs_diff(POD_OPENINGS_PER_SECOND as usize) < 2,
            "{gained}"
        );
        let shares = memory.shares.borrow();
        let share = &shares[&row(Host::B.ifindex().unwrap())];
        let refused = 100_001 - POD_OPENINGS as usize - gained - again;
        assert_eq!(share.refused.load(Relaxed) as usize, refused);
        let plans = POD_OPENINGS as usize + gained + 1;
        assert_eq!(memory.plans.borrow().len(), plans);
    }
}

#[test]
fn connections_that_are_answered_count_by_their_rows() {
    let memory = world();
    let connections = POD_TCP_WAYS / 2;
    for n in 0..connections {
        assert_eq!(of(&memory, &opens(Host::B, n, SYN)), Verdict::Pass, "{n}");
        assert_eq!(
            of(&memory, &is_answered(Host::B, n, SYN | ACK)),
            Verdict::Pass
        );
    }
    assert_eq!(held(&memory, Host::B), i64::from(POD_TCP_WAYS));
    assert_eq!(of(&memory, &opens(Host::B, connections, SYN)), LIMITED);
    for other in [
        // One that is there, a datagram, and somebody else.
        opens(Host::B, 7, ACK),
        asks(Host::B, 7),
        opens(Host::A, connections, SYN),
        // What is opened to it from elsewhere is not of its doing.
        received(Host::Far, Host::B, Family::V6, &tcp(7, 7, SYN)),
        sent(Host::B, Host::Far, Family::V6, &tcp(7, 7, SYN | ACK)),
    ] {
        assert_eq!(of(&memory, &other), Verdict::Pass, "{other:?}");
    }
    assert_eq!(held(&memory, Host::B), i64::from(POD_TCP_WAYS));
    // One that ends makes room for one.
    for arrival in [
        opens(Host::B, 9, FIN | ACK),
        is_answered(Host::B, 9, FIN | ACK),
        opens(Host::B, 9, ACK),
    ] {
        assert_eq!(of(&memory, &arrival), Verdict::Pass);
    }
    assert_eq!(held(&memory, Host::B), i64::from(POD_TCP_WAYS) - 2);
    for (n, expected) in [
        (connections, Verdict::Pass),
        (connections + 1, Verdict::Pass),
    ] {
        assert_eq!(of(&memory, &opens(Host::B, n, SYN)), expected);
    }
    let answer = is_answered(Host::B, connections, SYN | ACK);
    assert_eq!(of(&memory, &answer), Verdict::Pass);
    assert_eq!(of(&memory, &opens(Host::B, connections + 2, SYN)), LIMITED);
}

/// A question and its answer are remembered, and make no ways; the third packet does, whoever sends it, for as many
/// conversations as the pod may have.
#[test]
fn a_question_and_its_answer_are_a_plan_and_the_third_packet_makes_ways() {
    let answer = received(Host::Far, Host::A, Family::V6, &udp(BACKEND_PORT, 1000));
    let question = sent(Host::A, REMOTE, Family::V6, &udp(1000, SERVICE_PORT));
    for (third, packets) in [(&question, [2, 1]), (&answer, [1, 2])] {
        let memory = world();
        for arrival in [&question, &answer] {
            assert_eq!(of(&memory, arrival), Verdict::Pass);
            assert!(memory.ways.borrow().is_empty());
        }
        assert_eq!(of(&memory, third), Verdict::Pass);
        assert!(memory.plans.borrow().is_empty());
        assert_eq!(memory.counted(Counter::FlowsAnswered), 1);
        let ways = memory.ways.borrow();
        let mut counted: Vec<_> = ways
            .iter()
            .map(|(key, way)| (key.hook == Hook::TO_POD, way.packets.load(Relaxed)))
            .collect();
        counted.sort_unstable();
        assert_eq!(counted, [(false, packets[0]), (true, packets[1])]);
    }
}

#[test]
fn streams_beyond_a_pods_share_stay_plans_and_go_on() {
    let memory = world();
    memory.now.set(3_600 * SECOND);
    let streams = POD_STREAMS + 4_000;
    let begin = memory.now.get();
    for n in 0..streams {
        for _ in 0..4 {
            // So slowly that nothing is dropped.
            let step = SECOND / u64::from(POD_OPENINGS_PER_SECOND) + 1;
            memory.now.set(memory.now.get() + step);
            assert_eq!(of(&memory, &asks(Host::B, n)), Verdict::Pass);
        }
    }
    let (ways, plans) = (memory.ways.borrow().len(), memory.plans.borrow().len());
    assert_eq!(ways / 2 + plans, streams as usize);
    // Meanwhile some have run out.
    let seconds = ((memory.now.get() - begin) / SECOND) as u32;
    let share = POD_STREAMS + seconds * POD_STREAMS / STREAM_SECONDS;
    let got = ways / 2;
    assert!(
        got.abs_diff(share as usize) < 200 && plans > 500,
        "{got} of {share}, {plans}"
    );
    for _ in 0..4 {
        assert_eq!(of(&memory, &asks(Host::A, 0)), Verdict::Pass);
    }
    assert_eq!(memory.ways.borrow().len(), ways + 2);
}

/// One pod asks one server outside from more ports than the node has.
#[test]
fn one_pod_does_not_take_the_ports_of_the_node() {
    let mut memory = world();
    (memory.config.first_port, memory.config.last_port) =
        (PortRange::USUAL.first, PortRange::USUAL.last);
    memory.now.set(3_600 * SECOND);
    let leave = |who: Host, transport: &Transport| {
        let ip = Ip::between(who.ip(Family::V4), Host::World.ip(Family::V4));
        let mut packet = marked(UPLINK, ip.frame(transport), Mark::LEAVING);
        decide(Hook::TO_NET, &mut packet, &memory, &mut Scratch::default())
    };
    let range = memory.config.last_port - memory.config.first_port + 1;
    let found = |who: Host, ports: std::ops::Range<u16>| {
        ports
            .filter(|port| leave(who, &tcp(*port, 443, SYN)) == Verdict::Pass)
            .count()
    };
    let taken = found(Host::B, 1..60_000);
    let half = usize::from(range / 2);
    assert!(taken <= half && taken > half - 10, "{taken} of {half}");
    assert_eq!(found(Host::A, 1_000..1_500), 500);
    assert_eq!(found(Host::C, 1_000..1_500), 500);
    // A client behind a node port has all of them.
    assert_eq!(found(Host::Far, 1_000..1_500), 500);

    // Datagrams that nobody answers give way to their sender's own after a moment, and to nobody else's.
    assert_eq!(
        leave(Host::B, &tcp(60_000, 443, SYN)),
        Verdict::Drop(DropReason::NoNatPort)
    );
    for port in 1..60_000 {
        let _taken = leave(Host::B, &udp(port, 53));
    }
    let none = Verdict::Drop(DropReason::NoNatPort);
    assert_eq!(leave(Host::B, &udp(60_000, 53)), none);
    memory.now.set(memory.now.get() + 3 * SECOND);
    assert_eq!(leave(Host::B, &udp(60_000, 53)), Verdict::Pass);
    assert_eq!(leave(Host::B, &tcp(60_000, 443, SYN)), none);

    // Of a single port.
    let memory = world();
    let leave = |who: Host, port| {
        let ip = Ip::between(who.ip(Family::V4), Host::World.ip(Family::V4));
        let mut packet = marked(UPLINK, ip.frame(&udp(port, 53)), Mark::LEAVING);
        decide(Hook::TO_NET, &mut packet, &memory, &mut Scratch::default())
    };
    memory.now.set(3_600 * SECOND);
    assert_eq!(leave(Host::B, 1), Verdict::Pass);
    memory.now.set(memory.now.get() + 3 * SECOND);
    assert_eq!(leave(Host::A, 1), none);
    assert_eq!(leave(Host::B, 2), Verdict::Pass);
    memory.now.set(memory.now.get() + 31 * SECOND);
    assert_eq!(leave(Host::A, 1), Verdict::Pass);
}

/// Of a conversation that an earlier agent's programs began nobody has counted that it was opened.
#[test]
fn what_was_counted_off_and_never_on_stops_nobody() {
    let memory = world();
    memory.now.set(3_600 * SECOND);
    assert_eq!(of(&memory, &opens(Host::B, 0, SYN)), Verdict::Pass);
    let of_b = row(Host::B.ifindex().unwrap());
    let share = memory.shares.borrow()[&of_b].clone();
    let openings = &share.openings;
    openings.store(u64::MAX - 1_000, Relaxed);
    for n in 1..100 {
        assert_eq!(of(&memory, &opens(Host::B, n, SYN)), Verdict::Pass);
    }
    assert!(openings.load(Relaxed) < 3_601 * SECOND);
}

/// And the pod is a pod like any other from then on.
#[test]
fn after_such_a_moment_a_flood_is_a_flood_again() {
    let memory = world();
    memory.now.set(3_600 * SECOND);
    assert_eq!(of(&memory, &asks(Host::B, 0)), Verdict::Pass);
    let of_b = row(Host::B.ifindex().unwrap());
    let share = memory.shares.borrow()[&of_b].clone();
    share.openings.store(u64::MAX - 1_000, Relaxed);
    let opened = (1..=2 * POD_OPENINGS).filter(|n| of(&memory, &asks(Host::B, *n)) != LIMITED);
    assert_eq!(opened.count(), POD_OPENINGS as usize);
}

/// Two CPUs may find the same last room, and both take it.
#[test]
fn two_openings_in_one_moment_do_not_empty_the_bucket() {
    let now = 3_600 * SECOND;
    let bucket = Share::default();
    let may_open = || share::may_open(&bucket, Protocol::UDP, now);
    for _ in 0..2 * POD_OPENINGS {
        if may_open() {
            share::open(&bucket, now);
        }
    }
    for _ in 0..3 {
        share::open(&bucket, now);
        assert!(!may_open());
    }
}

/// Each keeps its row from others, while the pod may have no more streams.
#[test]
fn each_datagram_that_stays_a_plan_counts_and_a_syn_sent_again_does_not() {
    let memory = world();
    memory.now.set(3_600 * SECOND);
    for _ in 0..2 * POD_OPENINGS {
        assert_eq!(of(&memory, &opens(Host::B, 0, SYN)), Verdict::Pass);
    }
    for n in 1..POD_OPENINGS {
        assert_eq!(of(&memory, &opens(Host::B, n, SYN)), Verdict::Pass);
    }
    assert_eq!(of(&memory, &opens(Host::B, POD_OPENINGS, SYN)), LIMITED);

    let memory = world();
    memory.now.set(3_600 * SECOND);
    assert_eq!(of(&memory, &asks(Host::B, 0)), Verdict::Pass);
    let of_b = row(Host::B.ifindex().unwrap());
    let share = memory.shares.borrow()[&of_b].clone();
    for _ in 0..2 * POD_STREAMS {
        share::stream(&share, memory.now.get());
    }
    let passed = (0..2 * POD_OPENINGS).filter(|_| of(&memory, &asks(Host::B, 0)) != LIMITED);
    assert_eq!(passed.count(), POD_OPENINGS as usize - 1);
}

#[test]
fn a_datagrams_ways_are_not_rows_of_connections() {
    let mut memory = world();
    let asks = || sent(Host::B, REMOTE, Family::V6, &udp(1000, SERVICE_PORT));
    for _ in 0..3 {
        assert_eq!(of(&memory, &asks()), Verdict::Pass);
        assert_eq!(of(&memory, &opens(Host::B, 1, SYN)), Verdict::Pass);
    }
    assert_eq!(memory.ways.borrow().len(), 2);
    assert_eq!(held(&memory, Host::B), 0);
    let answer = is_answered(Host::B, 1, SYN | ACK);
    assert_eq!(of(&memory, &answer), Verdict::Pass);
    assert_eq!(held(&memory, Host::B), 2);
    // The backend goes, and both ways with it.
    let live = memory.live.get_mut(&12).unwrap();
    *live = live.gone();
    let nothing = Verdict::Refuse(DropReason::NoBackend);
    assert_eq!(of(&memory, &asks()), nothing);
    assert_eq!(memory.ways.borrow().len(), 2);
    assert_eq!(held(&memory, Host::B), 2);
}
