//! ICMP errors. An error about a packet goes the way of an answer to that packet: it is let through if there is such a
//! way, and what would be replaced in the answer is replaced in the error, in the packet that it quotes, too.

use core::ops::Deref as _;
use core::sync::atomic::Ordering::Relaxed;

use weir_common::DropReason;
use weir_common::event::Hook;
use weir_common::way::{Rewrite, Way, WayState};

use crate::l3::{self, Body, Extent, Side};
use crate::l4::{self, Layout};
use crate::packet::{Changed, Delta, Packet, Zero};
use crate::tables::Tables;
use crate::verdict::{Outcome, Scratch};
use crate::way::take;

/// Where the packet is that an error quotes, in bytes from the start of the frame.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Quoted {
    /// Of the error's own header.
    icmp: usize,
    /// Of the quoted transport header.
    transport: usize,
}

/// Finds the packet that the error at hand quotes, which is then the question, and the way of its answers: what becomes of
/// the error is then in the step. `None` if nothing is known about it.
///
/// # Errors
/// Those of parsing the quotation; [`DropReason::NoFlow`] if the error goes to another than who sent the packet; what
/// policy says about the conversation today.
#[inline(always)]
pub(crate) fn read<P: Packet, T: Tables>(
    packet: &P,
    tables: &T,
    scratch: &mut Scratch,
) -> Result<Option<Quoted>, DropReason> {
    let family = scratch.arrival.family();
    let icmp = scratch.arrival.transport();
    let quoted = &mut scratch.question;
    let header = family.header(packet, icmp + 8, quoted)?;
    let inner: Body = family.body(packet, icmp + 8, &header, Extent::Quoted)?;
    l4::parse_quoted(packet, family, &inner, quoted)?;
    scratch.arrival.length = inner.offset as u32;
    tables.settle(scratch);
    let quoted = &scratch.question;
    family.check(quoted)?;
    if !quoted.is_answer_to(&scratch.trace.tuple) {
        return Err(DropReason::NoFlow);
    }
    let is_known = tables.about(scratch).is_known()?;
    let transport = scratch.arrival.length as usize;
    Ok(is_known.then_some(Quoted { icmp, transport }))
}

/// Looks for the way of answers to the packet in the question. The key of that way is then the other one.
///
/// [`Outcome::UNKNOWN`] if there is none. Drops for what policy denies.
pub fn about<T: Tables + ?Sized>(tables: &T, scratch: &mut Scratch) -> Outcome {
    let hook = scratch.trace.tuple.hook;
    scratch.other.set_reversed(&scratch.question, hook);
    let result = if let Some(way) = tables.way(&scratch.other) {
        follow(tables, scratch, way.deref(), 1)
    } else if let Some(plan) = tables.plan(&scratch.other) {
        follow(tables, scratch, &plan.back, 0)
    } else {
        Ok(false)
    };
    Outcome::of(result)
}

#[inline(always)]
fn follow<T: Tables + ?Sized>(
    tables: &T,
    scratch: &mut Scratch,
    way: &Way,
    is_established: u32,
) -> Result<bool, DropReason> {
    let echo = scratch.other.echo();
    if !take(scratch, way, echo) {
        return Ok(false);
    }
    let hook = scratch.trace.tuple.hook;
    let is_at_pod = matches!(hook, Hook::FROM_POD | Hook::TO_POD);
    if is_at_pod && way.epoch.load(Relaxed) != tables.epoch() {
        // What policy denies today, errors say nothing about either. The quoted packet is kept meanwhile.
        let quoted = scratch.question;
        let is_opener = scratch.state & WayState::OPENER != 0;
        ask_about(scratch, way, is_opener);
        scratch.trace.is_established = is_established;
        let judged = tables.judge(scratch).is_known();
        scratch.question = quoted;
        judged?;
    }
    Ok(true)
}

/// Writes the question of the opener of the conversation whose way is the other one.
#[inline(always)]
fn ask_about(scratch: &mut Scratch, way: &Way, is_opener: bool) {
    if way.step.rewrite.is_hairpin() {
        scratch.question.set_to_itself(&scratch.other);
    } else if is_opener {
        scratch.question = scratch.other;
        scratch.question.go(&way.step);
    } else {
        let other = &scratch.other;
        scratch.question.set_reversed(other, Hook::default());
    }
}

/// Replaces one end in the quoted packet and, where it stands on the other side, outside. The quoted
/// transport's own checksum stays as it is: it may not even be quoted, and nobody compares it.
///
/// # Errors
/// [`DropReason::WriteFailed`]; the packet may then be half changed and must be dropped.
#[inline(always)]
pub(crate) fn rewrite<P: Packet>(
    packet: &mut P,
    scratch: &Scratch,
    at: &Quoted,
) -> Result<(), DropReason> {
    let family = scratch.arrival.family();
    let (quoted, outer) = (&scratch.question, &scratch.trace.tuple);
    let step = &scratch.step;
    let [a, b, _] = *step.words();
    let new = [a, b];
    let ([a, b, c, d, _], [e, f, g, h, _]) = (*quoted.words(), *outer.words());
    let (inner_side, outer_side, old, port, outer_old) = if step.rewrite == Rewrite::SOURCE {
        let port = quoted.destination_port;
        (Side::Destination, Side::Source, [c, d], port, [e, f])
    } else if step.rewrite == Rewrite::DESTINATION {
        let port = quoted.source_port;
        (Side::Source, Side::Destination, [a, b], port, [g, h])
    } else {
        return Ok(());
    };
    let Some(layout) = Layout::of(family, quoted.protocol) else {
        return Err(DropReason::WriteFailed);
    };
    let checksum = at.icmp + 2;
    let inner = at.icmp + 8;
    family.replace_quoted(packet, inner, inner_side, old, new, &step.addr, checksum)?;
    if u16::from(port) != u16::from(step.port) {
        let delta = Delta::of_ports(port, step.port);
        packet.fix_checksum(checksum, Changed::Ports(Zero::IsSum), delta)?;
        let offset = match inner_side {
            Side::Source => layout.source_port,
            Side::Destination => layout.destination_port,
        };
        packet.store(at.transport + offset, &step.port.0)?;
    }
    // An error of a router on the way comes from the router.
    if outer_old != old {
        return Ok(());
    }
    let covering = family.covers_icmp().then_some((checksum, Zero::IsSum));
    family.replace(packet, outer_side, old, new, &step.addr, covering)
}

/// [`rewrite`] for a hairpin, as [`crate::nat::turn`] does it.
///
/// # Errors
/// As there.
#[inline(always)]
pub(crate) fn turn<P: Packet>(
    packet: &mut P,
    scratch: &Scratch,
    at: &Quoted,
) -> Result<(), DropReason> {
    let family = scratch.arrival.family();
    let (quoted, step) = (&scratch.question, &scratch.step);
    let Some(layout) = Layout::of(family, quoted.protocol) else {
        return Err(DropReason::WriteFailed);
    };
    let (old, offset) = if step.rewrite == Rewrite::HAIRPIN_SOURCE {
        (quoted.destination_port, layout.destination_port)
    } else {
        (quoted.source_port, layout.source_port)
    };
    family.turn(packet, at.icmp + 8, quoted)?;
    let delta = Delta::of_ports(old, step.port);
    packet.fix_checksum(at.icmp + 2, Changed::Ports(Zero::IsSum), delta)?;
    packet.store(at.transport + offset, &step.port.0)?;
    family.turn(packet, l3::OFFSET, &scratch.trace.tuple)
}
