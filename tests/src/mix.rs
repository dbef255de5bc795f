//! Random frames that know the [`world`](crate::world): most of them begin or continue conversations,
//! some answer what was let through before, some are spoiled in one place.

use std::collections::VecDeque;
use std::net::IpAddr;

use proptest::prelude::RngExt;
use proptest::test_runner::{RngAlgorithm, TestRng};
use weir_common::event::Hook;
use weir_common::way::{Mark, WayKey};
use weir_common::{Addr, Port, Protocol};
use weir_datapath::{Packet as _, Verdict};

use crate::bytes::{Bytes, leaving, marked};
use crate::fragments::{extend, is_folded, split};
use crate::frames::{ACK, Echo, FIN, Ip, L3, RST, SYN, Transport};
use crate::world::{
    CHANGING, EMPTY, Family, HOST_PORT, Host, NAT_PORT, NEAR, NODE_PORT, OWN, OWN_NODE_PORT, PODS,
    REMOTE, SERVICE_PORT, STICKY, UPLINK, node_port,
};

/// A source of frames, the same for the same seed.
#[derive(Debug)]
pub struct Mix {
    rng: TestRng,
    /// What was let through lately at a pod: as it left, with its mark, and at which pod's device.
    passed: VecDeque<(WayKey, Vec<u8>, Mark, u32)>,
    /// What has left the node lately: as others see it, and the packet.
    left: VecDeque<(WayKey, Vec<u8>)>,
    /// What came in and is on its way out again, half translated, with its mark.
    on_its_way: VecDeque<(Vec<u8>, Mark)>,
    /// Fragments of packets whose first one has been sent, or may still be.
    parts: VecDeque<Arrival>,
    /// The latest identification.
    identification: u32,
}

/// A frame and the program that it meets.
#[derive(Clone, Debug)]
pub struct Arrival {
    pub hook: Hook,
    pub packet: Bytes,
}

const HOSTS: [Host; 16] = [
    Host::A,
    Host::B,
    Host::C,
    Host::D,
    Host::Far,
    Host::Farther,
    Host::Node,
    Host::World,
    Host::Service(1),
    Host::Service(2),
    Host::Service(3),
    Host::Service(4),
    Host::Service(5),
    Host::Service(6),
    Host::Service(7),
    Host::OtherNode,
];

/// What a pod asks for: services, and ports of nodes.
const ASKED: [(Host, u16); 12] = [
    (NEAR, SERVICE_PORT),
    (NEAR, SERVICE_PORT),
    (REMOTE, SERVICE_PORT),
    (REMOTE, SERVICE_PORT),
    (CHANGING, SERVICE_PORT),
    (STICKY, SERVICE_PORT),
    (STICKY, SERVICE_PORT),
    (Host::Node, NODE_PORT),
    (Host::OtherNode, NODE_PORT),
    (Host::Node, OWN_NODE_PORT),
    (Host::OtherNode, OWN_NODE_PORT),
    (Host::Node, HOST_PORT),
];

/// Where those outside send to: node ports of every service, and the port that may stand for others.
const NET_PORTS: [u16; 12] = [
    80,
    8080,
    30_080,
    node_port(NEAR),
    node_port(NEAR),
    node_port(REMOTE),
    node_port(REMOTE),
    node_port(EMPTY),
    node_port(CHANGING),
    node_port(OWN),
    NAT_PORT,
    NAT_PORT + 1,
];

impl Mix {
    pub fn new(seed: u64) -> Self {
        let mut bytes = [0; 32];
        bytes[..8].copy_from_slice(&seed.to_le_bytes());
        Self {
            rng: TestRng::from_seed(RngAlgorithm::ChaCha, &bytes),
            passed: VecDeque::new(),
            left: VecDeque::new(),
            on_its_way: VecDeque::new(),
            parts: VecDeque::new(),
            identification: 0,
        }
    }

    /// A number below a bound.
    pub fn below(&mut self, bound: usize) -> usize {
        self.rng.random_range(0..bound)
    }

