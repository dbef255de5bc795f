//! Following the way of a packet: the hot path, and what goes on with a conversation whose packet or state
//! is special.

use core::ops::Deref as _;
use core::sync::atomic::Ordering::Relaxed;

use weir_common::counter::Counter;
use weir_common::event::Hook;
use weir_common::service::{BackendId, Generation};
use weir_common::way::{Mark, Way, WayKey, WayState};
use weir_common::{DropReason, Protocol, limits};

use crate::fragment;
use crate::policy::{self, Judgement};
use crate::service::{self, Asks};
use crate::share;
use crate::tables::{Added, Tables};
use crate::verdict::{Outcome, Scratch};
use crate::words::same;

/// How long a conversation other than TCP may be silent before its ports can serve another one, in
/// nanoseconds: what Linux grants a UDP stream (`nf_conntrack_udp_timeout_stream`).
pub const IDLE: u64 = limits::STREAM_SECONDS as u64 * 1_000_000_000;

/// What became of looking for a way.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Met {
    Followed,
    /// There is one, but something about it or the packet is special.
    Special,
    Unknown,
}

/// Is it known what becomes of the packet at hand? It is then in the step, and accounted for.
///
/// # Errors
/// Those of [`again`].
#[inline(always)]
pub fn is_known<T: Tables>(tables: &T, scratch: &mut Scratch) -> Result<bool, DropReason> {
    match follow(tables, scratch) {
        Met::Followed => Ok(true),
        Met::Special => tables.again(scratch).is_known(),
        Met::Unknown => Ok(false),
    }
}

#[inline(always)]
fn follow<T: Tables>(tables: &T, scratch: &mut Scratch) -> Met {
    let key = &scratch.trace.tuple;
    let Some(way) = tables.way(key) else {
        return Met::Unknown;
    };
    let is_special = scratch.arrival.segment.is_special()
        || way.state.load(Relaxed) & WayState::ENDING != 0
        || way.epoch.load(Relaxed) != tables.epoch()
        || !serves(tables, key.protocol, &way)
        || is_due(tables, key.protocol, &way)
        || (key.hook == Hook::TO_NET && way.device.load(Relaxed) != scratch.arrival.ifindex);
    if is_special {
        return Met::Special;
    }
    let echo = scratch.trace.tuple.echo();
    if !take(scratch, &way, echo) {
        return Met::Unknown;
    }
    account(tables, scratch, &way);
    Met::Followed
}

/// Is it time to see whether the way of the answers is still there? About once a second, where rows are pushed out: without
/// it a conversation would be answered untranslated, or not at all.
#[inline(always)]
fn is_due<T: Tables + ?Sized>(tables: &T, protocol: Protocol, way: &Way) -> bool {
    const SECOND: u32 = 30;
    protocol != Protocol::TCP && tables.now() >> SECOND != way.seen.load(Relaxed) >> SECOND
}

/// Can the backend of a way take a packet of it that opens nothing? Datagrams go to another one as soon as it takes
/// nothing new.
#[inline(always)]
fn serves<T: Tables + ?Sized>(tables: &T, protocol: Protocol, way: &Way) -> bool {
    let asks = Asks::of(protocol, false);
    way.backend == 0 || service::is_current(tables, way.backend, way.generation, asks)
}

/// Takes what becomes of the packet from a way, whose key has this echo. False if the row has become another key's
/// meanwhile.
#[inline(always)]
pub(crate) fn take(scratch: &mut Scratch, way: &Way, echo: u32) -> bool {
    scratch.step = way.step;
    // The device of a way out is the uplink, where the packet is already.
    scratch.device = if scratch.trace.tuple.hook == Hook::TO_NET {
        0
    } else {
        way.device.load(Relaxed)
    };
    scratch.state = way.state.load(Relaxed);
    way.is_of(echo)
}

/// Accounts for the packet at hand.
#[inline(always)]
pub(crate) fn account<T: Tables + ?Sized>(tables: &T, scratch: &Scratch, way: &Way) {
    way.packets.fetch_add(1, Relaxed);
    let length = u64::from(scratch.arrival.length);
    way.bytes.fetch_add(length, Relaxed);
    let now = tables.now();
    if way.seen.load(Relaxed) != now {
        way.seen.store(now, Relaxed);
    }
}

/// Goes on with a known conversation when its packet or its state is special.
///
/// [`Outcome::UNKNOWN`] if the conversation is over, and the packet is another one's.
pub fn again<T: Tables + ?Sized>(tables: &T, scratch: &mut Scratch) -> Outcome {
    Outcome::of(go_on(tables, scratch))
}

