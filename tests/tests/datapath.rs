//! Ring 1: what the datapath decides, case by case, on the host.

use std::sync::atomic::Ordering::Relaxed;

use weir_common::event::Hook;
use weir_common::policy::{Action, VerdictKey};
use weir_common::service::Generation;
use weir_common::way::{Mark, WayKey, WayState};
use weir_common::{DropReason, Port, Protocol};
use weir_datapath::{Scratch, Trace, Verdict, from_pod, to_pod};
use weir_tests::bytes::{Bytes, Vlan};
use weir_tests::edges::{edges, received, sent, tcp, udp};
use weir_tests::frames::{ACK, Echo, FIN, Ip, L3, RST, SYN, Transport, checksums_are_right};
use weir_tests::mix::{Arrival, as_sent};
use weir_tests::tables::{Memory, Room};
use weir_tests::world::{
    A_IN, A_OUT, BACKEND_PORT, CHANGING, CLASS, FAMILIES, Family, Host, NEAR, PODS, REMOTE,
    SERVICE_PORT, SHARED, world,
};

const TO_A: Verdict = Verdict::Redirect(1001);
const TO_B: Verdict = Verdict::Redirect(1002);
const TO_C: Verdict = Verdict::Redirect(1003);

fn dropped(reason: DropReason) -> Verdict {
    Verdict::Drop(reason)
}

/// Runs a program; what it says, what it learned, and the packet after it.
fn run(memory: &Memory, arrival: &Arrival) -> (Verdict, Trace, Bytes) {
    let mut scratch = Scratch::default();
    let mut packet = arrival.packet.clone();
    let verdict = if arrival.hook == Hook::FROM_POD {
        from_pod(&mut packet, memory, &mut scratch)
    } else {
        to_pod(&mut packet, memory, &mut scratch)
    };
    if matches!(verdict, Verdict::Drop(_)) {
        assert_eq!(packet, arrival.packet, "a dropped packet is not changed");
    }
    (verdict, scratch.trace, packet)
}

fn verdict(memory: &Memory, arrival: &Arrival) -> Verdict {
    run(memory, arrival).0
}

/// The key of a way.
fn key(
    source: (Host, u16),
    destination: (Host, u16),
    protocol: Protocol,
    family: Family,
    hook: Hook,
) -> WayKey {
    WayKey {
        source: source.0.addr(family),
        destination: destination.0.addr(family),
        source_port: Port::from(source.1),
        destination_port: Port::from(destination.1),
        protocol,
        hook,
        pad: [0; 2],
    }
}

#[test]
fn every_edge_meets_its_fate() {
    let edges = edges();
    assert!(edges.len() > 120, "{}", edges.len());
    for edge in edges {
        let (verdict, _, after) = run(&world(), &edge.arrival);
        assert_eq!(verdict, edge.verdict, "{}", edge.name);
        let was_of_pod = Mark::of(edge.arrival.packet.mark).is_of_pod();
        let passes = verdict == Verdict::Pass && edge.arrival.hook == Hook::FROM_POD;
        let is_of_pod = was_of_pod || passes;
        assert_eq!(Mark::of(after.mark).is_of_pod(), is_of_pod, "{}", edge.name);
    }
}

#[test]
fn a_stripped_vlan_tag_is_refused() {
    for hook in [
        sent(Host::B, Host::Far, Family::V4, &tcp(1, 2, SYN)),
        received(Host::Far, Host::B, Family::V4, &tcp(1, 2, SYN)),
    ] {
        let mut arrival = hook;
        arrival.packet.vlan = Vlan::Stripped;
        assert_eq!(verdict(&world(), &arrival), dropped(DropReason::VlanTagged));
    }
}

#[test]
fn a_packet_cut_anywhere_is_dropped_unchanged() {
    for family in FAMILIES {
        let headers = if family == Family::V4 { 20 } else { 40 };
        for (transport, needed) in [
            (tcp(1, SERVICE_PORT, SYN), 20),
            (udp(1, SERVICE_PORT), 12),
            (Transport::Sctp { ports: (1, 2) }, 12),
            (
                Transport::Echo {
                    way: Echo::Request,
                    identifier: 3,
                },
                8,
            ),
        ] {
            for whole in [
                sent(Host::A, REMOTE, family, &transport),
                received(Host::Far, Host::B, family, &transport),
            ] {
                for length in 0..L3 + headers + needed {
                    let mut arrival = whole.clone();
                    arrival.packet.frame.truncate(length);
                    let verdict = verdict(&world(), &arrival);
                    assert_eq!(
                        verdict,
                        dropped(DropReason::Malformed),
                        "{family:?} {length}"
                    );
                }
            }
        }
    }
}

