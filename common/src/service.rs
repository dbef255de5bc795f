//! Services: frontends, their runs of backends, what a socket remembers. Which backend is chosen is
//! `datapath`'s; which rows exist is the agent's compiler's.

use core::sync::atomic::Ordering::Relaxed;

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, transmute_mut, transmute_ref};

use crate::shared::AtomicU64;
use crate::table::OTHER_BYTES;
use crate::way::WayKey;
use crate::{Addr, Port, Protocol};

/// From where a frontend is asked: the traffic policies of a Service differ by it.
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
pub struct Scope(pub u8);

impl Scope {
    /// From a pod or a process of this cluster's nodes.
    pub const INTERNAL: Self = Self(0);
    /// From outside of the cluster.
    pub const EXTERNAL: Self = Self(1);
    /// Set in keys that stand for the addresses of nodes, see [`FrontendKey::of_nodes`].
    const OF_NODES: u8 = 2;

    /// Is it asked from outside, at whatever address?
    #[inline(always)]
    pub const fn is_external(self) -> bool {
        self.0 & Self::EXTERNAL.0 != 0
    }

    /// Is this the scope of a key of [`FrontendKey::of_nodes`]?
    #[inline(always)]
    pub const fn is_of_nodes(self) -> bool {
        self.0 & Self::OF_NODES != 0
    }
}

/// Key of `FRONTENDS`: where a client sends to.
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
pub struct FrontendKey {
    pub addr: Addr,
    pub port: Port,
    pub protocol: Protocol,
    pub scope: Scope,
    pub pad: [u8; 4],
}

impl FrontendKey {
    /// The destination of a packet.
    #[inline(always)]
    pub fn of(key: &WayKey, scope: Scope) -> Self {
        let mut asked = Self {
            port: key.destination_port,
            protocol: key.protocol,
            scope,
            ..Self::default()
        };
        let [_, _, a, b, _] = *key.words();
        let words: &mut [u64; 3] = transmute_mut!(&mut asked);
        (words[0], words[1]) = (a, b);
        asked
    }

    /// A cluster IP as such: its row has no backends and is found where nothing else is.
    #[inline(always)]
    pub fn of_cluster_ip(addr: Addr) -> Self {
        Self {
            addr,
            ..Self::default()
        }
    }

    /// Is it one of [`Self::of_cluster_ip`]?
    pub const fn is_of_cluster_ip(&self) -> bool {
        self.protocol.0 == 0
    }

    /// The same port on the addresses of nodes of the same family: one row for a node port, however many
    /// nodes there are. Which addresses those are is in `NODES`. The scope keeps the key apart from that
    /// of a client who really asks for the unspecified address.
    pub fn of_nodes(mut self) -> Self {
        self.set_of_nodes();
        self
    }

    /// [`Self::of_nodes`] in place.
    #[inline(always)]
    pub fn set_of_nodes(&mut self) {
        let words: &mut [u64; 3] = transmute_mut!(self);
        let prefix = u64::from_be(words[1]) >> 32;
        words[1] = if words[0] == 0 && prefix == 0xffff {
            (prefix << 32).to_be()
        } else {
            0
        };
        words[0] = 0;
        self.scope = Scope(self.scope.0 | Scope::OF_NODES);
    }
}

/// Value of `NODES`, by address: whose it is.
#[derive(
    Clone, Copy, Debug, Default, Eq, PartialEq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct NodeAddress {
    /// Bits of [`NodeFlags`].
    pub flags: u32,
}

/// Bits of [`NodeAddress::flags`].
#[derive(Clone, Copy, Debug)]
pub struct NodeFlags;

impl NodeFlags {
    /// This node's. Without it: another node's of the cluster.
    pub const OWN: u32 = 1;
}

/// A run of rows in `BACKENDS`: `start..start + len`. An empty run means that nothing can serve, which
/// is answered with a refusal; no row in `FRONTENDS` at all means that the address is not a Service's.
#[derive(
    Clone, Copy, Debug, Default, Eq, Hash, PartialEq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct Segment {
    pub start: u32,
    pub len: u32,
}

/// Value of `FRONTENDS`. Replaced as a whole, so that a reader sees the old run or the new one.
#[derive(
    Clone, Copy, Debug, Default, Eq, Hash, PartialEq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct Frontend {
    /// The agent's number of the service, never 0.
    pub service: u32,
    pub segment: Segment,
    /// Session affinity by client address in seconds, 0 for none (`sessionAffinityConfig`, 1 to 86400).
    pub affinity: u32,
    /// Bits of [`FrontendFlags`].
    pub flags: u32,
    /// The port of the Service that this is a way to: session affinity is shared by all ways to it, and by
    /// nothing else (kube-proxy keeps it for each service port).
    pub port: Port,
    pub pad: [u8; 2 + OTHER_BYTES],
}

