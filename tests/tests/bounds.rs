//! Ring 1: where a rule of the headers ends, the last value that it allows and the first that it does not; and the numbers that
//! everything else is made of.

#![allow(clippy::unwrap_used, reason = "a test that fails should say where")]

use std::collections::BTreeSet;
use std::net::Ipv6Addr;

use proptest::prelude::RngExt as _;
use proptest::test_runner::{RngAlgorithm, TestRng};
use weir_common::event::Hook;
use weir_common::service::Backend;
use weir_common::way::WayKey;
use weir_common::{Addr, DropReason, Port, Protocol};
use weir_datapath::packet::Delta;
use weir_datapath::service::search;
use weir_datapath::words::{hash, mixed, same, words};
use weir_datapath::{Outcome, Scratch, Trace, Verdict};
use weir_tests::bytes::Bytes;
use weir_tests::edges::{received, sent, tcp, udp};
use weir_tests::frames::{ACK, Ip, L3, SYN, Transport, checksum};
use weir_tests::mix::Arrival;
use weir_tests::stories::decide;
use weir_tests::tables::Memory;
use weir_tests::world::{FAMILIES, Family, Host, UPLINK, world};

fn fate(memory: &Memory, arrival: &Arrival) -> (Verdict, Trace) {
    let mut scratch = Scratch::default();
    let mut packet = arrival.packet.clone();
    let verdict = decide(arrival.hook, &mut packet, memory, &mut scratch);
    (verdict, scratch.trace)
}

/// A frame of B to a pod elsewhere, with its IP header's length as said.
fn of_length(family: Family, transport: &Transport, length: u16) -> Arrival {
    let mut arrival = sent(Host::B, Host::Far, family, transport);
    let at = L3 + if family == Family::V4 { 2 } else { 4 };
    arrival.packet.frame[at..at + 2].copy_from_slice(&length.to_be_bytes());
    arrival
}

/// RFC 791 section 3.1 and RFC 8200 section 3: the field can say 65,535. Only for more than that Linux leaves it zero.
#[test]
fn a_length_of_zero_is_that_of_a_packet_that_the_field_cannot_say() {
    for (family, counted) in [(Family::V4, 40), (Family::V6, 20)] {
        for (total, verdict) in [
            (65_535, Verdict::Drop(DropReason::Malformed)),
            (65_536, Verdict::Pass),
            (200_000, Verdict::Pass),
        ] {
            let transport = Transport::Tcp {
                ports: (1000, 80),
                flags: ACK,
                payload: vec![0; total - counted],
            };
            let arrival = of_length(family, &transport, 0);
            let found = fate(&world(), &arrival).0;
            assert_eq!(found, verdict, "{family:?} {total}");
        }
    }
}

#[test]
fn no_fragment_is_longer_than_a_packet_can_be() {
    let mut payload = vec![17, 0, 0, 1, 0, 0, 0, 1];
    payload.extend([0, 1, 0, 2, 0xff, 0xff, 0, 0]);
    payload.resize(8 + 65_536, 0);
    let transport = Transport::Other {
        protocol: 44,
        payload,
    };
    let arrival = of_length(Family::V6, &transport, 0);
    let malformed = Verdict::Drop(DropReason::Malformed);
    assert_eq!(fate(&world(), &arrival).0, malformed);
}

/// RFC 791 section 3.1: the total length counts the header, after which nothing need come.
#[test]
fn a_packet_is_no_shorter_than_its_header_and_may_be_no_longer() {
    let nothing = Transport::Other {
        protocol: 47,
        payload: Vec::new(),
    };
    let malformed = Verdict::Drop(DropReason::Malformed);
    for (length, verdict) in [(0, malformed), (19, malformed), (20, Verdict::Pass)] {
        let arrival = of_length(Family::V4, &nothing, length);
        assert_eq!(fate(&world(), &arrival).0, verdict, "{length}");
    }
    let arrival = of_length(Family::V6, &nothing, 0);
    assert_eq!(fate(&world(), &arrival).0, Verdict::Pass);
}

/// RFC 9260 section 3: a common header of twelve bytes, and chunks.
#[test]
fn sctp_has_a_header_of_twelve_bytes() {
    for family in FAMILIES {
        for (length, verdict) in [
            (11, Verdict::Drop(DropReason::Malformed)),
            (12, Verdict::Pass),
            (28, Verdict::Pass),
        ] {
            let mut payload = vec![0; length];
            payload[..4].copy_from_slice(&[0x12, 0x34, 0x56, 0x78]);
            let transport = Transport::Other {
                protocol: 132,
                payload,
            };
            let arrival = sent(Host::B, Host::Far, family, &transport);
            let (found, trace) = fate(&world(), &arrival);
            assert_eq!(found, verdict, "{family:?} {length}");
            if verdict == Verdict::Pass {
                let ports = (trace.tuple.source_port, trace.tuple.destination_port);
                assert_eq!(ports, (Port([0x12, 0x34]), Port([0x56, 0x78])));
            }
        }
    }
}

