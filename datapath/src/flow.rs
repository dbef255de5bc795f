//! The state of a conversation: found, opened, gone on with. One entry serves both directions.

use core::ops::Deref;
use core::sync::atomic::Ordering::Relaxed;

use weir_common::counter::Counter;
use weir_common::flow::{Flow, FlowBits, Nat, Peer};
use weir_common::nat::Masquerade;
use weir_common::{DropReason, Protocol};

use crate::l4::Segment;
use crate::policy::{Here, Judgement, judge};
use crate::tables::{FlowTable, Opened, Tables};
use crate::tuple::{AlignedKey, End, Tuple, same_peer};
use crate::verdict::{Scratch, Trace};

/// How long a conversation other than TCP may be silent before its ports can serve another one, in
/// nanoseconds: what Linux grants a UDP stream (`nf_conntrack_udp_timeout_stream`).
const IDLE: u64 = 120_000_000_000;

/// A flow and where it was found.
#[derive(Clone, Copy, Debug)]
pub struct Found<R> {
    pub flow: R,
    pub table: FlowTable,
    pub sender: Sender,
}

/// Who sends the packet at hand.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Sender {
    Opener,
    Responder,
}

/// Can the packet at hand belong to the flow that has its ports?
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Fit {
    Yes,
    /// The flow is over; the packet opens another one in its place.
    Over,
    /// The flow is alive and translated in another way.
    Collision,
}

/// Whether another hook of this node has already counted the packet.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Count {
    Here,
    /// Only what comes from elsewhere: a pod of this node is counted where it sends.
    FromElsewhere,
}

/// Is a new flow translated?
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Through {
    Nothing,
    /// Through the service that was asked, to the backend of `nat`.
    Service,
}

/// A packet as the flow sees it.
#[derive(Debug)]
pub struct Seen {
    pub segment: Segment,
    /// Of the IP packet in bytes.
    pub length: u32,
    pub count: Count,
}

/// The flow of a key.
#[inline(always)]
pub fn find<T: Tables>(tables: &T, tuple: &Tuple, key: &AlignedKey) -> Option<Found<T::FlowRef>> {
    let (flow, table) = match tables.flow(FlowTable::Answered, key) {
        Some(flow) => (flow, FlowTable::Answered),
        None => (tables.flow(FlowTable::HalfOpen, key)?, FlowTable::HalfOpen),
    };
    let opener_is_high = flow.bits.load(Relaxed) & FlowBits::OPENER_IS_HIGH != 0;
    let sender = if opener_is_high == (tuple.end() == End::High) {
        Sender::Opener
    } else {
        Sender::Responder
    };
    Some(Found {
        flow,
        table,
        sender,
    })
}

impl<R: Deref<Target = Flow>> Found<R> {
    /// Does the entry only lead to another one?
    #[inline(always)]
    pub fn leads_to_backend(&self) -> bool {
        self.flow.bits.load(Relaxed) & FlowBits::TO_BACKEND != 0
    }

    /// Was the flow opened through a service?
    #[inline(always)]
    pub fn is_from_service(&self) -> bool {
        self.flow.bits.load(Relaxed) & FlowBits::FROM_SERVICE != 0
    }

    /// Have both sides said goodbye, or one broken off?
    #[inline(always)]
    pub fn is_closed(&self) -> bool {
        FlowBits::is_closed(self.flow.bits.load(Relaxed))
    }

    /// Can a packet to `service`, if it was translated, belong to this flow?
    #[inline(always)]
    pub fn fit(
        &self,
        tables: &impl Tables,
        protocol: Protocol,
        segment: Segment,
        service: Option<&Peer>,
    ) -> Fit {
        let bits = self.flow.bits.load(Relaxed);
        let agrees = match (self.sender, service) {
            (Sender::Opener, Some(service)) => {
                bits & FlowBits::FROM_SERVICE != 0 && same_peer(&self.flow.nat.peer, service)
            }
            (Sender::Opener, None) => bits & FlowBits::FROM_SERVICE == 0,
            (Sender::Responder, Some(_)) => false,
            (Sender::Responder, None) => true,
        };
        if bits & FlowBits::TO_BACKEND != 0 {
            return Fit::Collision;
        }
        let opens_back = self.sender == Sender::Responder && segment.is_syn();
        if agrees && !(opens_back && FlowBits::is_closed(bits)) {
            return Fit::Yes;
        }
        let is_over = FlowBits::is_closed(bits)
            || (protocol != Protocol::TCP
                && tables.now().saturating_sub(self.flow.seen.load(Relaxed)) > IDLE);
        if is_over { Fit::Over } else { Fit::Collision }
    }
}

