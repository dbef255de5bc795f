//! Answering a pod that asks for its gateway's Ethernet address. A function of BPF of its own: few packets meet it.

use core::mem::offset_of;
use core::ptr::read_volatile;

use aya_ebpf::bindings::{__sk_buff, bpf_fib_lookup as Lookup};
use aya_ebpf::helpers::generated::{bpf_fib_lookup, bpf_skb_change_type};
use aya_ebpf::programs::TcContext;
use weir_common::DropReason;
use weir_common::event::Hook;
use weir_datapath::l3::Family;
use weir_datapath::tables::Tables as _;
use weir_datapath::{Packet as _, Scratch, neighbour};

use crate::cold::settle;
use crate::events;
use crate::maps::{Maps, same_scratch};
use crate::skb::Skb;

const AF_INET: u64 = 2;
const AF_INET6: u64 = 10;
const PACKET_HOST: u32 = 0;

/// What the kernel is asked, in words, which the stack takes: of bytes in the order of all machines that programs are built
/// for, the lowest first.
const WORDS: usize = size_of::<Lookup>() / 8;
const DEVICE: usize = offset_of!(Lookup, ifindex) / 8;
const TO: usize = offset_of!(Lookup, __bindgen_anon_4) / 8;
/// The node's Ethernet address has the second half of this one.
const FROM: usize = offset_of!(Lookup, smac) / 8;
const _: () = assert!(offset_of!(Lookup, smac) % 8 == 4);

/// Counts and tells the drop of what a pod has sent. True if it has become an answer instead, which is to go back where it
/// came from.
#[inline(always)]
pub(crate) fn answered(skb: &Skb, scratch: &mut Scratch, reason: DropReason) -> bool {
    settle(scratch);
    weir_pod_drop(skb.0.skb.skb, u32::from(reason as u8)) != 0
}

/// [`answered`]. A function of its own: the verifier would walk it for each reason.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn weir_pod_drop(context: *mut __sk_buff, number: u32) -> u32 {
    let Some(scratch) = same_scratch() else {
        return 0;
    };
    let reason = number as u8;
    if neighbour::may_ask(reason) && weir_neighbour(context) != 0 {
        return 1;
    }
    events::dropped(
        &Skb(TcContext::new(context)),
        scratch,
        Hook::FROM_POD,
        reason,
    );
    0
}

/// [`neighbour::answer`] for the packet at hand. 0 if it stays unanswered.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn weir_neighbour(context: *mut __sk_buff) -> u32 {
    let mut skb = Skb(TcContext::new(context));
    let ifindex = skb.ifindex();
    let Some(device) = Maps.device(ifindex) else {
        return 0;
    };
    let Ok(Some(family)) = neighbour::asks(&skb, device) else {
        return 0;
    };
    // How the node itself sends to the pod says what Ethernet address its end of the pair has.
    let [_, v4, high, low, ..] = *device.words();
    let mut question = [0; WORDS];
    question[DEVICE] = ifindex.into();
    match family {
        Family::V4 => (question[0], question[TO]) = (AF_INET, v4 >> 32),
        Family::V6 => {
            question[0] = AF_INET6;
            (question[TO], question[TO + 1]) = (high, low);
        }
    }
    // SAFETY: the kernel reads and writes what it has the size of; the context is valid for the run of the program.
    let found = unsafe {
        bpf_fib_lookup(
            context.cast(),
            question.as_mut_ptr().cast(),
            size_of::<Lookup>() as i32,
            0,
        )
    };
    // SAFETY: both are there. The compiler would read across them at once, which the stack refuses.
    let [first, last] =
        [FROM, FROM + 1].map(|at| unsafe { read_volatile(&raw const question[at]) });
    let host = (first >> 32 | last << 32).swap_bytes() >> 16;
    if found != 0
        || question[DEVICE] as u32 != ifindex
        || neighbour::answer(&mut skb, family, device, host).is_err()
    {
        return 0;
    }
    // It was for everybody, and is for the pod; kernels before 6.16 leave that as it is where a packet is handed to a peer.
    // SAFETY: the context is valid for the run of the program.
    unsafe { bpf_skb_change_type(context, PACKET_HOST) };
    1
}
