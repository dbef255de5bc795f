//! Ring 1: what is refused, and the bytes of the answer.

use std::net::IpAddr;

use weir_common::counter::Counter;
use weir_common::event::Hook;
use weir_common::service::FrontendFlags;
use weir_common::way::Mark;
use weir_common::{DropReason, Protocol};
use weir_datapath::packet::{Changed, Delta};
use weir_datapath::refuse::refuse;
use weir_datapath::{Packet, Scratch, Verdict, from_net, from_pod};
use weir_tests::bytes::Bytes;
use weir_tests::edges::{tcp, udp};
use weir_tests::frames::{
    ACK, Echo, FIN, Ip, L3, RST, SYN, Transport, checksum, checksums_are_right,
};
use weir_tests::refusals::refusal;
use weir_tests::stories::decide;
use weir_tests::tables::Memory;
use weir_tests::world::{
    EMPTY, FAMILIES, Family, Host, NEAR, SERVICE_PORT, UPLINK, node_port, world,
};

/// A frame of pod B to somebody.
fn from_b(family: Family, to: Host, transport: &Transport) -> Bytes {
    let ip = Ip {
        source_mac: Host::B.mac(),
        ..Ip::between(Host::B.ip(family), to.ip(family))
    };
    Bytes::new(Host::B.ifindex().unwrap_or(0), ip.frame(transport))
}

/// A frame of a stranger to the node.
fn from_world(family: Family, transport: &Transport) -> Bytes {
    let ip = Ip::between(Host::World.ip(family), Host::Node.ip(family));
    Bytes::new(UPLINK, ip.frame(transport))
}

fn segment(port: u16, flags: u8, payload: usize) -> Transport {
    Transport::Tcp {
        ports: (1000, port),
        flags,
        payload: vec![7; payload],
    }
}

fn datagram(port: u16, payload: usize) -> Transport {
    Transport::Udp {
        ports: (1000, port),
        payload: vec![7; payload],
    }
}

fn decided(memory: &Memory, hook: Hook, before: &Bytes) -> (Verdict, Bytes) {
    let mut packet = before.clone();
    let verdict = decide(hook, &mut packet, memory, &mut Scratch::default());
    (verdict, packet)
}

#[test]
fn every_refusal_is_the_answer_of_a_closed_port() {
    use DropReason::{NoBackend, NoService};
    let other = |protocol| Transport::Other {
        protocol,
        payload: vec![9; 11],
    };
    let echo = Transport::Echo {
        way: Echo::Request,
        identifier: 7,
    };
    for family in FAMILIES {
        let at = |port| {
            [
                segment(port, SYN, 0),
                segment(port, SYN, 5),
                segment(port, ACK, 0),
                segment(port, ACK, 1400),
                segment(port, FIN, 3),
                segment(port, FIN | ACK, 1),
                datagram(port, 0),
                datagram(port, 1),
                datagram(port, 1400),
            ]
        };
        let (from_pod, from_net) = (Hook::FROM_POD, Hook::FROM_NET);
        let mut cases = Vec::new();
        for transport in at(SERVICE_PORT) {
            cases.push((from_pod, from_b(family, EMPTY, &transport), NoBackend));
        }
        for transport in at(node_port(EMPTY)) {
            cases.push((from_net, from_world(family, &transport), NoBackend));
        }
        let sctp = Transport::Sctp { ports: (1, 2) };
        for transport in at(81).into_iter().chain([sctp, echo.clone(), other(47)]) {
            cases.push((from_pod, from_b(family, NEAR, &transport), NoService));
        }
        for (hook, before, reason) in cases {
            let memory = world();
            let (verdict, after) = decided(&memory, hook, &before);
            assert_eq!(verdict, Verdict::Refuse(reason), "{before:02x?}");
            assert_eq!(after.frame, refusal(&before.frame), "{before:02x?}");
            assert!(checksums_are_right(&after.frame), "{after:02x?}");
            assert_eq!(Mark::of(after.mark), Mark::NONE);
            assert_eq!(memory.counted(Counter::Refusals), 1);
            assert!(memory.plans.borrow().is_empty() && memory.ways.borrow().is_empty());
        }
    }
}

/// The checksum covers all of both addresses.
#[test]
fn a_stranger_with_an_address_without_zeros_is_refused_too() {
    let stranger = |family| match family {
        Family::V4 => IpAddr::from([198, 51, 100, 77]),
        Family::V6 => IpAddr::from([
            0x2001, 0x0db8, 0x1234, 0x5678, 0x9abc, 0xdef0, 0x1357, 0x2468,
        ]),
    };
    for family in FAMILIES {
        let ip = Ip::between(stranger(family), Host::Node.ip(family));
        for transport in [
            segment(node_port(EMPTY), SYN, 0),
            datagram(node_port(EMPTY), 9),
        ] {
            let before = Bytes::new(UPLINK, ip.frame(&transport));
            let (verdict, after) = decided(&world(), Hook::FROM_NET, &before);
            assert_eq!(verdict, Verdict::Refuse(DropReason::NoBackend));
            assert_eq!(after.frame, refusal(&before.frame));
            assert!(checksums_are_right(&after.frame), "{after:02x?}");
        }
    }
}

