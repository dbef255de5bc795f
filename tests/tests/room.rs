//! Ring 1: a connection that is open and found no room for ways, on the host: it works from its plan.

#![allow(clippy::unwrap_used, reason = "a test that fails should say where")]

use std::sync::atomic::Ordering::Relaxed;

use weir_common::DropReason;
use weir_common::event::Hook;
use weir_common::way::{Mark, Way, WayState};
use weir_datapath::{Scratch, Verdict};
use weir_tests::bytes::{Bytes, marked};
use weir_tests::edges::tcp;
use weir_tests::frames::{ACK, FIN, Ip, RST, SYN};
use weir_tests::stories::decide;
use weir_tests::tables::{Memory, Room};
use weir_tests::world::{BACKEND_PORT, FAMILIES, Family, Host, UPLINK, world};

const CLIENT: u16 = 5000;
const SECOND: u64 = 1_000_000_000;

/// A packet meets a program.
fn meet(memory: &Memory, hook: Hook, packet: &Bytes) -> Verdict {
    decide(hook, &mut packet.clone(), memory, &mut Scratch::default())
}

/// Somebody outside who is led elsewhere, with the node's address: by the one port of the node that there is.
fn sends(memory: &Memory, family: Family, port: u16, flags: u8) -> Verdict {
    let ip = Ip::between(Host::World.ip(family), Host::Far.ip(family));
    let frame = ip.frame(&tcp(port, BACKEND_PORT, flags));
    meet(
        memory,
        Hook::TO_NET,
        &marked(UPLINK, frame, Mark::TRANSLATED),
    )
}

fn passes(memory: &Memory, family: Family, flags: u8) {
    assert_eq!(sends(memory, family, CLIENT, flags), Verdict::Pass);
}

/// The server answers to the port of the node.
fn answers(memory: &Memory, family: Family, flags: u8) {
    let ip = Ip::between(Host::Far.ip(family), Host::Node.ip(family));
    let frame = ip.frame(&tcp(BACKEND_PORT, memory.config.first_port, flags));
    let verdict = meet(memory, Hook::FROM_NET, &Bytes::new(UPLINK, frame));
    assert_eq!(verdict, Verdict::Pass);
}

/// After a handshake.
fn open(family: Family) -> Memory {
    let mut memory = world();
    passes(&memory, family, SYN);
    memory.room = Room::Full;
    answers(&memory, family, SYN | ACK);
    passes(&memory, family, ACK);
    memory
}

/// Does another one get the port, if there is room for him?
fn is_taken(memory: &mut Memory, family: Family) -> bool {
    memory.room = Room::Plenty;
    let verdict = sends(memory, family, CLIENT + 1, SYN);
    memory.room = Room::Full;
    match verdict {
        Verdict::Pass => true,
        verdict => {
            assert_eq!(verdict, Verdict::Drop(DropReason::NoNatPort));
            false
        }
    }
}

#[test]
fn silence_is_nobodys_affair() {
    for family in FAMILIES {
        let mut memory = open(family);
        // The sweep ends it after three hours.
        memory.now.set(7_200 * SECOND);
        assert!(!is_taken(&mut memory, family));
    }
}

/// Anybody may write a RST or a FIN: they end what stays silent.
#[test]
fn what_is_closed_and_silent_leaves_its_place() {
    type Closes = fn(&Memory, Family);
    let ways: [Closes; 3] = [
        |memory, family| answers(memory, family, RST),
        |memory, family| passes(memory, family, RST),
        |memory, family| {
            passes(memory, family, FIN | ACK);
            answers(memory, family, FIN | ACK);
        },
    ];
    for family in FAMILIES {
        for (number, closes) in ways.into_iter().enumerate() {
            let mut memory = open(family);
            memory.now.set(100 * SECOND);
            closes(&memory, family);
            for (at, taken) in [
                (100 * SECOND, false),
                (103 * SECOND, false),
                (103 * SECOND + 1, true),
            ] {
                memory.now.set(at);
                assert_eq!(is_taken(&mut memory, family), taken, "{number} {at}");
            }
        }
    }
}

#[test]
fn what_goes_on_after_a_reset_was_not_ended_by_it() {
    for family in FAMILIES {
        for of_opener in [false, true] {
            let mut memory = open(family);
            memory.now.set(100 * SECOND);
            if of_opener {
                passes(&memory, family, RST);
            } else {
                answers(&memory, family, RST);
            }
            passes(&memory, family, ACK);
            memory.now.set(7_200 * SECOND);
            assert!(!is_taken(&mut memory, family), "{of_opener}");
        }
    }
}

/// The same two ends may open anew.
#[test]
fn who_opens_anew_has_said_no_goodbye() {
    for family in FAMILIES {
        let mut memory = open(family);
        passes(&memory, family, FIN | ACK);
        answers(&memory, family, FIN | ACK);
        passes(&memory, family, SYN);
        answers(&memory, family, SYN | ACK);
        passes(&memory, family, ACK);
        memory.now.set(7_200 * SECOND);
        assert!(!is_taken(&mut memory, family));
    }
}