/// Goes on with a flow: judges it again if it must be, and accounts for the packet. Returns the
/// interface index of the device that the packet goes to, 0 when that is not a pod of this node.
///
/// # Errors
/// Those of [`judge`], after which the flow is forgotten; [`DropReason::NoFlow`].
#[inline(always)]
pub fn proceed<T: Tables>(
    tables: &T,
    here: &Here<'_>,
    scratch: &mut Scratch,
    found: &Found<T::FlowRef>,
    seen: &Seen,
) -> Result<u32, DropReason> {
    let flow = &found.flow;
    let segment = seen.segment;
    let is_opener = found.sender == Sender::Opener;
    if scratch.trace.tuple.protocol == Protocol::ICMP && is_opener == segment.is_answer() {
        return Err(DropReason::NoFlow);
    }
    let epoch = tables.epoch();
    let opens_back = !is_opener && segment.is_syn();
    if segment.is_syn() || flow.epoch.load(Relaxed) != epoch {
        // The question is the opener's, also when the packet is an answer; but a SYN of the other side
        // asks for itself, and its denial says nothing about the flow.
        if is_opener || opens_back {
            scratch.question = scratch.trace.tuple;
        } else {
            scratch.question.set_reversed(&scratch.trace.tuple);
        }
        let (rule, merge) = (&mut scratch.trace.rule, &scratch.merge);
        match judge(tables, here, &scratch.question, rule, merge) {
            Ok(judgement) if !opens_back => record(flow, &judgement, epoch),
            Ok(_) => {}
            Err(reason) => {
                // A TCP flow keeps its entry, and with it who opened it. Without one, what the other side
                // sends again would open a flow of its own, and the denied packets would be its replies.
                // It stays of an old epoch, so every packet is judged.
                if !opens_back && scratch.trace.tuple.protocol != Protocol::TCP {
                    tables.forget(&scratch.key);
                }
                return Err(reason);
            }
        }
    }

    Ok(account(tables, scratch, found, seen))
}

/// Accounts for a packet of a flow that nobody has to judge here. Returns what [`proceed`] does.
#[inline(always)]
pub fn account<T: Tables>(
    tables: &T,
    scratch: &mut Scratch,
    found: &Found<T::FlowRef>,
    seen: &Seen,
) -> u32 {
    let flow = &found.flow;
    let segment = seen.segment;
    let is_opener = found.sender == Sender::Opener;
    let bits = flow.bits.load(Relaxed);
    let ended_before = if is_opener && segment.is_syn() {
        CLOSING
    } else if !segment.is_rst() {
        FlowBits::RESET
    } else {
        0
    };
    if bits & ended_before != 0 {
        flow.bits.fetch_and(!ended_before, Relaxed);
    }
    let mut news = 0;
    if seen.segment.is_fin() {
        news |= if is_opener {
            FlowBits::OPENER_FIN
        } else {
            FlowBits::RESPONDER_FIN
        };
    }
    if seen.segment.is_rst() {
        news |= FlowBits::RESET;
    }
    let others_fin = if is_opener {
        FlowBits::RESPONDER_FIN
    } else {
        FlowBits::OPENER_FIN
    };
    if bits & others_fin != 0 {
        news |= FlowBits::FIN_HEARD;
    }
    // A refusal is no answer: it would let a flood of SYNs to a closed port fill the table of the
    // answered.
    let is_answer = !is_opener && !seen.segment.is_rst();
    if is_answer {
        news |= FlowBits::ANSWERED;
    }
    if news & !bits != 0 {
        flow.bits.fetch_or(news, Relaxed);
    }

    let device = if is_opener {
        flow.responder_device.load(Relaxed)
    } else {
        flow.opener_device.load(Relaxed)
    };
    let sender_device = if is_opener {
        flow.opener_device.load(Relaxed)
    } else {
        flow.responder_device.load(Relaxed)
    };
    if seen.count == Count::Here || sender_device == 0 {
        let way = usize::from(!is_opener);
        flow.packets[way].fetch_add(1, Relaxed);
        flow.bytes[way].fetch_add(u64::from(seen.length), Relaxed);
    }
    touch(tables, flow);

    if is_answer && found.table == FlowTable::HalfOpen {
        if bits & FlowBits::ANSWERED == 0 {
            tables.count(Counter::FlowsAnswered);
        }
        tables.promote(&scratch.key, flow);
        if bits & FlowBits::FROM_SERVICE != 0 {
            // The entry that leads the client to its backend lives as long as the flow itself.
            scratch.question.set_reversed(&scratch.trace.tuple);
            scratch.question.set_destination(&flow.nat.peer);
            scratch.question.write_key(&mut scratch.probe);
            if let Some(lead) = tables.flow(FlowTable::HalfOpen, &scratch.probe) {
                tables.promote(&scratch.probe, &lead);
            }
        }
    }
    device
}

