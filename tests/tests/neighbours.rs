//! Ring 1: who a pod asks for by ARP and by neighbour discovery, and the bytes of the answer, from the RFCs.

use std::net::{IpAddr, Ipv6Addr};

use weir_common::device::Device;
use weir_common::event::Hook;
use weir_datapath::l3::Family as Kind;
use weir_datapath::{Scratch, Verdict, neighbour};
use weir_tests::bytes::{Bytes, Vlan};
use weir_tests::frames::{L3, checksum, checksums_are_right};
use weir_tests::stories::decide;
use weir_tests::world::{Family, Host, world};

const GATEWAY_V4: [u8; 4] = [169, 254, 1, 1];
const GATEWAY_V6: [u8; 16] = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1).octets();
const NODES: [u8; 16] = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 1, 0xff00, 1).octets();
const HOST: [u8; 6] = [0xee, 0xdd, 0xcc, 0xbb, 0xaa, 0x99];
const ALL: [u8; 6] = [0xff; 6];

fn v4(host: Host) -> [u8; 4] {
    match host.ip(Family::V4) {
        IpAddr::V4(ip) => ip.octets(),
        IpAddr::V6(ip) => panic!("{ip}"),
    }
}

fn v6(host: Host) -> [u8; 16] {
    match host.ip(Family::V6) {
        IpAddr::V6(ip) => ip.octets(),
        IpAddr::V4(ip) => panic!("{ip}"),
    }
}

/// Who sends an Ethernet frame to whom, and who says in it who has what.
fn arp(
    between: [[u8; 6]; 2],
    operation: u8,
    of: ([u8; 6], [u8; 4]),
    to: ([u8; 6], [u8; 4]),
) -> Vec<u8> {
    let head = [8, 6, 0, 1, 8, 0, 6, 4, 0, operation];
    let [from, at] = between;
    [&at[..], &from, &head, &of.0, &of.1, &to.0, &to.1].concat()
}

/// A message of ICMPv6 about the gateway, with its flags, and an option.
#[derive(Clone)]
struct Message {
    macs: [[u8; 6]; 2],
    from: [u8; 16],
    to: [u8; 16],
    hops: u8,
    kind: [u8; 2],
    flags: u8,
    target: [u8; 16],
    options: Vec<u8>,
}

impl Message {
    fn frame(&self) -> Vec<u8> {
        let mut body = [
            &self.kind[..],
            &[0, 0, self.flags, 0, 0, 0],
            &self.target,
            &self.options,
        ]
        .concat();
        let length = body.len() as u8;
        let pseudo = [0, 0, 0, length, 0, 0, 0, 58];
        let sum = checksum(&[&self.from, &self.to, &pseudo, &body]);
        body[2..4].copy_from_slice(&sum.to_be_bytes());
        let [from, at] = &self.macs;
        let head = [0x86, 0xdd, 0x60, 0, 0, 0, 0, length, 58, self.hops];
        [&at[..], from, &head, &self.from, &self.to, &body].concat()
    }
}

fn request() -> Vec<u8> {
    let mac = Host::B.mac();
    arp([mac, ALL], 1, (mac, v4(Host::B)), ([0; 6], GATEWAY_V4))
}

fn solicitation() -> Message {
    let mac = Host::B.mac();
    Message {
        macs: [mac, [0x33, 0x33, 0xff, 0, 0, 1]],
        from: v6(Host::B),
        to: NODES,
        hops: 255,
        kind: [135, 0],
        flags: 0,
        target: GATEWAY_V6,
        options: [&[1, 1][..], &mac].concat(),
    }
}