/// Bits of [`Frontend::flags`].
#[derive(Clone, Copy, Debug)]
pub struct FrontendFlags;

impl FrontendFlags {
    /// Traffic that finds no backend is dropped instead of refused (a `Local` policy without a local
    /// endpoint, while other nodes have some).
    pub const DROP_WHEN_EMPTY: u32 = 1;
    /// Only if the address is one of this node, by `NODES`. Another node is asked itself, since only it
    /// knows what its own endpoints are (`externalTrafficPolicy: Local`, host ports).
    pub const OWN_NODE_ONLY: u32 = 1 << 1;
    /// Its backend is the node's own server of names, at an address of the node that stays when the server is replaced.
    pub const OWN_DNS: u32 = 1 << 2;
}

/// Key of `LIVE`, and what everything that remembers a backend keeps.
pub type BackendId = u32;

/// Row of `BACKENDS`.
#[derive(
    Clone, Copy, Debug, Default, Eq, Hash, PartialEq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C, align(8))]
pub struct Backend {
    pub addr: Addr,
    pub port: Port,
    pub flags: u16,
    /// Index in `LIVE`.
    pub id: BackendId,
}

impl Backend {
    /// The row as words, in the order of the machine: the address, the rest.
    #[inline(always)]
    pub fn words(&self) -> &[u64; 3] {
        transmute_ref!(self)
    }
}

/// Value of `LIVE`: which use of its number a backend is, and how it is, counted in fours. `n / 4` is the
/// *incarnation*, which only grows, so what remembers a generation of the same one remembers the same backend.
/// `n % 4` is 0 while the backend is usable, 1 while it drains, otherwise it is gone. Incarnation 0 is no backend's:
/// a row of zero was never used.
#[derive(
    Clone, Copy, Debug, Default, Eq, Hash, PartialEq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(transparent)]
pub struct Generation(pub u32);

impl Generation {
    /// What a number is that was never used before.
    pub const FIRST: Self = Self(4);
    const STATE: u32 = 3;
    const DRAINING: u32 = 1;
    const GONE: u32 = 2;

    /// May new connections and datagrams go to the backend?
    #[inline(always)]
    pub const fn is_usable(self) -> bool {
        self.0 & Self::STATE == 0 && self.0 > Self::STATE
    }

    /// Do established connections go on, while new ones and datagrams go elsewhere?
    #[inline(always)]
    pub const fn is_draining(self) -> bool {
        self.0 & Self::STATE == Self::DRAINING && self.0 > Self::STATE
    }

    /// Is there no such backend (any more)?
    #[inline(always)]
    pub const fn is_gone(self) -> bool {
        !self.is_usable() && !self.is_draining()
    }

    /// Is it of the same incarnation, however each of the two is?
    #[inline(always)]
    pub const fn is_same_backend(self, other: Self) -> bool {
        self.0 & !Self::STATE == other.0 & !Self::STATE
    }

    /// The same backend, usable (again).
    #[inline(always)]
    pub const fn usable(self) -> Self {
        Self(self.0 & !Self::STATE)
    }

    /// The same backend, draining.
    #[inline(always)]
    pub const fn drained(self) -> Self {
        Self(self.usable().0 | Self::DRAINING)
    }

    /// The same backend, gone.
    #[inline(always)]
    pub const fn gone(self) -> Self {
        Self(self.usable().0 | Self::GONE)
    }

    /// The next backend of this number, usable. After the greatest incarnation comes 1.
    #[inline(always)]
    pub const fn next(self) -> Self {
        let next = Self((self.0 | Self::STATE).wrapping_add(1));
        if next.0 == 0 { Self::FIRST } else { next }
    }
}

/// Key of `AFFINITY`: a client, and the service port that it asks for.
#[derive(
    Clone, Copy, Debug, Default, Eq, Hash, PartialEq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C, align(8))]
pub struct AffinityKey {
    /// Meaning by `kind`.
    pub client: Addr,
    /// [`Frontend::service`] and [`Frontend::port`].
    pub service: u32,
    pub port: Port,
    pub protocol: Protocol,
    pub kind: ClientKind,
}

/// How a client is told from another.
#[derive(
    Clone, Copy, Debug, Default, Eq, Hash, PartialEq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(transparent)]
pub struct ClientKind(pub u8);

impl ClientKind {
    /// By its address.
    pub const ADDRESS: Self = Self(0);
    /// By the cookie of its network namespace, in the last eight bytes: at a socket call its address is
    /// not chosen yet. The families are two clients, as they are by address.
    pub const NETWORK_V4: Self = Self(1);
    pub const NETWORK_V6: Self = Self(2);
}

