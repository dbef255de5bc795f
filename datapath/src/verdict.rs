//! What happens to a packet, and the memory in which it is decided.

use weir_common::DropReason;
use weir_common::fragment::{Fragment, FragmentKey};
use weir_common::policy::RuleId;
use weir_common::service::{Affinity, AffinityKey, Frontend};
use weir_common::way::{Mark, Plan, Step, WayKey};

use crate::arrive::Arrival;
use crate::l3::Part;
use crate::policy::Judgement;

/// What happens to a packet.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[must_use]
pub enum Verdict {
    /// On to the kernel's stack (from a pod) or into the pod (to a pod).
    Pass,
    /// Straight into the pod behind this interface index of a host end.
    Redirect(u32),
    Drop(DropReason),
    /// Dropped, and its sender is told ([`crate::refuse::refuse`]).
    Refuse(DropReason),
}

/// The memory of one decision. The caller owns it, since the stack of a BPF program has no room for it:
/// in the kernel it is a slot of a per-CPU array. Only the trace has to be empty at the start. Each field
/// says who fills it; nobody reads what was not filled for the packet at hand.
#[derive(Debug, Default)]
#[repr(C)]
pub struct Scratch {
    pub trace: Trace,
    /// [`crate::arrive::read`]: the packet, beside its key in the trace.
    pub(crate) arrival: Arrival,
    /// [`crate::fragment`]: the headers between; what the packet has in common with its other fragments, and what the first one says.
    pub(crate) part: Part,
    pub(crate) fragment: FragmentKey,
    pub(crate) first: Fragment,
    /// Whoever knows the way: what becomes of the packet; the interface index of the pod that it is handed to, 0 for the
    /// kernel's stack; bits of [`weir_common::way::WayState`] as they were.
    pub(crate) step: Step,
    pub(crate) device: u32,
    pub(crate) state: u32,
    /// The conversation that policy is asked about, as its opener sends; in an ICMP error, the packet that
    /// it quotes. What policy has answered.
    pub(crate) question: WayKey,
    pub(crate) judgement: Judgement,
    /// The other direction of what is at hand.
    pub(crate) other: WayKey,
    /// [`crate::plan`]: what is being made, and the key of its first answer.
    pub(crate) plan: Plan,
    pub(crate) back: WayKey,
    /// The service that is asked; who asks, for session affinity, and what it got.
    pub(crate) frontend: Frontend,
    pub(crate) client: AffinityKey,
    pub(crate) last: Affinity,
}

/// What was learned about a packet on the way to its verdict.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
#[repr(C)]
pub struct Trace {
    /// As far as it could be parsed; its destination is the backend's where policy has denied that one.
    pub tuple: WayKey,
    /// What denied it, for the policy reasons.
    pub rule: RuleId,
    /// Not 0: what policy is to be asked about has been allowed and answered before. Whoever asks says so each time.
    pub is_established: u32,
}

impl Scratch {
    /// Interface index of the device at hand.
    #[inline(always)]
    pub const fn ifindex(&self) -> u32 {
        self.arrival.ifindex
    }

    /// The conversation that policy was asked about last, as its opener sends.
    #[inline(always)]
    pub const fn question(&self) -> &WayKey {
        &self.question
    }

    /// What becomes of the packet at hand, which cannot go on, where who has sent it may be told. A part of one is no question.
    #[inline(always)]
    pub(crate) const fn refused(&self, reason: DropReason) -> Verdict {
        match reason {
            DropReason::NoBackend | DropReason::BackendGone | DropReason::NoService
                if self.arrival.has_transport() && !self.arrival.segment.is_first() =>
            {
                Verdict::Refuse(reason)
            }
            _ => Verdict::Drop(reason),
        }
    }

    /// The packet goes to the kernel's stack as it is.
    #[inline(always)]
    pub(crate) fn pass(&mut self, mark: Mark) {
        self.step = Step::marked(mark);
        self.device = 0;
        self.state = 0;
    }
}

/// What a function of the cold path answers. A number, since functions of BPF take and return nothing else.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[must_use]
pub struct Outcome(pub u32);

impl Outcome {
    /// It is known what becomes of the packet.
    pub const KNOWN: Self = Self(0);
    /// It is not, and somebody else has to say.
    pub const UNKNOWN: Self = Self(1 << 8);

    /// Known or unknown.
    ///
    /// # Errors
    /// The packet is to be dropped.
    #[inline(always)]
    pub fn is_known(self) -> Result<bool, DropReason> {
        match self {
            Self::KNOWN => Ok(true),
            Self::UNKNOWN => Ok(false),
            Self(number) => {
                Err(DropReason::from_number(number as u8).unwrap_or(DropReason::Malformed))
            }
        }
    }

    /// From what a function in Rust returns.
    #[inline(always)]
    pub fn of(result: Result<bool, DropReason>) -> Self {
        match result {
            Ok(true) => Self::KNOWN,
            Ok(false) => Self::UNKNOWN,
            Err(reason) => Self(u32::from(reason as u8)),
        }
    }
}

impl From<Outcome> for u32 {
    fn from(outcome: Outcome) -> Self {
        outcome.0
    }
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
