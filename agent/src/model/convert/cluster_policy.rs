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
use super::{
    Converted, ENFORCEMENT, Faults, Invalid, Problem, cidr, enforced, is_audit, name, port,
};
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
    let mut wrong = Faults::default();
    let name = wrong.keep(name("metadata.name", &wire.metadata.name));
    let tier = wrong.keep(tier(spec.remove("tier")));
    let priority = priority(spec.remove("priority"), &mut wrong);
    let subject = wrong.keep(subject(spec.remove("subject")));
    let lists = [Direction::Ingress, Direction::Egress].map(|it| (it, spec.remove(it.field())));
    for field in spec.keys() {
        wrong.push(format!(
            "spec.{field}: unknown field `{field}`, expected one of `tier`, `priority`, `subject`, `ingress`, `egress`"
        ));
    }
    // It could narrow every rule.
    let is_closed = !spec.is_empty();
    let mut unknown = Vec::new();
    let [ingress, egress] = lists.map(|(direction, list)| {
        let mut reading = Reading {
            direction,
            is_closed,
            wrong: &mut wrong,
            unknown: &mut unknown,
        };
        reading.rules(list)
    });
    let is_audit = is_audit(&wire.metadata.annotations);
    let is_stand_in = !wrong.is_empty();
    let all = (name, tier, priority, subject);
    let object = match all {
        (Some(name), Some(tier), Some(priority), Some(subject)) => Some(ClusterPolicy {
            name,
            tier,
            priority,
            subject,
            ingress,
            egress,
            is_audit: *is_audit.as_ref().unwrap_or(&false),
            is_stand_in,
        }),
        _ => None,
    };
    let object = object.map(|it| Object::ClusterPolicy(Arc::new(it)));
    if !is_stand_in {
        let problems = is_audit.err().map(|why| enforced(&why));
        let peers = unknown.iter().map(Unknown::problem);
        return Ok(Converted {
            object,
            problems: problems.into_iter().chain(peers).collect(),
        });
    }
    for Unknown { part, what, .. } in unknown {
        wrong.push(format!("{part}: {what}"));
    }
    wrong.keep(is_audit.map_err(|why| format!("{ENFORCEMENT}: {why}")));
    Err(Invalid {
        reason: wrong.reason(),
        closed: object,
    })
}

fn tier(value: Option<Value>) -> Result<Tier, String> {
    match text("spec.tier", value)?.as_str() {
        "Admin" => Ok(Tier::Admin),
        "Baseline" => Ok(Tier::Baseline),
        other => Err(format!("spec.tier: {other:?} is not Admin or Baseline")),
    }
}

/// One that is out of range stands at its end, in what is held for want of better.
fn priority(value: Option<Value>, wrong: &mut Faults) -> Option<u16> {
    let value = value.ok_or_else(|| "spec.priority is missing".to_owned());
    let number = wrong.keep(value.and_then(|value| read::<i64>("spec.priority", value)))?;
    if !PRIORITIES.contains(&number) {
        wrong.push(format!("spec.priority: {number} is not within 0 to 1000"));
    }
    let number = number.clamp(*PRIORITIES.start(), *PRIORITIES.end());
    u16::try_from(number).ok()
}

