//! Folders as a pipeline has them: what is said of them, and what is said beside it.

use std::fs;
use std::path::Path;

use serde_json::json;

use super::diff::{Diff, Scope, Told, against_cluster, of_folders};
use super::expect::{Got, Report, check};
use super::folder::Folder;
use crate::model::Object;

const PODS: &str = "
kind: Namespace
apiVersion: v1
metadata: {name: shop}
---
kind: Pod
apiVersion: v1
metadata: {name: web, namespace: shop, labels: {app: web}}
spec: {containers: [{name: c}]}
---
kind: Pod
apiVersion: v1
metadata: {name: db, namespace: shop, labels: {app: db}}
spec: {containers: [{name: c}]}
";

/// Nobody may send to `db` but on port 80.
const CLOSED: &str = "
kind: NetworkPolicy
apiVersion: networking.k8s.io/v1
metadata: {name: closed, namespace: shop}
spec: {podSelector: {matchLabels: {app: db}}, ingress: [{ports: [{port: 80}]}]}
";

fn folder(parts: &[&str]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("all.yaml"), parts.join("\n---\n")).unwrap();
    folder
}

fn test_of(expectations: &[(&str, &str, &str)]) -> String {
    let spec = json!({"expectations": expectations.iter().map(|(from, to, verdict)| {
        json!({"from": from, "to": to, "verdict": verdict})
    }).collect::<Vec<_>>()});
    test_with(spec)
}

fn test_with(spec: serde_json::Value) -> String {
    json!({"kind": "PolicyTest", "apiVersion": "weir/v1alpha1", "metadata": {"name": "t"}, "spec": spec})
        .to_string()
}

fn checked(parts: &[&str]) -> Result<Report, Vec<String>> {
    check(folder(parts).path())
}

fn diffed(new: &[&str], old: &[&str]) -> Result<Diff, Vec<String>> {
    let (new, old) = (folder(new), folder(old));
    of_folders(old.path(), new.path()).map(|mut diff| {
        // Without the names of folders that are another each time.
        for warning in &mut diff.warnings {
            for path in [&new, &old] {
                *warning = warning.replace(&format!("{}: ", path.path().display()), "");
            }
        }
        diff
    })
}

fn one(expectation: (&str, &str, &str)) -> String {
    test_of(&[expectation])
}

#[test]
fn a_policy_in_a_version_that_is_not_read_is_refused_and_one_of_another_kind_is_said() {
    let expects = one(("shop/web", "shop/db:80", "Allow"));
    for (api_version, kind) in [
        ("extensions/v1beta1", "NetworkPolicy"),
        ("networking.k8s.io/v2", "NetworkPolicy"),
        ("networking.k8s.io/v1", "Networkpolicy"),
        ("v1", "NetworkPolicy"),
        ("policy.networking.k8s.io/v1alpha1", "AdminNetworkPolicy"),
        ("policy.networking.k8s.io/v9", "ClusterNetworkPolicy"),
    ] {
        let policy = format!("{{kind: {kind}, apiVersion: {api_version}, metadata: {{name: x}}}}");
        let words = format!("all.yaml document 4: {kind} of {api_version} is not read");
        for wrong in [
            checked(&[PODS, &policy, &expects]).unwrap_err(),
            diffed(&[PODS, &policy], &[PODS]).unwrap_err(),
            against_cluster(
                folder(&[CLOSED, PODS, &policy]).path(),
                vec![],
                Scope::Added,
            )
            .unwrap_err(),
        ] {
            let words = words.split_once(" document").unwrap();
            assert!(
                wrong.len() == 1 && wrong[0].contains(words.0) && wrong[0].contains(&words.1[3..]),
                "{wrong:?}"
            );
        }
    }
    let of_another = "{kind: NetworkPolicy, apiVersion: projectcalico.org/v3, metadata: {name: x}}";
    let said = [
        "NetworkPolicy of projectcalico.org/v3 is not read: nothing of what it says is in the answer",
    ];
    let report = checked(&[PODS, of_another, &expects]).unwrap();
    assert!(report.passed());
    assert_eq!(report.warnings, said);
    assert!(
        report
            .table()
            .contains(&format!("\nwarning: {}\n", said[0]))
    );
    let diff = diffed(&[PODS, of_another], &[PODS]).unwrap();
    assert_eq!(diff.warnings, said);
    assert!(diff.table().ends_with(&format!("\nwarning: {}\n", said[0])));
}

