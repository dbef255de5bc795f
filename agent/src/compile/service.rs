//! Which endpoints stand behind each address and port of a Service, for clients of this node. The rules
//! are those of Kubernetes' `pkg/proxy/topology.go` and the comments of core/v1 and discovery/v1.

use std::collections::BTreeMap;
use std::net::IpAddr;

use ipnet::IpNet;
use weir_common::service::{FrontendFlags, FrontendKey, Scope};
use weir_common::{Addr, Port, Protocol};

use super::{BackendAddr, FrontendPlan, Owner, Report, ServicePlan, Way};
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
    /// Where Services may have external IPs. Anybody who may create a Service can name any address there, and has
    /// what pods send to it (CVE-2020-8554).
    pub external_ips: &'a [IpNet],
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
        id: Owner::Service(service.id.clone()),
        created: service.created,
        frontends: Vec::new(),
        draining: Vec::new(),
        reports: Vec::new(),
    };
    let addresses = match (&service.kind, service.proxying) {
        (ServiceKind::ClusterIp(addresses), Proxying::Here) => addresses,
        _ => return plan,
    };
    let slices: Vec<_> = slices.into_iter().collect();
    let outside = Outside::of(service, node);
    plan.reports = outside.reports();
    for address in addresses {
        plan.frontends.push(FrontendPlan {
            key: FrontendKey::of_cluster_ip((*address).into()),
            way: Way::ClusterIp,
            port: Port::ABSENT,
            backends: Vec::new(),
            affinity: 0,
            flags: 0,
        });
        for port in &service.ports {
            let family = Family::of(address);
            let candidates = candidates(port, family, &slices, node);
            let sets = Sets::of(&candidates);
            let ways = Ways {
                service,
                port,
                address: *address,
                sets: &sets,
                outside: &outside,
            };
            let own_dns = dns.and_then(|dns| dns.answer(service, port, family));
            let mut frontends = vec![ways.cluster_ip(own_dns)];
            frontends.extend(ways.node_port().into_iter().flatten());
            frontends.extend(ways.external());
            let others = others(&candidates, &frontends).into_iter();
            plan.draining
                .extend(others.map(|backend| (port.protocol, backend)));
            plan.frontends.extend(frontends);
        }
    }
    // An external address can be a cluster IP too.
    plan.frontends.sort_by_key(|f| (f.key, f.way));
    let mut left_out = Vec::new();
    plan.frontends.dedup_by(|later, first| {
        let is_same = later.key == first.key;
        if is_same {
            left_out.extend(later.endpoints());
        }
        is_same
    });
    let others = std::mem::take(&mut plan.draining);
    plan.drain(others.into_iter().chain(left_out));
    plan
}

/// The addresses of a Service that the cluster has not given to it itself: those it has here, and those it asks for
/// in vain.
struct Outside {
    load_balancer: Vec<IpAddr>,
    external: Vec<IpAddr>,
    /// Of load balancers, and closed to everybody: who may use them is restricted, which is not enforced yet.
    restricted: Vec<IpAddr>,
    not_allowed: Vec<IpAddr>,
}

impl Outside {
    fn of(service: &Service, node: &NodeView<'_>) -> Self {
        let external = &service.external;
        let all = external.load_balancer.iter().copied();
        let (restricted, load_balancer): (Vec<_>, Vec<_>) =
            all.partition(|address| external.sources.restrict(Family::of(address)));
        let is_allowed = |address: &IpAddr| node.external_ips.iter().any(|r| r.contains(address));
        // A closed address is not opened by naming it twice.
        let named = external.addresses.iter().copied();
        let named = named.filter(|address| !external.load_balancer.contains(address));
        let (external, not_allowed) = named.partition(is_allowed);
        Self {
            load_balancer,
            external,
            restricted,
            not_allowed,
        }
    }

    fn reports(&self) -> Vec<Report> {
        let restricted = (!self.restricted.is_empty()).then(|| Report::SourceRanges {
            addresses: self.restricted.clone(),
        });
        let not_allowed = self
            .not_allowed
            .iter()
            .map(|address| Report::ExternalIp { address: *address });
        restricted.into_iter().chain(not_allowed).collect()
    }
}

/// The endpoints that a port may lead to. The two sets are decided apart (`topology.go`).
struct Sets {
    cluster: Vec<BackendAddr>,
    /// On this node.
    local: Vec<BackendAddr>,
}

impl Sets {
    fn of(candidates: &BTreeMap<BackendAddr, Candidate>) -> Self {
        Self {
            cluster: usable(candidates.iter()),
            local: usable(candidates.iter().filter(|(_, c)| c.is_local)),
        }
    }

