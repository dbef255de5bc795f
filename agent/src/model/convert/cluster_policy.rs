//! ClusterNetworkPolicy. Nothing is taken for granted that the CRD's schema demands: the folder has no schema, and old API servers do not
//! check all of it.
//!
//! A peer of a kind that is not known here closes its rule, as the API says, and the other rules hold. Any other fault quarantines the
//! policy: what it said before holds. If it said nothing before, and its name, tier, priority and subject can be read, its rules
//! hold as far as they are understood, and the API's words for peers are taken for all others: an Accept matches nothing, and a Deny, a
//! Pass or what is none of the three denies everything. So it says nothing about a direction in which it has no rules.

use std::sync::Arc;

use ipnet::IpNet;
use serde::de::DeserializeOwned;
use serde_json::Value;
use weir_common::Protocol;

use super::selector::selector;
use super::{Converted, Invalid, Problem, cidr, is_audit, name, port};
use crate::model::{
    Block, ClusterPolicy, ClusterRule, Object, PeerSelector, Peers, PodPeers, PortMatch, PortRange,
    Ports, Rule, RuleAction, Selector, Tier,
};
use crate::watch::wire::{self, Fields};

/// "Priority is a value from 0 to 1000."
const PRIORITIES: std::ops::RangeInclusive<i64> = 0..=1000;
/// "A maximum of 25 rules is allowed in this block", and as many peers, protocols and networks.
const MOST: usize = 25;
/// Of the name of a rule: "no more than 100 characters in length".
const LONGEST_NAME: usize = 100;

/// A ClusterNetworkPolicy.
pub fn cluster_policy(wire: wire::ClusterNetworkPolicy) -> Result<Converted, Invalid> {
    let mut spec = wire.spec;
    spec.retain(|_, value| !value.is_null());
    let mut wrong = Vec::new();
    let name = name("metadata.name", &wire.metadata.name)?;
    let tier = tier(spec.remove("tier"))?;
    let priority = priority(spec.remove("priority"), &mut wrong)?;
    let subject = subject(spec.remove("subject"))?;
    let lists = [Direction::Ingress, Direction::Egress].map(|it| (it, spec.remove(it.field())));
    // It could narrow every rule.
    let is_closed = match spec.keys().next() {
        Some(field) => {
            wrong.push(format!(
                "spec.{field}: unknown field `{field}`, expected one of `tier`, `priority`, `subject`, `ingress`, `egress`"
            ));
            true
        }
        None => false,
    };
    let mut problems = Vec::new();
    let is_audit = is_audit(&wire.metadata.annotations, &mut problems);
    let [ingress, egress] = lists.map(|(direction, list)| {
        let mut reading = Reading {
            direction,
            is_closed,
            wrong: &mut wrong,
            problems: &mut problems,
        };
        reading.rules(list)
    });
    let object = Object::ClusterPolicy(Arc::new(ClusterPolicy {
        name,
        tier,
        priority,
        subject,
        ingress,
        egress,
        is_audit,
        is_stand_in: !wrong.is_empty(),
    }));
    match wrong.into_iter().next() {
        None => Ok(Converted {
            object: Some(object),
            problems,
        }),
        Some(reason) => Err(Invalid {
            reason,
            closed: Some(object),
        }),
    }
}

fn tier(value: Option<Value>) -> Result<Tier, String> {
    match text("spec.tier", value)?.as_str() {
        "Admin" => Ok(Tier::Admin),
        "Baseline" => Ok(Tier::Baseline),
        other => Err(format!("spec.tier: {other:?} is not Admin or Baseline")),
    }
}

/// One that is out of range stands at its end, in what is held for want of better.
fn priority(value: Option<Value>, wrong: &mut Vec<String>) -> Result<u16, String> {
    let value = value.ok_or("spec.priority is missing")?;
    let number: i64 = read("spec.priority", value)?;
    if !PRIORITIES.contains(&number) {
        wrong.push(format!("spec.priority: {number} is not within 0 to 1000"));
    }
    let number = number.clamp(*PRIORITIES.start(), *PRIORITIES.end());
    u16::try_from(number).map_err(|e| e.to_string())
}

/// "Exactly one field must be set."
fn subject(value: Option<Value>) -> Result<PodPeers, String> {
    let value = value.ok_or("spec.subject is missing")?;
    let fields: Fields = read("spec.subject", value)?;
    match known("spec.subject", fields, &["namespaces", "pods"])? {
        Said::Of(field, value) => pods(&format!("spec.subject.{field}"), field, value),
        Said::Unknown(field) => Err(format!(
            "spec.subject.{field}: unknown field `{field}`, expected `namespaces` or `pods`"
        )),
        Said::Nothing => Err("spec.subject: it has neither namespaces nor pods".to_owned()),
    }
}

