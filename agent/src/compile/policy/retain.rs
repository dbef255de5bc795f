//! Policies that hold after they are gone: while a namespace is being deleted its policies may go before
//! its pods, and a pod keeps what it was isolated by until it is gone (CVE-2024-7598,
//! kubernetes#126587). Applying them is not here.

use std::collections::{BTreeSet, HashSet};
use std::sync::Arc;

use crate::model::{NamespacePhase, ObjectName, Snapshot};

/// Which policies are kept, and which namespaces have been seen.
///
/// Two limits. A policy whose deletion is seen before the deletion of its namespace is not kept, since
/// the two watches have no common order; and nothing is remembered over a restart.
#[derive(Clone, Debug, Default)]
pub(super) struct Retained {
    kept: BTreeSet<ObjectName>,
    /// Namespaces that were seen, and exist or still have something in them.
    namespaces: HashSet<Arc<str>>,
}

impl Retained {
    /// Does a policy hold that is not there any more, as long as its namespace has pods here?
    pub(super) fn keeps(&self, policy: &ObjectName, snapshot: &Snapshot) -> bool {
        match snapshot.namespaces.get(&policy.namespace) {
            Some(namespace) => namespace.phase == NamespacePhase::Terminating,
            // One that was never there is not being deleted either.
            None => self.namespaces.contains(&policy.namespace),
        }
    }

    /// A policy holds: because it exists, or for what it was.
    pub(super) fn know(&mut self, policy: &ObjectName, exists: bool) {
        match exists {
            true => self.kept.remove(policy),
            false => self.kept.insert(policy.clone()),
        };
    }

    /// To be called when something of a namespace may have changed. The policies that hold no longer.
    pub(super) fn observe(
        &mut self,
        namespace: &Arc<str>,
        has_pods: bool,
        snapshot: &Snapshot,
    ) -> Vec<ObjectName> {
        let object = snapshot.namespaces.get(namespace);
        let is_back = object.is_some_and(|it| it.phase == NamespacePhase::Active);
        let of_it = self.kept.iter().filter(|it| it.namespace == *namespace);
        let of_it: Vec<ObjectName> = of_it.cloned().collect();
        let mut released = Vec::new();
        for policy in of_it {
            if is_back || !has_pods {
                self.kept.remove(&policy);
                released.push(policy);
            }
        }
        let is_known = self.namespaces.contains(namespace);
        let has_policies = || {
            snapshot
                .policies
                .keys()
                .any(|it| it.namespace == *namespace)
        };
        match object {
            Some(_) => self.namespaces.insert(namespace.clone()),
            None if is_known && !has_pods && !has_policies() => self.namespaces.remove(namespace),
            None => false,
        };
        released
    }
}
