//! Whole histories of the line, in memory: random changes of all kinds, with faults. One rule is asked of each: what
//! is wrong with an object, a pod or another node changes nothing for anybody else. So each history runs twice, with
//! and without its troublemakers, and everybody else must end with the same.

mod machine;
mod world;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread;

use world::{Objects, Outcome, Step, World, objects};

/// How many histories; each is run twice.
const HISTORIES: u64 = 10_000;
const STEPS: usize = 14;

#[test]
fn a_fault_of_an_object_pod_or_peer_changes_nothing_for_anybody_else() {
    let threads = thread::available_parallelism().map_or(1, |n| n.get() as u64);
    thread::scope(|scope| {
        for first in 0..threads {
            scope.spawn(move || {
                let objects = Arc::new(objects());
                for seed in (first..HISTORIES).step_by(threads as usize) {
                    check(seed, &objects);
                }
            });
        }
    });
}

#[test]
fn the_histories_do_what_they_are_meant_to() {
    let objects = Arc::new(objects());
    let (mut answered, mut troubled, mut restarts) = (0, 0, 0);
    for seed in 0..300 {
        let steps = steps(seed);
        restarts += steps
            .iter()
            .filter(|step| matches!(step, Step::Restart))
            .count();
        let outcome = run(&steps, &objects);
        answered += outcome.opened;
        troubled += outcome.conditions;
    }
    assert!(answered > 150, "{answered} ADDs were answered well");
    assert!(troubled > 150, "{troubled} conditions held at the end");
    assert!(restarts > 100, "{restarts} restarts");
}

#[test]
fn settings_of_a_device_that_cannot_be_put_back_are_its_pods_condition_until_they_are() {
    let mut world = World::new(Arc::new(objects()));
    for step in [
        Step::Said("pod good-a"),
        Step::Said("pod good-b"),
        Step::Add("good-a"),
        Step::Add("good-b"),
    ] {
        world.step(&step);
    }
    let looks = |world: &mut World| {
        (0..3).for_each(|_| world.step(&Step::Tick));
        world.troubled("DeviceSettings")
    };
    assert_eq!(looks(&mut world), [""; 0]);
    world.settings_stick("good-a", true);
    let troubled = looks(&mut world);
    assert!(
        troubled.len() == 1 && troubled[0].contains("good-a"),
        "{troubled:?}"
    );
    world.settings_stick("good-a", false);
    assert_eq!(looks(&mut world), [""; 0]);
}

/// The answer is of what was compiled. While the kernel does not have it, that is said.
#[test]
fn an_answer_about_what_the_kernel_does_not_have_yet_says_so() {
    let mut world = World::new(Arc::new(objects()));
    for step in [
        Step::Said("pod good-a"),
        Step::Said("pod good-b"),
        Step::Add("good-a"),
        Step::Add("good-b"),
        Step::Tick,
    ] {
        world.step(&step);
    }
    let asked = |world: &World| world.explain("shop/good-a", "shop/good-b:80");
    assert_eq!(asked(&world).awaits, None);
    world.refuse_class_of("good-a");
    world.step(&Step::Said("policy good"));
    let explained = asked(&world);
    assert!(explained.awaits.is_some(), "{explained:?}");
    let words = weir_cli::explained::words(&explained);
    assert!(
        words.starts_with("A change of policy is under way on this node (")
            && words.contains("injected"),
        "{words}"
    );
}

fn steps(seed: u64) -> Vec<Step> {
    let mut random = fastrand::Rng::with_seed(seed);
    (0..STEPS).map(|_| Step::random(&mut random)).collect()
}

fn run(steps: &[Step], objects: &Arc<Objects>) -> Outcome {
    let mut world = World::new(objects.clone());
    for step in steps {
        world.step(step);
    }
    world.finish()
}

fn check(seed: u64, objects: &Arc<Objects>) {
    let all = steps(seed);
    let good: Vec<Step> = all
        .iter()
        .filter(|step| !step.is_trouble())
        .cloned()
        .collect();
    let both = catch_unwind(AssertUnwindSafe(|| {
        (run(&all, objects), run(&good, objects))
    }));
    let Ok((with, without)) = both else {
        panic!("history {seed}: {all:?}");
    };
    assert_eq!(with.others, without.others, "history {seed}: {all:?}");
}
