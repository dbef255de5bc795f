//! What comes into the node through an uplink: destinations are replaced here, sources where packets
//! leave (`to_net`). What is neither for a service nor for a port that stands for somebody is the node's own
//! affair and passes untouched.

use weir_common::DropReason;
use weir_common::event::Hook;
use weir_common::way::Mark;

use crate::packet::Packet;
use crate::tables::Tables;
use crate::verdict::{Scratch, Verdict};
use crate::{arrive, icmp, nat, way};

/// Decides about a packet that comes into the node.
#[inline(always)]
pub fn from_net<P: Packet, T: Tables>(
    packet: &mut P,
    tables: &T,
    scratch: &mut Scratch,
) -> Verdict {
    // What cannot be read is not for a service.
    if arrive::read(packet, tables, scratch, Hook::FROM_NET).is_err() {
        return Verdict::Pass;
    }
    match decide(packet, tables, scratch) {
        Ok(()) => Verdict::Pass,
        Err(reason) => scratch.refused(reason),
    }
}

#[inline(always)]
fn decide<P: Packet, T: Tables>(
    packet: &mut P,
    tables: &T,
    scratch: &mut Scratch,
) -> Result<(), DropReason> {
    if scratch.arrival.segment.is_error() {
        if let Ok(Some(about)) = icmp::read(packet, tables, scratch) {
            icmp::rewrite(packet, scratch, &about)?;
            tell(packet, scratch);
        }
        return Ok(());
    }
    if !way::is_known(tables, scratch)? {
        // What other nodes send to a pod itself.
        if tables.local_pod(&scratch.trace.tuple.destination).is_some() {
            return Ok(());
        }
        if !tables.answer(scratch).is_known()? {
            tables.plan_from_net(scratch).is_known()?;
        }
    }
    tables.settle(scratch);
    nat::rewrite(packet, tables, scratch)?;
    tell(packet, scratch);
    Ok(())
}

/// Tells the next program; what is none of ours keeps whatever mark it has.
#[inline(always)]
fn tell<P: Packet>(packet: &mut P, scratch: &Scratch) {
    if scratch.step.mark != Mark::NONE {
        packet.set_mark(scratch.step.mark);
    }
}
