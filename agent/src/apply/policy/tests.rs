//! Histories of policy, with what a program could conclude checked after every single write.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use proptest::prelude::*;
use weir_common::device::{Device, LocalPod};
use weir_common::policy::{
    Action, Class, PortKey, PortRow, RuleId, RulesId, VerdictKey, VerdictRow,
};
use weir_common::{Addr, Mac, Port, Prefix, Protocol};

use super::{Policies, Step};
use crate::apply::fake::{FakeTable, FaultyTable, Fuse};
use crate::apply::{Devices, GRACE, Outcome, PodLease, Status};
use crate::compile::{PodRules, PolicyRows};
use crate::model::ObjectName;

const PODS: u8 = 3;
/// Not an address: a block around them all.
const AROUND: u8 = 4;

/// What a toy compiler compiles: the content of the class of each address, and of the rules of each pod.
#[derive(Clone, Debug, Default)]
struct Source {
    classes: BTreeMap<u8, u8>,
    rules: BTreeMap<u8, u8>,
}

fn lease(n: u8) -> PodLease {
    PodLease {
        pod: ObjectName::new("default", format!("p{n}")),
        ifindex: 100 + u32::from(n),
        ipv4: Some([10, 1, 0, n].into()),
        ipv6: None,
        mac: Mac([2, 0, 0, 0, 0, n]),
    }
}

fn addr(n: u8) -> Addr {
    Addr::v4([10, 0, 0, n])
}

fn class(content: u8) -> Class {
    Class(Class::FIRST_COMPILED + u32::from(content))
}

fn rules(content: u8) -> RulesId {
    RulesId(1 + u32::from(content))
}

/// A pair's meaning depends on the pair alone, as the design demands.
fn verdict(key: VerdictKey) -> VerdictRow {
    VerdictRow {
        action: Action(((key.rules.0 + key.class.0) % 2) as u8),
        rule: RuleId(key.rules.0 * 100 + key.class.0),
        ..VerdictRow::default()
    }
}

fn pairs(rules: &BTreeSet<RulesId>, classes: &BTreeSet<Class>) -> BTreeMap<VerdictKey, VerdictRow> {
    rules
        .iter()
        .flat_map(|r| classes.iter().map(|c| (*r, *c)))
        .map(|(rules, class)| VerdictKey { rules, class })
        .map(|key| (key, verdict(key)))
        .collect()
}

fn sets(source: &Source) -> (BTreeSet<RulesId>, BTreeSet<Class>) {
    let mut classes: BTreeSet<Class> = source.classes.values().map(|c| class(*c)).collect();
    classes.insert(Class::WORLD);
    (source.rules.values().map(|r| rules(*r)).collect(), classes)
}

/// The rows of a state.
fn compile(source: &Source) -> PolicyRows {
    let (all_rules, all_classes) = sets(source);
    let row = |rule| PortRow {
        action: Action::ALLOW,
        rule: RuleId(rule),
        ..PortRow::default()
    };
    PolicyRows {
        classes: source
            .classes
            .iter()
            .filter(|(n, _)| **n != AROUND)
            .map(|(n, c)| (addr(*n), class(*c)))
            .collect(),
        cidrs: [(
            Prefix::V4,
            source
                .classes
                .get(&AROUND)
                .map_or(Class::WORLD, |c| class(*c)),
        )]
        .into(),
        verdicts: pairs(&all_rules, &all_classes),
        ports: all_rules
            .iter()
            .map(|r| (PortKey::exact(r.0, Protocol::TCP, Port::from(80)), row(r.0)))
            .collect(),
        rules: (0..PODS)
            .map(|n| {
                let ingress = source.rules.get(&n).map_or(RulesId::OPEN, |r| rules(*r));
                let rules = PodRules {
                    ingress,
                    egress: RulesId::OPEN,
                };
                (lease(n).pod, rules)
            })
            .collect(),
    }
}