/// Which way rules are about.
#[derive(Clone, Copy)]
enum Direction {
    Ingress,
    Egress,
}

impl Direction {
    const fn field(self) -> &'static str {
        match self {
            Self::Ingress => "ingress",
            Self::Egress => "egress",
        }
    }

    const fn peers(self) -> &'static str {
        match self {
            Self::Ingress => "from",
            Self::Egress => "to",
        }
    }

    /// The peers that this version understands.
    const fn known(self) -> &'static [&'static str] {
        match self {
            Self::Ingress => &["namespaces", "pods"],
            Self::Egress => &["namespaces", "pods", "networks"],
        }
    }
}

/// The rules of one direction, and what is found to be wrong with them.
struct Reading<'a> {
    direction: Direction,
    /// All of them, for a reason outside of them.
    is_closed: bool,
    wrong: &'a mut Vec<String>,
    problems: &'a mut Vec<Problem>,
}

impl Reading<'_> {
    fn rules(&mut self, list: Option<Value>) -> Vec<ClusterRule> {
        let at = format!("spec.{}", self.direction.field());
        let list: Vec<Value> = match list.map(|list| read(&at, list)).transpose() {
            Ok(list) => list.unwrap_or_default(),
            Err(reason) => {
                let rule = closed(RuleAction::Deny, None, &reason);
                self.wrong.push(reason);
                return vec![rule];
            }
        };
        if list.len() > MOST {
            self.wrong
                .push(format!("{at}: {} rules are more than {MOST}", list.len()));
        }
        let rules = list.into_iter().enumerate();
        rules
            .map(|(i, value)| self.rule(&format!("{at}[{i}]"), value))
            .collect()
    }

    fn rule(&mut self, at: &str, value: Value) -> ClusterRule {
        let text = |field: &str| value.get(field).and_then(Value::as_str).map(str::to_owned);
        let action = text("action").and_then(|it| action(&it));
        let name = super::optional(text("name"));
        let close = |reason: &str| closed(action.unwrap_or(RuleAction::Deny), name, reason);
        let read = read(at, value).and_then(|wire| self.understood(at, wire));
        match read {
            Ok(_) if self.is_closed => close("a field of its policy is not known"),
            Ok(rule) => rule,
            Err(reason) => {
                let rule = close(&reason);
                self.wrong.push(reason);
                rule
            }
        }
    }

    fn understood(&mut self, at: &str, wire: wire::ClusterRule) -> Result<ClusterRule, String> {
        let length = wire.name.chars().count();
        if length > LONGEST_NAME {
            return Err(format!(
                "{at}.name: {length} characters are more than {LONGEST_NAME}"
            ));
        }
        let name = super::optional(Some(wire.name));
        let action = action(&wire.action)
            .ok_or_else(|| format!("{at}.action: {:?} is not Accept, Deny or Pass", wire.action))?;
        let field = self.direction.peers();
        let (list, other, misplaced) = match self.direction {
            Direction::Ingress => (wire.from, "to", wire.to),
            Direction::Egress => (wire.to, "from", wire.from),
        };
        if misplaced.is_some() {
            return Err(format!("{at}: unknown field `{other}`, expected `{field}`"));
        }
        let list = counted(&format!("{at}.{field}"), list.unwrap_or_default())?;
        let ports = match wire.protocols {
            None => Ports::Any,
            Some(list) => Ports::Of(ports(&format!("{at}.protocols"), list)?),
        };
        let mut peers = Vec::new();
        let mut unknown = Vec::new();
        for (i, fields) in list.into_iter().enumerate() {
            let at = format!("{at}.{field}[{i}]");
            match peer(self.direction, &at, fields)? {
                Peer::Of(of) => peers.extend(of),
                Peer::Unknown(what) => unknown.push((at, what)),
            }
        }
        if let Ports::Of(matches) = &ports
            && matches
                .iter()
                .any(|it| matches!(it.port, PortRange::Named(_)))
            && peers.iter().any(|it| matches!(it, PeerSelector::Block(_)))
        {
            // "networks/nodes/domainNames peer cannot be set with namedPorts since there are no namedPorts for
            // networks/nodes/domainNames"
            return Err(format!(
                "{at}: destinationNamedPort stands beside networks, which have no names of ports"
            ));
        }
        let Some((_, first)) = unknown.first() else {
            let rule = Rule {
                peers: Peers::Of(peers),
                ports,
            };
            return Ok(ClusterRule { name, action, rule });
        };
        let rule = closed(action, name, first);
        let so = match rule.action {
            RuleAction::Accept => "its rule matches nothing",
            _ => "its rule denies everything",
        };
        self.problems
            .extend(unknown.into_iter().map(|(part, what)| Problem {
                part,
                reason: format!("{what}: {so}"),
            }));
        Ok(rule)
    }
}

