//! What a peer selector asks of an address, in one canonical form, and what a namespace is to it.
//! Which addresses satisfy it is in `class`.

use std::sync::Arc;

use super::encode::{Canonical, Encoder};
use crate::model::{Labels, Namespace, Operator, PodPeers, Requirement, Selector};

/// The label that the API server gives every namespace: its name.
const NAMESPACE_NAME: &str = "kubernetes.io/metadata.name";

/// A peer selector with its scope resolved. Two selectors that say the same are equal.
#[derive(Clone, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub(super) struct Predicate {
    pub(super) scope: Scope,
    pub(super) pods: Selector,
}

/// The namespaces whose pods are asked at all. It stands outside of the user's selector and looks at
/// where a pod is, never at what its labels say (CVE-2023-39347, CVE-2023-41333).
#[derive(Clone, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub(super) enum Scope {
    /// The policy's own.
    Own(Arc<str>),
    /// Those with labels that match.
    Matching(Selector),
}

impl Predicate {
    /// The predicate of a peer in a policy of this namespace.
    pub(super) fn of(peers: &PodPeers, namespace: &Arc<str>) -> Self {
        Self {
            scope: match &peers.namespaces {
                None => Scope::Own(namespace.clone()),
                Some(selector) => Scope::Matching(canonical(selector)),
            },
            pods: canonical(&peers.pods),
        }
    }

    /// Does the answer depend on labels of namespaces?
    pub(super) fn asks_for_namespaces(&self) -> bool {
        matches!(self.scope, Scope::Matching(_))
    }
}

/// What is known of a namespace.
#[derive(Clone, Debug)]
pub(super) struct NamespaceView {
    name: Arc<str>,
    labels: Knowledge,
}

/// Labels that are not known are not absent: nothing may follow from what they lack.
#[derive(Clone, Debug)]
enum Knowledge {
    Known(Labels),
    OnlyTheName,
}

impl NamespaceView {
    /// The namespace of this name; `None` when there is no such object (yet).
    pub(super) fn new(name: &Arc<str>, namespace: Option<&Namespace>) -> Self {
        let labels = match namespace {
            None => Knowledge::OnlyTheName,
            Some(namespace) => {
                let mut labels = namespace.labels.clone();
                labels.insert(NAMESPACE_NAME.into(), name.clone());
                Knowledge::Known(labels)
            }
        };
        Self {
            name: name.clone(),
            labels,
        }
    }

    /// Are its pods in the scope?
    pub(super) fn is_in(&self, scope: &Scope) -> bool {
        match (scope, &self.labels) {
            (Scope::Own(name), _) => *name == self.name,
            (Scope::Matching(selector), Knowledge::Known(labels)) => selector.matches(labels),
            (Scope::Matching(selector), Knowledge::OnlyTheName) => {
                let name = Labels::from([(NAMESPACE_NAME.into(), self.name.clone())]);
                let asks_the_name = |r: &Requirement| &*r.key == NAMESPACE_NAME;
                selector.requirements.iter().all(asks_the_name) && selector.matches(&name)
            }
        }
    }
}

/// The same requirements in one order, each once.
fn canonical(selector: &Selector) -> Selector {
    let mut requirements: Vec<_> = selector
        .requirements
        .iter()
        .map(|requirement| Requirement {
            key: requirement.key.clone(),
            operator: match &requirement.operator {
                Operator::In(values) => Operator::In(sorted(values.clone())),
                Operator::NotIn(values) => Operator::NotIn(sorted(values.clone())),
                other => other.clone(),
            },
        })
        .collect();
    requirements = sorted(requirements);
    Selector { requirements }
}

fn sorted<T: Ord>(mut items: Vec<T>) -> Vec<T> {
    items.sort();
    items.dedup();
    items
}

impl Canonical for Predicate {
    fn encode(&self, to: &mut Encoder) {
        match &self.scope {
            Scope::Own(name) => {
                to.tag(0);
                to.text(name);
            }
            Scope::Matching(selector) => {
                to.tag(1);
                selector.encode(to);
            }
        }
        self.pods.encode(to);
    }
}