#[inline(always)]
fn go_on<T: Tables + ?Sized>(tables: &T, scratch: &mut Scratch) -> Result<bool, DropReason> {
    let Some(way) = tables.way(&scratch.trace.tuple) else {
        return Ok(false);
    };
    let way = way.deref();
    let echo = scratch.trace.tuple.echo();
    if !take(scratch, way, echo) {
        return Ok(false);
    }
    let segment = scratch.arrival.segment;
    let state = scratch.state;
    let is_opener = state & WayState::OPENER != 0;
    let is_tcp = scratch.trace.tuple.protocol == Protocol::TCP;
    scratch.other.set_other(&scratch.trace.tuple, &way.step);
    let opens = segment.is_syn() && is_closed(tables, state, way.seen.load(Relaxed));
    if way.backend != 0 {
        // A SYN of a connection that goes on is an old one, or forged (RFC 5961 section 4).
        let asks = Asks::of(scratch.trace.tuple.protocol, opens);
        if !service::is_current(tables, way.backend, way.generation, asks) {
            if is_tcp && !segment.is_syn() {
                // Its opener is told so, and asks no more.
                way.state.fetch_or(WayState::RESET, Relaxed);
                if let Some(other) = tables.way(&scratch.other) {
                    other.state.fetch_or(WayState::RESET, Relaxed);
                }
                return Err(DropReason::BackendGone);
            }
            forget(tables, scratch, way.owner);
            return Ok(false);
        }
    }
    // Without the way of its answers, or with one that leads elsewhere: what was answered after that was pushed out opened a
    // conversation of its own. An answer without the way there goes on: its opener's next packet makes that again.
    let is_alone = !is_tcp && is_opener && !leads_back(tables, scratch);
    // A service may have come, or gone, since a stream began.
    let is_misled = !is_tcp && is_opener && asks_otherwise(tables, scratch, way);
    if is_alone || is_misled || opens {
        if is_alone {
            tables.count(Counter::WaysLost);
        }
        forget(tables, scratch, way.owner);
        return Ok(false);
    }
    let is_at_pod = matches!(scratch.trace.tuple.hook, Hook::FROM_POD | Hook::TO_POD);
    let epoch = tables.epoch();
    let opens_back = segment.is_syn() && !is_opener;
    if is_at_pod && (segment.is_syn() || way.epoch.load(Relaxed) != epoch) {
        // The question is the opener's, also when the packet is an answer; but a SYN of the other side
        // asks for itself, and its denial says nothing about the conversation.
        if opens_back {
            scratch.question = scratch.trace.tuple;
        } else {
            ask_for_opener(scratch, is_opener);
            scratch.trace.is_established = u32::from(!segment.is_syn());
        }
        match tables.judge(scratch).is_known() {
            Ok(_) if opens_back => {}
            // Judging takes its time, and the row may be somebody else's now.
            Ok(_) if !way.is_of(echo) => return Ok(false),
            Ok(_) => {
                let hook = scratch.trace.tuple.hook;
                let is_old = way.epoch.load(Relaxed) != epoch;
                record(way, hook, &scratch.judgement, is_opener, epoch);
                // Of the two directions, each judged for itself, one is counted.
                if is_opener && is_old {
                    policy::tell(tables, scratch);
                }
                scratch.device = way.device.load(Relaxed);
            }
            Err(reason) => {
                // A TCP connection stays known, and with it who opened it. Otherwise what the other side
                // sends again would open one of its own, and the denied packets would be its answers. Its
                // epoch stays an old one, so every packet is judged.
                if !opens_back && !is_tcp {
                    forget(tables, scratch, way.owner);
                }
                return Err(reason);
            }
        }
    } else if !is_at_pod && !is_still_there(tables, scratch, way, epoch) {
        forget(tables, scratch, way.owner);
        return Ok(false);
    }
    let seen = way.seen.load(Relaxed);
    account(tables, scratch, way);
    fragment::remember(tables, scratch);
    // Of a packet in parts nobody knows where it ends.
    if is_tcp && scratch.arrival.has_transport() && !segment.is_first() {
        end(tables, scratch, way, state, seen);
    }
    Ok(true)
}

/// Is the way of the answers there, and its answers this conversation's?
#[inline(always)]
fn leads_back<T: Tables + ?Sized>(tables: &T, scratch: &mut Scratch) -> bool {
    let Some(other) = tables.way(&scratch.other) else {
        return false;
    };
    scratch.back.set_other(&scratch.other, &other.step);
    scratch.back.is(&scratch.trace.tuple)
}

