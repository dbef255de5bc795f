//! NetworkPolicy as we mean it: defaults resolved, "empty" and "absent" apart.

use std::sync::Arc;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use weir_common::Protocol;

use super::{ObjectName, Selector};

/// A NetworkPolicy (networking.k8s.io/v1).
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Policy {
    pub id: ObjectName,
    /// The pods of its namespace that it isolates.
    pub subject: Selector,
    /// `None`: says nothing about ingress. `Some` of no rule: isolates and allows nothing.
    /// `policyTypes` is resolved already (absent: ingress always, egress when it has an egress section).
    pub ingress: Option<Vec<Rule>>,
    pub egress: Option<Vec<Rule>>,
    /// Is it only to be said what it would deny? It is asked for by the annotation `weir.local/enforcement: audit`.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub is_audit: bool,
}

impl Policy {
    /// See [`super::Object::is_stand_in`]. One that is understood has no peer that is not.
    pub(super) fn is_stand_in(&self) -> bool {
        let rules = self.ingress.iter().chain(&self.egress).flatten();
        let mut peers = rules.flat_map(|rule| match &rule.peers {
            Peers::Any => &[][..],
            Peers::Of(peers) => peers,
        });
        peers.any(|peer| matches!(peer, PeerSelector::Unsupported(_)))
    }
}

/// Allows what matches one of the peers and one of the ports.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Rule {
    pub peers: Peers,
    pub ports: Ports,
}

/// `from` or `to`.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub enum Peers {
    /// The list is absent or empty: everybody.
    Any,
    Of(Vec<PeerSelector>),
}

/// One item of `from` or `to`.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub enum PeerSelector {
    Pods(PodPeers),
    Block(Block),
    /// A peer that this version cannot understand: it allows nothing, and the policy is reported.
    Unsupported(Arc<str>),
}

/// Pods by label.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct PodPeers {
    /// `None`: the policy's own namespace. `Some`: every namespace that it selects.
    pub namespaces: Option<Selector>,
    /// Absent in the object means every pod, which is the empty selector.
    pub pods: Selector,
}

/// `ipBlock`.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Block {
    pub cidr: IpNet,
    pub except: Vec<IpNet>,
}

/// `ports` of a rule.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub enum Ports {
    /// The list is absent or empty: every port of every protocol.
    Any,
    Of(Vec<PortMatch>),
}

/// One item of `ports`.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct PortMatch {
    #[serde(with = "super::protocol::Number")]
    pub protocol: Protocol,
    pub port: PortRange,
}

/// Which ports of the protocol. Host order.
#[derive(Clone, Debug, Deserialize, Eq, Hash, Ord, PartialEq, PartialOrd, Serialize)]
pub enum PortRange {
    /// No `port`: all of the protocol.
    Any,
    /// `port` to `endPort`, both included; the same twice for one port.
    Numbers { first: u16, last: u16 },
    /// Resolved on each destination pod.
    Named(Arc<str>),
}
