//! The node's uplinks, and the ports of the node's own addresses that stand for others: pods whose
//! traffic leaves the cluster, and clients whose backend is on another node.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::flow::Peer;
use crate::shared::AtomicU64;
use crate::{Addr, Protocol};

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

/// Key of `CLUSTER`, a trie: a range of addresses that belong to the cluster (pods of every node, the
/// nodes themselves). IPv4 ranges are those of the mapped form, so their lengths are 96 longer.
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
pub struct ClusterKey {
    /// In bits, of `addr` alone.
    pub prefix_len: u32,
    pub addr: Addr,
}

impl ClusterKey {
    /// What asks for an address.
    pub const WHOLE: u32 = 128;
    /// What an IPv4 prefix is longer in the mapped form.
    pub const V4_EXTRA: u32 = 96;
}

/// Value of `CLUSTER`; a trie has no rows without one.
pub type InCluster = u32;

/// Key of `NAT_PORTS`: a reply as it arrives.
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
#[repr(C, align(8))]
pub struct NatKey {
    /// The node's address and the port that was reserved; for ICMP echo the identifier.
    pub node: Peer,
    /// Who the reply comes from; for ICMP echo without a port.
    pub peer: Peer,
    pub protocol: Protocol,
    pub pad: [u8; 3],
}

/// Value of `NAT_PORTS`: whom the reply is for.
#[derive(
    Clone, Copy, Debug, Default, Eq, PartialEq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct NatRow {
    /// Who the port stands for; with the key's peer and protocol it is the key of the flow.
    pub end: Peer,
    pub pad: u16,
    /// Bits of [`NatFlags`].
    pub flags: u32,
    /// Monotonic time at which the port was reserved, in nanoseconds.
    pub created: u64,
}

/// Bits of [`NatRow::flags`].
#[derive(Clone, Copy, Debug)]
pub struct NatFlags;

impl NatFlags {
    /// The end is a client outside of this node, not a pod of it: its replies leave again through an
    /// uplink, with the service as their source.
    pub const CLIENT: u32 = 1;
}

/// What a flow knows of the node's port that stands for its opener: one word, so that it is read and
/// written whole.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Masquerade(pub u64);

impl Masquerade {
    /// Nobody has decided yet.
    pub const UNDECIDED: Self = Self(0);
    /// The flow stays in the cluster: it keeps its source.
    pub const NONE: Self = Self(1 << 63);

    /// A port of an address.
    #[inline(always)]
    pub fn of(node: &Peer) -> Self {
        let port = u16::from_ne_bytes(node.port.0);
        Self(1 << 62 | u64::from(fold(&node.addr)) << 16 | u64::from(port))
    }

    /// The port, if it is one of this address.
    #[inline(always)]
    pub fn port(self, addr: &Addr) -> Option<crate::Port> {
        let port = crate::Port((self.0 as u16).to_ne_bytes());
        (self.0 >> 16 == 1 << 46 | u64::from(fold(addr))).then_some(port)
    }

    /// As a flow keeps it.
    #[inline(always)]
    pub const fn cell(self) -> AtomicU64 {
        AtomicU64::new(self.0)
    }
}

/// 32 bits that differ between the addresses that a node has one after the other.
#[inline(always)]
const fn fold(addr: &Addr) -> u32 {
    let [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p] = addr.0;
    u32::from_ne_bytes([a, b, c, d])
        ^ u32::from_ne_bytes([e, f, g, h])
        ^ u32::from_ne_bytes([i, j, k, l])
        ^ u32::from_ne_bytes([m, n, o, p])
}

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

    /// The largest run of ports outside of the ephemeral ones and of the node ports. `None` when the
    /// ephemeral ones leave no room.
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
            .max_by_key(|gap| gap.last - gap.first)
    }
}

const _: () = assert!(size_of::<Uplink>() == 32);
const _: () = assert!(size_of::<ClusterKey>() == 20);
const _: () = assert!(size_of::<NatKey>() == 40);
const _: () = assert!(size_of::<NatRow>() == 32);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Port;

    #[test]
    fn a_port_is_known_for_its_own_address_alone() {
        for (ours, others) in [
            (Addr::v4([192, 0, 2, 1]), Addr::v4([192, 0, 2, 2])),
            (Addr([0xfd; 16]), Addr::v4([192, 0, 2, 2])),
        ] {
            for port in [0, 1, 443, 0xffff] {
                let node = Peer {
                    addr: ours,
                    port: Port::from(port),
                };
                let kept = Masquerade::of(&node);
                assert_eq!(kept.port(&ours), Some(node.port));
                assert_eq!(kept.port(&others), None);
            }
        }
        for word in [Masquerade::UNDECIDED, Masquerade::NONE] {
            assert_eq!(word.port(&Addr::ABSENT), None);
        }
    }

    #[test]
    fn the_range_is_the_largest_that_nobody_uses() {
        for (ephemeral, expected) in [
            ((32_768, 60_999), Some((16_384, 29_999))),
            ((1024, 65_535), None),
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
