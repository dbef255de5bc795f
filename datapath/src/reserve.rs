//! A plan takes its place: under the key of its first answer, if that is nobody else's.

use core::sync::atomic::Ordering::Relaxed;

use weir_common::way::{Plan, WayState};
use weir_common::{DropReason, Protocol};

use crate::tables::{Added, Tables};
use crate::verdict::{Outcome, Scratch};
use crate::way::is_over;

/// How long a plan without an answer keeps its place from others, in nanoseconds: for TCP what `SYN` is sent again
/// within (Linux sends it until 63 s, `nf_conntrack_tcp_timeout_syn_sent` is 120 s), else what Linux grants a datagram
/// that nobody answers (`nf_conntrack_udp_timeout`).
const TCP_PATIENCE: u64 = 60_000_000_000;
const OTHER_PATIENCE: u64 = 30_000_000_000;

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
    const NEW: Outcome = Outcome(0);
    const AGAIN: Outcome = Outcome(1);
    const TAKEN: Outcome = Outcome(2);
    const FULL: Outcome = Outcome(3);

    /// From what [`reserve`] returns.
    ///
    /// # Errors
    /// [`DropReason::TableFull`].
    #[inline(always)]
    pub const fn of(outcome: Outcome) -> Result<Self, DropReason> {
        match outcome {
            Self::NEW => Ok(Self::New),
            Self::AGAIN => Ok(Self::Again),
            Self::TAKEN => Ok(Self::Taken),
            _ => Err(DropReason::TableFull),
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
        Err(_) => Reserved::FULL,
    }
}

#[inline(always)]
fn decide<T: Tables + ?Sized>(tables: &T, scratch: &mut Scratch) -> Result<Reserved, DropReason> {
    let Scratch {
        plan, back, other, ..
    } = scratch;
    let mut reserved = Reserved::New;
    if tables.add_plan(back, plan)? == Added::Already
        && let Some(held) = tables.plan(back)
    {
        if held.key.is(&plan.key) {
            plan.way.created = held.way.created;
            let packets = held.way.packets.load(Relaxed);
            plan.way.packets.fetch_add(packets, Relaxed);
            let bytes = held.way.bytes.load(Relaxed);
            plan.way.bytes.fetch_add(bytes, Relaxed);
            reserved = Reserved::Again;
        } else if !is_forgotten(tables, back.protocol, &held) {
            return Ok(Reserved::Taken);
        }
        tables.replace_plan(back, plan)?;
    }
    if let Some(way) = tables.way(back) {
        other.set_other(back, &way.step);
        let is_same = other.is(&plan.key);
        if !is_same && is_over(tables, back, &way, other) {
            tables.remove_way(other);
            tables.remove_way(back);
        } else {
            tables.remove_plan(back);
            if !is_same {
                return Ok(Reserved::Taken);
            }
            // Another CPU has just had the answer, or the way there was lost.
            tables.add_way(&plan.key, &plan.way)?;
            reserved = Reserved::Again;
        }
    }
    Ok(reserved)
}

#[inline(always)]
fn is_forgotten<T: Tables + ?Sized>(tables: &T, protocol: Protocol, held: &Plan) -> bool {
    let patience = if protocol == Protocol::TCP {
        TCP_PATIENCE
    } else {
        OTHER_PATIENCE
    };
    // Refused, and not asked again.
    let is_refused = held.back.state.load(Relaxed) & WayState::RESET != 0;
    is_refused || tables.now().saturating_sub(held.way.seen.load(Relaxed)) > patience
}