/// RFC 1122 section 3.2.2.1: an error reaches who has sent the packet, of whatever protocol it was.
#[test]
fn an_error_may_be_about_a_protocol_without_ports_but_not_about_the_other_familys() {
    for family in FAMILIES {
        let of = |protocol| Transport::Other {
            protocol,
            payload: vec![0; 8],
        };
        let about = |protocol| {
            let packet = Ip::between(Host::B.ip(family), Host::Far.ip(family));
            let quoted = packet.packet(&of(protocol));
            received(
                Host::Far,
                Host::B,
                family,
                &Transport::Unreachable { quoted },
            )
        };
        let memory = world();
        let tunnel = sent(Host::B, Host::Far, family, &of(47));
        assert_eq!(fate(&memory, &tunnel).0, Verdict::Pass);
        assert_eq!(fate(&memory, &about(47)).0, Verdict::Pass);
        let no_flow = Verdict::Drop(DropReason::NoFlow);
        assert_eq!(
            fate(&memory, &about(50)).0,
            if family == Family::V4 {
                no_flow
            } else {
                Verdict::Drop(DropReason::ExtensionHeader)
            }
        );
        let foreign = if family == Family::V4 { 58 } else { 1 };
        let malformed = Verdict::Drop(DropReason::Malformed);
        assert_eq!(fate(&memory, &about(foreign)).0, malformed);
    }
}

/// What the node says for itself is not ours to judge, even if we could not read it: its neighbour discovery (RFC 4861), from an
/// address of the link, and what its administrator has set up.
#[test]
fn what_the_node_sends_unmarked_leaves_as_it_is() {
    let link_local = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1);
    let all = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 1, 0xff00, 1);
    let solicitation = Transport::Other {
        protocol: 58,
        payload: vec![135; 24],
    };
    let sealed = |protocol| Transport::Other {
        protocol,
        payload: vec![1; 24],
    };
    let (v4, v6) = (Family::V4, Family::V6);
    let other = |family, to: Host| Ip::between(Host::OtherNode.ip(family), to.ip(family));
    for (name, ip, transport) in [
        (
            "solicitation",
            Ip::between(link_local.into(), all.into()),
            &solicitation,
        ),
        ("a sealed packet", other(v6, Host::World), &sealed(50)),
        (
            "what is no TCP",
            other(v4, Host::World),
            &Transport::Other {
                protocol: 6,
                payload: vec![3; 20],
            },
        ),
    ] {
        let packet = Bytes {
            received_by: 0,
            ..Bytes::new(UPLINK, ip.frame(transport))
        };
        let hook = Hook::TO_NET;
        let arrival = Arrival { hook, packet };
        assert_eq!(fate(&world(), &arrival).0, Verdict::Pass, "{name}");
    }
}

/// Two addresses whose halves differ by the same bits, or that have one half in common: each is somebody else's.
#[test]
fn an_address_is_the_pods_own_if_all_of_it_is() {
    let own = Host::B.addr(Family::V6);
    for address in [
        Ipv6Addr::new(0xfd00, 0, 0, 9, 0, 0, 0, 11),
        Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 11),
        Ipv6Addr::new(0x0200, 0, 0, 0, 0, 0, 0, 2),
        Ipv6Addr::new(0xfdff, 0, 0, 0, 0, 0, 0, 2),
    ] {
        let other = Addr::from(std::net::IpAddr::from(address));
        assert!(!same(&own, &other) && same(&other, &other), "{address}");
        for transport in [tcp(1000, 80, SYN), udp(1000, 80)] {
            let mut ip = Ip::between(Host::B.ip(Family::V6), address.into());
            ip.source_mac = Host::B.mac();
            let packet = Bytes::new(Host::B.ifindex().unwrap(), ip.frame(&transport));
            let hook = Hook::FROM_POD;
            let arrival = Arrival { hook, packet };
            assert_eq!(fate(&world(), &arrival).0, Verdict::Pass, "{address}");
        }
    }
}

/// IPv4's 224.0.0.0/4 (RFC 5771) and IPv6's ff00::/8 (RFC 4291 section 2.7): kernels send to groups without being asked.
#[test]
fn only_what_is_sent_to_a_group_is_noise() {
    let to = |destination| Trace {
        tuple: WayKey {
            destination,
            ..WayKey::default()
        },
        ..Trace::default()
    };
    for octet in 0..=255u8 {
        let v4 = to(Addr::v4([octet, 0, 0, 251]));
        assert_eq!(v4.is_noise(), (224..240).contains(&octet), "{octet}");
        let v6 = Ipv6Addr::new(u16::from(octet) << 8 | 2, 0, 0, 0, 0, 0, 0, 2);
        let v6 = to(Addr::from(std::net::IpAddr::from(v6)));
        assert_eq!(v6.is_noise(), octet == 255, "{octet}");
    }
}

/// Functions of BPF answer with a number.
#[test]
fn an_outcome_is_the_same_behind_a_call() {
    let reasons = (0..=u8::MAX).filter_map(DropReason::from_number);
    for result in [Ok(true), Ok(false)].into_iter().chain(reasons.map(Err)) {
        let number = u32::from(Outcome::of(result));
        assert_eq!(Outcome(number).is_known(), result);
    }
}

