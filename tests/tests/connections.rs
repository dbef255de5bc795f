//! Ring 1: what ends a connection, on the host.

#![allow(clippy::unwrap_used, reason = "a test that fails should say where")]

use std::sync::atomic::Ordering::Relaxed;

use weir_common::event::Hook;
use weir_common::way::WayState;
use weir_datapath::{Scratch, Verdict};
use weir_tests::edges::{received, sent, tcp, udp};
use weir_tests::frames::{ACK, FIN, L3, RST, SYN};
use weir_tests::mix::Arrival;
use weir_tests::stories::decide;
use weir_tests::tables::Memory;
use weir_tests::world::{BACKEND_PORT, Family, Host, REMOTE, SERVICE_PORT, world};

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
        for arrival in [&question, &answer] {
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
        passes(&memory, &question);
        passes(&memory, &answer);
        assert_eq!(memory.ways.borrow().len(), 2, "{}", lost.label());
        assert!(is_translated(), "{}", lost.label());
    }
}
