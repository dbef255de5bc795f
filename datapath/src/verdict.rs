//! What happens to a packet, and the memory in which it is decided.

use weir_common::DropReason;
use weir_common::flow::{Flow, Nat, Peer};
use weir_common::nat::{NatKey, NatRow};
use weir_common::policy::RuleId;
use weir_common::service::AffinityKey;

use crate::merge::Merge;
use crate::tuple::{AlignedKey, Tuple};

/// What happens to a packet.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[must_use]
pub enum Verdict {
    /// On to the kernel's stack (from a pod) or into the pod (to a pod).
    Pass,
    /// Straight into the pod behind this interface index of a host end.
    Redirect(u32),
    Drop(DropReason),
}

/// The memory of one decision. The caller owns it, since the stack of a BPF program has no room for it:
/// in the kernel it is a slot of a per-CPU array. Only the trace has to be empty at the start.
#[derive(Debug, Default)]
#[repr(C)]
pub struct Scratch {
    pub trace: Trace,
    /// The key of the conversation at hand, and one for looking around.
    pub(crate) key: AlignedKey,
    pub(crate) probe: AlignedKey,
    /// What policy is asked about.
    pub(crate) question: Tuple,
    /// The service that the packet names, and the backend that it goes to.
    pub(crate) asked: Peer,
    pub(crate) nat: Nat,
    /// Who asks, for session affinity.
    pub(crate) client: AffinityKey,
    /// A new entry before it is in its table.
    pub(crate) flow: Flow,
    /// A port that is being reserved, and for whom.
    pub(crate) nat_key: NatKey,
    pub(crate) nat_row: NatRow,
    pub merge: Merge,
    pub(crate) pad: u32,
}

/// What was learned about a packet on the way to its verdict.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
#[repr(C)]
pub struct Trace {
    /// As far as it could be parsed; after translation towards a backend.
    pub tuple: Tuple,
    /// What denied it, for the policy reasons.
    pub rule: RuleId,
    pub pad: u32,
}

impl Trace {
    /// Multicast that every kernel sends by itself (MLD, router solicitations): counted, but no event.
    #[inline(always)]
    pub const fn is_noise(&self) -> bool {
        let addr = &self.tuple.destination;
        if addr.is_v4() {
            addr.0[12] & 0xf0 == 0xe0
        } else {
            addr.0[0] == 0xff
        }
    }
}
