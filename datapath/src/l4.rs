//! The transport header: ports, and what a packet means for its conversation.

use weir_common::{DropReason, Port, Protocol};

use crate::l3::{Body, Icmp, L3};
use crate::packet::{Packet, Zero};
use crate::tuple::Tuple;

/// What a packet means for its conversation.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Meaning {
    /// May open a conversation or belong to one: datagrams, TCP in midstream, an echo request.
    Speak,
    /// Opens a TCP connection: SYN without ACK.
    Syn,
    /// Only an answer makes sense: SYN with ACK, RST, an echo reply.
    Answer,
    /// An ICMP error.
    Error,
}

/// What the transport header says, besides the ports.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Segment {
    pub meaning: Meaning,
    pub fin: bool,
    pub rst: bool,
}

const FIN: u8 = 1;
const SYN: u8 = 2;
const RST: u8 = 4;
const ACK: u8 = 16;

impl Segment {
    const SPEAK: Self = Self {
        meaning: Meaning::Speak,
        fin: false,
        rst: false,
    };
}

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
        let meaning = if flags & (SYN | ACK | RST) == SYN {
            Meaning::Syn
        } else if flags & (SYN | RST) != 0 {
            Meaning::Answer
        } else {
            Meaning::Speak
        };
        return Ok(Segment {
            meaning,
            fin: flags & FIN != 0,
            rst: flags & RST != 0,
        });
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
        let meaning = match icmp {
            Icmp::EchoRequest => Meaning::Speak,
            Icmp::EchoReply => Meaning::Answer,
            Icmp::Error => Meaning::Error,
            Icmp::Other => return Err(DropReason::NoFlow),
        };
        return Ok(Segment {
            meaning,
            fin: false,
            rst: false,
        });
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

/// Where a transport keeps its checksum, from the start of its header, and what zero means there.
/// `None` for a transport that is not translated.
#[inline(always)]
pub fn checksum(protocol: Protocol) -> Option<(usize, Zero)> {
    if protocol == Protocol::TCP {
        Some((16, Zero::IsSum))
    } else if protocol == Protocol::UDP {
        Some((6, Zero::IsAbsent))
    } else {
        None
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
