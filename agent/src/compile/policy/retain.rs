//! Policies that hold after they are gone: while a namespace is being deleted its policies may go before
//! its pods, and a pod keeps what it was isolated by until it is gone (CVE-2024-7598,
//! kubernetes#126587). Applying them is not here.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;

use crate::model::{NamespacePhase, ObjectName, PodPhase, Policy, Snapshot};

/// What was there at the last look, and what is kept of it.
///
/// Two limits. A policy whose deletion is seen before the deletion of its namespace is not kept, since
/// the two watches have no common order; and nothing is remembered over a restart.
#[derive(Clone, Debug, Default)]
pub struct Retained {
    policies: BTreeMap<ObjectName, Arc<Policy>>,
    kept: BTreeMap<ObjectName, Arc<Policy>>,
    /// Namespaces that were seen, and exist or still have something in them.
    namespaces: HashSet<Arc<str>>,
}

impl Retained {
    /// Looks at the snapshot, and tells which policies are not in it and hold nevertheless, in the order
    /// of their names. To be called with every snapshot that is compiled.
    pub fn observe(&mut self, snapshot: &Snapshot) -> Vec<Arc<Policy>> {
        let alive = snapshot
            .pods
            .values()
            .filter(|p| p.phase != PodPhase::Finished);
        let with_pods: HashSet<&Arc<str>> = alive.map(|pod| &pod.id.namespace).collect();
        let leaving = |name: &Arc<str>| match snapshot.namespaces.get(name) {
            Some(namespace) => namespace.phase == NamespacePhase::Terminating,
            // One that was never there is not being deleted either.
            None => self.namespaces.contains(name),
        };
        let gone = std::mem::take(&mut self.policies)
            .into_iter()
            .filter(|(id, _)| leaving(&id.namespace));
        let mut kept = std::mem::take(&mut self.kept);
        kept.extend(gone);
        kept.retain(|id, _| {
            let back = snapshot
                .namespaces
                .get(&id.namespace)
                .is_some_and(|namespace| namespace.phase == NamespacePhase::Active);
            with_pods.contains(&id.namespace) && !back && !snapshot.policies.contains_key(id)
        });
        self.kept = kept;
        self.policies = snapshot
            .policies
            .iter()
            .map(|(id, policy)| (id.clone(), policy.clone()))
            .collect();
        self.namespaces.extend(snapshot.namespaces.keys().cloned());
        let with_policies: HashSet<&Arc<str>> =
            self.policies.keys().map(|id| &id.namespace).collect();
        self.namespaces.retain(|name| {
            snapshot.namespaces.contains_key(name)
                || with_pods.contains(name)
                || with_policies.contains(name)
        });
        self.kept.values().cloned().collect()
    }

    /// Were there no policies at the last look, and is none kept?
    pub fn is_empty(&self) -> bool {
        self.policies.is_empty() && self.kept.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Kind, Labels, Namespace, Object, ObjectId, Pod, PodNetwork, Selector};

    enum Step {
        Namespace(NamespacePhase),
        NoNamespace,
        Policy,
        NoPolicy,
        Pod(PodPhase),
        NoPod,
    }

    fn name() -> ObjectName {
        ObjectName::new("shop", "x")
    }

    fn take(snapshot: &mut Snapshot, step: &Step) {
        let delete = |kind, name| ObjectId { kind, name };
        match step {
            Step::Namespace(phase) => snapshot.apply(Object::Namespace(Arc::new(Namespace {
                name: "shop".into(),
                labels: Labels::new(),
                phase: *phase,
            }))),
            Step::NoNamespace => {
                snapshot.delete(&delete(Kind::Namespace, ObjectName::cluster("shop")))
            }
            Step::Policy => snapshot.apply(Object::Policy(Arc::new(Policy {
                id: name(),
                subject: Selector::default(),
                ingress: Some(Vec::new()),
                egress: None,
            }))),
            Step::NoPolicy => snapshot.delete(&delete(Kind::NetworkPolicy, name())),
            Step::Pod(phase) => snapshot.apply(Object::Pod(Arc::new(Pod {
                id: name(),
                uid: "1".into(),
                static_uid: None,
                labels: Labels::new(),
                node: None,
                addresses: Vec::new(),
                network: PodNetwork::Own,
                phase: *phase,
                ready: true,
                hostname: None,
                subdomain: None,
                ports: Vec::new(),
            }))),
            Step::NoPod => snapshot.delete(&delete(Kind::Pod, name())),
        };
    }

    #[test]
    fn policies_outlive_their_object_only_while_their_namespace_is_deleted_under_its_pods() {
        use NamespacePhase::{Active, Terminating};
        use PodPhase::{Finished, Running};
        use Step::{NoNamespace, NoPod, NoPolicy};
        let (ns, pod) = (Step::Namespace, Step::Pod);
        let start = || vec![ns(Active), Step::Policy, pod(Running)];
        let cases: Vec<(&str, Vec<Step>, bool)> = vec![
            ("deleted by hand", vec![NoPolicy], false),
            ("still there", vec![ns(Terminating)], false),
            (
                "deleted with its namespace",
                vec![ns(Terminating), NoPolicy],
                true,
            ),
            (
                "the namespace goes before the pods",
                vec![ns(Terminating), NoPolicy, NoNamespace],
                true,
            ),
            (
                "the namespace goes before the policies",
                vec![NoNamespace, NoPolicy],
                true,
            ),
            (
                "the last pod is gone",
                vec![ns(Terminating), NoPolicy, NoPod],
                false,
            ),
            (
                "the last pod has finished",
                vec![ns(Terminating), NoPolicy, pod(Finished)],
                false,
            ),
            (
                "the namespace is made anew",
                vec![ns(Terminating), NoPolicy, NoNamespace, ns(Active)],
                false,
            ),
        ];
        for (case, steps, expected) in cases {
            let mut snapshot = Snapshot::default();
            let mut retained = Retained::default();
            let mut kept = Vec::new();
            for step in start().iter().chain(&steps) {
                take(&mut snapshot, step);
                kept = retained.observe(&snapshot);
            }
            assert_eq!(!kept.is_empty(), expected, "{case}");
        }
    }

    #[test]
    fn a_namespace_that_never_was_an_object_is_not_being_deleted() {
        let mut snapshot = Snapshot::default();
        let mut retained = Retained::default();
        for step in [Step::Policy, Step::Pod(PodPhase::Running), Step::NoPolicy] {
            take(&mut snapshot, &step);
            assert!(retained.observe(&snapshot).is_empty());
        }
    }
}
