//! Pods that no selector can tell apart: those of one namespace with the same labels and the same names of ports. What is true of them
//! is found out once.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use weir_common::{Addr, Protocol};

use super::class::Facts;
use super::predicate::NamespaceView;
use super::question::{QuestionDelta, Questions};
use crate::model::{ContainerPort, Labels, Namespace};

/// What policy asks of a pod, its address aside.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub(super) struct GroupKey {
    pub(super) namespace: Arc<str>,
    pub(super) labels: Labels,
    /// Those with a name, in the order of the containers.
    ports: Vec<NamedPort>,
}

#[derive(Clone, Debug, Eq, Hash, PartialEq)]
struct NamedPort {
    name: Arc<str>,
    protocol: Protocol,
    port: u16,
}

/// A group, for as long as it has a member.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub(super) struct GroupId(u32);

/// All of the cluster.
#[derive(Debug, Default)]
pub(super) struct Groups {
    groups: HashMap<GroupId, Group>,
    by_key: HashMap<Arc<GroupKey>, GroupId>,
    by_namespace: HashMap<Arc<str>, InNamespace>,
    next: u32,
}

#[derive(Debug)]
struct Group {
    key: Arc<GroupKey>,
    members: usize,
    /// That members claim, and how many do.
    addresses: BTreeMap<Addr, usize>,
    facts: Facts,
}

#[derive(Debug)]
struct InNamespace {
    view: NamespaceView,
    groups: BTreeSet<GroupId>,
}

impl GroupKey {
    pub(super) fn new(namespace: &Arc<str>, labels: &Labels, ports: &[ContainerPort]) -> Self {
        let named = |port: &ContainerPort| {
            Some(NamedPort {
                name: port.name.clone()?,
                protocol: port.protocol,
                port: port.port,
            })
        };
        Self {
            namespace: namespace.clone(),
            labels: labels.clone(),
            ports: ports.iter().filter_map(named).collect(),
        }
    }

    /// The names of its ports.
    pub(super) fn ports(&self) -> impl Iterator<Item = (&Arc<str>, Protocol, u16)> {
        let all = self.ports.iter();
        all.map(|port| (&port.name, port.protocol, port.port))
    }
}

impl Groups {
    /// A pod with these addresses. `namespace` is its own, if there is such an object.
    pub(super) fn join(
        &mut self,
        key: GroupKey,
        addresses: impl Iterator<Item = Addr>,
        namespace: Option<&Namespace>,
        questions: &Questions,
    ) -> GroupId {
        let id = match self.by_key.get(&key) {
            Some(id) => *id,
            None => self.found(key, namespace, questions),
        };
        if let Some(group) = self.groups.get_mut(&id) {
            group.members += 1;
            for address in addresses {
                *group.addresses.entry(address).or_default() += 1;
            }
        }
        id
    }

    /// It has left, or is another from now on.
    pub(super) fn leave(&mut self, key: &GroupKey, addresses: impl Iterator<Item = Addr>) {
        let Some(&id) = self.by_key.get(key) else {
            return;
        };
        let Some(group) = self.groups.get_mut(&id) else {
            return;
        };
        group.members -= 1;
        for address in addresses {
            if let Some(claims) = group.addresses.get_mut(&address) {
                *claims -= 1;
                if *claims == 0 {
                    group.addresses.remove(&address);
                }
            }
        }
        if group.members > 0 {
            return;
        }
        self.groups.remove(&id);
        self.by_key.remove(key);
        if let Some(namespace) = self.by_namespace.get_mut(&key.namespace) {
            namespace.groups.remove(&id);
            if namespace.groups.is_empty() {
                self.by_namespace.remove(&key.namespace);
            }
        }
    }

    /// The group of a pod that has joined.
    pub(super) fn of(&self, key: &GroupKey) -> Option<GroupId> {
        self.by_key.get(key).copied()
    }

    /// Who is in a group, and what is known of their namespace.
    pub(super) fn known(&self, id: GroupId) -> Option<(&Arc<GroupKey>, &NamespaceView)> {
        let key = &self.groups.get(&id)?.key;
        Some((key, &self.by_namespace.get(&key.namespace)?.view))
    }

    pub(super) fn facts(&self, id: GroupId) -> Facts {
        let group = self.groups.get(&id);
        group.map(|it| it.facts.clone()).unwrap_or_default()
    }

    /// Another namespace by this name, or none. The addresses about which something else is true now are added.
    pub(super) fn know_namespace(
        &mut self,
        name: &Arc<str>,
        namespace: Option<&Namespace>,
        questions: &Questions,
        changed: &mut BTreeSet<Addr>,
    ) {
        let Some(known) = self.by_namespace.get_mut(name) else {
            return;
        };
        known.view = NamespaceView::new(name, namespace);
        for id in &known.groups {
            if let Some(group) = self.groups.get_mut(id) {
                group.ask_again(&known.view, questions, changed);
            }
        }
    }

    /// Others are asked now. The same.
    pub(super) fn know_questions(
        &mut self,
        delta: &QuestionDelta,
        questions: &Questions,
        changed: &mut BTreeSet<Addr>,
    ) {
        if delta.come.is_empty() && delta.gone.is_empty() && delta.names.is_empty() {
            return;
        }
        let Self {
            by_namespace,
            groups: all,
            ..
        } = self;
        for InNamespace { view, groups } in by_namespace.values() {
            let come: Vec<_> = delta
                .come
                .iter()
                .filter(|fact| view.is_asked(fact.predicate()))
                .collect();
            for id in groups {
                let Some(group) = all.get_mut(id) else {
                    continue;
                };
                let key = &group.key;
                let is_news = come.iter().any(|it| it.predicate().is_of(&key.labels))
                    || delta.gone.iter().any(|it| group.facts.contains(it))
                    || delta.names.iter().any(|name| name.fact(key).is_some());
                if is_news {
                    group.ask_again(view, questions, changed);
                }
            }
        }
    }

    fn found(
        &mut self,
        key: GroupKey,
        namespace: Option<&Namespace>,
        questions: &Questions,
    ) -> GroupId {
        let id = GroupId(self.next);
        self.next += 1;
        let key = Arc::new(key);
        let name = &key.namespace;
        let known = self
            .by_namespace
            .entry(name.clone())
            .or_insert_with(|| InNamespace {
                view: NamespaceView::new(name, namespace),
                groups: BTreeSet::new(),
            });
        known.groups.insert(id);
        let group = Group {
            facts: questions.about(&key, &known.view),
            key: key.clone(),
            members: 0,
            addresses: BTreeMap::new(),
        };
        self.groups.insert(id, group);
        self.by_key.insert(key, id);
        id
    }
}

impl Group {
    fn ask_again(
        &mut self,
        view: &NamespaceView,
        questions: &Questions,
        changed: &mut BTreeSet<Addr>,
    ) {
        let facts = questions.about(&self.key, view);
        if facts != self.facts {
            self.facts = facts;
            changed.extend(self.addresses.keys());
        }
    }
}
