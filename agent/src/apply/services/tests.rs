//! Histories of Services against a naive model, with the invariants checked after every single write.

mod cases;
mod departed;
mod draining;

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use proptest::prelude::*;
use weir_common::service::{Backend, Frontend, FrontendKey, Generation, Scope};
use weir_common::{Addr, Port, Protocol};

use super::draining::UNNAMED;
use super::{GRACE, Services};
use crate::apply::Status;
use crate::apply::fake::{FakeTable, FaultyTable, Fuse};
use crate::compile::claims::Claims;
use crate::compile::{BackendAddr, FrontendPlan, Owner, ServicePlan, Way};
use crate::model::ObjectName;

type Faulty<K, V> = FaultyTable<FakeTable<K, V>>;
type Change = (Owner, Option<ServicePlan>);

/// Services behind those who decide who has which frontend, as they are in the agent.
struct Subject {
    claims: Claims,
    services:
        Services<Faulty<FrontendKey, Frontend>, Faulty<u32, Backend>, Faulty<u32, Generation>>,
}

impl Deref for Subject {
    type Target =
        Services<Faulty<FrontendKey, Frontend>, Faulty<u32, Backend>, Faulty<u32, Generation>>;

    fn deref(&self) -> &Self::Target {
        &self.services
    }
}

impl DerefMut for Subject {
    fn deref_mut(&mut self) -> &mut Self::Target {
        &mut self.services
    }
}

fn key(n: u8) -> FrontendKey {
    FrontendKey {
        addr: Addr::v4([10, 96, 0, n]),
        port: Port::from(80),
        protocol: Protocol::TCP,
        scope: Scope::INTERNAL,
        pad: [0; 4],
    }
}

fn backend(n: u8) -> BackendAddr {
    BackendAddr {
        addr: Addr::v4([10, 0, 0, n]),
        port: Port::from(8080),
    }
}

fn name(n: u8) -> Owner {
    Owner::Service(ObjectName::new("default", format!("s{n}")))
}

fn plan(service: u8, frontends: &BTreeMap<u8, (BTreeSet<u8>, u32)>) -> ServicePlan {
    plan_beside(service, frontends, &BTreeSet::new())
}

/// A plan whose Service has these endpoints too, which are not ready.
fn plan_beside(
    service: u8,
    frontends: &BTreeMap<u8, (BTreeSet<u8>, u32)>,
    unready: &BTreeSet<u8>,
) -> ServicePlan {
    let leads = |b: &u8| frontends.values().any(|(backends, _)| backends.contains(b));
    let draining = unready.iter().filter(|b| !leads(b));
    ServicePlan {
        id: name(service),
        created: None,
        draining: draining.map(|b| (Protocol::TCP, backend(*b))).collect(),
        reports: Vec::new(),
        frontends: frontends
            .iter()
            .map(|(k, (backends, affinity))| FrontendPlan {
                key: key(*k),
                way: Way::ExternalIp,
                port: Port::from(80),
                backends: backends.iter().map(|b| backend(*b)).collect(),
                affinity: *affinity,
                flags: 0,
            })
            .collect(),
    }
}

fn planned(plan: ServicePlan) -> Change {
    (plan.id.clone(), Some(plan))
}

fn deleted(service: u8) -> Change {
    (name(service), None)
}

fn simple(service: u8, k: u8, backends: &[u8]) -> Change {
    let frontends = BTreeMap::from([(k, (backends.iter().copied().collect(), 0))]);
    planned(plan(service, &frontends))
}

/// The kernel's three tables, which outlive the process, and what a reader of them may see.
struct World {
    frontends: FakeTable<FrontendKey, Frontend>,
    backends: FakeTable<u32, Backend>,
    live: FakeTable<u32, Generation>,
    fuse: Fuse,
    every: usize,
    watch: Arc<Mutex<Watch>>,
}

