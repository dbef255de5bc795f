//! The transport header: ports, and what a packet means for its conversation.

use weir_common::way::WayKey;
use weir_common::{DropReason, Port, Protocol};

use crate::l3::{Body, Extent, Family, Icmp};
use crate::packet::{Packet, Zero};

/// What the transport header says, besides the ports: what the packet means for its conversation.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Segment(u32);

/// What was read of a transport header, besides the ports.
#[derive(Clone, Copy, Debug)]
pub struct Parsed {
    pub segment: Segment,
    /// See [`crate::arrive::Arrival::end`].
    pub end: u32,
    pub acknowledges: u32,
}

impl Segment {
    /// May open a conversation or belong to one: datagrams, TCP in midstream, an echo request.
    pub const SPEAK: Self = Self(0);
    /// Opens a TCP connection: SYN without ACK.
    pub const SYN: Self = Self(1);
    /// Only an answer makes sense: SYN with ACK, RST, an echo reply.
    pub const ANSWER: Self = Self(2);
    /// An ICMP error.
    pub const ERROR: Self = Self(4);
    const FIN: Self = Self(8);
    const RST: Self = Self(16);
    /// The first fragment of a packet.
    const FIRST: Self = Self(32);

    #[inline(always)]
    pub const fn is_syn(self) -> bool {
        self.0 & Self::SYN.0 != 0
    }

    #[inline(always)]
    pub const fn is_answer(self) -> bool {
        self.0 & Self::ANSWER.0 != 0
    }

    #[inline(always)]
    pub const fn is_error(self) -> bool {
        self.0 & Self::ERROR.0 != 0
    }

    #[inline(always)]
    pub const fn is_fin(self) -> bool {
        self.0 & Self::FIN.0 != 0
    }

    #[inline(always)]
    pub const fn is_rst(self) -> bool {
        self.0 & Self::RST.0 != 0
    }

    #[inline(always)]
    pub const fn is_first(self) -> bool {
        self.0 & Self::FIRST.0 != 0
    }

    /// The same in the first fragment of a packet.
    #[inline(always)]
    pub(crate) const fn of_first(self) -> Self {
        Self(self.0 | Self::FIRST.0)
    }

    /// Without numbers.
    #[inline(always)]
    const fn alone(self) -> Parsed {
        Parsed {
            segment: self,
            end: 0,
            acknowledges: 0,
        }
    }

    /// Does it change the state of its connection, or say something about packets that follow?
    #[inline(always)]
    pub const fn is_special(self) -> bool {
        self.0 & (Self::SYN.0 | Self::FIN.0 | Self::RST.0 | Self::FIRST.0) != 0
    }
}

const FIN: u8 = 1;
const SYN: u8 = 2;
const RST: u8 = 4;
const ACK: u8 = 16;

/// Reads the transport header and fills protocol and ports of the key.
///
/// # Errors
/// [`DropReason::Malformed`] when it is cut short or contradicts itself; [`DropReason::NoFlow`] for
/// ICMP that belongs to no conversation.
#[inline(always)]
pub fn parse(
    packet: &impl Packet,
    family: Family,
    body: &Body,
    extent: Extent,
    key: &mut WayKey,
) -> Result<Parsed, DropReason> {
    let at = body.offset;
    let room = body.end.saturating_sub(at as u32);
    let (icmp_number, foreign_icmp) = family.icmp_numbers();
    key.protocol = body.protocol;
    if body.protocol == Protocol::TCP {
        let header = packet.load::<20>(at)?;
        let length = u32::from(header[12] >> 4) * 4;
        if length < 20 || length > room {
            return Err(DropReason::Malformed);
        }
        ports(key, [header[0], header[1], header[2], header[3]]);
        let flags = header[13];
        let mut segment = if flags & (SYN | ACK | RST) == SYN {
            Segment::SYN.0
        } else if flags & (SYN | RST) != 0 {
            Segment::ANSWER.0
        } else {
            Segment::SPEAK.0
        };
        if flags & FIN != 0 {
            segment |= Segment::FIN.0;
        }
        if flags & RST != 0 {
            segment |= Segment::RST.0;
        }
        let number = |[a, b, c, d]: [u8; 4]| u32::from_be_bytes([a, b, c, d]);
        let first = number([header[4], header[5], header[6], header[7]]);
        // SYN and FIN count as a byte each (RFC 9293 section 3.4).
        let bytes = room - length + u32::from(flags & SYN != 0) + u32::from(flags & FIN != 0);
        return Ok(Parsed {
            segment: Segment(segment),
            end: first.wrapping_add(bytes),
            acknowledges: number([header[8], header[9], header[10], header[11]]),
        });
    }
    if body.protocol == Protocol::UDP {
        let header = packet.load::<8>(at)?;
        let length = u32::from(u16::from_be_bytes([header[4], header[5]]));
        // Of a fragmented datagram that is the length of all.
        let needed = if extent == Extent::First { 8 } else { length };
        if length < 8 || needed > room {
            return Err(DropReason::Malformed);
        }
        ports(key, [header[0], header[1], header[2], header[3]]);
        return Ok(Segment::SPEAK.alone());
    }
    if body.protocol == Protocol::SCTP {
        let header = packet.load::<4>(at)?;
        if room < 12 {
            return Err(DropReason::Malformed);
        }
        ports(key, header);
        return Ok(Segment::SPEAK.alone());
    }
    if body.protocol == icmp_number {
        let header = packet.load::<8>(at)?;
        if room < 8 {
            return Err(DropReason::Malformed);
        }
        key.protocol = Protocol::ICMP;
        let icmp = family.icmp(header[0]);
        echo(key, icmp, Port([header[4], header[5]]));
        return match icmp {
            Icmp::EchoRequest => Ok(Segment::SPEAK.alone()),
            Icmp::EchoReply => Ok(Segment::ANSWER.alone()),
            Icmp::Error => Ok(Segment::ERROR.alone()),
            Icmp::Other => Err(DropReason::NoFlow),
        };
    }
    if body.protocol == foreign_icmp {
        return Err(DropReason::Malformed);
    }
    ports(key, [0; 4]);
    Ok(Segment::SPEAK.alone())
}

