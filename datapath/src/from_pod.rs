//! What a pod sends, at the host's end of its veth pair: the lease, the way, and straight on to the receiver when
//! that is a pod of this node. A local delivery leaves the TTL as it is: the two pods are neighbours, and a loop is
//! not possible since a pod's device is always the last hop.

use weir_common::DropReason;
use weir_common::counter::Counter;
use weir_common::event::Hook;
use weir_common::policy::Class;
use weir_common::way::Mark;

use crate::packet::Packet;
use crate::tables::Tables;
use crate::verdict::{Scratch, Verdict};
use crate::{arrive, icmp, nat, way};

/// Decides about a packet that a pod sends.
#[inline(always)]
pub fn from_pod<P: Packet, T: Tables>(
    packet: &mut P,
    tables: &T,
    scratch: &mut Scratch,
) -> Verdict {
    // A pod's packets come in without a mark: its pair takes every mark off. One that is marked here has passed a
    // program at this very hook, one that is attached in another way.
    if packet.mark().is_of_pod() {
        return Verdict::Pass;
    }
    match decide(packet, tables, scratch) {
        Ok(verdict) => verdict,
        Err(reason) => scratch.refused(reason),
    }
}

#[inline(always)]
fn decide<P: Packet, T: Tables>(
    packet: &mut P,
    tables: &T,
    scratch: &mut Scratch,
) -> Result<Verdict, DropReason> {
    let device = tables.device(packet.ifindex()).ok_or(DropReason::NoLease)?;
    let (family, header) = arrive::addresses(packet, tables, scratch, Hook::FROM_POD)?;
    let [a, b, c, d, _] = *scratch.trace.tuple.words();
    if family.is_martian([c, d]) || family.is_martian([a, b]) {
        return Err(DropReason::Martian);
    }
    if [a, b] != family.lease(&device) {
        return Err(DropReason::SpoofedAddress);
    }
    if packet.load::<6>(6)? != device.mac.0 {
        return Err(DropReason::SpoofedMac);
    }
    arrive::rest(packet, tables, scratch, family, &header)?;
    if scratch.arrival.segment.is_error() {
        return error(packet, tables, scratch);
    }
    if !way::is_known(tables, scratch)? && !tables.answer(scratch).is_known()? {
        tables.plan_at_pod(scratch).is_known()?;
    }
    tables.settle(scratch);
    if scratch.step.rewrite.is_hairpin() {
        nat::turn(packet, tables, scratch)?;
    } else {
        nat::rewrite(packet, tables, scratch)?;
    }
    Ok(deliver(packet, tables, scratch))
}

/// An error of a pod about what it has received; a pod speaks for itself alone.
#[inline(always)]
fn error<P: Packet, T: Tables>(
    packet: &mut P,
    tables: &T,
    scratch: &mut Scratch,
) -> Result<Verdict, DropReason> {
    let about = icmp::read(packet, tables, scratch)?;
    let key = &scratch.trace.tuple;
    if !key.is_answer_to(&scratch.question) {
        return Err(DropReason::NoFlow);
    }
    if let Some(about) = &about {
        if scratch.step.rewrite.is_hairpin() {
            icmp::turn(packet, scratch, about)?;
        } else {
            icmp::rewrite(packet, scratch, about)?;
        }
    } else if tables.class(&key.destination) == Class::OWN_NODE {
        scratch.pass(Mark::PASSED);
    } else {
        return Err(DropReason::NoFlow);
    }
    Ok(deliver(packet, tables, scratch))
}

#[inline(always)]
fn deliver<P: Packet, T: Tables>(packet: &mut P, tables: &T, scratch: &Scratch) -> Verdict {
    if scratch.device == 0 {
        packet.set_mark(scratch.step.mark);
        return Verdict::Pass;
    }
    tables.count(Counter::LocalDeliveries);
    Verdict::Redirect(scratch.device)
}