/// "Exactly one field must be set."
fn subject(value: Option<Value>) -> Result<PodPeers, Faults> {
    let value = value.ok_or_else(|| "spec.subject is missing".to_owned())?;
    let fields: Fields = read("spec.subject", value)?;
    match known("spec.subject", fields, &["namespaces", "pods"])? {
        Said::Of(field, value) => pods(&format!("spec.subject.{field}"), field, value),
        Said::Unknown(field) => Err(Faults::from(format!(
            "spec.subject.{field}: unknown field `{field}`, expected `namespaces` or `pods`"
        ))),
        Said::Nothing => Err(Faults::from(
            "spec.subject: it has neither namespaces nor pods".to_owned(),
        )),
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
    wrong: &'a mut Faults,
    unknown: &'a mut Vec<Unknown>,
}

/// A peer of a kind that is not known.
struct Unknown {
    part: String,
    what: String,
    action: RuleAction,
}

impl Unknown {
    /// Where nothing else is wrong.
    fn problem(&self) -> Problem {
        let so = match self.action {
            RuleAction::Accept => "its rule matches nothing",
            _ => "its rule denies everything",
        };
        Problem {
            part: self.part.clone(),
            reason: format!("{}: {so}", self.what),
        }
    }
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
        let read = read(at, value).map_err(Faults::from);
        let faults = match read.and_then(|wire| self.understood(at, wire)) {
            Ok(_) if self.is_closed => return close("a field of its policy is not known"),
            Ok(rule) => return rule,
            Err(faults) => faults,
        };
        let rule = close(faults.0.first().map_or("", |it| it));
        self.wrong.0.extend(faults.0);
        rule
    }

    fn understood(&mut self, at: &str, wire: wire::ClusterRule) -> Result<ClusterRule, Faults> {
        let mut wrong = Faults::default();
        let length = wire.name.chars().count();
        if length > LONGEST_NAME {
            wrong.push(format!(
                "{at}.name: {length} characters are more than {LONGEST_NAME}"
            ));
        }
        let name = super::optional(Some(wire.name));
        let action = action(&wire.action)
            .ok_or_else(|| format!("{at}.action: {:?} is not Accept, Deny or Pass", wire.action));
        let action = wrong.keep(action);
        let field = self.direction.peers();
        let (list, other, misplaced) = match self.direction {
            Direction::Ingress => (wire.from, "to", wire.to),
            Direction::Egress => (wire.to, "from", wire.from),
        };
        if misplaced.is_some() {
            wrong.push(format!("{at}: unknown field `{other}`, expected `{field}`"));
        }
        let list = counted(&format!("{at}.{field}"), list.unwrap_or_default());
        let list = wrong.keep(list).unwrap_or_default();
        let ports = wire.protocols.map(|list| {
            let ports = ports(&format!("{at}.protocols"), list);
            Ports::Of(wrong.keep(ports).unwrap_or_default())
        });
        let mut peers = Vec::new();
        let mut unknown = Vec::new();
        for (i, fields) in list.into_iter().enumerate() {
            let part = format!("{at}.{field}[{i}]");
            match wrong.keep(peer(self.direction, &part, fields)) {
                Some(Peer::Of(of)) => peers.extend(of),
                Some(Peer::Unknown(what)) => unknown.push((part, what)),
                None => {}
            }
        }
        if let Some(Ports::Of(matches)) = &ports
            && matches
                .iter()
                .any(|it| matches!(it.port, PortRange::Named(_)))
            && peers.iter().any(|it| matches!(it, PeerSelector::Block(_)))
        {
            // "networks/nodes/domainNames peer cannot be set with namedPorts since there are no namedPorts for
            // networks/nodes/domainNames"
            wrong.push(format!(
                "{at}: destinationNamedPort stands beside networks, which have no names of ports"
            ));
        }
        // Of a rule that is closed as a whole, too.
        let meant = action.unwrap_or(RuleAction::Deny);
        let first = unknown.first().map(|(_, what)| what.clone());
        let unknown = unknown.into_iter().map(|(part, what)| Unknown {
            part,
            what,
            action: meant,
        });
        self.unknown.extend(unknown);
        let Some(action) = action else {
            return Err(wrong);
        };
        if let Some(what) = first {
            return wrong.or(closed(action, name, &what));
        }
        let rule = Rule {
            peers: Peers::Of(peers),
            ports: ports.unwrap_or(Ports::Any),
        };
        wrong.or(ClusterRule { name, action, rule })
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
fn peer(direction: Direction, at: &str, fields: Fields) -> Result<Peer, Faults> {
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
fn pods(at: &str, field: &str, value: Value) -> Result<PodPeers, Faults> {
    let part = |name: &str, wire| selector(wire).map_err(|e| format!("{at}{name}: {e}"));
    if field == "namespaces" {
        return Ok(PodPeers {
            namespaces: Some(part("", read(at, value)?)?),
            pods: Selector::default(),
        });
    }
    let wire: wire::NamespacedPod = read(at, value)?;
    let mut wrong = Faults::default();
    let namespaces = wrong.keep(part(".namespaceSelector", wire.namespace_selector));
    let pods = wrong.keep(part(".podSelector", wire.pod_selector));
    let pods = pods.unwrap_or_default();
    wrong.or(PodPeers { namespaces, pods })
}

/// Each once, however it is written: the API server compares texts ("+listType=set"), and takes one network in two
/// spellings.
fn networks(at: &str, value: Value) -> Result<Vec<IpNet>, Faults> {
    let texts: Vec<String> = read(at, value)?;
    let mut wrong = Faults::default();
    let mut networks = Vec::new();
    for (i, text) in counted(at, texts)?.into_iter().enumerate() {
        let network = cidr(&text).map_err(|e| format!("{at}[{i}]: {e}"));
        let Some(network) = wrong.keep(network) else {
            continue;
        };
        // "isCIDR(self) && cidr(self) == cidr(self).masked()"
        if text.parse() != Ok(network) {
            wrong.push(format!(
                "{at}[{i}]: {text} has bits behind its length, {network} has none"
            ));
        }
        if !networks.contains(&network) {
            networks.push(network);
        }
    }
    wrong.or(networks)
}

fn ports(at: &str, list: Vec<wire::ClusterProtocol>) -> Result<Vec<PortMatch>, Faults> {
    let mut wrong = Faults::default();
    let mut ports = Vec::new();
    for (i, item) in counted(at, list)?.into_iter().enumerate() {
        let of_item = protocol(item).map_err(|e| format!("{at}[{i}]{e}"));
        ports.extend(wrong.keep(of_item).into_iter().flatten());
    }
    wrong.or(ports)
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