/// The steps from one state to another: all that may meet, and then only what the new one has.
fn steps(old: &Source, new: &Source) -> Vec<Step> {
    fn some<K: Ord + Clone, V: Clone>(rows: &BTreeMap<K, V>) -> BTreeMap<K, Option<V>> {
        let rows = rows.iter();
        rows.map(|(key, row)| (key.clone(), Some(row.clone())))
            .collect()
    }
    fn gone<K: Ord + Clone, V, W>(
        old: impl IntoIterator<Item = K>,
        new: &BTreeMap<K, V>,
    ) -> BTreeMap<K, Option<W>> {
        let gone = old.into_iter().filter(|key| !new.contains_key(key));
        gone.map(|key| (key, None)).collect()
    }
    let ((old_rules, old_classes), (new_rules, new_classes)) = (sets(old), sets(new));
    let mut meeting = pairs(&old_rules, &new_classes);
    meeting.extend(pairs(&new_rules, &old_classes));
    let (before, after) = (compile(old), compile(new));
    let mut first = Step {
        ports: some(&after.ports),
        verdicts: some(&after.verdicts),
        classes: some(&after.classes),
        cidrs: some(&after.cidrs),
        pods: some(&after.rules),
    };
    first.verdicts.extend(some(&meeting));
    first
        .classes
        .extend(gone(before.classes.into_keys(), &after.classes));
    let all = before.verdicts.into_keys().chain(meeting.into_keys());
    let last = Step {
        verdicts: gone(all, &after.verdicts),
        ports: gone(before.ports.into_keys(), &after.ports),
        ..Step::default()
    };
    vec![first, last]
}

/// What a program decides about a packet to a pod: `None` when the tables have no answer.
type Judgement = Option<bool>;
/// By device, address and epoch.
type Judgements = BTreeMap<(u32, u8, u32), BTreeSet<Judgement>>;

#[derive(Clone)]
struct World {
    classes: FakeTable<Addr, Class>,
    cidrs: FakeTable<Prefix, Class>,
    verdicts: FakeTable<VerdictKey, VerdictRow>,
    ports: FakeTable<PortKey, PortRow>,
    epoch: FakeTable<u32, u32>,
    devices: FakeTable<u32, Device>,
    pods: FakeTable<Addr, LocalPod>,
    fuse: Fuse,
    every: usize,
    judged: Arc<Mutex<Judgements>>,
}

type Faulty<K, V> = FaultyTable<FakeTable<K, V>>;
type Subject = (
    Policies<
        Faulty<Addr, Class>,
        Faulty<Prefix, Class>,
        Faulty<VerdictKey, VerdictRow>,
        Faulty<PortKey, PortRow>,
        Faulty<u32, u32>,
    >,
    Devices<Faulty<u32, Device>, Faulty<Addr, LocalPod>>,
);

impl World {
    fn new(every: usize) -> Self {
        Self::with_room(every, 256)
    }

    fn with_room(every: usize, verdicts: usize) -> Self {
        let world = Self {
            classes: FakeTable::empty(64),
            cidrs: FakeTable::empty(8),
            verdicts: FakeTable::empty(verdicts),
            ports: FakeTable::empty(64),
            epoch: FakeTable::empty(1),
            devices: FakeTable::empty(8),
            pods: FakeTable::empty(8),
            fuse: Fuse::default(),
            every,
            judged: Arc::default(),
        };
        let seen = world.clone();
        let observer: Arc<dyn Fn() + Send + Sync> = Arc::new(move || {
            let epoch = seen.epoch.rows().get(&0).copied().unwrap_or_default();
            for ifindex in seen.devices.rows().into_keys() {
                for n in 0..5 {
                    let judgement = seen.judge(ifindex, n);
                    let mut judged = seen.judged.lock().unwrap();
                    judged
                        .entry((ifindex, n, epoch))
                        .or_default()
                        .insert(judgement);
                }
            }
        });
        world.classes.observe(observer.clone());
        world.cidrs.observe(observer.clone());
        world.verdicts.observe(observer.clone());
        world.ports.observe(observer.clone());
        world.epoch.observe(observer.clone());
        world.devices.observe(observer);
        world
    }

    fn judge(&self, ifindex: u32, n: u8) -> Judgement {
        let device = self.devices.rows()[&ifindex];
        if device.ingress == RulesId::OPEN {
            return Some(true);
        }
        let own = self.classes.rows().get(&addr(n)).copied();
        let around = || self.cidrs.rows().get(&Prefix::V4).copied();
        let key = VerdictKey {
            rules: device.ingress,
            class: own.or_else(around).unwrap_or_default(),
        };
        self.verdicts
            .rows()
            .get(&key)
            .map(|row| row.action == Action::ALLOW)
    }

