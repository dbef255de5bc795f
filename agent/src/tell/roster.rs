//! The nodes of the cluster, and how the agent of each is, as the API server has it. The line keeps it, one change
//! at a time. Also who of all agents tells something that each of them knows.

use std::collections::BTreeMap;
use std::hash::Hasher;
use std::sync::{Arc, PoisonError, RwLock};

use siphasher::sip::SipHasher13;

use crate::model::{NetworkSaid, Object, ObjectName, Pod, PodPhase};

/// The labels of an agent's pod, as the chart has them.
const LABELS: [(&str, &str); 2] = [
    ("app.kubernetes.io/name", "weir"),
    ("app.kubernetes.io/component", "agent"),
];

/// The same as a selector of the API.
pub(super) fn selector() -> String {
    LABELS
        .map(|(key, value)| format!("{key}={value}"))
        .join(",")
}

/// All agents. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct Roster {
    /// Where agents' pods are; none are known without.
    namespace: Option<Arc<str>>,
    shared: Arc<RwLock<Agents>>,
}

/// The nodes that there are, by name.
#[derive(Clone, Debug, Default)]
pub struct Agents(BTreeMap<Arc<str>, OfNode>);

#[derive(Clone, Debug, Default)]
struct OfNode {
    /// What its Node object says, if there is one.
    network: Option<NetworkSaid>,
    /// The agent's pods, with whether each is ready: in an update there can be two.
    pods: BTreeMap<ObjectName, bool>,
    /// A pod of an agent has been seen there, and nobody has said since that there is none any more.
    is_ours: bool,
}

impl Roster {
    /// Of the agents whose pods are in this namespace.
    pub fn new(namespace: Option<Arc<str>>) -> Self {
        Self {
            namespace,
            shared: Arc::default(),
        }
    }

    /// An object has changed, appeared or gone.
    pub fn changed(&self, before: Option<&Object>, after: Option<&Object>) {
        let (before, after) = (self.fact(before), self.fact(after));
        if before == after {
            return;
        }
        let mut agents = self.shared.write().unwrap_or_else(PoisonError::into_inner);
        // Learnt first, so that what is known of a node outlives a change.
        if let Some(fact) = &after {
            agents.learn(fact);
        }
        if let Some(fact) = before
            && after.is_none_or(|after| !after.replaces(&fact))
        {
            agents.forget(&fact);
        }
    }

    /// The namespace of agents' pods.
    pub(super) fn namespace(&self) -> Option<&str> {
        self.namespace.as_deref()
    }

    /// Looks at all of them.
    pub fn read<T>(&self, look: impl FnOnce(&Agents) -> T) -> T {
        look(&self.shared.read().unwrap_or_else(PoisonError::into_inner))
    }

    fn fact<'a>(&self, object: Option<&'a Object>) -> Option<Fact<'a>> {
        match object? {
            Object::Node(node) => Some(Fact::Node(&node.name, node.network)),
            Object::Pod(pod) => {
                let node = pod.node.as_ref()?;
                let is_ready = pod.ready && pod.phase == PodPhase::Running;
                self.is_agent(pod)
                    .then_some(Fact::Agent(node, &pod.id, is_ready))
            }
            _ => None,
        }
    }

    fn is_agent(&self, pod: &Pod) -> bool {
        let has =
            |(key, value): &(&str, &str)| pod.labels.get(*key).is_some_and(|it| **it == **value);
        self.namespace.as_ref() == Some(&pod.id.namespace) && LABELS.iter().all(has)
    }
}

/// What an object says of a node.
#[derive(Eq, PartialEq)]
enum Fact<'a> {
    Node(&'a Arc<str>, NetworkSaid),
    Agent(&'a Arc<str>, &'a ObjectName, bool),
}

impl Fact<'_> {
    /// Is it said of the same, so that it stands in the place of the other?
    fn replaces(&self, other: &Self) -> bool {
        match (self, other) {
            (Fact::Node(one, _), Fact::Node(other, _)) => one == other,
            (Fact::Agent(one, pod, _), Fact::Agent(other, of, _)) => (one, pod) == (other, of),
            _ => false,
        }
    }
}

impl Agents {
    fn learn(&mut self, fact: &Fact<'_>) {
        let (Fact::Node(name, _) | Fact::Agent(name, ..)) = fact;
        let node = self.0.entry((*name).clone()).or_default();
        match fact {
            Fact::Node(_, said) => {
                let last = node.network.replace(*said);
                // Somebody took our condition off a node that has no agent's pod: none is meant to be there.
                let is_taken_off = *said == NetworkSaid::Nothing;
                if last == Some(NetworkSaid::AgentAway) && is_taken_off && node.pods.is_empty() {
                    node.is_ours = false;
                }
            }
            Fact::Agent(_, pod, is_ready) => {
                node.is_ours = true;
                node.pods.insert((*pod).clone(), *is_ready);
            }
        }
    }

    fn forget(&mut self, fact: &Fact<'_>) {
        let (Fact::Node(name, _) | Fact::Agent(name, ..)) = fact;
        let Some(node) = self.0.get_mut(*name) else {
            return;
        };
        match fact {
            Fact::Node(..) => node.network = None,
            Fact::Agent(_, pod, _) => {
                node.pods.remove(*pod);
            }
        }
        if node.network.is_none() && node.pods.is_empty() {
            self.0.remove(*name);
        }
    }

    /// Nodes that have or had an agent and have none that is ready.
    pub(super) fn away(&self) -> impl Iterator<Item = &Arc<str>> {
        let is_away = |node: &OfNode| node.network.is_some() && node.is_ours && !node.is_ready();
        self.0
            .iter()
            .filter_map(move |(name, node)| is_away(node).then_some(name))
    }

