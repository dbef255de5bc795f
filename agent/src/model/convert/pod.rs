//! Pod.

use std::sync::Arc;

use super::{Converted, Invalid, Problem, id, labels, optional, port, protocol, unicast};
use crate::model::{ContainerPort, HostPort, Object, Pod, PodNetwork, PodPhase};
use crate::watch::wire;

/// A Pod. A bad address or container port is left out.
pub fn pod(wire: wire::Pod) -> Result<Converted, Invalid> {
    let (meta, spec, status) = (wire.metadata, wire.spec, wire.status);
    let id = id(&meta)?;
    let mut problems = Vec::new();

    let texts: Vec<String> = if status.pod_ips.is_empty() {
        status.pod_ip.into_iter().collect()
    } else {
        status.pod_ips.into_iter().map(|p| p.ip).collect()
    };
    let mut addresses = Vec::with_capacity(texts.len());
    for (i, text) in texts.iter().enumerate().filter(|(_, t)| !t.is_empty()) {
        match unicast(text) {
            Ok(ip) => addresses.push(ip),
            Err(reason) => problems.push(Problem {
                part: format!("address {i}"),
                reason,
            }),
        }
    }

    let sidecars = spec
        .init_containers
        .into_iter()
        .filter(|c| c.restart_policy.as_deref() == Some("Always"));
    let declared = spec
        .containers
        .into_iter()
        .chain(sidecars)
        .flat_map(|c| c.ports);
    let mut ports = Vec::new();
    for (i, wire) in declared.enumerate() {
        match container_port(wire) {
            Ok(port) => ports.push(port),
            Err(reason) => problems.push(Problem {
                part: format!("port {i}"),
                reason,
            }),
        }
    }

    let phase = match status.phase.as_deref() {
        // A finished pod has given its addresses back, whether it is being deleted or not.
        Some("Succeeded" | "Failed") => PodPhase::Finished,
        _ if meta.deletion_timestamp.is_some() => PodPhase::Terminating,
        // A node that cannot be reached leaves its pods `Unknown`, and they may well be running.
        Some("Running" | "Unknown") => PodPhase::Running,
        _ => PodPhase::Pending,
    };
    let ready = status
        .conditions
        .iter()
        .any(|c| c.kind == "Ready" && c.status == "True");
    Ok(Converted {
        object: Some(Object::Pod(Arc::new(Pod {
            id,
            uid: meta.uid.into(),
            static_uid: optional(meta.annotations.config_mirror),
            labels: labels(meta.labels),
            node: optional(spec.node_name),
            addresses,
            network: if spec.host_network == Some(true) {
                PodNetwork::Host
            } else {
                PodNetwork::Own
            },
            phase,
            ready,
            hostname: optional(spec.hostname),
            subdomain: optional(spec.subdomain),
            ports,
        }))),
        problems,
    })
}

fn container_port(wire: wire::ContainerPort) -> Result<ContainerPort, String> {
    Ok(ContainerPort {
        name: optional(wire.name),
        protocol: protocol(wire.protocol.as_deref())?,
        port: port(wire.container_port)?,
        host: host_port(wire.host_port, wire.host_ip.as_deref())?,
    })
}

/// An unspecified `hostIP` of either family means every address of the node, as an absent one does.
fn host_port(number: Option<i64>, address: Option<&str>) -> Result<Option<HostPort>, String> {
    let number = match number {
        None | Some(0) => return Ok(None),
        Some(number) => port(number).map_err(|e| format!("hostPort: {e}"))?,
    };
    let address = match address {
        None | Some("") => None,
        Some(text) => Some(super::address(text).map_err(|e| format!("hostIP: {e}"))?),
    };
    Ok(Some(HostPort {
        port: number,
        address: address.filter(|ip| !ip.is_unspecified()),
    }))
}
