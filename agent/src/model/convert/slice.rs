//! EndpointSlice.

use std::net::IpAddr;
use std::sync::Arc;

use super::{Converted, Invalid, Problem, id, optional, port, protocol, unicast};
use crate::model::{Conditions, Endpoint, EndpointSlice, Family, Object, ObjectName, SlicePort};
use crate::watch::wire;

/// An EndpointSlice; `object` is `None` for address type FQDN. A bad endpoint or port is left out.
pub fn slice(wire: wire::EndpointSlice) -> Result<Converted, Invalid> {
    let meta = wire.metadata;
    let id = id(&meta)?;
    let family = match wire.address_type.as_str() {
        "IPv4" => Family::V4,
        "IPv6" => Family::V6,
        "FQDN" => {
            return Ok(Converted {
                object: None,
                problems: Vec::new(),
            });
        }
        other => return Err(format!("addressType: unknown {other:?}").into()),
    };
    let mut problems = Vec::new();
    let mut report = |what: &str, i: usize, reason: String| {
        problems.push(Problem {
            part: format!("{what} {i}"),
            reason,
        });
    };
    let mut endpoints = Vec::with_capacity(wire.endpoints.len());
    for (i, wire) in wire.endpoints.into_iter().enumerate() {
        match endpoint(wire, family, &id) {
            Ok(endpoint) => endpoints.push(endpoint),
            Err(reason) => report("endpoint", i, reason),
        }
    }
    let mut ports = Vec::with_capacity(wire.ports.len());
    for (i, wire) in wire.ports.into_iter().enumerate() {
        match slice_port(wire) {
            Ok(port) => ports.push(port),
            Err(reason) => report("port", i, reason),
        }
    }
    let service = meta
        .labels
        .get("kubernetes.io/service-name")
        .filter(|name| !name.is_empty())
        .map(|name| ObjectName::new(id.namespace.clone(), name.as_str()));
    Ok(Converted {
        object: Some(Object::EndpointSlice(Arc::new(EndpointSlice {
            id,
            service,
            family,
            endpoints,
            ports,
        }))),
        problems,
    })
}

fn endpoint(wire: wire::Endpoint, family: Family, slice: &ObjectName) -> Result<Endpoint, String> {
    let text = wire.addresses.first().ok_or("it has no address")?;
    let address: IpAddr = unicast(text)?;
    if Family::of(&address) != family {
        return Err(format!("{address} is not of the slice's addressType"));
    }
    let pod = wire
        .target_ref
        .filter(|target| target.kind.as_deref() == Some("Pod"))
        .and_then(|target| {
            let namespace = optional(target.namespace).unwrap_or_else(|| slice.namespace.clone());
            Some(ObjectName::new(namespace, optional(target.name)?))
        });
    Ok(Endpoint {
        address,
        conditions: Conditions {
            ready: wire.conditions.ready.unwrap_or(true),
            serving: wire.conditions.serving.unwrap_or(true),
            terminating: wire.conditions.terminating.unwrap_or(false),
        },
        hostname: optional(wire.hostname),
        node: optional(wire.node_name),
        zone: optional(wire.zone),
        pod,
    })
}

fn slice_port(wire: wire::EndpointPort) -> Result<SlicePort, String> {
    Ok(SlicePort {
        name: optional(wire.name),
        protocol: protocol(wire.protocol.as_deref())?,
        port: wire.port.map(port).transpose()?,
    })
}
