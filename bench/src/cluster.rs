//! A cluster of any size that nobody holds: each object is written when somebody asks for it, in the shape
//! and size in which a real API server sends it (`objects/`). How it is sent is in `api_server`.

use std::collections::HashMap;
use std::net::Ipv4Addr;

/// Endpoints of each service, all in one slice.
pub(crate) const ENDPOINTS: usize = 10;
/// The port of a service before anything is changed, and after an odd number of changes.
pub(crate) const PORTS: [u16; 2] = [80, 81];
/// Pods of a node.
const PER_NODE: usize = 100;
/// Pods of a namespace.
const PER_NAMESPACE: usize = 100;

/// What an API server may have.
pub(crate) trait Objects: Send + 'static {
    /// How many objects of a kind there are.
    fn count(&self, resource: Resource) -> usize;

    /// Writes an object as it is now.
    fn write(&self, resource: Resource, index: usize, out: &mut String);
}

/// The kinds that the agent watches, and kube-proxy.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub(crate) enum Resource {
    Services,
    EndpointSlices,
    Pods,
    Namespaces,
    Nodes,
    NetworkPolicies,
    ServiceCidrs,
}

impl Resource {
    /// By its name in a URL.
    pub(crate) fn named(plural: &str) -> Option<Self> {
        Some(match plural {
            "services" => Self::Services,
            "endpointslices" => Self::EndpointSlices,
            "pods" => Self::Pods,
            "namespaces" => Self::Namespaces,
            "nodes" => Self::Nodes,
            "networkpolicies" => Self::NetworkPolicies,
            "servicecidrs" => Self::ServiceCidrs,
            _ => return None,
        })
    }

    /// The version and the kind of an object.
    pub(crate) fn kind(self) -> (&'static str, &'static str) {
        match self {
            Self::Services => ("v1", "Service"),
            Self::EndpointSlices => ("discovery.k8s.io/v1", "EndpointSlice"),
            Self::Pods => ("v1", "Pod"),
            Self::Namespaces => ("v1", "Namespace"),
            Self::Nodes => ("v1", "Node"),
            Self::NetworkPolicies => ("networking.k8s.io/v1", "NetworkPolicy"),
            Self::ServiceCidrs => ("networking.k8s.io/v1", "ServiceCIDR"),
        }
    }
}

/// How often an object was changed, which is all that it takes to write it again.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Revision {
    /// In what a node agent goes by: an endpoint's address, a port, a label, readiness.
    pub(crate) changed: u32,
    /// In what it has no use for: an annotation, the time of a heartbeat.
    pub(crate) touched: u32,
    pub(crate) version: u64,
}

/// How much there is, and what was changed.
#[derive(Debug)]
pub(crate) struct Cluster {
    services: usize,
    pods: usize,
    nodes: usize,
    namespaces: usize,
    /// The name of the node that the agent is on.
    own_node: String,
    templates: Templates,
    revisions: HashMap<(Resource, usize), Revision>,
}

#[derive(Debug)]
struct Templates {
    service: Template,
    slice: Template,
    endpoint: Template,
    pod: Template,
    namespace: Template,
    node: Template,
}

impl Objects for Cluster {
    fn count(&self, resource: Resource) -> usize {
        match resource {
            Resource::Services | Resource::EndpointSlices => self.services,
            Resource::Pods => self.pods,
            Resource::Namespaces => self.namespaces,
            Resource::Nodes => self.nodes,
            Resource::NetworkPolicies | Resource::ServiceCidrs => 0,
        }
    }

    fn write(&self, resource: Resource, index: usize, out: &mut String) {
        let revision = self.revision(resource, index);
        let t = &self.templates;
        match resource {
            Resource::Services => t.service.write(out, &|field| match field {
                "name" => service_name(index),
                "namespace" => self.namespace_of(index),
                "uid" => uid(1, index),
                "address" => service_address(index).to_string(),
                "port" => PORTS[revision.changed as usize % PORTS.len()].to_string(),
                _ => of_every_object(field, revision),
            }),
            Resource::EndpointSlices => t.slice.write(out, &|field| match field {
                "name" => service_name(index),
                "namespace" => self.namespace_of(index),
                "uid" => uid(2, index),
                "owner" => uid(1, index),
                "endpoints" => self.endpoints(index, revision),
                _ => of_every_object(field, revision),
            }),
            Resource::Pods => t.pod.write(out, &|field| match field {
                "name" => pod_name(index),
                "workload" => service_name(index / ENDPOINTS),
                "namespace" => self.namespace_of(index / ENDPOINTS),
                "uid" => uid(3, index),
                "owner" => uid(6, index / ENDPOINTS),
                "address" => pod_address(index).to_string(),
                "node" => self.node_name(node_of(index)),
                "host" => node_address(node_of(index)).to_string(),
                "ready" => if revision.changed.is_multiple_of(2) {
                    "True"
                } else {
                    "False"
                }
                .to_owned(),
                _ => of_every_object(field, revision),
            }),
            Resource::Namespaces => t.namespace.write(out, &|field| match field {
                "name" => namespace_name(index),
                "uid" => uid(4, index),
                _ => of_every_object(field, revision),
            }),
            Resource::Nodes => t.node.write(out, &|field| match field {
                "name" => self.node_name(index),
                "uid" => uid(5, index),
                "zone" => zone(index),
                "address" => node_address(index).to_string(),
                "pods" => node_range(index),
                "minute" => format!("{:02}", revision.touched / 60 % 60),
                "second" => format!("{:02}", revision.touched % 60),
                _ => of_every_object(field, revision),
            }),
            Resource::NetworkPolicies | Resource::ServiceCidrs => {}
        }
    }
}

