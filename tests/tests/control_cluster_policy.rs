//! ClusterNetworkPolicy on a real control plane: a cluster without the kind, with it, and without it again.

#![allow(clippy::unwrap_used, reason = "a test that fails should say where")]

use std::time::{Duration, Instant};

use serde_json::Value;
use weir_tests::binaries::ready_or_not_run;
use weir_tests::real::RealNode;

/// How long the kind may be there, or gone, until the agent has noticed.
const NOTICED: Duration = Duration::from_secs(35);
/// How long a change of an object may take that is watched.
const SOON: Duration = Duration::from_secs(10);

/// The kind without a schema, so that the API server takes what no version of it allows.
const DEFINITION: &str = r#"
apiVersion: apiextensions.k8s.io/v1
kind: CustomResourceDefinition
metadata:
  name: clusternetworkpolicies.policy.networking.k8s.io
  annotations: {api-approved.kubernetes.io: "unapproved, for a test"}
spec:
  group: policy.networking.k8s.io
  names: {kind: ClusterNetworkPolicy, plural: clusternetworkpolicies, singular: clusternetworkpolicy}
  scope: Cluster
  versions:
  - name: v1alpha2
    served: true
    storage: true
    schema: {openAPIV3Schema: {type: object, x-kubernetes-preserve-unknown-fields: true}}
"#;
const NAME: &str = "clusternetworkpolicies.policy.networking.k8s.io";

fn policy(name: &str, rules: &str) -> String {
    format!(
        "
apiVersion: policy.networking.k8s.io/v1alpha2
kind: ClusterNetworkPolicy
metadata: {{name: {name}}}
spec: {{tier: Baseline, priority: 5, subject: {{namespaces: {{}}}}, {rules}}}
"
    )
}

#[test]
fn a_kind_that_comes_and_goes_is_noticed_and_its_absence_is_no_trouble() {
    let test = "a_kind_that_comes_and_goes_is_noticed_and_its_absence_is_no_trouble";
    let Some(binaries) = ready_or_not_run(test) else {
        return;
    };
    let mut real = RealNode::start(&binaries, "n1").unwrap();
    assert_eq!(real.node.readyz(), "ok");
    assert_eq!(input(&real), (true, 0, None));
    assert_eq!(count(&mut real, "has no such kind"), 1);

    let began = Instant::now();
    define(&real);
    real.kubectl()
        .apply(&policy(
            "one",
            "ingress: [{action: Deny, from: [{namespaces: {}}]}]",
        ))
        .unwrap();
    eventually("the first policy is known", NOTICED, || input(&real).1 == 1);
    println!("noticed after {:?}", began.elapsed());
    // From here on it is watched, and checked: the API server knows no schema here.
    real.kubectl()
        .apply(&policy("two", "ingress: [{action: Deny, from: []}]"))
        .unwrap();
    real.kubectl()
        .apply(&policy(
            "three",
            "egress: [{action: Accept, to: [{nodes: {}}]}]",
        ))
        .unwrap();
    eventually("three are known", SOON, || input(&real).1 == 3);
    let found = || real.node.conditions("Quarantined");
    eventually("what is wrong is said", SOON, || {
        found().lines().count() == 2
    });
    let found = found();
    for line in [
        "ClusterNetworkPolicy three spec.egress[0].to[0]: ",
        "nodes is experimental, and not supported: its rule matches nothing",
        "ClusterNetworkPolicy two: ",
        "spec.ingress[0].from: it must contain at least one item",
    ] {
        assert!(found.contains(line), "{line} is not in {found}");
    }
    real.run("delete clusternetworkpolicy two three").unwrap();
    eventually("nothing is wrong any more", SOON, || {
        input(&real).1 == 1 && real.node.conditions("Quarantined").is_empty()
    });

    real.run(&format!("delete customresourcedefinition {NAME}"))
        .unwrap();
    eventually("the policy is gone", SOON, || {
        input(&real) == (true, 0, None)
    });
    // While the definition is being deleted the API server contradicts itself for a moment.
    let deadline = Instant::now() + NOTICED;
    while count(&mut real, "has no such kind") < 2 {
        assert!(Instant::now() < deadline, "its absence is not noticed");
        assert_eq!(real.node.readyz(), "ok");
        std::thread::sleep(Duration::from_millis(100));
    }
    define(&real);
    real.kubectl()
        .apply(&policy("again", "egress: []"))
        .unwrap();
    eventually("it is noticed a second time", NOTICED, || {
        input(&real).1 == 1
    });
    assert_eq!(real.node.readyz(), "ok");
    let log = real.node.agent().unwrap().log();
    let loud = |line: &&str| {
        (line.contains(" WARN ") || line.contains(" ERROR "))
            && line.contains("ClusterNetworkPolicy")
    };
    // What was wrong with objects is all that there was to warn of.
    let warnings: Vec<_> = log.lines().filter(loud).collect();
    let of_watch = |line: &&&str| line.contains("watch failed");
    assert_eq!(warnings.iter().filter(of_watch).count(), 0, "{warnings:#?}");
}

/// Is the kind synced, how many objects of it are known, and what is wrong with its watch?
fn input(real: &RealNode) -> (bool, u64, Option<String>) {
    let status = real.node.ask("status").unwrap();
    let inputs = status["inputs"].as_array().unwrap();
    let ours = |it: &&Value| it["kind"] == "ClusterNetworkPolicy";
    let ours = inputs.iter().find(ours).unwrap();
    (
        ours["synced"].as_bool().unwrap(),
        ours["objects"].as_u64().unwrap(),
        ours["problem"].as_str().map(str::to_owned),
    )
}

fn define(real: &RealNode) {
    real.kubectl().apply(DEFINITION).unwrap();
    real.run(&format!(
        "wait --for=condition=Established --timeout=10s customresourcedefinition {NAME}"
    ))
    .unwrap();
}

fn count(real: &mut RealNode, text: &str) -> usize {
    real.node.agent().unwrap().log().matches(text).count()
}

fn eventually(what: &str, within: Duration, is_so: impl Fn() -> bool) {
    let deadline = Instant::now() + within;
    while !is_so() {
        assert!(Instant::now() < deadline, "not in {within:?}: {what}");
        std::thread::sleep(Duration::from_millis(100));
    }
}
