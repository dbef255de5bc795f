//! The first answers of a conversation that is planned: when they make ways of the plan, and how.

use core::sync::atomic::Ordering::Relaxed;

use weir_common::counter::Counter;
use weir_common::event::Hook;
use weir_common::service::Affinity;
use weir_common::way::{Mark, Plan, WayKey, WayState};
use weir_common::{DropReason, Protocol};

use crate::arrive::Arrival;
use crate::fragment;
use crate::policy;
use crate::share;
use crate::tables::{Added, Tables};
use crate::verdict::{Outcome, Scratch};
use crate::way::{self, account, ask_for_opener, record, take};

/// Datagrams that somebody outside may send without an answer before their conversation has ways.
const FEW: u64 = 16;

/// Is the packet at hand the first answer of a plan? The conversation then gets its ways.
///
/// [`Outcome::UNKNOWN`] if it answers nothing.
pub fn answer<T: Tables + ?Sized>(tables: &T, scratch: &mut Scratch) -> Outcome {
    Outcome::of(take_answer(tables, scratch))
}

#[inline(always)]
fn take_answer<T: Tables + ?Sized>(tables: &T, scratch: &mut Scratch) -> Result<bool, DropReason> {
    let Some(plan) = tables.plan(&scratch.trace.tuple) else {
        return Ok(false);
    };
    let key = &scratch.trace.tuple;
    let (hook, protocol) = (key.hook, key.protocol);
    scratch.other = plan.key;
    let echo = key.echo();
    if !take(scratch, &plan.back, echo) {
        return Ok(false);
    }
    let segment = scratch.arrival.segment;
    // Who opens something to the node answers nobody, whatever ports a pod has asked from: they may be those of a server.
    let opens = hook == Hook::FROM_NET && segment.is_syn();
    // A process of the node has answered when it has acknowledged the SYN: its ends may be those of a conversation without us.
    let is_nodes = hook == Hook::TO_NET && scratch.arrival.mark == Mark::NONE;
    let is_said = if segment.is_answer() {
        acknowledges(&scratch.arrival, &plan)
    } else {
        plan.way.others_end.load(Relaxed) != 0
    };
    if opens || (protocol == Protocol::TCP && is_nodes && !is_said) {
        return Ok(false);
    }
    let epoch = tables.epoch();
    let is_at_pod = matches!(hook, Hook::FROM_POD | Hook::TO_POD);
    if is_at_pod && (segment.is_syn() || plan.back.epoch.load(Relaxed) != epoch) {
        if segment.is_syn() {
            scratch.question = scratch.trace.tuple;
        } else {
            ask_for_opener(scratch, false);
        }
        if let Err(reason) = tables.judge(scratch).is_known() {
            if !segment.is_syn() && protocol != Protocol::TCP {
                tables.remove_plan(&scratch.trace.tuple);
            }
            return Err(reason);
        }
        if !segment.is_syn() {
            record(&plan.way, plan.key.hook, &scratch.judgement, true, epoch);
            record(&plan.back, hook, &scratch.judgement, false, epoch);
            policy::tell(tables, scratch);
        }
    }
    scratch.device = plan.back.device.load(Relaxed);
    // A refusal is no answer: it would let a flood of SYNs to a closed port fill the table of the answered.
    if segment.is_rst() {
        plan.back.seen.store(tables.now(), Relaxed);
        plan.back.state.fetch_or(WayState::RESET, Relaxed);
        return Ok(true);
    }
    let is_first = plan.back.packets.load(Relaxed) == 0;
    account(tables, scratch, &plan.back);
    fragment::remember(tables, scratch);
    if segment.is_syn() {
        return Ok(true);
    }
    // What goes on talking was not ended by a RST.
    if plan.back.state.load(Relaxed) & WayState::RESET != 0 {
        plan.back.state.fetch_and(!WayState::RESET, Relaxed);
        plan.way.state.fetch_and(!WayState::RESET, Relaxed);
    }
    // What the first one says somebody elsewhere has to acknowledge: the SYN|ACK, or in midstream whatever comes first.
    let is_said = segment.is_answer() || plan.way.others_end.load(Relaxed) == 0;
    let is_whole = scratch.arrival.has_transport() && !segment.is_first();
    if is_said && protocol == Protocol::TCP && is_whole {
        let end = scratch.arrival.end;
        plan.way.others_end.store(end, Relaxed);
    }
    if plan.back.state.load(Relaxed) & WayState::OTHER_FIN != 0 {
        plan.back.state.fetch_or(WayState::FIN_HEARD, Relaxed);
    }
    if segment.is_fin() && is_whole {
        plan.back.state.fetch_or(WayState::FIN, Relaxed);
        plan.way.state.fetch_or(WayState::OTHER_FIN, Relaxed);
        plan.way.others_end.store(scratch.arrival.end, Relaxed);
    }
    if is_first {
        tables.count(Counter::FlowsAnswered);
    }
    let Scratch {
        plan: copy,
        back,
        other,
        trace,
        arrival,
        ..
    } = scratch;
    // Another CPU may give the row to somebody else in this moment. What was copied is known to be the plan, or is not used.
    copy.set(&plan);
    *back = trace.tuple;
    let is_ours = copy.back.is_of(echo) && copy.way.is_of(other.echo()) && copy.key.is(other);
    if is_ours && is_settled(copy, arrival, false) {
        return tables.establish(scratch).is_known();
    }
    if is_ours && protocol == Protocol::TCP {
        remember(tables, copy, &mut scratch.last);
    }
    Ok(true)
}

