//! A plan takes its place: under the key of its first answer, if that is nobody else's.

use core::sync::atomic::Ordering::Relaxed;

use weir_common::counter::Counter;
use weir_common::event::Hook;
use weir_common::policy::RuleId;
use weir_common::way::{Plan, Way, WayKey, WayState};
use weir_common::{DropReason, Protocol};

use crate::arrive::Arrival;
use crate::share;
use crate::tables::{Added, Tables};
use crate::verdict::{Outcome, Scratch};
use crate::way::{self, is_over};
use crate::words::same;

/// How long a plan keeps its place from others, in nanoseconds: for TCP what `SYN` is sent again
/// within (Linux sends it until 63 s, `nf_conntrack_tcp_timeout_syn_sent` is 120 s), else what Linux grants a datagram
/// that nobody answers (`nf_conntrack_udp_timeout`).
const TCP_PATIENCE: u64 = 60_000_000_000;
const OTHER_PATIENCE: u64 = 30_000_000_000;
/// TCP whose opener is elsewhere and has not acknowledged, since what that one has sent: anybody may write such a SYN, and would
/// hold every port of the node towards a backend elsewhere with some hundreds a second. The first repetitions of a SYN, 1 and
/// 2 s apart, come within it.
pub(crate) const STRANGERS_PATIENCE: u64 = 3_000_000_000;
/// The same against who has made it: somebody who asks from new ports without an answer runs out of them by itself.
const OWN_PATIENCE: u64 = 2_000_000_000;

/// What became of a plan.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Reserved {
    New,
    /// It was there before: this is not the first packet.
    Again,
    /// The answers are another conversation's.
    Taken,
}

impl Reserved {
    const NEW: Outcome = Outcome(1 << 9);
    const AGAIN: Outcome = Outcome(2 << 9);
    const TAKEN: Outcome = Outcome(3 << 9);

    /// From what [`reserve`] returns.
    ///
    /// # Errors
    /// [`DropReason::TableFull`], [`DropReason::PodLimit`].
    #[inline(always)]
    pub fn of(outcome: Outcome) -> Result<Self, DropReason> {
        match outcome {
            Self::NEW => Ok(Self::New),
            Self::AGAIN => Ok(Self::Again),
            Self::TAKEN => Ok(Self::Taken),
            Outcome(number) => {
                Err(DropReason::from_number(number as u8).unwrap_or(DropReason::TableFull))
            }
        }
    }
}

/// Reserves the answers of the plan at hand. Whoever makes ways of a plan adds them before it removes the plan, so a key
/// is always in one of the two tables, and the order here (the plan first, then a look at ways) misses none.
pub fn reserve<T: Tables + ?Sized>(tables: &T, scratch: &mut Scratch) -> Outcome {
    match decide(tables, scratch) {
        Ok(Reserved::New) => Reserved::NEW,
        Ok(Reserved::Again) => Reserved::AGAIN,
        Ok(Reserved::Taken) => Reserved::TAKEN,
        Err(reason) => Outcome::of(Err(reason)),
    }
}

