//! EndpointSlices.

use std::net::IpAddr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use weir_common::Protocol;

use super::ObjectName;

/// An EndpointSlice (discovery.k8s.io/v1). Slices of address type FQDN are left out at the edge.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct EndpointSlice {
    pub id: ObjectName,
    /// The label `kubernetes.io/service-name`; a slice without one belongs to nothing.
    pub service: Option<ObjectName>,
    pub family: Family,
    pub endpoints: Vec<Endpoint>,
    pub ports: Vec<SlicePort>,
}

/// `addressType`.
#[derive(Clone, Copy, Debug, Deserialize, Eq, Hash, Ord, PartialEq, PartialOrd, Serialize)]
pub enum Family {
    V4,
    V6,
}

/// An endpoint. Only `addresses[0]` counts (discovery/v1 types.go).
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Endpoint {
    pub address: IpAddr,
    pub conditions: Conditions,
    pub hostname: Option<Arc<str>>,
    pub node: Option<Arc<str>>,
    pub zone: Option<Arc<str>>,
    /// `targetRef`, when it is a Pod.
    pub pod: Option<ObjectName>,
}

/// Conditions with their defaults resolved: nil is ready, serving and not terminating.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Conditions {
    pub ready: bool,
    pub serving: bool,
    pub terminating: bool,
}

/// A port of all endpoints of a slice.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct SlicePort {
    /// Equals the name of the Service's port; "" and absent are the same name.
    pub name: Option<Arc<str>>,
    #[serde(with = "super::protocol::Number")]
    pub protocol: Protocol,
    /// Host order; `None` in a slice that does not restrict ports, which no Service port matches.
    pub port: Option<u16>,
}