/// Value of `AFFINITY`: the backend that a client had last.
#[derive(
    Clone, Copy, Debug, Default, Eq, PartialEq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct Affinity {
    /// Monotonic time of its latest connection in nanoseconds, to within a clock tick.
    pub used: u64,
    pub backend: BackendId,
    pub generation: Generation,
    pub addr: Addr,
    pub port: Port,
    pub pad: u16,
    pub pad2: u32,
}

/// Key of `SOCKETS`: one side of a translation that a socket hook made.
#[derive(
    Clone, Copy, Debug, Default, Eq, Hash, PartialEq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct SocketKey {
    /// The kernel's socket cookie.
    pub cookie: u64,
    /// The service's address (to find the backend), or the backend's (to find the service).
    pub addr: Addr,
    pub port: Port,
    pub protocol: Protocol,
    pub side: SocketSide,
    pub pad: [u8; 4],
}

/// Which way a row of `SOCKETS` is read.
#[derive(
    Clone, Copy, Debug, Default, Eq, Hash, PartialEq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(transparent)]
pub struct SocketSide(pub u8);

impl SocketSide {
    /// From the service to the backend chosen for this socket.
    pub const FORWARD: Self = Self(0);
    /// From the backend back to the service that the program thinks it speaks to.
    pub const REVERSE: Self = Self(1);
}

/// Value of `SOCKETS`: the other side.
#[derive(
    Clone, Copy, Debug, Default, Eq, Hash, PartialEq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct SocketPeer {
    pub addr: Addr,
    pub port: Port,
    pub pad: u16,
    pub backend: BackendId,
    pub generation: Generation,
}

/// Row of `UNUSED_PORTS` and of `HOSTNET_PORTS`: a bit for each of 64 ports, in the order of the machine, the lowest port first.
///
/// `UNUSED_PORTS`: 1 if no socket was ever given a backend with that port. Whoever asks for the name of another side mostly has
/// accepted a connection from a port that no backend has, and need not look into `SOCKETS`, where each socket has a place of its
/// own in memory. A row of zeros says nothing, so that a table that is new beside an older `SOCKETS` is right.
///
/// `HOSTNET_PORTS`: 1 if something from outside was ever led to a backend in this node's host network with that port. What the
/// node itself sends mostly comes from another one, and no way of it is looked for.
#[derive(Debug, Default, FromBytes, IntoBytes, KnownLayout)]
#[repr(transparent)]
pub struct PortBits(pub AtomicU64);

impl PortBits {
    /// The row of a port, and its bit there.
    #[inline(always)]
    pub fn place(port: Port) -> (u32, u64) {
        let port = u16::from(port);
        (u32::from(port / 64), 1 << (port % 64))
    }

    /// Is one of its bits 1?
    #[inline(always)]
    pub fn has(&self, bit: u64) -> bool {
        self.0.load(Relaxed) & bit != 0
    }
}

const _: () = assert!(size_of::<FrontendKey>() == 24);
const _: () = assert!(size_of::<Frontend>() == 24 + OTHER_BYTES);
const _: () = assert!(size_of::<NodeAddress>() == 4);
const _: () = assert!(size_of::<AffinityKey>() == 24);
const _: () = assert!(size_of::<Affinity>() == 40);
const _: () = assert!(size_of::<Backend>() == 24);
const _: () = assert!(size_of::<SocketKey>() == 32);
const _: () = assert!(size_of::<SocketPeer>() == 28);

#[cfg(test)]
mod tests {
    use super::Generation;

    #[test]
    fn a_generation_says_which_backend_it_is_and_how() {
        // Generation, usable, draining; then the same one usable, draining and gone, and the next one.
        let cases = [
            (0, false, false, [0, 1, 2, 4]),
            (1, false, false, [0, 1, 2, 4]),
            (4, true, false, [4, 5, 6, 8]),
            (5, false, true, [4, 5, 6, 8]),
            (6, false, false, [4, 5, 6, 8]),
            (7, false, false, [4, 5, 6, 8]),
            (8, true, false, [8, 9, 10, 12]),
            (
                u32::MAX,
                false,
                false,
                [u32::MAX - 3, u32::MAX - 2, u32::MAX - 1, 4],
            ),
        ];
        for (n, usable, draining, steps) in cases {
            let it = Generation(n);
            assert_eq!(it.is_usable(), usable, "{n}");
            assert_eq!(it.is_draining(), draining, "{n}");
            assert_eq!(it.is_gone(), !usable && !draining, "{n}");
            let taken = [it.usable(), it.drained(), it.gone(), it.next()];
            assert_eq!(taken.map(|g| g.0), steps, "{n}");
            let same = taken.map(|g| g.is_same_backend(it));
            assert_eq!(same, [true, true, true, false], "{n}");
        }
    }
}
