//! ICMP errors: let through when they are about a live flow. Of an error about a flow through a service,
//! addresses inside and outside are passed on as they are, so its receiver will not recognise it; of one
//! about a flow that left with the node's address both are translated.

use weir_common::counter::Counter;
use weir_common::flow::Peer;
use weir_common::{DropReason, Protocol};

use crate::flow;
use crate::l3::{Body, Extent, L3, Side};
use crate::l4::{self, Layout};
use crate::packet::{Changed, Delta, Packet, Zero};
use crate::tables::Tables;
use crate::tuple::{Tuple, same};
use crate::verdict::Scratch;

/// Where the packet is that an error quotes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Quoted {
    /// Of the error's own header.
    icmp: usize,
    /// Of the quoted transport header.
    transport: usize,
    protocol: Protocol,
}

/// Finds the packet that an error quotes and fills the tuple of it.
///
/// # Errors
/// Those of parsing the quotation.
#[inline(always)]
pub(crate) fn quoted<F: L3>(
    packet: &impl Packet,
    body: &Body,
    tuple: &mut Tuple,
) -> Result<Quoted, DropReason> {
    let at = body.offset + 8;
    F::addresses(packet, at, tuple)?;
    let inner = F::body(packet, at, Extent::Quoted)?;
    l4::parse_quoted::<F>(packet, &inner, tuple)?;
    Ok(Quoted {
        icmp: body.offset,
        transport: inner.offset,
        protocol: tuple.protocol,
    })
}

/// Is the packet that an error quotes part of a live flow whose sender is the error's receiver? Leaves
/// the tuple of the quoted packet in `question`.
///
/// # Errors
/// [`DropReason::NoFlow`], and those of parsing the quotation.
#[inline(always)]
pub(crate) fn is_about_flow<F: L3>(
    packet: &impl Packet,
    tables: &impl Tables,
    body: &Body,
    scratch: &mut Scratch,
) -> Result<(), DropReason> {
    quoted::<F>(packet, body, &mut scratch.question)?;
    let quoted = &scratch.question;
    if !same(&quoted.source, &scratch.trace.tuple.destination) {
        return Err(DropReason::NoFlow);
    }
    quoted.write_key(&mut scratch.key);
    match flow::find(tables, quoted, &scratch.key) {
        Some(found) if !found.leads_to_backend() => Ok(()),
        _ => Err(DropReason::NoFlow),
    }
}

/// Replaces one end in the quoted packet and, where it stands on the other side, outside. The quoted
/// transport's own checksum stays as it is: it may not even be quoted, and nobody compares it.
///
/// # Errors
/// [`DropReason::WriteFailed`]; the packet may then be half changed and must be dropped.
#[inline(always)]
pub(crate) fn replace<F: L3>(
    packet: &mut impl Packet,
    tables: &impl Tables,
    quoted: &Quoted,
    side: Side,
    old: &Peer,
    new: &Peer,
) -> Result<(), DropReason> {
    let Some(layout) = Layout::of::<F>(quoted.protocol) else {
        return Err(DropReason::WriteFailed);
    };
    let checksum = quoted.icmp + 2;
    let at = quoted.icmp + 8;
    F::replace_quoted(packet, at, side, &old.addr, &new.addr, checksum)?;
    if u16::from(old.port) != u16::from(new.port) {
        let delta = Delta::between(&old.port.0, &new.port.0);
        packet.fix_checksum(checksum, Changed::Ports(Zero::IsSum), delta)?;
        let offset = match side {
            Side::Source => layout.source_port,
            Side::Destination => layout.destination_port,
        };
        packet.store(quoted.transport + offset, &new.port.0)?;
    }
    let outside = match side {
        Side::Source => Side::Destination,
        Side::Destination => Side::Source,
    };
    let covering = if F::ICMP_COVERS_ADDRESSES {
        Some((checksum, Zero::IsSum))
    } else {
        None
    };
    tables.count(Counter::PacketsMasqueraded);
    F::replace(packet, outside, &old.addr, &new.addr, covering)
}
