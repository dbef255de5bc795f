//! Refusing packets with an answer, as far as the rate limit allows. A function of BPF of its own: few packets meet it.

use aya_ebpf::bindings::__sk_buff;
use aya_ebpf::helpers::generated::bpf_ktime_get_ns;
use aya_ebpf::programs::TcContext;
use weir_common::DropReason;
use weir_common::counter::Counter;
use weir_common::event::Hook;
use weir_datapath::tables::Tables as _;
use weir_datapath::{Scratch, limit, refuse};

use crate::cold::settle;
use crate::events;
use crate::maps::{EVENT_LIMITS, Maps, same_scratch};
use crate::skb::Skb;

/// Counts and tells a drop. True if the packet has become its own answer, which is to go back where it came from.
#[inline(always)]
pub(crate) fn refused(skb: &Skb, scratch: &mut Scratch, hook: Hook, reason: DropReason) -> bool {
    events::dropped(skb, scratch, hook, reason as u8);
    settle(scratch);
    weir_refuse(skb.0.skb.skb) != 0
}

/// [`refuse::refuse`] for the packet at hand. 0 if it stays unanswered.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn weir_refuse(context: *mut __sk_buff) -> u32 {
    let (Some(bucket), Some(scratch)) = (EVENT_LIMITS.get_ptr_mut(0), same_scratch()) else {
        return 0;
    };
    // SAFETY: the helper has no arguments and always succeeds.
    let time = unsafe { bpf_ktime_get_ns() };
    // SAFETY: a live row of this CPU, which one packet program at a time uses.
    if !limit::may_refuse(unsafe { &mut *bucket }, time) {
        return 0;
    }
    let mut skb = Skb(TcContext::new(context));
    if refuse::refuse(&mut skb, scratch).is_err() {
        return 0;
    }
    Maps.count(Counter::Refusals);
    1
}
