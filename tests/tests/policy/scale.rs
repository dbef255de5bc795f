//! How long a compilation takes. Prints, and asserts nothing: `cargo test … -- --ignored --nocapture`.

use std::time::Instant;

use weir_agent::compile::policy::{Compiled, compile};
use weir_agent::model::{Labels, Pod};
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
    let mut cluster = Cluster {
        namespaces,
        pods: pods_of,
        policies,
        cluster_policies: Vec::new(),
    };
    let first = snapshot(&cluster);
    let start = Instant::now();
    let old = compile(&first, &view("n1"), &[], &Compiled::default());
    let full = start.elapsed();
    let start = Instant::now();
    let again = compile(&first, &view("n1"), &[], &old);
    let same = start.elapsed();
    cluster.pods[77].labels.insert("app".into(), "app9".into());
    cluster.policies.pop();
    let second = snapshot(&cluster);
    let start = Instant::now();
    let new = compile(&second, &view("n1"), &[], &again);
    let after = start.elapsed();
    let start = Instant::now();
    let way = new.transition_from(&again);
    let transition = start.elapsed();
    let rows = new.rows();
    println!(
        "full {full:?}, the same again {same:?}, one pod and one policy {after:?}, transition \
         {transition:?}; {} addresses, {} verdicts, {} ports, {} on the way",
        rows.classes.len(),
        rows.verdicts.len(),
        rows.ports.len(),
        way.verdicts.len(),
    );
}
