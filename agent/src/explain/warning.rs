//! What an answer about a folder is not about, though its author may think so.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;

use super::diff::everywhere;
use super::{compile, diff};
use crate::compile::policy::Compiler;
use crate::model::{Kind, Object, PeerSelector, Peers, PodNetwork, Rule, Selector, Snapshot};
use crate::watch::documents::ForeignKind;

/// The label of a namespace that is known without its object.
const NAMESPACE_NAME: &str = "kubernetes.io/metadata.name";
/// The group that is for policies alone.
const POLICY_GROUP: &str = "policy.networking.k8s.io";

/// Is it a policy of Kubernetes, though in no version that is read? Without it the answer would be about something else.
pub(super) fn is_policy_of_ours(ForeignKind { api_version, kind }: &ForeignKind) -> bool {
    let group = api_version.split_once('/').map_or("", |(group, _)| group);
    let is_called = |name: &str| kind.eq_ignore_ascii_case(name);
    match group {
        POLICY_GROUP => true,
        "" | "networking.k8s.io" | "extensions" => {
            is_called("NetworkPolicy") || is_called("ClusterNetworkPolicy")
        }
        _ => false,
    }
}

/// Kinds of others that decide about packets, too.
pub(super) fn of_foreign(not_read: &BTreeSet<ForeignKind>) -> impl Iterator<Item = String> {
    let policies = not_read
        .iter()
        .filter(|it| it.kind.ends_with("NetworkPolicy"));
    policies.map(|ForeignKind { api_version, kind }| {
        format!("{kind} of {api_version} is not read: nothing of what it says is in the answer")
    })
}

/// Of these policies those that select nobody.
pub(super) fn of_policies<'a>(
    policies: impl Iterator<Item = &'a Object>,
    (all, compiler): &(Snapshot, Compiler),
) -> Vec<String> {
    let mut said = BTreeSet::new();
    for object in policies {
        let selected = match object {
            Object::Policy(policy) => compiler.selected_by(policy),
            Object::ClusterPolicy(policy) => compiler.selected_by_cluster_policy(policy, all),
            _ => continue,
        };
        if selected.is_empty() {
            let id = object.id();
            said.insert(format!("{} {} selects no pod", id.kind, id.name));
        }
    }
    said.into_iter().collect()
}

/// Addresses that several have.
pub(super) fn of_addresses((_, compiler): &(Snapshot, Compiler)) -> Vec<String> {
    let reports = compiler.reports();
    reports.iter().map(ToString::to_string).collect()
}

/// All pods on one node.
pub(super) fn together(snapshot: &Snapshot, dns: &[IpAddr]) -> (Snapshot, Compiler) {
    let all = everywhere(snapshot, &snapshot.pods.keys().collect());
    let compiler = compile(&all, &diff::everywhere_view(dns));
    (all, compiler)
}

/// Namespaces of pods that are not there, if some policy asks for more of one than its name.
pub(super) fn of_namespaces(snapshot: &Snapshot) -> Vec<String> {
    if !selectors(snapshot).any(|it| asks_more_than_the_name(&it)) {
        return Vec::new();
    }
    let pods = snapshot.pods.values();
    let unknown: BTreeSet<Arc<str>> = pods
        .filter(|pod| pod.network == PodNetwork::Own)
        .map(|pod| pod.id.namespace.clone())
        .filter(|namespace| !snapshot.namespaces.contains_key(namespace))
        .collect();
    let said = unknown.iter().map(|namespace| {
        format!(
            "{} {namespace} is not there: only its name is known, and a selector that asks for another label of it does not match",
            Kind::Namespace
        )
    });
    said.collect()
}

/// What policies ask of namespaces.
fn selectors(snapshot: &Snapshot) -> impl Iterator<Item = Selector> {
    fn of<'a>(rules: impl IntoIterator<Item = &'a Rule>) -> Vec<Selector> {
        let rules = rules.into_iter();
        let peers = rules.filter_map(|rule| match &rule.peers {
            Peers::Of(peers) => Some(peers),
            Peers::Any => None,
        });
        let namespaces = peers.flatten().filter_map(|peer| match peer {
            PeerSelector::Pods(pods) => pods.namespaces.clone(),
            _ => None,
        });
        namespaces.collect()
    }
    let policies = snapshot.policies.values().flat_map(|policy| {
        let rules = [&policy.ingress, &policy.egress];
        of(rules.into_iter().flatten().flatten())
    });
    let tiers = snapshot.cluster_policies.values().flat_map(|policy| {
        let rules = policy.ingress.iter().chain(&policy.egress);
        let mut all = of(rules.map(|it| &it.rule));
        all.extend(policy.subject.namespaces.clone());
        all
    });
    policies.chain(tiers)
}

fn asks_more_than_the_name(selector: &Selector) -> bool {
    selector
        .requirements
        .iter()
        .any(|it| &*it.key != NAMESPACE_NAME)
}