impl Cluster {
    /// Nothing of it is written yet.
    pub(crate) fn new(services: usize, pods: usize, own_node: &str) -> Self {
        Self {
            services,
            pods,
            // The agent's own, which has none of these pods.
            nodes: 1 + pods.div_ceil(PER_NODE).max(10),
            // As many pods in each as there are in each of a small cluster's.
            namespaces: (pods / PER_NAMESPACE).max(10),
            own_node: own_node.to_owned(),
            templates: Templates {
                service: Template::new(include_str!("objects/service.json")),
                slice: Template::new(include_str!("objects/endpoint_slice.json")),
                endpoint: Template::new(include_str!("objects/endpoint.json")),
                pod: Template::new(include_str!("objects/pod.json")),
                namespace: Template::new(include_str!("objects/namespace.json")),
                node: Template::new(include_str!("objects/node.json")),
            },
            revisions: HashMap::new(),
        }
    }

    /// Changes an object in what an agent goes by.
    pub(crate) fn change(&mut self, resource: Resource, index: usize, version: u64) -> Revision {
        let revision = self.revisions.entry((resource, index)).or_default();
        revision.changed += 1;
        revision.version = version;
        *revision
    }

    /// Changes an object in what an agent has no use for.
    pub(crate) fn touch(&mut self, resource: Resource, index: usize, version: u64) -> Revision {
        let revision = self.revisions.entry((resource, index)).or_default();
        revision.touched += 1;
        revision.version = version;
        *revision
    }

    /// How often an object was changed so far.
    pub(crate) fn revision(&self, resource: Resource, index: usize) -> Revision {
        let revision = self.revisions.get(&(resource, index));
        revision.copied().unwrap_or_default()
    }

    /// One of them has a new address after every change: its own, then one that no other service ever had.
    fn endpoints(&self, service: usize, revision: Revision) -> String {
        let mut text = String::new();
        for n in 0..ENDPOINTS {
            let pod = service * ENDPOINTS + n;
            let address = match n {
                0 => moving_address(service, revision),
                _ => pod_address(pod),
            };
            if n > 0 {
                text.push(',');
            }
            let endpoint = &self.templates.endpoint;
            endpoint.write(&mut text, &|field| match field {
                "address" => address.to_string(),
                "node" => self.node_name(node_of(pod)),
                "zone" => zone(node_of(pod)),
                "namespace" => self.namespace_of(service),
                "name" => pod_name(pod),
                "uid" => uid(3, pod),
                _ => String::new(),
            });
        }
        text
    }

    fn namespace_of(&self, service: usize) -> String {
        namespace_name(service % self.namespaces)
    }

    fn node_name(&self, index: usize) -> String {
        match index {
            0 => self.own_node.clone(),
            _ => format!("node-{index}"),
        }
    }
}

fn of_every_object(field: &str, revision: Revision) -> String {
    match field {
        "version" => revision.version.max(1).to_string(),
        "changed" => revision.changed.to_string(),
        "touched" => revision.touched.to_string(),
        _ => String::new(),
    }
}

/// The address of the endpoint of a service that changes.
pub(crate) fn moving_address(service: usize, revision: Revision) -> Ipv4Addr {
    if revision.changed == 0 {
        return pod_address(service * ENDPOINTS);
    }
    // A service is changed a few thousand times at most, and only a few of them are.
    let n = (service as u32 % 16) * (1 << 16) + revision.changed % (1 << 16);
    Ipv4Addr::from_bits(Ipv4Addr::new(10, 192, 0, 0).to_bits() + n)
}

/// The cluster IP of a service. The first are left to the cluster's own.
pub(crate) fn service_address(index: usize) -> Ipv4Addr {
    Ipv4Addr::from_bits(Ipv4Addr::new(10, 96, 1, 0).to_bits() + index as u32)
}

fn service_name(index: usize) -> String {
    format!("service-{index}")
}

fn namespace_name(index: usize) -> String {
    format!("shop-{index}")
}

fn pod_name(index: usize) -> String {
    format!("service-{}-6c9f7d8b5-p{index}", index / ENDPOINTS)
}