#[test]
fn a_segment_to_a_backend_that_is_gone_is_refused_in_its_numbers() {
    for family in FAMILIES {
        let id = if family == Family::V4 { 1 } else { 11 };
        let mut memory = world();
        let pod = |flags| from_b(family, Host::Service(2), &segment(SERVICE_PORT, flags, 9));
        let id_far = id + 1;
        let (verdict, _) = decided(&memory, Hook::FROM_POD, &pod(SYN));
        assert_eq!(verdict, Verdict::Pass);
        let ip = Ip::between(Host::Far.ip(family), Host::B.ip(family));
        let answer = ip.frame(&tcp(8080, 1000, SYN | ACK));
        let answer = Bytes::new(Host::B.ifindex().unwrap_or(0), answer);
        let answer = Bytes {
            received_by: UPLINK,
            ..answer
        };
        for (hook, packet) in [(Hook::TO_POD, &answer), (Hook::FROM_POD, &pod(ACK))] {
            let (verdict, _) = decided(&memory, hook, packet);
            assert_eq!(verdict, Verdict::Pass);
            assert_eq!(memory.counted(Counter::Refusals), 0);
        }
        let live = memory.live.entry(id_far).or_default();
        *live = live.gone();
        for (flags, is_answered) in [
            (ACK, true),
            (FIN | ACK, true),
            (RST | ACK, false),
            (RST, false),
        ] {
            let before = pod(flags);
            let (verdict, after) = decided(&memory, Hook::FROM_POD, &before);
            let reason = DropReason::BackendGone;
            if is_answered {
                assert_eq!(verdict, Verdict::Refuse(reason));
                assert_eq!(after.frame, refusal(&before.frame));
            } else {
                assert_eq!(verdict, Verdict::Drop(reason), "a RST is never answered");
                assert_eq!(after, before);
            }
        }
    }
}

#[test]
fn what_may_not_be_answered_is_dropped_in_silence_and_untouched() {
    let short = Transport::Other {
        protocol: 47,
        payload: vec![1; 7],
    };
    for family in FAMILIES {
        let net = from_world(family, &udp(1, node_port(EMPTY)));
        let pod = from_b(family, EMPTY, &udp(1, SERVICE_PORT));
        let spoiled = |packet: &Bytes, at: usize, bytes: &[u8]| {
            let mut packet = packet.clone();
            packet.frame[at..at + bytes.len()].copy_from_slice(bytes);
            packet
        };
        let source = if family == Family::V4 { 12 } else { 8 };
        let mut cases = vec![
            (
                "a broadcast of the link",
                Hook::FROM_NET,
                spoiled(&net, 0, &[0xff; 6]),
            ),
            (
                "a multicast of the link",
                Hook::FROM_POD,
                spoiled(&pod, 0, &[0x33, 0x33]),
            ),
            (
                "from a group",
                Hook::FROM_NET,
                spoiled(
                    &net,
                    L3 + source,
                    &[if family == Family::V4 { 224 } else { 0xff }],
                ),
            ),
            (
                "nothing to quote",
                Hook::FROM_POD,
                from_b(family, NEAR, &short),
            ),
        ];
        if family == Family::V4 {
            let ip = Ip {
                source_mac: Host::B.mac(),
                options: 4,
                ..Ip::between(Host::B.ip(family), EMPTY.ip(family))
            };
            let frame = ip.frame(&tcp(1000, SERVICE_PORT, SYN));
            cases.push(("options", Hook::FROM_POD, Bytes { frame, ..pod }));
        }
        for (name, hook, before) in cases {
            let memory = world();
            let (verdict, after) = decided(&memory, hook, &before);
            assert!(
                matches!(
                    verdict,
                    Verdict::Drop(DropReason::NoBackend | DropReason::NoService)
                ),
                "{name}: {verdict:?}"
            );
            assert_eq!(after, before, "{name}");
            assert_eq!(memory.counted(Counter::Refusals), 0, "{name}");
        }
    }
}

#[test]
fn a_local_policy_without_an_endpoint_here_is_silence() {
    let mut memory = world();
    for frontend in memory.frontends.values_mut() {
        frontend.flags |= FrontendFlags::DROP_WHEN_EMPTY;
    }
    for family in FAMILIES {
        for (hook, before) in [
            (
                Hook::FROM_NET,
                from_world(family, &tcp(1, node_port(EMPTY), SYN)),
            ),
            (Hook::FROM_POD, from_b(family, EMPTY, &udp(1, SERVICE_PORT))),
        ] {
            let (verdict, after) = decided(&memory, hook, &before);
            assert_eq!(verdict, Verdict::Drop(DropReason::NoLocalBackend));
            assert_eq!(after, before);
        }
    }
}