/// Fills protocol and ports from the first eight bytes of the transport header that an ICMP error
/// quotes.
///
/// # Errors
/// [`DropReason::Malformed`], [`DropReason::NoFlow`] for an error about an error.
#[inline(always)]
pub fn parse_quoted(
    packet: &impl Packet,
    family: Family,
    body: &Body,
    key: &mut WayKey,
) -> Result<(), DropReason> {
    let header = packet.load::<8>(body.offset)?;
    let (icmp_number, foreign_icmp) = family.icmp_numbers();
    key.protocol = body.protocol;
    if body.protocol == Protocol::TCP
        || body.protocol == Protocol::UDP
        || body.protocol == Protocol::SCTP
    {
        ports(key, [header[0], header[1], header[2], header[3]]);
    } else if body.protocol == icmp_number {
        key.protocol = Protocol::ICMP;
        let icmp = family.icmp(header[0]);
        if !matches!(icmp, Icmp::EchoRequest | Icmp::EchoReply) {
            return Err(DropReason::NoFlow);
        }
        echo(key, icmp, Port([header[4], header[5]]));
    } else if body.protocol == foreign_icmp {
        return Err(DropReason::Malformed);
    } else {
        ports(key, [0; 4]);
    }
    Ok(())
}

/// Where a transport keeps what a translation changes, in bytes from the start of its header.
#[derive(Clone, Copy, Debug)]
pub struct Layout {
    pub source_port: usize,
    pub destination_port: usize,
    pub checksum: usize,
    pub zero: Zero,
    pub covers_addresses: bool,
}

impl Layout {
    /// `None` for a transport that is not translated. ICMP has one identifier, whichever side it names.
    #[inline(always)]
    pub fn of(family: Family, protocol: Protocol) -> Option<Self> {
        let ports = Self {
            source_port: 0,
            destination_port: 2,
            checksum: 16,
            zero: Zero::IsSum,
            covers_addresses: true,
        };
        if protocol == Protocol::TCP {
            Some(ports)
        } else if protocol == Protocol::UDP {
            Some(Self {
                checksum: 6,
                zero: Zero::IsAbsent,
                ..ports
            })
        } else if protocol == Protocol::ICMP {
            Some(Self {
                source_port: 4,
                destination_port: 4,
                checksum: 2,
                covers_addresses: family.covers_icmp(),
                ..ports
            })
        } else {
            None
        }
    }
}

#[inline(always)]
fn ports(key: &mut WayKey, [a, b, c, d]: [u8; 4]) {
    key.source_port = Port([a, b]);
    key.destination_port = Port([c, d]);
}

#[inline(always)]
fn echo(key: &mut WayKey, icmp: Icmp, identifier: Port) {
    let is_reply = matches!(icmp, Icmp::EchoReply);
    key.source_port = if is_reply { Port::ABSENT } else { identifier };
    key.destination_port = if is_reply { identifier } else { Port::ABSENT };
}
