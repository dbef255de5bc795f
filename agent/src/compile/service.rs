//! Which endpoints stand behind each address and port of a Service, for clients of this node. The rules
//! are those of Kubernetes' `pkg/proxy/topology.go` and the comments of core/v1 and discovery/v1.

use std::collections::BTreeMap;
use std::net::IpAddr;

use weir_common::service::{FrontendFlags, FrontendKey, Scope};
use weir_common::{Addr, Port, Protocol};

use super::{BackendAddr, FrontendPlan, ServicePlan};
use crate::model::{
    Conditions, EndpointSlice, Family, ObjectName, Proxying, Service, ServiceKind, ServicePort,
    TrafficPolicy,
};

/// The port of DNS (RFC 1035 section 4.2).
const DNS_PORT: u16 = 53;

/// The node that is compiled for.
#[derive(Clone, Debug)]
pub struct NodeView<'a> {
    pub name: &'a str,
    /// The label `topology.kubernetes.io/zone`, for topology hints.
    pub zone: Option<&'a str>,
}

/// The Service whose DNS ports are answered on the node itself.
#[derive(Clone, Debug)]
pub struct DnsRedirect {
    /// Normally `kube-system/kube-dns`.
    pub service: ObjectName,
    /// Where the node's own server listens: one of each family.
    pub addresses: Vec<IpAddr>,
    /// Host order.
    pub port: u16,
}

/// The frontends of `service` as this node should hold them. `slices` may come in any order.
pub fn compile<'a>(
    service: &Service,
    slices: impl IntoIterator<Item = &'a EndpointSlice>,
    node: &NodeView<'_>,
    dns: Option<&DnsRedirect>,
) -> ServicePlan {
    let mut plan = ServicePlan {
        id: service.id.clone(),
        frontends: Vec::new(),
    };
    let addresses = match (&service.kind, service.proxying) {
        (ServiceKind::ClusterIp(addresses), Proxying::Here) => addresses,
        _ => return plan,
    };
    let slices: Vec<_> = slices.into_iter().collect();
    for address in addresses {
        for port in &service.ports {
            plan.frontends
                .push(frontend(service, *address, port, &slices, node, dns));
        }
    }
    plan.frontends.sort_unstable_by_key(|f| f.key);
    plan
}

fn frontend(
    service: &Service,
    address: IpAddr,
    port: &ServicePort,
    slices: &[&EndpointSlice],
    node: &NodeView<'_>,
    dns: Option<&DnsRedirect>,
) -> FrontendPlan {
    let family = Family::of(&address);
    let key = FrontendKey {
        addr: address.into(),
        port: port.port.into(),
        protocol: port.protocol,
        scope: Scope::INTERNAL,
    };
    if let Some(own) = dns.and_then(|dns| dns.answer(service, port, family)) {
        return FrontendPlan {
            key,
            backends: vec![own],
            affinity: 0,
            flags: 0,
        };
    }
    let candidates = candidates(port, family, slices, node);
    let cluster = usable(candidates.iter());
    let (backends, flags) = match service.internal_traffic_policy {
        TrafficPolicy::Cluster => (cluster, 0),
        TrafficPolicy::Local => {
            let local = usable(candidates.iter().filter(|(_, c)| c.is_local));
            // Endpoints elsewhere mean that traffic is misdirected, not that nothing serves.
            let flags = if local.is_empty() && !cluster.is_empty() {
                FrontendFlags::DROP_WHEN_EMPTY
            } else {
                0
            };
            (local, flags)
        }
    };
    FrontendPlan {
        key,
        backends,
        affinity: service
            .affinity
            .map_or(0, |a| u32::try_from(a.as_secs()).unwrap_or(u32::MAX)),
        flags,
    }
}

impl DnsRedirect {
    /// The node's own server, if this port of this service is what it answers for.
    fn answer(&self, service: &Service, port: &ServicePort, family: Family) -> Option<BackendAddr> {
        let is_dns = service.id == self.service
            && port.port == DNS_PORT
            && matches!(port.protocol, Protocol::TCP | Protocol::UDP);
        if !is_dns {
            return None;
        }
        let own = self.addresses.iter().find(|a| Family::of(a) == family)?;
        Some(BackendAddr {
            addr: (*own).into(),
            port: self.port.into(),
        })
    }
}

/// How good an endpoint is. The order matters: of duplicates the better one counts.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
enum Fitness {
    Unusable,
    /// Still serves while it is being deleted: used when nothing is ready (KEP-1669).
    Leaving,
    Ready,
}

impl Fitness {
    fn of(conditions: Conditions) -> Self {
        if conditions.ready {
            Self::Ready
        } else if conditions.serving && conditions.terminating {
            Self::Leaving
        } else {
            Self::Unusable
        }
    }
}

#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
struct Candidate {
    fitness: Fitness,
    is_local: bool,
}

/// Every endpoint of the family that has this port, once: two slices may name the same one while the
/// controller moves it, and the same address may be a pod that leaves and its successor.
fn candidates(
    port: &ServicePort,
    family: Family,
    slices: &[&EndpointSlice],
    node: &NodeView<'_>,
) -> BTreeMap<BackendAddr, Candidate> {
    let mut candidates = BTreeMap::new();
    for slice in slices.iter().filter(|s| s.family == family) {
        let numbers = slice
            .ports
            .iter()
            .filter(|p| p.name == port.name && p.protocol == port.protocol)
            .filter_map(|p| p.port);
        for number in numbers {
            for endpoint in &slice.endpoints {
                let backend = BackendAddr {
                    addr: Addr::from(endpoint.address),
                    port: Port::from(number),
                };
                let candidate = Candidate {
                    fitness: Fitness::of(endpoint.conditions),
                    is_local: endpoint.node.as_deref() == Some(node.name),
                };
                candidates
                    .entry(backend)
                    .and_modify(|c: &mut Candidate| *c = candidate.max(*c))
                    .or_insert(candidate);
            }
        }
    }
    candidates
}

/// The ready ones; if there is none, those that still serve while they leave.
fn usable<'a>(
    candidates: impl Iterator<Item = (&'a BackendAddr, &'a Candidate)> + Clone,
) -> Vec<BackendAddr> {
    let of = |fitness| {
        candidates
            .clone()
            .filter(move |(_, c)| c.fitness == fitness)
            .map(|(backend, _)| *backend)
            .collect::<Vec<_>>()
    };
    let ready = of(Fitness::Ready);
    if ready.is_empty() {
        of(Fitness::Leaving)
    } else {
        ready
    }
}
