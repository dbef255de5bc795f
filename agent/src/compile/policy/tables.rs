//! What the tables are to hold, with the numbers of everything in it, and what has to be written for the graph to be there.
//! The order of that is `transition`'s.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use weir_common::policy::{Action, VerdictRow};
use weir_common::policy::{Class as ClassId, PortKey, PortRow, RuleId, RulesId, VerdictKey};
use weir_common::{Addr, Prefix};

use super::book::{RuleBook, RuleOwner};
use super::class::{Class, Facts};
use super::graph::{Changed, Graph};
use super::number::Numbers;
use super::ports::PortSet;
use super::region::Regions;
use super::rules::RuleList;
use super::transition::Passing;
use super::verdict::{Answer, Judge};
use crate::compile::prefix::prefix;
use crate::compile::{PodRules, PolicyRows};
use crate::model::ObjectName;

/// The rules of a pod, of ingress and of egress; `None`: open.
pub(super) type Rules = [Option<Arc<Judge>>; 2];

/// The state that the kernel holds, or is on its way to.
#[derive(Debug)]
pub(super) struct Tables {
    /// Of addresses that have a row of their own.
    addresses: BTreeMap<Addr, Class>,
    regions: Regions<Facts>,
    pods: BTreeMap<ObjectName, Rules>,
    pub(super) classes: Numbers<Facts>,
    pub(super) lists: Numbers<Arc<RuleList>>,
    pub(super) judges: BTreeMap<RulesId, Arc<Judge>>,
    owners: Numbers<RuleOwner>,
    sets: Numbers<PortSet>,
    verdicts: BTreeMap<VerdictKey, VerdictRow>,
}

/// What becomes another.
#[derive(Debug, Default)]
pub(super) struct Moves {
    /// Rows of addresses, before and after.
    pub(super) addresses: Vec<Move<Addr>>,
    /// Rows of prefixes.
    pub(super) regions: Vec<Move<IpNet>>,
    pub(super) pods: Vec<(ObjectName, Option<Rules>, Option<Rules>)>,
    after: Option<Regions<Facts>>,
    /// Users of numbers that have come and gone with it.
    taken: Users,
    left: Users,
    pub(super) lists: Lists,
    pub(super) classes: Came<Facts, ClassId>,
}

/// A row, and what is seen where it is.
#[derive(Clone, Debug)]
pub(super) struct Move<K> {
    pub(super) key: K,
    pub(super) has_row: [bool; 2],
    pub(super) class: [Class; 2],
}

/// Lists by what becomes of them.
#[derive(Debug, Default)]
pub(super) struct Lists {
    pub(super) come: BTreeMap<RulesId, Arc<Judge>>,
    pub(super) stay: BTreeMap<RulesId, Arc<Judge>>,
    pub(super) gone: BTreeMap<RulesId, Arc<Judge>>,
}

#[derive(Debug)]
pub(super) struct Came<K, N> {
    pub(super) come: Vec<(K, N)>,
    pub(super) gone: Vec<(K, N)>,
}

#[derive(Debug, Default)]
struct Users {
    classes: Vec<Facts>,
    lists: Vec<Arc<RuleList>>,
    sets: Vec<PortSet>,
}

/// Rows that come for good, and those that are needed no longer.
#[derive(Debug, Default)]
pub(super) struct Rows {
    pub(super) verdicts: BTreeMap<VerdictKey, VerdictRow>,
    pub(super) ports: BTreeMap<PortKey, PortRow>,
    pub(super) verdicts_gone: BTreeSet<VerdictKey>,
    pub(super) ports_gone: BTreeSet<PortKey>,
}

impl<K, N> Default for Came<K, N> {
    fn default() -> Self {
        Self {
            come: Vec::new(),
            gone: Vec::new(),
        }
    }
}

impl Tables {
    /// Nothing. Only bits of `mask` are used of a hash: all, outside of tests.
    pub(super) fn with_mask(mask: u32) -> Self {
        Self {
            addresses: BTreeMap::new(),
            regions: Regions::default(),
            pods: BTreeMap::new(),
            classes: Numbers::with_mask(mask),
            lists: Numbers::with_mask(mask),
            judges: BTreeMap::new(),
            owners: Numbers::with_mask(mask),
            sets: Numbers::with_mask(mask),
            verdicts: BTreeMap::new(),
        }
    }

