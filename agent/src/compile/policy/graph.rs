//! What policy makes of pods, namespaces, nodes and policies, kept up with every change of one of them: who is of which class, and
//! who has which rules. Numbers and rows are `tables`'s.
//!
//! ```text
//! policies, pods here ── subject ── lists ── question ── group ─┐
//! pods, namespaces ─────────────────────────── group ───────────┤ class of an address
//! nodes, pods ──────────────────────────────── claim ───────────┘
//! ```

use std::collections::{BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use weir_common::{Addr, Protocol};

use super::claim::{Claimant, Claims, NodeView, is_of_its_own, of_node, of_pod};
use super::class::Class;
use super::group::{GroupId, GroupKey, Groups};
use super::question::Questions;
use super::subject::{Lists, Subjects};
use super::{Report, Touched};
use crate::model::{ContainerPort, Labels, Node, ObjectName, Pod, Snapshot};

/// All of it.
#[derive(Debug, Default)]
pub(super) struct Graph {
    node: NodeView,
    /// As they were taken in.
    pods: HashMap<ObjectName, Arc<Pod>>,
    nodes: HashMap<Arc<str>, Arc<Node>>,
    dns: Option<GroupId>,
    subjects: Subjects,
    questions: Questions,
    groups: Groups,
    claims: Claims,
}

/// What may be another than it was.
#[derive(Debug, Default)]
pub(super) struct Changed {
    pub(super) addresses: BTreeSet<Addr>,
    pub(super) pods: BTreeSet<ObjectName>,
    pub(super) regions: bool,
}

impl Graph {
    /// Takes in what was touched since the last time, as it is in the snapshot. What may be another now is added.
    pub(super) fn update(
        &mut self,
        touched: &Touched,
        snapshot: &Snapshot,
        node: &NodeView,
        changed: &mut Changed,
    ) {
        let lists = self
            .subjects
            .update(touched, snapshot, node, &mut changed.pods);
        let delta = self.questions.update(lists.come.iter(), lists.gone.iter());
        let Changed { addresses, .. } = changed;
        self.groups
            .know_questions(&delta, &self.questions, addresses);
        for namespace in &touched.namespaces {
            let known = snapshot.namespaces.get(namespace).map(|it| &**it);
            self.groups
                .know_namespace(namespace, known, &self.questions, addresses);
        }
        self.know_node(node, snapshot, addresses);
        for name in &touched.nodes {
            let before = self.nodes.remove(name);
            let after = snapshot.nodes.get(name);
            for (address, claimant) in before.iter().flat_map(|it| of_node(it, &self.node)) {
                self.claims.remove(address, &claimant);
                addresses.insert(address);
            }
            if let Some(node) = after {
                for (address, claimant) in of_node(node, &self.node) {
                    self.claims.add(address, claimant);
                    addresses.insert(address);
                }
                self.nodes.insert(name.clone(), node.clone());
            }
        }
        for name in &touched.pods {
            self.know_pod(name, snapshot, addresses);
        }
        if !delta.blocks.is_empty() {
            changed.regions = true;
            for block in &delta.blocks {
                let range = Addr::from(block.network())..=Addr::from(last(block));
                changed.addresses.extend(self.claims.addresses(range));
            }
        }
    }

    /// The class of an address, if it needs a row of its own: it is another than that of the region around it.
    pub(super) fn class_of(&self, address: &Addr) -> Option<Class> {
        let around = || self.questions.around(IpAddr::from(*address));
        let group = match self.claims.holder(address)? {
            Claimant::OwnNode(_) => return Some(Class::OwnNode),
            Claimant::Node(_) => return None,
            Claimant::Dns(group) | Claimant::Pod { group, .. } => *group,
        };
        let by_group = self.groups.facts(group);
        (!by_group.is_empty()).then(|| Class::Of(by_group.and(&around())))
    }

    /// The lists of a pod of this node.
    pub(super) fn lists(&self, pod: &ObjectName) -> Option<&Lists> {
        self.subjects.lists(pod)
    }

    /// The pod of this node that an address is of.
    pub(super) fn pod_at(&self, address: &Addr) -> Option<&ObjectName> {
        let Claimant::Pod { age, .. } = self.claims.holder(address)? else {
            return None;
        };
        let pod = &age.0.1;
        self.subjects.lists(pod).map(|_| pod)
    }

    /// Whose an address is.
    pub(super) fn holder(&self, address: &Addr) -> Option<&Claimant> {
        self.claims.holder(address)
    }

    pub(super) fn groups(&self) -> &Groups {
        &self.groups
    }

    pub(super) fn questions(&self) -> &Questions {
        &self.questions
    }

    pub(super) fn subjects(&self) -> &Subjects {
        &self.subjects
    }

    /// What a person should know, in order, each once.
    pub(super) fn reports(&self) -> Vec<Report> {
        let all = self.subjects.reports().chain(self.claims.reports());
        let all: BTreeSet<&Report> = all.collect();
        all.into_iter().cloned().collect()
    }

    fn know_pod(&mut self, name: &ObjectName, snapshot: &Snapshot, changed: &mut BTreeSet<Addr>) {
        let after = snapshot.pods.get(name);
        let before = self.pods.remove(name);
        // It joins before it leaves, or its group would end and begin.
        if let Some(pod) = after {
            let group = is_of_its_own(pod).then(|| {
                let namespace = snapshot.namespaces.get(&pod.id.namespace);
                let addresses = pod.addresses.iter().map(|ip| Addr::from(*ip));
                let key = key(pod);
                let namespace = namespace.map(|it| &**it);
                self.groups.join(key, addresses, namespace, &self.questions)
            });
            for (address, claimant) in of_pod(pod, group) {
                self.claims.add(address, claimant);
                changed.insert(address);
            }
            self.pods.insert(name.clone(), pod.clone());
        }
        if let Some(pod) = before {
            let key = is_of_its_own(&pod).then(|| key(&pod));
            let group = key.as_ref().and_then(|key| self.groups.of(key));
            let kept: BTreeSet<(Addr, Claimant)> = match after {
                Some(after) => of_pod(after, self.group_of(after)).collect(),
                None => BTreeSet::new(),
            };
            for (address, claimant) in of_pod(&pod, group) {
                changed.insert(address);
                let claim = (address, claimant);
                if !kept.contains(&claim) {
                    self.claims.remove(address, &claim.1);
                }
            }
            if let Some(key) = key {
                let addresses = pod.addresses.iter().map(|ip| Addr::from(*ip));
                self.groups.leave(&key, addresses);
            }
        }
    }

    fn group_of(&self, pod: &Pod) -> Option<GroupId> {
        is_of_its_own(pod).then(|| self.groups.of(&key(pod)))?
    }

    fn know_node(&mut self, node: &NodeView, snapshot: &Snapshot, changed: &mut BTreeSet<Addr>) {
        let dns = match self.dns {
            Some(dns) => dns,
            None => {
                let key = dns_pods();
                let namespace = snapshot.namespaces.get(&key.namespace);
                let namespace = namespace.map(|it| &**it);
                let none = std::iter::empty();
                let group = self.groups.join(key, none, namespace, &self.questions);
                *self.dns.insert(group)
            }
        };
        if self.node == *node {
            return;
        }
        let before = std::mem::replace(&mut self.node, node.clone());
        let key = dns_pods();
        let answers =
            |node: &NodeView| -> Vec<Addr> { node.dns.iter().map(|ip| Addr::from(*ip)).collect() };
        self.groups.join(
            key.clone(),
            answers(node).into_iter(),
            None,
            &self.questions,
        );
        self.groups.leave(&key, answers(&before).into_iter());
        for (address, claimant) in before.claims(dns) {
            self.claims.remove(address, &claimant);
            changed.insert(address);
        }
        for (address, claimant) in node.claims(dns) {
            self.claims.add(address, claimant);
            changed.insert(address);
        }
    }
}

fn key(pod: &Pod) -> GroupKey {
    GroupKey::new(&pod.id.namespace, &pod.labels, &pod.ports)
}

/// The pods that people select in policies when they mean cluster DNS, and what those call their ports.
fn dns_pods() -> GroupKey {
    let port = |name: &str, protocol| ContainerPort {
        name: Some(name.into()),
        protocol,
        port: 53,
        host: None,
    };
    let labels = Labels::from([("k8s-app".into(), "kube-dns".into())]);
    let ports = [port("dns", Protocol::UDP), port("dns-tcp", Protocol::TCP)];
    GroupKey::new(&"kube-system".into(), &labels, &ports)
}

fn last(net: &IpNet) -> IpAddr {
    net.broadcast()
}
