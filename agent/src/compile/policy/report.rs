//! What a person should know about the policies and addresses of a compilation.

use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use super::Direction;
use crate::model::ObjectName;

/// Something that was compiled otherwise than its author may expect. Never wider.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum Report {
    /// A part of a policy that allows nothing; the rest of the policy holds, its isolation included.
    AllowsNothing { policy: ObjectName, part: Part },
    /// A pod reports an address that somebody else has; for policy the address is the other's.
    AddressTaken {
        pod: ObjectName,
        address: IpAddr,
        holder: Claimant,
    },
}

/// Where in a policy. All numbers count from 0.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub struct Part {
    pub direction: Direction,
    pub rule: usize,
    /// In `from`, `to` or `ports`, as `why` says.
    pub item: usize,
    pub why: Nothing,
}

/// Why a part allows nothing.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum Nothing {
    /// A peer that could not be understood.
    UnknownPeer(Arc<str>),
    /// Neither TCP nor UDP nor SCTP.
    Protocol(u8),
    /// `endPort` lies below `port`.
    EmptyRange { first: u16, last: u16 },
}

/// Who has an address.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum Claimant {
    Node,
    Dns,
    Pod(ObjectName),
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::AllowsNothing { policy, part } => {
                write!(f, "NetworkPolicy {policy}: {part} and allows nothing")
            }
            Self::AddressTaken {
                pod,
                address,
                holder,
            } => write!(f, "Pod {pod}: its address {address} belongs to {holder}"),
        }
    }
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            direction,
            rule,
            item,
            why,
        } = self;
        let list = match (why, direction) {
            (Nothing::UnknownPeer(_), Direction::Ingress) => "from",
            (Nothing::UnknownPeer(_), Direction::Egress) => "to",
            _ => "ports",
        };
        write!(f, "spec.{direction}[{rule}].{list}[{item}] {why}")
    }
}

impl fmt::Display for Nothing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::UnknownPeer(peer) => write!(f, "is a peer that is not understood ({peer})"),
            Self::Protocol(number) => write!(f, "has protocol {number}, not TCP, UDP or SCTP,"),
            Self::EmptyRange { first, last } => write!(f, "ends at {last}, before {first},"),
        }
    }
}

impl fmt::Display for Claimant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Node => f.write_str("a node"),
            Self::Dns => f.write_str("the node's DNS"),
            Self::Pod(pod) => write!(f, "pod {pod}"),
        }
    }
}
