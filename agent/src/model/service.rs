//! Services.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use weir_common::Protocol;

use super::{Family, Labels, ObjectName};

/// A Service.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Service {
    pub id: ObjectName,
    /// When it was created, in seconds since 1970; `None` when nobody says so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub created: Option<u64>,
    pub kind: ServiceKind,
    pub ports: Vec<ServicePort>,
    /// `spec.selector`; `None` when somebody else makes the EndpointSlices.
    pub selector: Option<Labels>,
    /// `sessionAffinity: ClientIP` with its timeout.
    pub affinity: Option<Duration>,
    pub internal_traffic_policy: TrafficPolicy,
    pub external: External,
    pub not_ready: NotReady,
    pub proxying: Proxying,
}

/// What kind of Service, as far as addresses go. NodePort and LoadBalancer have cluster IPs too.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub enum ServiceKind {
    /// `spec.clusterIPs`: one or one of each family. Empty while it has none yet.
    ClusterIp(Vec<IpAddr>),
    /// `clusterIP: None`.
    Headless,
    /// The name that a lookup is sent on to.
    ExternalName(Arc<str>),
}

/// How a Service is reached from outside of the cluster, beside the node ports of its ports.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
pub struct External {
    pub traffic_policy: TrafficPolicy,
    /// `status.loadBalancer.ingress` of a LoadBalancer, without those whose traffic has to go through a
    /// proxy (`ipMode: Proxy`, KEP-1860).
    pub load_balancer: Vec<IpAddr>,
    /// Who may use the addresses of load balancers.
    #[serde(default, skip_serializing_if = "Sources::are_everybody")]
    pub sources: Sources,
    /// `spec.externalIPs`.
    pub addresses: Vec<IpAddr>,
}

/// `spec.loadBalancerSourceRanges`.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
pub enum Sources {
    #[default]
    Everybody,
    /// Those in these ranges. A range that could not be read is none; nobody, when that leaves none.
    In(Vec<IpNet>),
}

impl Sources {
    fn are_everybody(&self) -> bool {
        *self == Self::Everybody
    }

    /// Are clients of this family left out? Ranges of one family alone count for the other too: who restricts his
    /// clients does not mean to leave a door open.
    pub fn restrict(&self, family: Family) -> bool {
        let Self::In(ranges) = self else {
            return false;
        };
        let of_family = |range: &&IpNet| Family::of(&range.addr()) == family;
        let has_own = ranges.iter().any(|range| of_family(&range));
        let mut counted = ranges.iter().filter(|range| !has_own || of_family(range));
        !counted.any(|range| range.prefix_len() == 0)
    }
}

/// A port of a Service.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct ServicePort {
    /// `None` when the only port has no name.
    pub name: Option<Arc<str>>,
    #[serde(with = "super::protocol::Number")]
    pub protocol: Protocol,
    /// Host order.
    pub port: u16,
    pub target: TargetPort,
    /// Of a NodePort or a LoadBalancer; host order.
    pub node_port: Option<u16>,
}

/// Which port of the pod. Only who makes EndpointSlices needs it.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub enum TargetPort {
    /// Host order.
    Number(u16),
    Name(Arc<str>),
}

/// `internalTrafficPolicy` and `externalTrafficPolicy`.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
pub enum TrafficPolicy {
    #[default]
    Cluster,
    Local,
}

/// `publishNotReadyAddresses`.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub enum NotReady {
    Hidden,
    Published,
}

/// Who carries traffic for the cluster IPs. Names do not depend on it.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub enum Proxying {
    Here,
    /// The label `service.kubernetes.io/service-proxy-name` gives it to another proxy, or the label
    /// `service.kubernetes.io/headless` to none.
    Elsewhere,
}
