//! Frames for tests of the datapath: built right, so that a test can then spoil one thing, and read back
//! to see whether their checksums are right.

use std::net::IpAddr;

/// Everything before the transport header.
#[derive(Clone, Debug)]
pub struct Ip {
    pub source_mac: [u8; 6],
    pub destination_mac: [u8; 6],
    pub source: IpAddr,
    pub destination: IpAddr,
    /// Bytes of IPv4 options: a multiple of four, at most 40.
    pub options: usize,
}

/// A transport header with its payload.
#[derive(Clone, Debug)]
pub enum Transport {
    Tcp {
        ports: (u16, u16),
        flags: u8,
        payload: Vec<u8>,
    },
    Udp {
        ports: (u16, u16),
        payload: Vec<u8>,
    },
    Sctp {
        ports: (u16, u16),
    },
    /// An echo request or reply.
    Echo {
        way: Echo,
        identifier: u16,
    },
    /// An ICMP error that quotes the start of an IP packet; a port that nobody listens on.
    Unreachable {
        quoted: Vec<u8>,
    },
    Other {
        protocol: u8,
        payload: Vec<u8>,
    },
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Echo {
    Request,
    Reply,
}

pub const FIN: u8 = 1;
pub const SYN: u8 = 2;
pub const RST: u8 = 4;
pub const ACK: u8 = 16;

/// Offset of the IP header.
pub const L3: usize = 14;

impl Ip {
    /// From one address to another, between two Ethernet addresses that tests need not care about.
    ///
    /// # Panics
    /// When the addresses are of different families.
    pub fn between(source: IpAddr, destination: IpAddr) -> Self {
        assert_eq!(source.is_ipv4(), destination.is_ipv4(), "one family");
        Self {
            source_mac: [2, 0, 0, 0, 0, 1],
            destination_mac: [2, 0, 0, 0, 0, 0xff],
            source,
            destination,
            options: 0,
        }
    }

    /// The frame, with correct checksums.
    pub fn frame(&self, transport: &Transport) -> Vec<u8> {
        let mut frame = Vec::new();
        frame.extend(self.destination_mac);
        frame.extend(self.source_mac);
        frame.extend(if self.source.is_ipv4() {
            [0x08, 0x00]
        } else {
            [0x86, 0xdd]
        });
        frame.extend(self.packet(transport));
        frame
    }

