//! The Kubernetes objects as the API writes them, with only the fields in use: what is not named here is
//! skipped while decoding and never stored. What the fields mean is `model::convert`'s.

mod cluster_policy;
mod decode;
mod node;
mod pod;
mod policy;
mod service;
mod slice;

use std::collections::BTreeMap;

use serde::{Deserialize, Deserializer};

pub use cluster_policy::{
    ClusterNetworkPolicy, ClusterPort, ClusterPortRange, ClusterPorts, ClusterProtocol,
    ClusterRule, Fields, NamespacedPod,
};
pub use decode::{Decoded, WireKind, decode};
pub use node::{
    Namespace, NamespaceStatus, Node, NodeAddress, NodeCondition, NodeSpec, NodeStatus,
};
pub use pod::{Condition, Container, ContainerPort, Pod, PodIp, PodSpec, PodStatus};
pub use policy::{
    IpBlock, NetworkPolicy, Peer, PolicyOutline, PolicyOutlineSpec, PolicyPort, PolicySpec, Rule,
};
pub use service::{
    ClientIp, Families, LoadBalancerIngress, LoadBalancerStatus, Service, ServicePort, ServiceSpec,
    ServiceStatus, SessionAffinityConfig,
};
pub use slice::{Conditions, Endpoint, EndpointPort, EndpointSlice, TargetRef};

/// `metadata`.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Meta {
    #[serde(deserialize_with = "nullable")]
    pub name: String,
    #[serde(deserialize_with = "nullable")]
    pub namespace: String,
    #[serde(deserialize_with = "nullable")]
    pub uid: String,
    #[serde(deserialize_with = "nullable")]
    pub resource_version: String,
    #[serde(deserialize_with = "nullable")]
    pub labels: BTreeMap<String, String>,
    #[serde(deserialize_with = "nullable")]
    pub annotations: Annotations,
    pub creation_timestamp: Option<String>,
    pub deletion_timestamp: Option<String>,
}

/// The annotations that mean something to us; people keep whole documents in others.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Annotations {
    /// On the mirror that the kubelet makes of a static pod: the static pod's `config.hash`, which is its
    /// uid.
    #[serde(rename = "kubernetes.io/config.mirror")]
    pub config_mirror: Option<String>,
    /// What `spec.loadBalancerSourceRanges` says today, with commas (core/v1 annotation_key_constants.go).
    #[serde(rename = "service.beta.kubernetes.io/load-balancer-source-ranges")]
    pub source_ranges: Option<String>,
    /// On a Namespace: `keep`, or what is there without it, `judge`.
    #[serde(rename = "weir.local/established-connections")]
    pub established: Option<String>,
    /// On a policy: `audit`, or what is there without it, `enforce`.
    #[serde(rename = "weir.local/enforcement")]
    pub enforcement: Option<String>,
}

/// `LabelSelector`. Strict, since a selector that is read in part selects too much.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct LabelSelector {
    #[serde(deserialize_with = "nullable")]
    pub match_labels: BTreeMap<String, String>,
    #[serde(deserialize_with = "nullable")]
    pub match_expressions: Vec<LabelSelectorRequirement>,
}

/// An item of `matchExpressions`.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LabelSelectorRequirement {
    pub key: String,
    pub operator: String,
    #[serde(default, deserialize_with = "nullable")]
    pub values: Vec<String>,
}

/// A port by number or by name.
#[derive(Clone, Debug, Deserialize)]
#[serde(untagged, expecting = "expected a port number or a port name")]
pub enum IntOrString {
    Int(i64),
    String(String),
}

/// The API writes an empty Go slice or map as `null`, which means the same as absent.
pub(crate) fn nullable<'de, D, T>(source: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: Default + Deserialize<'de>,
{
    Ok(Option::deserialize(source)?.unwrap_or_default())
}