struct Watch {
    now: Instant,
    /// Every list of backends that a frontend was ever planned with.
    versions: BTreeMap<FrontendKey, BTreeSet<Vec<BackendAddr>>>,
    /// Whom a remembered backend stood for.
    meanings: HashMap<(u32, u32), (u32, BackendAddr)>,
    /// Endpoints that each Service's plan names.
    named: BTreeMap<u8, BTreeSet<BackendAddr>>,
    /// Those that were deleted once: rows of theirs that could not be removed yet may be taken for those of the next one
    /// of the same name.
    deleted: BTreeSet<u8>,
    /// Connections that may not be cut, since their endpoint has been named all the time: by number and generation,
    /// whose they are.
    connections: HashMap<(u32, Generation), (u8, BackendAddr)>,
    /// Numbers are scarce: connections to what drains may be cut.
    is_scarce: bool,
    /// Rows of `FRONTENDS` that a program may still hold in its hands.
    reading: BTreeMap<(FrontendKey, u32, u32), (Instant, Vec<Backend>)>,
    checks: usize,
}

impl World {
    fn new(every: usize, capacity: usize) -> Self {
        Self::with_live(every, capacity, capacity)
    }

    fn with_live(every: usize, capacity: usize, live: usize) -> Self {
        let world = Self {
            frontends: FakeTable::empty(capacity),
            backends: FakeTable::empty(capacity),
            live: FakeTable::empty(live),
            fuse: Fuse::default(),
            every,
            watch: Arc::new(Mutex::new(Watch {
                now: Instant::now(),
                versions: BTreeMap::new(),
                meanings: HashMap::new(),
                named: BTreeMap::new(),
                deleted: BTreeSet::new(),
                connections: HashMap::new(),
                is_scarce: live < 64,
                reading: BTreeMap::new(),
                checks: 0,
            })),
        };
        let (f, b, l) = (
            world.frontends.clone(),
            world.backends.clone(),
            world.live.clone(),
        );
        let watch = world.watch.clone();
        let observer: Arc<dyn Fn() + Send + Sync> = Arc::new(move || {
            watch.lock().unwrap().check(&f.rows(), &b.rows(), &l.rows());
        });
        world.frontends.observe(observer.clone());
        world.backends.observe(observer.clone());
        world.live.observe(observer);
        world
    }

    fn start(&self) -> Subject {
        let services = Services::resume(
            FaultyTable::with_fuse(self.frontends.clone(), self.every, self.fuse.clone()),
            FaultyTable::with_fuse(self.backends.clone(), self.every, self.fuse.clone()),
            FaultyTable::with_fuse(self.live.clone(), self.every, self.fuse.clone()),
        )
        .unwrap();
        Subject {
            claims: Claims::resume(services.held()),
            services,
        }
    }

    fn now(&self) -> Instant {
        self.watch.lock().unwrap().now
    }

    fn advance(&self, by: Duration) {
        self.watch.lock().unwrap().now += by;
    }

    fn expect(&self, owner: &Owner, plan: Option<&ServicePlan>) {
        let mut watch = self.watch.lock().unwrap();
        let service = service(owner);
        let named = plan.map(named).unwrap_or_default();
        watch
            .connections
            .retain(|_, (s, addr)| *s != service || named.contains(addr));
        watch.named.insert(service, named);
        if plan.is_none() {
            watch.deleted.insert(service);
        }
        for f in plan.iter().flat_map(|plan| &plan.frontends) {
            watch
                .versions
                .entry(f.key)
                .or_default()
                .insert(f.backends.clone());
        }
    }

    fn apply(&self, subject: &mut Subject, (owner, plan): Change) -> super::Pass {
        self.expect(&owner, plan.as_ref());
        let delta = subject.claims.update(&owner, plan);
        subject.services.apply(delta.plans, self.now())
    }

    /// Runs until nothing is left to do.
    fn settle(&self, services: &mut Subject) {
        for _ in 0..200 {
            self.advance(GRACE);
            services.tick(self.now());
        }
    }

