//! Services: frontends, their runs of backends, what a socket remembers. Which backend is chosen is
//! `datapath`'s; which rows exist is the agent's compiler's.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::table::OTHER_BYTES;
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
#[repr(C)]
pub struct FrontendKey {
    pub addr: Addr,
    pub port: Port,
    pub protocol: Protocol,
    pub scope: Scope,
}

impl FrontendKey {
    /// The same port on the addresses of nodes of the same family: one row for a node port, however many
    /// nodes there are. Which addresses those are is in `NODES`. The scope keeps the key apart from that
    /// of a client who really asks for the unspecified address.
    pub const fn of_nodes(mut self) -> Self {
        self.set_of_nodes();
        self
    }

    /// [`Self::of_nodes`] in place.
    #[inline(always)]
    pub const fn set_of_nodes(&mut self) {
        self.addr = if self.addr.is_v4() {
            Addr::v4([0; 4])
        } else {
            Addr::ABSENT
        };
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
}

/// Key of `LIVE`, and what everything that remembers a backend keeps.
pub type BackendId = u32;

/// Row of `BACKENDS`.
#[derive(
    Clone, Copy, Debug, Default, Eq, Hash, PartialEq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct Backend {
    pub addr: Addr,
    pub port: Port,
    pub flags: u16,
    /// Index in `LIVE`.
    pub id: BackendId,
}

/// Value of `LIVE`: even while the backend may be used, odd once it is gone. It only ever grows, so a
/// remembered generation that equals the current even one proves that the backend is the same.
#[derive(
    Clone, Copy, Debug, Default, Eq, Hash, PartialEq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(transparent)]
pub struct Generation(pub u32);

impl Generation {
    /// May the backend be used?
    #[inline(always)]
    pub const fn is_usable(self) -> bool {
        self.0 & 1 == 0
    }
}

/// Key of `AFFINITY`: a client, and the service port that it asks for.
#[derive(
    Clone, Copy, Debug, Default, Eq, Hash, PartialEq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
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

const _: () = assert!(size_of::<FrontendKey>() == 20);
const _: () = assert!(size_of::<Frontend>() == 24 + OTHER_BYTES);
const _: () = assert!(size_of::<NodeAddress>() == 4);
const _: () = assert!(size_of::<AffinityKey>() == 24);
const _: () = assert!(size_of::<Affinity>() == 40);
const _: () = assert!(size_of::<Backend>() == 24);
const _: () = assert!(size_of::<SocketKey>() == 32);
const _: () = assert!(size_of::<SocketPeer>() == 28);
