//! Which predicates a pod satisfies: the class of its addresses. Which number a class has is in
//! `number`.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use super::encode::{Canonical, Encoder};
use super::predicate::{NamespaceView, Predicate};
use crate::model::{Labels, Namespace, Operator, Selector};

/// What a class is: the predicates that its addresses satisfy, in order.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(super) struct ClassContent(Vec<Arc<Predicate>>);

/// The same within one compilation: positions in its list of predicates, in order.
pub(super) type Facts = Arc<[usize]>;

/// Answers which predicates hold for a pod. Pods of one namespace with equal labels are asked once.
pub(super) struct Classifier<'a> {
    predicates: Vec<Arc<Predicate>>,
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
        for (position, predicate) in predicates.iter().enumerate() {
            by_selector
                .entry(&predicate.pods)
                .or_default()
                .push(position);
        }
        let (selectors, askers): (Vec<_>, Vec<_>) = by_selector
            .into_iter()
            .map(|(selector, askers)| (selector.clone(), askers))
            .unzip();
        Self {
            predicates,
            namespaces,
            selectors: SelectorIndex::new(selectors),
            askers,
            known: HashMap::new(),
        }
    }

    /// The predicates that a pod with these labels in this namespace satisfies.
    pub(super) fn facts(&mut self, namespace: &Arc<str>, labels: &'a Labels) -> Facts {
        let Self {
            predicates,
            namespaces,
            selectors,
            askers,
            known,
        } = self;
        let known = known.entry(namespace.clone()).or_insert_with(|| {
            let view = NamespaceView::new(namespace, namespaces.get(namespace).map(|n| &**n));
            KnownNamespace {
                in_scope: predicates.iter().map(|p| view.is_in(&p.scope)).collect(),
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