    /// What has to become another for the graph to be here; whatever is new has a number from now on. It is to be
    /// committed or abandoned before the next.
    pub(super) fn moves(&mut self, graph: &Graph, changed: &Changed) -> Option<Moves> {
        let mut moves = Moves::default();
        let regions = graph.questions().regions();
        if changed.regions && !regions.is_like(&self.regions) {
            let nets: BTreeSet<IpNet> = self.regions.nets().chain(regions.nets()).collect();
            for net in nets {
                let around =
                    |it: &Regions<Facts>| Class::Of(it.around(&net).cloned().unwrap_or_default());
                moves.regions.push(Move {
                    key: net,
                    has_row: [self.regions.has(&net), regions.has(&net)],
                    class: [around(&self.regions), around(regions)],
                });
            }
            moves.after = Some(regions.clone());
        }
        for address in &changed.addresses {
            let before = self.addresses.get(address);
            let after = graph.class_of(address);
            if before == after.as_ref() {
                continue;
            }
            let ip = IpAddr::from(*address);
            let around = |it: &Regions<Facts>| Class::Of(it.at(ip).cloned().unwrap_or_default());
            moves.addresses.push(Move {
                key: *address,
                has_row: [before.is_some(), after.is_some()],
                class: [
                    before.cloned().unwrap_or_else(|| around(&self.regions)),
                    after.unwrap_or_else(|| around(regions)),
                ],
            });
        }
        for pod in &changed.pods {
            let before = self.pods.get(pod).cloned();
            let after = graph.lists(pod);
            let lists = |it: &Rules| {
                it.each_ref()
                    .map(|it| it.as_ref().map(|it| it.list.clone()))
            };
            if before.as_ref().map(lists).as_ref() == after {
                continue;
            }
            let after = after.cloned().map(|lists| {
                lists.map(|list| list.map(|list| self.take_list(list, graph, &mut moves)))
            });
            moves.pods.push((pod.clone(), before, after));
        }
        if moves.addresses.is_empty() && moves.regions.is_empty() && moves.pods.is_empty() {
            return None;
        }
        self.number(&mut moves);
        Some(moves)
    }

    /// The moves are on their way. The rows are those that come and go for good.
    pub(super) fn commit(&mut self, moves: Moves, rows: Rows, passing: &Passing) {
        for class in &passing.classes {
            self.classes.withhold(class.0);
        }
        for list in &passing.lists {
            self.lists.withhold(list.0);
        }
        for Move {
            key,
            has_row,
            class,
        } in moves.addresses
        {
            let [_, class] = class;
            match has_row[1] {
                true => self.addresses.insert(key, class),
                false => self.addresses.remove(&key),
            };
        }
        if let Some(regions) = moves.after {
            self.regions = regions;
        }
        for (pod, _, after) in moves.pods {
            match after {
                Some(rules) => self.pods.insert(pod, rules),
                None => self.pods.remove(&pod),
            };
        }
        for key in &rows.verdicts_gone {
            self.verdicts.remove(key);
        }
        self.verdicts.extend(rows.verdicts);
        for gone in moves.lists.gone.keys() {
            self.judges.remove(gone);
        }
    }

    /// Time has passed, at least as long as rows stay that nothing points to.
    pub(super) fn settle(&mut self) {
        self.classes.settle();
        self.lists.settle();
        self.owners.settle();
        self.sets.settle();
    }

    /// The moves have no room: what was before stays.
    pub(super) fn abandon(&mut self, moves: Moves) {
        let Moves { taken, left, .. } = moves;
        for class in &left.classes {
            self.classes.take(class);
        }
        for list in &left.lists {
            if self.lists.take(list).1 {
                self.take_owners(list);
            }
        }
        for set in &left.sets {
            self.sets.take(set);
        }
        for class in &taken.classes {
            self.classes.leave(class);
        }
        for list in &taken.lists {
            if let Some(number) = self.lists.leave(list) {
                self.leave_owners(list);
                self.judges.remove(&RulesId(number));
            }
        }
        for set in &taken.sets {
            self.sets.leave(set);
        }
    }

    /// The rows that come and go for good with the moves.
    pub(super) fn rows_of(&mut self, moves: &mut Moves) -> Rows {
        let mut rows = Rows::default();
        let Lists { come, stay, gone } = &moves.lists;
        let all: Vec<(Class, ClassId)> = self
            .classes
            .iter()
            .map(|(facts, number)| (Class::Of(facts.clone()), ClassId(number)))
            .collect();
        let mut answers = Vec::new();
        for judge in come.values() {
            answers.push((key(judge, ClassId::WORLD), judge.to_the_world.clone()));
            for (class, id) in &all {
                answers.extend(deviation(judge, class).map(|it| (key(judge, *id), it)));
            }
        }
        for (facts, id) in &moves.classes.come {
            let class = Class::Of(facts.clone());
            for judge in stay.values() {
                answers.extend(deviation(judge, &class).map(|it| (key(judge, *id), it)));
            }
        }
        for rules in gone.keys() {
            let from = VerdictKey {
                rules: *rules,
                class: ClassId::WORLD,
            };
            let of_list = self.verdicts.range(from..);
            let of_list = of_list.take_while(|(key, _)| key.rules == *rules);
            rows.verdicts_gone.extend(of_list.map(|(key, _)| *key));
        }
        for (_, class) in &moves.classes.gone {
            for rules in stay.keys() {
                let key = VerdictKey {
                    rules: *rules,
                    class: *class,
                };
                if self.verdicts.contains_key(&key) {
                    rows.verdicts_gone.insert(key);
                }
            }
        }
        for (key, answer) in answers {
            let row = self.row(&answer, &mut moves.taken.sets, &mut rows.ports);
            rows.verdicts.insert(key, row);
        }
        for key in &rows.verdicts_gone {
            let set = self
                .verdicts
                .get(key)
                .filter(|row| row.action == Action::BY_PORT);
            let set = set.and_then(|row| self.sets.content(row.ports)).cloned();
            if let Some(set) = set {
                moves.left.sets.push(set.clone());
                if let Some(number) = self.sets.leave(&set) {
                    rows.ports_gone.extend(set.rows(number).map(|(key, _)| key));
                }
            }
        }
        rows
    }

