//! NetworkPolicy. A policy is understood as a whole or not at all; one that is not, and of which no
//! earlier state is known, still isolates the pods it selects in the directions it names, and allows
//! nothing. If not even these two can be read, there is nothing to hold, and it is only reported.

use std::sync::Arc;

use super::selector::selector;
use super::{Converted, Invalid, cidr, id, is_audit, port, protocol};
use crate::model::{
    Block, Object, PeerSelector, Peers, PodPeers, Policy, PortMatch, PortRange, Ports, Rule,
    Selector,
};
use crate::watch::wire::{self, IntOrString};

/// A NetworkPolicy.
pub fn policy(wire: wire::NetworkPolicy) -> Result<Converted, Invalid> {
    let outline = wire::PolicyOutline {
        metadata: wire.metadata.clone(),
        spec: wire::PolicyOutlineSpec {
            pod_selector: wire.spec.pod_selector.clone(),
            policy_types: wire.spec.policy_types.clone(),
            has_egress: !wire.spec.egress.is_empty(),
        },
    };
    understood(wire).map_err(|reason| Invalid {
        closed: closed_policy(outline, &reason),
        reason,
    })
}

/// What is held of a policy that is not understood, for want of an earlier state.
pub fn closed_policy(outline: wire::PolicyOutline, reason: &str) -> Option<Object> {
    let directions = directions(&outline.spec.policy_types, outline.spec.has_egress).ok()?;
    let nothing = || {
        vec![Rule {
            peers: Peers::Of(vec![PeerSelector::Unsupported(reason.into())]),
            ports: Ports::Any,
        }]
    };
    Some(Object::Policy(Arc::new(Policy {
        id: id(&outline.metadata).ok()?,
        subject: selector(outline.spec.pod_selector).ok()?,
        ingress: directions.ingress.then(nothing),
        egress: directions.egress.then(nothing),
        is_audit: is_audit(&outline.metadata.annotations, &mut Vec::new()),
    })))
}

/// Which directions a policy isolates.
struct Directions {
    ingress: bool,
    egress: bool,
}

fn directions(types: &[String], has_egress: bool) -> Result<Directions, String> {
    if types.is_empty() {
        return Ok(Directions {
            ingress: true,
            egress: has_egress,
        });
    }
    let mut directions = Directions {
        ingress: false,
        egress: false,
    };
    for text in types {
        match text.as_str() {
            "Ingress" => directions.ingress = true,
            "Egress" => directions.egress = true,
            other => {
                return Err(format!(
                    "spec.policyTypes: {other:?} is not Ingress or Egress"
                ));
            }
        }
    }
    Ok(directions)
}

fn understood(wire: wire::NetworkPolicy) -> Result<Converted, String> {
    let spec = wire.spec;
    let directions = directions(&spec.policy_types, !spec.egress.is_empty())?;
    let ingress = rules("ingress", spec.ingress)?;
    let egress = rules("egress", spec.egress)?;
    let mut problems = Vec::new();
    let policy = Policy {
        id: id(&wire.metadata)?,
        subject: selector(spec.pod_selector).map_err(|e| format!("spec.podSelector: {e}"))?,
        ingress: directions.ingress.then_some(ingress),
        egress: directions.egress.then_some(egress),
        is_audit: is_audit(&wire.metadata.annotations, &mut problems),
    };
    Ok(Converted {
        object: Some(Object::Policy(Arc::new(policy))),
        problems,
    })
}

fn rules(direction: &str, wire: Vec<wire::Rule>) -> Result<Vec<Rule>, String> {
    wire.into_iter()
        .enumerate()
        .map(|(i, r)| rule(direction, r).map_err(|e| format!("spec.{direction}[{i}]{e}")))
        .collect()
}

fn rule(direction: &str, wire: wire::Rule) -> Result<Rule, String> {
    let (field, peers, other, misplaced) = if direction == "ingress" {
        ("from", wire.from, "to", wire.to)
    } else {
        ("to", wire.to, "from", wire.from)
    };
    if !misplaced.is_empty() {
        return Err(format!(": unknown field `{other}`, expected `{field}`"));
    }
    let peers = peers
        .into_iter()
        .enumerate()
        .map(|(i, p)| peer(p).map_err(|e| format!(".{field}[{i}]: {e}")))
        .collect::<Result<Vec<_>, _>>()?;
    let ports = wire
        .ports
        .into_iter()
        .enumerate()
        .map(|(i, p)| port_match(p).map_err(|e| format!(".ports[{i}]: {e}")))
        .collect::<Result<Vec<_>, _>>()?;
    Ok(Rule {
        peers: if peers.is_empty() {
            Peers::Any
        } else {
            Peers::Of(peers)
        },
        ports: if ports.is_empty() {
            Ports::Any
        } else {
            Ports::Of(ports)
        },
    })
}

fn peer(wire: wire::Peer) -> Result<PeerSelector, String> {
    match (wire.ip_block, wire.pod_selector, wire.namespace_selector) {
        (Some(b), None, None) => block(b).map(PeerSelector::Block),
        (Some(_), _, _) => Err("ipBlock stands beside another selector".to_owned()),
        (None, None, None) => Err("it has no selector".to_owned()),
        (None, pods, namespaces) => Ok(PeerSelector::Pods(PodPeers {
            namespaces: namespaces
                .map(selector)
                .transpose()
                .map_err(|e| format!("namespaceSelector: {e}"))?,
            pods: pods
                .map_or_else(|| Ok(Selector::default()), selector)
                .map_err(|e| format!("podSelector: {e}"))?,
        })),
    }
}

fn block(wire: wire::IpBlock) -> Result<Block, String> {
    let whole = cidr(&wire.cidr).map_err(|e| format!("ipBlock.cidr: {e}"))?;
    let mut except = wire
        .except
        .iter()
        .map(|text| {
            let part = cidr(text).map_err(|e| format!("ipBlock.except: {e}"))?;
            if whole.contains(&part) {
                Ok(part)
            } else {
                Err(format!("ipBlock.except: {part} is not within {whole}"))
            }
        })
        .collect::<Result<Vec<_>, String>>()?;
    except.sort_unstable();
    except.dedup();
    Ok(Block {
        cidr: whole,
        except,
    })
}

fn port_match(wire: wire::PolicyPort) -> Result<PortMatch, String> {
    let range = match (wire.port, wire.end_port) {
        (None, None) => PortRange::Any,
        (None, Some(_)) => return Err("endPort without port".to_owned()),
        (Some(IntOrString::Int(n)), end) => {
            let first = port(n)?;
            let last = end
                .map_or(Ok(first), port)
                .map_err(|e| format!("endPort: {e}"))?;
            if last < first {
                return Err(format!("endPort {last} is less than port {first}"));
            }
            PortRange::Numbers { first, last }
        }
        (Some(IntOrString::String(_)), Some(_)) => {
            return Err("endPort needs a numeric port".to_owned());
        }
        (Some(IntOrString::String(name)), None) if name.is_empty() => {
            return Err("the name of the port is empty".to_owned());
        }
        (Some(IntOrString::String(name)), None) => PortRange::Named(name.into()),
    };
    Ok(PortMatch {
        protocol: protocol(wire.protocol.as_deref())?,
        port: range,
    })
}
