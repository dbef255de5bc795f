//! What becomes of a backend that leaves a run: it drains, comes back, or is gone.

use super::*;
use crate::apply::KernelTable as _;

/// What the Service should be next: the endpoints that are ready, and those that are named although they are not.
/// `None`: it is deleted.
type Next<'a> = Option<(&'a [u8], &'a [u8])>;

fn change((ready, unready): (&[u8], &[u8])) -> Change {
    let frontends = BTreeMap::from([(1, (ready.iter().copied().collect(), 0))]);
    let unready = unready.iter().copied().collect();
    planned(plan_beside(0, &frontends, &unready))
}

fn next(next: Next<'_>) -> Change {
    next.map_or_else(|| deleted(0), change)
}

/// The number that a run has a backend under.
fn id_of(world: &World, n: u8) -> Option<u32> {
    let rows = world.backends.rows();
    let frontend = world.frontends.rows().get(&key(1)).copied()?;
    let found = run(&frontend, &rows).find(|row| addr(row) == backend(n));
    found.map(|row| row.id)
}

fn state(world: &World, id: u32) -> u32 {
    world.live.rows().get(&id).copied().unwrap_or_default().0
}

const USABLE: u32 = 4;
const DRAINING: u32 = 5;
const GONE: u32 = 6;

#[test]
fn a_backend_drains_while_it_is_named_and_is_gone_with_its_name() {
    // After the first step, in which 7 is ready: what is next, and how 7's number is then.
    type Case<'a> = (&'a str, &'a [(Next<'a>, u32)]);
    let cases: [Case<'_>; 8] = [
        (
            "a rolling update",
            &[
                (Some((&[7, 8], &[])), USABLE),
                (Some((&[8], &[7])), DRAINING),
                (Some((&[8, 9], &[7])), DRAINING),
                (Some((&[8, 9], &[])), GONE),
            ],
        ),
        (
            "readiness lost and regained",
            &[
                (Some((&[8], &[7])), DRAINING),
                (Some((&[7, 8], &[])), USABLE),
                (Some((&[8], &[7])), DRAINING),
                (Some((&[7], &[])), USABLE),
            ],
        ),
        ("nothing is ready", &[(Some((&[], &[7])), DRAINING)]),
        (
            "named no more, in one step",
            &[(Some((&[8], &[])), GONE), (Some((&[8], &[7])), GONE)],
        ),
        ("its Service is deleted", &[(None, GONE)]),
        (
            "its Service is deleted while it drains",
            &[(Some((&[8], &[7])), DRAINING), (None, GONE)],
        ),
        (
            "another of the same address has another number",
            &[(Some((&[8], &[])), GONE), (Some((&[7], &[])), GONE)],
        ),
        (
            "a Service of the same name is another one",
            &[(None, GONE), (Some((&[7], &[])), GONE)],
        ),
    ];
    for (name, steps) in cases {
        let world = World::new(0, 64);
        let mut services = restart(&world, &Model::default());
        world.apply(&mut services, change((&[7], &[])));
        let id = id_of(&world, 7).unwrap();
        assert_eq!(state(&world, id), USABLE);
        for (step, expected) in steps {
            let is_ending = *expected == GONE && state(&world, id) != GONE;
            world.apply(&mut services, next(*step));
            if is_ending {
                assert_eq!(state(&world, id), DRAINING, "{name}: {step:?}");
                let nearly = UNNAMED - Duration::from_millis(1);
                for (pause, still) in [(nearly, DRAINING), (UNNAMED - nearly, GONE)] {
                    world.advance(pause);
                    services.tick(world.now());
                    assert_eq!(state(&world, id), still, "{name}: {step:?}");
                }
            }
            assert_eq!(state(&world, id), *expected, "{name}: {step:?}");
            if let Some(now) = id_of(&world, 7) {
                assert_eq!(now == id, *expected == USABLE, "{name}: {step:?}");
            }
        }
        world.advance(UNNAMED);
        services.tick(world.now());
        assert_drained(&world);
    }
}

#[test]
fn an_endpoint_that_is_in_no_slice_for_a_moment_keeps_its_connections() {
    for (name, away, back) in [
        ("ready", Some((&[8][..], &[][..])), (&[7, 8][..], &[][..])),
        ("unready", Some((&[8], &[])), (&[8], &[7])),
        ("its Service, too", None, (&[7], &[])),
    ] {
        let world = World::new(0, 64);
        let mut services = restart(&world, &Model::default());
        world.apply(&mut services, change((&[7, 8], &[])));
        let id = id_of(&world, 7).unwrap();
        // Each time anew.
        for _ in 0..3 {
            world.apply(&mut services, next(away));
            world.advance(UNNAMED / 2);
            services.tick(world.now());
            assert_eq!(state(&world, id), DRAINING, "{name}");
            world.apply(&mut services, change(back));
            let is_ready = back.0.contains(&7);
            let expected = if is_ready { USABLE } else { DRAINING };
            assert_eq!(state(&world, id), expected, "{name}");
            assert_eq!(id_of(&world, 7), is_ready.then_some(id), "{name}");
            world.advance(2 * UNNAMED);
            services.tick(world.now());
            assert_eq!(state(&world, id), expected, "{name}");
        }
    }
}