/// "For "Accept" rules, "fail closed" means: "treat the rule as matching no traffic". For "Deny" and "Pass" rules, "fail closed"
/// means: "treat the rule as a 'Deny all' rule"."
fn closed(action: RuleAction, name: Option<Arc<str>>, reason: &str) -> ClusterRule {
    let (action, peers) = match action {
        RuleAction::Accept => {
            let nobody = PeerSelector::Unsupported(reason.into());
            (RuleAction::Accept, Peers::Of(vec![nobody]))
        }
        RuleAction::Deny | RuleAction::Pass => (RuleAction::Deny, Peers::Any),
    };
    let rule = Rule {
        peers,
        ports: Ports::Any,
    };
    ClusterRule { name, action, rule }
}

fn action(text: &str) -> Option<RuleAction> {
    Some(match text {
        "Accept" => RuleAction::Accept,
        "Deny" => RuleAction::Deny,
        "Pass" => RuleAction::Pass,
        _ => return None,
    })
}

enum Peer {
    Of(Vec<PeerSelector>),
    /// Of a kind that is not known, with what to say about it.
    Unknown(String),
}

/// "Exactly one of the fields must be set for a given peer … If an implementation sees no fields are set then it can infer that the
/// deployed CRD is of an incompatible version with an unknown field." So it is with a field that it sees and does not know.
fn peer(direction: Direction, at: &str, fields: Fields) -> Result<Peer, String> {
    let (field, value) = match known(at, fields, direction.known())? {
        Said::Of(field, value) => (field, value),
        Said::Unknown(field) => {
            return Ok(Peer::Unknown(match field.as_str() {
                "nodes" | "domainNames" => format!("{field} is experimental, and not supported"),
                _ => format!("{field} is not a known kind of peer"),
            }));
        }
        Said::Nothing => {
            return Ok(Peer::Unknown("it is of no known kind of peer".to_owned()));
        }
    };
    let at = format!("{at}.{field}");
    Ok(Peer::Of(match field {
        "networks" => networks(&at, value)?
            .into_iter()
            .map(|cidr| {
                let except = Vec::new();
                PeerSelector::Block(Block { cidr, except })
            })
            .collect(),
        _ => vec![PeerSelector::Pods(pods(&at, field, value)?)],
    }))
}

