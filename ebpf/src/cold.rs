//! The cold path as functions of BPF. The verifier walks a function with a symbol of its own once, for arguments that may
//! be anything; what is within a program it walks once for each path that leads there. They take and return numbers;
//! what they read and fill is in the scratch, which they look up themselves.

use core::arch::asm;

use aya_ebpf::bindings::__sk_buff;
use aya_ebpf::programs::TcContext;
use weir_common::DropReason;
use weir_datapath::{
    Outcome, Scratch, answer, fragment, icmp, plan, policy, reserve, service, way,
};

use crate::maps::{Maps, same_scratch};
use crate::skb::Skb;

/// Calls a function that works in the same scratch.
#[inline(always)]
pub(crate) fn call(scratch: &mut Scratch, function: extern "C" fn() -> u32) -> u32 {
    settle(scratch);
    let answer = function();
    settle(scratch);
    answer
}

/// Everything in the scratch is in memory, and is read from there again.
#[inline(always)]
pub(crate) fn settle(scratch: &mut Scratch) {
    // SAFETY: a register is copied onto itself. That the compiler must take it for a write to the scratch is all that it
    // is for; without an instruction two lines of the source would begin at one place, which the kernel refuses.
    unsafe {
        asm!(
            "{0} = {0}",
            inout(reg) core::ptr::from_mut(scratch) => _,
            options(nostack, preserves_flags)
        );
    }
}

macro_rules! functions {
    ($($(#[doc = $doc:literal])* $name:ident $function:path)*) => {
        $(
            $(#[doc = $doc])*
            #[unsafe(no_mangle)]
            #[inline(never)]
            pub(crate) extern "C" fn $name() -> u32 {
                match same_scratch() {
                    Some(scratch) => u32::from($function(&Maps, scratch)),
                    None => Outcome::of(Err(DropReason::Malformed)).0,
                }
            }
        )*
    };
}

/// [`fragment::unfold`].
#[unsafe(no_mangle)]
#[inline(never)]
pub(crate) extern "C" fn weir_unfold(skb: *mut __sk_buff) -> u32 {
    match same_scratch() {
        Some(scratch) => u32::from(fragment::unfold(&Skb(TcContext::new(skb)), &Maps, scratch)),
        None => Outcome::of(Err(DropReason::Malformed)).0,
    }
}

functions! {
    /// [`way::again`].
    weir_again way::again
    /// [`answer::answer`].
    weir_answer answer::answer
    /// [`answer::establish`].
    weir_establish answer::establish
    /// [`plan::at_pod`].
    weir_plan_at_pod plan::at_pod
    /// [`plan::from_net`].
    weir_plan_from_net plan::from_net
    /// [`plan::to_net`].
    weir_plan_to_net plan::to_net
    /// [`icmp::about`].
    weir_about icmp::about
    /// [`service::frontend_of_packet`].
    weir_frontend service::frontend_of_packet
    /// [`service::first_for_packet`].
    weir_first service::first_for_packet
    /// [`policy::judge`].
    weir_judge policy::judge
    /// [`policy::tell_audit`].
    weir_tell policy::tell_audit
    /// [`reserve::reserve`].
    weir_reserve reserve::reserve
}

/// [`service::search`].
#[unsafe(no_mangle)]
#[inline(never)]
pub(crate) extern "C" fn weir_search(start: u32, len: u32, high: u64, low: u64, port: u32) -> u32 {
    service::search(&Maps, start, len, high, low, port)
}

/// [`service::usable`].
#[unsafe(no_mangle)]
#[inline(never)]
pub(crate) extern "C" fn weir_usable(start: u32, len: u32, index: u32) -> u32 {
    service::usable(&Maps, start, len, index)
}
