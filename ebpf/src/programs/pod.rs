//! Programs at the host's end of a pod's veth pair: the filters of the two blocks that all pods share. A device
//! without a row is closed by them, in both directions.

use aya_ebpf::bindings::{TC_ACT_OK, TC_ACT_SHOT};
use aya_ebpf::helpers::generated::bpf_redirect_peer;
use aya_ebpf::macros::classifier;
use aya_ebpf::programs::TcContext;
use weir_common::event::Hook;
use weir_datapath::{Packet as _, Verdict, from_pod, to_pod};

use crate::events;
use crate::maps::{self, Maps};
use crate::neighbours::answered;
use crate::refusals::refused;
use crate::skb::Skb;

/// Final, and not a call for the next: where one of these is attached twice, through a link of tcx and as a
/// filter, the filter runs only when the link is gone.
const PASS: i32 = TC_ACT_OK;

/// On ingress: what the pod sends.
#[classifier]
pub fn weir_from_pod(context: TcContext) -> i32 {
    let mut skb = Skb(context);
    let Some(scratch) = maps::scratch() else {
        return TC_ACT_SHOT;
    };
    match from_pod(&mut skb, &Maps, scratch) {
        Verdict::Pass => PASS,
        // SAFETY: a helper without pointers. It answers TC_ACT_REDIRECT; a device that has gone by then
        // is a drop of the kernel's.
        Verdict::Redirect(ifindex) => unsafe { bpf_redirect_peer(ifindex, 0) as i32 },
        // As below.
        Verdict::Drop(reason) => match answered(&skb, scratch, reason) {
            // SAFETY: as above.
            true => unsafe { bpf_redirect_peer(skb.ifindex(), 0) as i32 },
            false => TC_ACT_SHOT,
        },
        // Back into the pod, past the program that looks at what comes to it.
        Verdict::Refuse(reason) => match refused(&skb, scratch, Hook::FROM_POD, reason) {
            // SAFETY: as above.
            true => unsafe { bpf_redirect_peer(skb.ifindex(), 0) as i32 },
            false => TC_ACT_SHOT,
        },
    }
}

/// On egress: what is sent to the pod.
#[classifier]
pub fn weir_to_pod(context: TcContext) -> i32 {
    let mut skb = Skb(context);
    let Some(scratch) = maps::scratch() else {
        return TC_ACT_SHOT;
    };
    match to_pod(&mut skb, &Maps, scratch) {
        Verdict::Pass | Verdict::Redirect(_) => PASS,
        Verdict::Drop(reason) | Verdict::Refuse(reason) => {
            events::dropped(&skb, scratch, Hook::TO_POD, reason as u8);
            TC_ACT_SHOT
        }
    }
}