#[test]
fn only_a_cluster_ip_is_refused_where_no_service_is() {
    for family in FAMILIES {
        let memory = world();
        for to in [Host::Node, Host::OtherNode, Host::World, Host::Far] {
            let (verdict, _) = decided(
                &memory,
                Hook::FROM_POD,
                &from_b(family, to, &tcp(1, 81, SYN)),
            );
            assert_eq!(verdict, Verdict::Pass, "{to:?}");
        }
        // From outside a cluster IP is nobody's.
        let ip = Ip::between(Host::World.ip(family), NEAR.ip(family));
        let packet = Bytes::new(UPLINK, ip.frame(&tcp(1, 81, SYN)));
        assert_eq!(decided(&memory, Hook::FROM_NET, &packet).0, Verdict::Pass);
    }
}

/// A frame whose transport checksum is left to a device: it holds the sum of the pseudo-header, and stays so until the
/// device sums up what is there (`skb_checksum_help`).
struct Offloaded {
    bytes: Bytes,
    start: usize,
    checksum: usize,
}

impl Offloaded {
    fn new(mut bytes: Bytes) -> Self {
        let is_v4 = bytes.frame[L3] >> 4 == 4;
        let start = L3 + if is_v4 { 20 } else { 40 };
        let protocol = bytes.frame[if is_v4 { L3 + 9 } else { L3 + 6 }];
        let at = start
            + if Protocol(protocol) == Protocol::TCP {
                16
            } else {
                6
            };
        // What is in the field before the device has summed up: all of it but what follows the pseudo-header.
        let field = u16::from_be_bytes([bytes.frame[at], bytes.frame[at + 1]]);
        bytes.frame[at..at + 2].fill(0);
        let body = checksum(&[&bytes.frame[start..]]);
        let pseudo = checksum(&[&(!field).to_be_bytes(), &body.to_be_bytes()]);
        bytes.frame[at..at + 2].copy_from_slice(&(!pseudo).to_be_bytes());
        Self {
            bytes,
            start,
            checksum: at,
        }
    }

    /// The frame as the device sends it.
    fn sent(mut self) -> Vec<u8> {
        let sum = match checksum(&[&self.bytes.frame[self.start..]]) {
            0 => 0xffff,
            sum => sum,
        };
        self.bytes.frame[self.checksum..self.checksum + 2].copy_from_slice(&sum.to_be_bytes());
        self.bytes.frame
    }
}

impl Packet for Offloaded {
    fn ifindex(&self) -> u32 {
        self.bytes.ifindex()
    }
    fn len(&self) -> u32 {
        self.bytes.len()
    }
    fn has_stripped_vlan(&self) -> bool {
        false
    }
    fn received_by(&self) -> u32 {
        self.bytes.received_by
    }
    fn is_of_socket(&self) -> bool {
        self.bytes.is_of_socket
    }
    fn load<const N: usize>(&self, offset: usize) -> Result<[u8; N], DropReason> {
        self.bytes.load(offset)
    }
    fn store<const N: usize>(&mut self, offset: usize, bytes: &[u8; N]) -> Result<(), DropReason> {
        self.bytes.store(offset, bytes)
    }
    fn fix_checksum(
        &mut self,
        at: usize,
        changed: Changed,
        delta: Delta,
    ) -> Result<(), DropReason> {
        match changed {
            Changed::Ports(_) => Ok(()),
            _ => self.bytes.fix_checksum(at, changed, delta),
        }
    }
    fn resize(&mut self, len: u32) -> Result<(), DropReason> {
        self.bytes.resize(len)
    }
    fn set_mark(&mut self, mark: Mark) {
        self.bytes.set_mark(mark);
    }
    fn mark(&self) -> Mark {
        self.bytes.mark()
    }
}

#[test]
fn a_refusal_is_right_when_a_device_has_summed_it_up() {
    for family in FAMILIES {
        for (hook, before) in [
            (
                Hook::FROM_POD,
                from_b(family, EMPTY, &segment(SERVICE_PORT, SYN, 0)),
            ),
            (
                Hook::FROM_POD,
                from_b(family, EMPTY, &datagram(SERVICE_PORT, 31)),
            ),
            (
                Hook::FROM_NET,
                from_world(family, &segment(node_port(EMPTY), ACK, 1400)),
            ),
            (
                Hook::FROM_NET,
                from_world(family, &datagram(node_port(EMPTY), 1400)),
            ),
        ] {
            let memory = world();
            let mut packet = Offloaded::new(before.clone());
            let quoted = packet.bytes.frame.clone();
            assert_eq!(
                Offloaded::new(before.clone()).sent(),
                before.frame,
                "the test's own"
            );
            let mut scratch = Scratch::default();
            let verdict = if hook == Hook::FROM_POD {
                from_pod(&mut packet, &memory, &mut scratch)
            } else {
                from_net(&mut packet, &memory, &mut scratch)
            };
            assert_eq!(verdict, Verdict::Refuse(DropReason::NoBackend));
            assert_eq!(refuse(&mut packet, &scratch), Ok(()));
            let (start, at) = (packet.start, packet.checksum);
            let mut sent = packet.sent();
            assert!(checksums_are_right(&sent), "{sent:02x?}");
            // Of a datagram the device writes into what nobody reads.
            if at == start + 6 {
                assert_eq!(sent[at..at + 2], [0xff; 2]);
                sent[at..at + 2].fill(0);
            }
            assert_eq!(sent, refusal(&quoted));
        }
    }
}