    fn one_of<T: Copy>(&mut self, all: &[T]) -> T {
        all[self.below(all.len())]
    }

    /// The next frame for a program, in a family.
    pub fn arrival(&mut self, hook: Hook, family: Family) -> Arrival {
        if self.below(6) == 0
            && let Some(part) = self.later(hook, family)
        {
            return part;
        }
        let arrival = self.whole(hook, family);
        match self.below(8) {
            0 => self.in_parts(arrival),
            1 if family == Family::V6 => self.extended(arrival),
            _ => arrival,
        }
    }

    /// A fragment of what has been sent lately.
    fn later(&mut self, hook: Hook, family: Family) -> Option<Arrival> {
        let at = self.below(self.parts.len().max(1));
        let mut part = self.parts.get(at)?.clone();
        let ethertype = part.packet.frame.get(12..14)?;
        if part.hook != hook || (ethertype[0] == 0x08) != (family == Family::V4) {
            return None;
        }
        if self.below(10) == 0 {
            self.spoil(&mut part.packet.frame, family);
        }
        Some(part)
    }

    /// The first fragment of a packet; the others are kept.
    fn in_parts(&mut self, mut arrival: Arrival) -> Arrival {
        let frame = &arrival.packet.frame;
        // Room for options; nothing that is spoiled or in fragments already.
        if frame.len() < L3 + 80 || is_folded(frame) || !matches!(frame[L3], 0x45 | 0x60) {
            return arrival;
        }
        // Now and then the same as of another packet.
        self.identification += u32::from(self.below(8) != 0);
        let number = self.identification;
        let size = self.one_of(&[8, 16, 24, 24, 32, 48]);
        let mut parts = split(&arrival.packet.frame, number, size).into_iter();
        arrival.packet.frame = parts.next().unwrap_or_default();
        for frame in parts {
            let mut part = arrival.clone();
            part.packet.frame = frame;
            push(&mut self.parts, part);
        }
        arrival
    }

    /// The same behind extension headers.
    fn extended(&mut self, mut arrival: Arrival) -> Arrival {
        if arrival.packet.frame.len() < L3 + 40 {
            return arrival;
        }
        for _ in 0..=self.below(3) {
            let number = self.one_of(&[0, 0, 43, 44, 60, 60, 50]);
            let mut says = [self.one_of(&[0, 0, 0, 1, 2]), 1, 0, 0, 0, 0, 0];
            if number == 43 || number == 44 {
                (says[1], says[2]) = (self.one_of(&[0, 2, 4]), self.one_of(&[0, 0, 1]));
            }
            let length = 7 + 8 * usize::from(says[0]);
            let mut says = says.to_vec();
            says.resize(if number == 44 { 7 } else { length }, 0);
            arrival.packet.frame = extend(&arrival.packet.frame, &[(number, &says)]);
        }
        arrival
    }

    /// The next whole frame.
    fn whole(&mut self, hook: Hook, family: Family) -> Arrival {
        if hook == Hook::TO_NET && self.below(2) == 0 {
            return self.leaving(family);
        }
        let answer = if self.below(3) == 0 || hook == Hook::FROM_NET && self.below(2) == 0 {
            self.answer(hook, family)
        } else {
            None
        };
        let (ifindex, mut ip, transport) = answer.unwrap_or_else(|| self.question(hook, family));
        if family == Family::V4 && self.below(8) == 0 {
            ip.options = 4 * (1 + self.below(10));
        }
        let mut frame = ip.frame(&transport);
        if self.below(6) == 0 {
            self.spoil(&mut frame, family);
        }
        let mut packet = Bytes::new(ifindex, frame);
        if hook == Hook::TO_NET {
            let all = [
                Mark::NONE,
                Mark::PASSED,
                Mark::LEAVING,
                Mark::LEAVING,
                Mark::REPLY,
            ];
            packet.mark = self.one_of(&all).bits() | self.one_of(&[0, 0xffff_c0ff]);
            if self.below(4) == 0 {
                packet.mark = Mark::TRANSLATED.bits();
            }
        }
        if hook == Hook::TO_POD && self.below(6) == 0 {
            packet.received_by = 0;
        }
        if hook == Hook::TO_POD && self.below(6) == 0 {
            packet.mark = self.one_of(&[Mark::TRANSLATED, Mark::PASSED]).bits();
        }
        Arrival { hook, packet }
    }

