//! NetworkPolicy (networking.k8s.io/v1). Strict from `spec` down: a field that is not known here could
//! narrow what is allowed, so an object that has one is not understood.

use serde::de::IgnoredAny;
use serde::{Deserialize, Deserializer};

use super::{IntOrString, LabelSelector, Meta, nullable};

#[derive(Clone, Debug, Deserialize)]
pub struct NetworkPolicy {
    #[serde(default)]
    pub metadata: Meta,
    #[serde(default, deserialize_with = "nullable")]
    pub spec: PolicySpec,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct PolicySpec {
    #[serde(deserialize_with = "nullable")]
    pub pod_selector: LabelSelector,
    #[serde(deserialize_with = "nullable")]
    pub policy_types: Vec<String>,
    #[serde(deserialize_with = "nullable")]
    pub ingress: Vec<Rule>,
    #[serde(deserialize_with = "nullable")]
    pub egress: Vec<Rule>,
}

/// A rule of either direction.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Rule {
    #[serde(deserialize_with = "nullable")]
    pub from: Vec<Peer>,
    #[serde(deserialize_with = "nullable")]
    pub to: Vec<Peer>,
    #[serde(deserialize_with = "nullable")]
    pub ports: Vec<PolicyPort>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct Peer {
    pub pod_selector: Option<LabelSelector>,
    pub namespace_selector: Option<LabelSelector>,
    pub ip_block: Option<IpBlock>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct IpBlock {
    pub cidr: String,
    #[serde(default, deserialize_with = "nullable")]
    pub except: Vec<String>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct PolicyPort {
    pub protocol: Option<String>,
    pub port: Option<IntOrString>,
    pub end_port: Option<i64>,
}

/// What has to be known of a policy to close the pods it selects: read when the rest cannot be.
#[derive(Clone, Debug, Deserialize)]
pub struct PolicyOutline {
    #[serde(default)]
    pub metadata: Meta,
    #[serde(default, deserialize_with = "nullable")]
    pub spec: PolicyOutlineSpec,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct PolicyOutlineSpec {
    #[serde(deserialize_with = "nullable")]
    pub pod_selector: LabelSelector,
    #[serde(deserialize_with = "nullable")]
    pub policy_types: Vec<String>,
    /// Is there an egress section with anything in it?
    #[serde(rename = "egress", deserialize_with = "is_present")]
    pub has_egress: bool,
}

fn is_present<'de, D: Deserializer<'de>>(source: D) -> Result<bool, D::Error> {
    Ok(Option::<Vec<IgnoredAny>>::deserialize(source)?.is_some_and(|rules| !rules.is_empty()))
}