#[test]
fn a_policy_that_selects_nobody_is_said() {
    let nobody = CLOSED
        .replace("closed", "typo")
        .replace("app: db", "app: bd");
    let fence = "
kind: ClusterNetworkPolicy
apiVersion: policy.networking.k8s.io/v1alpha2
metadata: {name: fence}
spec:
  {tier: Admin, priority: 7, subject: {namespaces: {matchLabels: {kubernetes.io/metadata.name: shpo}}}}
";
    let said = [
        "ClusterNetworkPolicy fence selects no pod",
        "NetworkPolicy shop/typo selects no pod",
    ];
    let expects = one(("shop/web", "shop/db:80", "Allow"));
    let report = checked(&[PODS, CLOSED, &nobody, fence, &expects]).unwrap();
    assert_eq!(report.warnings, said);
    let diff = diffed(&[PODS, CLOSED, &nobody, fence], &[PODS]).unwrap();
    assert_eq!(diff.warnings, said);
    let new = folder(&[CLOSED, &nobody, fence]);
    let diff = against_cluster(new.path(), cluster(&[PODS]), Scope::Added).unwrap();
    assert_eq!(diff.warnings, said);
}

/// What an agent tells of a cluster with these objects.
fn cluster(parts: &[&str]) -> Vec<Told> {
    let folder = folder(parts);
    let (snapshot, _) = Folder::read(folder.path()).unwrap().cluster(&[]).unwrap();
    let namespaces = snapshot.namespaces.values().cloned();
    let namespaces = namespaces.map(Object::Namespace);
    let pods = snapshot.pods.values().cloned().map(Object::Pod);
    namespaces.chain(pods).map(Told::Object).collect()
}

#[test]
fn what_failed_says_what_was_expected_what_came_and_by_what() {
    let expects = test_of(&[
        ("shop/web", "shop/db:81", "Allow"),
        ("shop/web", "shop/db:80", "Deny"),
        ("shop/web", "shop/db:80", "Allow"),
        ("shop/web", "shop/db:82", "Deny"),
    ]);
    let report = checked(&[PODS, CLOSED, &expects]).unwrap();
    assert_eq!(report.results[0].got, Got::Deny);
    let yaml = |number: usize| report.results[number].cases[0].yaml.is_some();
    assert!(
        yaml(0) && !yaml(3),
        "nobody wants what was denied as expected"
    );
    let table = report.table();
    println!("{table}");
    let place = "all.yaml document 5: spec.expectations";
    for words in [
        format!(
            "\n        {place}[0]: expected Allow, got Deny\n        DENIED  shop/web (10.244.0.2) -> shop/db (10.244.0.1)  TCP port 81\n"
        ),
        "          ingress NO  no rule allows it; ingress is isolated by shop/closed\n".to_owned(),
        "nearest: shop/closed spec.ingress[0]\n                        - it is for TCP 80 only\n"
            .to_owned(),
        format!("{place}[1]: expected Deny, got Allow\n        ALLOWED"),
        "ingress yes allowed by shop/closed spec.ingress[0]\n".to_owned(),
        "\n4 expectations, 2 failed\n".to_owned(),
    ] {
        assert!(table.contains(&words), "{words}\n{table}");
    }
    assert!(!table.contains("[2]: expected"));
}