#[test]
fn a_quoted_packet_cut_anywhere_is_dropped() {
    for family in FAMILIES {
        let memory = world();
        let question = udp(1000, 7);
        assert_eq!(
            verdict(&memory, &sent(Host::B, Host::Far, family, &question)),
            Verdict::Pass
        );
        let quoted = Ip::between(Host::B.ip(family), Host::Far.ip(family)).packet(&question);
        let needed = if family == Family::V4 { 28 } else { 48 };
        for length in 0..=needed {
            let quoted = quoted[..length].to_vec();
            let error = received(
                Host::World,
                Host::B,
                family,
                &Transport::Unreachable { quoted },
            );
            let wanted = if length == needed {
                Verdict::Pass
            } else {
                dropped(DropReason::Malformed)
            };
            assert_eq!(verdict(&memory, &error), wanted, "{family:?} {length}");
        }
    }
}

#[test]
fn a_service_is_translated_both_ways() {
    for family in FAMILIES {
        for (service, protocol) in [
            (NEAR, Protocol::TCP),
            (NEAR, Protocol::UDP),
            (REMOTE, Protocol::TCP),
            (REMOTE, Protocol::UDP),
        ] {
            let memory = world();
            let (question, answer) = if protocol == Protocol::TCP {
                (
                    tcp(1000, SERVICE_PORT, SYN),
                    tcp(BACKEND_PORT, 1000, SYN | ACK),
                )
            } else {
                (udp(1000, SERVICE_PORT), udp(BACKEND_PORT, 1000))
            };
            let (verdict, _, after) = run(&memory, &sent(Host::A, service, family, &question));
            let (backend, arrival, there, back) = if service == NEAR {
                (Host::B, sent(Host::B, Host::A, family, &answer), TO_B, TO_A)
            } else {
                let arrival = received(Host::Far, Host::A, family, &answer);
                (Host::Far, arrival, Verdict::Pass, Verdict::Pass)
            };
            assert_eq!(verdict, there);
            // What arrives is what the client would have sent to the backend itself.
            let mut direct = Ip::between(Host::A.ip(family), backend.ip(family));
            direct.source_mac = Host::A.mac();
            let wanted = direct.frame(&match &question {
                Transport::Tcp { .. } => tcp(1000, BACKEND_PORT, SYN),
                _ => udp(1000, BACKEND_PORT),
            });
            assert_eq!(after.frame, wanted, "{family:?} {service:?} {protocol:?}");

            let (verdict, _, after) = run(&memory, &arrival);
            assert_eq!(verdict, back);
            let mut seeming = Ip::between(service.ip(family), Host::A.ip(family));
            seeming.source_mac = arrival.packet.frame[6..12].try_into().unwrap();
            let wanted = seeming.frame(&match &answer {
                Transport::Tcp { .. } => tcp(SERVICE_PORT, 1000, SYN | ACK),
                _ => udp(SERVICE_PORT, 1000),
            });
            assert_eq!(after.frame, wanted, "{family:?} {service:?} {protocol:?}");
            let rows = (memory.plans.borrow().len(), memory.ways.borrow().len());
            let is_tcp = protocol == Protocol::TCP;
            assert_eq!(rows, if is_tcp { (0, 2) } else { (1, 0) });
        }
    }
}

