//! An skb as a packet. Reads are direct, writes go through the helpers that know about checksum offload.

use aya_ebpf::bindings::{BPF_F_MARK_MANGLED_0, BPF_F_PSEUDO_HDR};
use aya_ebpf::programs::TcContext;
use weir_common::DropReason;
use weir_datapath::Packet;
use weir_datapath::packet::{Changed, Delta, Mark, Zero};

use crate::maps;

/// `BPF_F_IPV6` of `bpf_l4_csum_replace`: with IPv6 no header checksum cancels the change of an address,
/// so a `CHECKSUM_COMPLETE` sum stays as it is. Kernels before 6.16 do not know it.
const BPF_F_IPV6: u64 = 1 << 7;
const EINVAL: i64 = -22;

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
        unsafe { (*self.0.skb.skb).vlan_present != 0 }
    }

    #[inline(always)]
    fn pull(&mut self, len: u32) -> Result<(), DropReason> {
        let wanted = len.min(self.0.len());
        if self.0.data() + wanted as usize <= self.0.data_end() {
            return Ok(());
        }
        self.0.pull_data(wanted).map_err(|_| DropReason::Malformed)
    }

    #[inline(always)]
    fn load<const N: usize>(&self, offset: usize) -> Result<[u8; N], DropReason> {
        let start = self.0.data() + offset;
        if start + N > self.0.data_end() {
            return Err(DropReason::Malformed);
        }
        // SAFETY: `start..start + N` is inside of the linear data, as just compared.
        Ok(unsafe { *(start as *const [u8; N]) })
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
        };
        result.map_err(|_| DropReason::WriteFailed)
    }

    #[inline(always)]
    fn mark_passed(&mut self) {
        let node = maps::node();
        self.set_mark(node.passed_mark, node.passed_mask);
    }

    #[inline(always)]
    fn mark_translated(&mut self) {
        let node = maps::node();
        self.set_mark(node.translated_mark, node.passed_mask);
    }

    #[inline(always)]
    fn mark(&self) -> Mark {
        let node = maps::node();
        // SAFETY: the context is valid for the run of the program.
        let mark = unsafe { (*self.0.skb.skb).mark } & node.passed_mask;
        if mark == node.passed_mark {
            Mark::Passed
        } else if mark == node.translated_mark {
            Mark::Translated
        } else {
            Mark::None
        }
    }
}

impl Skb {
    #[inline(always)]
    fn set_mark(&mut self, bits: u32, mask: u32) {
        // SAFETY: the context is valid for the run of the program.
        let mark = unsafe { (*self.0.skb.skb).mark };
        self.0.set_mark((mark & !mask) | bits);
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
