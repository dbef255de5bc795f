//! Single cases of Services, in the world of their histories.

use super::*;

fn started(world: &World) -> Subject {
    restart(world, &Model::default())
}

#[test]
fn a_backend_shared_by_two_frontends_of_a_service_has_one_number() {
    let world = World::new(0, 64);
    let mut services = started(&world);
    let frontends = BTreeMap::from([
        (1, (BTreeSet::from([7, 8]), 0)),
        (2, (BTreeSet::from([8]), 0)),
    ]);
    world.apply(&mut services, planned(plan(0, &frontends)));
    let ids: BTreeSet<u32> = world.backends.rows().values().map(|row| row.id).collect();
    assert_eq!(ids.len(), 2);
    // And nobody's.
    assert_eq!(world.live.rows().len(), 3);
}

#[test]
fn a_backend_that_stays_keeps_its_generation() {
    let world = World::new(0, 64);
    let mut services = started(&world);
    world.apply(&mut services, simple(0, 1, &[7, 8]));
    let id_of = |n: u8| {
        let rows = world.backends.rows();
        rows.values()
            .find(|row| addr(row) == backend(n))
            .unwrap()
            .id
    };
    let (stays, goes) = (id_of(7), id_of(8));
    let before = world.live.rows();
    world.apply(&mut services, simple(0, 1, &[7, 9]));
    let after = world.live.rows();
    assert_eq!(before[&stays], after[&stays]);
    assert!(!after[&goes].is_usable());
}

#[test]
fn one_endpoint_more_is_one_frontend_written() {
    let world = World::new(0, 4096);
    let mut services = started(&world);
    for s in 0..40 {
        world.apply(&mut services, simple(s, s, &[1, 2, 3]));
    }
    let before = world.writes();
    world.apply(&mut services, simple(7, 7, &[1, 2, 3, 4]));
    assert_eq!(
        world.writes() - before,
        1 + 4 + 1,
        "LIVE, the run, the frontend"
    );
}

#[test]
fn no_backend_is_a_row_with_an_empty_run() {
    let world = World::new(0, 64);
    let mut services = started(&world);
    world.apply(&mut services, simple(0, 1, &[]));
    assert_eq!(world.frontends.rows()[&key(1)].segment.len, 0);
    assert_eq!(services.statuses()[&name(0)], Status::Done);
}

#[test]
fn nothing_is_taken_away_before_every_input_is_synced() {
    let world = World::new(0, 64);
    let mut services = started(&world);
    world.apply(&mut services, simple(0, 1, &[7, 8]));
    world.apply(&mut services, simple(1, 2, &[7]));
    let before = world.contents();

    let mut services = world.start();
    world.apply(&mut services, simple(0, 1, &[7]));
    assert_eq!(world.contents(), before);
    assert_eq!(services.statuses()[&name(0)], Status::Pending);
    world.apply(&mut services, simple(0, 1, &[7, 8, 9]));
    assert_eq!(
        world.contents()[&key(1)].len(),
        3,
        "additions need not wait"
    );
    world.apply(&mut services, simple(0, 1, &[9]));

    // Nobody asked for the other one again.
    world.expect(&name(1), None);
    services.allow_deletes(world.now());
    services.tick(world.now());
    let after = BTreeMap::from([(key(1), vec![backend(9)])]);
    assert_eq!(world.contents(), after);
}