#[inline(always)]
fn decide<T: Tables + ?Sized>(tables: &T, scratch: &mut Scratch) -> Result<Reserved, DropReason> {
    let Scratch {
        plan,
        back,
        other,
        arrival,
        judgement,
        ..
    } = scratch;
    back.set_other(&plan.key, &plan.way.step);
    plan.back.echo.store(back.echo(), Relaxed);
    let mut reserved = Reserved::New;
    if plan.key.hook == Hook::FROM_POD
        && let Some(share) = tables.share(plan.way.owner)
        && !share::may_open(&share, back.protocol, tables.now())
        && tables.way(back).is_none()
        && (back.protocol != Protocol::TCP
            || tables.plan(back).is_none_or(|held| {
                !held.key.is(&plan.key) || begins_another(tables, arrival, &held)
            }))
    {
        share.refused.fetch_add(1, Relaxed);
        return Err(DropReason::PodLimit);
    }
    if tables.add_plan(back, plan)? == Added::Already
        && let Some(held) = tables.plan(back)
    {
        let is_openers = held.key.is(&plan.key);
        if is_openers && !begins_another(tables, arrival, &held) {
            reserved = Reserved::Again;
            // It was told with the first packet, or the first one after a change.
            if held.way.epoch.load(Relaxed) == plan.way.epoch.load(Relaxed) {
                (judgement.egress_audit, judgement.ingress_audit) = (RuleId::NONE, RuleId::NONE);
            }
        } else if !is_openers
            && !is_moved(&plan.key, &held.key)
            && !is_forgotten(tables, plan, &held)
        {
            return Ok(Reserved::Taken);
        }
        // What is put in the place of another costs whoever was used longest ago its row.
        let is_the_same = reserved == Reserved::Again
            && held.way.step.is(&plan.way.step)
            && held.back.step.is(&plan.back.step)
            && held.way.backend == plan.way.backend
            && held.way.generation.0 == plan.way.generation.0
            && held.back.is_of(back.echo());
        // A SYN that leads elsewhere begins there.
        if reserved == Reserved::Again && (is_the_same || !arrival.segment.is_syn()) {
            go_on(plan, &held, arrival, is_the_same);
        }
        if !is_the_same {
            tables.remove_plan(back);
            // Another CPU may have found the same, and been sooner.
            if tables.add_plan(back, plan)? == Added::Already
                && tables
                    .plan(back)
                    .is_some_and(|held| !held.key.is(&plan.key))
            {
                return Ok(Reserved::Taken);
            }
        }
    }
    if let Some(way) = tables.way(back) {
        other.set_other(back, &way.step);
        let is_same = other.is(&plan.key);
        let is_answer = way.state.load(Relaxed) & WayState::OPENER == 0;
        let is_moved = is_answer && is_moved(&plan.key, other);
        if !is_same && (is_moved || is_over(tables, back, &way, other)) {
            let owner = way.owner;
            way::remove(tables, other, owner);
            way::remove(tables, back, owner);
        } else if is_same {
            // Another CPU has just had the answer, or the way there was lost. Without room the plan stays.
            reserved = Reserved::Again;
            if let Ok(added) = way::add(tables, &plan.key, &plan.way) {
                tables.remove_plan(back);
                if added == Added::New {
                    tables.count(Counter::WaysLost);
                }
            }
        } else {
            tables.remove_plan(back);
            return Ok(Reserved::Taken);
        }
    }
    // Datagrams that stay plans, because their pod has all the streams that it may, keep rows from others by each packet.
    if plan.key.hook == Hook::FROM_POD
        && (reserved == Reserved::New || plan.key.protocol != Protocol::TCP)
        && let Some(share) = tables.share(plan.way.owner)
    {
        share::open(&share, tables.now());
    }
    Ok(reserved)
}

/// Has one opener sent both datagrams, from one port? He asks in another way now: the service's address, or the backend's own. Their
/// answers are one, and go to what was asked last. Of a connection that is no question: it holds.
#[inline(always)]
fn is_moved(asks: &WayKey, asked: &WayKey) -> bool {
    asks.protocol != Protocol::TCP
        && u16::from(asks.source_port) == u16::from(asked.source_port)
        && same(&asks.source, &asked.source)
}

/// Does a packet of the opener of a plan begin another connection, where the one before is closed?
#[inline(always)]
fn begins_another<T: Tables + ?Sized>(tables: &T, arrival: &Arrival, held: &Plan) -> bool {
    let state = held.way.state.load(Relaxed) | (held.back.state.load(Relaxed) & WayState::RESET);
    let seen = held.way.seen.load(Relaxed);
    let seen = seen.max(held.back.seen.load(Relaxed));
    arrival.segment.is_syn() && way::is_closed(tables, state, seen)
}

