//! What becomes of the rows of an earlier agent.

use weir_common::service::Segment;

use super::*;

fn peer(last: u8, port: u16) -> Peer {
    Peer {
        addr: Addr::v4([10, 0, 0, last]),
        port: port.into(),
    }
}

/// Services, each with one backend (2) under a number of its own; one that is 20 is gone.
fn backends(services: &[((Peer, Protocol, Scope), BackendId)]) -> Backends {
    let rows = (0..).zip(services);
    let frontends = rows.clone().map(|(start, ((asked, protocol, scope), _))| {
        let key = FrontendKey {
            addr: asked.addr,
            port: asked.port,
            protocol: *protocol,
            scope: *scope,
            ..FrontendKey::default()
        };
        let segment = Segment { start, len: 1 };
        let row = Frontend {
            segment,
            ..Frontend::default()
        };
        (key, row)
    });
    let rows = rows.map(|(index, (_, id))| {
        let Peer { addr, port } = peer(2, 8080);
        let row = Backend {
            addr,
            port,
            flags: 0,
            id: *id,
        };
        (index, row)
    });
    Backends::new(frontends, rows, |id| {
        Generation(if id == 20 { 6 } else { 4 })
    })
}

#[test]
fn a_backend_is_that_of_the_service_that_was_asked() {
    let (one, other) = (peer(9, 80), peer(10, 80));
    let (tcp, udp) = (Protocol::TCP, Protocol::UDP);
    let (inside, outside) = (Scope::INTERNAL, Scope::EXTERNAL);
    let any_node = FrontendKey {
        addr: peer(3, 0).addr,
        ..FrontendKey::default()
    };
    let of_nodes = Peer {
        addr: any_node.of_nodes().addr,
        port: 30_000.into(),
    };
    let node_scope = FrontendKey {
        scope: outside,
        ..any_node
    };
    let today = Today {
        backends: backends(&[
            ((one, tcp, inside), 11),
            ((one, udp, inside), 12),
            ((one, tcp, outside), 13),
            ((other, tcp, inside), 14),
            ((other, tcp, outside), 20),
            ((of_nodes, tcp, node_scope.of_nodes().scope), 15),
        ]),
        nodes: HashSet::from([peer(3, 0).addr]),
        ..Today::default()
    };
    for (case, asked, protocol, scope, expected) in [
        ("a service", one, tcp, inside, Some(11)),
        ("its other protocol", one, udp, inside, Some(12)),
        ("from outside", one, tcp, outside, Some(13)),
        (
            "another with the same endpoint",
            other,
            tcp,
            inside,
            Some(14),
        ),
        ("a backend that is gone", other, tcp, outside, None),
        ("none", peer(11, 80), tcp, inside, None),
        ("a node port", peer(3, 30_000), tcp, outside, Some(15)),
        ("no node", peer(4, 30_000), tcp, outside, None),
    ] {
        let found = today.backend(asked, protocol, scope, peer(2, 8080));
        assert_eq!(found.map(|(id, _)| id), expected, "{case}");
        let found = today.backend(asked, protocol, scope, peer(2, 8081));
        assert_eq!(found, None, "{case}: another port");
    }
}

/// The ways of a flow from a client (1) to a backend (2) through a service (9), with the devices of its ends.
fn ways(bits: u32, devices: (u32, u32), masquerade: u64) -> Vec<Found> {
    // Interface 21 is that of one who asks the world.
    let backend = peer(if devices.0 == 21 { 200 } else { 2 }, 8080);
    let (client, service) = (peer(1, 1000), peer(9, 80));
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
    let today = Today {
        backends: backends(&[
            ((service, Protocol::TCP, Scope::INTERNAL), 6),
            ((service, Protocol::TCP, Scope::EXTERNAL), 7),
        ]),
        own: HashSet::from([peer(254, 0).addr]),
        cluster: Some(vec![Prefix {
            prefix_len: Prefix::V4_EXTRA + 28,
            addr: peer(0, 0).addr,
        }]),
        ..Today::default()
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
    let cases: [(_, u32, _, u64, &[_]); 9] = [
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
            "the world, kept its address",
            ANSWERED,
            (21, 0),
            1 << 63,
            &[(from_pod, to_pod, Mark::PASSED)],
        ),
        (
            "the world, not left yet",
            ANSWERED,
            (21, 0),
            0,
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
                match it.plan.key.hook {
                    _ if !is_translated => 0,
                    Hook::FROM_POD => 6,
                    _ => 7,
                },
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
