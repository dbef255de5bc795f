//! Programs at the host's end of a pod's veth pair, attached through tcx.

use aya_ebpf::bindings::{TC_ACT_SHOT, TC_ACT_UNSPEC};
use aya_ebpf::helpers::generated::bpf_redirect_peer;
use aya_ebpf::macros::classifier;
use aya_ebpf::programs::TcContext;
use weir_common::DropReason;
use weir_common::event::Hook;
use weir_datapath::{Verdict, from_pod, to_pod};

use crate::events;
use crate::maps::{self, Maps};
use crate::skb::Skb;

/// On ingress: what the pod sends.
#[classifier]
pub fn weir_from_pod(context: TcContext) -> i32 {
    let mut skb = Skb(context);
    let Some(scratch) = maps::scratch() else {
        return TC_ACT_SHOT;
    };
    match from_pod(&mut skb, &Maps, scratch) {
        Verdict::Pass => TC_ACT_UNSPEC,
        // SAFETY: a helper without pointers. It answers TC_ACT_REDIRECT; a device that has gone by then
        // is a drop of the kernel's.
        Verdict::Redirect(ifindex) => unsafe { bpf_redirect_peer(ifindex, 0) as i32 },
        Verdict::Drop(reason) => {
            events::dropped(&skb, scratch, Hook::FROM_POD, reason);
            TC_ACT_SHOT
        }
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
        Verdict::Pass | Verdict::Redirect(_) => TC_ACT_UNSPEC,
        Verdict::Drop(reason) => {
            events::dropped(&skb, scratch, Hook::TO_POD, reason);
            TC_ACT_SHOT
        }
    }
}

/// In both directions, until the pod's policy is in force.
#[classifier]
pub fn weir_protect(context: TcContext) -> i32 {
    if let Some(scratch) = maps::scratch() {
        // SAFETY: the context is valid for the run of the program. The kernel sets `ingress_ifindex`
        // on what a device has received, hence only on what the pod has sent.
        let is_ingress = unsafe { (*context.skb.skb).ingress_ifindex } != 0;
        let hook = if is_ingress {
            Hook::FROM_POD
        } else {
            Hook::TO_POD
        };
        events::dropped(&Skb(context), scratch, hook, DropReason::Protected);
    }
    TC_ACT_SHOT
}
