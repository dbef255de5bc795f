//! Records of the `EVENTS` ring buffer.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::policy::RuleId;
use crate::{Addr, Port, Protocol};

/// A dropped packet, or one that would have been ([`EventKind::AUDIT`]). Rate-limited per reason and CPU; the counters in `DROPS` are exact.
#[derive(
    Clone, Copy, Debug, Default, Eq, PartialEq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct DropEvent {
    pub kind: EventKind,
    /// Number of a [`crate::DropReason`].
    pub reason: u8,
    pub protocol: Protocol,
    /// Which program dropped it.
    pub hook: Hook,
    /// Interface index of the pod's device that the program sits on.
    pub ifindex: u32,
    /// Monotonic time in nanoseconds.
    pub time: u64,
    /// As the packet carried them after translation; absent where it could not be parsed so far.
    pub source: Addr,
    pub destination: Addr,
    pub source_port: Port,
    pub destination_port: Port,
    /// What decided, for the policy reasons.
    pub rule: RuleId,
    /// Length of the frame in bytes.
    pub len: u32,
    /// Events of this reason left out on this CPU since the last one that was sent.
    pub limited: u32,
}

/// First byte of every record.
#[derive(
    Clone, Copy, Debug, Default, Eq, PartialEq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(transparent)]
pub struct EventKind(pub u8);

impl EventKind {
    pub const DROP: Self = Self(1);
    /// Nothing was dropped: a [`DropEvent`] of what would have been, were policies enforced that are only audited.
    pub const AUDIT: Self = Self(2);
}

/// A program of the packet path.
#[derive(
    Clone,
    Copy,
    Debug,
    Default,
    Eq,
    Hash,
    Ord,
    PartialEq,
    PartialOrd,
    FromBytes,
    IntoBytes,
    Immutable,
    KnownLayout,
)]
#[repr(transparent)]
pub struct Hook(pub u8);

impl Hook {
    pub const FROM_POD: Self = Self(1);
    pub const TO_POD: Self = Self(2);
    pub const TO_NET: Self = Self(3);
    pub const FROM_NET: Self = Self(4);

    /// The name in events, metrics and the CLI.
    pub const fn label(self) -> &'static str {
        match self.0 {
            1 => "from_pod",
            2 => "to_pod",
            3 => "to_net",
            4 => "from_net",
            _ => "unknown",
        }
    }
}

/// Value of `EVENT_LIMITS` (per CPU), indexed by reason: a token bucket. Row 0, which is no reason's, is that of refusals,
/// and [`AUDIT_LIMIT`] that of audits.
#[derive(
    Clone, Copy, Debug, Default, Eq, PartialEq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct EventLimit {
    /// Monotonic time in nanoseconds at which the tokens were last filled.
    pub filled: u64,
    pub tokens: u32,
    /// Events left out since the last one that was sent.
    pub limited: u32,
}

/// Row of `EVENT_LIMITS` for [`EventKind::AUDIT`]: the last.
pub const AUDIT_LIMIT: u32 = crate::reason::REASONS - 1;

const _: () = assert!(size_of::<DropEvent>() == 64);
const _: () = assert!(size_of::<EventLimit>() == 16);
