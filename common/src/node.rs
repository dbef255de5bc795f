//! What a node's programs are told when they are loaded: constants, which the verifier prunes by.

use crate::nat::PortRange;
use crate::way::Mark;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Load-time constants, in the read-only global `NODE`.
#[derive(Clone, Copy, Debug, Eq, PartialEq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct NodeConfig {
    /// Bits of [`Features`].
    pub features: u32,
    /// The ports that may stand for others, as [`PortRange`].
    pub first_port: u16,
    pub last_port: u16,
    /// The kernel's cookie of the node's network namespace (`SO_NETNS_COOKIE`), 0 if it is not known:
    /// then no socket counts as one of the node's own.
    pub network: u64,
}

/// Bits of [`NodeConfig::features`].
#[derive(Clone, Copy, Debug)]
pub struct Features;

impl Features {
    /// What pods send out of the cluster leaves with the node's address.
    pub const MASQUERADE: u32 = 1;
    /// A refused socket call says why, by a helper that these hooks have since Linux 6.1 (`bpf_set_retval`). Without it the
    /// call ends in EPERM, and the verifier does not look at what is never reached.
    pub const SAYS_WHY: u32 = 1 << 1;
}

/// The mark of what a pod has sent and `from_pod` has let through. The second lock, a static netfilter rule, drops
/// traffic from a pod's device without it.
pub const PASSED_MARK: u32 = 0x0000_0e00;
/// The bits that the second lock looks at.
pub const PASSED_MASK: u32 = 0x0000_0f00;

impl Mark {
    /// Every bit of a packet's mark (`skb->mark`) that is ours. Whatever a pod has sent shows [`PASSED_MARK`] under
    /// [`PASSED_MASK`].
    pub const MASK: u32 = 0x0000_3f00;

    /// As it stands in those bits.
    #[inline(always)]
    pub const fn bits(self) -> u32 {
        match self {
            Self::FORMER => PASSED_MARK,
            Self::LEAVING => 0x1000 | PASSED_MARK,
            Self::REPLY => 0x2000 | PASSED_MARK,
            Self::PASSED => 0x3000 | PASSED_MARK,
            Self::TRANSLATED => 0x0d00,
            _ => 0,
        }
    }

    /// What a packet's mark says.
    #[inline(always)]
    pub const fn of(mark: u32) -> Self {
        match mark & Self::MASK {
            0x0e00 => Self::FORMER,
            0x1e00 => Self::LEAVING,
            0x2e00 => Self::REPLY,
            0x3e00 => Self::PASSED,
            0x0d00 => Self::TRANSLATED,
            _ => Self::NONE,
        }
    }

    /// Has a pod of this node sent it?
    #[inline(always)]
    pub const fn is_of_pod(self) -> bool {
        matches!(
            self,
            Self::PASSED | Self::LEAVING | Self::REPLY | Self::FORMER
        )
    }
}

impl Default for NodeConfig {
    fn default() -> Self {
        Self {
            features: Features::MASQUERADE | Features::SAYS_WHY,
            first_port: PortRange::USUAL.first,
            last_port: PortRange::USUAL.last,
            network: 0,
        }
    }
}

const _: () = assert!(size_of::<NodeConfig>() == 16);