#[test]
fn no_checksum_stays_none_for_udp_and_is_a_sum_for_tcp() {
    for family in FAMILIES {
        let l4 = L3 + if family == Family::V4 { 20 } else { 40 };
        let mut datagram = sent(Host::A, NEAR, family, &udp(1000, SERVICE_PORT));
        datagram.packet.frame[l4 + 6..l4 + 8].fill(0);
        let (_, _, after) = run(&world(), &datagram);
        assert_eq!(after.frame[l4 + 6..l4 + 8], [0, 0], "{family:?}");

        // A payload that makes the checksum of the segment come out as zero.
        let segment = |payload: [u8; 2]| {
            let payload = payload.to_vec();
            let ports = (1000, SERVICE_PORT);
            sent(
                Host::A,
                NEAR,
                family,
                &Transport::Tcp {
                    ports,
                    flags: SYN,
                    payload,
                },
            )
        };
        let frame = segment([0, 0]).packet.frame;
        let segment = segment([frame[l4 + 16], frame[l4 + 17]]);
        assert_eq!(segment.packet.frame[l4 + 16..l4 + 18], [0, 0]);
        let (_, _, after) = run(&world(), &segment);
        assert!(checksums_are_right(&after.frame), "{family:?}");
        assert_ne!(after.frame[l4 + 16..l4 + 18], [0, 0]);
    }
}

#[test]
fn a_known_flow_asks_neither_service_nor_policy() {
    for family in FAMILIES {
        let mut memory = world();
        let there = |flags| sent(Host::A, Host::C, family, &tcp(1000, BACKEND_PORT, flags));
        let back = |flags| sent(Host::C, Host::A, family, &tcp(BACKEND_PORT, 1000, flags));
        assert_eq!(verdict(&memory, &there(SYN)), TO_C);
        assert_eq!(verdict(&memory, &back(SYN | ACK)), TO_A);
        memory.frontends.clear();
        memory.classes.clear();
        memory.verdicts.clear();
        memory.ports.clear();
        memory.pods.clear();
        assert_eq!(verdict(&memory, &there(ACK)), TO_C);
        assert_eq!(verdict(&memory, &back(ACK)), TO_A);
    }
}

#[test]
fn packets_and_bytes_are_counted_once_each_way() {
    let memory = world();
    let family = Family::V4;
    let there = |flags| sent(Host::A, Host::Far, family, &tcp(1000, 80, flags));
    let back = |flags| received(Host::Far, Host::A, family, &tcp(80, 1000, flags));
    for arrival in [
        there(SYN),
        back(SYN | ACK),
        there(ACK),
        there(ACK),
        back(FIN | ACK),
    ] {
        assert_eq!(verdict(&memory, &arrival), Verdict::Pass);
    }
    let (a, far) = ((Host::A, 1000), (Host::Far, 80));
    let ways = memory.ways.borrow();
    let there = &ways[&key(a, far, Protocol::TCP, family, Hook::FROM_POD)];
    let back = &ways[&key(far, a, Protocol::TCP, family, Hook::TO_POD)];
    let load = |cell: &std::sync::atomic::AtomicU64| cell.load(Relaxed);
    assert_eq!([load(&there.packets), load(&back.packets)], [3, 2]);
    assert_eq!([load(&there.bytes), load(&back.bytes)], [120, 80]);
    let state = back.state.load(Relaxed);
    assert_eq!(state & WayState::ENDING, WayState::FIN);
}

#[test]
fn a_denial_names_its_rule_and_leaves_no_flow() {
    let memory = world();
    let arrival = sent(Host::A, Host::C, Family::V6, &udp(1, 53));
    let (verdict, trace, _) = run(&memory, &arrival);
    assert_eq!(verdict, dropped(DropReason::EgressDenied));
    assert_eq!(trace.rule.0, 1003);
    assert_eq!(trace.tuple.destination, Host::C.addr(Family::V6));
    assert!(memory.plans.borrow().is_empty());
}

/// Who reads of a drop reads whom the packet would have reached, not which service it asked.
#[test]
fn what_is_denied_behind_a_service_is_named() {
    for family in FAMILIES {
        let arrival = sent(Host::C, NEAR, family, &tcp(1000, SERVICE_PORT, SYN));
        let (verdict, trace, _) = run(&world(), &arrival);
        assert_eq!(verdict, dropped(DropReason::EgressDenied));
        let went = (trace.tuple.destination, trace.tuple.destination_port);
        assert_eq!(went, (Host::B.addr(family), BACKEND_PORT.into()));
    }
}