#[test]
fn a_backend_of_two_ways_drains_when_the_last_one_leaves_it() {
    let world = World::new(0, 64);
    let mut services = restart(&world, &Model::default());
    let ways = |first: &[u8], second: &[u8]| {
        let run = |backends: &[u8]| (backends.iter().copied().collect(), 0);
        let frontends = BTreeMap::from([(1, run(first)), (2, run(second))]);
        planned(plan_beside(0, &frontends, &BTreeSet::from([7])))
    };
    world.apply(&mut services, ways(&[7, 8], &[7, 8]));
    let id = id_of(&world, 7).unwrap();
    world.apply(&mut services, ways(&[8], &[7, 8]));
    assert_eq!(state(&world, id), USABLE);
    world.apply(&mut services, ways(&[8], &[8]));
    assert_eq!(state(&world, id), DRAINING);
}

#[test]
fn a_restart_cuts_nothing_that_may_go_on() {
    // What was before, what is after, how 7's number is then, and how when no connection leads to it any more.
    type Case<'a> = (&'a str, (&'a [u8], &'a [u8]), Next<'a>, [u32; 2]);
    let in_use: (&[u8], &[u8]) = (&[7, 8], &[]);
    let draining: (&[u8], &[u8]) = (&[8], &[7]);
    let cases: [Case<'_>; 9] = [
        ("in use", in_use, Some(in_use), [USABLE; 2]),
        ("left", in_use, Some(draining), [DRAINING; 2]),
        ("left unnamed", in_use, Some((&[8], &[])), [DRAINING, GONE]),
        ("in use and deleted", in_use, None, [DRAINING, GONE]),
        ("drains", draining, Some(draining), [DRAINING, GONE]),
        ("drained", draining, Some((&[8], &[])), [DRAINING, GONE]),
        ("ready again", draining, Some(in_use), [DRAINING, GONE]),
        ("drained and deleted", draining, None, [DRAINING, GONE]),
        ("gone", (&[8], &[]), Some(in_use), [GONE; 2]),
    ];
    for (name, before, after, expected) in cases {
        let world = World::new(0, 64);
        let mut services = restart(&world, &Model::default());
        world.apply(&mut services, change(in_use));
        let id = id_of(&world, 7).unwrap();
        world.apply(&mut services, change(before));
        world.advance(UNNAMED);
        services.tick(world.now());
        let mut model = Model::default();
        if let (_, Some(plan)) = next(after) {
            model.set(0, Some(plan));
        }
        world.expect(&super::name(0), model.plans.get(&0));
        let mut services = restart(&world, &model);
        assert_eq!(state(&world, id), expected[0], "{name}");
        let began = world.now();
        world.advance(2 * UNNAMED);
        services.tick(world.now());
        let known = state(&world, id);
        let one = HashSet::from([(id, Generation(USABLE))]);
        services.end_unled(world.now(), &one);
        services.end_unled(began, &HashSet::new());
        assert_eq!(state(&world, id), known, "{name}: there is one, or was");
        world.watch.lock().unwrap().connections.clear();
        let other = HashSet::from([(id, Generation(USABLE + 4)), (id + 1, Generation(USABLE))]);
        services.end_unled(world.now(), &other);
        services.tick(world.now());
        assert_eq!(state(&world, id), expected[1], "{name}: there is none");
    }
}

#[test]
fn a_process_that_dies_between_two_writes_cuts_nothing_that_may_go_on() {
    // The new backend's generation, the two rows of the run, the frontend; what is left is that 7 drains.
    for writes in 0..=4 {
        let world = World::new(0, 64);
        let mut services = restart(&world, &Model::default());
        world.apply(&mut services, change((&[7, 8], &[])));
        let id = id_of(&world, 7).unwrap();
        world.fuse.set(Some(writes));
        let after = change((&[8, 9], &[7]));
        world.apply(&mut services, after.clone());
        let leads_to_it = id_of(&world, 7).is_some();
        assert_eq!(leads_to_it, writes < 4, "{writes} writes");
        assert_eq!(state(&world, id), USABLE, "{writes} writes");
        let mut model = Model::default();
        model.set(0, after.1);
        restart(&world, &model);
        assert_eq!(state(&world, id), DRAINING, "{writes} writes");
        assert_eq!(id_of(&world, 7), None);
    }
}