    /// Those that a policy allows, with the flags of the frontend.
    fn under(&self, policy: TrafficPolicy) -> (Vec<BackendAddr>, u32) {
        match policy {
            TrafficPolicy::Cluster => (self.cluster.clone(), 0),
            // Endpoints elsewhere mean that traffic is misdirected, not that nothing serves.
            TrafficPolicy::Local if self.local.is_empty() && !self.cluster.is_empty() => {
                (Vec::new(), FrontendFlags::DROP_WHEN_EMPTY)
            }
            TrafficPolicy::Local => (self.local.clone(), 0),
        }
    }
}

/// The ways to one port of a Service, in the family of one of its cluster IPs.
struct Ways<'a> {
    service: &'a Service,
    port: &'a ServicePort,
    /// The cluster IP.
    address: IpAddr,
    sets: &'a Sets,
    outside: &'a Outside,
}

impl Ways<'_> {
    fn cluster_ip(&self, own_dns: Option<BackendAddr>) -> FrontendPlan {
        let key = self.key(self.address, self.port.port, Scope::INTERNAL);
        if let Some(own) = own_dns {
            return FrontendPlan {
                affinity: 0,
                ..self.frontend(key, Way::ClusterIp, (vec![own], 0))
            };
        }
        let found = self.sets.under(self.service.internal_traffic_policy);
        self.frontend(key, Way::ClusterIp, found)
    }

    /// At every node's address. For clients inside of the cluster `externalTrafficPolicy: Local` on this
    /// node means nothing (k/k#123622), and another node answers for its own endpoints itself.
    fn node_port(&self) -> Option<[FrontendPlan; 2]> {
        let number = self.port.node_port?;
        let policy = self.service.external.traffic_policy;
        let flags = match policy {
            TrafficPolicy::Cluster => 0,
            TrafficPolicy::Local => FrontendFlags::OWN_NODE_ONLY,
        };
        let key = |scope| self.key(self.address, number, scope).of_nodes();
        let inside = (self.sets.cluster.clone(), flags);
        let outside = self.sets.under(policy);
        Some([
            self.frontend(key(Scope::INTERNAL), Way::NodePort, inside),
            self.frontend(key(Scope::EXTERNAL), Way::NodePort, outside),
        ])
    }

    /// At the addresses of load balancers and at external IPs. Clients inside of the cluster are not sent
    /// out and back in, and `externalTrafficPolicy` means nothing to them (core/v1 types.go).
    fn external(&self) -> Vec<FrontendPlan> {
        let policy = self.service.external.traffic_policy;
        let of = |way, addresses: &[IpAddr]| {
            let family = Family::of(&self.address);
            let ours = addresses.iter().filter(|a| Family::of(a) == family);
            ours.flat_map(|address| {
                let key = |scope| self.key(*address, self.port.port, scope);
                let inside = (self.sets.cluster.clone(), 0);
                let outside = self.sets.under(policy);
                [
                    self.frontend(key(Scope::INTERNAL), way, inside),
                    self.frontend(key(Scope::EXTERNAL), way, outside),
                ]
            })
            .collect::<Vec<_>>()
        };
        let mut frontends = of(Way::LoadBalancer, &self.outside.load_balancer);
        frontends.extend(of(Way::ExternalIp, &self.outside.external));
        frontends
    }

    fn key(&self, address: IpAddr, port: u16, scope: Scope) -> FrontendKey {
        FrontendKey {
            addr: address.into(),
            port: port.into(),
            protocol: self.port.protocol,
            scope,
            pad: [0; 4],
        }
    }

    fn frontend(
        &self,
        key: FrontendKey,
        way: Way,
        (backends, flags): (Vec<BackendAddr>, u32),
    ) -> FrontendPlan {
        let affinity = self.service.affinity;
        FrontendPlan {
            key,
            way,
            port: self.port.port.into(),
            backends,
            affinity: affinity.map_or(0, |a| u32::try_from(a.as_secs()).unwrap_or(u32::MAX)),
            flags,
        }
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

/// The endpoints that none of these frontends leads to: not ready, leaving, or kept out by a traffic policy.
fn others(
    candidates: &BTreeMap<BackendAddr, Candidate>,
    frontends: &[FrontendPlan],
) -> Vec<BackendAddr> {
    // Mostly the first frontend leads to all of them.
    let leads_to_all = |f: &FrontendPlan| f.backends.iter().eq(candidates.keys());
    if frontends.iter().any(leads_to_all) {
        return Vec::new();
    }
    let leads_to = |b: &BackendAddr| {
        let mut frontends = frontends.iter();
        frontends.any(|f| f.backends.binary_search(b).is_ok())
    };
    candidates
        .keys()
        .filter(|b| !leads_to(b))
        .copied()
        .collect()
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
