//! How long a compilation takes. Prints, and asserts nothing: `cargo test … -- --ignored --nocapture`.

use std::sync::Arc;
use std::time::Instant;

use weir_agent::compile::policy::{Compiler, Touched};
use weir_agent::explain::Matter;
use weir_agent::explain::diff::Diff;
use weir_agent::model::{Labels, Object, Pod};
use weir_cli::question::Question;
use weir_tests::oracle::Cluster;

use super::nouns::{ip, namespace, only, pod, pods, pods_in, policy, select, snapshot, view};

#[test]
#[ignore = "a measurement"]
fn five_thousand_label_sets_and_a_thousand_policies() {
    let namespaces: Vec<_> = (0..50)
        .map(|n| namespace(&format!("ns{n}"), &format!("team=t{}", n % 10)))
        .collect();
    let pods_of: Vec<Pod> = (0..5000_u32)
        .map(|n| Pod {
            labels: Labels::from([
                ("app".into(), format!("app{}", n % 500).into()),
                ("instance".into(), format!("i{n}").into()),
                ("tier".into(), format!("t{}", n % 3).into()),
            ]),
            node: Some(if n % 50 == 0 { "n1" } else { "n2" }.into()),
            addresses: vec![ip(&format!(
                "10.{}.{}.{}",
                2 + n / 65536,
                n / 256 % 256,
                n % 256
            ))],
            ..pod(&format!("ns{}/p{n}", n / 100), "", 1)
        })
        .collect();
    let policies = (0..1000)
        .map(|n| {
            let near = pods(select(&format!("app=app{}", (n * 7) % 500)));
            let far = pods_in(
                select(&format!("team=t{}", n % 10)),
                select(&format!("app=app{}", (n * 13) % 500)),
            );
            policy(
                &format!("ns{}/np{n}", n % 50),
                select(&format!("tier=t{}", n % 3)),
                Some(vec![only(vec![near, far])]),
                None,
            )
        })
        .collect();
    let cluster = Cluster {
        namespaces,
        pods: pods_of,
        policies,
        cluster_policies: Vec::new(),
    };
    let mut snapshot = snapshot(&cluster);
    let start = Instant::now();
    let mut compiler = Compiler::default();
    compiler.update(&Touched::all(&snapshot), &snapshot, &view("n1"));
    compiler.plan();
    compiler.commit();
    let full = start.elapsed();
    let question = Question::read("ns0/p77", "ns0/p50:80").unwrap();
    let start = Instant::now();
    let matter = Matter::take(&question, &compiler, &snapshot, &view("n1")).unwrap();
    let taken = start.elapsed();
    let start = Instant::now();
    matter.explain("", "");
    let explained = start.elapsed();
    let mut other = snapshot.clone();
    let mut edited = cluster.policies[500].clone();
    edited.ingress = Some(vec![only(vec![pods(select("app=app9"))])]);
    other.apply(Object::Policy(Arc::new(edited)));
    let start = Instant::now();
    let changes = Diff::of(&snapshot, &other, &[]).changes.len();
    println!(
        "a question: {taken:?} on the line, {explained:?} elsewhere; a diff of one policy {:?}, {changes} changes",
        start.elapsed()
    );
    let mut change = |object: Object| {
        let mut touched = Touched::default();
        touched.add(&object.id());
        snapshot.apply(object);
        let start = Instant::now();
        compiler.update(&touched, &snapshot, &view("n1"));
        let steps = compiler.plan();
        compiler.commit();
        let rows: usize = steps
            .iter()
            .map(|it| it.classes.len() + it.verdicts.len() + it.ports.len() + it.pods.len())
            .sum();
        (start.elapsed(), steps.len(), rows)
    };
    let mut elsewhere = cluster.pods[77].clone();
    elsewhere.labels.insert("app".into(), "app9".into());
    let pod = change(Object::Pod(Arc::new(elsewhere)));
    let mut here = cluster.pods[50].clone();
    here.labels.insert("tier".into(), "t9".into());
    let local = change(Object::Pod(Arc::new(here)));
    let mut edited = cluster.policies[500].clone();
    edited.ingress = Some(vec![only(vec![pods(select("app=app9"))])]);
    let policy = change(Object::Policy(Arc::new(edited)));
    let namespace = change(Object::Namespace(Arc::new(namespace("ns3", "team=t9"))));
    let rows = compiler.rows();
    println!(
        "full {full:?}; then (time, steps, rows written) for a pod elsewhere {pod:?}, a pod here {local:?}, a policy {policy:?}, a \
         namespace {namespace:?}; {} addresses, {} verdicts, {} ports",
        rows.classes.len(),
        rows.verdicts.len(),
        rows.ports.len(),
    );
}