    /// What a pod was let send, where it leaves the node.
    fn leaving(&mut self, family: Family) -> Arrival {
        let is_back = self.below(3) == 0;
        let found = if is_back {
            let at = self.below(self.on_its_way.len().max(1));
            self.on_its_way.get(at).cloned()
        } else {
            let at = self.below(self.passed.len().max(1));
            let found = self.passed.get(at);
            found.map(|(_, packet, mark, _)| (packet.clone(), *mark))
        };
        let packet = found.filter(|(packet, _)| {
            packet
                .first()
                .is_some_and(|first| (first >> 4 == 4) == (family == Family::V4))
        });
        let Some((packet, mark)) = packet else {
            let hook = Hook::FROM_POD;
            let (_, ip, transport) = self.question(hook, family);
            let packet = leaving(UPLINK, ip.frame(&transport));
            return Arrival {
                hook: Hook::TO_NET,
                packet,
            };
        };
        let mut frame = vec![2; 12];
        frame.extend(match family {
            Family::V4 => [0x08, 0x00],
            Family::V6 => [0x86, 0xdd],
        });
        frame.extend(packet);
        if self.below(8) == 0 {
            self.spoil(&mut frame, family);
        }
        let packet = marked(UPLINK, frame, mark);
        let hook = Hook::TO_NET;
        Arrival { hook, packet }
    }

    /// Tells what became of a frame.
    pub fn became(&mut self, hook: Hook, verdict: Verdict, tuple: WayKey, after: &Bytes) {
        if matches!(verdict, Verdict::Drop(_) | Verdict::Refuse(_)) {
            return;
        }
        let packet = after.frame.get(L3..).unwrap_or_default().to_vec();
        let mark = Mark::of(after.mark);
        if is_folded(&after.frame) {
            if matches!(mark, Mark::TRANSLATED | Mark::REPLY | Mark::LEAVING) {
                push(&mut self.on_its_way, (packet, mark));
            }
            return;
        }
        if hook == Hook::FROM_NET {
            if matches!(mark, Mark::TRANSLATED | Mark::REPLY) {
                push(&mut self.on_its_way, (packet, mark));
            }
            return;
        }
        let tuple = as_sent(tuple, after);
        if hook == Hook::TO_NET {
            push(&mut self.left, (tuple, packet));
        } else {
            push(&mut self.passed, (tuple, packet, mark, after.ifindex));
        }
    }

    /// A packet that nothing came before.
    fn question(&mut self, hook: Hook, family: Family) -> (u32, Ip, Transport) {
        let (pod, ifindex) = self.one_of(&PODS);
        if hook == Hook::TO_NET || hook == Hook::FROM_NET {
            return self.passing_by(hook, family);
        }
        let is_asking = hook == Hook::FROM_POD && self.below(3) == 0;
        let (other, asked) = if is_asking {
            self.one_of(&ASKED)
        } else {
            (self.one_of(&HOSTS), 0)
        };
        let mut ip = if hook == Hook::FROM_POD {
            Ip::between(pod.ip(family), other.ip(family))
        } else {
            Ip::between(other.ip(family), pod.ip(family))
        };
        ip.source_mac = pod.mac();
        if self.below(20) == 0 {
            ip.source = self.one_of(&HOSTS).ip(family);
        }
        if self.below(20) == 0 {
            ip.destination = self.one_of(&HOSTS).ip(family);
        }
        let mut ports = (
            self.one_of(&[1000, 1001, 1002, 1003, 1004, 1005, 8080, 80, 0]),
            self.one_of(&[80, 80, 80, 8080, 8080, 1000, 53, 1, 0]),
        );
        if is_asking {
            ports.1 = asked;
        }
        (ifindex, ip, self.transport(ports))
    }

