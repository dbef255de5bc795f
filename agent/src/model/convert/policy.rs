//! NetworkPolicy. A policy is understood as a whole or not at all; one that is not, and of which no
//! earlier state is known, still isolates the pods it selects in the directions it names, and allows
//! nothing. If not even these two can be read, there is nothing to hold, and it is only reported.

use std::sync::Arc;

use super::selector::selector;
use super::{
    Converted, ENFORCEMENT, Faults, Invalid, cidr, enforced, id, is_audit, port, protocol,
};
use crate::model::{
    Block, Object, PeerSelector, Peers, PodPeers, Policy, PortMatch, PortRange, Ports, Rule,
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
    understood(wire).map_err(|faults| {
        let reason = faults.reason();
        Invalid {
            closed: closed_policy(outline, &reason),
            reason,
        }
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
        is_audit: is_audit(&outline.metadata.annotations).unwrap_or_default(),
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

fn understood(wire: wire::NetworkPolicy) -> Result<Converted, Faults> {
    let spec = wire.spec;
    let mut wrong = Faults::default();
    let id = wrong.keep(id(&wire.metadata));
    let subject = selector(spec.pod_selector).map_err(|e| format!("spec.podSelector: {e}"));
    let subject = wrong.keep(subject);
    let directions = wrong.keep(directions(&spec.policy_types, !spec.egress.is_empty()));
    let ingress = wrong.keep(rules("ingress", spec.ingress));
    let egress = wrong.keep(rules("egress", spec.egress));
    let is_audit = is_audit(&wire.metadata.annotations);
    let all = (id, subject, directions, ingress, egress);
    let (Some(id), Some(subject), Some(directions), Some(ingress), Some(egress)) = all else {
        let annotation = is_audit.map_err(|why| format!("{ENFORCEMENT}: {why}"));
        wrong.keep(annotation);
        return Err(wrong);
    };
    let problems = is_audit.as_ref().err().map(|why| enforced(why));
    let policy = Policy {
        id,
        subject,
        ingress: directions.ingress.then_some(ingress),
        egress: directions.egress.then_some(egress),
        is_audit: is_audit.unwrap_or_default(),
    };
    Ok(Converted {
        object: Some(Object::Policy(Arc::new(policy))),
        problems: problems.into_iter().collect(),
    })
}

fn rules(direction: &str, wire: Vec<wire::Rule>) -> Result<Vec<Rule>, Faults> {
    each(wire, &format!("spec.{direction}"), |it| rule(direction, it))
}

/// Each item of a list, with its place in what is wrong with it.
fn each<W, T, E: Into<Faults>>(
    list: Vec<W>,
    at: &str,
    read: impl Fn(W) -> Result<T, E>,
) -> Result<Vec<T>, Faults> {
    let mut wrong = Faults::default();
    let mut all = Vec::new();
    for (i, item) in list.into_iter().enumerate() {
        let item = read(item).map_err(|e| e.into().at(&format!("{at}[{i}]")));
        all.extend(wrong.keep(item));
    }
    wrong.or(all)
}

fn rule(direction: &str, wire: wire::Rule) -> Result<Rule, Faults> {
    let (field, peers, other, misplaced) = if direction == "ingress" {
        ("from", wire.from, "to", wire.to)
    } else {
        ("to", wire.to, "from", wire.from)
    };
    let mut wrong = Faults::default();
    if !misplaced.is_empty() {
        wrong.push(format!(": unknown field `{other}`, expected `{field}`"));
    }
    let peer = |it| peer(it).map_err(|faults| faults.at(": "));
    let peers = wrong.keep(each(peers, &format!(".{field}"), peer));
    let port = |it| port_match(it).map_err(|e| format!(": {e}"));
    let ports = wrong.keep(each(wire.ports, ".ports", port));
    let (peers, ports) = (peers.unwrap_or_default(), ports.unwrap_or_default());
    wrong.or(Rule {
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

fn peer(wire: wire::Peer) -> Result<PeerSelector, Faults> {
    match (wire.ip_block, wire.pod_selector, wire.namespace_selector) {
        (Some(b), None, None) => block(b).map(PeerSelector::Block),
        (Some(_), _, _) => Err("ipBlock stands beside another selector".to_owned().into()),
        (None, None, None) => Err("it has no selector".to_owned().into()),
        (None, pods, namespaces) => {
            let mut wrong = Faults::default();
            let mut part = |name: &str, wire: Option<wire::LabelSelector>| {
                let read = wire.map(|it| selector(it).map_err(|e| format!("{name}: {e}")));
                wrong.keep(read.transpose()).flatten()
            };
            let namespaces = part("namespaceSelector", namespaces);
            let pods = part("podSelector", pods).unwrap_or_default();
            wrong.or(PeerSelector::Pods(PodPeers { namespaces, pods }))
        }
    }
}

fn block(wire: wire::IpBlock) -> Result<Block, Faults> {
    let mut wrong = Faults::default();
    let whole = wrong.keep(cidr(&wire.cidr).map_err(|e| format!("ipBlock.cidr: {e}")));
    let mut except = Vec::new();
    for text in &wire.except {
        let part = cidr(text).map_err(|e| format!("ipBlock.except: {e}"));
        let Some(part) = wrong.keep(part) else {
            continue;
        };
        match &whole {
            Some(whole) if !whole.contains(&part) => {
                wrong.push(format!("ipBlock.except: {part} is not within {whole}"));
            }
            _ => except.push(part),
        }
    }
    except.sort_unstable();
    except.dedup();
    match whole {
        Some(cidr) => wrong.or(Block { cidr, except }),
        None => Err(wrong),
    }
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
