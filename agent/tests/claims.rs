//! Golden files of claims: Kubernetes YAML in, step by step, and after each step who has which address and what is to
//! be said. After each step an agent is started anew, to which everything is said in other orders: nobody may gain or
//! lose an address by that. `WEIR_BLESS=1` writes what was found into the files.
//!
//! A step ends with a line `# == then ==`; in the first one everything is said before anything counts, in whatever
//! order. `# delete Service default/web` deletes.

#![allow(clippy::unwrap_used, reason = "a test stops at the first surprise")]

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use weir_agent::compile::claims::{Address, Claims, Delta};
use weir_agent::compile::service::{NodeView, compile};
use weir_agent::compile::{Owner, ServicePlan, host_port};
use weir_agent::model::{Kind, Object, ObjectId, Snapshot};
use weir_agent::watch::documents::{Parsed, parse};
use weir_common::service::FrontendKey;

const MARK: &str = "# == who has what ==\n";
const THEN: &str = "# == then ==\n";

/// What happens to an object.
#[derive(Clone, Debug)]
enum Event {
    Applied(Object),
    Deleted(String),
}

/// What an agent knows and what follows.
#[derive(Default)]
struct World {
    snapshot: Snapshot,
    claims: Claims,
    plans: BTreeMap<Owner, Arc<ServicePlan>>,
    reports: BTreeMap<Owner, Vec<String>>,
}

impl World {
    /// A start on what the kernel holds, where everything known is said in an order of this seed.
    fn started(held: Vec<(FrontendKey, u32)>, objects: &[Object], seed: u64) -> Self {
        let mut world = Self {
            claims: Claims::resume(held),
            ..Self::default()
        };
        let mut objects = objects.to_vec();
        fastrand::Rng::with_seed(seed).shuffle(&mut objects);
        for object in objects {
            world.take(Event::Applied(object));
        }
        let delta = world.claims.everything_said();
        world.follow(delta);
        world
    }

    fn take(&mut self, event: Event) {
        let id = match event {
            Event::Applied(object) => {
                let id = object.id();
                self.snapshot.apply(object);
                id
            }
            Event::Deleted(name) => {
                let objects = self.objects();
                let id = objects.iter().map(Object::id);
                let id = id.into_iter().find(|id| id.to_string() == name).unwrap();
                self.snapshot.delete(&id);
                id
            }
        };
        let (owner, plan) = self.plan(&id);
        let delta = self.claims.update(&owner, plan);
        self.follow(delta);
    }

    fn plan(&self, id: &ObjectId) -> (Owner, Option<ServicePlan>) {
        let node = NodeView {
            name: "here",
            zone: None,
            external_ips: &["0.0.0.0/0", "::/0"].map(|range| range.parse().unwrap()),
        };
        if id.kind == Kind::Pod {
            let pod = self.snapshot.pods.get(&id.name);
            let plan = pod.and_then(|pod| host_port::compile(pod));
            return (Owner::HostPorts(id.name.clone()), plan);
        }
        let plan = self.snapshot.services.get(&id.name).map(|service| {
            let slices = self.snapshot.slices_of(&id.name).map(Arc::as_ref);
            compile(service, slices, &node, None)
        });
        (Owner::Service(id.name.clone()), plan)
    }

    /// As `apply` and the board of conditions do.
    fn follow(&mut self, delta: Delta) {
        for (owner, plan) in delta.plans {
            match plan {
                Some(plan) => self.plans.insert(owner, plan),
                None => self.plans.remove(&owner),
            };
        }
        for (owner, reports) in delta.reports {
            let reports: Vec<_> = reports.iter().map(ToString::to_string).collect();
            self.reports.insert(owner, reports);
        }
    }

    fn objects(&self) -> Vec<Object> {
        let services = self.snapshot.services.values().cloned();
        let pods = self.snapshot.pods.values().cloned();
        services
            .map(Object::Service)
            .chain(pods.map(Object::Pod))
            .collect()
    }