#[test]
fn a_new_epoch_judges_a_known_flow_in_its_openers_direction() {
    for family in FAMILIES {
        for side in ["there", "back"] {
            let mut memory = world();
            let there = |flags| sent(Host::A, Host::B, family, &tcp(1000, 80, flags));
            let back = |flags| sent(Host::B, Host::A, family, &tcp(80, 1000, flags));
            assert_eq!(verdict(&memory, &there(SYN)), TO_B);
            assert_eq!(verdict(&memory, &back(SYN | ACK)), TO_A);
            // What comes in to A is closed: that says nothing about answers.
            let answers = VerdictKey {
                rules: A_IN,
                class: CLASS(Host::B),
            };
            memory.verdicts.get_mut(&answers).unwrap().action = Action::DENY;
            memory.epoch += 1;
            assert_eq!(verdict(&memory, &back(ACK)), TO_A);
            assert_eq!(verdict(&memory, &there(ACK)), TO_B);

            let row = VerdictKey {
                rules: A_OUT,
                class: CLASS(Host::B),
            };
            memory.verdicts.get_mut(&row).unwrap().action = Action::DENY;
            assert_eq!(
                verdict(&memory, &there(ACK)),
                TO_B,
                "not before the epoch changes"
            );
            memory.epoch += 1;
            let arrival = if side == "there" {
                there(ACK)
            } else {
                back(ACK)
            };
            assert_eq!(
                verdict(&memory, &arrival),
                dropped(DropReason::EgressDenied),
                "{side}"
            );
            // It stays with its opener: neither side can bring it back under another question.
            for again in [there(ACK), back(ACK)] {
                assert_eq!(
                    verdict(&memory, &again),
                    dropped(DropReason::EgressDenied),
                    "{side}"
                );
            }
        }
    }
}

#[test]
fn a_syn_always_meets_policy() {
    let mut memory = world();
    let syn = sent(Host::A, Host::B, Family::V4, &tcp(1000, 80, SYN));
    assert_eq!(verdict(&memory, &syn), TO_B);
    let row = VerdictKey {
        rules: A_OUT,
        class: CLASS(Host::B),
    };
    memory.verdicts.get_mut(&row).unwrap().action = Action::DENY;
    assert_eq!(verdict(&memory, &syn), dropped(DropReason::EgressDenied));
    memory.verdicts.get_mut(&row).unwrap().action = Action::ALLOW;
    assert_eq!(verdict(&memory, &syn), TO_B);
}

#[test]
fn a_syn_of_the_responder_is_judged_for_itself() {
    let mut memory = world();
    let there = |flags| sent(Host::A, Host::B, Family::V4, &tcp(1000, 80, flags));
    let back = |flags| sent(Host::B, Host::A, Family::V4, &tcp(80, 1000, flags));
    assert_eq!(verdict(&memory, &there(SYN)), TO_B);
    assert_eq!(verdict(&memory, &back(SYN | ACK)), TO_A);
    let row = VerdictKey {
        rules: A_IN,
        class: CLASS(Host::B),
    };
    memory.verdicts.get_mut(&row).unwrap().action = Action::DENY;
    assert_eq!(
        verdict(&memory, &back(SYN)),
        dropped(DropReason::IngressDenied)
    );
    assert_eq!(
        verdict(&memory, &there(ACK)),
        TO_B,
        "the flow itself goes on"
    );
}

#[test]
fn only_an_answer_makes_ways_of_a_plan() {
    let memory = world();
    let there = sent(Host::A, Host::B, Family::V4, &tcp(1000, 80, SYN));
    for (answer, answered) in [(RST | ACK, 0), (SYN | ACK, 1)] {
        assert_eq!(verdict(&memory, &there), TO_B);
        let back = sent(Host::B, Host::A, Family::V4, &tcp(80, 1000, answer));
        assert_eq!(verdict(&memory, &back), TO_A);
        assert_eq!(memory.ways.borrow().len(), 2 * answered);
        assert_eq!(memory.plans.borrow().len(), 1 - answered);
    }
}

#[test]
fn a_full_table_opens_nothing_and_keeps_what_it_has() {
    let mut memory = world();
    let known = sent(Host::A, Host::B, Family::V4, &tcp(1000, 80, SYN));
    assert_eq!(verdict(&memory, &known), TO_B);
    memory.room = Room::Full;
    assert_eq!(verdict(&memory, &known), TO_B);
    let other = sent(Host::A, Host::B, Family::V4, &tcp(1001, 80, SYN));
    assert_eq!(verdict(&memory, &other), dropped(DropReason::TableFull));
}

