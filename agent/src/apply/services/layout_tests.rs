//! A start whose table of frontends has another layout than the one before, while programs of before still read
//! theirs.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Instant;

use weir_common::service::{Backend, Frontend, FrontendKey, Generation, Scope};
use weir_common::{Addr, Port, Protocol};

use super::{GRACE, ServiceChange, Services};
use crate::apply::Origin;
use crate::apply::fake::FakeTable;
use crate::compile::{BackendAddr, FrontendPlan, Owner, ServicePlan, Way};
use crate::model::ObjectName;

type Subject =
    Services<FakeTable<FrontendKey, Frontend>, FakeTable<u32, Backend>, FakeTable<u32, Generation>>;

struct World {
    frontends: FakeTable<FrontendKey, Frontend>,
    backends: FakeTable<u32, Backend>,
    live: FakeTable<u32, Generation>,
}

impl World {
    fn start(&self) -> Subject {
        let (frontends, backends, live) = (&self.frontends, &self.backends, &self.live);
        Services::resume(frontends.clone(), backends.clone(), live.clone()).unwrap()
    }

    /// The backends that each frontend leads to, with the number and the generation of each.
    fn read(&self) -> BTreeMap<FrontendKey, Vec<(Backend, Generation)>> {
        let (backends, live) = (self.backends.rows(), self.live.rows());
        let run = |frontend: Frontend| {
            let end = frontend.segment.start + frontend.segment.len;
            let row = |index| {
                let row: Backend = backends.get(&index).copied().unwrap_or_default();
                (row, live.get(&row.id).copied().unwrap_or_default())
            };
            (frontend.segment.start..end).map(row).collect()
        };
        let rows = self.frontends.rows().into_iter();
        rows.map(|(key, frontend)| (key, run(frontend))).collect()
    }
}

fn plan(service: u8, backends: &[u8]) -> ServiceChange {
    let backend = |n: &u8| BackendAddr {
        addr: Addr::v4([10, 0, 0, *n]),
        port: Port::from(8080),
    };
    ServiceChange::Planned(Arc::new(ServicePlan {
        id: Owner::Service(ObjectName::new("default", format!("s{service}"))),
        frontends: vec![FrontendPlan {
            key: FrontendKey {
                addr: Addr::v4([10, 96, 0, service]),
                port: Port::from(80),
                protocol: Protocol::TCP,
                scope: Scope::INTERNAL,
                pad: [0; 4],
            },
            way: Way::ClusterIp,
            port: Port::from(80),
            backends: backends.iter().map(backend).collect(),
            affinity: 0,
            flags: 0,
        }],
        created: None,
        draining: Vec::new(),
        reports: Vec::new(),
    }))
}

#[test]
fn programs_of_another_layout_find_their_rows_until_ours_are_in_their_place() {
    let before = World {
        frontends: FakeTable::empty(64),
        backends: FakeTable::empty(64),
        live: FakeTable::empty(64),
    };
    let mut now = Instant::now();
    let mut services = before.start();
    services.allow_deletes(now);
    services.apply([plan(1, &[7, 8]), plan(2, &[8]), plan(3, &[9])], now);
    let seen = before.read();
    assert_eq!(seen.len(), 3);
    drop(services);

    let after = World {
        frontends: FakeTable::empty(64),
        backends: before.backends.clone(),
        live: before.live.clone(),
    };
    let first = Generation(1000);
    let mut services = after
        .start()
        .after_another_layout(Origin::Made, Origin::Kept, first);
    // Meanwhile one backend has come and one has gone, and a Service.
    for change in [plan(1, &[6, 7, 8]), plan(2, &[5]), plan(4, &[9])] {
        now += GRACE;
        services.apply([change], now);
        services.tick(now);
        assert_eq!(before.read(), seen, "programs of before miss something");
    }
    let filled = after.read();
    assert_eq!(filled.len(), 3);
    let remembered: BTreeSet<_> = seen
        .values()
        .flatten()
        .map(|(row, g)| (row.id, g.0))
        .collect();
    for (backend, generation) in filled.values().flatten() {
        let same = seen
            .values()
            .flatten()
            .any(|(row, _)| row.addr == backend.addr);
        let is_remembered = remembered.contains(&(backend.id, generation.0));
        assert_eq!(same, is_remembered, "{backend:?}");
    }

    services.allow_deletes(now);
    services.tick(now);
    now += GRACE;
    services.tick(now);
    assert_eq!(after.read(), filled);
    let rows: usize = filled.values().map(Vec::len).sum();
    assert_eq!(after.backends.rows().len(), rows, "rows that nobody needs");
    let used: BTreeSet<u32> = filled.values().flatten().map(|(row, _)| row.id).collect();
    for (id, generation) in after.live.rows() {
        assert_eq!(generation.is_usable(), used.contains(&id), "backend {id}");
    }
}

#[test]
fn generations_of_a_new_table_are_none_that_anything_remembers() {
    let world = World {
        frontends: FakeTable::empty(8),
        backends: FakeTable::empty(8),
        live: FakeTable::empty(8),
    };
    let first = Generation(1000);
    let mut services = world
        .start()
        .after_another_layout(Origin::Made, Origin::Made, first);
    services.apply([plan(1, &[7])], Instant::now());
    let generations: Vec<u32> = world.live.rows().values().map(|g| g.0).collect();
    // The first is nobody's.
    assert_eq!(generations, [2, 1004]);
}

#[test]
fn a_service_has_the_same_number_whatever_was_there_before_it() {
    let number_beside = |others: &[u8]| {
        let world = World {
            frontends: FakeTable::empty(64),
            backends: FakeTable::empty(64),
            live: FakeTable::empty(64),
        };
        let mut services = world.start();
        let all = others
            .iter()
            .chain(&[1])
            .map(|service| plan(*service, &[7]));
        services.apply(all, Instant::now());
        let rows = world.frontends.rows();
        let row = rows
            .iter()
            .find(|(key, _)| key.addr == Addr::v4([10, 96, 0, 1]));
        row.unwrap().1.service
    };
    assert_eq!(number_beside(&[]), number_beside(&[2, 3]));
}
