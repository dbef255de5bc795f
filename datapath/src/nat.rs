//! Replacing one end of a packet in its bytes.

use weir_common::counter::Counter;
use weir_common::flow::Peer;
use weir_common::{DropReason, Protocol};

use crate::l3::{L3, Side};
use crate::l4::Layout;
use crate::packet::{Changed, Delta, Packet};
use crate::tables::Tables;

/// Replaces address and port of one side, and corrects every checksum that covers them.
///
/// # Errors
/// [`DropReason::WriteFailed`]; the packet may then be half changed and must be dropped.
#[inline(always)]
pub fn replace<F: L3>(
    packet: &mut impl Packet,
    tables: &impl Tables,
    side: Side,
    protocol: Protocol,
    transport: usize,
    old: &Peer,
    new: &Peer,
) -> Result<(), DropReason> {
    let Some(layout) = Layout::of::<F>(protocol) else {
        return Err(DropReason::WriteFailed);
    };
    let (checksum, zero) = (transport + layout.checksum, layout.zero);
    let covering = if layout.covers_addresses {
        Some((checksum, zero))
    } else {
        None
    };
    F::replace(packet, side, &old.addr, &new.addr, covering)?;
    if u16::from(old.port) != u16::from(new.port) {
        let delta = Delta::between(&old.port.0, &new.port.0);
        packet.fix_checksum(checksum, Changed::Ports(zero), delta)?;
        let offset = match side {
            Side::Source => transport + layout.source_port,
            Side::Destination => transport + layout.destination_port,
        };
        packet.store(offset, &new.port.0)?;
    }
    tables.count(Counter::PacketsTranslated);
    Ok(())
}
