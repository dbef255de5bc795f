//! Which backends connected UDP sockets are to be taken from, and when.

use super::*;
use crate::apply::{Departed, Origin};

fn udp(ready: &[u8], protocol: Protocol) -> Change {
    let frontends = BTreeMap::from([(1, (ready.iter().copied().collect(), 0))]);
    let mut plan = plan(0, &frontends);
    plan.frontends[0].key.protocol = protocol;
    planned(plan)
}

fn these(backends: &[u8]) -> Option<Departed> {
    let backends = backends.iter().map(|n| backend(*n));
    Some(Departed::These(backends.collect()))
}

#[test]
fn a_backend_of_udp_that_takes_no_datagrams_any_more_is_named_twice() {
    // What is ready after the first step, in which 7, 8 and 9 are; then who is named.
    type Case<'a> = (&'a str, Protocol, &'a [&'a [u8]], Option<Departed>);
    let cases: [Case<'_>; 5] = [
        ("two go", Protocol::UDP, &[&[9]], these(&[7, 8])),
        (
            "two go, one by one",
            Protocol::UDP,
            &[&[8, 9], &[9]],
            these(&[7, 8]),
        ),
        (
            "one goes and comes back",
            Protocol::UDP,
            &[&[8, 9], &[7, 8, 9]],
            None,
        ),
        ("one comes", Protocol::UDP, &[&[7, 8, 9, 10]], None),
        ("of TCP", Protocol::TCP, &[&[9]], None),
    ];
    for (name, protocol, steps, expected) in cases {
        let world = World::new(0, 64);
        let mut services = restart(&world, &Model::default());
        world.apply(&mut services, udp(&[7, 8, 9], protocol));
        assert_eq!(services.take_departed(world.now()), None, "{name}");
        for ready in steps {
            world.apply(&mut services, udp(ready, protocol));
        }
        assert_eq!(services.take_departed(world.now()), expected, "{name}");
        assert_eq!(services.take_departed(world.now()), None, "{name}");
        world.advance(GRACE);
        assert_eq!(services.take_departed(world.now()), expected, "{name}");
        world.advance(GRACE);
        assert_eq!(services.take_departed(world.now()), None, "{name}");
    }
}

#[test]
fn while_its_row_could_not_be_written_a_backend_is_not_named() {
    let world = World::new(0, 64);
    let mut services = restart(&world, &Model::default());
    world.apply(&mut services, udp(&[7, 8], Protocol::UDP));
    // The run and its frontend are written, the state of 7 is not.
    world.fuse.set(Some(2));
    world.apply(&mut services, udp(&[8], Protocol::UDP));
    let is_drained = || world.live.rows().values().any(|it| it.is_draining());
    assert!(!is_drained());
    assert_eq!(services.take_departed(world.now()), None);
    world.fuse.set(None);
    services.tick(world.now());
    assert!(is_drained());
    assert_eq!(services.take_departed(world.now()), these(&[7]));
}

#[test]
fn what_went_before_a_start_is_looked_for_once_deletes_are_allowed() {
    for (live, expected) in [
        (Origin::Kept, Some(Departed::Any)),
        // Nobody knows what sockets remember of a table of another layout.
        (Origin::Made, None),
    ] {
        let world = World::new(0, 64);
        let Subject { services, .. } = world.start();
        let mut services = services.after_another_layout(Origin::Kept, live, Generation(100));
        assert_eq!(services.take_departed(world.now()), None, "{live:?}");
        services.allow_deletes(world.now());
        for _ in 0..2 {
            assert_eq!(services.take_departed(world.now()), expected, "{live:?}");
            world.advance(GRACE);
        }
        assert_eq!(services.take_departed(world.now()), None, "{live:?}");
    }
}
