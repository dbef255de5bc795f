//! What leaves the node through an uplink: sources are replaced here, destinations where packets come in
//! (`from_net`), so that the stack in between never sees a packet from outside with an address of the node
//! as its source. A mark says what is to be looked at.

use weir_common::DropReason;
use weir_common::event::Hook;
use weir_common::way::Mark;

use crate::l3::Family;
use crate::packet::Packet;
use crate::tables::Tables;
use crate::verdict::{Scratch, Verdict};
use crate::words::same;
use crate::{arrive, icmp, nat, plan, way};

/// Is there anything to decide about a packet that leaves the node? What is the node's own, and what a pod sends to the
/// cluster, goes as it is; but an error of the node may be about what has come in translated, and a process in the host network
/// may answer such a thing.
#[inline(always)]
fn concerns<P: Packet, T: Tables>(packet: &P, tables: &T) -> bool {
    match packet.mark() {
        Mark::LEAVING | Mark::REPLY | Mark::TRANSLATED | Mark::FORMER => true,
        Mark::NONE if packet.received_by() == 0 => Family::of(packet)
            .is_ok_and(|it| it.may_be(packet, |port| plan::is_asked(tables, port))),
        _ => false,
    }
}

/// Decides about a packet that leaves the node.
#[inline(always)]
pub fn to_net<P: Packet, T: Tables>(packet: &mut P, tables: &T, scratch: &mut Scratch) -> Verdict {
    if !concerns(packet, tables) {
        return Verdict::Pass;
    }
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
    let Ok((family, header)) = arrive::addresses(packet, tables, scratch, Hook::TO_NET) else {
        // No pod sends it.
        return Ok(());
    };
    if let Err(reason) = arrive::rest(packet, tables, scratch, family, &header) {
        // The kernel can be told to mark what answers a marked packet (`net.ipv4.fwmark_reflect`).
        return match tables.uplink(packet.ifindex()) {
            _ if packet.mark() == Mark::NONE => Ok(()),
            Some(uplink) if !same(family.uplink(&uplink), &scratch.trace.tuple.source) => {
                Err(reason)
            }
            // There is no address to leave with.
            None if packet.mark() != Mark::FORMER => Err(reason),
            _ => Ok(()),
        };
    }
    if scratch.arrival.segment.is_error() {
        return error(packet, tables, scratch);
    }
    if !way::is_known(tables, scratch)? && !tables.answer(scratch).is_known()? {
        if scratch.arrival.mark == Mark::NONE {
            return Ok(());
        }
        tables.plan_to_net(scratch).is_known()?;
    }
    tables.settle(scratch);
    nat::rewrite(packet, tables, scratch)
}

/// An error about what has come in translated, which would otherwise name who is behind the node. One of a router on the
/// way, or of the node, does not have to be about anything that we know.
#[inline(always)]
fn error<P: Packet, T: Tables>(
    packet: &mut P,
    tables: &T,
    scratch: &mut Scratch,
) -> Result<(), DropReason> {
    let found = icmp::read(packet, tables, scratch);
    if scratch.arrival.mark == Mark::NONE && !matches!(found, Ok(Some(_))) {
        return Ok(());
    }
    match found? {
        Some(about) => icmp::rewrite(packet, scratch, &about),
        None if scratch.trace.tuple.is_answer_to(&scratch.question) => Err(DropReason::NoFlow),
        None => Ok(()),
    }
}
