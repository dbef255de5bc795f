//! An skb as a packet. Reads are direct, writes go through the helpers that know about checksum offload.

use core::arch::asm;
use core::mem::offset_of;

use aya_ebpf::bindings::{__sk_buff, BPF_F_MARK_MANGLED_0, BPF_F_PSEUDO_HDR};
use aya_ebpf::helpers::generated::{bpf_csum_update, bpf_skb_change_tail};
use aya_ebpf::programs::TcContext;
use weir_common::DropReason;
use weir_common::way::Mark;
use weir_datapath::packet::{Changed, Delta, Zero};
use weir_datapath::{Outcome, Packet, Scratch, Tables};

use crate::cold;

/// `BPF_F_IPV6` of `bpf_l4_csum_replace`: with IPv6 no header checksum cancels the change of an address,
/// so a `CHECKSUM_COMPLETE` sum stays as it is. Kernels before 6.16 do not know it.
const BPF_F_IPV6: u64 = 1 << 7;
const EINVAL: i64 = -22;
/// The number of a network in a tag. A tag with number 0 says a priority, and belongs to none (IEEE 802.1Q, 9.6).
const VLAN_ID: u32 = 0xfff;

pub(crate) struct Skb(pub(crate) TcContext);

impl Packet for Skb {
    #[inline(always)]
    fn ifindex(&self) -> u32 {
        // SAFETY: the context is valid for the run of the program.
        unsafe { (*self.0.skb.skb).ifindex }
    }

    #[inline(always)]
    fn len(&self) -> u32 {
        self.0.len()
    }

    #[inline(always)]
    fn has_stripped_vlan(&self) -> bool {
        // SAFETY: the context is valid for the run of the program.
        unsafe { (*self.0.skb.skb).vlan_tci & VLAN_ID != 0 }
    }

    #[inline(always)]
    fn received_by(&self) -> u32 {
        // SAFETY: the context is valid for the run of the program.
        unsafe { (*self.0.skb.skb).ingress_ifindex }
    }

    #[inline(always)]
    fn is_of_socket(&self) -> bool {
        // SAFETY: the context is valid for the run of the program.
        unsafe { !(*self.0.skb.skb).__bindgen_anon_2.sk.is_null() }
    }

    #[inline(always)]
    fn load<const N: usize>(&self, offset: usize) -> Result<[u8; N], DropReason> {
        let mut start = self.data() + offset;
        if start + N > self.data_end() {
            // Of some devices headers, too, are in pages of their own. What is pulled in costs the packet a new head, so
            // no more is than somebody reads: a segment's payload stays where it is.
            self.0
                .pull_data((offset + N) as u32)
                .map_err(|_| DropReason::Malformed)?;
            start = self.data() + offset;
            if start + N > self.data_end() {
                return Err(DropReason::Malformed);
            }
        }
        let mut bytes = [0; N];
        let mut at = 0;
        // SAFETY: `start..start + N` is inside of the linear data, as just compared.
        unsafe {
            while at + 8 <= N {
                bytes[at..at + 8].copy_from_slice(&word::<u64>(start + at).to_ne_bytes());
                at += 8;
            }
            if at + 4 <= N {
                bytes[at..at + 4].copy_from_slice(&(word::<u32>(start + at) as u32).to_ne_bytes());
                at += 4;
            }
            if at + 2 <= N {
                bytes[at..at + 2].copy_from_slice(&(word::<u16>(start + at) as u16).to_ne_bytes());
                at += 2;
            }
            if at < N {
                bytes[at] = word::<u8>(start + at) as u8;
            }
        }
        Ok(bytes)
    }

    #[inline(always)]
    fn store<const N: usize>(&mut self, offset: usize, bytes: &[u8; N]) -> Result<(), DropReason> {
        self.0
            .store(offset, bytes, 0)
            .map_err(|_| DropReason::WriteFailed)
    }