/// The opener of a plan goes on: takes over what is known of it, and notes what its packet says in the row itself, if that leads where
/// the packet goes.
#[inline(always)]
fn go_on(plan: &mut Plan, held: &Plan, arrival: &Arrival, is_the_same: bool) {
    let segment = arrival.segment;
    let known = held.way.state.load(Relaxed);
    let is_proven = known & WayState::PROVEN != 0;
    let is_reset = (known | held.back.state.load(Relaxed)) & WayState::RESET != 0;
    // What the packet takes back. Whatever was said goodbye to before, who opens anew has not; but no more does a SYN alone say that
    // an open connection was not broken off, and nobody who asks again was refused for good.
    let over = match segment.is_syn() {
        true if is_proven && is_reset => WayState::GOODBYES,
        true if is_proven => 0,
        true => WayState::GOODBYES | WayState::RESET,
        false => WayState::RESET,
    };
    if over == WayState::GOODBYES {
        // The silence after which the RST is believed is no shorter for it.
        plan.way.seen.store(held.way.seen.load(Relaxed), Relaxed);
    }
    if known & WayState::OTHER_FIN & !over != 0 && !segment.is_syn() {
        plan.way.state.fetch_or(WayState::FIN_HEARD, Relaxed);
    }
    plan.way.created = held.way.created;
    let packets = held.way.packets.load(Relaxed);
    let bytes = held.way.bytes.load(Relaxed);
    if is_the_same {
        // Another CPU may count in this moment.
        let way = &held.way;
        way.packets.fetch_add(1, Relaxed);
        way.bytes.fetch_add(u64::from(arrival.length), Relaxed);
        way.seen.store(plan.way.seen.load(Relaxed), Relaxed);
        refresh(way, &plan.way, over);
        refresh(&held.back, &plan.back, over);
        if !is_proven || !segment.is_syn() {
            let end = plan.back.others_end.load(Relaxed);
            held.back.others_end.store(end, Relaxed);
        }
    }
    plan.way.packets.fetch_add(packets, Relaxed);
    plan.way.bytes.fetch_add(bytes, Relaxed);
    let said = held.way.others_end.load(Relaxed);
    plan.way.others_end.store(said, Relaxed);
    let kept = WayState::BOTH_FIN | WayState::RESET;
    plan.way.state.fetch_or(known & kept & !over, Relaxed);
    let back = &mut plan.back;
    let (answers, bytes) = (
        held.back.packets.load(Relaxed),
        held.back.bytes.load(Relaxed),
    );
    back.packets.store(answers, Relaxed);
    back.bytes.store(bytes, Relaxed);
    let state = held.back.state.load(Relaxed) & !over;
    back.state.fetch_or(state, Relaxed);
    if answers > 0 {
        back.seen.store(held.back.seen.load(Relaxed), Relaxed);
    }
}

/// Makes a row say what was judged now, and what the packet at hand says and takes back.
#[inline(always)]
fn refresh(held: &Way, now: &Way, over: u32) {
    held.state.fetch_and(!over, Relaxed);
    held.state.fetch_or(now.state.load(Relaxed), Relaxed);
    held.epoch.store(now.epoch.load(Relaxed), Relaxed);
    held.device.store(now.device.load(Relaxed), Relaxed);
    let rules = (
        now.egress_rule.load(Relaxed),
        now.ingress_rule.load(Relaxed),
    );
    held.egress_rule.store(rules.0, Relaxed);
    held.ingress_rule.store(rules.1, Relaxed);
}

#[inline(always)]
fn is_forgotten<T: Tables + ?Sized>(tables: &T, plan: &Plan, held: &Plan) -> bool {
    let state = held.way.state.load(Relaxed);
    if plan.key.protocol == Protocol::TCP && state & WayState::PROVEN != 0 {
        // It is open and found no room for ways. Nobody takes its place before it is closed, and silent: what is said of its end
        // was compared with no number.
        let refused = held.back.state.load(Relaxed) & WayState::RESET;
        let seen = held.way.seen.load(Relaxed);
        let seen = seen.max(held.back.seen.load(Relaxed));
        let is_silent = tables.now().saturating_sub(seen) > way::CLOSED_PATIENCE;
        return is_silent && WayState::is_closed(state | refused);
    }
    let is_unanswered = held.back.packets.load(Relaxed) == 0;
    let is_strangers = plan.key.protocol == Protocol::TCP && held.way.owner == 0;
    let patience = if is_strangers {
        STRANGERS_PATIENCE
    } else if plan.key.protocol == Protocol::TCP {
        TCP_PATIENCE
    } else if is_unanswered && same(&held.key.source, &plan.key.source) {
        OWN_PATIENCE
    } else {
        OTHER_PATIENCE
    };
    // Refused, and not asked again. A RST in the name of the opener refuses nothing.
    let is_reset = |way: &Way| way.state.load(Relaxed) & WayState::RESET != 0;
    let is_refused = is_reset(&held.back) && !is_reset(&held.way);
    let mut seen = held.way.seen.load(Relaxed);
    // Whom somebody pretends to be is answered again and again.
    if !is_strangers {
        seen = seen.max(held.back.seen.load(Relaxed));
    }
    is_refused || tables.now().saturating_sub(seen) > patience
}