/// Opens a flow for the packet at hand if policy allows it. Returns what [`proceed`] does.
///
/// # Errors
/// Those of [`judge`]; [`DropReason::NoFlow`] for what only answers; [`DropReason::TableFull`].
#[inline(always)]
pub fn open<T: Tables>(
    tables: &T,
    here: &Here<'_>,
    scratch: &mut Scratch,
    seen: &Seen,
    through: Through,
) -> Result<u32, DropReason> {
    if seen.segment.is_answer() {
        return Err(DropReason::NoFlow);
    }
    // Read before judging: a change in between makes the next packet ask again.
    let epoch = tables.epoch();
    let Trace { tuple, rule, .. } = &mut scratch.trace;
    let judgement = judge(tables, here, tuple, rule, &scratch.merge)?;
    let mut bits = opener_bit(&scratch.trace.tuple);
    if seen.segment.is_fin() {
        bits |= FlowBits::OPENER_FIN;
    }
    let flow = &mut scratch.flow;
    flow.nat = scratch.nat;
    match through {
        Through::Service => {
            bits |= FlowBits::FROM_SERVICE;
            flow.nat.peer = scratch.asked;
        }
        Through::Nothing => flow.nat = Nat::default(),
    }
    write(flow, tables.now(), bits, 1, seen.length);
    record(flow, &judgement, epoch);
    match tables.open(&scratch.key, flow)? {
        Opened::New => tables.count(Counter::FlowsOpened),
        Opened::Already => {
            if let Some(flow) = tables.flow(FlowTable::HalfOpen, &scratch.key) {
                flow.packets[0].fetch_add(1, Relaxed);
                flow.bytes[0].fetch_add(u64::from(seen.length), Relaxed);
            }
        }
    }
    Ok(judgement.responder_device)
}

/// Opens a flow through a service for a packet from outside. Who judges it is the pod's side: the entry
/// is of another epoch than any.
///
/// # Errors
/// [`DropReason::NoFlow`] for what only answers; [`DropReason::TableFull`].
#[inline(always)]
pub fn open_from_outside<T: Tables>(
    tables: &T,
    scratch: &mut Scratch,
    seen: &Seen,
) -> Result<(), DropReason> {
    if seen.segment.is_answer() {
        return Err(DropReason::NoFlow);
    }
    let mut bits = opener_bit(&scratch.trace.tuple) | FlowBits::FROM_SERVICE;
    if seen.segment.is_fin() {
        bits |= FlowBits::OPENER_FIN;
    }
    let flow = &mut scratch.flow;
    flow.nat = scratch.nat;
    flow.nat.peer = scratch.asked;
    let (packets, length) = match seen.count {
        Count::Here => (1, seen.length),
        Count::FromElsewhere => (0, 0),
    };
    write(flow, tables.now(), bits, packets, length);
    record(flow, &Judgement::default(), tables.epoch().wrapping_sub(1));
    if tables.open(&scratch.key, flow)? == Opened::New {
        tables.count(Counter::FlowsOpened);
    }
    Ok(())
}

/// Remembers which backend the packets of `question`, to a service, go to.
///
/// # Errors
/// [`DropReason::TableFull`].
#[inline(always)]
pub fn lead<T: Tables>(tables: &T, scratch: &mut Scratch) -> Result<(), DropReason> {
    scratch.question.write_key(&mut scratch.probe);
    let flow = &mut scratch.flow;
    flow.nat = scratch.nat;
    let bits = opener_bit(&scratch.question) | FlowBits::TO_BACKEND;
    write(flow, tables.now(), bits, 0, 0);
    record(flow, &Judgement::default(), 0);
    tables.open(&scratch.probe, flow)?;
    Ok(())
}

/// Notes that an entry was used.
#[inline(always)]
pub fn touch<T: Tables>(tables: &T, flow: &Flow) {
    let now = tables.now();
    if flow.seen.load(Relaxed) != now {
        flow.seen.store(now, Relaxed);
    }
}

const CLOSING: u32 =
    FlowBits::OPENER_FIN | FlowBits::RESPONDER_FIN | FlowBits::FIN_HEARD | FlowBits::RESET;

#[inline(always)]
fn opener_bit(tuple: &Tuple) -> u32 {
    match tuple.end() {
        End::High => FlowBits::OPENER_IS_HIGH,
        End::Low => 0,
    }
}

#[inline(always)]
fn write(flow: &mut Flow, now: u64, bits: u32, packets: u64, length: u32) {
    flow.created = now;
    flow.seen.store(now, Relaxed);
    flow.packets[0].store(packets, Relaxed);
    flow.packets[1].store(0, Relaxed);
    flow.bytes[0].store(u64::from(length), Relaxed);
    flow.bytes[1].store(0, Relaxed);
    flow.bits.store(bits, Relaxed);
    flow.masquerade.store(Masquerade::UNDECIDED.0, Relaxed);
}

#[inline(always)]
fn record(flow: &Flow, judgement: &Judgement, epoch: u32) {
    flow.egress_rule.store(judgement.egress.0, Relaxed);
    flow.ingress_rule.store(judgement.ingress.0, Relaxed);
    flow.opener_device.store(judgement.opener_device, Relaxed);
    flow.responder_device
        .store(judgement.responder_device, Relaxed);
    flow.epoch.store(epoch, Relaxed);
}