/// Is an answer to what the opener of a plan has said last? What it said first may have had data, and come again without, which stands for
/// no more than its bytes; and a RST of who knows nothing of a connection acknowledges nothing (RFC 9293 section 3.10.7.1).
#[inline(always)]
fn acknowledges(arrival: &Arrival, plan: &Plan) -> bool {
    let end = plan.back.others_end.load(Relaxed);
    let short = end.wrapping_sub(arrival.acknowledges);
    let off = short.min(short.wrapping_neg());
    u64::from(off) <= plan.way.bytes.load(Relaxed)
        || (arrival.segment.is_rst() && arrival.acknowledges == 0)
}

/// Keeps what was drawn for a connection that stays a plan though it was answered: its opener finds no row under its own key.
#[inline(always)]
fn remember<T: Tables + ?Sized>(tables: &T, plan: &Plan, row: &mut Affinity) {
    let is_masquerade = plan.way.state.load(Relaxed) & WayState::MASQUERADE != 0;
    if plan.way.backend != 0 || is_masquerade {
        (row.backend, row.generation) = (plan.way.backend, plan.way.generation);
        (row.addr, row.port) = (plan.way.step.addr, plan.way.step.port);
        row.used = plan.key.echo().into();
        tables.keep_choice(&plan.key, row);
    }
}

/// Does a packet make ways of a plan? Of a conversation other than TCP the third does: most are a question and its answer,
/// and over at once. Of a connection the first answer does if a pod of this node has opened it, which has but one address. Anybody
/// else may give addresses that are not theirs, so they must have had the answer.
#[inline(always)]
pub(crate) fn is_settled(plan: &Plan, arrival: &Arrival, is_of_opener: bool) -> bool {
    let segment = arrival.segment;
    let answers = plan.back.packets.load(Relaxed);
    if plan.key.protocol != Protocol::TCP {
        let packets = plan.way.packets.load(Relaxed) + answers;
        return packets > FEW || (packets > 2 && (answers > 0 || plan.way.owner != 0));
    }
    // A refusal says nothing. What the first answer says nobody guesses who has not had it: an acknowledgement is of that, or of
    // what was said since, and a sequence number stands for no more than a byte of what has passed here (RFC 9293 section 3.4).
    let said = plan.way.others_end.load(Relaxed);
    let beyond = u64::from(arrival.acknowledges.wrapping_sub(said));
    let has_heard = beyond <= plan.back.bytes.load(Relaxed);
    let is_openers = is_of_opener && !segment.is_answer() && arrival.has_transport() && has_heard;
    said != 0 && !segment.is_syn() && (plan.way.owner != 0 || is_openers)
}

/// Makes two ways of the plan at hand. Without room for them it stays what it is, and its packets go the cold path.
pub fn establish<T: Tables + ?Sized>(tables: &T, scratch: &mut Scratch) -> Outcome {
    let Scratch {
        plan, back, last, ..
    } = scratch;
    let is_tcp = back.protocol == Protocol::TCP;
    if !make_ways(tables, back, plan) {
        prove(tables, back, plan);
        if is_tcp {
            remember(tables, plan, last);
        }
    } else if is_tcp && plan.way.owner == 0 {
        tables.forget_choice(&plan.key);
    }
    Outcome::KNOWN
}

/// False without room, or if they are somebody else's.
#[inline(always)]
fn make_ways<T: Tables + ?Sized>(tables: &T, back: &WayKey, plan: &Plan) -> bool {
    let owner = plan.way.owner;
    let is_tcp = back.protocol == Protocol::TCP;
    if owner != 0
        && !is_tcp
        && let Some(share) = tables.share(owner)
        && !share::stream(&share, tables.now())
    {
        return true;
    }
    let added = way::add(tables, &plan.key, &plan.way);
    match added {
        Ok(Added::New) => {}
        // Another CPU has had the same packet in this moment; or this opener has gone another way before.
        Ok(Added::Already)
            if tables
                .way(&plan.key)
                .is_some_and(|held| held.step.is(&plan.way.step)) => {}
        _ => return false,
    }
    if way::add(tables, back, &plan.back).is_err() {
        // What was there before is somebody's.
        if added == Ok(Added::New) {
            way::remove(tables, &plan.key, owner);
        }
        return false;
    }
    tables.remove_plan(back);
    if is_tcp
        && added == Ok(Added::New)
        && plan.key.hook == Hook::FROM_POD
        && let Some(share) = tables.share(owner)
    {
        share::close(&share);
    }
    true
}

/// A plan that stays one was found worth ways.
#[inline(always)]
fn prove<T: Tables + ?Sized>(tables: &T, back: &WayKey, plan: &Plan) {
    if let Some(held) = tables.plan(back)
        && held.key.is(&plan.key)
    {
        held.way.state.fetch_or(WayState::PROVEN, Relaxed);
    }
}
