//! What becomes of the rows of an earlier agent.

use super::*;

fn peer(last: u8, port: u16) -> Peer {
    Peer {
        addr: Addr::v4([10, 0, 0, last]),
        port: port.into(),
    }
}

/// The ways of a flow from a client (1) to a backend (2) through a service (9), with the devices of its ends.
fn ways(bits: u32, devices: (u32, u32), masquerade: u64) -> Vec<Found> {
    let (client, backend, service) = (peer(1, 1000), peer(2, 8080), peer(9, 80));
    let key = FlowKey {
        low: client,
        high: backend,
        protocol: Protocol::TCP,
        ..FlowKey::default()
    };
    let flow = Flow {
        packets: [3, 2],
        bits,
        opener_device: devices.0,
        responder_device: devices.1,
        service,
        masquerade,
        ..Flow::default()
    };
    let known = [((backend.addr, backend.port), (7, Generation(4)))];
    let today = Today {
        backends: HashMap::from(known),
        own: HashSet::from([peer(254, 0).addr]),
        since: 0,
    };
    let mut found = Vec::new();
    of_flow(&key, &flow, &today, &mut found);
    found
}

#[test]
fn a_flow_has_its_ways_at_each_side_of_the_node() {
    let service = FROM_SERVICE | ANSWERED;
    let (from_pod, to_pod) = (Hook::FROM_POD, Hook::TO_POD);
    let (from_net, to_net) = (Hook::FROM_NET, Hook::TO_NET);
    // Of each conversation: where it is met, where its answers are, and what they say to the next program.
    let cases: [(_, u32, _, u64, &[_]); 7] = [
        (
            "two pods here",
            ANSWERED,
            (11, 12),
            0,
            &[(from_pod, from_pod, Mark::PASSED)],
        ),
        (
            "a pod elsewhere",
            ANSWERED,
            (11, 0),
            0,
            &[(from_pod, to_pod, Mark::PASSED)],
        ),
        (
            "the world",
            ANSWERED,
            (11, 0),
            HAS_PORT,
            &[(from_pod, to_pod, Mark::LEAVING)],
        ),
        (
            "a service here",
            service,
            (11, 12),
            0,
            &[(from_pod, from_pod, Mark::PASSED)],
        ),
        (
            "from outside, here",
            service,
            (0, 12),
            0,
            &[
                (to_pod, from_pod, Mark::PASSED),
                (from_net, to_net, Mark::TRANSLATED),
            ],
        ),
        (
            "from outside, elsewhere",
            service,
            (0, 0),
            0,
            &[(from_net, to_net, Mark::TRANSLATED)],
        ),
        ("a lead", LEAD, (11, 12), 0, &[]),
    ];
    for (case, bits, devices, masquerade, expected) in cases {
        let found = ways(bits, devices, masquerade);
        let seen: Vec<_> = found
            .iter()
            .map(|it| (it.plan.key.hook, it.answer.hook, it.plan.way.step.mark))
            .collect();
        assert_eq!(seen, expected, "{case}");
        for it in found {
            // Each way leads to the other.
            let mut again = WayKey::default();
            again.set_other(&it.answer, &it.plan.back.step);
            assert_eq!(again, it.plan.key, "{case}");
            let is_translated = it.plan.way.step.rewrite == Rewrite::DESTINATION;
            assert_eq!(
                it.plan.way.backend,
                if is_translated { 7 } else { 0 },
                "{case}"
            );
        }
    }
}

#[test]
fn what_has_ended_stays_ended() {
    let found = ways(ANSWERED | OPENER_FIN | FIN_HEARD, (11, 12), 0);
    let mut it = found.into_iter().next().unwrap();
    let states = [&mut it.plan.way, &mut it.plan.back].map(|way| *way.state.get_mut());
    assert_eq!(states[0], WayState::OPENER | WayState::FIN);
    assert_eq!(states[1], WayState::OTHER_FIN | WayState::FIN_HEARD);
}

#[test]
fn a_port_of_the_node_stands_for_whom_it_did() {
    let (node, end, world) = (peer(254, 20_000), peer(1, 1000), peer(200, 443));
    let key = PortKey {
        node,
        peer: world,
        protocol: Protocol::TCP,
        ..PortKey::default()
    };
    let row = PortRow {
        end,
        ..PortRow::default()
    };
    let flow = Flow {
        seen: 77,
        bits: ANSWERED | RESPONDER_FIN,
        ..Flow::default()
    };
    let mut it = of_port(&key, &row, &flow);
    assert_eq!(
        *it.plan.way.seen.get_mut(),
        77,
        "as old as its conversation"
    );
    let ended = WayState::OPENER | WayState::MASQUERADE | WayState::OTHER_FIN;
    assert_eq!(*it.plan.way.state.get_mut(), ended);
    assert_eq!(it.plan.key, packet(end, world, Protocol::TCP, Hook::TO_NET));
    assert_eq!(
        it.answer,
        packet(world, node, Protocol::TCP, Hook::FROM_NET)
    );
    assert_eq!(it.plan.way.step.peer(), node);
    assert_eq!(it.plan.back.step.peer(), end);
}

#[test]
fn what_has_no_ways_today_gets_none() {
    let today = Today {
        own: HashSet::from([peer(254, 0).addr]),
        ..Today::default()
    };
    let (pod, node, backend) = (peer(1, 1000), peer(254, 2000), peer(2, 53));
    for (case, ends, protocol, bits, expected) in [
        (
            "the node asks a pod",
            (pod, node),
            Protocol::TCP,
            OPENER_IS_HIGH,
            0,
        ),
        ("a pod asks the node", (pod, node), Protocol::TCP, 0, 0),
        (
            "a backend that is gone, datagrams",
            (pod, backend),
            Protocol::UDP,
            FROM_SERVICE,
            0,
        ),
        (
            "a backend that is gone, TCP",
            (pod, backend),
            Protocol::TCP,
            FROM_SERVICE,
            1,
        ),
    ] {
        let key = FlowKey {
            low: ends.0,
            high: ends.1,
            protocol,
            ..FlowKey::default()
        };
        let flow = Flow {
            bits: bits | ANSWERED,
            opener_device: if bits & OPENER_IS_HIGH == 0 { 11 } else { 0 },
            responder_device: if bits & OPENER_IS_HIGH == 0 { 0 } else { 11 },
            ..Flow::default()
        };
        let mut found = Vec::new();
        of_flow(&key, &flow, &today, &mut found);
        assert_eq!(found.len(), expected, "{case}");
    }
}