    /// A packet at the uplink that nothing came before.
    fn passing_by(&mut self, hook: Hook, family: Family) -> (u32, Ip, Transport) {
        let near = self.one_of(&[Host::Node, Host::Node, Host::A, Host::B, Host::Service(1)]);
        let far = self.one_of(&HOSTS);
        let ports = (
            self.one_of(&[1000, 1001, 8080, 53, NAT_PORT]),
            self.one_of(&NET_PORTS),
        );
        let ip = if hook == Hook::TO_NET {
            Ip::between(near.ip(family), far.ip(family))
        } else {
            Ip::between(far.ip(family), near.ip(family))
        };
        let ifindex = self.one_of(&[UPLINK, UPLINK, UPLINK, 2001]);
        (ifindex, ip, self.transport(ports))
    }

    /// An answer to something that was let through, where the answer would come by.
    fn answer(&mut self, hook: Hook, family: Family) -> Option<(u32, Ip, Transport)> {
        let (tuple, packet, _, sent_by) = if hook == Hook::FROM_NET {
            let at = self.below(self.left.len().max(1));
            let (tuple, packet) = self.left.get(at)?.clone();
            (tuple, packet, Mark::NONE, UPLINK)
        } else {
            let at = self.below(self.passed.len().max(1));
            self.passed.get(at)?.clone()
        };
        let mut back = WayKey::default();
        back.set_reversed(&tuple, hook);
        let (source, destination) = (IpAddr::from(back.source), IpAddr::from(back.destination));
        let has_family = |ip: IpAddr| ip.is_ipv4() == (family == Family::V4);
        if !has_family(source) || !has_family(destination) {
            return None;
        }
        let pod = |ip: IpAddr| PODS.iter().find(|(pod, _)| pod.ip(family) == ip);
        let (device, mac) = if hook == Hook::FROM_POD {
            let (pod, ifindex) = pod(source)?;
            (*ifindex, pod.mac())
        } else {
            (sent_by, [2, 0, 0, 0, 0, 9])
        };
        let mut ip = Ip::between(source, destination);
        ip.source_mac = mac;
        let ports = (back.source_port.into(), back.destination_port.into());
        let transport = if self.below(6) == 0 {
            let length = self.one_of(&[28, 48, 60, 100]);
            Transport::Unreachable {
                quoted: packet.iter().copied().take(length).collect(),
            }
        } else {
            match tuple.protocol {
                Protocol::TCP => Transport::Tcp {
                    ports,
                    flags: self.one_of(&[SYN | ACK, SYN | ACK, ACK, ACK, FIN | ACK, RST, SYN]),
                    payload: self.payload(),
                },
                Protocol::UDP => Transport::Udp {
                    ports,
                    payload: self.payload(),
                },
                Protocol::ICMP => Transport::Echo {
                    way: self.one_of(&[Echo::Reply, Echo::Reply, Echo::Request]),
                    identifier: tuple.source_port.into(),
                },
                Protocol::SCTP => Transport::Sctp { ports },
                other => Transport::Other {
                    protocol: other.0,
                    payload: self.payload(),
                },
            }
        };
        Some((device, ip, transport))
    }

    fn transport(&mut self, ports: (u16, u16)) -> Transport {
        match self.below(16) {
            0..=6 => Transport::Tcp {
                ports,
                flags: self.one_of(&[SYN, SYN, SYN, ACK, FIN | ACK, RST, RST | ACK, SYN | ACK, 0]),
                payload: self.payload(),
            },
            7..=11 => Transport::Udp {
                ports,
                payload: self.payload(),
            },
            12 => Transport::Sctp { ports },
            13 => Transport::Other {
                protocol: self.one_of(&[1, 4, 41, 47, 58, 99, 255]),
                payload: self.payload(),
            },
            14 => Transport::Echo {
                way: self.one_of(&[Echo::Request, Echo::Reply]),
                identifier: ports.0,
            },
            _ => Transport::Unreachable {
                quoted: self.payload(),
            },
        }
    }

