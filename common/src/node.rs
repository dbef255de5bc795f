//! What a node's programs are told when they are loaded: constants, which the verifier prunes by.

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
    pub pad: u32,
    /// The kernel's cookie of the node's network namespace (`SO_NETNS_COOKIE`), 0 if it is not known:
    /// then no socket counts as one of the node's own.
    pub network: u64,
}

/// Bits of [`NodeConfig::features`].
#[derive(Clone, Copy, Debug)]
pub struct Features;

impl Features {
    /// Programs log through aya-log. For debugging only.
    pub const LOG: u32 = 1;
}

/// The mark that `from_pod` leaves on what it passes to the stack. The second lock, a static netfilter
/// rule, drops traffic from a pod's device without it.
pub const PASSED_MARK: u32 = 0x0000_0e00;
/// The bits of the mark that are ours.
pub const PASSED_MASK: u32 = 0x0000_0f00;

impl Default for NodeConfig {
    fn default() -> Self {
        Self {
            features: 0,
            passed_mark: PASSED_MARK,
            passed_mask: PASSED_MASK,
            pad: 0,
            network: 0,
        }
    }
}

const _: () = assert!(size_of::<NodeConfig>() == 24);