    fn writes(&self) -> usize {
        self.frontends.writes() + self.backends.writes() + self.live.writes()
    }

    fn contents(&self) -> BTreeMap<FrontendKey, Vec<BackendAddr>> {
        let backends = self.backends.rows();
        self.frontends
            .rows()
            .into_iter()
            .map(|(k, f)| (k, run(&f, &backends).map(|row| addr(&row)).collect()))
            .collect()
    }
}

fn run<'a>(
    frontend: &Frontend,
    backends: &'a BTreeMap<u32, Backend>,
) -> impl Iterator<Item = Backend> + 'a {
    let segment = frontend.segment;
    (segment.start..segment.start + segment.len)
        .map(|index| backends.get(&index).copied().unwrap_or_default())
}

/// The endpoints that a plan names.
fn named(plan: &ServicePlan) -> BTreeSet<BackendAddr> {
    let draining = plan.draining.iter().map(|(_, addr)| *addr);
    let backends = plan.frontends.iter().flat_map(|f| &f.backends);
    draining.chain(backends.copied()).collect()
}

/// Which one it is of those of [`name`].
fn service(owner: &Owner) -> u8 {
    (0..=u8::MAX).find(|s| name(*s) == *owner).unwrap()
}

/// The same by its number in a row.
fn service_of(number: u32) -> u8 {
    let is_its = |s: &u8| name(*s).first_numbers().any(|own| own == number);
    (0..=u8::MAX).find(is_its).unwrap()
}

fn addr(row: &Backend) -> BackendAddr {
    BackendAddr {
        addr: row.addr,
        port: row.port,
    }
}

impl Watch {
    fn check(
        &mut self,
        frontends: &BTreeMap<FrontendKey, Frontend>,
        backends: &BTreeMap<u32, Backend>,
        live: &BTreeMap<u32, Generation>,
    ) {
        self.checks += 1;
        for (key, frontend) in frontends {
            assert_ne!(frontend.service, 0, "a service without a number");
            let rows: Vec<Backend> = run(frontend, backends).collect();
            let seen: Vec<BackendAddr> = rows.iter().map(addr).collect();
            assert!(
                self.versions.get(key).is_some_and(|v| v.contains(&seen)),
                "{key:?} leads to {seen:?}, which it was never planned to"
            );
            for row in &rows {
                let generation = live.get(&row.id).copied().unwrap_or_default();
                assert_ne!(generation.0, 0, "a backend without a generation");
                assert!(
                    generation.is_usable(),
                    "{key:?} leads to a backend that is gone"
                );
                let meaning = (frontend.service, addr(row));
                let known = self
                    .meanings
                    .entry((row.id, generation.0))
                    .or_insert(meaning);
                assert_eq!(*known, meaning, "a remembered backend became another");
                let service = service_of(frontend.service);
                let named = self.named.get(&service);
                if named.is_some_and(|named| named.contains(&addr(row)))
                    && !self.deleted.contains(&service)
                {
                    let connection = (row.id, generation);
                    self.connections.insert(connection, (service, addr(row)));
                }
            }
            let segment = frontend.segment;
            self.reading
                .insert((*key, segment.start, segment.len), (self.now, rows));
        }
        for ((id, generation), endpoint) in &self.connections {
            let now = live.get(id).copied().unwrap_or_default();
            let goes_on = now.is_same_backend(*generation) && !now.is_gone();
            assert!(
                goes_on || self.is_scarce,
                "connections to {endpoint:?} are cut"
            );
        }
        let now = self.now;
        self.reading
            .retain(|_, (at, _)| now.duration_since(*at) < GRACE);
        for ((key, start, len), (_, rows)) in &self.reading {
            let segment = weir_common::service::Segment {
                start: *start,
                len: *len,
            };
            let frontend = Frontend {
                segment,
                ..Frontend::default()
            };
            let now: Vec<Backend> = run(&frontend, backends).collect();
            assert_eq!(
                &now, rows,
                "a run that a reader of {key:?} may hold was reused"
            );
        }
    }
}

