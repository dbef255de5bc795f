//! Programs at the node's uplinks, as filters. What they pass goes on to the filters of others.

use aya_ebpf::bindings::{TC_ACT_SHOT, TC_ACT_UNSPEC};
use aya_ebpf::helpers::generated::bpf_redirect;
use aya_ebpf::macros::classifier;
use aya_ebpf::programs::TcContext;
use weir_common::event::Hook;
use weir_datapath::{Packet as _, Verdict, from_net, to_net};

use crate::events;
use crate::maps::{self, Maps};
use crate::refusals::refused;
use crate::skb::Skb;

/// On egress: what leaves the node.
#[classifier]
pub fn weir_to_net(context: TcContext) -> i32 {
    let mut skb = Skb(context);
    // The node's own traffic does not depend on us.
    let Some(scratch) = maps::scratch() else {
        return TC_ACT_UNSPEC;
    };
    match to_net(&mut skb, &Maps, scratch) {
        Verdict::Pass | Verdict::Redirect(_) => TC_ACT_UNSPEC,
        Verdict::Drop(reason) | Verdict::Refuse(reason) => {
            events::dropped(&skb, scratch, Hook::TO_NET, reason as u8);
            TC_ACT_SHOT
        }
    }
}

/// On ingress: what comes into the node.
#[classifier]
pub fn weir_from_net(context: TcContext) -> i32 {
    let mut skb = Skb(context);
    let Some(scratch) = maps::scratch() else {
        return TC_ACT_UNSPEC;
    };
    match from_net(&mut skb, &Maps, scratch) {
        Verdict::Pass | Verdict::Redirect(_) => TC_ACT_UNSPEC,
        Verdict::Drop(reason) => {
            events::dropped(&skb, scratch, Hook::FROM_NET, reason as u8);
            TC_ACT_SHOT
        }
        // Out again by the uplink, to whoever has handed it to us.
        Verdict::Refuse(reason) => match refused(&skb, scratch, Hook::FROM_NET, reason) {
            // SAFETY: a helper without pointers.
            true => unsafe { bpf_redirect(skb.ifindex(), 0) as i32 },
            false => TC_ACT_SHOT,
        },
    }
}