/// What an object says of which one field is to be set.
enum Said {
    Of(&'static str, Value),
    Unknown(String),
    Nothing,
}

fn known(at: &str, mut fields: Fields, known: &[&'static str]) -> Result<Said, String> {
    fields.retain(|_, value| !value.is_null());
    if let Some(field) = fields.keys().find(|it| !known.contains(&it.as_str())) {
        return Ok(Said::Unknown(field.clone()));
    }
    let mut set = known
        .iter()
        .filter_map(|field| Some((*field, fields.remove(*field)?)));
    match (set.next(), set.next()) {
        (Some((one, _)), Some((other, _))) => {
            Err(format!("{at}: {one} and {other} exclude each other"))
        }
        (Some((field, value)), None) => Ok(Said::Of(field, value)),
        (None, _) => Ok(Said::Nothing),
    }
}

/// `namespaces` ("all pods within a set of Namespaces") or `pods`.
fn pods(at: &str, field: &str, value: Value) -> Result<PodPeers, String> {
    let part = |name: &str, wire| selector(wire).map_err(|e| format!("{at}{name}: {e}"));
    if field == "namespaces" {
        return Ok(PodPeers {
            namespaces: Some(part("", read(at, value)?)?),
            pods: Selector::default(),
        });
    }
    let wire: wire::NamespacedPod = read(at, value)?;
    Ok(PodPeers {
        namespaces: Some(part(".namespaceSelector", wire.namespace_selector)?),
        pods: part(".podSelector", wire.pod_selector)?,
    })
}

fn networks(at: &str, value: Value) -> Result<Vec<IpNet>, String> {
    let texts: Vec<String> = read(at, value)?;
    let mut networks = Vec::new();
    for (i, text) in counted(at, texts)?.into_iter().enumerate() {
        let network = cidr(&text).map_err(|e| format!("{at}[{i}]: {e}"))?;
        // "isCIDR(self) && cidr(self) == cidr(self).masked()"
        if text.parse() != Ok(network) {
            return Err(format!(
                "{at}[{i}]: {text} has bits behind its length, {network} has none"
            ));
        }
        // "+listType=set"
        if networks.contains(&network) {
            return Err(format!("{at}[{i}]: {network} stands there twice"));
        }
        networks.push(network);
    }
    Ok(networks)
}

fn ports(at: &str, list: Vec<wire::ClusterProtocol>) -> Result<Vec<PortMatch>, String> {
    let mut ports = Vec::new();
    for (i, item) in counted(at, list)?.into_iter().enumerate() {
        let of_item = protocol(item).map_err(|e| format!("{at}[{i}]{e}"))?;
        ports.extend(of_item);
    }
    Ok(ports)
}

/// "Exactly one field must be set." An error begins with where in the item it is.
fn protocol(wire: wire::ClusterProtocol) -> Result<Vec<PortMatch>, String> {
    let named = Some(wire.destination_named_port).filter(|name| !name.is_empty());
    let all = [
        ("tcp", Protocol::TCP, wire.tcp),
        ("udp", Protocol::UDP, wire.udp),
        ("sctp", Protocol::SCTP, wire.sctp),
    ];
    let mut set = all
        .into_iter()
        .filter_map(|(field, protocol, ports)| Some((field, protocol, ports?)));
    match (set.next(), set.next(), named) {
        (Some((field, protocol, wire)), None, None) => {
            let port = number(wire).map_err(|e| format!(".{field}{e}"))?;
            Ok(vec![PortMatch { protocol, port }])
        }
        // "DestinationNamedPort selects a destination port on a pod based on the ContainerPort name", whatever
        // its protocol.
        (None, None, Some(name)) => {
            let port = PortRange::Named(name.into());
            let protocols = [Protocol::TCP, Protocol::UDP, Protocol::SCTP];
            Ok(protocols
                .map(|protocol| PortMatch {
                    protocol,
                    port: port.clone(),
                })
                .into())
        }
        (None, _, None) => {
            Err(": it has none of tcp, udp, sctp and destinationNamedPort".to_owned())
        }
        _ => Err(": tcp, udp, sctp and destinationNamedPort exclude each other".to_owned()),
    }
}

/// "You must specify either Port or Range."
fn number(wire: wire::ClusterPorts) -> Result<PortRange, String> {
    let Some(wire) = wire.destination_port else {
        return Err(": it has no destinationPort".to_owned());
    };
    let in_range =
        |at: &str, number| port(number).map_err(|e| format!(".destinationPort{at}: {e}"));
    let (first, last) = match (wire.number, wire.range) {
        (Some(number), None) => {
            let port = in_range(".number", number)?;
            (port, port)
        }
        (None, Some(range)) => {
            let first = in_range(".range.start", range.start)?;
            let last = in_range(".range.end", range.end)?;
            // "the Start value must be less than End"
            if first >= last {
                return Err(format!(
                    ".destinationPort.range: start {first} is not less than end {last}"
                ));
            }
            (first, last)
        }
        (None, None) => {
            return Err(".destinationPort: it has neither number nor range".to_owned());
        }
        (Some(_), Some(_)) => {
            return Err(".destinationPort: number and range exclude each other".to_owned());
        }
    };
    Ok(PortRange::Numbers { first, last })
}

/// 1 to 25, as the CRD demands of each of its lists.
fn counted<T>(at: &str, list: Vec<T>) -> Result<Vec<T>, String> {
    match list.len() {
        0 => Err(format!("{at}: it must contain at least one item")),
        n if n > MOST => Err(format!("{at}: {n} items are more than {MOST}")),
        _ => Ok(list),
    }
}

fn text(at: &str, value: Option<Value>) -> Result<String, String> {
    let value = value.ok_or_else(|| format!("{at} is missing"))?;
    read(at, value)
}

/// A part of the object. An error says where in it.
fn read<T: DeserializeOwned>(at: &str, value: Value) -> Result<T, String> {
    serde_path_to_error::deserialize(value).map_err(|e| {
        let path = e.path().to_string();
        let cause = e.inner();
        match path.chars().next() {
            None | Some('.') => format!("{at}: {cause}"),
            Some('[') => format!("{at}{path}: {cause}"),
            Some(_) => format!("{at}.{path}: {cause}"),
        }
    })
}
