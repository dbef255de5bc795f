//! The kernel's conversations: read, and swept of those that have ended.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use weir_common::event::Hook;
use weir_common::way::{Mark, Peer, Plan, Step, Way, WayKey, WayState};
use weir_common::{Addr, Protocol};
use zerocopy::{FromBytes, IntoBytes};

use super::clock;
use super::map::for_each;
use super::shares::{Held, Shares};
use super::sys;
use super::tally::{Counting, Tally};

/// Tables of ways or of plans: TCP's, and everything else's.
#[derive(Debug)]
pub(super) struct Pair {
    pub tcp: OwnedFd,
    pub other: OwnedFd,
}

/// Every table of conversations.
#[derive(Debug)]
pub struct Flows {
    ways: Pair,
    plans: Pair,
    shares: Shares,
    /// What the last sweep has left.
    tally: Mutex<Option<Arc<Tally>>>,
    opened: Duration,
}

/// A conversation.
#[derive(Debug)]
pub struct Conversation {
    /// What its opener sends.
    pub key: WayKey,
    pub way: Way,
    /// The way of the answers.
    pub back: Way,
    pub is_answered: bool,
    /// The service that its opener asked.
    pub via: Option<Peer>,
}

/// After how long without a packet a conversation is forgotten. Established TCP may be silent for two hours
/// before its keepalive (RFC 9293 section 3.8.4), so it gets more; a connection that one side has closed may be silent while
/// the other works, and gets the hour that kube-proxy grants it (`--conntrack-tcp-timeout-close-wait`), or, where the other
/// has not heard of it, what Linux does (`nf_conntrack_tcp_timeout_fin_wait`).
fn patience(protocol: Protocol, is_answered: bool, state: u32) -> Duration {
    let seconds = match (protocol, is_answered) {
        (Protocol::TCP, _) if WayState::is_closed(state) => 30,
        (Protocol::TCP, false) => 60,
        (Protocol::TCP, true) if WayState::is_half_closed(state) => {
            if state & WayState::FIN_HEARD != 0 {
                3600
            } else {
                120
            }
        }
        (Protocol::TCP, true) => 3 * 3600,
        (_, true) => 120,
        (_, false) => 30,
    };
    Duration::from_secs(seconds)
}

/// [`patience`] with what is planned. A connection that is open all the same found no room for ways.
fn patience_of_plan(protocol: Protocol, plan: &Plan) -> Duration {
    // Each half knows of both goodbyes.
    let back = plan.back.state.load(Relaxed) & (WayState::RESET | WayState::FIN_HEARD);
    let state = plan.way.state.load(Relaxed) | back;
    let is_open = protocol == Protocol::TCP && state & WayState::PROVEN != 0;
    patience(protocol, is_open, if is_open { state } else { 0 })
}

impl Flows {
    pub(super) fn new(ways: Pair, plans: Pair, shares: Shares) -> Self {
        Self {
            ways,
            plans,
            shares,
            tally: Mutex::default(),
            opened: clock::monotonic(),
        }
    }

    /// What each pod holds of them.
    pub fn shares(&self) -> &Shares {
        &self.shares
    }

    /// What the last sweep has left; nothing before the first.
    pub fn tally(&self) -> Option<Arc<Tally>> {
        let tally = self.tally.lock().unwrap_or_else(PoisonError::into_inner);
        tally.clone()
    }

    /// How long ago the last sweep was, or before the first these tables were opened.
    pub fn sweep_age(&self) -> Duration {
        let at = self.tally().map_or(self.opened, |tally| tally.at());
        clock::monotonic().saturating_sub(at)
    }

    pub(super) fn ways(&self) -> &Pair {
        &self.ways
    }

    pub(super) fn plans(&self) -> &Pair {
        &self.plans
    }

