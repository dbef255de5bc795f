//! What the zone is made of: the nouns that the agent sends. No name is parsed here.

use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

/// Namespace and name, in lower case as the API server requires (RFC 1123 labels).
#[derive(Clone, Debug, Deserialize, Eq, Hash, Ord, PartialEq, PartialOrd, Serialize)]
pub struct ServiceName {
    pub namespace: Arc<str>,
    pub name: Arc<str>,
}

impl ServiceName {
    /// A name from its two parts.
    pub fn new(namespace: impl Into<Arc<str>>, name: impl Into<Arc<str>>) -> Self {
        Self {
            namespace: namespace.into(),
            name: name.into(),
        }
    }
}

impl fmt::Display for ServiceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// A Service as far as names go.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct ZoneService {
    pub name: Arc<ServiceName>,
    pub kind: ServiceKind,
}

/// Where a service's name leads.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum ServiceKind {
    /// To its cluster IPs: one, one of each family, or none yet.
    ClusterIp {
        addresses: Vec<IpAddr>,
        ports: Vec<ZonePort>,
    },
    /// To its endpoints that are ready. Without any, the name does not exist.
    Headless { sets: Vec<EndpointSet> },
    /// To another name.
    ExternalName { target: Arc<str> },
}

/// Ready endpoints that have the same ports, as an EndpointSlice groups them.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct EndpointSet {
    pub ports: Vec<ZonePort>,
    pub endpoints: Vec<ZoneEndpoint>,
}

/// A ready endpoint of a headless service.
#[derive(Clone, Debug, Deserialize, Eq, Hash, PartialEq, Serialize)]
pub struct ZoneEndpoint {
    pub address: IpAddr,
    /// Without one, the name is made from the address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hostname: Option<Arc<str>>,
}

/// A named port. Ports without a name have no record (specification 2.3.2), so are left out.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct ZonePort {
    pub name: Arc<str>,
    pub protocol: PortProtocol,
    /// Host order.
    pub port: u16,
}

/// The protocols that a Service port may have.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum PortProtocol {
    Tcp,
    Udp,
    Sctp,
}

impl PortProtocol {
    /// Its label, as in `_http._tcp`.
    pub const fn label(self) -> &'static str {
        match self {
            Self::Tcp => "_tcp",
            Self::Udp => "_udp",
            Self::Sctp => "_sctp",
        }
    }
}

impl ZoneService {
    /// The addresses whose reverse name leads to this service or its endpoints.
    pub fn addresses(&self) -> impl Iterator<Item = IpAddr> + '_ {
        let (own, sets): (&[IpAddr], &[EndpointSet]) = match &self.kind {
            ServiceKind::ClusterIp { addresses, .. } => (addresses, &[]),
            ServiceKind::Headless { sets } => (&[], sets),
            ServiceKind::ExternalName { .. } => (&[], &[]),
        };
        own.iter().copied().chain(
            sets.iter()
                .flat_map(|set| set.endpoints.iter().map(|endpoint| endpoint.address)),
        )
    }
}