/// Each question that the gateway's neighbour may ask, and its answer.
fn questions() -> [(Vec<u8>, Vec<u8>); 6] {
    let mac = Host::B.mac();
    let (us, them) = ((HOST, GATEWAY_V4), (mac, v4(Host::B)));
    let reply = arp([HOST, mac], 2, us, them);
    let again = arp([mac, HOST], 1, them, us);
    let padded = |frame: &[u8]| [frame, &[0; 18]].concat();
    let asked = solicitation();
    let plain = Message {
        options: Vec::new(),
        ..asked.clone()
    };
    let probe = Message {
        macs: [mac, HOST],
        to: GATEWAY_V6,
        ..asked.clone()
    };
    let advertisement = Message {
        macs: [HOST, mac],
        from: GATEWAY_V6,
        to: v6(Host::B),
        hops: 255,
        kind: [136, 0],
        // Router, solicited, override.
        flags: 0xe0,
        target: GATEWAY_V6,
        options: [&[2, 1][..], &HOST].concat(),
    }
    .frame();
    [
        (request(), reply.clone()),
        (padded(&request()), padded(&reply)),
        (again, reply),
        (asked.frame(), advertisement.clone()),
        (plain.frame(), advertisement.clone()),
        (probe.frame(), advertisement),
    ]
}

fn device() -> Device {
    let memory = world();
    let index = Host::B.ifindex().expect("B has a device");
    **memory.devices.get(&index).expect("B has a row")
}

fn packet(frame: Vec<u8>) -> Bytes {
    Bytes::new(Host::B.ifindex().unwrap_or(0), frame)
}

/// What the datapath takes a frame for.
fn asks(frame: &[u8]) -> Option<Kind> {
    neighbour::asks(&packet(frame.to_vec()), &device())
        .ok()
        .flatten()
}

fn number(mac: [u8; 6]) -> u64 {
    mac.iter().fold(0, |sum, byte| sum << 8 | u64::from(*byte))
}

#[test]
fn a_pods_question_for_its_gateway_becomes_the_answer() {
    for (frame, expected) in questions() {
        let Some(family) = asks(&frame) else {
            panic!("{frame:02x?}");
        };
        let mut packet = packet(frame);
        assert_eq!(
            neighbour::answer(&mut packet, family, &device(), number(HOST)),
            Ok(())
        );
        assert_eq!(
            packet.frame, expected,
            "{:02x?} {expected:02x?}",
            packet.frame
        );
        assert!(family == Kind::V4 || checksums_are_right(&packet.frame));
    }
}

/// The program looks for questions only among what is dropped for a few reasons.
#[test]
fn every_question_would_be_dropped_for_a_reason_that_is_looked_at() {
    for (frame, _) in questions() {
        let memory = world();
        let verdict = decide(
            Hook::FROM_POD,
            &mut packet(frame),
            &memory,
            &mut Scratch::default(),
        );
        let Verdict::Drop(reason) = verdict else {
            panic!("{verdict:?}");
        };
        assert!(neighbour::may_ask(reason as u8), "{reason:?}");
    }
}

#[test]
fn a_question_with_any_bit_of_it_changed_is_none() {
    let mut changed = 0;
    for (frame, _) in questions() {
        let (is_arp, length) = (frame[12] == 8, frame.len());
        for bit in 6 * 8..length * 8 {
            let byte = bit / 8;
            // Who is asked for has no address yet, and a frame its padding; class and flow.
            let says_nothing = match is_arp {
                true => (32..38).contains(&byte) || byte >= 42,
                false => (L3 * 8 + 4..L3 * 8 + 32).contains(&bit),
            };
            let mut other = frame.clone();
            other[byte] ^= 0x80 >> (bit % 8);
            assert_eq!(
                asks(&other).is_some(),
                says_nothing,
                "bit {bit} of {frame:02x?}"
            );
            changed += usize::from(!says_nothing);
        }
        let end = if is_arp { 42 } else { length };
        for short in 0..end {
            assert_eq!(asks(&frame[..short]), None, "{short} of {frame:02x?}");
        }
        let mut tagged = packet(frame);
        tagged.vlan = Vlan::Stripped;
        assert_eq!(neighbour::asks(&tagged, &device()), Ok(None));
    }
    assert!(changed > 1500, "{changed}");
}

