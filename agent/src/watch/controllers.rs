//! The controllers that a cluster has and a folder of manifests has not: cluster IPs, EndpointSlices,
//! namespaces, and the addresses that this node gave its pods. One pure function of all documents and all
//! addresses, so that the result never depends on what happened in which order.

mod cluster_ips;
mod endpoints;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;

use super::documents::Status;
use crate::model::convert::FamilyRequest;
use crate::model::{
    Kind, Namespace, NamespacePhase, Object, ObjectId, ObjectName, Pod, PodPhase, Service,
};

/// The label that the API server puts on every namespace (KEP-2161).
const NAMESPACE_NAME: &str = "kubernetes.io/metadata.name";

/// Cluster IPs by Service.
pub type Assigned = BTreeMap<ObjectName, Vec<IpAddr>>;

/// The addresses that pods of this node have.
pub type PodLeases = BTreeMap<ObjectName, Vec<IpAddr>>;

/// An object that stands in the manifests.
#[derive(Clone, Debug, PartialEq)]
pub struct Manifest {
    pub object: Object,
    /// Of a Service: the families it wants cluster IPs of.
    pub families: Option<FamilyRequest>,
    pub status: Status,
}

/// What does not come from the documents.
#[derive(Clone, Debug)]
pub struct Surroundings {
    /// The node that runs the pods.
    pub node: Arc<str>,
    /// Where cluster IPs are taken from: at most one of each family, the preferred one first.
    pub service_cidrs: Vec<IpNet>,
}

/// What follows from the documents and the addresses.
#[derive(Clone, Debug, Default)]
pub struct Derived {
    pub objects: BTreeMap<ObjectId, Object>,
    /// Name of the object, and reason.
    pub reports: BTreeMap<String, String>,
    /// To be passed in the next time.
    pub assigned: Assigned,
}

/// All objects. `before` are the cluster IPs of the last time, which their Services keep.
pub fn derive(
    manifests: &[Manifest],
    leases: &PodLeases,
    surroundings: &Surroundings,
    before: &Assigned,
) -> Derived {
    let mut derived = Derived::default();
    let mut services: Vec<(Arc<Service>, FamilyRequest)> = Vec::new();
    for manifest in manifests {
        match &manifest.object {
            Object::Service(service) => {
                if let Some(request) = &manifest.families {
                    services.push((service.clone(), request.clone()));
                }
            }
            Object::Pod(pod) => {
                let pod = settle(pod, manifest.status, leases.get(&pod.id), surroundings);
                derived.insert(Object::Pod(Arc::new(pod)));
            }
            other => derived.insert(other.clone()),
        }
    }
    let assignment = cluster_ips::assign(&services, &surroundings.service_cidrs, before);
    derived.assigned = assignment.assigned;
    for (name, reason) in assignment.refused {
        derived
            .reports
            .insert(format!("{} {name}", Kind::Service), reason);
    }
    for addressed in assignment.services {
        let service = Arc::new(addressed.service);
        for slice in endpoints::slices(&service, &addressed.families, &derived.objects) {
            let slice = Object::EndpointSlice(Arc::new(slice));
            // A slice of this name that somebody wrote down is meant to be there.
            derived.objects.entry(slice.id()).or_insert(slice);
        }
        derived.insert(Object::Service(service));
    }
    derived.add_namespaces();
    derived
}

impl Derived {
    fn insert(&mut self, object: Object) {
        self.objects.insert(object.id(), object);
    }

    /// A namespace for every name that an object is in, and its name as a label on each.
    fn add_namespaces(&mut self) {
        let names: BTreeSet<Arc<str>> = self
            .objects
            .keys()
            .map(|id| match id.kind {
                Kind::Namespace => id.name.name.clone(),
                _ => id.name.namespace.clone(),
            })
            .filter(|name| !name.is_empty())
            .collect();
        for name in names {
            let id = ObjectId {
                kind: Kind::Namespace,
                name: ObjectName::cluster(name.clone()),
            };
            let mut namespace = match self.objects.get(&id) {
                Some(Object::Namespace(namespace)) => Namespace::clone(namespace),
                _ => Namespace {
                    name: name.clone(),
                    labels: BTreeMap::new(),
                    phase: NamespacePhase::Active,
                    keeps_established: false,
                },
            };
            namespace.labels.insert(NAMESPACE_NAME.into(), name);
            self.insert(Object::Namespace(Arc::new(namespace)));
        }
    }
}

/// A pod with the addresses that this node gave it. Without a status of its own it runs, and is ready,
/// from the moment it has one.
fn settle(
    pod: &Pod,
    status: Status,
    lease: Option<&Vec<IpAddr>>,
    surroundings: &Surroundings,
) -> Pod {
    let mut pod = pod.clone();
    if let Some(addresses) = lease {
        if pod.addresses.is_empty() {
            pod.addresses.clone_from(addresses);
        }
        pod.node.get_or_insert_with(|| surroundings.node.clone());
    }
    if status == Status::Absent {
        pod.ready = !pod.addresses.is_empty();
        if pod.phase == PodPhase::Pending && pod.ready {
            pod.phase = PodPhase::Running;
        }
    }
    pod
}
