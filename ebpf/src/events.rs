//! Telling user space about drops and audits: exact counters, and events as far as their rate limit allows.

use aya_ebpf::helpers::generated::bpf_ktime_get_ns;
use weir_common::counter::Counter;
use weir_common::event::{AUDIT_LIMIT, DropEvent, EventKind, Hook};
use weir_common::policy::RuleId;
use weir_common::way::WayKey;
use weir_datapath::tables::Tables as _;
use weir_datapath::{Packet as _, Scratch, limit};

use crate::maps::{DROPS, EVENT_LIMITS, EVENTS, Maps};
use crate::skb::Skb;

/// Counts a drop for the reason of this number and, unless it is noise or there were too many, sends an event.
#[inline(always)]
pub(crate) fn dropped(skb: &Skb, scratch: &Scratch, hook: Hook, reason: u8) {
    let index = u32::from(reason);
    let trace = &scratch.trace;
    if let Some(drops) = DROPS.get_ptr_mut(index) {
        // SAFETY: a live row of this CPU, which one packet program at a time uses.
        unsafe {
            (*drops).packets += 1;
            (*drops).bytes += u64::from(skb.len().saturating_sub(14));
        }
    }
    if trace.is_noise() {
        return;
    }
    let what = What {
        kind: EventKind::DROP,
        reason,
        hook,
        ifindex: skb.ifindex(),
        len: skb.len(),
    };
    tell(what, &trace.tuple, trace.rule, index);
}

/// Tells what policies that are only audited would have done to the conversation that was asked about, for the reason of this number.
#[inline(always)]
pub(crate) fn audited(scratch: &Scratch, reason: u8) {
    let what = What {
        kind: EventKind::AUDIT,
        reason,
        hook: scratch.trace.tuple.hook,
        ifindex: scratch.ifindex(),
        len: 0,
    };
    tell(what, scratch.question(), scratch.trace.rule, AUDIT_LIMIT);
}

/// What an event says beside the conversation.
struct What {
    kind: EventKind,
    reason: u8,
    hook: Hook,
    ifindex: u32,
    len: u32,
}

/// Sends an event, unless there were too many of those that share this row of the limits.
#[inline(always)]
fn tell(what: What, tuple: &WayKey, rule: RuleId, limit: u32) {
    let Some(bucket) = EVENT_LIMITS.get_ptr_mut(limit) else {
        return;
    };
    // SAFETY: the helper has no arguments and always succeeds.
    let time = unsafe { bpf_ktime_get_ns() };
    // SAFETY: a live row of this CPU, which one packet program at a time uses.
    let Some(limited) = limit::admit(unsafe { &mut *bucket }, time) else {
        Maps.count(Counter::EventsLimited);
        return;
    };
    let Some(mut entry) = EVENTS.reserve::<DropEvent>(0) else {
        Maps.count(Counter::EventsLost);
        return;
    };
    let event = entry.as_mut_ptr();
    // Field by field: a whole event on the stack would be more than callers have left.
    // SAFETY: it points to room for an event that is ours until it is submitted, and every byte is written.
    unsafe {
        (&raw mut (*event).kind).write(what.kind);
        (&raw mut (*event).reason).write(what.reason);
        (&raw mut (*event).protocol).write(tuple.protocol);
        (&raw mut (*event).hook).write(what.hook);
        (&raw mut (*event).ifindex).write(what.ifindex);
        (&raw mut (*event).time).write(time);
        (&raw mut (*event).source).write(tuple.source);
        (&raw mut (*event).destination).write(tuple.destination);
        (&raw mut (*event).source_port).write(tuple.source_port);
        (&raw mut (*event).destination_port).write(tuple.destination_port);
        (&raw mut (*event).rule).write(rule);
        (&raw mut (*event).len).write(what.len);
        (&raw mut (*event).limited).write(limited);
    }
    entry.submit(0);
}
