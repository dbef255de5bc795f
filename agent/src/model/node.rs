//! Nodes of the cluster.

use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use super::Labels;

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
}
