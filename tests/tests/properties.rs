//! Ring 2: what holds for every packet, on the host, over histories of random frames.

use proptest::prelude::*;
use weir_common::event::Hook;
use weir_datapath::{Scratch, Verdict};
use weir_tests::bytes::Bytes;
use weir_tests::edges::{received, sent};
use weir_tests::fragments::is_folded;
use weir_tests::frames::{ACK, Ip, L3, Transport, checksums_are_right};
use weir_tests::mix::{Arrival, Mix};
use weir_tests::refusals::refusal;
use weir_tests::stories::decide;
use weir_tests::tables::Memory;
use weir_tests::world::{BACKEND_PORT, FAMILIES, Family, Host, NEAR, REMOTE, SERVICE_PORT, world};

fn run(memory: &Memory, arrival: &Arrival) -> (Verdict, Scratch, Bytes) {
    let mut scratch = Scratch::default();
    let mut packet = arrival.packet.clone();
    let verdict = decide(arrival.hook, &mut packet, memory, &mut scratch);
    (verdict, scratch, packet)
}

/// A frame of TCP or UDP without padding, so that its checksums can be told.
fn is_whole(frame: &[u8], family: Family) -> bool {
    let packet = &frame[L3..];
    let (length, protocol) = match family {
        Family::V4 => (
            usize::from(u16::from_be_bytes([packet[2], packet[3]])),
            packet[9],
        ),
        Family::V6 => (
            40 + usize::from(u16::from_be_bytes([packet[4], packet[5]])),
            packet[6],
        ),
    };
    length == packet.len() && matches!(protocol, 6 | 17) && !is_folded(frame)
}

/// The bytes that translation of one side may change.
fn may_change(frame: &[u8], family: Family) -> impl Fn(usize) -> bool {
    let (l4, addresses, protocol) = match family {
        Family::V4 => (
            L3 + usize::from(frame[L3] & 0xf) * 4,
            L3 + 12..L3 + 20,
            frame[L3 + 9],
        ),
        Family::V6 => (L3 + 40, L3 + 8..L3 + 40, frame[L3 + 6]),
    };
    // Behind extension headers the transport header is anywhere.
    let is_anywhere = family == Family::V6 && is_folded(frame);
    let checksum = l4 + if protocol == 6 { 16 } else { 6 };
    move |at| {
        addresses.contains(&at)
            || (l4..l4 + 4).contains(&at)
            || (is_anywhere && at >= l4)
            || (checksum..checksum + 2).contains(&at)
            // What an ICMP error quotes is translated, too, and the error's checksum is at its start.
            || (matches!(protocol, 1 | 58) && at >= l4 + 2)
            || (family == Family::V4 && (L3 + 10..L3 + 12).contains(&at))
    }
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 200,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    /// A dropped packet is not touched; a refused one is its answer; a passed one only where translation must; its checksums stay
    /// right; the same packet has the same fate again; and a packet that is translated once and back
    /// is what it was.
    #[test]
    fn histories_keep_the_laws(seed: u64) {
        let memory = world();
        let mut mix = Mix::new(seed);
        for step in 0..300 {
            let hook = [Hook::FROM_POD, Hook::TO_POD][mix.below(2)];
            let family = FAMILIES[mix.below(2)];
            let arrival = mix.arrival(hook, family);
            let before = &arrival.packet.frame;
            let (verdict, scratch, after) = run(&memory, &arrival);
            if matches!(verdict, Verdict::Drop(_)) {
                prop_assert_eq!(before, &after.frame, "step {}", step);
                continue;
            }
            if matches!(verdict, Verdict::Refuse(_)) {
                prop_assert_eq!(&after.frame, &refusal(before), "step {}", step);
                continue;
            }
            prop_assert_eq!(before.len(), after.frame.len());
            let may = may_change(before, family);
            for (at, (was, is)) in before.iter().zip(&after.frame).enumerate() {
                prop_assert!(was == is || may(at), "step {}, byte {}", step, at);
            }
            if is_whole(before, family) && checksums_are_right(before) {
                prop_assert!(checksums_are_right(&after.frame), "step {}: {:02x?}", step, after.frame);
            }
            // A RST or a SYN changes what comes next by itself.
            let is_repeatable = scratch.trace.tuple.protocol.0 == 17;
            if is_repeatable {
                let (again, _, after_again) = run(&memory, &arrival);
                prop_assert_eq!((again, &after_again.frame), (verdict, &after.frame), "step {}", step);
            }
            mix.became(arrival.hook, verdict, scratch.trace.tuple, &after);
        }
    }

    #[test]
    fn translating_back_is_the_inverse(
        payload in proptest::collection::vec(any::<u8>(), 0..200),
        port in 1u16..,
        is_v4: bool,
        is_tcp: bool,
        is_near: bool,
        has_checksum: bool,
    ) {
        let family = if is_v4 { Family::V4 } else { Family::V6 };
        let service = if is_near { NEAR } else { REMOTE };
        let backend = if is_near { Host::B } else { Host::Far };
        let transport = |ports| if is_tcp {
            Transport::Tcp { ports, flags: ACK, payload: payload.clone() }
        } else {
            Transport::Udp { ports, payload: payload.clone() }
        };
        let memory = world();
        let mut question = sent(Host::A, service, family, &transport((port, SERVICE_PORT)));
        let l4 = L3 + if is_v4 { 20 } else { 40 };
        if !is_tcp && !has_checksum {
            question.packet.frame[l4 + 6..l4 + 8].fill(0);
        }
        let (_, _, there) = run(&memory, &question);
        let mut direct = Ip::between(Host::A.ip(family), backend.ip(family));
        direct.source_mac = Host::A.mac();
        let mut wanted = direct.frame(&transport((port, BACKEND_PORT)));
        if !is_tcp && !has_checksum {
            wanted[l4 + 6..l4 + 8].fill(0);
        }
        prop_assert_eq!(&there.frame, &wanted);

        let answer = transport((BACKEND_PORT, port));
        let arrival = if is_near {
            sent(Host::B, Host::A, family, &answer)
        } else {
            received(Host::Far, Host::A, family, &answer)
        };
        let (_, _, back) = run(&memory, &arrival);
        let seeming = Ip::between(service.ip(family), Host::A.ip(family));
        let wanted = seeming.packet(&transport((SERVICE_PORT, port)));
        prop_assert_eq!(&back.frame[L3..], &wanted[..]);
    }
}
