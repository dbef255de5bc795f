//! What the host or other nodes send to a pod, at the host's end of its veth pair. Packets between two
//! pods of this node do not come through here.

use weir_common::DropReason;
use weir_common::event::Hook;

use crate::packet::Packet;
use crate::tables::Tables;
use crate::verdict::{Scratch, Verdict};
use crate::{arrive, icmp, nat, way};

/// Decides about a packet that is sent to a pod.
#[inline(always)]
pub fn to_pod<P: Packet, T: Tables>(packet: &mut P, tables: &T, scratch: &mut Scratch) -> Verdict {
    match decide(packet, tables, scratch) {
        Ok(()) => Verdict::Pass,
        Err(reason) => Verdict::Drop(reason),
    }
}

#[inline(always)]
fn decide<P: Packet, T: Tables>(
    packet: &mut P,
    tables: &T,
    scratch: &mut Scratch,
) -> Result<(), DropReason> {
    let device = tables.device(packet.ifindex()).ok_or(DropReason::NoLease)?;
    let (family, header) = arrive::addresses(packet, tables, scratch, Hook::TO_POD)?;
    let [a, b, c, d, _] = *scratch.trace.tuple.words();
    if [c, d] != family.lease(&device) {
        return Err(DropReason::NotForPod);
    }
    if family.is_martian([a, b]) {
        return Err(DropReason::Martian);
    }
    arrive::rest(packet, tables, scratch, family, &header)?;
    if scratch.arrival.segment.is_error() {
        return error(packet, tables, scratch);
    }
    if !way::is_known(tables, scratch)? && !tables.answer(scratch).is_known()? {
        tables.plan_at_pod(scratch).is_known()?;
    }
    tables.settle(scratch);
    nat::rewrite(packet, tables, scratch)
}

/// An error about what the pod has sent: the node's own are believed, whatever they are about.
#[inline(always)]
fn error<P: Packet, T: Tables>(
    packet: &mut P,
    tables: &T,
    scratch: &mut Scratch,
) -> Result<(), DropReason> {
    let is_nodes = scratch.arrival.is_nodes();
    match icmp::read(packet, tables, scratch)? {
        Some(about) => icmp::rewrite(packet, scratch, &about),
        None if is_nodes => Ok(()),
        None => Err(DropReason::NoFlow),
    }
}
