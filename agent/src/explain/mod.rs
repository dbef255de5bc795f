//! Why something may pass or not, asked about by people: who is meant, who decides about them, and what it comes to. The decisions are
//! `compile::policy`'s, and the words of the answer `said`'s. What needs the line is taken there, as a [`Matter`]; the rest is done
//! wherever there is time.

pub mod diff;
pub mod expect;
mod folder;
mod said;
mod suggest;
#[cfg(test)]
mod tests;
mod warning;
mod workload;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use weir_cli::explained::{Case, Explained};
use weir_cli::question::{AskedPort, AskedProtocol, Question, Source, Target};
use weir_common::Protocol;

use suggest::Help;

use crate::compile::policy::{Compiler, Direction, Finding, Hearing, Holder, NodeView, Touched};
use crate::model::{
    Family, Object, ObjectName, Pod, PodNetwork, PodPhase, Service, ServiceKind, Snapshot,
};
use crate::watch::documents::{Parsed, parse};

/// Of so many backends of a Service each is looked at.
const MOST_BACKENDS: usize = 100;

/// What one node knows about a question: all that is needed to answer it.
#[derive(Clone, Debug)]
pub struct Matter {
    pairs: Vec<Pair>,
    note: Option<String>,
    /// Why what was compiled is not in the kernel yet.
    awaits: Option<String>,
    left_out: usize,
    /// The objects that have a say in it, and no others.
    excerpt: Snapshot,
    /// About pods of the node that was asked, from what it has compiled.
    heard: Heard,
    dns: Vec<IpAddr>,
}

/// By the pod that is judged, the direction, and the address of the other.
type Heard = BTreeMap<(ObjectName, Direction, IpAddr), Hearing>;

/// One packet.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Pair {
    pub(crate) from: Party,
    pub(crate) to: Party,
    pub(crate) protocol: Protocol,
    /// Host order; `None` where the protocol has none.
    pub(crate) port: Option<u16>,
}

/// One end of it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Party {
    pub(crate) address: IpAddr,
    pub(crate) is: Who,
}

/// Whose the address is.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) enum Who {
    Pod(Arc<Pod>),
    HostPod(ObjectName),
    Node(Arc<str>),
    Dns,
    Outside,
}

/// What becomes of a packet at one end.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) enum Verdict {
    /// No policy selects what is there.
    NoSubject,
    Found(Box<Finding>),
}

/// Both ends.
#[derive(Clone, Debug)]
pub(crate) struct Outcome {
    pub(crate) pair: Pair,
    pub(crate) egress: Verdict,
    pub(crate) ingress: Verdict,
}

impl Verdict {
    pub(crate) fn allows(&self) -> bool {
        match self {
            Self::NoSubject => true,
            Self::Found(finding) => finding.allows,
        }
    }
}

impl Outcome {
    pub(crate) fn allows(&self) -> bool {
        self.egress.allows() && self.ingress.allows()
    }
}

impl Party {
    /// The pod whose policy is asked at this end.
    pub(crate) fn subject(&self) -> Option<&Arc<Pod>> {
        match &self.is {
            Who::Pod(pod) => Some(pod),
            _ => None,
        }
    }
}

impl Matter {
    /// Finds out who is meant, and takes what decides. Quick: nothing is compiled, and no pod is looked for among all.
    ///
    /// # Errors
    /// Nobody is meant, or nobody with an address.
    pub fn take(
        question: &Question,
        compiler: &Compiler,
        snapshot: &Snapshot,
        node: &NodeView,
    ) -> Result<Self, String> {
        let cast = Cast {
            compiler,
            snapshot,
            node: &node.name,
        };
        let mut matter = Self {
            pairs: Vec::new(),
            note: None,
            awaits: None,
            left_out: 0,
            excerpt: Snapshot::default(),
            heard: BTreeMap::new(),
            dns: node.dns.clone(),
        };
        let from = cast.source(&question.from)?;
        let destinations = cast.destinations(question, &mut matter)?;
        for (to, port) in destinations {
            for from in &from {
                if Family::of(&from.address) != Family::of(&to.address) {
                    continue;
                }
                let protocol = number(question.protocol, &to.address);
                matter.pairs.push(Pair {
                    from: from.clone(),
                    to: to.clone(),
                    protocol,
                    port,
                });
            }
        }
        if matter.pairs.is_empty() {
            return Err("the two have no addresses of the same family".to_owned());
        }
        matter.take_excerpt(compiler, snapshot);
        for pair in &matter.pairs {
            for (direction, subject, peer) in pair.sides() {
                let Some(pod) = subject.subject() else {
                    continue;
                };
                if let Some(hearing) = compiler.hearing(&pod.id, direction, peer.address) {
                    let at = (pod.id.clone(), direction, peer.address);
                    matter.heard.insert(at, hearing);
                }
            }
        }
        Ok(matter)
    }

