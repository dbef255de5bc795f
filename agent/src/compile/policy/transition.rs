//! The way from one state of the tables to the next: restrict, then relax. Writing it is not here.
//!
//! A packet between two pods of this node is asked about twice, by the rules of each, and no two rows change in one moment. So on the
//! way every end says what it said before, then what both the state before and the state after allow, then what it says
//! after; whatever the order of writes, no packet passes that neither state lets pass, and none is dropped that both let
//! pass.
//!
//! For that whoever changes has a number of its own on the way. A *bridge class* of an address is seen as its class before by rules
//! that are as before, and as its class after by rules that are as after. A *bridge list* of a pod allows what its rules before
//! allow to classes before and its rules after to classes after. In steps:
//!
//! 1. addresses come to their bridge classes, then pods to their bridge lists: everything is as before, then restricted;
//! 2. pods come to their lists after;
//! 3. addresses come to their classes after, and rows that nothing points to any more go.
//!
//! Where only one row decides about every packet that changes, it is written, and that is all. Pods that go are said first: nobody
//! says anything about them any more.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use weir_common::policy::{Class as ClassId, PortKey, PortRow, RulesId, VerdictKey, VerdictRow};
use weir_common::{Addr, Prefix};

use super::class::Class;
use super::graph::Graph;
use super::number::free;
use super::tables::{Move, Moves, Rows, Tables, V4, deviation, key, pod_rules};
use super::verdict::{Answer, Decision, Judge};
use crate::compile::PodRules;
use crate::compile::prefix::prefix;
use crate::model::ObjectName;

/// Rows to write, in this order: ports, verdicts, addresses, pods, and last what goes (`None`).
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Step {
    pub ports: BTreeMap<PortKey, Option<PortRow>>,
    pub verdicts: BTreeMap<VerdictKey, Option<VerdictRow>>,
    pub classes: BTreeMap<Addr, Option<ClassId>>,
    pub cidrs: BTreeMap<Prefix, Option<ClassId>>,
    /// `None`: nobody says anything about it any more, and it keeps what it has until the rows of that go.
    pub pods: BTreeMap<ObjectName, Option<PodRules>>,
}

/// Two classes, before and after.
type Pair = [Class; 2];

/// Which class an address has on the way.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum OnTheWay {
    Before,
    After,
    Bridge(ClassId),
}

/// A list by what holds before and after; `None`: open.
type Rules = [Option<Arc<Judge>>; 2];

struct Way<'a> {
    tables: &'a mut Tables,
    moves: &'a Moves,
    pairs: BTreeMap<Pair, OnTheWay>,
    /// Numbers of the bridge lists, by the lists before and after.
    bridges: BTreeMap<[RulesId; 2], RulesId>,
    closing: Step,
    first: Step,
    second: Step,
    last: Step,
    ports_gone: BTreeSet<PortKey>,
}

/// Numbers that are used on the way only.
#[derive(Debug, Default)]
pub(super) struct Passing {
    pub(super) classes: Vec<ClassId>,
    pub(super) lists: Vec<RulesId>,
}

/// The steps of the moves, and the numbers that only they use. `rows` are those that come and go for good.
pub(super) fn steps(
    tables: &mut Tables,
    graph: &Graph,
    moves: &Moves,
    rows: &Rows,
) -> (Vec<Step>, Passing) {
    let mut way = Way {
        tables,
        moves,
        pairs: BTreeMap::new(),
        bridges: BTreeMap::new(),
        closing: Step::default(),
        first: Step::default(),
        second: Step::default(),
        last: Step::default(),
        ports_gone: rows.ports_gone.clone(),
    };
    way.choose(graph);
    way.rows(rows);
    way.addresses();
    way.pods();
    let passing = Passing {
        classes: way.bridged().map(|(_, id)| id).collect(),
        lists: way.bridges.values().copied().collect(),
    };
    (way.into_steps(rows), passing)
}