#[test]
fn a_full_table_names_the_service_that_lost_and_nothing_else_suffers() {
    let world = World::with_live(0, 64, 8);
    let mut services = started(&world);
    world.apply(&mut services, simple(0, 1, &[1, 2]));
    world.apply(&mut services, simple(1, 2, &[1, 2, 3, 4, 5, 6]));
    world.apply(&mut services, simple(2, 3, &[1, 2, 3]));
    let two = |services: &Subject| services.statuses()[&name(2)].clone();
    assert_eq!(two(&services), Status::Done);
    assert_eq!(world.contents()[&key(1)].len(), 2);
    assert_eq!(world.contents()[&key(3)].len(), 3);
    let why = "10.96.0.2:80 TCP: LIVE has no room for all of 6 backends".to_owned();
    assert_eq!(services.take_news(), [(name(1), Some(why.clone()))]);
    assert_eq!(services.failed().collect::<Vec<_>>(), [(&name(1), &*why)]);

    // It is tried again and again, at no cost to the others, and is nobody's news meanwhile.
    let before = world.writes();
    for _ in 0..5 {
        world.advance(GRACE);
        services.tick(world.now());
    }
    assert_eq!(world.writes(), before);
    assert_eq!(services.take_news(), []);
    world.apply(&mut services, simple(2, 3, &[1]));
    assert_eq!(two(&services), Status::Done);

    world.apply(&mut services, deleted(2));
    world.apply(&mut services, simple(1, 2, &[1, 2]));
    assert_eq!(services.take_news(), [(name(1), None)]);
    assert_eq!(services.failed().count(), 0);
    assert_eq!(world.contents()[&key(2)].len(), 2);
}

#[test]
fn a_service_that_does_not_fit_keeps_its_last_good_backends_and_says_so() {
    let world = World::new(0, 4);
    let mut services = started(&world);
    world.apply(&mut services, simple(0, 1, &[1]));
    world.apply(&mut services, simple(1, 2, &[1, 2, 3, 4, 5]));
    world.apply(&mut services, simple(0, 1, &[1, 2, 3, 4, 5]));
    assert_eq!(
        world.contents(),
        BTreeMap::from([(key(1), vec![backend(1)])])
    );
    for s in [0, 1] {
        let Status::Failed(reason) = &services.statuses()[&name(s)] else {
            panic!("nobody knows");
        };
        assert!(reason.contains("BACKENDS has no room for 5"), "{reason}");
    }
}

#[test]
fn rows_that_make_no_sense_are_replaced_and_never_trusted() {
    let world = World::new(0, 64);
    let mut services = started(&world);
    world.apply(&mut services, simple(0, 1, &[7, 8]));
    world.apply(&mut services, simple(1, 2, &[7]));
    let mut first = world.frontends.rows()[&key(1)];
    world.backends.tamper(|rows| {
        rows.remove(&first.segment.start);
    });
    first.segment.start = u32::MAX;
    world.frontends.tamper(|rows| {
        rows.insert(key(2), first);
    });
    world.watch.lock().unwrap().reading.clear();
    let silent = World {
        frontends: FakeTable::with_rows(64, world.frontends.rows()),
        backends: FakeTable::with_rows(64, world.backends.rows()),
        live: FakeTable::with_rows(64, world.live.rows()),
        ..world
    };
    let mut services = silent.start();
    for change in [simple(0, 1, &[7, 8]), simple(1, 2, &[7])] {
        silent.apply(&mut services, change);
    }
    // The second row seems to be the first Service's, until it is known that it does not ask for it.
    let delta = services.claims.everything_said();
    services.apply(delta.plans, silent.now());
    services.allow_deletes(silent.now());
    silent.settle(&mut services);
    let expected = BTreeMap::from([
        (key(1), vec![backend(7), backend(8)]),
        (key(2), vec![backend(7)]),
    ]);
    assert_eq!(silent.contents(), expected);
}

#[test]
fn what_somebody_else_changed_is_put_right_after_an_audit() {
    let world = World::new(0, 64);
    let mut services = started(&world);
    world.apply(&mut services, simple(0, 1, &[7, 8]));
    let good = world.frontends.rows();
    world.frontends.tamper(BTreeMap::clear);
    assert_eq!(services.audit().unwrap(), 1);
    services.tick(world.now());
    assert_eq!(world.frontends.rows(), good);
    assert_eq!(services.audit().unwrap(), 0);
}

#[test]
fn the_checks_were_really_made() {
    let world = World::new(0, 64);
    let mut services = started(&world);
    world.apply(&mut services, simple(0, 1, &[7, 8]));
    let watch = world.watch.lock().unwrap();
    assert_eq!(watch.checks, world.writes());
    assert!(watch.checks >= 5);
}