    /// What the Node says of its network.
    pub(super) fn network(&self, node: &str) -> NetworkSaid {
        let node = self.0.get(node).and_then(|node| node.network);
        node.unwrap_or_default()
    }

    /// Is the agent of this node ready, as the API server has it?
    pub(super) fn is_ready(&self, node: &str) -> bool {
        self.0.get(node).is_some_and(OfNode::is_ready)
    }

    /// The one agent of all that tells what is called `what`, if any is known: each comes to the same answer (rendezvous
    /// hashing), and when one goes, only what it told has another teller. While none is ready, it is any.
    pub(super) fn teller(&self, what: &str) -> Option<&Arc<str>> {
        let ready = chosen(what, self.with(OfNode::is_ready));
        ready.or_else(|| chosen(what, self.with(|node| !node.pods.is_empty())))
    }

    /// The same of those that are ready, without that of `except`.
    pub(super) fn other_teller(&self, what: &str, except: &str) -> Option<&Arc<str>> {
        let ready = self.with(OfNode::is_ready);
        chosen(what, ready.filter(|name| ***name != *except))
    }

    fn with(&self, is_so: impl Fn(&OfNode) -> bool) -> impl Iterator<Item = &Arc<str>> {
        self.0
            .iter()
            .filter_map(move |(name, node)| is_so(node).then_some(name))
    }
}

impl OfNode {
    fn is_ready(&self) -> bool {
        self.pods.values().any(|is_ready| *is_ready)
    }
}

fn chosen<'a>(what: &str, nodes: impl Iterator<Item = &'a Arc<str>>) -> Option<&'a Arc<str>> {
    nodes.max_by_key(|name| weight(what, name))
}

/// The same in every agent, whatever it was built with.
fn weight(what: &str, node: &str) -> u64 {
    let mut hasher = SipHasher13::new();
    for text in [what, "\0", node] {
        hasher.write(text.as_bytes());
    }
    hasher.finish()
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::model::{Labels, Node, PodNetwork};

    pub(in crate::tell) fn node(name: &str, network: NetworkSaid) -> Object {
        Object::Node(Arc::new(Node {
            name: name.into(),
            labels: Labels::new(),
            addresses: Vec::new(),
            internal: Vec::new(),
            pod_cidrs: Vec::new(),
            network,
        }))
    }

    pub(in crate::tell) fn agent(node: &str, ready: bool) -> Object {
        let label = |(key, value): (&str, &str)| (key.into(), value.into());
        Object::Pod(Arc::new(Pod {
            id: ObjectName::new("kube-system", format!("weir-{node}").as_str()),
            uid: node.into(),
            static_uid: None,
            labels: Labels::from(LABELS.map(label)),
            node: Some(node.into()),
            addresses: Vec::new(),
            network: PodNetwork::Host,
            phase: PodPhase::Running,
            ready,
            hostname: None,
            subdomain: None,
            ports: Vec::new(),
        }))
    }

    pub(in crate::tell) fn roster(objects: &[Object]) -> Roster {
        let roster = Roster::new(Some("kube-system".into()));
        for object in objects {
            roster.changed(None, Some(object));
        }
        roster
    }

    #[test]
    fn a_pod_that_only_looks_like_an_agent_is_none() {
        let Object::Pod(pod) = agent("n1", true) else {
            unreachable!()
        };
        let elsewhere = Pod {
            id: ObjectName::new("shop", "weir-n1"),
            ..(*pod).clone()
        };
        let unlabelled = Pod {
            labels: Labels::new(),
            ..(*pod).clone()
        };
        let roster = roster(&[node("n1", NetworkSaid::Nothing)]);
        for pod in [elsewhere, unlabelled] {
            roster.changed(None, Some(&Object::Pod(Arc::new(pod))));
        }
        assert!(!roster.read(|agents| agents.is_ready("n1")));
        assert_eq!(roster.read(|agents| agents.away().count()), 0);
        roster.changed(None, Some(&agent("n1", true)));
        assert!(roster.read(|agents| agents.is_ready("n1")));
    }

    #[test]
    fn one_agent_tells_and_when_it_goes_another_does() {
        let nodes: Vec<String> = (0..5).map(|n| format!("n{n}")).collect();
        let agents: Vec<Object> = nodes.iter().map(|name| agent(name, true)).collect();
        let roster = roster(&agents);
        let teller =
            |what: &str| roster.read(|agents| agents.teller(what).map(|it| it.to_string()));
        let told: Vec<_> = (0..100).map(|n| teller(&format!("s{n}"))).collect();
        let first = told[0].clone().unwrap();
        assert!(nodes.iter().all(|name| told.contains(&Some(name.clone()))));
        let other = roster.read(|agents| agents.other_teller("s0", &first).cloned());
        assert_ne!(other, Some(first.as_str().into()));
        let gone = agent(&first, true);
        roster.changed(Some(&gone), None);
        for (n, before) in told.iter().enumerate() {
            let now = teller(&format!("s{n}"));
            assert_eq!(*before == now, before.as_ref() != Some(&first));
        }
    }

    #[test]
    fn while_no_agent_is_ready_one_tells_all_the_same_and_without_agents_nobody() {
        let roster = roster(&["n1", "n2", "n3"].map(|name| agent(name, false)));
        assert!(roster.read(|agents| agents.teller("x").is_some()));
        assert!(roster.read(|agents| agents.other_teller("x", "n1").is_none()));
        assert!(Roster::default().read(|agents| agents.teller("x").is_none()));
    }
}
