//! Policy as the kernel sees it: classes of addresses, numbered rule lists, flat verdicts. What a
//! selector is only the agent's compiler knows.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::table::OTHER_BYTES;
use crate::{Port, Protocol};

/// Value of `CLASSES`, keyed by [`crate::Addr`], and of `CIDRS`, a trie keyed by [`crate::Prefix`], for addresses without a row
/// there: addresses that no policy can tell apart share one.
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
pub struct Class(pub u32);

impl Class {
    /// An address without a row, neither of its own nor of a block around it: outside of the cluster, as far as policy can tell.
    pub const WORLD: Self = Self(0);
    /// This node's own addresses: always allowed, both ways (Kubernetes API, `NetworkPolicy`).
    pub const OWN_NODE: Self = Self(1);
    /// The first number that the compiler gives out.
    pub const FIRST_COMPILED: u32 = 16;
}

/// The list of rules that holds for a pod in one direction; pods selected by the same policies share it.
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
pub struct RulesId(pub u32);

impl RulesId {
    /// No policy isolates the pod in this direction: everything is allowed, nothing is looked up.
    pub const OPEN: Self = Self(0);
}

/// The rule of a policy that decided, or the set of policies that isolate a pod; 0 when no policy took
/// part. The agent keeps the names.
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
pub struct RuleId(pub u32);

impl RuleId {
    pub const NONE: Self = Self(0);
}

/// Key of `VERDICTS`.
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
pub struct VerdictKey {
    pub rules: RulesId,
    /// Of the peer: the source for ingress, the destination for egress.
    pub class: Class,
}

/// Value of `VERDICTS`. A class without a row under a list is answered as [`Class::WORLD`] is; every list has a row for that.
#[derive(
    Clone, Copy, Debug, Default, Eq, Hash, PartialEq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct VerdictRow {
    pub action: Action,
    pub pad: [u8; 3 + OTHER_BYTES],
    /// The set of ports to ask in `PORTS`, when the action says so.
    pub ports: u32,
    /// The rule that allows, or the owners of the denial.
    pub rule: RuleId,
    /// Of what is allowed: who would deny it, were policies that are only audited enforced; else none.
    pub audit: RuleId,
}

/// What a row of `VERDICTS` or `PORTS` says.
#[derive(
    Clone, Copy, Debug, Default, Eq, Hash, PartialEq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(transparent)]
pub struct Action(pub u8);

impl Action {
    pub const DENY: Self = Self(0);
    pub const ALLOW: Self = Self(1);
    /// Ask `PORTS`; without a row there, deny with the rule of the `VERDICTS` row.
    pub const BY_PORT: Self = Self(2);
    /// Deny, and what is established too where that goes on against [`Self::DENY`].
    pub const END: Self = Self(3);
}

/// Key of `PORTS`, a longest-prefix trie over (set, protocol, port): a range of ports is a few prefixes.
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
pub struct PortKey {
    /// In bits, counted from the start of `set`.
    pub prefix_len: u32,
    /// The number of the set, most significant byte first, as the trie compares it.
    pub set: [u8; 4],
    pub protocol: Protocol,
    pub pad: u8,
    pub port: Port,
}

impl PortKey {
    /// Prefix of the set alone: every port of every protocol, and protocols without ports.
    pub const ANY_PROTOCOL: u32 = 32;
    /// Prefix of set and protocol alone: every port.
    pub const ANY_PORT: u32 = 32 + 8 + 8;
    /// The whole key: exactly one port.
    pub const ONE_PORT: u32 = Self::ANY_PORT + 16;

    /// The key of one port.
    #[inline(always)]
    pub const fn exact(set: u32, protocol: Protocol, port: Port) -> Self {
        Self {
            prefix_len: Self::ONE_PORT,
            set: set.to_be_bytes(),
            protocol,
            pad: 0,
            port,
        }
    }

    /// The key of everything that no longer prefix of the set names: every protocol.
    #[inline(always)]
    pub const fn all(set: u32) -> Self {
        Self {
            prefix_len: Self::ANY_PROTOCOL,
            ..Self::any(set, Protocol(0))
        }
    }

    /// The key of every port of a protocol.
    #[inline(always)]
    pub const fn any(set: u32, protocol: Protocol) -> Self {
        Self {
            prefix_len: Self::ANY_PORT,
            set: set.to_be_bytes(),
            protocol,
            pad: 0,
            port: Port::ABSENT,
        }
    }
}

/// Value of `PORTS`.
#[derive(
    Clone, Copy, Debug, Default, Eq, Hash, PartialEq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct PortRow {
    pub action: Action,
    pub pad: [u8; 3],
    pub rule: RuleId,
    /// As in [`VerdictRow`].
    pub audit: RuleId,
}

const _: () = assert!(size_of::<VerdictKey>() == 8);
const _: () = assert!(size_of::<VerdictRow>() == 16 + OTHER_BYTES);
const _: () = assert!(size_of::<PortKey>() == 12);
const _: () = assert!(size_of::<PortRow>() == 12);
