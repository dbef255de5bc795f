//! Packets as the model sees them: from whom to whom, and what they say; written to bytes, and read back by the
//! formats' own texts (RFC 791, 8200, 768, 9293, 792, 4443).

use std::net::{IpAddr, SocketAddr};

use weir_common::event::Hook;
use weir_common::way::WayKey;
use weir_common::{Addr, Protocol};

use crate::frames::{ACK, FIN, Ip, L3, RST, SYN, Transport, checksum};

/// What is spoken.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum Talk {
    Tcp,
    Udp,
    Echo,
}

/// From whom to whom. An echo's identifier is its requester's port; the other one is 0.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub struct Tuple {
    pub talk: Talk,
    pub from: SocketAddr,
    pub to: SocketAddr,
}

/// A TCP header's flags and numbers (RFC 9293 section 3.1).
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Segment {
    pub flags: u8,
    pub number: u32,
    pub acknowledges: u32,
    pub payload: u32,
}

#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Says {
    Tcp(Segment),
    Datagram,
    Request,
    Reply,
    /// The bytes of an error's quotation.
    Error(Vec<u8>),
}

#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Packet {
    pub tuple: Tuple,
    pub says: Says,
}

impl Tuple {
    pub fn new(talk: Talk, from: SocketAddr, to: SocketAddr) -> Self {
        Self { talk, from, to }
    }

    /// The answer to it.
    #[must_use]
    pub fn back(self) -> Self {
        Self::new(self.talk, self.to, self.from)
    }

    /// The key under which a table holds what arrives so.
    pub fn row(self, hook: Hook) -> WayKey {
        WayKey {
            source: Addr::from(self.from.ip()),
            destination: Addr::from(self.to.ip()),
            source_port: self.from.port().into(),
            destination_port: self.to.port().into(),
            protocol: match self.talk {
                Talk::Tcp => Protocol::TCP,
                Talk::Udp => Protocol::UDP,
                Talk::Echo => Protocol::ICMP,
            },
            hook,
            pad: [0; 2],
        }
    }
}

impl Segment {
    /// Opens a connection: a SYN that acknowledges nothing and ends nothing (section 3.5).
    pub fn opens(self) -> bool {
        self.flags & (SYN | ACK | RST) == SYN
    }

    /// Makes sense only as an answer.
    pub fn answers(self) -> bool {
        !self.opens() && self.flags & (SYN | RST) != 0
    }

    pub fn ends(self) -> bool {
        self.flags & FIN != 0
    }

    pub fn resets(self) -> bool {
        self.flags & RST != 0
    }

    /// What acknowledges all of it: SYN and FIN count as a byte each (section 3.4).
    pub fn end(self) -> u32 {
        let is = |flag| u32::from(self.flags & flag != 0);
        self.number.wrapping_add(self.payload + is(SYN) + is(FIN))
    }
}

impl Packet {
    pub fn is_error(&self) -> bool {
        matches!(self.says, Says::Error(_))
    }

    pub fn segment(&self) -> Option<Segment> {
        match &self.says {
            Says::Tcp(segment) => Some(*segment),
            _ => None,
        }
    }

    /// Makes sense only as an answer.
    pub fn answers(&self) -> bool {
        matches!(self.says, Says::Reply) || self.segment().is_some_and(Segment::answers)
    }

    pub fn opens_tcp(&self) -> bool {
        self.segment().is_some_and(Segment::opens)
    }