    fn start(&self) -> Subject {
        self.fuse.set(None);
        fn faulty<K, V>(world: &World, table: &FakeTable<K, V>) -> Faulty<K, V>
        where
            FakeTable<K, V>: Clone,
        {
            FaultyTable::with_fuse(table.clone(), world.every, world.fuse.clone())
        }
        let policies = Policies::resume(
            faulty(self, &self.classes),
            faulty(self, &self.cidrs),
            faulty(self, &self.verdicts),
            faulty(self, &self.ports),
            faulty(self, &self.epoch),
        );
        let devices = Devices::resume(faulty(self, &self.devices), faulty(self, &self.pods));
        let (mut policies, mut devices) = (policies.unwrap(), devices.unwrap());
        devices.desire_leases((0..PODS).map(lease));
        policies.allow_deletes();
        (policies, devices)
    }

    fn writes(&self) -> usize {
        self.classes.writes()
            + self.cidrs.writes()
            + self.verdicts.writes()
            + self.ports.writes()
            + self.devices.writes()
            + self.pods.writes()
    }

    fn assert_holds(&self, rows: &PolicyRows) {
        assert_eq!(self.classes.rows(), rows.classes);
        assert_eq!(self.cidrs.rows(), rows.cidrs);
        assert_eq!(self.verdicts.rows(), rows.verdicts);
        assert_eq!(self.ports.rows(), rows.ports);
        let epoch = self.epoch.rows()[&0];
        for (ifindex, device) in self.devices.rows() {
            let lease = lease((ifindex - 100) as u8);
            assert_eq!(device.ingress, rows.rules[&lease.pod].ingress);
        }
        for ((ifindex, n, judged_in), judgements) in self.judged.lock().unwrap().iter() {
            if *judged_in == epoch {
                let now = BTreeSet::from([self.judge(*ifindex, *n)]);
                assert_eq!(*judgements, now, "an old judgement outlives its policy");
            }
        }
    }
}

#[derive(Clone, Debug)]
enum Op {
    Change(Source),
    Wait(u64),
    Restart,
    DieAfter(usize),
}