#[test]
fn a_backend_that_is_gone_is_never_reached_again() {
    for family in FAMILIES {
        let id = if family == Family::V4 { 2 } else { 12 };
        let segment = |flags| sent(Host::A, CHANGING, family, &tcp(1000, SERVICE_PORT, flags));
        let another = sent(Host::A, CHANGING, family, &tcp(1001, SERVICE_PORT, SYN));
        let datagram = sent(Host::A, CHANGING, family, &udp(1000, SERVICE_PORT));
        let answer = tcp(BACKEND_PORT, 1000, SYN | ACK);
        let answer = received(Host::Far, Host::A, family, &answer);
        let (gone, none) = (
            Verdict::Refuse(DropReason::BackendGone),
            Verdict::Refuse(DropReason::NoBackend),
        );
        // It drains, it is usable again, it is gone, it drains under a number that is another's, it is another.
        for (generation, going_on, new) in [
            (9, Verdict::Pass, none),
            (8, Verdict::Pass, Verdict::Pass),
            (10, gone, none),
            (13, gone, none),
            (12, gone, Verdict::Pass),
        ] {
            let mut memory = world();
            for arrival in [segment(SYN), answer.clone(), segment(ACK), datagram.clone()] {
                let before = verdict(&memory, &arrival);
                assert_eq!(before, Verdict::Pass, "the one that is left serves");
            }
            memory.live.insert(id, Generation(generation));
            let after = [
                segment(ACK),
                another.clone(),
                datagram.clone(),
                segment(SYN),
            ];
            let after = after.map(|arrival| verdict(&memory, &arrival));
            // A SYN of a connection that goes on ends nothing, whoever has sent it.
            let again = if going_on == gone { new } else { going_on };
            assert_eq!(after, [going_on, new, new, again], "{generation}");
        }
    }
}

#[test]
fn a_flow_keeps_its_backend_until_it_is_closed() {
    for family in FAMILIES {
        let mut memory = world();
        let there = |flags| sent(Host::B, SHARED, family, &tcp(1000, SERVICE_PORT, flags));
        let from = |pod: Host, flags| sent(pod, Host::B, family, &tcp(BACKEND_PORT, 1000, flags));
        let to_it = verdict(&memory, &there(SYN));
        let (it, id) = if to_it == TO_A {
            (Host::A, 4)
        } else {
            (Host::C, 5)
        };
        let id = if family == Family::V4 { id } else { id + 10 };
        assert_eq!(verdict(&memory, &there(SYN)), to_it, "a SYN sent again");
        assert_eq!(verdict(&memory, &from(it, SYN | ACK)), TO_B);
        assert_eq!(verdict(&memory, &there(FIN | ACK)), to_it);
        assert_eq!(verdict(&memory, &there(SYN)), to_it, "half closed");
        assert_eq!(verdict(&memory, &there(FIN | ACK)), to_it);
        assert_eq!(verdict(&memory, &from(it, FIN | ACK)), TO_B);
        // Closed: it is a new one, for which the other serves now.
        let generation = memory.live[&id];
        memory.live.insert(id, Generation(generation.0 + 1));
        let to_other = verdict(&memory, &there(SYN));
        assert!(to_other != to_it && matches!(to_other, Verdict::Redirect(_)));
        assert!(memory.ways.borrow().is_empty());
    }
}

#[test]
fn the_same_ports_directly_and_through_a_service_do_not_mix() {
    for family in FAMILIES {
        let memory = world();
        let direct = sent(Host::A, Host::B, family, &tcp(1000, BACKEND_PORT, SYN));
        let through = sent(Host::A, NEAR, family, &tcp(1000, SERVICE_PORT, SYN));
        assert_eq!(verdict(&memory, &direct), TO_B);
        assert_eq!(
            verdict(&memory, &through),
            dropped(DropReason::NatCollision)
        );
        // A SYN that nobody has answered for longer than it is sent again frees the ports.
        memory.now.set(121_000_000_000);
        assert_eq!(verdict(&memory, &through), TO_B);
        assert_eq!(verdict(&memory, &direct), dropped(DropReason::NatCollision));
    }
}