fn random() -> TestRng {
    TestRng::from_seed(RngAlgorithm::ChaCha, &[7; 32])
}

/// RFC 1624: the header's checksum is as if it had been computed anew, whatever is carried.
#[test]
fn the_delta_of_two_addresses_makes_the_checksum_that_the_new_one_has() {
    let mut random = random();
    let extremes = [
        0,
        1,
        0xff,
        0xffff_ffff,
        0xffff_fffe,
        0xffff_0000,
        0x8000_0000,
    ];
    for round in 0..20_000 {
        let mut addr = || {
            let mut bytes = [0; 16];
            for word in bytes.chunks_mut(4) {
                let value = match random.random_range(0..3) {
                    0 => random.random(),
                    _ => extremes[random.random_range(0..extremes.len())],
                };
                word.copy_from_slice(&u32::to_be_bytes(value));
            }
            bytes
        };
        let (old, new) = (addr(), addr());
        let rest = 0x1234u16.to_be_bytes();
        let halves = |bytes: [u8; 16]| {
            let (high, low) = bytes.split_at(8);
            [high, low].map(|half| u64::from_ne_bytes(half.try_into().unwrap()))
        };
        let delta = Delta::of_addresses(halves(old), halves(new));
        let before = checksum(&[&old, &rest]).to_be_bytes();
        let mut sum = u64::from(!u16::from_ne_bytes(before)) + u64::from(delta.0);
        while sum >> 16 != 0 {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        let after = (!(sum as u16)).to_ne_bytes();
        // Zero has two signs in one's complement.
        let sum = checksum(&[&new, &rest, &after]);
        assert!(sum == 0 || sum == 0xffff, "{round}: {old:02x?} {new:02x?}");
    }
}

/// The place of a backend is the number of those before it, whatever stands beside the run.
#[test]
fn a_search_counts_the_backends_of_its_run_that_stand_before() {
    let mut random = random();
    let halves = [0, 1, 1 << 63, u64::MAX, 0x7fff_ffff_ffff_ffff];
    for round in 0..4_000u32 {
        let mut place = || {
            let mut half = || match random.random_range(0..2) {
                0 => random.random::<u64>(),
                _ => halves[random.random_range(0..halves.len())],
            };
            let addr = (u128::from(half()) << 64 | u128::from(half())).to_be_bytes();
            (addr, random.random_range(0..3u16) * 0x7fff)
        };
        let mut run: Vec<_> = (0..round % 20).map(|_| place()).collect();
        run.sort_unstable();
        run.dedup();
        let wanted = [vec![place()], run.clone()].concat();
        let len = run.len() as u32;
        let start = 500;
        let mut memory = Memory::default();
        for beside in [start - 1, start + len, start + len + 1] {
            memory.backends.insert(beside, Backend::default());
        }
        for (index, &(addr, port)) in (start..).zip(&run) {
            let row = Backend {
                addr: Addr(addr),
                port: Port::from(port),
                ..Backend::default()
            };
            memory.backends.insert(index, row);
        }
        for place in wanted {
            let before = run.iter().filter(|row| **row < place).count() as u32;
            let (high, low) = words(&Addr(place.0));
            let found = search(&memory, start, len, high, low, place.1.into());
            assert_eq!(found, before, "{run:02x?} {place:02x?}");
        }
    }
}

/// Who looks for a free port meets another one each time.
#[test]
fn no_two_numbers_are_mixed_to_one() {
    let mixed: BTreeSet<u32> = (0..100_000).map(mixed).collect();
    assert_eq!(mixed.len(), 100_000);
}

/// Conversations that differ in one bit are as good as unrelated: each bit of their numbers differs in half of the cases.
#[test]
fn every_bit_of_a_conversation_has_a_say_in_every_bit_of_its_number() {
    let mut random = random();
    let rounds = 600;
    let bits = [0, 9, 31, 63, 64, 100, 127, 128, 191, 200, 255, 256, 270];
    for bit in bits {
        let mut flips = [0; 32];
        for _ in 0..rounds {
            let mut ends = [0u8; 36];
            random.fill(&mut ends[..]);
            let key = |ends: &[u8; 36]| WayKey {
                source: Addr(ends[..16].try_into().unwrap()),
                destination: Addr(ends[16..32].try_into().unwrap()),
                source_port: Port([ends[32], ends[33]]),
                destination_port: Port([ends[34], ends[35]]),
                protocol: Protocol::TCP,
                ..WayKey::default()
            };
            let one = hash(&key(&ends));
            ends[bit / 8] ^= 1 << (bit % 8);
            let other = hash(&key(&ends));
            for (number, flips) in flips.iter_mut().enumerate() {
                *flips += (one ^ other) >> number & 1;
            }
        }
        for (number, flips) in flips.into_iter().enumerate() {
            let half = rounds / 2;
            assert!(
                flips.abs_diff(half) < rounds / 8,
                "{bit} in {number}: {flips} of {rounds}"
            );
        }
    }
}