    /// The rows of `FRONTENDS`, with whose they are.
    fn held(&self) -> Vec<(FrontendKey, u32)> {
        let plans = self.plans.iter();
        let rows = plans.flat_map(|(owner, plan)| {
            let number = owner.numbers().next().unwrap();
            plan.frontends.iter().map(move |f| (f.key, number))
        });
        rows.collect()
    }

    fn text(&self) -> String {
        let mut holders: BTreeMap<Address, BTreeSet<&Owner>> = BTreeMap::new();
        for (owner, plan) in &self.plans {
            for frontend in &plan.frontends {
                let holders = holders.entry(Address::of(&frontend.key)).or_default();
                holders.insert(owner);
            }
        }
        let mut text = String::new();
        for (address, owners) in holders {
            assert_eq!(owners.len(), 1, "{address} is had by {owners:?}");
            writeln!(text, "{address}: {}", owners.first().unwrap()).unwrap();
        }
        for (owner, reports) in &self.reports {
            for report in reports {
                writeln!(text, "  {owner} goes without: {report}").unwrap();
            }
        }
        text
    }
}

fn events(name: &str, step: &str) -> Vec<Event> {
    let deleted = step
        .lines()
        .filter_map(|line| line.strip_prefix("# delete "));
    let deleted = deleted.map(|id| Event::Deleted(id.trim().to_owned()));
    let applied = parse(name, step).into_iter().map(|parsed| {
        let Parsed::Ours(document) = parsed else {
            panic!("{name}: a kind that is not ours");
        };
        Event::Applied(document.outcome.unwrap().object.unwrap())
    });
    deleted.chain(applied).collect()
}

/// What a file comes to.
fn found(name: &str, yaml: &str) -> String {
    let mut text = String::new();
    let mut world: Option<World> = None;
    for (number, step) in yaml.split(THEN).enumerate() {
        let events = events(name, step);
        assert!(!events.is_empty(), "{name}: step {number} is empty");
        let now = match world.take() {
            None => {
                let objects: Vec<_> = events
                    .into_iter()
                    .map(|event| match event {
                        Event::Applied(object) => object,
                        Event::Deleted(_) => panic!("{name}: nothing is there yet"),
                    })
                    .collect();
                let first = World::started(Vec::new(), &objects, 0);
                for seed in 1..20 {
                    let other = World::started(Vec::new(), &objects, seed);
                    assert_eq!(other.text(), first.text(), "{name}: an order counts");
                }
                first
            }
            Some(mut world) => {
                for event in events {
                    world.take(event);
                }
                world
            }
        };
        for seed in 0..20 {
            let next = World::started(now.held(), &now.objects(), seed);
            assert_eq!(
                next.text(),
                now.text(),
                "{name}: after a start at step {number}"
            );
            for (owner, plan) in &now.plans {
                assert_eq!(next.plans.get(owner), Some(plan), "{name}: step {number}");
            }
        }
        for line in format!("step {number}\n{}", now.text()).lines() {
            writeln!(text, "# {line}").unwrap();
        }
        world = Some(now);
    }
    text
}

#[test]
fn addresses_are_had_as_written() {
    let bless = std::env::var_os("WEIR_BLESS").is_some_and(|v| v == "1");
    let folder: PathBuf = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/claims");
    let mut paths: Vec<_> = std::fs::read_dir(&folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    paths.sort();
    assert!(
        paths.len() >= 6,
        "only {} cases in {}",
        paths.len(),
        folder.display()
    );
    let mut failures = String::new();
    for path in paths {
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        let text = std::fs::read_to_string(&path).unwrap();
        let (yaml, expected) = text.split_once(MARK).unwrap_or((&text, ""));
        let found = found(&name, yaml);
        if bless {
            std::fs::write(&path, format!("{yaml}{MARK}{found}")).unwrap();
        } else if found != expected {
            write!(failures, "\n{name}: expected\n{expected}found\n{found}").unwrap();
        }
    }
    assert!(
        failures.is_empty(),
        "{failures}\nWEIR_BLESS=1 writes what was found"
    );
}