/// What is asked for, and who should have it: the first who asked, of several who are left the first name.
#[derive(Clone, Debug, Default)]
struct Model {
    plans: BTreeMap<u8, ServicePlan>,
    holders: BTreeMap<FrontendKey, u8>,
}

impl Model {
    fn asks(&self, s: u8, key: &FrontendKey) -> bool {
        let plan = self.plans.get(&s);
        plan.is_some_and(|plan| plan.frontend(key).is_some())
    }

    fn set(&mut self, s: u8, plan: Option<ServicePlan>) {
        match plan {
            Some(plan) => self.plans.insert(s, plan),
            None => self.plans.remove(&s),
        };
        for key in (0..4).map(key) {
            let holder = self.holders.remove(&key).filter(|h| self.asks(*h, &key));
            if let Some(holder) = holder.or_else(|| (0..4).find(|s| self.asks(*s, &key))) {
                self.holders.insert(key, holder);
            }
        }
    }

    /// After a death somebody else may have it, who asks for it.
    fn believe(&mut self, claims: &Claims) {
        for (key, holder) in &mut self.holders {
            let found = claims.holder(key).unwrap();
            let plans = &self.plans;
            *holder = (0..4).find(|s| name(*s) == *found).unwrap();
            assert!(plans[holder].frontend(key).is_some());
        }
    }

    fn wanted(&self) -> BTreeMap<FrontendKey, Vec<BackendAddr>> {
        let backends = |key, s| self.plans[s].frontend(key).unwrap().backends.clone();
        let held = self.holders.iter();
        held.map(|(key, s)| (*key, backends(key, s))).collect()
    }
}

fn assert_as_wanted(world: &World, model: &Model) {
    let wanted = model.wanted();
    assert_eq!(world.contents(), wanted);
    let rows: usize = wanted.values().map(Vec::len).sum();
    assert_eq!(world.backends.rows().len(), rows, "rows that nobody needs");
    let used: BTreeSet<u32> = world.backends.rows().values().map(|row| row.id).collect();
    for (id, generation) in world.live.rows() {
        assert_eq!(generation.is_usable(), used.contains(&id), "backend {id}");
    }
}

/// Nothing drains that nobody names.
fn assert_drained(world: &World) {
    let watch = world.watch.lock().unwrap();
    let live = world.live.rows().into_iter();
    for (id, generation) in live.filter(|(_, generation)| generation.is_draining()) {
        // It may have died before a row of a frontend led to it.
        if let Some((number, addr)) = watch.meanings.get(&(id, generation.usable().0)) {
            let named = watch.named.get(&service_of(*number));
            assert!(
                named.is_some_and(|named| named.contains(addr)),
                "{addr:?} drains for nobody"
            );
        }
    }
}

#[derive(Clone, Debug)]
enum Op {
    Plan(u8, BTreeMap<u8, (BTreeSet<u8>, u32)>, BTreeSet<u8>),
    Delete(u8),
    Wait(u64),
    Restart,
    /// The process dies in the middle of the next change.
    DieAfter(usize),
}

fn op() -> impl Strategy<Value = Op> {
    let frontends = prop::collection::btree_map(
        0..4u8,
        (prop::collection::btree_set(0..5u8, 0..4), 0..2u32),
        0..3,
    );
    let unready = prop::collection::btree_set(0..5u8, 0..4);
    prop_oneof![
        6 => (0..4u8, frontends, unready).prop_map(|(s, f, u)| Op::Plan(s, f, u)),
        2 => (0..4u8).prop_map(Op::Delete),
        2 => (0..1500u64).prop_map(Op::Wait),
        1 => Just(Op::Restart),
        2 => (0..12usize).prop_map(Op::DieAfter),
    ]
}

