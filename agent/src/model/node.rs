//! Nodes of the cluster.

use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use super::Labels;

/// The condition of a Node that says that pods should not be placed there: the node controller gives such a node the
/// taint `node.kubernetes.io/network-unavailable:NoSchedule`.
pub const NETWORK_UNAVAILABLE: &str = "NetworkUnavailable";
/// Its reason when an agent has written it because that node's is away.
pub const AGENT_AWAY: &str = "WeirAgentAway";
/// Its reason when the node's agent has taken that back.
pub const AGENT_READY: &str = "WeirAgentReady";

/// A Node.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Node {
    pub name: Arc<str>,
    pub labels: Labels,
    /// Internal and external addresses, in the order of `status.addresses`.
    pub addresses: Vec<IpAddr>,
    /// Those of type InternalIP among them: where other nodes reach it, at most one of each family.
    pub internal: Vec<IpAddr>,
    /// `spec.podCIDRs`: at most one of each family.
    pub pod_cidrs: Vec<IpNet>,
    /// What its condition [`NETWORK_UNAVAILABLE`] says.
    #[serde(default, skip_serializing_if = "NetworkSaid::is_nothing")]
    pub network: NetworkSaid,
}

/// What is said of a node's network, and by whom.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
pub enum NetworkSaid {
    #[default]
    Nothing,
    /// That it is away, for the reason [`AGENT_AWAY`].
    AgentAway,
    /// That it is there, for the reason [`AGENT_READY`].
    AgentReady,
    /// Whatever somebody else has written, a cloud's controller most often: it is his.
    BySomebodyElse,
}

impl NetworkSaid {
    fn is_nothing(&self) -> bool {
        *self == Self::Nothing
    }
}
