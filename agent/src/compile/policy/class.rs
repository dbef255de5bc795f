//! Which predicates an address satisfies: its class. Which number a class has is in `number`.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::Arc;

use super::encode::{Canonical, Encoder};
use super::predicate::{NamespaceView, PortName, Predicate};
use super::region::Regions;
use crate::model::{ContainerPort, Labels, Namespace, Operator, Selector};

/// What a class is: the predicates that its addresses satisfy, in order.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(super) struct ClassContent(Vec<Arc<Predicate>>);

/// The same within one compilation: positions in its list of predicates, in order.
pub(super) type Facts = Arc<[usize]>;

/// Answers which predicates hold for an address. Pods of one namespace with equal labels are asked once.
pub(super) struct Classifier<'a> {
    predicates: Vec<Arc<Predicate>>,
    regions: Regions<Facts>,
    /// The predicates that ask a name of a port, by the number that they ask for.
    ports: BTreeMap<PortName, HashMap<u16, usize>>,
    namespaces: &'a HashMap<Arc<str>, Arc<Namespace>>,
    selectors: SelectorIndex,
    /// For each selector of the index, the predicates that ask it.
    askers: Vec<Vec<usize>>,
    known: HashMap<Arc<str>, KnownNamespace<'a>>,
}

struct KnownNamespace<'a> {
    /// For each predicate: is the namespace in its scope?
    in_scope: Vec<bool>,
    facts: HashMap<&'a Labels, Facts>,
}

impl<'a> Classifier<'a> {
    pub(super) fn new(
        predicates: BTreeSet<Arc<Predicate>>,
        namespaces: &'a HashMap<Arc<str>, Arc<Namespace>>,
    ) -> Self {
        let predicates: Vec<_> = predicates.into_iter().collect();
        let mut by_selector: BTreeMap<&Selector, Vec<usize>> = BTreeMap::new();
        let mut ports: BTreeMap<PortName, HashMap<u16, usize>> = BTreeMap::new();
        let mut blocks = Vec::new();
        for (position, predicate) in predicates.iter().enumerate() {
            match &**predicate {
                Predicate::Pods { pods, .. } => by_selector.entry(pods).or_default().push(position),
                Predicate::Block(block) => blocks.push((position, block)),
                Predicate::Port(name, number) => {
                    let of_name = ports.entry(name.clone()).or_default();
                    of_name.insert(*number, position);
                }
            }
        }
        let regions = Regions::of(blocks.into_iter());
        let (selectors, askers): (Vec<_>, Vec<_>) = by_selector
            .into_iter()
            .map(|(selector, askers)| (selector.clone(), askers))
            .unzip();
        Self {
            predicates,
            regions,
            ports,
            namespaces,
            selectors: SelectorIndex::new(selectors),
            askers,
            known: HashMap::new(),
        }
    }

    /// The predicates that an address of nobody in particular satisfies.
    pub(super) fn of_address(&self, address: IpAddr) -> Facts {
        self.regions.at(address).cloned().unwrap_or_default()
    }

    /// The predicates that an address of a pod satisfies.
    pub(super) fn of_pod(
        &mut self,
        address: IpAddr,
        namespace: &Arc<str>,
        labels: &'a Labels,
        ports: &[ContainerPort],
    ) -> Facts {
        let of_labels = self.of_labels(namespace, labels);
        let in_blocks = self.regions.at(address).map_or(&[][..], |facts| facts);
        let of_ports = self
            .ports
            .iter()
            .filter_map(|(name, positions)| positions.get(&name.on(ports)?).copied());
        let mut more = in_blocks.iter().copied().chain(of_ports).peekable();
        if more.peek().is_none() {
            return of_labels;
        }
        let all: BTreeSet<usize> = of_labels.iter().copied().chain(more).collect();
        all.into_iter().collect()
    }

    /// The regions of addresses in which the same blocks are.
    pub(super) fn regions(&self) -> &Regions<Facts> {
        &self.regions
    }

    /// The predicates about pods that one with these labels in this namespace satisfies.
    fn of_labels(&mut self, namespace: &Arc<str>, labels: &'a Labels) -> Facts {
        let Self {
            predicates,
            namespaces,
            selectors,
            askers,
            known,
            ..
        } = self;
        let known = known.entry(namespace.clone()).or_insert_with(|| {
            let view = NamespaceView::new(namespace, namespaces.get(namespace).map(|n| &**n));
            KnownNamespace {
                in_scope: predicates.iter().map(|p| view.is_asked(p)).collect(),
                facts: HashMap::new(),
            }
        });
        let in_scope = &known.in_scope;
        let facts = known.facts.entry(labels).or_insert_with(|| {
            let mut facts: Vec<usize> = selectors
                .matching(labels)
                .flat_map(|selector| &askers[selector])
                .copied()
                .filter(|predicate| in_scope[*predicate])
                .collect();
            facts.sort_unstable();
            facts.into()
        });
        facts.clone()
    }

    /// A predicate by its position.
    pub(super) fn predicate(&self, position: usize) -> Option<&Predicate> {
        self.predicates.get(position).map(|it| &**it)
    }

    /// The position of a predicate.
    pub(super) fn position(&self, predicate: &Arc<Predicate>) -> Option<usize> {
        self.predicates.binary_search(predicate).ok()
    }

    /// What these facts say.
    pub(super) fn content(&self, facts: &[usize]) -> ClassContent {
        ClassContent(facts.iter().map(|f| self.predicates[*f].clone()).collect())
    }
}

/// Selectors, filed so that labels meet only those that have a chance.
struct SelectorIndex {
    selectors: Vec<Selector>,
    /// Selectors by the values of their first `In`.
    by_value: HashMap<Arc<str>, HashMap<Arc<str>, Vec<usize>>>,
    /// Selectors without an `In`.
    others: Vec<usize>,
}

impl SelectorIndex {
    fn new(selectors: Vec<Selector>) -> Self {
        let mut by_value: HashMap<Arc<str>, HashMap<Arc<str>, Vec<usize>>> = HashMap::new();
        let mut others = Vec::new();
        for (position, selector) in selectors.iter().enumerate() {
            let wanted = selector
                .requirements
                .iter()
                .find_map(|r| match &r.operator {
                    Operator::In(values) => Some((&r.key, values)),
                    _ => None,
                });
            let Some((key, values)) = wanted else {
                others.push(position);
                continue;
            };
            let of_key = by_value.entry(key.clone()).or_default();
            for value in values {
                of_key.entry(value.clone()).or_default().push(position);
            }
        }
        Self {
            selectors,
            by_value,
            others,
        }
    }

    /// The positions of the selectors that match, each once, in no order.
    fn matching(&self, labels: &Labels) -> impl Iterator<Item = usize> {
        labels
            .iter()
            .filter_map(|(key, value)| self.by_value.get(key)?.get(value))
            .flatten()
            .chain(&self.others)
            .copied()
            .filter(|position| self.selectors[*position].matches(labels))
    }
}

impl Canonical for ClassContent {
    fn encode(&self, to: &mut Encoder) {
        to.list(self.0.iter());
    }
}
