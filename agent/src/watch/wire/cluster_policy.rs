//! ClusterNetworkPolicy (policy.networking.k8s.io/v1alpha2). The parts that the API wants to be closed one by one when they are not
//! understood, rules and peers, are left as values here; `model::convert` reads each of them by itself. Strict from `spec` down.

use serde::Deserialize;
use serde_json::{Map, Value};

use super::{LabelSelector, Meta, nullable};

/// The fields of an object.
pub type Fields = Map<String, Value>;

#[derive(Clone, Debug, Deserialize)]
pub struct ClusterNetworkPolicy {
    #[serde(default)]
    pub metadata: Meta,
    #[serde(default, deserialize_with = "nullable")]
    pub spec: Fields,
}

/// A rule of either direction.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ClusterRule {
    #[serde(default, deserialize_with = "nullable")]
    pub name: String,
    pub action: String,
    pub from: Option<Vec<Fields>>,
    pub to: Option<Vec<Fields>>,
    pub protocols: Option<Vec<ClusterProtocol>>,
}

/// Pods by the labels of both.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct NamespacedPod {
    /// "if empty, it selects all Namespaces", and the CRD lets it be absent.
    #[serde(default, deserialize_with = "nullable")]
    pub namespace_selector: LabelSelector,
    pub pod_selector: LabelSelector,
}

/// An item of `protocols`.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct ClusterProtocol {
    pub tcp: Option<ClusterPorts>,
    pub udp: Option<ClusterPorts>,
    pub sctp: Option<ClusterPorts>,
    #[serde(deserialize_with = "nullable")]
    pub destination_named_port: String,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct ClusterPorts {
    pub destination_port: Option<ClusterPort>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ClusterPort {
    pub number: Option<i64>,
    pub range: Option<ClusterPortRange>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ClusterPortRange {
    pub start: i64,
    pub end: i64,
}
