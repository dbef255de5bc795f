//! Flows: one entry for both directions of a conversation, with everything a packet of it needs. Its
//! state machine is `datapath`'s.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::service::{BackendId, Generation};
use crate::shared::{AtomicU32, AtomicU64};
use crate::{Addr, Port, Protocol};

/// One end of a conversation.
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
#[repr(C)]
pub struct Peer {
    pub addr: Addr,
    pub port: Port,
}

/// Key of `FLOWS` and `HALF_OPEN`: the two ends in ascending byte order, so that both directions make
/// the same key. For ICMP echo the requester's port is the identifier and the answerer's is absent, so that
/// requests of both sides are two conversations.
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
#[repr(C)]
pub struct FlowKey {
    pub low: Peer,
    pub high: Peer,
    pub protocol: Protocol,
    pub pad: [u8; 3],
}

/// Value of `FLOWS` and `HALF_OPEN`. Several CPUs may hold the same entry, hence the atomics; relaxed
/// loads and stores of them are plain instructions.
#[derive(Debug, Default, FromBytes, IntoBytes, KnownLayout)]
#[repr(C)]
pub struct Flow {
    /// Monotonic time of creation in nanoseconds.
    pub created: u64,
    /// Monotonic time of the latest packet in nanoseconds, to within a clock tick.
    pub seen: AtomicU64,
    /// Packets and bytes (of the IP packet, headers included) from the opener, then towards it.
    pub packets: [AtomicU64; 2],
    pub bytes: [AtomicU64; 2],
    /// Bits of [`FlowBits`].
    pub bits: AtomicU32,
    /// The policy epoch in which the flow was last judged.
    pub epoch: AtomicU32,
    /// Rules that allowed it: at the sender's egress, at the receiver's ingress; 0 for none.
    pub egress_rule: AtomicU32,
    pub ingress_rule: AtomicU32,
    /// Interface index of the opener's and the responder's device if it is a pod of this node, else 0.
    pub opener_device: AtomicU32,
    pub responder_device: AtomicU32,
    /// What translation is done; meaning by the [`FlowBits`].
    pub nat: Nat,
    /// A [`crate::nat::Masquerade`]: set by the first packet that leaves through an uplink. Beside the
    /// rest, so that a packet that leaves reads one entry, as any other.
    pub masquerade: AtomicU64,
}

/// The translation of a flow through a Service, fixed when the flow is made.
#[derive(
    Clone, Copy, Debug, Default, Eq, PartialEq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct Nat {
    /// [`FlowBits::TO_BACKEND`]: the backend. [`FlowBits::FROM_SERVICE`]: the service that the opener
    /// spoke to, which replies must seem to come from.
    pub peer: Peer,
    pub pad: u16,
    pub backend: BackendId,
    pub generation: Generation,
    pub pad2: u32,
}

/// Bits of [`Flow::bits`].
#[derive(Clone, Copy, Debug)]
pub struct FlowBits;

impl FlowBits {
    /// The opener is [`FlowKey::high`].
    pub const OPENER_IS_HIGH: u32 = 1;
    /// The responder has answered.
    pub const ANSWERED: u32 = 1 << 1;
    /// The opener, the responder has sent FIN.
    pub const OPENER_FIN: u32 = 1 << 2;
    pub const RESPONDER_FIN: u32 = 1 << 3;
    /// Either side has sent RST, and neither anything else since: what goes on talking was not ended by it, and who sent it
    /// may be somebody else.
    pub const RESET: u32 = 1 << 4;
    /// One side has sent something after the other's FIN: it has heard of it.
    pub const FIN_HEARD: u32 = 1 << 5;
    /// This entry only leads to another one: the key is (client, service), [`Flow::nat`] the backend.
    pub const TO_BACKEND: u32 = 1 << 8;
    /// The flow was opened through a service by the per-packet path: replies are translated back.
    pub const FROM_SERVICE: u32 = 1 << 9;

    const BOTH_FIN: u32 = Self::OPENER_FIN | Self::RESPONDER_FIN;

    /// Have both sides said goodbye, or has one broken off?
    #[inline(always)]
    pub const fn is_closed(bits: u32) -> bool {
        bits & Self::RESET != 0 || bits & Self::BOTH_FIN == Self::BOTH_FIN
    }

    /// Has one side said goodbye, and the other not?
    #[inline(always)]
    pub const fn is_half_closed(bits: u32) -> bool {
        bits & Self::BOTH_FIN != 0 && !Self::is_closed(bits)
    }
}

const _: () = assert!(size_of::<Peer>() == 18);
const _: () = assert!(size_of::<FlowKey>() == 40);
const _: () = assert!(size_of::<Nat>() == 32);
const _: () = assert!(size_of::<Flow>() == 16 + 32 + 24 + 32 + 8);