#[test]
fn nobody_else_is_asked_for_and_nobody_else_answered() {
    let (mac, other) = (Host::B.mac(), Host::A.mac());
    let (mine, theirs) = (v4(Host::B), v4(Host::A));
    let gateway = ([0; 6], GATEWAY_V4);
    let arps = [
        (
            "another pod",
            arp([mac, ALL], 1, (mac, mine), ([0; 6], theirs)),
        ),
        (
            "itself: announced",
            arp([mac, ALL], 1, (mac, mine), ([0; 6], mine)),
        ),
        (
            "a probe (RFC 5227)",
            arp([mac, ALL], 1, (mac, [0; 4]), gateway),
        ),
        (
            "by another's address",
            arp([mac, ALL], 1, (mac, theirs), gateway),
        ),
        (
            "for another's address",
            arp([mac, ALL], 1, (other, mine), gateway),
        ),
        (
            "in another's frame",
            arp([other, ALL], 1, (mac, mine), gateway),
        ),
        ("an answer", arp([mac, ALL], 2, (mac, mine), gateway)),
    ];
    let asked = solicitation();
    let option = |bytes: &[u8], mac: [u8; 6]| [bytes, &mac].concat();
    let link_local = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 2).octets();
    let two = [option(&[1, 1], mac), option(&[14, 1], mac)].concat();
    let messages = [
        (
            "another pod",
            Message {
                target: v6(Host::A),
                ..asked.clone()
            },
        ),
        (
            "itself",
            Message {
                target: v6(Host::B),
                ..asked.clone()
            },
        ),
        (
            "detection of duplicates",
            Message {
                from: [0; 16],
                options: Vec::new(),
                ..asked.clone()
            },
        ),
        (
            "by another's address",
            Message {
                from: v6(Host::A),
                ..asked.clone()
            },
        ),
        (
            "by an address of the link",
            Message {
                from: link_local,
                ..asked.clone()
            },
        ),
        (
            "for another's address",
            Message {
                options: option(&[1, 1], other),
                ..asked.clone()
            },
        ),
        (
            "in another's frame",
            Message {
                macs: [other, ALL],
                ..asked.clone()
            },
        ),
        (
            "to all nodes",
            Message {
                to: Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1).octets(),
                ..asked.clone()
            },
        ),
        (
            "from beyond a router",
            Message {
                hops: 254,
                ..asked.clone()
            },
        ),
        (
            "an unknown code",
            Message {
                kind: [135, 1],
                ..asked.clone()
            },
        ),
        (
            "an answer",
            Message {
                kind: [136, 0],
                flags: 0x60,
                ..asked.clone()
            },
        ),
        (
            "a question for routers",
            Message {
                kind: [133, 0],
                ..asked.clone()
            },
        ),
        (
            "an option without a length",
            Message {
                options: option(&[1, 0], mac),
                ..asked.clone()
            },
        ),
        (
            "two options",
            Message {
                options: two,
                ..asked.clone()
            },
        ),
        (
            "part of an option",
            Message {
                options: vec![1, 1, 2, 0],
                ..asked
            },
        ),
    ];
    let frames = messages.map(|(name, message)| (name, message.frame()));
    for (name, frame) in arps.into_iter().chain(frames) {
        assert_eq!(asks(&frame), None, "{name}: {frame:02x?}");
    }
}

/// The address that stands for none is no IPv4 address, and a pod without one asks for nothing.
#[test]
fn a_pod_without_an_address_of_a_family_is_not_answered_in_it() {
    let none = Device {
        ipv4: weir_common::Addr::ABSENT,
        ipv6: weir_common::Addr::ABSENT,
        ..device()
    };
    let mac = Host::B.mac();
    let absent = Message {
        from: [0; 16],
        ..solicitation()
    };
    let frames = [
        arp([mac, ALL], 1, (mac, [0; 4]), ([0; 6], GATEWAY_V4)),
        request(),
        absent.frame(),
        solicitation().frame(),
    ];
    for frame in frames {
        assert_eq!(
            neighbour::asks(&packet(frame.clone()), &none),
            Ok(None),
            "{frame:02x?}"
        );
    }
}