fn op() -> impl Strategy<Value = Op> {
    let classes = prop::collection::btree_map(0..5u8, 0..3u8, 0..5);
    let rules = prop::collection::btree_map(0..PODS, 0..3u8, 0..3);
    prop_oneof![
        5 => (classes, rules).prop_map(|(classes, rules)| Op::Change(Source { classes, rules })),
        2 => (0..1500u64).prop_map(Op::Wait),
        1 => Just(Op::Restart),
        1 => (0..15usize).prop_map(Op::DieAfter),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn every_state_has_an_answer_and_no_judgement_outlives_its_policy(
        ops in prop::collection::vec(op(), 1..15),
        every in prop_oneof![2 => Just(0usize), 1 => 3..7usize],
    ) {
        let world = World::new(every);
        let (mut policies, mut devices) = world.start();
        let mut now = Instant::now();
        let mut source = Source::default();
        let mut clean = every == 0;
        policies.desire_exactly(compile(&source)).unwrap();
        policies.reconcile(&mut devices, now);
        for op in ops {
            match op {
                // What is underway is finished first.
                Op::Change(_) if policies.is_underway() => {}
                Op::Change(next) => {
                    policies.follow(steps(&source, &next)).unwrap();
                    source = next;
                }
                Op::Wait(ms) => now += Duration::from_millis(ms),
                Op::Restart => {
                    (policies, devices) = world.start();
                    policies.desire_exactly(compile(&source)).unwrap();
                }
                Op::DieAfter(writes) => {
                    clean = false;
                    world.fuse.set(Some(writes));
                    policies.reconcile(&mut devices, now);
                    (policies, devices) = world.start();
                    policies.desire_exactly(compile(&source)).unwrap();
                }
            }
            policies.reconcile(&mut devices, now);
        }
        world.fuse.set(None);
        for _ in 0..100 {
            now += GRACE;
            policies.reconcile(&mut devices, now);
        }
        world.assert_holds(&compile(&source));
        prop_assert_eq!(policies.status(), &Status::Done);
        if clean {
            let judged = world.judged.lock().unwrap();
            let gaps = judged.iter().filter(|(_, seen)| seen.contains(&None)).count();
            prop_assert_eq!(gaps, 0, "a pair without a row");
        }

        let (writes, epoch) = (world.writes(), policies.epoch());
        policies.desire_exactly(compile(&source)).unwrap();
        policies.reconcile(&mut devices, now);
        prop_assert_eq!(policies.epoch(), epoch, "the epoch moves though nothing changes");
        prop_assert_eq!(world.writes(), writes);
    }
}

/// What may be in a table after these steps.
fn keys_of(steps: &[Step]) -> (BTreeSet<VerdictKey>, BTreeSet<PortKey>) {
    let verdicts = steps.iter().flat_map(|step| &step.verdicts);
    let ports = steps.iter().flat_map(|step| &step.ports);
    (
        verdicts
            .filter(|(_, row)| row.is_some())
            .map(|(key, _)| *key)
            .collect(),
        ports
            .filter(|(_, row)| row.is_some())
            .map(|(key, _)| *key)
            .collect(),
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(30))]

    /// A tenth of a second between two changes, for a long time and without a pause: the tables hold what is desired
    /// and what was within the last time of grace, and no other row.
    #[test]
    fn however_often_something_changes_old_rows_go(
        sources in prop::collection::vec((0..3u8, 0..200u8, 0..PODS, 0..200u8, any::<bool>()), 60..90),
        every in prop_oneof![Just(0usize), 5..9usize],
    ) {
        let step = Duration::from_millis(100);
        let world = World::with_room(every, 128);
        let (mut policies, mut devices) = world.start();
        let mut now = Instant::now();
        let mut last = Source::default();
        // Targets, and when another one came to its place.
        let mut past: Vec<(Vec<Step>, Option<Instant>)> = Vec::new();
        policies.desire_exactly(compile(&last)).unwrap();
        policies.reconcile(&mut devices, now);
        for (address, class, pod, list, is_same) in sources {
            let next = if is_same { last.clone() } else { source(&[(address, class)], &[(pod, list)]) };
            let target = steps(&last, &next);
            last = next;
            policies.follow(target.clone()).unwrap();
            let mut outcome = policies.reconcile(&mut devices, now).outcome;
            for _ in 0..20 {
                // A refused write is tried again; another target comes only when this one is in the kernel.
                if outcome == Outcome::Complete { break; }
                outcome = policies.reconcile(&mut devices, now).outcome;
            }
            prop_assert_eq!(outcome, Outcome::Complete, "{:?}", policies.status());
            if let Some((_, end)) = past.last_mut() {
                *end = Some(now);
            }
            past.push((target, None));
            past.retain(|(_, end)| end.is_none_or(|end| now < end + GRACE));
            let (mut verdicts, mut ports) = (BTreeSet::new(), BTreeSet::new());
            for (target, _) in &past {
                let keys = keys_of(target);
                verdicts.extend(keys.0);
                ports.extend(keys.1);
            }
            let held: BTreeSet<_> = world.verdicts.rows().into_keys().collect();
            let old: Vec<_> = held.difference(&verdicts).collect();
            prop_assert!(old.is_empty(), "{} rows that nothing points to: {old:?}", old.len());
            let held: BTreeSet<_> = world.ports.rows().into_keys().collect();
            prop_assert!(held.is_subset(&ports), "{} ports, {} may be", held.len(), ports.len());
            now += step;
        }
    }
}

fn source(classes: &[(u8, u8)], rules: &[(u8, u8)]) -> Source {
    Source {
        classes: classes.iter().copied().collect(),
        rules: rules.iter().copied().collect(),
    }
}