    /// Where the packets of the other direction arrive, if this one is known.
    ///
    /// # Errors
    /// The kernel refuses to read.
    pub(super) fn other_of(&self, key: &WayKey) -> io::Result<Option<WayKey>> {
        let table = match key.protocol {
            Protocol::TCP => &self.ways.tcp,
            _ => &self.ways.other,
        };
        Ok(find::<Way>(table, key)?.map(|way| other(key, &way)))
    }

    /// What the opener of a conversation sends whose answers arrive so, answered or not.
    ///
    /// # Errors
    /// The kernel refuses to read.
    pub(super) fn asked_by(&self, answer: &WayKey) -> io::Result<Option<WayKey>> {
        let (ways, plans) = match answer.protocol {
            Protocol::TCP => (&self.ways.tcp, &self.plans.tcp),
            _ => (&self.ways.other, &self.plans.other),
        };
        // In this order: a program adds ways before it removes their plan.
        if let Some(plan) = find::<Plan>(plans, answer)? {
            return Ok(Some(plan.key));
        }
        let way = find::<Way>(ways, answer)?;
        let is_answer = |way: &Way| way.state.load(Relaxed) & WayState::OPENER == 0;
        Ok(way.filter(is_answer).map(|way| other(answer, &way)))
    }

    /// Hands over every conversation once, answered or not and whatever sides of the node it passes: as the pod's side sees
    /// it, or else as it came in. Only a batch is held at a time.
    ///
    /// # Errors
    /// The kernel refuses to read.
    pub fn each_conversation(&self, mut take: impl FnMut(Conversation)) -> io::Result<()> {
        let mut see = |mut it: Conversation| {
            if let Some(via) = self.via(&it)? {
                it.via = via;
                take(it);
            }
            io::Result::Ok(())
        };
        // Plans before ways: what is answered meanwhile is then told at least once.
        for table in [&self.plans.tcp, &self.plans.other] {
            each(table, |_, plan: Plan| {
                see(Conversation {
                    key: plan.key,
                    is_answered: plan.back.packets.load(Relaxed) > 0,
                    way: plan.way,
                    back: plan.back,
                    via: None,
                })
            })?;
        }
        for table in [&self.ways.tcp, &self.ways.other] {
            each(table, |key, way: Way| {
                if way.state.load(Relaxed) & WayState::OPENER == 0 {
                    return Ok(());
                }
                let back: Way = find(table, &other(&key, &way))?.unwrap_or_default();
                see(Conversation {
                    key,
                    is_answered: back.packets.load(Relaxed) > 0,
                    way,
                    back,
                    via: None,
                })
            })?;
        }
        Ok(())
    }

    /// The service that was asked, if any; none at all of what another side tells.
    fn via(&self, it: &Conversation) -> io::Result<Option<Option<Peer>>> {
        let asked = it.key.destination();
        let mut answer = WayKey::default();
        answer.set_other(&it.key, &it.way.step);
        match it.key.hook {
            // What leaves with the node's address is a pod's conversation, or one that came in.
            Hook::TO_NET => Ok(None),
            Hook::FROM_NET => {
                answer.hook = Hook::FROM_POD;
                let at_pod = self.step_of(&answer)?;
                Ok(at_pod.is_none().then_some(Some(asked)))
            }
            _ if it.way.step.rewrite.is_destination() => Ok(Some(Some(asked))),
            Hook::TO_POD => {
                answer.hook = Hook::TO_NET;
                let step = self.step_of(&answer)?;
                let step = step.filter(|step| step.other == Hook::FROM_NET);
                let step = step.filter(|step| step.rewrite.is_source() && step.mark == Mark::NONE);
                Ok(Some(step.map(|step| step.peer())))
            }
            _ => Ok(Some(None)),
        }
    }

