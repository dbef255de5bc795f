//! A packet is read: from here on IPv4 and IPv6 are the same.

use weir_common::DropReason;
use weir_common::event::Hook;
use weir_common::way::Mark;

use crate::l3::{self, Body, Extent, Family, Header};
use crate::l4::{self, Parsed, Segment};
use crate::packet::Packet;
use crate::tables::Tables;
use crate::verdict::Scratch;

/// A packet as it arrived; its addresses and ports are in the trace.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
#[repr(C)]
pub struct Arrival {
    /// Of the device that the program sits on.
    pub ifindex: u32,
    /// Of the IP packet in bytes.
    pub length: u32,
    /// Offset of the transport header in the frame.
    pub(crate) transport: u32,
    pub segment: Segment,
    /// TCP: the acknowledgement of everything in the segment, and what the segment acknowledges.
    pub end: u32,
    pub acknowledges: u32,
    /// Interface index of the device by which the node has received it, [`Self::BY_NONE`] of what the node itself has made, or
    /// [`Self::BY_SOME`].
    pub received_by: u32,
    /// The family of its addresses in the lowest bit; [`Self::LATER`].
    pub(crate) shape: u8,
    /// What an earlier program of ours has said.
    pub mark: Mark,
    pub pad: [u8; 2],
}

impl Arrival {
    /// Of the shape: a fragment that is not the first, without a transport header.
    pub(crate) const LATER: u8 = 2;

    pub(crate) const BY_NONE: u32 = 0;
    /// By a device that is not known any more: no device has this index.
    pub(crate) const BY_SOME: u32 = u32::MAX;

    /// A packet whose transport header has not been read.
    #[inline(always)]
    fn of<P: Packet>(packet: &P, family: Family, body: &Body) -> Self {
        Self {
            ifindex: packet.ifindex(),
            length: body.end - l3::OFFSET as u32,
            transport: body.offset as u32,
            segment: Segment::default(),
            end: 0,
            acknowledges: 0,
            shape: family as u8,
            mark: packet.mark(),
            received_by: packet.received_by(),
            pad: [0; 2],
        }
    }

    /// What was read of the transport header.
    #[inline(always)]
    pub(crate) const fn set(&mut self, parsed: &Parsed) {
        (self.segment, self.end, self.acknowledges) =
            (parsed.segment, parsed.end, parsed.acknowledges);
    }

    /// Has the packet a transport header?
    #[inline(always)]
    pub const fn has_transport(&self) -> bool {
        self.shape & Self::LATER == 0
    }

    /// Offset of the transport header in the frame. The mask changes nothing, but the verifier has not seen where the
    /// number comes from.
    #[inline(always)]
    pub const fn transport(&self) -> usize {
        const { assert!(l3::OFFSET + l3::LONGEST < 128) };
        (self.transport & 127) as usize
    }

    /// Has the node itself made it?
    #[inline(always)]
    pub const fn is_nodes(&self) -> bool {
        self.received_by == Self::BY_NONE
    }

    /// The family of its addresses. The verifier has not seen where the number comes from, and believes its lowest bit.
    #[inline(always)]
    pub const fn family(&self) -> Family {
        if self.shape & 1 == 0 {
            Family::V4
        } else {
            Family::V6
        }
    }
}

/// Reads the headers of a packet: fills the trace and the arrival.
///
/// # Errors
/// Those of parsing; what could be parsed is then in the trace.
#[inline(always)]
pub fn read<P: Packet, T: Tables>(
    packet: &P,
    tables: &T,
    scratch: &mut Scratch,
    hook: Hook,
) -> Result<(), DropReason> {
    let (family, header) = addresses(packet, tables, scratch, hook)?;
    rest(packet, tables, scratch, family, &header)
}

/// Reads from whom to whom a packet goes.
///
/// # Errors
/// Those of parsing.
#[inline(always)]
pub fn addresses<P: Packet, T: Tables>(
    packet: &P,
    tables: &T,
    scratch: &mut Scratch,
    hook: Hook,
) -> Result<(Family, Header), DropReason> {
    let family = Family::of(packet)?;
    let key = &mut scratch.trace.tuple;
    key.hook = hook;
    let header = family.header(packet, l3::OFFSET, key)?;
    tables.settle(scratch);
    family.check(&scratch.trace.tuple)?;
    Ok((family, header))
}

/// Reads what [`addresses`] has left.
///
/// # Errors
/// Those of parsing.
#[inline(always)]
pub fn rest<P: Packet, T: Tables>(
    packet: &P,
    tables: &T,
    scratch: &mut Scratch,
    family: Family,
    header: &Header,
) -> Result<(), DropReason> {
    let body = match family.body(packet, l3::OFFSET, header, Extent::Whole) {
        Ok(body) => body,
        Err(DropReason::Fragment | DropReason::ExtensionHeader) => {
            scratch.arrival = Arrival::of(packet, family, &Body::NONE);
            return packet.unfold(tables, scratch).is_known().map(|_| ());
        }
        Err(reason) => return Err(reason),
    };
    scratch.trace.tuple.protocol = body.protocol;
    scratch.arrival = Arrival::of(packet, family, &body);
    tables.settle(scratch);
    let Scratch { trace, arrival, .. } = scratch;
    let body = Body {
        protocol: trace.tuple.protocol,
        offset: arrival.transport(),
        end: arrival.length + l3::OFFSET as u32,
    };
    let family = arrival.family();
    let parsed = l4::parse(packet, family, &body, Extent::Whole, &mut trace.tuple)?;
    arrival.set(&parsed);
    tables.settle(scratch);
    Ok(())
}
