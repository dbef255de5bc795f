//! Node and Namespace.

use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;

use super::{Converted, Invalid, Problem, cidr, labels, name, unicast};
use crate::model::{
    AGENT_AWAY, AGENT_READY, NETWORK_UNAVAILABLE, Namespace, NamespacePhase, NetworkSaid, Node,
    Object,
};
use crate::watch::wire;

/// A Namespace.
pub fn namespace(wire: wire::Namespace) -> Result<Converted, Invalid> {
    let meta = wire.metadata;
    let mut problems = Vec::new();
    let keeps_established = match meta.annotations.established.as_deref() {
        None | Some("judge") => false,
        Some("keep") => true,
        Some(other) => {
            problems.push(Problem {
                part: "annotation weir.local/established-connections".to_owned(),
                reason: format!("{other:?} is neither \"keep\" nor \"judge\""),
            });
            false
        }
    };
    let terminating =
        meta.deletion_timestamp.is_some() || wire.status.phase.as_deref() == Some("Terminating");
    let namespace = Namespace {
        name: name("metadata.name", &meta.name)?,
        labels: labels(meta.labels),
        phase: if terminating {
            NamespacePhase::Terminating
        } else {
            NamespacePhase::Active
        },
        keeps_established,
    };
    Ok(Converted {
        object: Some(Object::Namespace(Arc::new(namespace))),
        problems,
    })
}

/// A Node. A bad address is left out; a bad pod CIDR is too, since it would route somebody else's
/// addresses.
pub fn node(wire: wire::Node) -> Result<Converted, Invalid> {
    let meta = wire.metadata;
    let mut problems = Vec::new();
    let mut addresses = Vec::new();
    let mut internal: Vec<IpAddr> = Vec::new();
    for (i, address) in wire.status.addresses.iter().enumerate() {
        if !matches!(address.kind.as_str(), "InternalIP" | "ExternalIP") {
            continue;
        }
        match unicast(&address.address) {
            Ok(ip) => {
                addresses.push(ip);
                // The first of a family is the node's own choice, as for the pods in its network.
                let is_first = internal.iter().all(|it| it.is_ipv4() != ip.is_ipv4());
                if address.kind == "InternalIP" && is_first {
                    internal.push(ip);
                }
            }
            Err(reason) => problems.push(Problem {
                part: format!("address {i}"),
                reason,
            }),
        }
    }
    let texts = if wire.spec.pod_cidrs.is_empty() {
        wire.spec.pod_cidr.as_slice()
    } else {
        wire.spec.pod_cidrs.as_slice()
    };
    let mut pod_cidrs: Vec<IpNet> = Vec::new();
    for (i, text) in texts.iter().enumerate().filter(|(_, t)| !t.is_empty()) {
        match cidr(text) {
            Ok(net) => {
                let same = |it: &&IpNet| it.addr().is_ipv4() == net.addr().is_ipv4();
                match pod_cidrs.iter().find(same) {
                    None => pod_cidrs.push(net),
                    Some(first) => problems.push(Problem {
                        part: format!("pod CIDR {i}"),
                        reason: format!("{net} is of the same family as {first}, which counts"),
                    }),
                }
            }
            Err(reason) => problems.push(Problem {
                part: format!("pod CIDR {i}"),
                reason,
            }),
        }
    }
    let mut conditions = wire.status.conditions.iter();
    let said = conditions.find(|it| it.kind == NETWORK_UNAVAILABLE);
    let network = match said.map(|it| (it.status.as_str(), it.reason.as_str())) {
        None => NetworkSaid::Nothing,
        Some(("True", AGENT_AWAY)) => NetworkSaid::AgentAway,
        Some(("False", AGENT_READY)) => NetworkSaid::AgentReady,
        Some(_) => NetworkSaid::BySomebodyElse,
    };
    Ok(Converted {
        object: Some(Object::Node(Arc::new(Node {
            name: name("metadata.name", &meta.name)?,
            labels: labels(meta.labels),
            addresses,
            internal,
            pod_cidrs,
            network,
        }))),
        problems,
    })
}
