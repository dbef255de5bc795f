//! Ring 1: what becomes of conversations that have been answered when policy denies them later.

use std::rc::Rc;

use weir_common::device::{Device, DeviceFlags};
use weir_common::policy::{Action, PortKey, PortRow, RulesId, VerdictKey};
use weir_common::{DropReason, Protocol};
use weir_datapath::{Scratch, Verdict, from_pod};
use weir_tests::edges::{sent, tcp, udp};
use weir_tests::frames::{ACK, SYN};
use weir_tests::mix::Arrival;
use weir_tests::tables::Memory;
use weir_tests::world::{A_IN, A_OUT, CLASS, FAMILIES, Host, world};

const TO_A: Verdict = Verdict::Redirect(1001);
const TO_B: Verdict = Verdict::Redirect(1002);

fn verdict(memory: &Memory, arrival: &Arrival) -> Verdict {
    from_pod(&mut arrival.packet.clone(), memory, &mut Scratch::default())
}

/// A's rules deny B from now on.
fn deny(memory: &mut Memory, rules: RulesId) {
    answer(memory, rules, Action::DENY);
}

fn answer(memory: &mut Memory, rules: RulesId, action: Action) {
    let class = CLASS(Host::B);
    let row = memory.verdicts.get_mut(&VerdictKey { rules, class });
    if let Some(row) = row {
        row.action = action;
    }
    memory.epoch += 1;
}

fn keep(memory: &mut Memory, host: Host, flags: DeviceFlags) {
    let Some(ifindex) = host.ifindex() else {
        return;
    };
    let Some(device) = memory.devices.get(&ifindex) else {
        return;
    };
    let row = Device { flags, ..**device };
    memory.devices.insert(ifindex, Rc::new(row));
}

#[test]
fn what_is_answered_goes_on_where_the_pod_that_denies_it_keeps_it() {
    const KEEPS: DeviceFlags = DeviceFlags::KEEPS_ESTABLISHED;
    for family in FAMILIES {
        for (keeping, is_kept) in [(Host::A, true), (Host::B, false)] {
            let mut memory = world();
            let there = |port, flags| sent(Host::A, Host::B, family, &tcp(port, 80, flags));
            let back = |port, flags| sent(Host::B, Host::A, family, &tcp(80, port, flags));
            let asks = |port| sent(Host::A, Host::B, family, &udp(port, 53));
            let answers = |port| sent(Host::B, Host::A, family, &udp(53, port));
            assert_eq!(verdict(&memory, &there(1000, SYN)), TO_B);
            assert_eq!(verdict(&memory, &back(1000, SYN | ACK)), TO_A);
            assert_eq!(verdict(&memory, &there(1000, ACK)), TO_B);
            assert_eq!(verdict(&memory, &asks(2000)), TO_B);
            assert_eq!(verdict(&memory, &answers(2000)), TO_A);
            // A question and its answer are no conversation yet.
            assert_eq!(verdict(&memory, &asks(2000)), TO_B);
            // Asked and not answered yet.
            assert_eq!(verdict(&memory, &there(1001, SYN)), TO_B);
            assert_eq!(verdict(&memory, &asks(2001)), TO_B);
            keep(&mut memory, keeping, KEEPS);
            deny(&mut memory, A_OUT);

            let denied = Verdict::Drop(DropReason::EgressDenied);
            let (to_a, to_b) = match is_kept {
                true => (TO_A, TO_B),
                false => (denied, denied),
            };
            // Twice: once it is judged, then known.
            for _ in 0..2 {
                assert_eq!(verdict(&memory, &there(1000, ACK)), to_b, "{keeping:?}");
                assert_eq!(verdict(&memory, &back(1000, ACK)), to_a, "{keeping:?}");
                assert_eq!(verdict(&memory, &asks(2000)), to_b, "{keeping:?}");
            }
            for begins in [
                there(1000, SYN),
                there(1001, SYN),
                there(1002, SYN),
                back(1001, SYN | ACK),
                asks(2001),
                asks(2002),
            ] {
                assert_eq!(verdict(&memory, &begins), denied, "{keeping:?}");
            }
            // As soon as it keeps nothing any more it is denied.
            keep(&mut memory, keeping, DeviceFlags::default());
            memory.epoch += 1;
            assert_eq!(verdict(&memory, &there(1000, ACK)), denied);
        }
    }
}

#[test]
fn a_pod_keeps_what_others_have_opened_to_it_too() {
    for family in FAMILIES {
        let mut memory = world();
        let there = |flags| sent(Host::B, Host::A, family, &tcp(1000, 80, flags));
        let back = |flags| sent(Host::A, Host::B, family, &tcp(80, 1000, flags));
        assert_eq!(verdict(&memory, &there(SYN)), TO_A);
        assert_eq!(verdict(&memory, &back(SYN | ACK)), TO_B);
        keep(&mut memory, Host::A, DeviceFlags::KEEPS_ESTABLISHED);
        deny(&mut memory, A_IN);
        assert_eq!(verdict(&memory, &there(ACK)), TO_A);
        assert_eq!(verdict(&memory, &back(ACK)), TO_B);
        let begins = sent(Host::B, Host::A, family, &tcp(1001, 80, SYN));
        let denied = Verdict::Drop(DropReason::IngressDenied);
        assert_eq!(verdict(&memory, &begins), denied);
    }
}

/// What the Admin tier denies is not for the owner of a namespace to soften.
#[test]
fn a_denial_that_ends_what_is_established_does_so_where_it_is_kept() {
    for family in FAMILIES {
        for is_by_port in [false, true] {
            let mut memory = world();
            let there = |flags| sent(Host::A, Host::B, family, &tcp(1000, 80, flags));
            let back = |flags| sent(Host::B, Host::A, family, &tcp(80, 1000, flags));
            assert_eq!(verdict(&memory, &there(SYN)), TO_B);
            assert_eq!(verdict(&memory, &back(SYN | ACK)), TO_A);
            keep(&mut memory, Host::A, DeviceFlags::KEEPS_ESTABLISHED);
            let say = |memory: &mut Memory, action| {
                if !is_by_port {
                    return answer(memory, A_OUT, action);
                }
                let row = PortRow {
                    action,
                    ..PortRow::default()
                };
                memory
                    .ports
                    .insert(PortKey::exact(99, Protocol::TCP, 80.into()), row);
                answer(memory, A_OUT, Action::BY_PORT);
                let (rules, class) = (A_OUT, CLASS(Host::B));
                let row = memory.verdicts.get_mut(&VerdictKey { rules, class });
                row.unwrap().ports = 99;
            };
            say(&mut memory, Action::DENY);
            assert_eq!(verdict(&memory, &there(ACK)), TO_B);
            say(&mut memory, Action::END);
            let denied = Verdict::Drop(DropReason::EgressDenied);
            assert_eq!(verdict(&memory, &there(ACK)), denied);
            assert_eq!(verdict(&memory, &back(ACK)), denied);
        }
    }
}