#[test]
fn nothing_is_written_before_every_input_is_synced() {
    let world = World::new(0);
    let policies = Policies::resume(
        world.classes.clone(),
        world.cidrs.clone(),
        world.verdicts.clone(),
        world.ports.clone(),
        world.epoch.clone(),
    );
    let (mut policies, (_, mut devices)) = (policies.unwrap(), world.start());
    let one = source(&[(1, 1)], &[(0, 0)]);
    policies.desire_exactly(compile(&one)).unwrap();
    let pass = policies.reconcile(&mut devices, Instant::now());
    assert_eq!(pass.outcome, Outcome::Unfinished);
    assert!(world.classes.rows().is_empty() && world.devices.rows().is_empty());
}

#[test]
fn a_policy_that_does_not_fit_is_refused_whole_and_taken_when_it_does() {
    let world = World::with_room(0, 4);
    let (mut policies, mut devices) = world.start();
    let mut now = Instant::now();
    let (small, large) = (
        source(&[(1, 1)], &[(0, 0)]),
        source(&[(1, 1), (2, 2)], &[(0, 0), (1, 1)]),
    );
    policies.desire_exactly(compile(&small)).unwrap();
    policies.reconcile(&mut devices, now);
    let held = || {
        (
            world.verdicts.rows(),
            world.devices.rows(),
            world.classes.rows(),
        )
    };
    let before = held();
    let refused = policies.follow(steps(&small, &large)).unwrap_err();
    let expected =
        "VERDICTS has room for 4 rows and would need 6: the previous policy stays in force";
    assert_eq!(refused, expected);
    assert_eq!(
        policies.desire_exactly(compile(&large)).unwrap_err(),
        expected
    );
    policies.reconcile(&mut devices, now);
    assert_eq!(policies.status(), &Status::Done);
    assert_eq!(before, held());

    let other = source(&[(1, 2)], &[(0, 1)]);
    policies.desire_exactly(compile(&other)).unwrap();
    now += GRACE;
    for _ in 0..3 {
        policies.reconcile(&mut devices, now);
        now += GRACE;
    }
    assert_eq!(policies.status(), &Status::Done);
    world.assert_holds(&compile(&other));
}

#[test]
fn a_change_moves_the_epoch_once() {
    let world = World::new(0);
    let (mut policies, mut devices) = world.start();
    let now = Instant::now();
    let (a, b) = (source(&[(1, 1)], &[(0, 0)]), source(&[(1, 2)], &[(0, 0)]));
    policies.desire_exactly(compile(&a)).unwrap();
    policies.reconcile(&mut devices, now);
    let first = policies.epoch();
    policies.follow(steps(&a, &b)).unwrap();
    policies.reconcile(&mut devices, now);
    policies.reconcile(&mut devices, now + GRACE);
    assert_eq!(policies.epoch(), first + 1);
}

/// A reader that takes a missing row for the world's, as programs do: what the lists of an earlier agent say of classes that it did
/// not know.
#[test]
fn lists_of_an_earlier_agent_say_no_to_classes_that_it_did_not_know() {
    let world = World::new(0);
    let now = Instant::now();
    let (before, after) = (source(&[], &[(0, 0)]), source(&[(1, 2)], &[(0, 1)]));
    {
        let (mut policies, mut devices) = world.start();
        policies.desire_exactly(compile(&before)).unwrap();
        policies.reconcile(&mut devices, now);
    }
    let key = VerdictKey {
        rules: rules(0),
        class: class(2),
    };
    let seen: Arc<Mutex<Vec<Option<VerdictRow>>>> = Arc::default();
    let (verdicts, classes, noted) = (world.verdicts.clone(), world.classes.clone(), seen.clone());
    world.classes.observe(Arc::new(move || {
        if classes.rows().values().any(|it| *it == class(2)) {
            let row = verdicts.rows().get(&key).copied();
            noted.lock().unwrap().push(row);
        }
    }));
    let (mut policies, mut devices) = world.start();
    policies.desire_exactly(compile(&after)).unwrap();
    policies.reconcile(&mut devices, now);
    let seen = seen.lock().unwrap();
    assert!(!seen.is_empty());
    let denies = |row: &Option<VerdictRow>| row.is_some_and(|row| row.action == Action::DENY);
    assert!(seen.iter().all(denies), "{seen:?}");
    policies.reconcile(&mut devices, now + GRACE);
    world.assert_holds(&compile(&after));
}