/// `team: x` is the cluster's, and `kubernetes.io/metadata.name` nobody's to take away.
#[test]
fn labels_of_a_namespace_stay_that_the_folder_does_not_name() {
    let named = PODS.replace("name: shop}", "name: shop, labels: {team: x, stage: old}}");
    let by_labels = "
kind: NetworkPolicy
apiVersion: networking.k8s.io/v1
metadata: {name: by-labels, namespace: shop}
spec:
  podSelector: {matchLabels: {app: db}}
  ingress: [{from: [{namespaceSelector: {matchLabels: {team: x, stage: new}}}]}]
";
    let relabelled = PODS.replace("name: shop}", "name: shop, labels: {stage: new}}");
    let new = folder(&[&relabelled, by_labels]);
    let diff = against_cluster(new.path(), cluster(&[&named]), Scope::Added).unwrap();
    let closed_to_web = diff
        .changes
        .iter()
        .any(|row| row.from.contains(&"shop/web".to_owned()));
    assert!(
        !diff.changes.is_empty() && !closed_to_web,
        "{}",
        diff.table()
    );
}

#[test]
fn of_a_namespace_that_is_not_there_only_the_name_is_known() {
    let spy = "{kind: Pod, apiVersion: v1, metadata: {name: spy, namespace: other}, spec: {}}";
    let policy = |selector: &str| {
        format!(
            "
kind: NetworkPolicy
apiVersion: networking.k8s.io/v1
metadata: {{name: p, namespace: shop}}
spec:
  podSelector: {{matchLabels: {{app: db}}}}
  ingress: [{{from: [{{namespaceSelector: {{{selector}}}}}]}}]
"
        )
    };
    let asked = |selector: &str| {
        let expects = one(("other/spy", "shop/db:80", "Allow"));
        checked(&[PODS, spy, &policy(selector), &expects]).unwrap()
    };
    let by_name = asked("matchLabels: {kubernetes.io/metadata.name: other}");
    assert!(
        by_name.passed() && by_name.warnings.is_empty(),
        "{by_name:?}"
    );
    // A label that nobody knows is not absent.
    let by_absence = asked("matchExpressions: [{key: team, operator: DoesNotExist}]");
    assert!(!by_absence.passed(), "{by_absence:?}");
    let words = "Namespace other is not there: only its name is known, and a selector that asks for another label of it does not match";
    assert_eq!(by_absence.warnings, [words]);
}

#[test]
fn a_folder_has_one_range_of_each_family_whichever_test_names_it() {
    let with = |cidrs: &[&str]| {
        test_with(json!({"podCIDRs": cidrs, "expectations": [
            {"from": "shop/web", "to": "shop/db:81", "verdict": "Deny"}
        ]}))
    };
    let cidr = "192.168.7.0/24";
    let address = |report: &Report| {
        let cases = report.results.iter().map(|it| it.cases.len());
        (
            cases.collect::<Vec<_>>(),
            report.results[0].cases[0].source.address.to_string(),
        )
    };
    let report = checked(&[PODS, CLOSED, &with(&[cidr]), &with(&["192.168.7.0/24"])]).unwrap();
    assert_eq!(address(&report), (vec![1, 1], "192.168.7.2".to_owned()));
    let wrong = checked(&[PODS, CLOSED, &with(&[cidr]), &with(&["192.168.8.0/24"])]).unwrap_err();
    assert!(
        wrong[0].starts_with("all.yaml document 6: spec.podCIDRs: all.yaml document 5"),
        "{wrong:?}"
    );
    let wrong = checked(&[PODS, CLOSED, &with(&[cidr, "192.168.8.0/24"])]).unwrap_err();
    assert!(wrong[0].contains("are of one family"), "{wrong:?}");

    // The block has the pods of this cluster, and not those of another.
    let block = "
kind: NetworkPolicy
apiVersion: networking.k8s.io/v1
metadata: {name: block, namespace: shop}
spec: {podSelector: {matchLabels: {app: db}}, ingress: [{from: [{ipBlock: {cidr: 192.168.7.0/24}}]}]}
";
    let is_closed_to_web = |tests: &[&str]| {
        let new = [&[PODS, block], tests].concat();
        let diff = diffed(&new, &[PODS]).unwrap();
        let mut rows = diff.changes.iter();
        rows.any(|row| row.from.contains(&"shop/web".to_owned()))
    };
    assert!(is_closed_to_web(&[]));
    assert!(!is_closed_to_web(&[&with(&[cidr])]));
}

