//! What a list of rules answers to a class.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet, HashMap};

use weir_common::policy::{Action, RuleId, VerdictRow};

use super::book::RuleOwner;
use super::class::Classifier;
use super::number::Numbers;
use super::ports::{PortSet, PortSpan};
use super::predicate::{PortName, Predicate};
use super::rules::{ResolvedPeers, ResolvedPorts, ResolvedRule, RuleList};

/// The answer of one list to one class. Sets of ports are numbered when all are known.
#[derive(Clone, Copy, Debug)]
pub(super) enum Cell {
    Deny,
    Allow(RuleId),
    /// A position in [`PortSets`].
    ByPort(usize),
}

/// The distinct sets of ports of a compilation.
#[derive(Default)]
pub(super) struct PortSets(BTreeMap<PortSet, usize>);

/// Answers for one list of rules.
pub(super) struct Judge<'a> {
    rules: Vec<(RuleId, &'a ResolvedRule)>,
    /// Positions of the rules that are for everybody.
    for_all: Vec<usize>,
    /// Positions of the rules that ask a predicate.
    asking: HashMap<usize, Vec<usize>>,
    /// The names of ports whose numbers depend on the class.
    names: BTreeSet<&'a PortName>,
    /// Classes that the same rules match, and for which the same names mean the same, get the same answer.
    answers: HashMap<(Vec<usize>, Vec<usize>), Cell>,
    /// The owner of a denial.
    pub(super) denial: RuleId,
}

impl<'a> Judge<'a> {
    pub(super) fn new(
        list: &'a RuleList,
        classifier: &Classifier<'_>,
        owners: &Numbers<RuleOwner>,
    ) -> Self {
        let id = |owner: RuleOwner| RuleId(owners.number(&owner));
        let mut for_all = Vec::new();
        let mut asking: HashMap<usize, Vec<usize>> = HashMap::new();
        for (position, (_, rule)) in list.rules().enumerate() {
            match &rule.peers {
                ResolvedPeers::Any => for_all.push(position),
                ResolvedPeers::Of(predicates) => {
                    for predicate in predicates.iter().filter_map(|p| classifier.position(p)) {
                        asking.entry(predicate).or_default().push(position);
                    }
                }
            }
        }
        Self {
            rules: list
                .rules()
                .map(|(owner, rule)| (id(owner), rule))
                .collect(),
            for_all,
            asking,
            names: list.names().collect(),
            answers: HashMap::new(),
            denial: id(list.isolation()),
        }
    }

    /// The answer to addresses that satisfy these predicates.
    pub(super) fn cell(
        &mut self,
        facts: &[usize],
        classifier: &Classifier<'_>,
        sets: &mut PortSets,
    ) -> Cell {
        let asked = facts.iter().filter_map(|fact| self.asking.get(fact));
        let mut matching: Vec<usize> = asked.flatten().chain(&self.for_all).copied().collect();
        matching.sort_unstable();
        matching.dedup();
        let mut named = Vec::new();
        let mut numbers = BTreeMap::new();
        if !self.names.is_empty() {
            for fact in facts {
                if let Some(Predicate::Port(name, number)) = classifier.predicate(*fact)
                    && self.names.contains(name)
                {
                    named.push(*fact);
                    numbers.insert(name, *number);
                }
            }
        }
        let known = (matching, named);
        if let Some(cell) = self.answers.get(&known) {
            return *cell;
        }
        let rules = known.0.iter().map(|position| self.rules[*position]);
        let cell = union(rules, &numbers, sets);
        self.answers.insert(known, cell);
        cell
    }

    /// The row that denies everything.
    pub(super) fn denial_row(&self) -> VerdictRow {
        VerdictRow {
            action: Action::DENY,
            rule: self.denial,
            ..VerdictRow::default()
        }
    }
}

/// What the rules allow together, where the names of ports are these numbers: policies add up, none takes away.
fn union<'a>(
    rules: impl Iterator<Item = (RuleId, &'a ResolvedRule)>,
    numbers: &BTreeMap<&PortName, u16>,
    sets: &mut PortSets,
) -> Cell {
    let mut by_port: Vec<(RuleId, Cow<'_, [PortSpan]>)> = Vec::new();
    for (id, rule) in rules {
        match &rule.ports {
            ResolvedPorts::Any => return Cell::Allow(id),
            ResolvedPorts::Of { spans, names } => {
                let mut spans = Cow::from(spans);
                for name in names {
                    if let Some(number) = numbers.get(name) {
                        spans.to_mut().push(PortSpan::one(name.protocol, *number));
                    }
                }
                by_port.push((id, spans));
            }
        }
    }
    let by_port: Vec<(RuleId, &[PortSpan])> = by_port.iter().map(|(id, it)| (*id, &**it)).collect();
    let set = PortSet::union(&by_port);
    if set.is_empty() {
        Cell::Deny
    } else {
        Cell::ByPort(sets.position(set))
    }
}

impl PortSets {
    /// The sets, and for each position which one it is.
    pub(super) fn into_order(self) -> Vec<PortSet> {
        let mut sets: Vec<(PortSet, usize)> = self.0.into_iter().collect();
        sets.sort_unstable_by_key(|(_, position)| *position);
        sets.into_iter().map(|(set, _)| set).collect()
    }

    fn position(&mut self, set: PortSet) -> usize {
        let next = self.0.len();
        *self.0.entry(set).or_insert(next)
    }
}
