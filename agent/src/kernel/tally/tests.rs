//! Rows as programs leave them, and what is counted of them.

use weir_common::way::Rewrite;

use super::*;

const POD: u8 = 1;
const NODE: u8 = 8;
const SERVICE: u8 = 9;
const OTHER: u8 = 2;

fn peer(last: u8, port: u16) -> Peer {
    Peer {
        addr: Addr::v4([10, 0, 0, last]),
        port: port.into(),
    }
}

fn key(protocol: Protocol, hook: Hook, source: Peer, destination: Peer) -> WayKey {
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

fn step(rewrite: Rewrite, to: Peer, mark: Mark, other: Hook) -> Step {
    Step {
        addr: to.addr,
        port: to.port,
        rewrite,
        other,
        ..Step::marked(mark)
    }
}

/// Both ways of a conversation; `back` is what becomes of answers.
fn plan(key: WayKey, there: Step, back: Step, bits: u32) -> Plan {
    let way = |step, bits: u32| Way {
        state: bits.into(),
        step,
        ..Way::default()
    };
    Plan {
        key,
        way: way(there, bits | WayState::OPENER),
        back: way(back, bits),
    }
}

/// A question of a pod or to one, of which everything passes as it is: opened at `hook`, answered at `other`.
fn direct(protocol: Protocol, hook: Hook, other: Hook, mark: Mark) -> Plan {
    let key = key(protocol, hook, peer(POD, 1000), peer(OTHER, 80));
    let none = peer(0, 0);
    plan(
        key,
        step(Rewrite::NONE, none, mark, other),
        step(Rewrite::NONE, none, Mark::PASSED, hook),
        0,
    )
}

/// The pod's question to a service: its backend answers at `other`.
fn through(protocol: Protocol, other: Hook) -> Plan {
    let key = key(protocol, Hook::FROM_POD, peer(POD, 1000), peer(SERVICE, 80));
    plan(
        key,
        step(Rewrite::DESTINATION, peer(OTHER, 8080), Mark::PASSED, other),
        step(
            Rewrite::SOURCE,
            peer(SERVICE, 80),
            Mark::PASSED,
            Hook::FROM_POD,
        ),
        0,
    )
}

/// What leaves with a port of the node: the conversation as the uplink sees it.
fn leaving(protocol: Protocol, source: u8, owner: u32, peer_port: u16, port: u16) -> Plan {
    let source = peer(source, port);
    let key = key(protocol, Hook::TO_NET, source, peer(OTHER, peer_port));
    let mut plan = plan(
        key,
        step(
            Rewrite::SOURCE,
            peer(NODE, port),
            Mark::LEAVING,
            Hook::FROM_NET,
        ),
        step(Rewrite::DESTINATION, source, Mark::NONE, Hook::TO_NET),
        WayState::MASQUERADE,
    );
    (plan.way.owner, plan.back.owner) = (owner, owner);
    plan
}

/// What comes to a node port, as the uplink sees it.
fn entering(protocol: Protocol) -> Plan {
    let key = key(
        protocol,
        Hook::FROM_NET,
        peer(OTHER, 1000),
        peer(NODE, 30_080),
    );
    plan(
        key,
        step(
            Rewrite::DESTINATION,
            peer(POD, 80),
            Mark::TRANSLATED,
            Hook::TO_NET,
        ),
        step(
            Rewrite::SOURCE,
            peer(NODE, 30_080),
            Mark::NONE,
            Hook::FROM_NET,
        ),
        0,
    )
}

/// The same, as the pod sees it.
fn entered(protocol: Protocol) -> Plan {
    let key = key(protocol, Hook::TO_POD, peer(OTHER, 1000), peer(POD, 80));
    let none = peer(0, 0);
    plan(
        key,
        step(Rewrite::NONE, none, Mark::PASSED, Hook::FROM_POD),
        step(Rewrite::NONE, none, Mark::REPLY, Hook::TO_POD),
        0,
    )
}

/// Both ways of a plan, as they are when it was answered.
fn ways(counting: &mut Counting, plan: &Plan) {
    let mut answer = WayKey::default();
    answer.set_other(&plan.key, &plan.way.step);
    // Either may be met first.
    counting.way(&answer, &plan.back);
    counting.way(&plan.key, &plan.way);
}

/// What is not 0.
fn counted(counting: Counting) -> Vec<(&'static str, &'static str, &'static str, u64)> {
    let tally = counting.end();
    let all = tally.conversations();
    all.filter(|(.., count)| *count > 0)
        .map(|(transport, kind, state, count)| {
            (transport.label(), kind.label(), state.label(), count)
        })
        .collect()
}

#[test]
fn a_conversation_counts_once_as_what_the_node_does_for_it() {
    let (from, to) = (Hook::FROM_POD, Hook::TO_POD);
    for protocol in [Protocol::TCP, Protocol::UDP] {
        let is_tcp = protocol == Protocol::TCP;
        let cases = [
            (
                "pod to pod here",
                "direct",
                vec![direct(protocol, from, from, Mark::PASSED)],
            ),
            (
                "pod to another node",
                "direct",
                vec![direct(protocol, from, to, Mark::PASSED)],
            ),
            (
                "from another node",
                "direct",
                vec![direct(protocol, to, from, Mark::PASSED)],
            ),
            (
                "service, backend here",
                "service",
                vec![through(protocol, from)],
            ),
            (
                "service, backend elsewhere",
                "service",
                vec![through(protocol, to)],
            ),
            (
                "pod to the world",
                "masquerade",
                vec![
                    direct(protocol, from, to, Mark::LEAVING),
                    leaving(protocol, POD, 7, 80, 20_000),
                ],
            ),
            (
                "node port, pod here",
                "external",
                vec![entering(protocol), entered(protocol)],
            ),
            (
                "node port, pod elsewhere",
                "external",
                vec![entering(protocol), leaving(protocol, OTHER, 0, 80, 20_000)],
            ),
        ];
        for (case, kind, plans) in cases {
            let mut of_plans = Counting::default();
            let mut of_ways = Counting::default();
            for plan in &plans {
                of_plans.plan(plan);
                ways(&mut of_ways, plan);
            }
            let rows = of_ways.rows;
            let label = Transport::of(protocol).label();
            let (asked, open) = if is_tcp {
                ("syn_sent", "established")
            } else {
                ("unreplied", "stream")
            };
            assert_eq!(counted(of_plans), [(label, kind, asked, 1)], "{case}");
            assert_eq!(counted(of_ways), [(label, kind, open, 1)], "{case}");
            let at = if is_tcp { 2 } else { 3 };
            assert_eq!(rows[at], 2 * plans.len(), "{case}");
        }
    }
}

#[test]
fn states_are_those_that_one_row_tells() {
    let (fin, other_fin) = (WayState::FIN, WayState::OTHER_FIN);
    let from = Hook::FROM_POD;
    for (bits, expected) in [
        (0, "established"),
        (WayState::PROVEN, "established"),
        (fin, "half_closed"),
        (other_fin | WayState::FIN_HEARD, "half_closed"),
        (fin | other_fin, "last_ack"),
        (WayState::RESET, "close"),
        (fin | other_fin | WayState::RESET, "close"),
    ] {
        let mut counting = Counting::default();
        let mut it = direct(Protocol::TCP, from, from, Mark::PASSED);
        it.way.state = (bits | WayState::OPENER).into();
        ways(&mut counting, &it);
        assert_eq!(
            counted(counting),
            [("tcp", "direct", expected, 1)],
            "{bits:b}"
        );
    }
}

/// Bits of the opener's way and of the answers', what the first answer said, packets of answers; the state, and whether the
/// connection may be pushed out although it is open.
type Planned = (Protocol, (u32, u32, u32, u64), &'static str, u64);

#[test]
fn a_plan_says_whether_it_was_answered_and_is_open_without_room() {
    let (reset, proven) = (WayState::RESET, WayState::PROVEN);
    let cases: [Planned; 10] = [
        (Protocol::TCP, (0, 0, 0, 0), "syn_sent", 0),
        // A goodbye that came late opens nothing.
        (Protocol::TCP, (WayState::FIN, 0, 0, 0), "syn_sent", 0),
        // Refused, and asked again since.
        (Protocol::TCP, (0, 0, 0, 1), "syn_sent", 0),
        (Protocol::TCP, (0, reset, 0, 1), "close", 0),
        (Protocol::TCP, (0, 0, 77, 1), "syn_recv", 0),
        (Protocol::TCP, (proven, 0, 77, 9), "established", 1),
        (
            Protocol::TCP,
            (proven | WayState::FIN, 0, 77, 9),
            "half_closed",
            1,
        ),
        (Protocol::TCP, (proven, reset, 77, 9), "close", 0),
        (Protocol::UDP, (0, 0, 0, 1), "replied", 0),
        (Protocol::UDP, (proven, 0, 0, 1), "replied", 0),
    ];
    for (protocol, (there, back, said, answers), expected, evictable) in cases {
        let case = (protocol, there, back, said, answers);
        let mut it = direct(protocol, Hook::FROM_POD, Hook::TO_POD, Mark::PASSED);
        it.way.state = (there | WayState::OPENER).into();
        it.way.others_end = said.into();
        it.back.state = back.into();
        it.back.packets = answers.into();
        let mut counting = Counting::default();
        counting.plan(&it);
        assert_eq!(counting.evictable, evictable, "{case:?}");
        let label = Transport::of(protocol).label();
        assert_eq!(
            counted(counting),
            [(label, "direct", expected, 1)],
            "{case:?}"
        );
    }
}

#[test]
fn all_that_can_be_is_counted_also_when_there_is_none() {
    let tally = Counting::default().end();
    let labels: Vec<_> = tally
        .conversations()
        .map(|(transport, kind, state, count)| {
            assert_eq!(count, 0);
            (transport.label(), kind.label(), state.label())
        })
        .collect();
    // Six states of TCP and three of all else; what has no ports asks no service.
    assert_eq!(labels.len(), 4 * 6 + 4 * 3 + 2 * 2 * 3);
    assert!(labels.contains(&("tcp", "external", "syn_recv")));
    assert!(labels.contains(&("icmp", "masquerade", "replied")));
    assert!(!labels.contains(&("udp", "direct", "established")));
    let tables: Vec<_> = tally
        .tables()
        .map(|(_, rows, capacity)| (rows, capacity > 0))
        .collect();
    assert_eq!(tables, [(0, true); 4]);
}

#[test]
fn what_must_not_be_is_counted_all_the_same() {
    let mut counting = Counting::default();
    counting.plan(&through(Protocol::SCTP, Hook::TO_POD));
    assert_eq!(counted(counting), [("other", "service", "unreplied", 1)]);
}

#[test]
fn ports_are_counted_by_peer_and_by_pod() {
    let mut counting = Counting::default();
    let (tcp, udp) = (Protocol::TCP, Protocol::UDP);
    // Towards port 80: 30 of one pod, 12 of another, 35 of a client behind a node port.
    for (many, source, owner) in [(30, POD, 7), (12, POD + 2, 8), (35, OTHER + 2, 0)] {
        for n in 0..many {
            let port = 20_000 + 100 * u16::from(source) + n;
            ways(&mut counting, &leaving(tcp, source, owner, 80, port));
        }
    }
    // The same pod, another protocol and other ports of the peer.
    counting.plan(&leaving(udp, POD, 7, 80, 20_000));
    for n in 0..20 {
        counting.plan(&leaving(tcp, POD, 7, 100 + n, 20_000));
    }
    // A port of the node for nobody: what came in goes out with an address that it does not take.
    let mut own = leaving(tcp, POD, 7, 80, 29_000);
    own.way.state = WayState::OPENER.into();
    ways(&mut counting, &own);
    let ports = counting.end().ports;
    assert_eq!((ports.used, ports.peer_max, ports.pod_max), (98, 77, 30));
    assert_eq!(ports.error, 0);
    assert_eq!(ports.peers.len(), NAMED);
    let first = ports.peers[0];
    assert_eq!((first.peer, first.protocol), (peer(OTHER, 80), tcp));
    assert_eq!(first.ports, 77);
    assert_eq!(first.pod, Some((30, peer(POD, 0).addr)));
}