    /// The same, of a node that is still writing it to its kernel, and why it has not done so.
    pub fn while_written(mut self, awaits: Option<&str>) -> Self {
        self.awaits = awaits.map(str::to_owned);
        self
    }

    /// What becomes of each packet. Pods of other nodes are judged as their nodes do: from the same objects.
    pub(crate) fn outcomes(&self) -> Vec<Outcome> {
        let mut court = Court::of(&self.excerpt, &self.dns);
        let pairs = self.pairs.iter();
        pairs.map(|it| court.outcome(it, &self.heard)).collect()
    }

    /// What would allow it, if that is tried and does.
    fn help(&self, outcome: &Outcome) -> Help {
        let mut help = suggest::help(outcome, &self.excerpt);
        let Some(yaml) = help.yaml.take_if(|_| help.obstacles.is_empty()) else {
            return help;
        };
        let mut objects = self.excerpt.clone();
        for parsed in parse("", &yaml) {
            if let Parsed::Ours(document) = parsed
                && let Ok(converted) = document.outcome
                && let Some(object) = converted.object
            {
                objects.apply(object);
            }
        }
        let after = Court::of(&objects, &self.dns).outcome(&outcome.pair, &BTreeMap::new());
        match after.allows() {
            true => help.yaml = Some(yaml),
            false => help.obstacles.push(format!(
                "No policy for the two, by their labels, would allow it; with one there is still {}",
                said::denial(outcome, &after)
            )),
        }
        help
    }

    /// The answer. `from` and `to` are as they were asked.
    pub fn explain(&self, from: &str, to: &str) -> Explained {
        let cases = self.outcomes().into_iter();
        let cases = cases.map(|outcome| said::case(&outcome, self.help(&outcome)));
        Explained {
            from: from.to_owned(),
            to: to.to_owned(),
            note: self.note.clone(),
            awaits: self.awaits.clone(),
            cases: cases.collect(),
            left_out: self.left_out,
        }
    }

    /// The same cases for who wants none of it to pass: nothing is said of what would allow it, which is what takes long to find.
    pub(crate) fn cases(&self) -> Vec<Case> {
        let outcomes = self.outcomes().into_iter();
        let cases = outcomes.map(|it| said::case(&it, Help::default()));
        cases.collect()
    }

    fn take_excerpt(&mut self, compiler: &Compiler, snapshot: &Snapshot) {
        let mut pods: BTreeSet<&ObjectName> = BTreeSet::new();
        let ends = self.pairs.iter().flat_map(|it| [&it.from, &it.to]);
        // An address that a pod says it has may be another's.
        let holders = ends.map(|party| compiler.holder(party.address));
        let holders: BTreeSet<ObjectName> = holders
            .filter_map(|holder| match holder {
                Holder::Pod(pod) | Holder::HostPod(pod) => Some(pod),
                _ => None,
            })
            .collect();
        pods.extend(&holders);
        for pair in &self.pairs {
            for party in [&pair.from, &pair.to] {
                match &party.is {
                    Who::Pod(pod) => pods.insert(&pod.id),
                    Who::HostPod(pod) => pods.insert(pod),
                    _ => false,
                };
            }
        }
        let excerpt = &mut self.excerpt;
        let mut namespaces: BTreeSet<&str> = BTreeSet::new();
        for name in pods {
            namespaces.insert(&name.namespace);
            if let Some(pod) = snapshot.pods.get(name) {
                excerpt.apply(Object::Pod(pod.clone()));
            }
        }
        for policy in snapshot.policies.values() {
            if namespaces.contains(&*policy.id.namespace) {
                excerpt.apply(Object::Policy(policy.clone()));
            }
        }
        // Where the DNS of nodes is taken to be.
        namespaces.insert("kube-system");
        for name in namespaces {
            if let Some(namespace) = snapshot.namespaces.get(name) {
                excerpt.apply(Object::Namespace(namespace.clone()));
            }
        }
        for policy in snapshot.cluster_policies.values() {
            excerpt.apply(Object::ClusterPolicy(policy.clone()));
        }
        for node in snapshot.nodes.values() {
            excerpt.apply(Object::Node(node.clone()));
        }
    }
}

impl Pair {
    /// Each direction, with the end that it is asked about and the other.
    fn sides(&self) -> [(Direction, &Party, &Party); 2] {
        [
            (Direction::Egress, &self.from, &self.to),
            (Direction::Ingress, &self.to, &self.from),
        ]
    }
}