    /// The frame, with right checksums.
    pub fn frame(&self, source_mac: [u8; 6]) -> Vec<u8> {
        let Tuple { from, to, .. } = self.tuple;
        let is_v4 = from.is_ipv4();
        let (protocol, at, mut body) = match &self.says {
            Says::Tcp(segment) => {
                let mut body = ports(from.port(), to.port());
                body.extend(segment.number.to_be_bytes());
                body.extend(segment.acknowledges.to_be_bytes());
                body.extend([0x50, segment.flags, 0x10, 0, 0, 0, 0, 0]);
                body.extend(vec![7; segment.payload as usize]);
                (6, 16, body)
            }
            Says::Datagram => {
                let mut body = ports(from.port(), to.port());
                body.extend([0, 12, 0, 0, 1, 2, 3, 4]);
                (17, 6, body)
            }
            Says::Request | Says::Reply => {
                let is_reply = self.says == Says::Reply;
                let kind = match (is_reply, is_v4) {
                    (false, true) => 8,
                    (true, true) => 0,
                    (false, false) => 128,
                    (true, false) => 129,
                };
                let identifier = if is_reply { to.port() } else { from.port() };
                let mut body = vec![kind, 0, 0, 0];
                body.extend(identifier.to_be_bytes());
                body.extend([0, 1]);
                (icmp(is_v4), 2, body)
            }
            Says::Error(quoted) => {
                let mut body = if is_v4 { vec![3, 3] } else { vec![1, 4] };
                body.extend([0; 6]);
                body.extend(quoted);
                (icmp(is_v4), 2, body)
            }
        };
        let mut pseudo = Vec::new();
        if protocol != 1 {
            pseudo.extend(octets(from.ip()));
            pseudo.extend(octets(to.ip()));
            pseudo.extend((body.len() as u32).to_be_bytes());
            pseudo.extend([0, 0, 0, protocol]);
        }
        let mut sum = checksum(&[&pseudo, &body]);
        if protocol == 17 && sum == 0 {
            sum = 0xffff;
        }
        body[at..at + 2].copy_from_slice(&sum.to_be_bytes());
        let mut ip = Ip::between(from.ip(), to.ip());
        ip.source_mac = source_mac;
        ip.frame(&Transport::Other {
            protocol,
            payload: body,
        })
    }

    /// Reads a frame of ours.
    pub fn read(frame: &[u8]) -> Option<Self> {
        read(frame.get(L3..)?)
    }
}

/// From whom to whom the packet went that an error quotes, which may be only its first bytes.
pub fn quoted(bytes: &[u8]) -> Option<Tuple> {
    read(bytes).map(|packet| packet.tuple)
}

fn read(packet: &[u8]) -> Option<Packet> {
    let (from, to, protocol, body) = if packet.first()? >> 4 == 4 {
        let header = usize::from(packet[0] & 0xf) * 4;
        let at = |at| <[u8; 4]>::try_from(packet.get(at..at + 4)?).ok();
        let (from, to) = (IpAddr::from(at(12)?), IpAddr::from(at(16)?));
        (from, to, *packet.get(9)?, packet.get(header..)?)
    } else {
        let at = |at| <[u8; 16]>::try_from(packet.get(at..at + 16)?).ok();
        let (from, to) = (IpAddr::from(at(8)?), IpAddr::from(at(24)?));
        (from, to, *packet.get(6)?, packet.get(40..)?)
    };
    let two = |at| Some(u16::from_be_bytes([*body.get(at)?, *body.get(at + 1)?]));
    let four = |at| {
        let bytes: Option<[u8; 4]> = body.get(at..at + 4)?.try_into().ok();
        bytes.map(u32::from_be_bytes)
    };
    let tuple = |talk, source, destination| {
        let (from, to) = (
            SocketAddr::new(from, source),
            SocketAddr::new(to, destination),
        );
        Tuple::new(talk, from, to)
    };
    let (tuple, says) = match protocol {
        6 => {
            let segment = Segment {
                number: four(4)?,
                // What an error quotes ends here.
                acknowledges: four(8).unwrap_or(0),
                flags: body.get(13).copied().unwrap_or(0),
                payload: (body.len() as u32).saturating_sub(20),
            };
            (tuple(Talk::Tcp, two(0)?, two(2)?), Says::Tcp(segment))
        }
        17 => (tuple(Talk::Udp, two(0)?, two(2)?), Says::Datagram),
        1 | 58 => match (body.first()?, from.is_ipv4()) {
            (8, true) | (128, false) => (tuple(Talk::Echo, two(4)?, 0), Says::Request),
            (0, true) | (129, false) => (tuple(Talk::Echo, 0, two(4)?), Says::Reply),
            _ => (
                tuple(Talk::Echo, 0, 0),
                Says::Error(body.get(8..)?.to_vec()),
            ),
        },
        _ => return None,
    };
    Some(Packet { tuple, says })
}

fn ports(source: u16, destination: u16) -> Vec<u8> {
    [source.to_be_bytes(), destination.to_be_bytes()].concat()
}

fn icmp(is_v4: bool) -> u8 {
    if is_v4 { 1 } else { 58 }
}

fn octets(ip: IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    }
}