#[test]
fn what_drains_makes_room_for_what_is_new_longest_first() {
    // Seven numbers.
    let world = World::with_live(0, 64, 8);
    let mut services = restart(&world, &Model::default());
    world.apply(&mut services, change((&[1, 2, 3, 4, 5, 6, 7], &[])));
    let ids: Vec<u32> = (1..=7).filter_map(|n| id_of(&world, n)).collect();
    assert_eq!(ids.len(), 7);
    world.apply(&mut services, change((&[1, 3, 4, 5, 6, 7], &[2])));
    world.apply(&mut services, change((&[3, 4, 5, 6, 7], &[1, 2])));
    let states = |world: &World| [0, 1].map(|at| state(world, ids[at]));
    assert_eq!(states(&world), [DRAINING; 2]);

    // 2 is wanted again and has drained longest: it is 1 that makes room for 8.
    world.apply(&mut services, change((&[2, 3, 4, 5, 6, 7, 8], &[1])));
    assert_eq!(id_of(&world, 2), Some(ids[1]));
    assert_eq!(id_of(&world, 8), Some(ids[0]));
    assert_eq!(states(&world), [USABLE + 4, USABLE]);

    // All others drain, in this order, and make room in it.
    let others = [7, 6, 5, 4, 3, 2];
    for left in 1..=others.len() {
        let (unready, ready) = (&others[..left], &others[left..]);
        let ready: Vec<u8> = ready.iter().copied().chain([8]).collect();
        world.apply(&mut services, change((&ready, unready)));
    }
    let drain = |world: &World, n: u8| {
        let id = ids[usize::from(n) - 1];
        state(world, id) == DRAINING
    };
    world.apply(&mut services, change((&[8, 9, 10], &others)));
    let left: Vec<u8> = others.into_iter().filter(|n| drain(&world, *n)).collect();
    assert_eq!(left, others[2..]);

    // A run that is longer than what drained last finds room.
    world.apply(&mut services, change((&[8], &[2, 3, 4, 5, 6, 7])));
    world.apply(
        &mut services,
        change((&[8, 9, 10, 11], &[2, 3, 4, 5, 6, 7])),
    );
    assert_eq!(services.statuses()[&name(0)], Status::Done);
    assert_eq!(world.contents()[&key(1)].len(), 4);
    let left: Vec<u8> = others.into_iter().filter(|n| drain(&world, *n)).collect();
    assert_eq!(left, others[3..]);
}

#[test]
fn before_every_input_is_synced_nothing_ends() {
    let world = World::new(0, 64);
    let mut services = restart(&world, &Model::default());
    world.apply(&mut services, change((&[7], &[])));
    let id = id_of(&world, 7).unwrap();

    // While the agent was away the address was given to another Service, which is heard of first.
    let mut services = world.start().services;
    let plans = |changes: [Change; 1]| changes.map(|(owner, plan)| (owner, plan.map(Arc::new)));
    services.apply(plans([simple(1, 1, &[7])]), world.now());
    assert_ne!(id_of(&world, 7), Some(id));
    assert_eq!(state(&world, id), DRAINING);
    let frontends = BTreeMap::from([(2, (BTreeSet::new(), 0))]);
    let moved = plan_beside(0, &frontends, &BTreeSet::from([7]));
    world.expect(&name(0), Some(&moved));
    services.apply(plans([planned(moved)]), world.now());
    services.allow_deletes(world.now());
    services.tick(world.now());
    assert_eq!(state(&world, id), DRAINING);
}

#[test]
fn the_number_of_nobody_is_gone_whatever_is_written_there() {
    for found in [0, USABLE, DRAINING, GONE, USABLE + 4] {
        // Two numbers beside it.
        let world = World::with_live(0, 64, 3);
        let nobody = || world.live.rows().get(&0).copied().unwrap_or_default();
        let written = Generation(found);
        let mut live = world.live.clone();
        live.set(&[(0, written)]).unwrap();
        let mut services = restart(&world, &Model::default());
        assert!(nobody().is_gone() && nobody().0 != 0, "{found}");
        world.apply(&mut services, change((&[1], &[])));
        for next in [3, 4, 5] {
            world.apply(&mut services, change((&[next], &[])));
            world.advance(UNNAMED);
            services.tick(world.now());
            let id = id_of(&world, next).unwrap();
            assert_ne!(id, 0, "{found}");
        }
        assert!(nobody().is_gone(), "{found}");
    }
}
