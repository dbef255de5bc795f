//! ClusterNetworkPolicy (policy.networking.k8s.io/v1alpha2) as we mean it.
//!
//! What is not understood has been closed by the conversion, as the API says: "For "Accept" rules, "fail closed" means: "treat the rule as
//! matching no traffic". For "Deny" and "Pass" rules, "fail closed" means: "treat the rule as a 'Deny all' rule"." So such an Accept has
//! the one peer [`PeerSelector::Unsupported`](super::PeerSelector), and such a Deny or Pass is a Deny of [`Peers::Any`](super::Peers) and
//! [`Ports::Any`](super::Ports).

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::{PodPeers, Rule};

/// A ClusterNetworkPolicy. It isolates nobody: what none of its rules matches is for others to decide.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct ClusterPolicy {
    pub name: Arc<str>,
    pub tier: Tier,
    /// 0 to 1000; the lower goes before within its tier. Of equal ones the API lets an implementation choose:
    /// the order of names decides here.
    pub priority: u16,
    /// The pods that it is about; `namespaces` is `Some`. "Note that host-networked pods are not included in
    /// subject selection."
    pub subject: PodPeers,
    /// In the order in which they are asked. "CNPs with no ingress rules do not affect ingress traffic."
    pub ingress: Vec<ClusterRule>,
    pub egress: Vec<ClusterRule>,
    /// As [`super::Policy::is_audit`].
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub is_audit: bool,
    /// See [`super::Object::is_stand_in`]: its rules are closed as far as they are not understood.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub is_stand_in: bool,
}

/// When a policy is asked: those of `Admin` before NetworkPolicies, those of `Baseline` about pods that no
/// NetworkPolicy isolates in this direction.
#[derive(Clone, Copy, Debug, Deserialize, Eq, Hash, Ord, PartialEq, PartialOrd, Serialize)]
pub enum Tier {
    Admin,
    Baseline,
}

/// What becomes of the traffic that matches.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct ClusterRule {
    pub name: Option<Arc<str>>,
    pub action: RuleAction,
    /// Peers of pods have `Some` namespaces, and blocks no `except`. A port by name without a protocol stands
    /// as one item for each of TCP, UDP and SCTP.
    pub rule: Rule,
}

/// Of a rule.
#[derive(Clone, Copy, Debug, Deserialize, Eq, Hash, Ord, PartialEq, PartialOrd, Serialize)]
pub enum RuleAction {
    /// This and every later tier has no more to say.
    Accept,
    Deny,
    /// "Skips all further ClusterNetworkPolicy rules in the current tier for the selected traffic, and passes
    /// evaluation to the next tier."
    Pass,
}

impl Tier {
    /// The name in the Kubernetes API.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Admin => "Admin",
            Self::Baseline => "Baseline",
        }
    }
}

impl RuleAction {
    /// The name in the Kubernetes API.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Accept => "Accept",
            Self::Deny => "Deny",
            Self::Pass => "Pass",
        }
    }
}