/// Pods of several nodes, each judged as its node does.
struct Court<'a> {
    objects: &'a Snapshot,
    dns: &'a [IpAddr],
    compilers: BTreeMap<Arc<str>, Compiler>,
}

impl<'a> Court<'a> {
    fn of(objects: &'a Snapshot, dns: &'a [IpAddr]) -> Self {
        Self {
            objects,
            dns,
            compilers: BTreeMap::new(),
        }
    }

    /// What was heard already is not judged again.
    fn outcome(&mut self, pair: &Pair, heard: &Heard) -> Outcome {
        let packet = (pair.protocol, pair.port.unwrap_or(0));
        let [egress, ingress] = pair.sides().map(|(direction, subject, peer)| {
            let Some(pod) = subject.subject() else {
                return Verdict::NoSubject;
            };
            let at = (pod.id.clone(), direction, peer.address);
            if let Some(hearing) = heard.get(&at) {
                return Verdict::Found(Box::new(hearing.finding(packet)));
            }
            let Some(node) = &pod.node else {
                return Verdict::NoSubject;
            };
            let compiler = self
                .compilers
                .entry(node.clone())
                .or_insert_with(|| compiled(self.objects, node, self.dns));
            match compiler.hearing(&pod.id, direction, peer.address) {
                Some(hearing) => Verdict::Found(Box::new(hearing.finding(packet))),
                None => Verdict::NoSubject,
            }
        });
        Outcome {
            pair: pair.clone(),
            egress,
            ingress,
        }
    }
}

/// As a node compiles it. Of another node's addresses those of its Node object are known.
fn compiled(snapshot: &Snapshot, node: &Arc<str>, dns: &[IpAddr]) -> Compiler {
    let view = NodeView {
        name: node.clone(),
        addresses: dns.to_vec(),
        dns: dns.to_vec(),
    };
    compile(snapshot, &view)
}

/// Everything at once.
pub(crate) fn compile(snapshot: &Snapshot, node: &NodeView) -> Compiler {
    let mut compiler = Compiler::default();
    compiler.update(&Touched::all(snapshot), snapshot, node);
    compiler.plan();
    compiler.commit();
    compiler
}

fn number(protocol: AskedProtocol, to: &IpAddr) -> Protocol {
    match protocol {
        AskedProtocol::Tcp => Protocol::TCP,
        AskedProtocol::Udp => Protocol::UDP,
        AskedProtocol::Sctp => Protocol::SCTP,
        AskedProtocol::Icmp if to.is_ipv4() => Protocol::ICMP,
        AskedProtocol::Icmp => Protocol::ICMPV6,
    }
}

/// Who plays which part.
struct Cast<'a> {
    compiler: &'a Compiler,
    snapshot: &'a Snapshot,
    /// The one that is asked.
    node: &'a Arc<str>,
}