    /// What becomes of an answer, whether one has come or not.
    fn step_of(&self, answer: &WayKey) -> io::Result<Option<Step>> {
        let (ways, plans) = match answer.protocol {
            Protocol::TCP => (&self.ways.tcp, &self.plans.tcp),
            _ => (&self.ways.other, &self.plans.other),
        };
        if let Some(way) = find::<Way>(ways, answer)? {
            return Ok(Some(way.step));
        }
        Ok(find::<Plan>(plans, answer)?.map(|plan| plan.back.step))
    }

    /// Removes conversations that have ended, and those of addresses that are no longer anybody's; `look` sees every way,
    /// also those of plans. Returns how many rows were removed. It reads the tables as a whole, so ask for it rarely, and not
    /// where somebody waits; what it holds of them at a time is a batch. What stays is in [`Self::tally`].
    ///
    /// # Errors
    /// The kernel refuses to read or to remove.
    pub fn sweep(
        &self,
        now: Duration,
        is_gone: &dyn Fn(&Addr) -> bool,
        look: &mut dyn FnMut(&WayKey, &Way),
    ) -> io::Result<usize> {
        let (mut removed, mut counting) = (0, Counting::default());
        // Plans before ways: what is answered meanwhile is then seen at least once.
        for table in [&self.plans.tcp, &self.plans.other] {
            each(table, |key: WayKey, plan: Plan| {
                look(&plan.key, &plan.way);
                look(&key, &plan.back);
                let age = now.saturating_sub(Duration::from_nanos(plan_seen(&plan)));
                let is_gone = is_about(&key, is_gone) || is_about(&plan.key, is_gone);
                let mut rows = 0;
                if is_gone || age > patience_of_plan(key.protocol, &plan) {
                    rows = self.end_plan(table, &key, &plan, is_gone)?;
                    removed += rows;
                }
                if rows == 0 {
                    counting.plan(&plan);
                }
                Ok(())
            })?;
        }
        let mut held = Held::default();
        for table in [&self.ways.tcp, &self.ways.other] {
            each(table, |key, way: Way| {
                look(&key, &way);
                let row = Row::of(&key, &way);
                let is_gone = is_about(&key, is_gone) || is_about(&row.other, is_gone);
                let (mut rows, mut is_there) = (0, true);
                if is_gone || row.may_be_over(key.protocol, now) {
                    rows = end_way(table, &key, &row, now, is_gone)?;
                    removed += rows;
                    // It may have gone with its other one, a moment ago.
                    is_there = rows == 0 && find::<Way>(table, &key)?.is_some();
                }
                if key.protocol == Protocol::TCP && rows > 0 {
                    self.shares.count(way.owner, -(rows as i64));
                } else if key.protocol == Protocol::TCP && is_there {
                    held.count(way.owner);
                }
                if is_there {
                    counting.way(&key, &way);
                }
                Ok(())
            })?;
        }
        self.shares.correct(&held);
        let mut tally = self.tally.lock().unwrap_or_else(PoisonError::into_inner);
        *tally = Some(Arc::new(counting.end()));
        Ok(removed)
    }

    /// Removes a plan, unless a packet has come since.
    fn end_plan(
        &self,
        table: &OwnedFd,
        key: &WayKey,
        plan: &Plan,
        is_gone: bool,
    ) -> io::Result<usize> {
        let is_as_it_was = || {
            io::Result::Ok(
                find::<Plan>(table, key)?.is_some_and(|it| plan_seen(&it) == plan_seen(plan)),
            )
        };
        if is_gone || is_as_it_was()? {
            return remove(table, key);
        }
        Ok(0)
    }
}