    fn payload(&mut self) -> Vec<u8> {
        let length = self.one_of(&[0, 1, 2, 7, 24, 60, 200]);
        (0..length).map(|_| self.rng.random()).collect()
    }

    fn spoil(&mut self, frame: &mut Vec<u8>, family: Family) {
        match self.below(9) {
            0 => {
                let length = self.below(frame.len()) + 1;
                frame.truncate(length);
            }
            1 => {
                let at = self.below(frame.len());
                frame[at] = self.rng.random();
            }
            2 => {
                let at = self.below(frame.len().min(64));
                frame[at] ^= 1 << self.below(8);
            }
            3 => {
                let ethertype: u16 = self.one_of(&[0x8100, 0x88a8, 0x9100, 0x0806, 0x0800, 0x86dd]);
                frame[12..14].copy_from_slice(&ethertype.to_be_bytes());
            }
            4 => frame[6 + self.below(6)] ^= 1 << self.below(8),
            // A fragment; an extension header.
            5 if family == Family::V4 => {
                frame[L3 + 6] = self.one_of(&[0x20, 0x3f, 0x00]);
                frame[L3 + 7] = self.one_of(&[0, 1, 0xff]);
            }
            5 => frame[L3 + 6] = self.one_of(&[0, 43, 44, 50, 51, 59, 60, 135, 253]),
            // The length of the header; the version.
            6 => frame[L3] = self.rng.random(),
            // Martians, and IPv4-mapped addresses.
            7 => {
                let source = usize::from(self.below(2) == 0);
                if family == Family::V4 {
                    frame[L3 + 16 - 4 * source] = self.one_of(&[0, 127, 224, 239, 240, 255]);
                } else {
                    let at = L3 + 24 - 16 * source;
                    let start: [u8; 12] = self.one_of(&[
                        [0; 12],
                        [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff],
                        [0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
                    ]);
                    if let Some(place) = frame.get_mut(at..at + 12) {
                        place.copy_from_slice(&start);
                    }
                }
            }
            // No checksum, or one that is the other spelling of zero.
            _ => {
                let header = if family == Family::V4 {
                    usize::from(frame[L3] & 0xf) * 4
                } else {
                    40
                };
                let protocol = frame[L3 + if family == Family::V4 { 9 } else { 6 }];
                let at = L3 + header + if protocol == 6 { 16 } else { 6 };
                let value = self.one_of(&[0, 0xff]);
                if let Some(field) = frame.get_mut(at..at + 2) {
                    field.fill(value);
                }
            }
        }
    }
}

/// The ends of a conversation as the packet shows them that was let through.
pub fn as_sent(mut tuple: WayKey, after: &Bytes) -> WayKey {
    let ends = match after.frame.get(12..15) {
        Some([0x08, 0x00, first]) => {
            let at = |offset| after.load::<4>(offset).ok().map(Addr::v4);
            (at(26), at(30), L3 + usize::from(first & 0xf) * 4)
        }
        _ => {
            let at = |offset| after.load::<16>(offset).ok().map(Addr);
            (at(22), at(38), L3 + 40)
        }
    };
    let (Some(source), Some(destination), transport) = ends else {
        return tuple;
    };
    (tuple.source, tuple.destination) = (source, destination);
    match tuple.protocol {
        Protocol::TCP | Protocol::UDP => {
            if let Ok([a, b, c, d]) = after.load::<4>(transport) {
                (tuple.source_port, tuple.destination_port) = (Port([a, b]), Port([c, d]));
            }
        }
        Protocol::ICMP if tuple.source_port != Port::ABSENT => {
            if let Ok(identifier) = after.load::<2>(transport + 4) {
                tuple.source_port = Port(identifier);
            }
        }
        _ => {}
    }
    tuple
}

/// Keeps the latest.
fn push<T>(queue: &mut VecDeque<T>, latest: T) {
    if queue.len() == 64 {
        queue.pop_front();
    }
    queue.push_back(latest);
}
