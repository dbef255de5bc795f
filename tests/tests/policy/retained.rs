//! A policy outlives its object only while its namespace is deleted under its pods (CVE-2024-7598, kubernetes#126587).

use std::sync::Arc;

use weir_agent::compile::policy::{Compiler, Touched};
use weir_agent::model::{
    Kind, Namespace, NamespacePhase, Object, ObjectId, ObjectName, Pod, PodPhase, Selector,
    Snapshot,
};

use super::nouns::{anything, labels, name, namespace, pod, policy, view};

#[derive(Clone)]
enum Step {
    Namespace(NamespacePhase),
    NoNamespace,
    Policy,
    /// Another one by the same name, which isolates nobody from anybody.
    Another,
    NoPolicy,
    Pod(PodPhase),
    NoPod,
    /// Something else is said, and all is looked at again.
    Nothing,
}

fn take(snapshot: &mut Snapshot, step: &Step) {
    let delete = |snapshot: &mut Snapshot, kind, name: ObjectName| {
        snapshot.delete(&ObjectId { kind, name });
    };
    let policy = |ingress| {
        Object::Policy(Arc::new(policy(
            "shop/x",
            Selector::default(),
            Some(ingress),
            None,
        )))
    };
    match step {
        Step::Namespace(phase) => {
            let namespace = Namespace {
                phase: *phase,
                ..namespace("shop", "")
            };
            snapshot.apply(Object::Namespace(Arc::new(namespace)));
        }
        Step::NoNamespace => delete(snapshot, Kind::Namespace, ObjectName::cluster("shop")),
        Step::Policy => {
            snapshot.apply(policy(vec![]));
        }
        Step::Another => {
            snapshot.apply(policy(vec![anything()]));
        }
        Step::NoPolicy => delete(snapshot, Kind::NetworkPolicy, name("shop/x")),
        Step::Pod(phase) => {
            let pod = Pod {
                phase: *phase,
                labels: labels("app=web"),
                ..pod("shop/web", "", 1)
            };
            snapshot.apply(Object::Pod(Arc::new(pod)));
        }
        Step::NoPod => delete(snapshot, Kind::Pod, name("shop/web")),
        Step::Nothing => {}
    }
}

/// The names of the policies that hold after these steps, each looked at by itself, or all at once at the end.
fn held(steps: &[Step], is_one_by_one: bool) -> Vec<String> {
    let mut snapshot = Snapshot::default();
    let mut compiler = Compiler::default();
    for (number, step) in steps.iter().enumerate() {
        let before = Touched::all(&snapshot);
        take(&mut snapshot, step);
        if is_one_by_one || number == 2 || number + 1 == steps.len() {
            let mut touched = Touched::all(&snapshot);
            touched.policies.extend(before.policies);
            touched.pods.extend(before.pods);
            touched.namespaces.extend(before.namespaces);
            touched.policies.insert(name("shop/x"));
            touched.pods.insert(name("shop/web"));
            touched.namespaces.insert("shop".into());
            compiler.update(&touched, &snapshot, &view("n1"));
        }
    }
    compiler
        .policies()
        .map(|policy| policy.id.to_string())
        .collect()
}

#[test]
fn policies_outlive_their_object_only_while_their_namespace_is_deleted_under_its_pods() {
    use NamespacePhase::{Active, Terminating};
    use PodPhase::{Finished, Running};
    use Step::{Another, NoNamespace, NoPod, NoPolicy, Nothing};
    let (ns, pod) = (Step::Namespace, Step::Pod);
    let start = [ns(Active), Step::Policy, pod(Running)];
    let cases: Vec<(&str, Vec<Step>, bool)> = vec![
        ("deleted by hand", vec![NoPolicy], false),
        ("still there", vec![ns(Terminating)], true),
        (
            "deleted with its namespace",
            vec![ns(Terminating), NoPolicy],
            true,
        ),
        (
            "and looked at again",
            vec![ns(Terminating), NoPolicy, Nothing],
            true,
        ),
        (
            "the namespace goes before the pods",
            vec![ns(Terminating), NoPolicy, NoNamespace, Nothing],
            true,
        ),
        (
            "the namespace goes before the policies",
            vec![NoNamespace, NoPolicy],
            true,
        ),
        (
            "the last pod is gone",
            vec![ns(Terminating), NoPolicy, NoPod],
            false,
        ),
        (
            "the last pod has finished",
            vec![ns(Terminating), NoPolicy, pod(Finished)],
            false,
        ),
        (
            "the namespace is made anew",
            vec![ns(Terminating), NoPolicy, NoNamespace, ns(Active)],
            false,
        ),
        (
            "another by its name takes its place",
            vec![ns(Terminating), NoPolicy, Another],
            true,
        ),
    ];
    for (case, steps, expected) in cases {
        let all = [&start[..], &steps].concat();
        for is_one_by_one in [true, false] {
            let held = held(&all, is_one_by_one);
            assert_eq!(!held.is_empty(), expected, "{case}: {held:?}");
        }
    }
}

#[test]
fn a_namespace_that_never_was_an_object_is_not_being_deleted() {
    let steps = [
        Step::Policy,
        Step::Pod(PodPhase::Running),
        Step::Nothing,
        Step::NoPolicy,
    ];
    assert!(held(&steps, true).is_empty());
}