fn restart(world: &World, model: &Model) -> Subject {
    world.fuse.set(None);
    let mut subject = world.start();
    for plan in model.plans.values().rev().cloned() {
        world.apply(&mut subject, planned(plan));
    }
    let delta = subject.claims.everything_said();
    subject.services.apply(delta.plans, world.now());
    subject.allow_deletes(world.now());
    subject.tick(world.now());
    subject
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn any_history_ends_as_planned_and_is_right_at_every_write(
        ops in prop::collection::vec(op(), 1..25),
        every in prop_oneof![Just(0usize), 2..7usize],
    ) {
        let world = World::new(every, 256);
        let mut model = Model::default();
        let mut services = restart(&world, &model);
        let mut dying = false;
        // Were all writes of the agent before the last start made?
        let mut is_clean = every == 0;
        for op in ops {
            let change = match op {
                Op::Plan(s, frontends, unready) => {
                    let plan = plan_beside(s, &frontends, &unready);
                    model.set(s, Some(plan.clone()));
                    Some(planned(plan))
                }
                Op::Delete(s) => {
                    model.set(s, None);
                    Some(deleted(s))
                }
                Op::Wait(ms) => {
                    world.advance(Duration::from_millis(ms));
                    services.tick(world.now());
                    None
                }
                Op::Restart => {
                    services = restart(&world, &model);
                    if !is_clean {
                        model.believe(&services.claims);
                    }
                    None
                }
                Op::DieAfter(writes) => {
                    world.fuse.set(Some(writes));
                    dying = true;
                    None
                }
            };
            if let Some(change) = change {
                world.apply(&mut services, change);
                if std::mem::take(&mut dying) {
                    services = restart(&world, &model);
                    model.believe(&services.claims);
                }
            } else if dying {
                is_clean = false;
            }
        }
        world.fuse.set(None);
        world.settle(&mut services);
        assert_as_wanted(&world, &model);
        for (s, plan) in &model.plans {
            prop_assert_eq!(services.statuses().get(&name(*s)), Some(&Status::Done));
            let lost = plan.frontends.iter().any(|f| model.holders[&f.key] != *s);
            prop_assert_eq!(services.claims.reports(&name(*s)).is_empty(), !lost);
        }

        // Those that an earlier process left draining have no connections.
        world.watch.lock().unwrap().connections.clear();
        services.end_unled(world.now(), &HashSet::new());
        world.settle(&mut services);
        assert_drained(&world);

        let before = world.writes();
        services = restart(&world, &model);
        world.settle(&mut services);
        prop_assert_eq!(world.writes(), before, "a restart without a change writes");

        for s in 0..4 {
            world.apply(&mut services, deleted(s));
        }
        world.settle(&mut services);
        assert_as_wanted(&world, &Model::default());
        prop_assert!(world.live.rows().values().all(|g| !g.is_usable()));
    }

    #[test]
    fn small_tables_refuse_and_recover(
        ops in prop::collection::vec(op(), 1..25),
        capacity in 2..10usize,
    ) {
        let world = World::new(0, capacity);
        let mut model = Model::default();
        let mut services = restart(&world, &model);
        for op in ops {
            match op {
                Op::Plan(s, frontends, unready) => {
                    let plan = plan_beside(s, &frontends, &unready);
                    model.set(s, Some(plan.clone()));
                    world.apply(&mut services, planned(plan));
                }
                Op::Delete(s) => {
                    model.set(s, None);
                    world.apply(&mut services, deleted(s));
                }
                Op::Wait(ms) => world.advance(Duration::from_millis(ms)),
                Op::Restart | Op::DieAfter(_) => services = restart(&world, &model),
            }
        }
        for s in 0..4 {
            world.apply(&mut services, deleted(s));
        }
        world.settle(&mut services);
        assert_as_wanted(&world, &Model::default());
        world.apply(&mut services, simple(0, 0, &[1]));
        prop_assert_eq!(world.contents(), BTreeMap::from([(key(0), vec![backend(1)])]));
    }
}
