//! The transport header: ports, and what a packet means for its conversation.

use weir_common::{DropReason, Port, Protocol};

use crate::l3::{Body, Icmp, L3};
use crate::merge::Merge;
use crate::packet::{Packet, Zero};
use crate::tuple::Tuple;

/// What the transport header says, besides the ports: what the packet means for its conversation. Bits,
/// so that it can pass through a [`Merge`].
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Segment(u32);

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

    /// The same, wherever it came from.
    #[inline(always)]
    pub fn merged(self, merge: &Merge) -> Self {
        Self(merge.pass(self.0))
    }
}

const FIN: u8 = 1;
const SYN: u8 = 2;
const RST: u8 = 4;
const ACK: u8 = 16;

/// Reads the transport header and fills protocol and ports of the tuple.
///
/// # Errors
/// [`DropReason::Malformed`] when it is cut short or contradicts itself; [`DropReason::NoFlow`] for
/// ICMP that belongs to no conversation.
#[inline(always)]
pub fn parse<F: L3>(
    packet: &impl Packet,
    body: &Body,
    tuple: &mut Tuple,
) -> Result<Segment, DropReason> {
    let at = body.offset;
    let room = body.end.saturating_sub(at as u32);
    tuple.protocol = body.protocol;
    if body.protocol == Protocol::TCP {
        let header = packet.load::<20>(at)?;
        let length = u32::from(header[12] >> 4) * 4;
        if length < 20 || length > room {
            return Err(DropReason::Malformed);
        }
        ports(tuple, [header[0], header[1], header[2], header[3]]);
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
        return Ok(Segment(segment));
    }
    if body.protocol == Protocol::UDP {
        let header = packet.load::<8>(at)?;
        let length = u32::from(u16::from_be_bytes([header[4], header[5]]));
        if length < 8 || length > room {
            return Err(DropReason::Malformed);
        }
        ports(tuple, [header[0], header[1], header[2], header[3]]);
        return Ok(Segment::SPEAK);
    }
    if body.protocol == Protocol::SCTP {
        let header = packet.load::<4>(at)?;
        if room < 12 {
            return Err(DropReason::Malformed);
        }
        ports(tuple, header);
        return Ok(Segment::SPEAK);
    }
    if body.protocol == F::ICMP {
        let header = packet.load::<8>(at)?;
        if room < 8 {
            return Err(DropReason::Malformed);
        }
        tuple.protocol = Protocol::ICMP;
        let icmp = F::icmp(header[0]);
        echo(tuple, icmp, Port([header[4], header[5]]));
        return match icmp {
            Icmp::EchoRequest => Ok(Segment::SPEAK),
            Icmp::EchoReply => Ok(Segment::ANSWER),
            Icmp::Error => Ok(Segment::ERROR),
            Icmp::Other => Err(DropReason::NoFlow),
        };
    }
    if body.protocol == F::FOREIGN_ICMP {
        return Err(DropReason::Malformed);
    }
    ports(tuple, [0; 4]);
    Ok(Segment::SPEAK)
}

/// Fills protocol and ports from the first eight bytes of the transport header that an ICMP error
/// quotes.
///
/// # Errors
/// [`DropReason::Malformed`], [`DropReason::NoFlow`] for an error about an error.
#[inline(always)]
pub fn parse_quoted<F: L3>(
    packet: &impl Packet,
    body: &Body,
    tuple: &mut Tuple,
) -> Result<(), DropReason> {
    let header = packet.load::<8>(body.offset)?;
    tuple.protocol = body.protocol;
    if body.protocol == Protocol::TCP
        || body.protocol == Protocol::UDP
        || body.protocol == Protocol::SCTP
    {
        ports(tuple, [header[0], header[1], header[2], header[3]]);
    } else if body.protocol == F::ICMP {
        tuple.protocol = Protocol::ICMP;
        let icmp = F::icmp(header[0]);
        if !matches!(icmp, Icmp::EchoRequest | Icmp::EchoReply) {
            return Err(DropReason::NoFlow);
        }
        echo(tuple, icmp, Port([header[4], header[5]]));
    } else if body.protocol == F::FOREIGN_ICMP {
        return Err(DropReason::Malformed);
    } else {
        ports(tuple, [0; 4]);
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
    pub fn of<F: L3>(protocol: Protocol) -> Option<Self> {
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
                covers_addresses: F::ICMP_COVERS_ADDRESSES,
                ..ports
            })
        } else {
            None
        }
    }
}

#[inline(always)]
fn ports(tuple: &mut Tuple, [a, b, c, d]: [u8; 4]) {
    tuple.source_port = Port([a, b]);
    tuple.destination_port = Port([c, d]);
}

#[inline(always)]
fn echo(tuple: &mut Tuple, icmp: Icmp, identifier: Port) {
    let is_reply = matches!(icmp, Icmp::EchoReply);
    tuple.source_port = if is_reply { Port::ABSENT } else { identifier };
    tuple.destination_port = if is_reply { identifier } else { Port::ABSENT };
}