/// A SYN that nobody answers, or that somebody else has written, makes nothing open that is closed: here, by both goodbyes.
#[test]
fn a_syn_alone_keeps_no_place() {
    for family in FAMILIES {
        let mut memory = open(family);
        passes(&memory, family, FIN | ACK);
        answers(&memory, family, FIN | ACK);
        passes(&memory, family, SYN);
        memory.now.set(3 * SECOND + 1);
        assert!(is_taken(&mut memory, family));
        // Nor does it take a goodbye back.
        let mut memory = open(family);
        answers(&memory, family, FIN | ACK);
        passes(&memory, family, SYN);
        passes(&memory, family, FIN | ACK);
        memory.now.set(3 * SECOND + 1);
        assert!(is_taken(&mut memory, family));
    }
}

#[test]
fn an_answer_after_a_reset_takes_it_back() {
    for family in FAMILIES {
        let memory = world();
        passes(&memory, family, SYN);
        for flags in [RST | ACK, SYN | ACK] {
            answers(&memory, family, flags);
        }
        passes(&memory, family, ACK);
        let ways = memory.ways.borrow();
        assert_eq!(ways.len(), 2);
        let mut states = ways.values().map(|way| way.state.load(Relaxed));
        assert!(states.all(|state| state & WayState::RESET == 0));
    }
}

/// Who hears a goodbye and goes on talking has an hour, as with ways.
#[test]
fn a_goodbye_that_was_heard_is_known() {
    for family in FAMILIES {
        let heard = |memory: &Memory| {
            let plans = memory.plans.borrow();
            let state = |way: &Way| way.state.load(Relaxed);
            let mut states = plans
                .values()
                .map(|plan| state(&plan.way) | state(&plan.back));
            states.any(|state| state & WayState::FIN_HEARD != 0)
        };
        for is_openers in [false, true] {
            let memory = open(family);
            passes(&memory, family, ACK);
            answers(&memory, family, ACK);
            let mut sends = [passes, answers];
            if !is_openers {
                sends.reverse();
            }
            let [says, hears] = sends;
            says(&memory, family, FIN | ACK);
            // Anybody may send a SYN.
            passes(&memory, family, SYN);
            assert!(!heard(&memory));
            hears(&memory, family, ACK);
            assert!(heard(&memory), "{is_openers}");
        }
    }
}

/// Anybody may send a SYN in its name. (RFC 5961 section 4: it says nothing.)
#[test]
fn a_syn_after_a_reset_opens_nothing_again() {
    for family in FAMILIES {
        // A single one within the three seconds of silence; or until it is closed, and a stranger's patience is over.
        for (of_opener, syns, then) in [
            (false, 1, 2 * SECOND + 1),
            (true, 1, 2 * SECOND + 1),
            (false, 9, 3 * SECOND + 1),
            (true, 9, 3 * SECOND + 1),
        ] {
            let mut memory = open(family);
            memory.now.set(100 * SECOND);
            if of_opener {
                passes(&memory, family, RST);
            } else {
                answers(&memory, family, RST);
            }
            for number in 1..=syns {
                memory.now.set((99 + 2 * number) * SECOND);
                passes(&memory, family, SYN);
            }
            memory.now.set(memory.now.get() + then);
            assert!(is_taken(&mut memory, family), "{of_opener} {syns}");
        }
    }
}

#[test]
fn a_late_acknowledgement_proves_nothing_of_the_next_connection() {
    for family in FAMILIES {
        let mut memory = open(family);
        passes(&memory, family, FIN | ACK);
        answers(&memory, family, FIN | ACK);
        passes(&memory, family, SYN);
        passes(&memory, family, ACK);
        memory.now.set(10 * SECOND);
        assert!(is_taken(&mut memory, family));
    }
}

/// Its opener has forgotten it, and finds so by asking anew (RFC 9293 section 3.5.1: half-open connections).
#[test]
fn a_goodbye_of_the_connection_before_is_none_of_the_next() {
    for family in FAMILIES {
        let mut memory = open(family);
        answers(&memory, family, FIN | ACK);
        memory.now.set(100 * SECOND);
        passes(&memory, family, SYN);
        answers(&memory, family, ACK);
        passes(&memory, family, RST);
        memory.now.set(101 * SECOND);
        passes(&memory, family, SYN);
        answers(&memory, family, SYN | ACK);
        for flags in [ACK, FIN | ACK] {
            passes(&memory, family, flags);
        }
        answers(&memory, family, ACK);
        // Half-closed.
        memory.now.set(105 * SECOND);
        assert!(!is_taken(&mut memory, family));
    }
}

#[test]
fn a_reset_in_its_openers_name_refuses_no_handshake() {
    for family in FAMILIES {
        let mut memory = world();
        passes(&memory, family, SYN);
        answers(&memory, family, SYN | ACK);
        passes(&memory, family, RST);
        assert!(!is_taken(&mut memory, family));
        passes(&memory, family, ACK);
    }
}