#[test]
fn an_unanswered_flow_finds_the_service_that_came_after_it() {
    let mut memory = world();
    let frontends = std::mem::take(&mut memory.frontends);
    let arrival = sent(Host::B, REMOTE, Family::V4, &udp(1000, SERVICE_PORT));
    let (verdict, _, after) = run(&memory, &arrival);
    assert_eq!(
        (verdict, after.frame),
        (Verdict::Pass, arrival.packet.frame.clone())
    );
    memory.frontends = frontends;
    let (verdict, trace, after) = run(&memory, &arrival);
    assert_eq!(verdict, Verdict::Pass);
    let went = as_sent(trace.tuple, &after);
    assert_eq!(went.destination, Host::Far.addr(Family::V4));
}

#[test]
fn echoes_are_answered_by_identifier_and_requests_the_other_way_are_judged() {
    for family in FAMILIES {
        let mut memory = world();
        let echo = |way, identifier| Transport::Echo { way, identifier };
        let request = sent(Host::A, Host::B, family, &echo(Echo::Request, 7));
        assert_eq!(verdict(&memory, &request), TO_B);
        let row = VerdictKey {
            rules: A_IN,
            class: CLASS(Host::B),
        };
        memory.verdicts.get_mut(&row).unwrap().action = Action::DENY;
        let answer = |identifier| sent(Host::B, Host::A, family, &echo(Echo::Reply, identifier));
        assert_eq!(verdict(&memory, &answer(7)), TO_A);
        assert_eq!(verdict(&memory, &answer(8)), dropped(DropReason::NoFlow));
        let back = sent(Host::B, Host::A, family, &echo(Echo::Request, 7));
        assert_eq!(verdict(&memory, &back), dropped(DropReason::IngressDenied));
        let odd = sent(Host::A, Host::B, family, &echo(Echo::Reply, 7));
        assert_eq!(verdict(&memory, &odd), dropped(DropReason::NoFlow));
    }
}

#[test]
fn an_error_passes_only_about_a_live_flow_of_the_pod_that_sends_it() {
    for family in FAMILIES {
        let memory = world();
        let question = udp(1000, BACKEND_PORT);
        assert_eq!(
            verdict(&memory, &sent(Host::A, Host::B, family, &question)),
            TO_B
        );
        let quoted = Ip::between(Host::A.ip(family), Host::B.ip(family)).packet(&question);
        let error = Transport::Unreachable {
            quoted: quoted.clone(),
        };
        assert_eq!(
            verdict(&memory, &sent(Host::B, Host::A, family, &error)),
            TO_A
        );
        // Another pod about a flow that is not its own; to somebody else than who sent the packet.
        let forged = sent(Host::C, Host::A, family, &error);
        assert_eq!(verdict(&memory, &forged), dropped(DropReason::NoFlow));
        let astray = sent(Host::B, Host::C, family, &error);
        assert_eq!(verdict(&memory, &astray), dropped(DropReason::NoFlow));
        // From a router, about what no router has seen.
        let forged = received(Host::World, Host::A, family, &error);
        assert_eq!(verdict(&memory, &forged), dropped(DropReason::NoFlow));
        // From a router on the way.
        let left = sent(Host::A, Host::Far, family, &question);
        assert_eq!(verdict(&memory, &left), Verdict::Pass);
        let quoted = Ip::between(Host::A.ip(family), Host::Far.ip(family)).packet(&question);
        let error = Transport::Unreachable { quoted };
        let error = received(Host::World, Host::A, family, &error);
        assert_eq!(verdict(&memory, &error), Verdict::Pass);
        let other = Ip::between(Host::A.ip(family), Host::B.ip(family)).packet(&udp(1001, 9));
        let unknown = received(
            Host::World,
            Host::A,
            family,
            &Transport::Unreachable { quoted: other },
        );
        assert_eq!(verdict(&memory, &unknown), dropped(DropReason::NoFlow));
    }
}

#[test]
fn the_world_is_what_the_tests_take_it_for() {
    let memory = world();
    for (pod, ifindex) in PODS {
        assert_eq!(memory.devices[&ifindex].mac.0, pod.mac());
    }
}