    #[inline(always)]
    fn fix_checksum(
        &mut self,
        offset: usize,
        changed: Changed,
        delta: Delta,
    ) -> Result<(), DropReason> {
        let delta = u64::from(delta.0);
        let pseudo = u64::from(BPF_F_PSEUDO_HDR);
        let result = match changed {
            Changed::Header => self.0.l3_csum_replace(offset, 0, delta, 0),
            Changed::Ports(zero) => self.l4(offset, delta, mangled(zero)),
            Changed::V4Addresses(zero) => self.l4(offset, delta, mangled(zero) | pseudo),
            Changed::V6Addresses(zero) => {
                let flags = mangled(zero) | pseudo;
                match self.l4(offset, delta, flags | BPF_F_IPV6) {
                    Err(EINVAL) => self.l4(offset, delta, flags),
                    result => result,
                }
            }
            Changed::Uncovered => {
                // SAFETY: the context is valid for the run of the program. It answers an error where no device has made a
                // sum, and then there is nothing to change.
                unsafe { bpf_csum_update(self.0.skb.skb, delta as u32) };
                Ok(())
            }
        };
        result.map_err(|_| DropReason::WriteFailed)
    }

    #[inline(always)]
    fn resize(&mut self, len: u32) -> Result<(), DropReason> {
        // SAFETY: the context is valid for the run of the program.
        let refused = unsafe { bpf_skb_change_tail(self.0.skb.skb, len, 0) };
        if refused == 0 {
            Ok(())
        } else {
            Err(DropReason::WriteFailed)
        }
    }

    #[inline(always)]
    fn set_mark(&mut self, mark: Mark) {
        // SAFETY: the context is valid for the run of the program.
        let others = unsafe { (*self.0.skb.skb).mark } & !Mark::MASK;
        self.0.set_mark(others | mark.bits());
    }

    #[inline(always)]
    fn unfold(&self, _: &impl Tables, scratch: &mut Scratch) -> Outcome {
        cold::settle(scratch);
        let answer = cold::weir_unfold(self.0.skb.skb);
        cold::settle(scratch);
        Outcome(answer)
    }

    #[inline(always)]
    fn mark(&self) -> Mark {
        // SAFETY: the context is valid for the run of the program.
        Mark::of(unsafe { (*self.0.skb.skb).mark })
    }
}

impl Skb {
    /// Start of the linear data. Read anew each time, and as a pointer: the compiler would keep a number.
    #[inline(always)]
    fn data(&self) -> usize {
        const AT: usize = offset_of!(__sk_buff, data);
        self.pointer::<AT>()
    }

    /// Its end.
    #[inline(always)]
    fn data_end(&self) -> usize {
        const AT: usize = offset_of!(__sk_buff, data_end);
        self.pointer::<AT>()
    }

    #[inline(always)]
    fn pointer<const AT: usize>(&self) -> usize {
        let pointer;
        // SAFETY: the context is valid for the run of the program.
        unsafe {
            asm!(
                "{pointer} = *(u32 *)({context} + {at})",
                pointer = out(reg) pointer,
                context = in(reg) self.0.skb.skb,
                at = const AT,
                options(readonly, nostack, preserves_flags)
            );
        }
        pointer
    }

    #[inline(always)]
    fn l4(&self, offset: usize, delta: u64, flags: u64) -> Result<(), i64> {
        self.0.l4_csum_replace(offset, 0, delta, flags)
    }
}

#[inline(always)]
fn mangled(zero: Zero) -> u64 {
    match zero {
        Zero::IsSum => 0,
        Zero::IsAbsent => u64::from(BPF_F_MARK_MANGLED_0),
    }
}

/// A word of a packet, wherever it stands: packets are aligned for nobody, and the kernel lets programs read them so on
/// the machines that can (x86, arm64). The compiler would read byte by byte.
///
/// # Safety
/// The bytes must be there.
#[inline(always)]
unsafe fn word<W>(at: usize) -> u64 {
    let word: u64;
    // SAFETY: as above.
    unsafe {
        match size_of::<W>() {
            8 => {
                asm!("{} = *(u64 *)({} + 0)", out(reg) word, in(reg) at, options(pure, readonly, nostack, preserves_flags))
            }
            4 => {
                asm!("{} = *(u32 *)({} + 0)", out(reg) word, in(reg) at, options(pure, readonly, nostack, preserves_flags))
            }
            2 => {
                asm!("{} = *(u16 *)({} + 0)", out(reg) word, in(reg) at, options(pure, readonly, nostack, preserves_flags))
            }
            _ => {
                asm!("{} = *(u8 *)({} + 0)", out(reg) word, in(reg) at, options(pure, readonly, nostack, preserves_flags))
            }
        }
    }
    word
}