    /// A row that is needed on the way only.
    pub(super) fn passing_row(
        &mut self,
        answer: &Answer,
        ports: &mut BTreeMap<PortKey, PortRow>,
        gone: &mut BTreeSet<PortKey>,
    ) -> VerdictRow {
        let mut taken = Vec::new();
        let row = self.row(answer, &mut taken, ports);
        for set in taken {
            if let Some(number) = self.sets.leave(&set) {
                gone.extend(set.rows(number).map(|(key, _)| key));
            }
        }
        row
    }

    /// Everything.
    pub(super) fn rows(&self) -> PolicyRows {
        let regions = self.regions.iter();
        let regions = regions.map(|(net, facts)| (prefix(net), self.id(&Class::Of(facts.clone()))));
        let mut cidrs = BTreeMap::from([V4]);
        cidrs.extend(regions);
        let sets = self.sets.iter();
        PolicyRows {
            classes: self
                .addresses
                .iter()
                .map(|(addr, class)| (*addr, self.id(class)))
                .collect(),
            cidrs,
            verdicts: self.verdicts.clone(),
            ports: sets.flat_map(|(set, number)| set.rows(number)).collect(),
            rules: self
                .rules()
                .map(|(pod, rules)| (pod.clone(), rules))
                .collect(),
        }
    }

    /// The pods that are not among those that move.
    pub(super) fn keeping(&self, moves: &Moves) -> Vec<(ObjectName, Rules)> {
        let moved: BTreeSet<&ObjectName> = moves.pods.iter().map(|(pod, ..)| pod).collect();
        let keep = self.pods.iter().filter(|(pod, _)| !moved.contains(pod));
        keep.map(|(pod, rules)| (pod.clone(), rules.clone()))
            .collect()
    }

    /// The rules of every pod of this node.
    pub(super) fn rules(&self) -> impl Iterator<Item = (&ObjectName, PodRules)> {
        self.pods.iter().map(|(pod, rules)| (pod, pod_rules(rules)))
    }

    /// The rules of one, ready to answer: of ingress and of egress.
    pub(super) fn judges_of(&self, pod: &ObjectName) -> Option<&Rules> {
        self.pods.get(pod)
    }

    /// The prefixes of all regions.
    pub(super) fn region_nets(&self) -> impl Iterator<Item = IpNet> {
        self.regions.nets()
    }

    /// The class that is seen at addresses of nobody, in a prefix in which no smaller region is.
    pub(super) fn class_around(&self, net: &IpNet) -> Class {
        Class::Of(self.regions.around(net).cloned().unwrap_or_default())
    }

    /// The class that is seen at an address.
    pub(super) fn class_at(&self, address: IpAddr) -> Class {
        let own = self.addresses.get(&Addr::from(address)).cloned();
        own.unwrap_or_else(|| Class::Of(self.regions.at(address).cloned().unwrap_or_default()))
    }

    /// The rules of one.
    pub(super) fn rules_of(&self, pod: &ObjectName) -> Option<PodRules> {
        self.pods.get(pod).map(pod_rules)
    }

    /// A list, by its number.
    pub(super) fn judge(&self, rules: RulesId) -> Option<&Arc<Judge>> {
        self.judges.get(&rules)
    }

    /// What the rule numbers in the rows mean.
    pub(super) fn book(&self) -> RuleBook {
        let owners = self.owners.iter();
        RuleBook(
            owners
                .map(|(owner, number)| (RuleId(number), owner.clone()))
                .collect(),
        )
    }

    /// The number of a class.
    pub(super) fn id(&self, class: &Class) -> ClassId {
        match class {
            Class::OwnNode => ClassId::OWN_NODE,
            Class::Of(facts) if facts.is_empty() => ClassId::WORLD,
            Class::Of(facts) => ClassId(self.classes.number(facts).unwrap_or_default()),
        }
    }

