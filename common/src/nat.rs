//! The node's uplinks, what belongs to the cluster, and the ports of the node's own addresses that may stand for others:
//! pods whose traffic leaves the cluster, and clients whose backend is on another node.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::Addr;

/// Value of `UPLINKS`, keyed by interface index (`u32`): with which address traffic leaves there.
#[derive(
    Clone, Copy, Debug, Default, Eq, Hash, PartialEq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C, align(8))]
pub struct Uplink {
    /// The node's address of each family, or [`Addr::ABSENT`].
    pub ipv4: Addr,
    pub ipv6: Addr,
}

/// Value of `CLUSTER`; a trie has no rows without one.
pub type InCluster = u32;

/// The ports that may stand for others, in host order, both included: never the node's own ephemeral
/// ports, never those of node ports. Two numbers that programs are told when they are loaded.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct PortRange {
    pub first: u16,
    pub last: u16,
}

impl PortRange {
    /// From where on ports are used: what lies below is mostly for servers.
    const FLOOR: u16 = 16_384;
    /// Kubernetes' default for `--service-node-port-range`.
    pub const NODE_PORTS: Self = Self {
        first: 30_000,
        last: 32_767,
    };
    /// What is used where the ephemeral ports of Linux are as they come.
    pub const USUAL: Self = Self {
        first: Self::FLOOR,
        last: Self::NODE_PORTS.first - 1,
    };

    /// Fewer are too few for the pods of a node: towards one peer a pod may have half of them.
    const ENOUGH: u16 = 8_192;

    /// The largest run of ports outside of the ephemeral ones and of the node ports. `None` when the
    /// ephemeral ones leave too little room.
    pub fn beside(ephemeral: Self) -> Option<Self> {
        let (low, high) = if ephemeral.first <= Self::NODE_PORTS.first {
            (ephemeral, Self::NODE_PORTS)
        } else {
            (Self::NODE_PORTS, ephemeral)
        };
        let gaps = [
            (Self::FLOOR, low.first.saturating_sub(1)),
            (
                low.last.saturating_add(1).max(Self::FLOOR),
                high.first.saturating_sub(1),
            ),
            (
                high.last.max(low.last).saturating_add(1).max(Self::FLOOR),
                u16::MAX,
            ),
        ];
        gaps.into_iter()
            .filter(|(first, last)| first < last)
            .map(|(first, last)| Self { first, last })
            // A gap at the end of the numbers may be the last ephemeral port itself.
            .filter(|gap| gap.last < ephemeral.first || gap.first > ephemeral.last)
            .filter(|gap| gap.last - gap.first >= Self::ENOUGH)
            .max_by_key(|gap| gap.last - gap.first)
    }
}

const _: () = assert!(size_of::<Uplink>() == 32);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_range_is_the_largest_that_nobody_uses() {
        for (ephemeral, expected) in [
            ((32_768, 60_999), Some((16_384, 29_999))),
            ((1024, 65_535), None),
            ((1024, 65_000), None),
            ((1024, 65_530), None),
            ((10_000, 29_000), Some((32_768, 65_535))),
            ((16_384, 40_000), Some((40_001, 65_535))),
            ((31_000, 65_535), Some((16_384, 29_999))),
            ((16_384, 65_535), None),
        ] {
            let (first, last) = ephemeral;
            let found = PortRange::beside(PortRange { first, last });
            let found = found.map(|range| (range.first, range.last));
            assert_eq!(found, expected, "{ephemeral:?}");
        }
    }
}