/// Would the conversation be sent elsewhere if it began now: to a service that was not there, or past one that is gone?
#[inline(always)]
fn asks_otherwise<T: Tables + ?Sized>(tables: &T, scratch: &mut Scratch, way: &Way) -> bool {
    let hook = scratch.trace.tuple.hook;
    if !matches!(hook, Hook::FROM_POD | Hook::FROM_NET) {
        return false;
    }
    (tables.asks_service(scratch) != 0) != (way.backend != 0)
}

/// Is the address that stands for somebody still the uplink's?
#[inline(always)]
fn is_still_there<T: Tables + ?Sized>(
    tables: &T,
    scratch: &Scratch,
    way: &Way,
    epoch: u32,
) -> bool {
    let key = &scratch.trace.tuple;
    if key.hook == Hook::TO_NET && scratch.state & WayState::MASQUERADE != 0 {
        let ifindex = scratch.arrival.ifindex;
        let Some(uplink) = tables.uplink(ifindex) else {
            return false;
        };
        let node = scratch.arrival.family().uplink(&uplink);
        if !same(node, &way.step.addr) {
            return false;
        }
        way.device.store(ifindex, Relaxed);
    } else if key.hook == Hook::TO_NET {
        way.device.store(scratch.arrival.ifindex, Relaxed);
    }
    way.epoch.store(epoch, Relaxed);
    true
}

/// Does it lead from outside to a process of the node? What that says to others has no rows: those of a connection that is over are
/// left to the sweep, so that whoever repeats a goodbye is answered by the node port, too.
#[inline(always)]
fn is_of_hostnet(scratch: &Scratch, way: &Way) -> bool {
    let is_opener = scratch.state & WayState::OPENER != 0;
    match scratch.trace.tuple.hook {
        Hook::TO_NET => !is_opener && scratch.arrival.mark == Mark::NONE,
        Hook::FROM_NET => is_opener && way.step.mark == Mark::NONE,
        _ => false,
    }
}

/// Who asks again after a RST: whatever was said goodbye to before, this is not; and the silence after which the RST is believed
/// is no shorter for it.
#[inline(always)]
fn begin_again<T: Tables + ?Sized>(tables: &T, scratch: &Scratch, way: &Way, seen: u64) {
    way.seen.store(seen, Relaxed);
    if scratch.state & WayState::OPENER != 0 {
        way.state.fetch_and(!WayState::GOODBYES, Relaxed);
        if let Some(other) = tables.way(&scratch.other) {
            other.state.fetch_and(!WayState::GOODBYES, Relaxed);
        }
    }
}

/// Notes what a segment says about the end of its connection. When the last one came before it is in `seen`.
#[inline(always)]
fn end<T: Tables + ?Sized>(tables: &T, scratch: &mut Scratch, way: &Way, state: u32, seen: u64) {
    let segment = scratch.arrival.segment;
    if segment.is_syn() {
        if state & WayState::RESET != 0 {
            begin_again(tables, scratch, way, seen);
        }
        return;
    }
    if !segment.is_special() && state & WayState::ENDING == 0 {
        return;
    }
    let (mut news, mut others) = (0, 0);
    let other = tables.way(&scratch.other);
    if segment.is_rst() {
        (news, others) = (WayState::RESET, WayState::RESET);
    } else if state & WayState::RESET != 0 {
        // What goes on talking was not ended by it.
        way.state.fetch_and(!WayState::RESET, Relaxed);
        if let Some(other) = &other {
            other.state.fetch_and(!WayState::RESET, Relaxed);
        }
    }
    let end = scratch.arrival.end;
    if segment.is_fin() {
        news |= WayState::FIN;
        others |= WayState::OTHER_FIN;
        if let Some(other) = &other {
            other.others_end.store(end, Relaxed);
        }
    } else if state & WayState::FIN != 0
        && !segment.is_special()
        && let Some(other) = &other
        && other.others_end.load(Relaxed) != 0
        && end.wrapping_sub(other.others_end.load(Relaxed)) as i32 > 0
    {
        // Who says more than the goodbye ended with has not said it.
        way.state.fetch_and(!WayState::FIN, Relaxed);
        let heard = WayState::FIN_HEARD | WayState::FIN_ACKNOWLEDGED;
        other
            .state
            .fetch_and(!(WayState::OTHER_FIN | heard), Relaxed);
        return;
    }
    if state & WayState::OTHER_FIN != 0 {
        news |= WayState::FIN_HEARD;
        if scratch.arrival.acknowledges == way.others_end.load(Relaxed) {
            news |= WayState::FIN_ACKNOWLEDGED;
            if state & WayState::FIN != 0
                && !segment.is_special()
                && let Some(other) = &other
                && other.state.load(Relaxed) & WayState::FIN_ACKNOWLEDGED != 0
                && !is_of_hostnet(scratch, way)
            {
                // Both have heard everything: the connection is over, and nobody has to sweep it up.
                forget(tables, scratch, way.owner);
                return;
            }
        }
    }
    if news & !state != 0 {
        way.state.fetch_or(news, Relaxed);
    }
    if others != 0
        && let Some(other) = &other
    {
        other.state.fetch_or(others, Relaxed);
    }
}