    /// The IP packet alone, with correct checksums.
    pub fn packet(&self, transport: &Transport) -> Vec<u8> {
        let (protocol, body) = self.body(transport);
        let mut packet = match (self.source, self.destination) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                let header = 20 + self.options;
                let length = (header + body.len()) as u16;
                let mut packet = vec![0x40 | (header / 4) as u8, 0];
                packet.extend(length.to_be_bytes());
                packet.extend([0, 1, 0x40, 0, 64, protocol, 0, 0]);
                packet.extend(source.octets());
                packet.extend(destination.octets());
                // No-operation, so that the options are well-formed.
                packet.extend(vec![1; self.options]);
                let sum = checksum(&[&packet]);
                packet[10..12].copy_from_slice(&sum.to_be_bytes());
                packet
            }
            (IpAddr::V6(source), IpAddr::V6(destination)) => {
                let mut packet = vec![0x60, 0, 0, 0];
                packet.extend((body.len() as u16).to_be_bytes());
                packet.extend([protocol, 64]);
                packet.extend(source.octets());
                packet.extend(destination.octets());
                packet
            }
            _ => Vec::new(),
        };
        packet.extend(body);
        packet
    }

    /// An echo of [`Self::frame`] that carries something.
    #[must_use]
    pub fn with_more(&self, echo: Vec<u8>, payload: &[u8]) -> Vec<u8> {
        let at = echo.len() - 8;
        let protocol = if self.source.is_ipv4() { 1 } else { 58 };
        let mut payload = [&echo[at..], payload].concat();
        payload[2..4].fill(0);
        let pseudo = if protocol == 1 {
            Vec::new()
        } else {
            self.pseudo(protocol, payload.len())
        };
        let sum = checksum(&[&pseudo, &payload]);
        payload[2..4].copy_from_slice(&sum.to_be_bytes());
        self.frame(&Transport::Other { protocol, payload })
    }

    fn body(&self, transport: &Transport) -> (u8, Vec<u8>) {
        let is_v4 = self.source.is_ipv4();
        let (protocol, checksum_at, mut body) = match transport {
            Transport::Tcp {
                ports,
                flags,
                payload,
            } => {
                let mut body = pair(*ports);
                body.extend([0, 0, 0, 1, 0, 0, 0, 2, 0x50, *flags, 0x10, 0, 0, 0, 0, 0]);
                body.extend(payload);
                (6, Some(16), body)
            }
            Transport::Udp { ports, payload } => {
                let mut body = pair(*ports);
                body.extend(((8 + payload.len()) as u16).to_be_bytes());
                body.extend([0, 0]);
                body.extend(payload);
                (17, Some(6), body)
            }
            Transport::Sctp { ports } => {
                let mut body = pair(*ports);
                body.extend([0; 8]);
                (132, None, body)
            }
            Transport::Echo { way, identifier } => {
                let kind = match (way, is_v4) {
                    (Echo::Request, true) => 8,
                    (Echo::Reply, true) => 0,
                    (Echo::Request, false) => 128,
                    (Echo::Reply, false) => 129,
                };
                let mut body = vec![kind, 0, 0, 0];
                body.extend(identifier.to_be_bytes());
                body.extend([0, 1]);
                (if is_v4 { 1 } else { 58 }, Some(2), body)
            }
            Transport::Unreachable { quoted } => {
                let mut body = if is_v4 {
                    vec![3, 3, 0, 0, 0, 0, 0, 0]
                } else {
                    vec![1, 4, 0, 0, 0, 0, 0, 0]
                };
                body.extend(quoted);
                (if is_v4 { 1 } else { 58 }, Some(2), body)
            }
            Transport::Other { protocol, payload } => (*protocol, None, payload.clone()),
        };
        if let Some(at) = checksum_at {
            let pseudo = if protocol == 1 {
                Vec::new()
            } else {
                self.pseudo(protocol, body.len())
            };
            let mut sum = checksum(&[&pseudo, &body]);
            if protocol == 17 && sum == 0 {
                sum = 0xffff;
            }
            body[at..at + 2].copy_from_slice(&sum.to_be_bytes());
        }
        (protocol, body)
    }

    fn pseudo(&self, protocol: u8, length: usize) -> Vec<u8> {
        let mut pseudo = Vec::new();
        for addr in [self.source, self.destination] {
            match addr {
                IpAddr::V4(addr) => pseudo.extend(addr.octets()),
                IpAddr::V6(addr) => pseudo.extend(addr.octets()),
            }
        }
        pseudo.extend((length as u32).to_be_bytes());
        pseudo.extend([0, 0, 0, protocol]);
        pseudo
    }
}

/// Are all checksums of a well-formed frame of TCP, UDP or ICMP right?
pub fn checksums_are_right(frame: &[u8]) -> bool {
    let packet = &frame[L3..];
    let (header, protocol, addresses) = if packet[0] >> 4 == 4 {
        let header = usize::from(packet[0] & 0xf) * 4;
        if checksum(&[&packet[..header]]) != 0 {
            return false;
        }
        (header, packet[9], &packet[12..20])
    } else {
        (40, packet[6], &packet[8..40])
    };
    let body = &packet[header..];
    if protocol == 17 && body[6..8] == [0, 0] {
        return true;
    }
    let length = (body.len() as u32).to_be_bytes();
    if protocol == 1 {
        return checksum(&[body]) == 0;
    }
    checksum(&[addresses, &length, &[0, 0, 0, protocol], body]) == 0
}

/// The Internet checksum (RFC 1071) of runs of bytes, each padded to an even length.
pub fn checksum(parts: &[&[u8]]) -> u16 {
    let mut sum = 0u64;
    for part in parts {
        for pair in part.chunks(2) {
            let low = pair.get(1).copied().unwrap_or(0);
            sum += u64::from(u16::from_be_bytes([pair[0], low]));
        }
    }
    while sum >> 16 != 0 {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

fn pair((source, destination): (u16, u16)) -> Vec<u8> {
    let mut bytes = source.to_be_bytes().to_vec();
    bytes.extend(destination.to_be_bytes());
    bytes
}
