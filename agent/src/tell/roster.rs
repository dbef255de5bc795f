//! The nodes of the cluster, and how the agent of each is, as the API server has it. The line keeps it, one change
//! at a time. Also who of all agents tells something that each of them knows.

use std::collections::BTreeMap;
use std::hash::Hasher;
use std::sync::{Arc, PoisonError, RwLock};

use siphasher::sip::SipHasher13;

use crate::model::{Object, ObjectName, Pod, PodPhase};

/// The labels of an agent's pod, as the chart has them.
const LABELS: [(&str, &str); 2] = [
    ("app.kubernetes.io/name", "weir"),
    ("app.kubernetes.io/component", "agent"),
];

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
    /// Its Node object exists.
    exists: bool,
    /// The agent's pods, with whether each is ready: in an update there can be two.
    pods: BTreeMap<ObjectName, bool>,
    /// A pod of an agent has been seen there: the node is one of ours.
    is_ours: bool,
    is_told_away: bool,
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
        if let Some(fact) = before {
            agents.forget(&fact);
        }
        if let Some(fact) = after {
            agents.learn(&fact);
        }
    }

    /// Looks at all of them.
    pub fn read<T>(&self, look: impl FnOnce(&Agents) -> T) -> T {
        look(&self.shared.read().unwrap_or_else(PoisonError::into_inner))
    }

    fn fact<'a>(&self, object: Option<&'a Object>) -> Option<Fact<'a>> {
        match object? {
            Object::Node(node) => Some(Fact::Node(&node.name, node.is_told_away)),
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
        let has = |(key, value): &(&str, &str)| {
            let found = pod.labels.iter().find(|(it, _)| &***it == *key);
            found.is_some_and(|(_, it)| **it == **value)
        };
        self.namespace.as_ref() == Some(&pod.id.namespace) && LABELS.iter().all(has)
    }
}

/// What an object says of a node.
#[derive(Eq, PartialEq)]
enum Fact<'a> {
    Node(&'a Arc<str>, bool),
    Agent(&'a Arc<str>, &'a ObjectName, bool),
}

impl Agents {
    fn learn(&mut self, fact: &Fact<'_>) {
        match fact {
            Fact::Node(node, is_told_away) => {
                let node = self.0.entry((*node).clone()).or_default();
                node.exists = true;
                node.is_told_away = *is_told_away;
            }
            Fact::Agent(node, pod, is_ready) => {
                let node = self.0.entry((*node).clone()).or_default();
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
            Fact::Node(..) => node.exists = false,
            Fact::Agent(_, pod, _) => {
                node.pods.remove(*pod);
            }
        }
        if !node.exists && node.pods.is_empty() {
            self.0.remove(*name);
        }
    }

    /// Nodes that have or had an agent and have none that is ready.
    pub(super) fn away(&self) -> impl Iterator<Item = &Arc<str>> {
        let is_away = |node: &OfNode| node.exists && node.is_ours && !node.is_ready();
        self.0
            .iter()
            .filter_map(move |(name, node)| is_away(node).then_some(name))
    }

    /// Does the Node say that its agent is away?
    pub(super) fn is_told_away(&self, node: &str) -> bool {
        self.0.get(node).is_some_and(|node| node.is_told_away)
    }

    /// Is the agent of this node ready, as the API server has it?
    pub(super) fn is_ready(&self, node: &str) -> bool {
        self.0.get(node).is_some_and(OfNode::is_ready)
    }

    /// Of all agents that are ready, the one that tells what is called `what`: each comes to the same answer (rendezvous
    /// hashing), and when one goes, only what it told has another teller. Never that of node `except`.
    pub(super) fn teller(&self, what: &str, except: Option<&str>) -> Option<&Arc<str>> {
        let ready = self.0.iter().filter(|(_, node)| node.is_ready());
        let others = ready.filter(|(name, _)| except != Some(&***name));
        others
            .map(|(name, _)| name)
            .max_by_key(|name| weight(what, name))
    }
}

impl OfNode {
    fn is_ready(&self) -> bool {
        self.pods.values().any(|is_ready| *is_ready)
    }
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

    pub(in crate::tell) fn node(name: &str, is_told_away: bool) -> Object {
        Object::Node(Arc::new(Node {
            name: name.into(),
            labels: Labels::new(),
            addresses: Vec::new(),
            internal: Vec::new(),
            pod_cidrs: Vec::new(),
            is_told_away,
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
        let roster = roster(&[node("n1", false)]);
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
        let teller = |what: &str, except| {
            roster.read(|agents| agents.teller(what, except).map(|it| it.to_string()))
        };
        let told: Vec<_> = (0..100).map(|n| teller(&format!("s{n}"), None)).collect();
        let first = told[0].clone().unwrap();
        assert!(nodes.iter().all(|name| told.contains(&Some(name.clone()))));
        assert_ne!(teller("s0", Some(&first)), Some(first.clone()));
        let gone = agent(&first, true);
        roster.changed(Some(&gone), None);
        for (n, before) in told.iter().enumerate() {
            let now = teller(&format!("s{n}"), None);
            assert_eq!(*before == now, before.as_ref() != Some(&first));
        }
    }
}