impl Cast<'_> {
    fn source(&self, source: &Source) -> Result<Vec<Party>, String> {
        match source {
            Source::Pod { namespace, name } => self.pod(&object(namespace, name)),
            Source::Address(address) => Ok(vec![self.at(*address)]),
        }
    }

    fn destinations(
        &self,
        question: &Question,
        matter: &mut Matter,
    ) -> Result<Vec<(Party, Option<u16>)>, String> {
        match &question.to {
            Target::Pod { namespace, name } => {
                let parties = self.pod(&object(namespace, name))?.into_iter();
                let with_port = parties.map(|party| {
                    let port = self.port(&party, &question.port, question.protocol)?;
                    Ok((party, port))
                });
                with_port.collect()
            }
            Target::Address(address) => {
                if let Some(service) = self.service_at(*address) {
                    matter.note = Some(format!(
                        "{address} is an address of Service {}: its backends are judged, each by its own address and port.",
                        service.id
                    ));
                    return self.backends(&service, question, matter);
                }
                let party = self.at(*address);
                let port = self.port(&party, &question.port, question.protocol)?;
                Ok(vec![(party, port)])
            }
            Target::Service { namespace, name } => {
                let id = object(namespace, name);
                let service = self.snapshot.services.get(&id);
                let service = service.ok_or_else(|| format!("there is no Service {id}"))?;
                matter.note = Some(format!(
                    "Service {id}: its backends are judged, each by its own address and port."
                ));
                self.backends(service, question, matter)
            }
        }
    }

    fn pod(&self, id: &ObjectName) -> Result<Vec<Party>, String> {
        let pod = self.snapshot.pods.get(id);
        let pod = pod.ok_or_else(|| format!("there is no pod {id}"))?;
        if pod.phase == PodPhase::Finished {
            return Err(format!(
                "pod {id} has ended: its addresses may be another's"
            ));
        }
        if pod.addresses.is_empty() {
            return Err(format!("pod {id} has no address yet"));
        }
        let parties = pod.addresses.iter().map(|address| match pod.network {
            PodNetwork::Host => Party {
                address: *address,
                is: Who::HostPod(id.clone()),
            },
            PodNetwork::Own => Party {
                address: *address,
                is: Who::Pod(pod.clone()),
            },
        });
        Ok(parties.collect())
    }

    fn at(&self, address: IpAddr) -> Party {
        let is = match self.compiler.holder(address) {
            Holder::OwnNode => Who::Node(self.node.clone()),
            Holder::Dns => Who::Dns,
            Holder::Node(node) => Who::Node(node),
            Holder::HostPod(pod) => Who::HostPod(pod),
            Holder::Pod(pod) => match self.snapshot.pods.get(&pod) {
                Some(pod) => Who::Pod(pod.clone()),
                None => Who::Outside,
            },
            Holder::Nobody => Who::Outside,
        };
        Party { address, is }
    }

    /// The number that is meant.
    fn port(
        &self,
        to: &Party,
        port: &AskedPort,
        protocol: AskedProtocol,
    ) -> Result<Option<u16>, String> {
        let name = match port {
            AskedPort::None => return Ok(None),
            AskedPort::Number(number) => return Ok(Some(*number)),
            AskedPort::Name(name) => name,
        };
        let Who::Pod(pod) = &to.is else {
            return Err(format!("{}: only pods have names for ports", to.address));
        };
        let protocol_number = number(protocol, &to.address);
        let mut ports = pod.ports.iter();
        let named = ports
            .find(|it| it.protocol == protocol_number && it.name.as_deref() == Some(name.as_str()));
        named
            .map(|it| Some(it.port))
            .ok_or_else(|| format!("pod {} has no {protocol} port {name:?}", pod.id))
    }

    fn service_at(&self, address: IpAddr) -> Option<Arc<Service>> {
        let has = |service: &&Arc<Service>| {
            let external = &service.external;
            let of_cluster =
                matches!(&service.kind, ServiceKind::ClusterIp(ips) if ips.contains(&address));
            of_cluster
                || external.load_balancer.contains(&address)
                || external.addresses.contains(&address)
        };
        self.snapshot.services.values().find(has).cloned()
    }

    /// Ready backends of a port of a Service.
    fn backends(
        &self,
        service: &Service,
        question: &Question,
        matter: &mut Matter,
    ) -> Result<Vec<(Party, Option<u16>)>, String> {
        let protocol = number(question.protocol, &IpAddr::from([0, 0, 0, 0]));
        let is_asked = |port: &&crate::model::ServicePort| {
            port.protocol == protocol
                && match &question.port {
                    AskedPort::Number(number) => port.port == *number,
                    AskedPort::Name(name) => port.name.as_deref() == Some(name.as_str()),
                    AskedPort::None => false,
                }
        };
        let id = &service.id;
        let port = service.ports.iter().find(is_asked).ok_or_else(|| {
            let all = service.ports.iter();
            let all: Vec<_> = all
                .map(|it| format!("{}/{}", it.port, crate::events::protocol(it.protocol)))
                .collect();
            format!("Service {id} has no such port; it has {}", all.join(", "))
        })?;
        let mut all = BTreeMap::new();
        for slice in self.snapshot.slices_of(id) {
            let ports = slice.ports.iter();
            let mut ports = ports.filter(|it| it.name == port.name && it.protocol == protocol);
            let Some(number) = ports.find_map(|it| it.port) else {
                continue;
            };
            for endpoint in &slice.endpoints {
                if endpoint.conditions.ready || endpoint.conditions.serving {
                    all.insert((endpoint.address, number), ());
                }
            }
        }
        if all.is_empty() {
            return Err(format!(
                "Service {id} has no backend that is ready: whoever asks it is refused"
            ));
        }
        matter.left_out = all.len().saturating_sub(MOST_BACKENDS);
        let backends = all.into_keys().take(MOST_BACKENDS);
        Ok(backends
            .map(|(address, number)| (self.at(address), Some(number)))
            .collect())
    }
}

/// `1 pod`, `2 pods`.
fn numbered(number: usize, what: &str) -> String {
    match number {
        1 => format!("1 {what}"),
        _ => format!("{number} {what}s"),
    }
}

fn object(namespace: &str, name: &str) -> ObjectName {
    ObjectName::new(namespace, name)
}