fn workload(kind: &str, name: &str, more: &str) -> String {
    let template = format!("template: {{metadata: {{labels: {{app: {name}}}}}, spec: {{{more}}}}}");
    let spec = match kind {
        "CronJob" => format!("jobTemplate: {{spec: {{{template}}}}}"),
        _ => template,
    };
    format!("{{kind: {kind}, apiVersion: x/v1, metadata: {{{name}, namespace: shop}}, spec: {{{spec}}}}}")
        .replace(&format!("metadata: {{{name}, "), &format!("metadata: {{{}, ", named(name)))
}

fn named(name: &str) -> String {
    match name.strip_suffix('-') {
        Some(_) => format!("generateName: {name}"),
        None => format!("name: {name}"),
    }
}

#[test]
fn workloads_of_one_name_are_told_apart_by_their_kinds() {
    let both = [
        workload("CronJob", "sync", ""),
        workload("Deployment", "sync", ""),
    ]
    .join("\n---\n");
    let expects = test_of(&[
        ("cronjob/shop/sync", "shop/db:81", "Deny"),
        ("Deployments/shop/sync", "shop/db:80/TCP", "Allow"),
        ("pod/shop/web", "deployment/shop/sync:80", "Allow"),
    ]);
    let report = checked(&[PODS, CLOSED, &both, &expects]).unwrap();
    assert!(report.passed(), "{}", report.table());
    let ends: Vec<_> = report
        .results
        .iter()
        .map(|it| {
            let case = &it.cases[0];
            [&case.source, &case.destination].map(|it| it.name.clone().unwrap())
        })
        .collect();
    assert_eq!(ends[0], ["shop/sync@cronjob", "shop/db"]);
    assert_eq!(ends[1], ["shop/sync", "shop/db"]);
    let unclear = one(("shop/sync", "shop/db:80", "Allow"));
    let wrong = checked(&[PODS, &both, &unclear]).unwrap_err();
    assert!(
        wrong[0].ends_with("shop/sync may be each of cronjob/shop/sync, deployment/shop/sync"),
        "{wrong:?}"
    );
    let nobody = one(("job/shop/sync", "shop/db:80", "Allow"));
    let wrong = checked(&[PODS, &both, &nobody]).unwrap_err();
    assert!(wrong[0].ends_with("there is no job shop/sync"), "{wrong:?}");
    assert_eq!(diffed(&[PODS, &both], &[PODS, &both]).unwrap().pods, 4);
    // Two of one kind are a mistake.
    let twice = workload("Job", "sync", "");
    let wrong = checked(&[PODS, &twice, &twice, &nobody]).unwrap_err();
    assert!(wrong[0].contains("stands in"), "{wrong:?}");
}

#[test]
fn what_can_be_no_party_is_said_and_the_rest_is_judged() {
    let proxy = workload("DaemonSet", "proxy", "hostNetwork: true");
    let nameless = workload("Job", "migrate-", "");
    let pod =
        "{kind: Pod, apiVersion: v1, metadata: {generateName: x-, namespace: shop}, spec: {}}";
    let expects = test_of(&[
        ("shop/web", "shop/db:80", "Allow"),
        ("shop/web", "shop/proxy:80", "Allow"),
    ]);
    let parts = [PODS, &proxy, &nameless, pod, &expects];
    let report = checked(&parts).unwrap();
    assert!(
        report.passed() && report.results.len() == 1,
        "{}",
        report.table()
    );
    assert_eq!(
        report.warnings,
        [
            "all.yaml document 5: the Job has no name to ask for it by, only a generateName: it is left out",
            "all.yaml document 6: the Pod has no name to ask for it by, only a generateName: it is left out",
            "in the network of their nodes, where no policy selects them: shop/proxy",
            "all.yaml document 7: spec.expectations[1]: shop/web -> shop/proxy:80 is not judged: shop/proxy is in the network of its node, and not said to have its address",
        ]
    );
    assert_eq!(diffed(&parts, &parts).unwrap().pods, 2);
    // What is not judged is not passed.
    let wrong = checked(&[PODS, &proxy, &one(("shop/web", "shop/proxy:80", "Allow"))]).unwrap_err();
    assert!(
        wrong[0].ends_with("no PolicyTest expects anything"),
        "{wrong:?}"
    );
    // A policy is no party, and without a name it is none that can be applied.
    let policy = CLOSED.replace("name: closed", "generateName: closed-");
    assert!(checked(&[PODS, &policy, &expects]).is_err());
}

