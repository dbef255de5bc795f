//! Replacing one end of a packet in its bytes.

use weir_common::counter::Counter;
use weir_common::way::{Rewrite, Step, WayState};
use weir_common::{DropReason, Port};

use crate::l3::{self, Family, Side};
use crate::l4::Layout;
use crate::packet::{Changed, Delta, Packet};
use crate::tables::Tables;
use crate::verdict::Scratch;

/// Replaces what the step says, address and port, and corrects every checksum that covers them.
///
/// # Errors
/// [`DropReason::WriteFailed`]; the packet may then be half changed and must be dropped.
#[inline(always)]
pub fn rewrite<P: Packet, T: Tables>(
    packet: &mut P,
    tables: &T,
    scratch: &Scratch,
) -> Result<(), DropReason> {
    let key = &scratch.trace.tuple;
    let arrival = &scratch.arrival;
    let family = arrival.family();
    let step = &scratch.step;
    let [a, b, c, d, _] = *key.words();
    let (side, old, port) = if step.rewrite == Rewrite::SOURCE {
        (Side::Source, [a, b], key.source_port)
    } else if step.rewrite == Rewrite::DESTINATION {
        (Side::Destination, [c, d], key.destination_port)
    } else {
        return Ok(());
    };
    let Some(layout) = Layout::of(family, key.protocol) else {
        return Err(DropReason::WriteFailed);
    };
    if arrival.has_transport() {
        let transport = arrival.transport();
        replace(packet, family, side, &layout, transport, old, port, step)?;
    } else {
        let [a, b, _] = *step.words();
        family.replace(packet, side, old, [a, b], &step.addr, None)?;
    }
    tables.count(if scratch.state & WayState::MASQUERADE != 0 {
        Counter::PacketsMasqueraded
    } else {
        Counter::PacketsTranslated
    });
    Ok(())
}

/// [`rewrite`] for a hairpin: the addresses change places, and one port becomes another. Only what a pod sends meets one.
///
/// # Errors
/// As there.
#[inline(always)]
pub fn turn<P: Packet, T: Tables>(
    packet: &mut P,
    tables: &T,
    scratch: &Scratch,
) -> Result<(), DropReason> {
    let (key, arrival, step) = (&scratch.trace.tuple, &scratch.arrival, &scratch.step);
    let family = arrival.family();
    family.turn(packet, l3::OFFSET, key)?;
    if arrival.has_transport()
        && let Some(layout) = Layout::of(family, key.protocol)
    {
        let (old, offset) = if step.rewrite == Rewrite::HAIRPIN_SOURCE {
            (key.source_port, layout.source_port)
        } else {
            (key.destination_port, layout.destination_port)
        };
        let (transport, zero) = (arrival.transport(), layout.zero);
        let delta = Delta::of_ports(old, step.port);
        packet.fix_checksum(transport + layout.checksum, Changed::Ports(zero), delta)?;
        packet.store(transport + offset, &step.port.0)?;
    }
    tables.count(Counter::PacketsTranslated);
    Ok(())
}

#[inline(always)]
#[expect(
    clippy::too_many_arguments,
    reason = "it is inlined: each is a register"
)]
fn replace(
    packet: &mut impl Packet,
    family: Family,
    side: Side,
    layout: &Layout,
    transport: usize,
    old: [u64; 2],
    old_port: Port,
    step: &Step,
) -> Result<(), DropReason> {
    let (checksum, zero) = (transport + layout.checksum, layout.zero);
    let covering = layout.covers_addresses.then_some((checksum, zero));
    let [a, b, _] = *step.words();
    family.replace(packet, side, old, [a, b], &step.addr, covering)?;
    if u16::from(old_port) != u16::from(step.port) {
        let delta = Delta::of_ports(old_port, step.port);
        packet.fix_checksum(checksum, Changed::Ports(zero), delta)?;
        let offset = match side {
            Side::Source => transport + layout.source_port,
            Side::Destination => transport + layout.destination_port,
        };
        packet.store(offset, &step.port.0)?;
    }
    Ok(())
}