/// In the range of its node.
fn pod_address(index: usize) -> Ipv4Addr {
    let first = node_base(node_of(index));
    Ipv4Addr::from_bits(first + 2 + (index % PER_NODE) as u32)
}

fn node_of(pod: usize) -> usize {
    1 + pod / PER_NODE
}

fn node_base(node: usize) -> u32 {
    Ipv4Addr::new(10, 128, 0, 0).to_bits() + 256 * (node as u32)
}

/// The node that the agent is on has the range that it is told of (`NodeOptions::named`).
fn node_range(node: usize) -> String {
    match node {
        0 => "10.244.1.0/24".to_owned(),
        _ => format!("{}/24", Ipv4Addr::from_bits(node_base(node))),
    }
}

/// All in one network of 16 bits; the first is the agent's own.
pub(crate) fn node_address(node: usize) -> Ipv4Addr {
    Ipv4Addr::from_bits(Ipv4Addr::new(172, 20, 0, 1).to_bits() + node as u32)
}

fn zone(node: usize) -> String {
    char::from(b'a' + (node % 3) as u8).to_string()
}

fn uid(kind: u32, index: usize) -> String {
    format!("{kind:08x}-6a1f-4dd7-9e3b-{index:012x}")
}

/// A text with fields: `{{name}}`.
#[derive(Debug)]
struct Template {
    parts: Vec<Part>,
}

#[derive(Debug)]
enum Part {
    Text(String),
    Field(String),
}

impl Template {
    /// Indentation goes: an API server sends none.
    fn new(text: &str) -> Self {
        let text: String = text.lines().map(str::trim_start).collect();
        let mut parts = Vec::new();
        let mut rest = text.as_str();
        while let Some((before, after)) = rest.split_once("{{") {
            let Some((field, after)) = after.split_once("}}") else {
                break;
            };
            parts.push(Part::Text(before.to_owned()));
            parts.push(Part::Field(field.to_owned()));
            rest = after;
        }
        parts.push(Part::Text(rest.to_owned()));
        Self { parts }
    }

    fn write(&self, out: &mut String, value: &dyn Fn(&str) -> String) {
        for part in &self.parts {
            match part {
                Part::Text(text) => out.push_str(text),
                Part::Field(field) => out.push_str(&value(field)),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use serde_json::Value;

    use super::*;

    fn object(cluster: &Cluster, resource: Resource, index: usize) -> Value {
        let mut text = String::new();
        cluster.write(resource, index, &mut text);
        serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e}: {text}"))
    }

    #[test]
    fn every_kind_is_whole_and_of_a_real_size() {
        let cluster = Cluster::new(200, 3_000, "own");
        for (resource, least, most) in [
            (Resource::Services, 1_000, 3_000),
            (Resource::EndpointSlices, 3_000, 6_000),
            (Resource::Pods, 3_000, 8_000),
            (Resource::Namespaces, 400, 1_000),
            (Resource::Nodes, 5_000, 20_000),
        ] {
            let mut text = String::new();
            cluster.write(resource, 7, &mut text);
            assert!(!text.contains("{{") && !text.contains("\"\"}"), "{text}");
            assert!(
                (least..most).contains(&text.len()),
                "{resource:?} {}",
                text.len()
            );
            assert!(object(&cluster, resource, 7)["metadata"]["name"].is_string());
        }
    }

    #[test]
    fn a_change_of_a_slice_moves_one_endpoint_to_an_address_that_is_new() {
        let mut cluster = Cluster::new(100, 1_000, "own");
        let addresses = |cluster: &Cluster| -> Vec<String> {
            let slice = object(cluster, Resource::EndpointSlices, 5);
            let endpoints = slice["endpoints"].as_array().unwrap();
            let first = endpoints.iter().map(|e| e["addresses"][0].to_string());
            first.collect()
        };
        let mut seen: HashSet<String> = addresses(&cluster).into_iter().collect();
        assert_eq!(seen.len(), ENDPOINTS);
        for version in 2..5 {
            let before = addresses(&cluster);
            cluster.change(Resource::EndpointSlices, 5, version);
            let after = addresses(&cluster);
            assert!(seen.insert(after[0].clone()), "{after:?}");
            assert_eq!(before[1..], after[1..]);
        }
    }

    #[test]
    fn a_pod_is_in_the_range_of_its_node() {
        let cluster = Cluster::new(10, 3_000, "own");
        for index in [0, 99, 100, 2_999] {
            let pod = object(&cluster, Resource::Pods, index);
            let node = object(&cluster, Resource::Nodes, node_of(index));
            assert_eq!(pod["spec"]["nodeName"], node["metadata"]["name"]);
            let range = node["spec"]["podCIDR"].as_str().unwrap();
            let (net, _) = range.rsplit_once('.').unwrap();
            let address = pod["status"]["podIP"].as_str().unwrap();
            assert!(address.starts_with(&format!("{net}.")), "{address} {range}");
        }
    }
}