/// Removes a way that may be over, with its other one, if both are. Both go together: one without the other would let
/// answers out untranslated, or take them for a conversation of their own.
fn end_way(
    table: &OwnedFd,
    key: &WayKey,
    row: &Row,
    now: Duration,
    is_gone: bool,
) -> io::Result<usize> {
    let other = find::<Way>(table, &row.other)?.map(|way| Row::of(&row.other, &way));
    let other = other.filter(|it| it.other == *key);
    if !is_gone {
        if !is_over(key.protocol, row, other.as_ref(), now) {
            return Ok(0);
        }
        // A packet may have come since, or the row is gone; the other one has just been read.
        let is_as_it_was =
            find::<Way>(table, key)?.is_some_and(|way| way.seen.load(Relaxed) == row.seen);
        if !is_as_it_was {
            return Ok(0);
        }
    }
    let others = match other {
        Some(_) => remove(table, &row.other)?,
        None => 0,
    };
    Ok(remove(table, key)? + others)
}

/// What the sweep wants to know of a way.
#[derive(Clone, Copy, Debug)]
struct Row {
    seen: u64,
    packets: u64,
    state: u32,
    other: WayKey,
}

impl Row {
    fn of(key: &WayKey, way: &Way) -> Self {
        Self {
            seen: way.seen.load(Relaxed),
            packets: way.packets.load(Relaxed),
            state: way.state.load(Relaxed),
            other: other(key, way),
        }
    }

    /// Can the conversation be over, for all that this row says? Mostly not, and then nothing else is looked at.
    fn may_be_over(&self, protocol: Protocol, now: Duration) -> bool {
        let is_answered = self.state & WayState::OPENER == 0 && self.packets > 0;
        let age = now.saturating_sub(Duration::from_nanos(self.seen));
        age > patience(protocol, is_answered, self.state)
    }
}

fn plan_seen(plan: &Plan) -> u64 {
    let there = plan.way.seen.load(Relaxed);
    there.max(plan.back.seen.load(Relaxed))
}

/// Is a conversation over, given one of its ways and the other, if that is there?
fn is_over(protocol: Protocol, row: &Row, other: Option<&Row>, now: Duration) -> bool {
    // Of two that belong together the opener's speaks for both.
    let (opener, other) = match other {
        Some(other) if row.state & WayState::OPENER == 0 => (other, Some(row)),
        other => (row, other),
    };
    let seen = opener.seen.max(other.map_or(0, |other| other.seen));
    let is_answered = other.is_some_and(|other| other.packets > 0);
    let state = opener.state
        | other.map_or(0, |other| {
            other.state & (WayState::FIN_HEARD | WayState::RESET)
        });
    now.saturating_sub(Duration::from_nanos(seen)) > patience(protocol, is_answered, state)
}

fn is_about(key: &WayKey, is_gone: &dyn Fn(&Addr) -> bool) -> bool {
    is_gone(&key.source) || is_gone(&key.destination)
}

fn other(key: &WayKey, way: &Way) -> WayKey {
    let mut other = WayKey::default();
    other.set_other(key, &way.step);
    other
}

pub(super) fn each<V: FromBytes>(
    table: &OwnedFd,
    mut row: impl FnMut(WayKey, V) -> io::Result<()>,
) -> io::Result<()> {
    let mut outcome = Ok(());
    let (key_size, value_size) = (size_of::<WayKey>(), size_of::<V>());
    for_each(table.as_fd(), key_size, value_size, |key, value| {
        if let (Ok(()), Ok(key), Ok(value)) = (
            &outcome,
            WayKey::read_from_bytes(key),
            V::read_from_bytes(value),
        ) {
            outcome = row(key, value);
        }
    })?;
    outcome
}

fn find<V: FromBytes>(table: &OwnedFd, key: &WayKey) -> io::Result<Option<V>> {
    let mut value = vec![0; size_of::<V>()];
    match sys::lookup(table.as_fd(), key.as_bytes(), &mut value) {
        Ok(()) => Ok(V::read_from_bytes(&value).ok()),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(None),
        Err(error) => Err(error),
    }
}

/// The number of rows that were there.
fn remove(table: &OwnedFd, key: &WayKey) -> io::Result<usize> {
    match sys::delete(table.as_fd(), key.as_bytes()) {
        Ok(()) => Ok(1),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(0),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests;