    /// Numbers for the classes that come, and none any more for the lists and classes that go.
    fn number(&mut self, moves: &mut Moves) {
        let users = |has_row: bool, class: &Class| match class {
            Class::Of(facts) if has_row && !facts.is_empty() => Some(facts.clone()),
            _ => None,
        };
        let (mut before, mut after) = (Vec::new(), Vec::new());
        let addresses = moves.addresses.iter().map(|it| (it.has_row, &it.class));
        let regions = moves.regions.iter().map(|it| (it.has_row, &it.class));
        for (has_row, class) in addresses.chain(regions) {
            before.extend(users(has_row[0], &class[0]));
            after.extend(users(has_row[1], &class[1]));
        }
        for facts in after {
            let (number, is_first) = self.classes.take(&facts);
            if is_first {
                moves.classes.come.push((facts.clone(), ClassId(number)));
            }
            moves.taken.classes.push(facts);
        }
        for facts in before {
            if let Some(number) = self.classes.leave(&facts) {
                moves.classes.gone.push((facts.clone(), ClassId(number)));
            }
            moves.left.classes.push(facts);
        }
        let lists = moves
            .pods
            .iter()
            .filter_map(|(_, before, _)| before.as_ref());
        let lists: Vec<_> = lists
            .flatten()
            .flatten()
            .map(|it| it.list.clone())
            .collect();
        let mut gone = BTreeSet::new();
        for list in lists {
            if let Some(number) = self.lists.leave(&list) {
                self.leave_owners(&list);
                gone.insert(RulesId(number));
            }
            moves.left.lists.push(list);
        }
        for (id, judge) in &self.judges {
            if moves.lists.come.contains_key(id) {
                continue;
            }
            let to = match gone.contains(id) {
                true => &mut moves.lists.gone,
                false => &mut moves.lists.stay,
            };
            to.insert(*id, judge.clone());
        }
    }

    fn take_list(&mut self, list: Arc<RuleList>, graph: &Graph, moves: &mut Moves) -> Arc<Judge> {
        let (number, is_first) = self.lists.take(&list);
        moves.taken.lists.push(list.clone());
        let id = RulesId(number);
        if is_first {
            self.take_owners(&list);
        }
        if let Some(known) = self.judges.get(&id) {
            return known.clone();
        }
        let judge = Arc::new(Judge::new(&list, id, graph.questions(), &self.owners));
        self.judges.insert(id, judge.clone());
        moves.lists.come.insert(id, judge.clone());
        judge
    }

    fn take_owners(&mut self, list: &RuleList) {
        for owner in owners(list) {
            self.owners.take(&owner);
        }
    }

    fn leave_owners(&mut self, list: &RuleList) {
        for owner in owners(list) {
            self.owners.leave(&owner);
        }
    }

    fn row(
        &mut self,
        answer: &Answer,
        taken: &mut Vec<PortSet>,
        ports: &mut BTreeMap<PortKey, PortRow>,
    ) -> VerdictRow {
        let mut row = VerdictRow {
            action: answer.others.action(),
            rule: answer.others.rule,
            audit: answer.others.audit,
            ..VerdictRow::default()
        };
        if !answer.ports.is_empty() {
            let set = PortSet::of(answer);
            let (number, is_first) = self.sets.take(&set);
            if is_first {
                ports.extend(set.rows(number));
            }
            taken.push(set);
            row.action = Action::BY_PORT;
            row.ports = number;
        }
        row
    }
}

/// IPv4 always has a row of its own: a block of IPv6 may lie around the mapped addresses, and no order of writes may let it
/// answer for them.
pub(super) const V4: (Prefix, ClassId) = (Prefix::V4, ClassId::WORLD);

fn owners(list: &RuleList) -> impl Iterator<Item = RuleOwner> {
    let rules = list.rules().map(|asked| asked.owner);
    let audited = list.audits().then(|| list.audited_isolation()).flatten();
    rules.chain(list.isolation()).chain(audited)
}

pub(super) fn pod_rules([ingress, egress]: &Rules) -> PodRules {
    let id = |it: &Option<Arc<Judge>>| it.as_ref().map_or(RulesId::OPEN, |it| it.number);
    PodRules {
        ingress: id(ingress),
        egress: id(egress),
    }
}

/// The answer to a class, where it is another than that to the world.
pub(super) fn deviation(judge: &Judge, class: &Class) -> Option<Answer> {
    let is_other = |answer: &Answer| *answer != judge.to_the_world;
    judge
        .tells_apart(class)
        .then(|| judge.answer(class))
        .filter(is_other)
}

pub(super) fn key(judge: &Judge, class: ClassId) -> VerdictKey {
    VerdictKey {
        rules: judge.number,
        class,
    }
}
