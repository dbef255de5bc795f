//! When the sweep lets a conversation go.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU32, AtomicU64};

use weir_common::way::Rewrite;

use super::*;

fn peer(last: u8) -> Peer {
    Peer {
        addr: Addr::v4([10, 0, 0, last]),
        port: 80.into(),
    }
}

fn key(protocol: Protocol, hook: Hook, source: u8, destination: u8) -> WayKey {
    let (source, destination) = (peer(source), peer(destination));
    WayKey {
        source: source.addr,
        destination: destination.addr,
        source_port: source.port,
        destination_port: destination.port,
        protocol,
        hook,
        pad: [0; 2],
    }
}

/// A conversation of a pod (1) with a backend (2) elsewhere through a service (9): the seconds at which each way was
/// last used, with its packets and the bits of its state; what is left of its rows at second 20,000.
fn left(
    protocol: Protocol,
    (there, packets, state): (u64, u64, u32),
    (back, packets_back, state_back): (u64, u64, u32),
    gone: Option<u8>,
) -> usize {
    let way = |seen: u64, packets, state, rewrite, of, other| Way {
        seen: AtomicU64::new(seen * 1_000_000_000),
        packets: AtomicU64::new(packets),
        state: AtomicU32::new(state),
        step: Step {
            addr: peer(of).addr,
            port: peer(of).port,
            rewrite,
            other,
            ..Step::marked(Mark::PASSED)
        },
        ..Way::default()
    };
    let opener = state | WayState::OPENER;
    let (from, to) = (Hook::FROM_POD, Hook::TO_POD);
    let ways = [
        (
            key(protocol, from, 1, 9),
            way(there, packets, opener, Rewrite::DESTINATION, 2, to),
        ),
        (
            key(protocol, to, 2, 1),
            way(back, packets_back, state_back, Rewrite::SOURCE, 9, from),
        ),
    ];
    let rows: HashMap<_, _> = ways
        .iter()
        .map(|(key, way)| (*key, Row::of(key, way)))
        .collect();
    let is_gone = |addr: &Addr| gone.is_some_and(|last| *addr == peer(last).addr);
    let now = Duration::from_secs(20_000);
    let of_gone = rows.keys().any(|key| is_about(key, &is_gone));
    // As the sweep does it, whichever row it meets first.
    let ends = |row: &Row| {
        row.may_be_over(protocol, now) && is_over(protocol, row, rows.get(&row.other), now)
    };
    let ended: Vec<bool> = rows.values().map(ends).collect();
    for (key, row) in &rows {
        assert!(rows[&row.other].other == *key);
        let alone = is_over(protocol, row, rows.get(&row.other), now);
        assert_eq!(alone, ended.contains(&true), "{key:?}");
    }
    if of_gone || ended.contains(&true) {
        0
    } else {
        2
    }
}

#[test]
fn both_ways_of_a_conversation_go_together() {
    let (udp, tcp) = (Protocol::UDP, Protocol::TCP);
    let used = (20_000, 1, 0);
    let silent = |seconds: u64| (20_000 - seconds, 1, 0);
    let unanswered = (0, 0, 0);
    let ending = |seconds: u64, state| (20_000 - seconds, 1, state);
    let (fin, other_fin) = (WayState::FIN, WayState::OTHER_FIN);
    let heard = other_fin | WayState::FIN_HEARD;
    for (case, protocol, there, back, gone, expected) in [
        ("both are used", udp, used, used, None, 2),
        ("only the server speaks", udp, silent(500), used, None, 2),
        ("neither is used", udp, silent(121), silent(121), None, 0),
        ("a stream waits", udp, silent(119), silent(119), None, 2),
        ("nobody answers", udp, silent(31), unanswered, None, 0),
        (
            "nobody answers what is made now",
            udp,
            silent(31),
            (20_000 - 31, 0, 0),
            None,
            0,
        ),
        (
            "nobody has answered yet",
            udp,
            silent(29),
            unanswered,
            None,
            2,
        ),
        ("the backend is gone", udp, used, used, Some(2), 0),
        ("the client is gone", udp, used, used, Some(1), 0),
        ("somebody else is gone", udp, used, used, Some(3), 2),
        (
            "before the keepalive",
            tcp,
            silent(2 * 3600 + 75 * 9),
            silent(9000),
            None,
            2,
        ),
        (
            "after it",
            tcp,
            silent(3 * 3600 + 1),
            silent(3 * 3600 + 1),
            None,
            0,
        ),
        (
            "closed",
            tcp,
            ending(31, fin | other_fin),
            ending(31, fin | other_fin),
            None,
            0,
        ),
        (
            "just closed",
            tcp,
            ending(29, fin | other_fin),
            ending(31, fin | other_fin),
            None,
            2,
        ),
        (
            "broken off",
            tcp,
            ending(31, WayState::RESET),
            ending(31, WayState::RESET),
            None,
            0,
        ),
        (
            "half closed, unheard",
            tcp,
            ending(121, fin),
            ending(121, other_fin),
            None,
            0,
        ),
        (
            "half closed, perhaps heard",
            tcp,
            ending(119, fin),
            ending(121, other_fin),
            None,
            2,
        ),
        (
            "half closed, heard",
            tcp,
            ending(3599, fin),
            ending(3599, heard),
            None,
            2,
        ),
        (
            "half closed for an hour",
            tcp,
            ending(3601, fin),
            ending(3601, heard),
            None,
            0,
        ),
        (
            "the same, the other side",
            tcp,
            ending(3599, heard),
            ending(3599, fin),
            None,
            2,
        ),
    ] {
        assert_eq!(left(protocol, there, back, gone), expected, "{case}");
    }
}

#[test]
fn an_open_connection_that_found_no_room_has_the_patience_of_an_open_one() {
    let proven = WayState::PROVEN | WayState::OPENER;
    let plan = |there, back| {
        let state = AtomicU32::new;
        let (mut plan, (there, back)) = (Plan::default(), (state(there), state(back)));
        (plan.way.state, plan.back.state) = (there, back);
        plan
    };
    // Its bits of each direction; the seconds.
    let (fin, other) = (WayState::FIN, WayState::OTHER_FIN);
    for (there, back, seconds) in [
        (WayState::OPENER, 0, 60),
        (proven, 0, 3 * 3600),
        (proven | fin, other, 120),
        (proven | other, fin, 120),
        (proven | other | WayState::FIN_HEARD, fin, 3600),
        (proven | fin, other | WayState::FIN_HEARD, 3600),
        (proven, WayState::RESET, 30),
        (proven | fin | other, fin | other, 30),
    ] {
        let found = patience_of_plan(Protocol::TCP, &plan(there, back));
        assert_eq!(found, Duration::from_secs(seconds), "{there:b}, {back:b}");
    }
    let other = patience_of_plan(Protocol::UDP, &plan(proven, 0));
    assert_eq!(other, Duration::from_secs(30));
}
