//! All objects at once, with the indexes that compilers ask, and which inputs are synced.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::{
    ClusterPolicy, EndpointSlice, Kind, Namespace, Node, ObjectId, ObjectName, Pod, Policy, Service,
};

/// An object of ours.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub enum Object {
    Service(Arc<Service>),
    EndpointSlice(Arc<EndpointSlice>),
    Pod(Arc<Pod>),
    Namespace(Arc<Namespace>),
    Node(Arc<Node>),
    Policy(Arc<Policy>),
    ClusterPolicy(Arc<ClusterPolicy>),
}

/// What a source says.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Change {
    Applied(Object),
    Deleted(ObjectId),
    /// Every object of the kind that existed has been said.
    Synced(Kind),
    /// The object exists, and cannot be understood: what was known of it before keeps to hold.
    Quarantined {
        object: String,
        reason: String,
    },
    /// An object that was quarantined is well or gone.
    Released {
        object: String,
    },
}

/// All objects at once. Values in, values out: no clock, no I/O.
#[derive(Clone, Debug, Default)]
pub struct Snapshot {
    pub services: HashMap<ObjectName, Arc<Service>>,
    pub slices: HashMap<ObjectName, Arc<EndpointSlice>>,
    pub pods: HashMap<ObjectName, Arc<Pod>>,
    pub namespaces: HashMap<Arc<str>, Arc<Namespace>>,
    pub nodes: HashMap<Arc<str>, Arc<Node>>,
    pub policies: HashMap<ObjectName, Arc<Policy>>,
    pub cluster_policies: HashMap<Arc<str>, Arc<ClusterPolicy>>,
    /// The slices of each service.
    pub slices_of: HashMap<ObjectName, BTreeSet<ObjectName>>,
    synced: BTreeSet<Kind>,
}

impl Object {
    /// Its kind and name.
    pub fn id(&self) -> ObjectId {
        let (kind, name) = match self {
            Self::Service(s) => (Kind::Service, s.id.clone()),
            Self::EndpointSlice(s) => (Kind::EndpointSlice, s.id.clone()),
            Self::Pod(p) => (Kind::Pod, p.id.clone()),
            Self::Namespace(n) => (Kind::Namespace, ObjectName::cluster(n.name.clone())),
            Self::Node(n) => (Kind::Node, ObjectName::cluster(n.name.clone())),
            Self::Policy(p) => (Kind::NetworkPolicy, p.id.clone()),
            Self::ClusterPolicy(p) => (
                Kind::ClusterNetworkPolicy,
                ObjectName::cluster(p.name.clone()),
            ),
        };
        ObjectId { kind, name }
    }

    /// Does it only keep closed what it is about, since the object of this name was never understood? Then it
    /// is no last good state of it.
    pub fn is_stand_in(&self) -> bool {
        match self {
            Self::Policy(policy) => policy.is_stand_in(),
            Self::ClusterPolicy(policy) => policy.is_stand_in,
            Self::Service(_)
            | Self::EndpointSlice(_)
            | Self::Pod(_)
            | Self::Namespace(_)
            | Self::Node(_) => false,
        }
    }
}

impl Snapshot {
    /// Has everything that existed been said, of every kind? Nothing may be deleted from the kernel
    /// before: what is not synced is not empty.
    pub fn is_complete(&self) -> bool {
        self.missing().next().is_none()
    }

    /// The kinds that are not synced yet.
    pub fn missing(&self) -> impl Iterator<Item = Kind> + '_ {
        Kind::ALL
            .into_iter()
            .filter(|kind| !self.synced.contains(kind))
    }

    /// Every object of this kind that existed has been said.
    pub fn mark_synced(&mut self, kind: Kind) {
        self.synced.insert(kind);
    }

    /// What is known of an object.
    pub fn get(&self, id: &ObjectId) -> Option<Object> {
        let name = &id.name;
        Some(match id.kind {
            Kind::Service => Object::Service(self.services.get(name)?.clone()),
            Kind::EndpointSlice => Object::EndpointSlice(self.slices.get(name)?.clone()),
            Kind::Pod => Object::Pod(self.pods.get(name)?.clone()),
            Kind::Namespace => Object::Namespace(self.namespaces.get(&name.name)?.clone()),
            Kind::Node => Object::Node(self.nodes.get(&name.name)?.clone()),
            Kind::NetworkPolicy => Object::Policy(self.policies.get(name)?.clone()),
            Kind::ClusterNetworkPolicy => {
                Object::ClusterPolicy(self.cluster_policies.get(&name.name)?.clone())
            }
        })
    }

    /// Takes an object in. True if that changed anything.
    pub fn apply(&mut self, object: Object) -> bool {
        match object {
            Object::Service(s) => insert(&mut self.services, s.id.clone(), s),
            Object::EndpointSlice(slice) => self.apply_slice(slice),
            Object::Pod(p) => insert(&mut self.pods, p.id.clone(), p),
            Object::Namespace(n) => insert(&mut self.namespaces, n.name.clone(), n),
            Object::Node(n) => insert(&mut self.nodes, n.name.clone(), n),
            Object::Policy(p) => insert(&mut self.policies, p.id.clone(), p),
            Object::ClusterPolicy(p) => insert(&mut self.cluster_policies, p.name.clone(), p),
        }
    }

    /// Takes an object out. True if it was there.
    pub fn delete(&mut self, id: &ObjectId) -> bool {
        match id.kind {
            Kind::Service => self.services.remove(&id.name).is_some(),
            Kind::EndpointSlice => self.delete_slice(&id.name),
            Kind::Pod => self.pods.remove(&id.name).is_some(),
            Kind::Namespace => self.namespaces.remove(&id.name.name).is_some(),
            Kind::Node => self.nodes.remove(&id.name.name).is_some(),
            Kind::NetworkPolicy => self.policies.remove(&id.name).is_some(),
            Kind::ClusterNetworkPolicy => self.cluster_policies.remove(&id.name.name).is_some(),
        }
    }

    /// The slices of a service, in the order of their names.
    pub fn slices_of<'a>(
        &'a self,
        service: &ObjectName,
    ) -> impl Iterator<Item = &'a Arc<EndpointSlice>> + use<'a> {
        self.slices_of
            .get(service)
            .into_iter()
            .flatten()
            .filter_map(|id| self.slices.get(id))
    }

    fn apply_slice(&mut self, slice: Arc<EndpointSlice>) -> bool {
        if self.slices.get(&slice.id) == Some(&slice) {
            return false;
        }
        self.delete_slice(&slice.id);
        if let Some(service) = &slice.service {
            self.slices_of
                .entry(service.clone())
                .or_default()
                .insert(slice.id.clone());
        }
        self.slices.insert(slice.id.clone(), slice);
        true
    }

    fn delete_slice(&mut self, id: &ObjectName) -> bool {
        let Some(old) = self.slices.remove(id) else {
            return false;
        };
        if let Some(service) = &old.service
            && let Some(ids) = self.slices_of.get_mut(service)
        {
            ids.remove(id);
            if ids.is_empty() {
                self.slices_of.remove(service);
            }
        }
        true
    }
}

fn insert<K: Eq + std::hash::Hash, V: PartialEq>(
    map: &mut HashMap<K, Arc<V>>,
    key: K,
    value: Arc<V>,
) -> bool {
    if map.get(&key) == Some(&value) {
        return false;
    }
    map.insert(key, value);
    true
}
