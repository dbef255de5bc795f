//! Whatever came in whatever order, in however many parts, and was planned or given up on the way: in the end everything is as if it had
//! all been said at once.

use std::sync::Arc;

use proptest::prelude::*;
use weir_agent::compile::policy::{Compiler, NodeView, Touched};
use weir_agent::model::{Object, ObjectId, Snapshot};
use weir_tests::oracle::Cluster;

use super::nouns::{Compiled, compiler, ip, snapshot, view};
use super::random::{Parts, cluster};

/// What happens.
#[derive(Clone, Debug)]
enum Event {
    /// An object of the cluster of this number is as it is there, or goes if it is not there.
    Say { cluster: usize, object: usize },
    /// What was said is taken in.
    Update,
    /// And planned; and committed, or given up.
    Plan { is_committed: bool },
    /// The node has this address more, or less.
    Address(bool),
    /// A touch of something that has not changed.
    Touch { object: usize },
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        12 => (0..4usize, 0..64usize).prop_map(|(cluster, object)| Event::Say { cluster, object }),
        3 => Just(Event::Update),
        3 => any::<bool>().prop_map(|is_committed| Event::Plan { is_committed }),
        1 => any::<bool>().prop_map(Event::Address),
        1 => (0..64usize).prop_map(|object| Event::Touch { object }),
    ]
}

/// Every object of some of these, by name, in one order.
fn objects(all: &[Snapshot]) -> Vec<ObjectId> {
    let mut ids: Vec<ObjectId> = all
        .iter()
        .flat_map(|it| {
            let pods = it.pods.values().cloned().map(Object::Pod);
            let namespaces = it.namespaces.values().cloned().map(Object::Namespace);
            let nodes = it.nodes.values().cloned().map(Object::Node);
            let policies = it.policies.values().cloned().map(Object::Policy);
            let tiers = it
                .cluster_policies
                .values()
                .cloned()
                .map(Object::ClusterPolicy);
            let all = pods
                .chain(namespaces)
                .chain(nodes)
                .chain(policies)
                .chain(tiers);
            all.map(|object| object.id()).collect::<Vec<_>>()
        })
        .collect();
    ids.sort();
    ids.dedup();
    ids
}

/// Policies that are kept are part of what there is.
fn with_kept(snapshot: &Snapshot, compiler: &Compiler) -> Snapshot {
    let mut all = snapshot.clone();
    for policy in compiler.policies() {
        all.apply(Object::Policy(Arc::clone(policy)));
    }
    all
}

fn agrees(compiler: &Compiler, snapshot: &Snapshot, node: &NodeView) {
    let kept = with_kept(snapshot, compiler);
    let mut fresh = Compiler::default();
    fresh.update(&Touched::all(&kept), &kept, node);
    fresh.plan();
    fresh.commit();
    assert_eq!(compiler.rows(), fresh.rows());
    assert_eq!(compiler.book(), fresh.book());
    assert_eq!(compiler.reports(), fresh.reports());
}

fn histories() -> ProptestConfig {
    let number = std::env::var("WEIR_POLICY_SETS");
    let number = number.ok().and_then(|text| text.parse().ok());
    ProptestConfig::with_cases(number.unwrap_or(256))
}

proptest! {
    #![proptest_config(histories())]

    #[test]
    fn a_history_ends_where_its_end_alone_does(
        clusters in prop::collection::vec(prop_oneof![cluster(Parts::All), cluster(Parts::Tiers)], 4),
        events in prop::collection::vec(event(), 1..80),
    ) {
        let clusters: Vec<Snapshot> = clusters.iter().map(snapshot).collect();
        let objects = objects(&clusters);
        let mut compiler = Compiler::default();
        let mut now = Snapshot::default();
        let mut node = view("n1");
        let mut touched = Touched::default();
        for event in &events {
            match event {
                Event::Say { cluster, object } => {
                    let id = &objects[object % objects.len()];
                    match clusters[*cluster].get(id) {
                        Some(object) => now.apply(object),
                        None => now.delete(id),
                    };
                    touched.add(id);
                }
                Event::Touch { object } => touched.add(&objects[object % objects.len()]),
                Event::Update => {
                    compiler.update(&std::mem::take(&mut touched), &now, &node);
                }
                Event::Plan { is_committed } => {
                    compiler.update(&std::mem::take(&mut touched), &now, &node);
                    compiler.plan();
                    match is_committed {
                        true => {
                            compiler.commit();
                            agrees(&compiler, &now, &node);
                        }
                        false => compiler.abandon(),
                    }
                }
                Event::Address(is_there) => {
                    let more = ip("10.0.0.3");
                    node.addresses.retain(|it| *it != more);
                    if *is_there {
                        node.addresses.push(more);
                    }
                }
            }
        }
        compiler.update(&touched, &now, &node);
        compiler.plan();
        compiler.commit();
        agrees(&compiler, &now, &node);
        let still = compiler.plan();
        prop_assert!(still.is_empty(), "{still:?}");
    }
}

/// For a glance at one history: objects one by one, first as they come, then as they go.
#[test]
fn nothing_is_left_when_everything_has_gone() {
    let cluster: Cluster = super::cases::shop();
    let all = snapshot(&cluster);
    let mut compiler = compiler(&all, "n1", u32::BITS);
    let empty = Snapshot::default();
    let nowhere = NodeView {
        name: "n1".into(),
        ..NodeView::default()
    };
    compiler.update(&Touched::all(&all), &empty, &nowhere);
    compiler.plan();
    compiler.commit();
    let mut fresh = Compiler::default();
    fresh.update(&Touched::default(), &empty, &nowhere);
    assert_eq!(compiler.rows(), fresh.rows());
    assert_eq!(Compiled::of(&compiler).book().iter().count(), 0);
}