impl Way<'_> {
    /// Decides which class each address has on the way.
    fn choose(&mut self, graph: &Graph) {
        let addresses = self.moves.addresses.iter().map(|it| &it.class);
        let regions = self.moves.regions.iter().map(|it| &it.class);
        let pairs: BTreeSet<&Pair> = addresses.chain(regions).filter(|[a, b]| a != b).collect();
        let lists = &self.moves.lists;
        let before: Vec<_> = lists.gone.values().chain(lists.stay.values()).collect();
        let after: Vec<_> = lists.come.values().chain(lists.stay.values()).collect();
        let mut taken = BTreeSet::new();
        let chosen: BTreeMap<Pair, OnTheWay> = pairs
            .into_iter()
            .map(|pair| {
                let on_the_way = if !before.iter().any(|judge| tells_apart(judge, pair)) {
                    OnTheWay::After
                } else if !after.iter().any(|judge| tells_apart(judge, pair)) {
                    OnTheWay::Before
                } else {
                    let [a, b] = pair.each_ref().map(|class| self.tables.id(class).0);
                    let wanted = a.rotate_left(16) ^ b;
                    let is_taken = |it| self.tables.classes.is_taken(it) || taken.contains(&it);
                    let number = free(wanted, is_taken);
                    taken.insert(number);
                    OnTheWay::Bridge(ClassId(number))
                };
                (pair.clone(), on_the_way)
            })
            .collect();
        self.pairs = chosen;
        if !self.is_of_two_ends(graph) {
            for on_the_way in self.pairs.values_mut() {
                if matches!(on_the_way, OnTheWay::Bridge(_)) {
                    *on_the_way = OnTheWay::After;
                }
            }
        }
    }

    /// Can a packet meet two rows that change?
    fn is_of_two_ends(&self, graph: &Graph) -> bool {
        let is_bridged = |pair: &Pair| matches!(self.pairs.get(pair), Some(OnTheWay::Bridge(_)));
        let changing = self
            .moves
            .addresses
            .iter()
            .filter(|it| is_bridged(&it.class));
        let here: BTreeSet<&ObjectName> = changing.filter_map(|it| graph.pod_at(&it.key)).collect();
        self.moved().count() > 0 || here.len() > 1
    }

    /// The pods that come from one list to another.
    fn moved(&self) -> impl Iterator<Item = (&ObjectName, Rules, Rules)> {
        self.moves.pods.iter().filter_map(|(pod, before, after)| {
            let (before, after) = (before.clone()?, after.clone()?);
            (pod_rules(&before) != pod_rules(&after)).then_some((pod, before, after))
        })
    }

    fn bridged(&self) -> impl Iterator<Item = (&Pair, ClassId)> {
        self.pairs
            .iter()
            .filter_map(|(pair, on_the_way)| match on_the_way {
                OnTheWay::Bridge(id) => Some((pair, *id)),
                OnTheWay::Before | OnTheWay::After => None,
            })
    }

    /// Verdicts of everybody who may meet.
    fn rows(&mut self, rows: &Rows) {
        self.first.ports = some(&rows.ports);
        self.first.verdicts = some(&rows.verdicts);
        let lists = &self.moves.lists;
        let come = &self.moves.classes.come;
        let gone = &self.moves.classes.gone;
        let mut first: Vec<(VerdictKey, Answer)> = Vec::new();
        let mut second: Vec<(VerdictKey, Answer)> = Vec::new();
        // Rules of before meet classes that came, and rules that came classes of before.
        for (judges, classes) in [(&lists.gone, come), (&lists.come, gone)] {
            for judge in judges.values() {
                for (facts, id) in classes {
                    let answer = deviation(judge, &Class::Of(facts.clone()));
                    first.extend(answer.map(|it| (key(judge, *id), it)));
                }
            }
        }
        let bridged: Vec<(Pair, ClassId)> = self
            .bridged()
            .map(|(pair, id)| (pair.clone(), id))
            .collect();
        for (pair, id) in &bridged {
            let sides = [(&lists.gone, 0), (&lists.stay, 0), (&lists.come, 1)];
            for (judges, side) in sides {
                for judge in judges.values() {
                    // Also where the answer is the world's: a row of an earlier way between the same two may still be there.
                    if pair.iter().any(|class| judge.tells_apart(class)) {
                        first.push((key(judge, *id), judge.answer(&pair[side])));
                    }
                }
            }
            // Nobody has these rules between the two, or they do not tell the two apart.
            for judge in lists.stay.values() {
                if tells_apart(judge, pair) {
                    second.push((key(judge, *id), judge.answer(&pair[1])));
                }
            }
        }
        for (key, answer) in first {
            let row = self.passing(&answer);
            self.first.verdicts.insert(key, Some(row));
            self.last.verdicts.insert(key, None);
        }
        for (key, answer) in second {
            let row = self.passing(&answer);
            self.second.verdicts.insert(key, Some(row));
            self.last.verdicts.insert(key, None);
        }
    }

    fn passing(&mut self, answer: &Answer) -> VerdictRow {
        let mut ports = BTreeMap::new();
        let row = self
            .tables
            .passing_row(answer, &mut ports, &mut self.ports_gone);
        self.first.ports.extend(some(&ports));
        row
    }

    fn addresses(&mut self) {
        let id = |class: &Class, tables: &Tables| tables.id(class);
        let Self {
            moves,
            pairs,
            tables,
            first,
            last,
            ..
        } = self;
        let on_the_way = |class: &Pair| match pairs.get(class) {
            Some(OnTheWay::Before) => id(&class[0], tables),
            Some(OnTheWay::Bridge(id)) => *id,
            Some(OnTheWay::After) | None => id(&class[1], tables),
        };
        for Move {
            key,
            has_row,
            class,
        } in &moves.addresses
        {
            first.classes.insert(*key, Some(on_the_way(class)));
            let after = has_row[1].then(|| id(&class[1], tables));
            last.classes.insert(*key, after);
        }
        for Move {
            key,
            has_row,
            class,
        } in &moves.regions
        {
            let key = prefix(key);
            first.cidrs.insert(key, Some(on_the_way(class)));
            let none = (key == V4.0).then_some(V4.1);
            let after = has_row[1].then(|| id(&class[1], tables)).or(none);
            last.cidrs.insert(key, after);
        }
    }

    fn pods(&mut self) {
        let come = self
            .moves
            .pods
            .iter()
            .filter(|(_, before, _)| before.is_none());
        let (moved, come) = (self.moved().count(), come.count());
        let has_two_ends = self.bridged().next().is_some() || moved > 0 && moved + come > 1;
        let mut lists: Vec<Rules> = Vec::new();
        for (pod, before, after) in &self.moves.pods {
            match (before, after) {
                (Some(before), Some(after)) if has_two_ends => {
                    let [i, e] = [0, 1].map(|at| [before[at].clone(), after[at].clone()]);
                    let rules = [self.bridge(&i, &mut lists), self.bridge(&e, &mut lists)];
                    self.first.pods.insert(pod.clone(), Some(both(rules)));
                    self.second.pods.insert(pod.clone(), Some(pod_rules(after)));
                }
                // One that is not known any more is told so before others change. What `apply` makes of that: docs/policy.md.
                (_, None) => {
                    let step = match self.pairs.is_empty() {
                        true => &mut self.first,
                        false => &mut self.closing,
                    };
                    step.pods.insert(pod.clone(), None);
                }
                // One that comes is closed until others have changed.
                (None, Some(after)) if has_two_ends => {
                    self.second.pods.insert(pod.clone(), Some(pod_rules(after)));
                }
                (_, Some(after)) => {
                    self.first.pods.insert(pod.clone(), Some(pod_rules(after)));
                }
            }
        }
        if self.bridged().next().is_some() {
            // Whoever keeps its lists, too, where they tell apart what an address was from what it will be.
            for (pod, rules) in self.tables.keeping(self.moves) {
                let sides = rules.each_ref().map(|list| [list.clone(), list.clone()]);
                let [i, e] = sides.map(|side| self.bridge(&side, &mut lists));
                let (kept, passing) = (pod_rules(&rules), both([i, e]));
                if kept != passing {
                    self.first.pods.insert(pod.clone(), Some(passing));
                    self.second.pods.insert(pod, Some(kept));
                }
            }
        }
        for list in lists {
            self.bridge_rows(&list);
        }
    }

    /// The list of a pod on the way; a new one is added.
    fn bridge(&mut self, sides: &Rules, lists: &mut Vec<Rules>) -> RulesId {
        let [before, after] = sides;
        let id = |it: &Option<Arc<Judge>>| it.as_ref().map_or(RulesId::OPEN, |it| it.number);
        let ids = [id(before), id(after)];
        let is_between =
            |judge: &Arc<Judge>| self.bridged().any(|(pair, _)| tells_apart(judge, pair));
        let is_touched = sides.iter().flatten().any(is_between);
        if !is_touched {
            match sides {
                [None, None] => return RulesId::OPEN,
                [None, Some(only)] | [Some(only), None] => return only.number,
                [Some(before), Some(after)] if before.number == after.number => {
                    return before.number;
                }
                [Some(_), Some(_)] => {}
            }
        }
        if let Some(known) = self.bridges.get(&ids) {
            return *known;
        }
        let wanted = ids[0].0.rotate_left(16) ^ ids[1].0;
        let is_ours = |it: u32| self.bridges.values().any(|id| id.0 == it);
        let number = free(wanted, |it| self.tables.lists.is_taken(it) || is_ours(it));
        self.bridges.insert(ids, RulesId(number));
        lists.push(sides.clone());
        RulesId(number)
    }

    /// What a bridge list answers.
    fn bridge_rows(&mut self, sides: &Rules) {
        let [before, after] = sides;
        let id = |it: &Option<Arc<Judge>>| it.as_ref().map_or(RulesId::OPEN, |it| it.number);
        let Some(&rules) = self.bridges.get(&[id(before), id(after)]) else {
            return;
        };
        let answer = |[a, b]: [&Class; 2]| {
            let say = |judge: &Option<Arc<Judge>>, class: &Class| {
                let open = || Answer::always(Decision::OPEN);
                judge
                    .as_ref()
                    .map_or_else(open, |judge| judge.answer(class))
            };
            say(before, a).meet(&say(after, b))
        };
        let world = Class::world();
        let to_the_world = answer([&world, &world]);
        let mut answers: HashMap<ClassId, Answer> = HashMap::new();
        let gone = self.moves.classes.gone.iter();
        let gone = gone.map(|(facts, id)| (facts, id.0));
        for (facts, number) in self.tables.classes.iter().chain(gone) {
            let class = Class::Of(facts.clone());
            if sides
                .iter()
                .flatten()
                .any(|judge| judge.tells_apart(&class))
            {
                answers.insert(ClassId(number), answer([&class, &class]));
            }
        }
        for ([a, b], number) in self.bridged() {
            answers.insert(number, answer([a, b]));
        }
        answers.retain(|_, answer| *answer != to_the_world);
        answers.insert(ClassId::WORLD, to_the_world);
        for (class, answer) in answers {
            let key = VerdictKey { rules, class };
            let row = self.passing(&answer);
            self.first.verdicts.insert(key, Some(row));
            self.last.verdicts.insert(key, None);
        }
    }

    fn into_steps(self, rows: &Rows) -> Vec<Step> {
        let Self {
            closing,
            mut first,
            second,
            mut last,
            ports_gone,
            pairs,
            ..
        } = self;
        // What is on the way may be there for good, too.
        last.verdicts
            .extend(rows.verdicts_gone.iter().map(|key| (*key, None)));
        for (key, row) in &rows.verdicts {
            if last.verdicts.contains_key(key) {
                last.verdicts.insert(*key, Some(*row));
            }
        }
        last.ports.extend(ports_gone.iter().map(|key| (*key, None)));
        for (key, row) in &rows.ports {
            if ports_gone.contains(key) {
                last.ports.insert(*key, Some(*row));
            }
        }
        // One step is enough where nothing is needed only on the way.
        let comes_and_goes = last
            .verdicts
            .iter()
            .any(|(key, row)| row.is_none() && first.verdicts.contains_key(key));
        let is_after = |it: &OnTheWay| *it == OnTheWay::After;
        let is_one = second == Step::default() && !comes_and_goes && pairs.values().all(is_after);
        if is_one {
            // Rows that go do so after all others are written.
            first.classes.extend(last.classes);
            first.cidrs.extend(last.cidrs);
            first.verdicts.extend(last.verdicts);
            first.ports.extend(last.ports);
            last = Step::default();
        }
        [closing, first, second, last]
            .into_iter()
            .filter(|step| *step != Step::default())
            .collect()
    }
}

/// Do rules tell an address of the one class from one of the other?
fn tells_apart(judge: &Judge, [a, b]: &Pair) -> bool {
    match (a, b) {
        (Class::Of(a), Class::Of(b)) => a.difference(b).any(|fact| judge.asks(fact)),
        (a, b) => a != b,
    }
}

fn both([ingress, egress]: [RulesId; 2]) -> PodRules {
    PodRules { ingress, egress }
}

fn some<K: Ord + Copy, V: Copy>(rows: &BTreeMap<K, V>) -> BTreeMap<K, Option<V>> {
    rows.iter().map(|(key, row)| (*key, Some(*row))).collect()
}
