//! Everything that is known, and what of it changed since the last compilation. Pure: changes in, dirty
//! keys out.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::Arc;

use crate::model::{Change, Kind, Object, ObjectId, ObjectName, Pod, Snapshot};

/// The snapshot, completed by what this node knows better than the cluster.
#[derive(Debug, Default)]
pub struct Inputs {
    snapshot: Snapshot,
    /// Addresses that this node has leased to its pods: the kernel's truth, before any status says so.
    leased: HashMap<ObjectName, Vec<IpAddr>>,
    quarantined: BTreeMap<String, String>,
    dirty: Dirty,
}

/// What has to be compiled again.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Dirty {
    /// Services whose own object or slices changed, or went.
    pub services: BTreeSet<ObjectName>,
    /// Pods that changed, or went.
    pub pods: BTreeSet<ObjectName>,
    /// Something that policy looks at.
    pub policy: bool,
    /// Which namespaces exist.
    pub namespaces: bool,
    /// Who has which address.
    pub names: bool,
    /// A Node, an address of this one, or whether all of them have been said.
    pub nodes: bool,
}

impl Inputs {
    /// Takes a change in.
    pub fn take(&mut self, change: Change) {
        match change {
            Change::Applied(object) => {
                let id = object.id();
                let before = self.services_of_slice(&id);
                if self.snapshot.apply(self.complete(object)) {
                    self.mark(&id, before);
                }
            }
            Change::Deleted(id) => {
                let before = self.services_of_slice(&id);
                if self.snapshot.delete(&id) {
                    self.mark(&id, before);
                }
            }
            Change::Synced(kind) => {
                self.snapshot.mark_synced(kind);
                self.dirty.nodes |= kind == Kind::Node;
            }
            Change::Quarantined { object, reason } => {
                self.quarantined.insert(object, reason);
            }
            Change::Released { object } => {
                self.quarantined.remove(&object);
            }
        }
    }

    /// A pod of this node has these addresses from now on; none when its lease is gone.
    pub fn lease(&mut self, pod: &ObjectName, addresses: Vec<IpAddr>) {
        if addresses.is_empty() {
            self.leased.remove(pod);
            return;
        }
        self.leased.insert(pod.clone(), addresses);
        if let Some(known) = self.snapshot.pods.get(pod).cloned() {
            self.take(Change::Applied(Object::Pod(known)));
        }
    }

    /// All that is known.
    pub fn snapshot(&self) -> &Snapshot {
        &self.snapshot
    }

    /// Objects that exist and are not understood, with the reason.
    pub fn quarantined(&self) -> &BTreeMap<String, String> {
        &self.quarantined
    }

    /// What changed since the last call.
    pub fn take_dirty(&mut self) -> Dirty {
        std::mem::take(&mut self.dirty)
    }

    /// Something outside of the objects changed that policy looks at, such as the node's addresses.
    pub fn mark_policy(&mut self) {
        self.dirty.policy = true;
    }

    /// This node's own addresses changed.
    pub fn mark_own_addresses(&mut self) {
        self.dirty.policy = true;
        self.dirty.nodes = true;
    }

    /// A lease says what a pod's status will say later.
    fn complete(&self, object: Object) -> Object {
        match object {
            Object::Pod(pod) => match self.leased.get(&pod.id) {
                Some(addresses) if *addresses != pod.addresses => Object::Pod(Arc::new(Pod {
                    addresses: addresses.clone(),
                    ..(*pod).clone()
                })),
                _ => Object::Pod(pod),
            },
            other => other,
        }
    }

    /// The service that a slice belonged to before the change at hand.
    fn services_of_slice(&self, id: &ObjectId) -> Option<ObjectName> {
        match id.kind {
            Kind::EndpointSlice => self.snapshot.slices.get(&id.name)?.service.clone(),
            _ => None,
        }
    }

    fn mark(&mut self, id: &ObjectId, before: Option<ObjectName>) {
        match id.kind {
            Kind::Service => {
                self.dirty.services.insert(id.name.clone());
                self.dirty.names = true;
            }
            Kind::EndpointSlice => {
                let after = self.services_of_slice(id);
                self.dirty.services.extend(before.into_iter().chain(after));
            }
            Kind::Pod | Kind::Node => {
                if id.kind == Kind::Pod {
                    self.dirty.pods.insert(id.name.clone());
                } else {
                    self.dirty.nodes = true;
                }
                self.dirty.policy = true;
                self.dirty.names = true;
            }
            Kind::Namespace => {
                self.dirty.policy = true;
                self.dirty.namespaces = true;
            }
            Kind::NetworkPolicy => self.dirty.policy = true,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{EndpointSlice, Family, PodNetwork, PodPhase};

    fn slice(name: &str, service: &str) -> Change {
        Change::Applied(Object::EndpointSlice(Arc::new(EndpointSlice {
            id: ObjectName::new("shop", name),
            service: Some(ObjectName::new("shop", service)),
            family: Family::V4,
            endpoints: Vec::new(),
            ports: Vec::new(),
        })))
    }

    fn pod(addresses: Vec<IpAddr>) -> Change {
        Change::Applied(Object::Pod(Arc::new(Pod {
            id: ObjectName::new("shop", "a"),
            uid: "1".into(),
            static_uid: None,
            labels: BTreeMap::new(),
            node: Some("n1".into()),
            addresses,
            network: PodNetwork::Own,
            phase: PodPhase::Pending,
            ready: false,
            hostname: None,
            subdomain: None,
            ports: Vec::new(),
        })))
    }

    #[test]
    fn a_slice_that_moves_dirties_both_services() {
        let mut inputs = Inputs::default();
        inputs.take(slice("s", "old"));
        inputs.take_dirty();
        inputs.take(slice("s", "new"));
        let names = ["new", "old"].map(|n| ObjectName::new("shop", n));
        assert_eq!(inputs.take_dirty().services, BTreeSet::from(names));
    }

    #[test]
    fn what_changes_nothing_dirties_nothing() {
        let mut inputs = Inputs::default();
        inputs.take(pod(Vec::new()));
        inputs.take_dirty();
        inputs.take(pod(Vec::new()));
        inputs.take(Change::Deleted(ObjectId {
            kind: Kind::Service,
            name: ObjectName::new("shop", "never"),
        }));
        assert_eq!(inputs.take_dirty(), Dirty::default());
    }

    #[test]
    fn a_lease_is_known_before_any_status_and_outlives_an_older_status() {
        let leased: IpAddr = [10, 0, 0, 7].into();
        let id = ObjectName::new("shop", "a");
        let mut inputs = Inputs::default();
        inputs.take(pod(Vec::new()));
        inputs.lease(&id, vec![leased]);
        assert_eq!(inputs.snapshot().pods[&id].addresses, [leased]);
        inputs.take_dirty();
        inputs.take(pod(Vec::new()));
        assert_eq!(inputs.snapshot().pods[&id].addresses, [leased]);
        assert_eq!(
            inputs.take_dirty(),
            Dirty::default(),
            "the older status says nothing new"
        );
    }
}
