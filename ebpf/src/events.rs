//! Telling user space about drops: exact counters, and events as far as their rate limit allows.

use aya_ebpf::helpers::generated::bpf_ktime_get_ns;
use weir_common::counter::Counter;
use weir_common::event::{DropEvent, EventKind, Hook};
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
    let Some(bucket) = EVENT_LIMITS.get_ptr_mut(index) else {
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
    let tuple = &trace.tuple;
    entry.write(DropEvent {
        kind: EventKind::DROP,
        reason,
        protocol: tuple.protocol,
        hook,
        ifindex: skb.ifindex(),
        time,
        source: tuple.source,
        destination: tuple.destination,
        source_port: tuple.source_port,
        destination_port: tuple.destination_port,
        rule: trace.rule,
        len: skb.len(),
        limited,
    });
    entry.submit(0);
}
