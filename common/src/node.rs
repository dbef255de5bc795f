//! What a node's programs are told when they are loaded: constants, which the verifier prunes by.

use crate::nat::PortRange;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Load-time constants, in the read-only global `NODE`.
#[derive(Clone, Copy, Debug, Eq, PartialEq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct NodeConfig {
    /// Bits of [`Features`].
    pub features: u32,
    /// Bits of a packet's mark that say "a program of ours has passed this", see [`PASSED_MARK`].
    pub passed_mark: u32,
    pub passed_mask: u32,
    /// What `from_net` leaves on what `to_net` has to translate, see [`TRANSLATED_MARK`].
    pub translated_mark: u32,
    /// The ports that may stand for others, as [`PortRange`].
    pub first_port: u16,
    pub last_port: u16,
    pub pad: u32,
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

/// The mark that `from_pod` leaves on what it passes to the stack. The second lock, a static netfilter
/// rule, drops traffic from a pod's device without it.
pub const PASSED_MARK: u32 = 0x0000_0e00;
/// The bits of the mark that are ours.
pub const PASSED_MASK: u32 = 0x0000_0f00;

/// The mark that `from_net` leaves on a packet whose other half is translated where it leaves again.
/// In the same bits, so that a packet has either mark.
pub const TRANSLATED_MARK: u32 = 0x0000_0d00;

impl Default for NodeConfig {
    fn default() -> Self {
        Self {
            features: Features::MASQUERADE | Features::SAYS_WHY,
            passed_mark: PASSED_MARK,
            passed_mask: PASSED_MASK,
            translated_mark: TRANSLATED_MARK,
            first_port: PortRange::USUAL.first,
            last_port: PortRange::USUAL.last,
            pad: 0,
            network: 0,
        }
    }
}

const _: () = assert!(size_of::<NodeConfig>() == 32);
