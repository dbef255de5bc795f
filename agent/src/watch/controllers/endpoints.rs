//! EndpointSlices of a Service with a selector, by the rules of the EndpointSlice controller (k/k
//! `pkg/controller/endpointslice`, `staging/src/k8s.io/endpointslice/utils.go`).

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::model::{
    Conditions, Endpoint, EndpointSlice, Family, Kind, NotReady, Object, ObjectId, ObjectName, Pod,
    PodPhase, Service, ServiceKind, ServicePort, SlicePort, TargetPort,
};

/// The label of a node that says where it stands.
const ZONE: &str = "topology.kubernetes.io/zone";

/// One slice for each family and each way that the named ports resolve. None without a selector: somebody
/// else writes them.
pub(super) fn slices(
    service: &Service,
    families: &[Family],
    objects: &BTreeMap<ObjectId, Object>,
) -> Vec<EndpointSlice> {
    let Some(selector) = &service.selector else {
        return Vec::new();
    };
    if matches!(service.kind, ServiceKind::ExternalName(_)) {
        return Vec::new();
    }
    // The numbers of the Service's ports on a pod; `None` where the pod has no port of that name.
    type Numbers = Vec<Option<u16>>;
    let mut groups: BTreeMap<(Family, Numbers), Vec<Endpoint>> = BTreeMap::new();
    for pod in pods_of(&service.id.namespace, objects) {
        let is_selected = selector.iter().all(|(k, v)| pod.labels.get(k) == Some(v));
        if !is_selected || pod.phase == PodPhase::Finished {
            continue;
        }
        let numbers: Numbers = service.ports.iter().map(|p| resolve(p, pod)).collect();
        for family in families {
            if let Some(endpoint) = endpoint(service, pod, *family, objects) {
                groups
                    .entry((*family, numbers.clone()))
                    .or_default()
                    .push(endpoint);
            }
        }
    }
    groups
        .into_iter()
        .enumerate()
        .map(|(i, ((family, numbers), endpoints))| EndpointSlice {
            id: ObjectName::new(
                service.id.namespace.clone(),
                format!("{}-{i}", service.id.name),
            ),
            service: Some(service.id.clone()),
            family,
            endpoints,
            ports: service
                .ports
                .iter()
                .zip(numbers)
                .filter_map(|(port, number)| {
                    Some(SlicePort {
                        name: port.name.clone(),
                        protocol: port.protocol,
                        port: Some(number?),
                    })
                })
                .collect(),
        })
        .collect()
}

/// The pods of a namespace, in the order of their names.
fn pods_of<'a>(
    namespace: &Arc<str>,
    objects: &'a BTreeMap<ObjectId, Object>,
) -> impl Iterator<Item = &'a Pod> + use<'a> {
    let first = ObjectId {
        kind: Kind::Pod,
        name: ObjectName::new(namespace.clone(), ""),
    };
    let namespace = namespace.clone();
    objects
        .range(first..)
        .take_while(move |(id, _)| id.kind == Kind::Pod && id.name.namespace == namespace)
        .filter_map(|(_, object)| match object {
            Object::Pod(pod) => Some(pod.as_ref()),
            _ => None,
        })
}

fn resolve(port: &ServicePort, pod: &Pod) -> Option<u16> {
    match &port.target {
        TargetPort::Number(number) => Some(*number),
        TargetPort::Name(name) => pod
            .ports
            .iter()
            .find(|p| p.name.as_ref() == Some(name) && p.protocol == port.protocol)
            .map(|p| p.port),
    }
}

fn endpoint(
    service: &Service,
    pod: &Pod,
    family: Family,
    objects: &BTreeMap<ObjectId, Object>,
) -> Option<Endpoint> {
    let address = *pod.addresses.iter().find(|ip| Family::of(ip) == family)?;
    let terminating = pod.phase == PodPhase::Terminating;
    let is_published = service.not_ready == NotReady::Published;
    Some(Endpoint {
        address,
        conditions: Conditions {
            ready: is_published || (pod.ready && !terminating),
            serving: pod.ready,
            terminating,
        },
        hostname: pod
            .hostname
            .clone()
            .filter(|_| pod.subdomain.as_ref() == Some(&service.id.name)),
        node: pod.node.clone(),
        zone: pod.node.as_ref().and_then(|name| zone(name, objects)),
        pod: Some(pod.id.clone()),
    })
}

fn zone(node: &Arc<str>, objects: &BTreeMap<ObjectId, Object>) -> Option<Arc<str>> {
    let id = ObjectId {
        kind: Kind::Node,
        name: ObjectName::cluster(node.clone()),
    };
    match objects.get(&id) {
        Some(Object::Node(node)) => node.labels.get(ZONE).cloned(),
        _ => None,
    }
}
