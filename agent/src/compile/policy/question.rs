//! What the rules of this node ask: each question once, and filed so that a pod meets only those that have a chance.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;

use super::class::{Fact, Facts};
use super::group::GroupKey;
use super::predicate::{NamespaceView, PortName, Predicate};
use super::region::Regions;
use super::rules::RuleList;
use crate::model::{Labels, Operator, Selector};

/// The questions of all lists of rules that some pod of this node has.
#[derive(Debug, Default)]
pub(super) struct Questions {
    asked: BTreeMap<Arc<Predicate>, Asked>,
    pods: SelectorIndex,
    /// Names of ports that are asked for, by how many lists.
    names: BTreeMap<PortName, usize>,
    regions: Regions<Facts>,
}

#[derive(Debug)]
struct Asked {
    fact: Fact,
    lists: usize,
}

/// What became of the questions when lists came and went.
#[derive(Debug, Default)]
pub(super) struct QuestionDelta {
    /// About pods.
    pub(super) come: Vec<Fact>,
    pub(super) gone: Vec<Fact>,
    /// Names of ports that came or went.
    pub(super) names: BTreeSet<PortName>,
    /// Blocks came or went: around these addresses.
    pub(super) blocks: Vec<IpNet>,
}

impl Questions {
    /// Lists that pods have now, and such that none has any more.
    pub(super) fn update<'a>(
        &mut self,
        come: impl Iterator<Item = &'a Arc<RuleList>>,
        gone: impl Iterator<Item = &'a Arc<RuleList>>,
    ) -> QuestionDelta {
        let mut delta = QuestionDelta::default();
        for list in come {
            for predicate in list.predicates() {
                self.ask(predicate, &mut delta);
            }
            for name in list.names() {
                let lists = self.names.entry(name.clone()).or_default();
                *lists += 1;
                if *lists == 1 {
                    delta.names.insert(name.clone());
                }
            }
        }
        for list in gone {
            for predicate in list.predicates() {
                self.forget(predicate, &mut delta);
            }
            for name in list.names() {
                if let Some(lists) = self.names.get_mut(name) {
                    *lists -= 1;
                    if *lists == 0 {
                        self.names.remove(name);
                        delta.names.insert(name.clone());
                    }
                }
            }
        }
        if !delta.blocks.is_empty() {
            self.regions = self.cut();
        }
        delta
    }

    /// What is true of a pod by its labels, its namespace and the names of its ports.
    pub(super) fn about(&self, pods: &GroupKey, namespace: &NamespaceView) -> Facts {
        let by_labels = self.pods.matching(&pods.labels);
        let by_labels = by_labels.filter(|fact| namespace.is_asked(fact.predicate()));
        Facts::of(by_labels.cloned().chain(self.by_names(pods)))
    }

    /// The numbers that a pod means by names that are asked for.
    fn by_names(&self, pods: &GroupKey) -> impl Iterator<Item = Fact> {
        let names = self.names.keys();
        names.filter_map(|name| Some(Fact::new(Arc::new(name.fact(pods)?))))
    }

    /// The blocks that an address is in.
    pub(super) fn around(&self, address: IpAddr) -> Facts {
        self.regions.at(address).cloned().unwrap_or_default()
    }

    /// Where the same blocks are.
    pub(super) fn regions(&self) -> &Regions<Facts> {
        &self.regions
    }

    /// What a list asks, as it is filed here.
    pub(super) fn fact(&self, predicate: &Arc<Predicate>) -> Option<&Fact> {
        self.asked.get(predicate).map(|it| &it.fact)
    }

    fn ask(&mut self, predicate: &Arc<Predicate>, delta: &mut QuestionDelta) {
        if let Some(asked) = self.asked.get_mut(predicate) {
            asked.lists += 1;
            return;
        }
        let fact = Fact::new(predicate.clone());
        match &**predicate {
            Predicate::Pods { pods, .. } => {
                self.pods.insert(pods, fact.clone());
                delta.come.push(fact.clone());
            }
            Predicate::Block(block) => delta.blocks.push(block.cidr),
            Predicate::Port(..) => {}
        }
        self.asked
            .insert(predicate.clone(), Asked { fact, lists: 1 });
    }

    fn forget(&mut self, predicate: &Arc<Predicate>, delta: &mut QuestionDelta) {
        let Some(asked) = self.asked.get_mut(predicate) else {
            return;
        };
        asked.lists -= 1;
        if asked.lists > 0 {
            return;
        }
        let Some(Asked { fact, .. }) = self.asked.remove(predicate) else {
            return;
        };
        match &**predicate {
            Predicate::Pods { pods, .. } => {
                self.pods.remove(pods, &fact);
                delta.gone.push(fact);
            }
            Predicate::Block(block) => delta.blocks.push(block.cidr),
            Predicate::Port(..) => {}
        }
    }

    fn cut(&self) -> Regions<Facts> {
        let blocks: Vec<_> = self
            .asked
            .values()
            .filter_map(|asked| match asked.fact.predicate() {
                Predicate::Block(block) => Some((&asked.fact, block)),
                _ => None,
            })
            .collect();
        let cut = Regions::of(blocks.iter().map(|(_, block)| *block).enumerate());
        cut.map(|numbers| Facts::of(numbers.iter().map(|number| blocks[*number].0.clone())))
    }
}

type Filed = Vec<(Selector, Fact)>;

/// Selectors, filed so that labels meet only those that have a chance.
#[derive(Debug, Default)]
struct SelectorIndex {
    /// By the values of their first `In`.
    by_value: HashMap<Arc<str>, HashMap<Arc<str>, Filed>>,
    /// Those without an `In`.
    others: Filed,
}

impl SelectorIndex {
    fn insert(&mut self, selector: &Selector, fact: Fact) {
        let Some((key, values)) = first_in(selector) else {
            self.others.push((selector.clone(), fact));
            return;
        };
        let of_key = self.by_value.entry(key.clone()).or_default();
        for value in values {
            let filed = of_key.entry(value.clone()).or_default();
            filed.push((selector.clone(), fact.clone()));
        }
    }

    fn remove(&mut self, selector: &Selector, fact: &Fact) {
        let Some((key, values)) = first_in(selector) else {
            self.others.retain(|(_, it)| it != fact);
            return;
        };
        let Some(of_key) = self.by_value.get_mut(key) else {
            return;
        };
        for value in values {
            if let Some(filed) = of_key.get_mut(value) {
                filed.retain(|(_, it)| it != fact);
                if filed.is_empty() {
                    of_key.remove(value);
                }
            }
        }
        if of_key.is_empty() {
            self.by_value.remove(key);
        }
    }

    /// The questions whose selectors match, each once, in no order.
    fn matching(&self, labels: &Labels) -> impl Iterator<Item = &Fact> {
        labels
            .iter()
            .filter_map(|(key, value)| self.by_value.get(key)?.get(value))
            .flatten()
            .chain(&self.others)
            .filter(|(selector, _)| selector.matches(labels))
            .map(|(_, fact)| fact)
    }
}

fn first_in(selector: &Selector) -> Option<(&Arc<str>, &Vec<Arc<str>>)> {
    let mut requirements = selector.requirements.iter();
    requirements.find_map(|r| match &r.operator {
        Operator::In(values) => Some((&r.key, values)),
        _ => None,
    })
}