/// Writes the question of the conversation's opener, whichever side the packet at hand is of.
#[inline(always)]
pub(crate) fn ask_for_opener(scratch: &mut Scratch, is_opener: bool) {
    if scratch.step.rewrite.is_hairpin() {
        scratch.question.set_to_itself(&scratch.trace.tuple);
    } else if is_opener {
        // Where the answers come from is where the packets go.
        scratch
            .question
            .set_reversed(&scratch.other, Hook::default());
    } else {
        let key = &scratch.trace.tuple;
        scratch.question.set_reversed(key, Hook::default());
    }
}

/// Notes what policy has said about a conversation.
#[inline(always)]
pub(crate) fn record(way: &Way, hook: Hook, judgement: &Judgement, is_opener: bool, epoch: u32) {
    way.egress_rule.store(judgement.egress.0, Relaxed);
    way.ingress_rule.store(judgement.ingress.0, Relaxed);
    // What comes to a pod by its own device goes on by itself.
    if hook == Hook::FROM_POD {
        let device = if is_opener {
            judgement.responder_device
        } else {
            judgement.opener_device
        };
        way.device.store(device, Relaxed);
    }
    way.epoch.store(epoch, Relaxed);
}

/// Forgets both ways of the conversation at hand.
#[inline(always)]
fn forget<T: Tables + ?Sized>(tables: &T, scratch: &Scratch, owner: u32) {
    remove(tables, &scratch.trace.tuple, owner);
    remove(tables, &scratch.other, owner);
}

/// Adds a way, which counts for who has opened its connection.
///
/// # Errors
/// [`DropReason::TableFull`].
#[inline(always)]
pub(crate) fn add<T: Tables + ?Sized>(
    tables: &T,
    key: &WayKey,
    way: &Way,
) -> Result<Added, DropReason> {
    let added = tables.add_way(key, way)?;
    if added == Added::New && key.protocol == Protocol::TCP {
        share::count(tables, way.owner, 1);
    }
    Ok(added)
}

/// Removes a way.
#[inline(always)]
pub(crate) fn remove<T: Tables + ?Sized>(tables: &T, key: &WayKey, owner: u32) {
    if tables.remove_way(key) && key.protocol == Protocol::TCP {
        share::count(tables, owner, -1);
    }
}

/// How long a connection must be silent before an end is believed that anybody may have written, in nanoseconds.
pub(crate) const CLOSED_PATIENCE: u64 = 3_000_000_000;

/// Is a connection closed, as far as the state of one of its ways shows, whose last packet came at `seen`? A RST is believed
/// when that way has been silent since: anybody may write one, and whose it is goes on (RFC 5961 section 3).
#[inline(always)]
pub(crate) fn is_closed<T: Tables + ?Sized>(tables: &T, state: u32, seen: u64) -> bool {
    WayState::is_finished(state)
        || (WayState::is_closed(state) && tables.now().saturating_sub(seen) > CLOSED_PATIENCE)
}

/// Is a conversation over, so that its ends can serve another one?
#[inline(always)]
pub(crate) fn is_over<T: Tables + ?Sized>(
    tables: &T,
    key: &WayKey,
    way: &Way,
    other: &WayKey,
) -> bool {
    if key.protocol == Protocol::TCP {
        return is_closed(tables, way.state.load(Relaxed), way.seen.load(Relaxed));
    }
    let now = tables.now();
    let is_silent = |way: &Way| now.saturating_sub(way.seen.load(Relaxed)) > IDLE;
    is_silent(way) && tables.way(other).is_none_or(|other| is_silent(&other))
}

/// A backend that nothing leads to.
pub const NO_BACKEND: (BackendId, Generation) = (0, Generation(0));
