//! What holding a cluster takes: bytes that are asked of the allocator, counted. What the allocator itself
//! adds to each is not in it.

use std::alloc::System;
use std::sync::Mutex;

use stats_alloc::{INSTRUMENTED_SYSTEM, Region, StatsAlloc};
use weir_agent::model::{Change, Interner, Kind, Object, Snapshot};
use weir_agent::watch::ledger::Ledger;
use weir_agent::watch::wire::{self, Decoded};

const PODS: usize = 20_000;

#[global_allocator]
static ALLOCATOR: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

/// What is counted is counted of the whole process: one test at a time.
static ONE: Mutex<()> = Mutex::new(());

/// A pod of a Deployment of fifty, with ten labels, as the API writes it.
fn pod(number: usize) -> String {
    let (app, node) = (number / 50, number % 200);
    let mut labels = String::new();
    for i in 0..8 {
        let label = format!("\"example.com/label-{i}\":\"value-{i}-of-app-{app}\",");
        labels.push_str(&label);
    }
    format!(
        r#"{{"metadata":{{"namespace":"team-{}","name":"app-{app}-5d9c7b8f6-{number:05}",
            "uid":"6a1f6c1e-0000-4000-8000-{number:012}","resourceVersion":"{number}",
            "labels":{{{labels}"app.kubernetes.io/name":"app-{app}","pod-template-hash":"5d9c7b8f6"}},
            "annotations":{{"example.com/note":"{note}"}}}},
          "spec":{{"nodeName":"node-{node}.example.com","containers":[{{"name":"c","ports":[
            {{"name":"http","containerPort":8080,"protocol":"TCP"}},
            {{"name":"metrics","containerPort":9090,"protocol":"TCP"}}]}}]}},
          "status":{{"phase":"Running","podIPs":[{{"ip":"10.{}.{}.{}"}}],
            "conditions":[{{"type":"Ready","status":"True"}}]}}}}"#,
        app % 40,
        number >> 16,
        number >> 8 & 255,
        number & 255,
        note = "x".repeat(200),
    )
}

fn hold(pods: impl Iterator<Item = usize>, ledger: &mut Ledger, snapshot: &mut Snapshot) {
    let mut changes = Vec::new();
    for number in pods {
        let Decoded { name, outcome, .. }: Decoded<wire::Pod> =
            serde_json::from_str(&pod(number)).expect("a pod");
        ledger.applied(name, outcome, &mut changes);
        for change in changes.drain(..) {
            match change {
                Change::Applied(object @ Object::Pod(_)) => {
                    snapshot.apply(object);
                }
                other => panic!("{other:?}"),
            }
        }
    }
}

/// Bytes and blocks that are held since then.
fn held(since: &Region<'_, System>) -> (usize, usize) {
    let now = since.change();
    (
        now.bytes_allocated - now.bytes_deallocated,
        now.allocations - now.deallocations,
    )
}

#[test]
fn a_pod_takes_little_more_than_what_is_its_own() {
    let _one = ONE.lock().unwrap();
    let since = Region::new(ALLOCATOR);
    let names = Interner::default();
    let mut ledger = Ledger::new(Kind::Pod, names.clone());
    let mut snapshot = Snapshot::default();
    hold(0..PODS, &mut ledger, &mut snapshot);
    assert_eq!(snapshot.pods.len(), PODS);
    let (bytes, blocks) = held(&since);
    let (bytes, blocks) = (bytes / PODS, blocks / PODS);
    println!("{bytes} bytes and {blocks} blocks a pod");
    assert!(
        bytes <= 1200 && blocks <= 12,
        "{bytes} bytes, {blocks} blocks"
    );
    // A name of its own for each pod, and those of 400 Deployments, 40 namespaces and 200 nodes.
    assert!(names.count() < PODS + PODS / 2, "{} names", names.count());
}

/// A rollout without end: every pod is replaced, again and again.
#[test]
fn pods_that_come_and_go_leave_nothing_behind() {
    let _one = ONE.lock().unwrap();
    let names = Interner::default();
    let mut ledger = Ledger::new(Kind::Pod, names.clone());
    let mut snapshot = Snapshot::default();
    let mut changes = Vec::new();
    let mut most = 0;
    for generation in 0..40 {
        let first = generation * 500;
        hold(first..first + 500, &mut ledger, &mut snapshot);
        let gone: Vec<_> = snapshot.pods.keys().cloned().collect();
        let before = |name: &&weir_agent::model::ObjectName| {
            let number = name.name.rsplit('-').next().unwrap();
            number.parse::<usize>().unwrap() < first
        };
        for name in gone.iter().filter(before) {
            ledger.deleted(name, &mut changes);
            snapshot.pods.remove(name);
        }
        changes.clear();
        most = most.max(names.count());
    }
    assert_eq!(snapshot.pods.len(), 500);
    assert!(most < 5000, "{most} names at one time");
}