#[test]
fn an_address_that_two_pods_have_is_said() {
    let with = |name: &str| {
        format!(
            "{{kind: Pod, apiVersion: v1, metadata: {{name: {name}, namespace: shop}}, spec: {{}}, status: {{podIP: 10.0.0.7}}}}"
        )
    };
    let (one, two) = (with("one"), with("two"));
    let expects = test_of(&[("shop/web", "shop/db:80", "Allow")]);
    let report = checked(&[PODS, &one, &two, &expects]).unwrap();
    assert_eq!(report.warnings.len(), 1, "{report:?}");
    assert!(
        report.warnings[0].contains("its address 10.0.0.7 belongs to"),
        "{report:?}"
    );
    // An agent says so of its cluster itself.
    let diff = against_cluster(
        folder(&[CLOSED]).path(),
        cluster(&[PODS, &one, &two]),
        Scope::Added,
    );
    assert!(diff.unwrap().warnings.is_empty());
}

#[test]
fn two_pods_of_a_workload_are_two() {
    let alone = workload("Deployment", "api", "");
    let many = alone.replace("spec: {template", "spec: {replicas: 3, template");
    assert_ne!(alone, many);
    let closed = CLOSED.replace("app: db", "app: api");
    let expects = |verdict| one(("shop/api", "deployment/shop/api:81", verdict));
    let report = checked(&[PODS, &alone, &closed, &expects("Allow")]).unwrap();
    assert!(
        report.passed() && report.table().contains("a pod and itself"),
        "{}",
        report.table()
    );
    let report = checked(&[PODS, &many, &closed, &expects("Deny")]).unwrap();
    assert!(report.passed(), "{}", report.table());
    let daemons = workload("DaemonSet", "api", "");
    let report = checked(&[
        PODS,
        &daemons,
        &closed,
        &one(("shop/api", "shop/api:81", "Deny")),
    ])
    .unwrap();
    assert!(report.passed(), "{}", report.table());
    let diff = diffed(&[PODS, &many, &closed], &[PODS, &many]).unwrap();
    let [row] = &diff.changes[..] else {
        panic!("{}", diff.table())
    };
    assert!(
        row.from.contains(&"shop/api".to_owned()),
        "{}",
        diff.table()
    );
    assert_eq!(row.to, ["shop/api", "shop/api#2"]);
}

#[test]
fn the_dns_of_the_node_is_in_a_diff_of_folders() {
    let shut = "
kind: NetworkPolicy
apiVersion: networking.k8s.io/v1
metadata: {name: dns, namespace: shop}
spec: {podSelector: {matchLabels: {app: web}}, policyTypes: [Egress], egress: [%]}
";
    let kube_dns = "{to: [{namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: kube-system}}, podSelector: {matchLabels: {k8s-app: kube-dns}}}]}";
    let dns = "the node's DNS 169.254.53.53".to_owned();
    let reaches = |rule: &str| {
        let diff = diffed(&[PODS, &shut.replace('%', rule)], &[PODS]).unwrap();
        let mut rows = diff.changes.iter();
        !rows.any(|row| row.from == ["shop/web"] && row.to.contains(&dns))
    };
    assert!(!reaches(""));
    assert!(reaches(kube_dns));
}

#[test]
fn numbers_and_nouns_agree() {
    let one = "{kind: Pod, apiVersion: v1, metadata: {name: a}, spec: {}}";
    let diff = diffed(&[one], &[one]).unwrap();
    assert_eq!(diff.table(), "no change between 1 pod and the world\n");
    let expects = test_of(&[("default/a", "default/a:1", "Allow")]);
    let report = checked(&[one, &expects]).unwrap();
    assert!(report.table().contains("\n1 expectation, 0 failed\n"));
    assert!(check(Path::new("/nonexistent")).is_err());
}
