//! Ring 1: what ends a connection, on the host.

#![allow(clippy::unwrap_used, reason = "a test that fails should say where")]

use std::sync::atomic::Ordering::Relaxed;

use weir_common::flow::FlowBits;
use weir_datapath::{Scratch, Verdict};
use weir_tests::edges::{received, sent, tcp};
use weir_tests::frames::{ACK, FIN, RST, SYN};
use weir_tests::mix::Arrival;
use weir_tests::stories::decide;
use weir_tests::tables::Memory;
use weir_tests::world::{Family, Host, world};

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

/// What is known of the connection.
fn bits(memory: &Memory) -> u32 {
    let flows = memory.flows.borrow();
    assert_eq!(flows.len(), 1);
    flows.values().next().unwrap().bits.load(Relaxed)
}

#[test]
fn a_reset_ends_only_what_stays_silent() {
    for (rst, goes_on) in [(there(RST), back(ACK)), (back(RST), there(ACK))] {
        let memory = connected();
        passes(&memory, &rst);
        assert!(FlowBits::is_closed(bits(&memory)));
        // An end that does not take it for the other's, or whose packets were on the way.
        passes(&memory, &goes_on);
        assert!(!FlowBits::is_closed(bits(&memory)));
        passes(&memory, &rst);
        passes(&memory, &rst);
        assert!(FlowBits::is_closed(bits(&memory)));
    }
}

#[test]
fn one_goodbye_closes_one_half() {
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
            assert!(FlowBits::is_half_closed(bits(&memory)));
            assert!(!FlowBits::is_closed(bits(&memory)));
            assert_eq!(bits(&memory) & FlowBits::FIN_HEARD != 0, is_heard);
        }
        passes(&memory, &last);
        assert!(FlowBits::is_closed(bits(&memory)));
        assert!(!FlowBits::is_half_closed(bits(&memory)));
    }
}
