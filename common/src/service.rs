//! Services: frontends, their runs of backends, what a socket remembers. Which backend is chosen is
//! `datapath`'s; which rows exist is the agent's compiler's.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

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
}

/// Bits of [`Frontend::flags`].
#[derive(Clone, Copy, Debug)]
pub struct FrontendFlags;

impl FrontendFlags {
    /// Traffic that finds no backend is dropped instead of refused (a `Local` policy without a local
    /// endpoint, while other nodes have some).
    pub const DROP_WHEN_EMPTY: u32 = 1;
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
const _: () = assert!(size_of::<Frontend>() == 20);
const _: () = assert!(size_of::<Backend>() == 24);
const _: () = assert!(size_of::<SocketKey>() == 32);
const _: () = assert!(size_of::<SocketPeer>() == 28);
