//! Services.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use weir_common::Protocol;

use super::{Labels, ObjectName};

/// A Service.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Service {
    pub id: ObjectName,
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
    /// `spec.externalIPs`.
    pub addresses: Vec<IpAddr>,
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
