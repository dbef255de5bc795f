//! `weir policy test` as a pipeline runs it: a process, a folder, an exit code.

#![allow(clippy::unwrap_used, reason = "a test that fails should say where")]

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;
use weir_tests::node::binary;

const APPLICATION: &str = r#"
kind: Namespace
apiVersion: v1
metadata: {name: shop, labels: {team: x}}
---
kind: Namespace
apiVersion: v1
metadata: {name: other}
---
kind: Pod
apiVersion: v1
metadata: {name: web, namespace: shop, labels: {app: web}}
spec: {containers: [{name: c}]}
---
kind: StatefulSet
apiVersion: apps/v1
metadata: {name: db, namespace: shop}
spec:
  template:
    metadata: {labels: {app: db}}
    spec: {containers: [{name: c, ports: [{name: sql, containerPort: 5432}]}]}
---
kind: Service
apiVersion: v1
metadata: {name: db, namespace: shop}
spec:
  clusterIP: 10.96.0.7
  selector: {app: db}
  ports: [{port: 1, targetPort: sql}]
---
kind: Pod
apiVersion: v1
metadata: {name: spy, namespace: other}
spec: {containers: [{name: c}]}
---
kind: ConfigMap
apiVersion: v1
metadata: {name: settings, namespace: shop}
"#;

const POLICIES: &str = r#"
kind: NetworkPolicy
apiVersion: networking.k8s.io/v1
metadata: {name: db, namespace: shop}
spec:
  podSelector: {matchLabels: {app: db}}
  policyTypes: [Ingress, Egress]
  ingress:
  - from: [{podSelector: {matchLabels: {app: web}}}]
    ports: [{port: sql}]
  egress:
  - to: [{ipBlock: {cidr: 203.0.113.0/24, except: [203.0.113.8/29]}}]
---
kind: NetworkPolicy
apiVersion: networking.k8s.io/v1
metadata: {name: web-out, namespace: shop}
spec:
  podSelector: {matchLabels: {app: web}}
  policyTypes: [Egress]
  egress:
  - to: [{podSelector: {}}]
    ports: [{port: sql}]
---
kind: ClusterNetworkPolicy
apiVersion: policy.networking.k8s.io/v1alpha2
metadata: {name: fence}
spec:
  tier: Admin
  priority: 7
  subject: {namespaces: {}}
  ingress:
  - {name: team, action: Pass, from: [{namespaces: {matchLabels: {team: x}}}]}
  - {name: others, action: Deny, from: [{namespaces: {}}]}
"#;

/// Every one holds.
const EXPECTATIONS: [(&str, &str, &str); 12] = [
    ("shop/web", "shop/db:5432", "Allow"),
    ("shop/web", "shop/db:sql", "Allow"),
    ("shop/web", "svc/shop/db:1", "Allow"),
    ("shop/web", "10.96.0.7:1", "Allow"),
    ("shop/web", "shop/db:5433", "Deny"),
    ("shop/web", "shop/db:5432/UDP", "Deny"),
    // Denied by a rule of the tier Admin, not by isolation.
    ("other/spy", "shop/web:80", "Deny"),
    ("other/spy", "other/spy:80", "Allow"),
    ("203.0.113.1", "shop/web:80", "Allow"),
    ("203.0.113.1", "shop/db:5432", "Deny"),
    ("shop/db", "203.0.113.1:443", "Allow"),
    ("shop/db", "203.0.113.9:443", "Deny"),
];

fn expectation((from, to, verdict): (&str, &str, &str)) -> String {
    format!("\n  - {{from: \"{from}\", to: \"{to}\", verdict: {verdict}}}")
}

fn test_of(expectations: &str) -> String {
    format!(
        "kind: PolicyTest\napiVersion: weir/v1alpha1\nmetadata: {{name: t}}\nspec:\n  expectations:{expectations}"
    )
}

fn folder(policies: &str, expectations: &str) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| fs::write(folder.path().join(name), text).unwrap();
    write("application.yaml", APPLICATION);
    write("policies.yaml", policies);
    write("test.yaml", &test_of(expectations));
    folder
}

fn weir(folder: &Path, format: &str) -> Output {
    let mut weir = Command::new(binary("weir"));
    weir.args(["policy", "test", "-o", format, "-f"])
        .arg(folder);
    weir.output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn what_holds_passes_and_its_contrary_fails() {
    let all: String = EXPECTATIONS.into_iter().map(expectation).collect();
    let said = weir(folder(POLICIES, &all).path(), "table");
    let table = text(&said.stdout);
    println!("{table}");
    assert_eq!(said.status.code(), Some(0), "{table}{}", text(&said.stderr));
    assert!(
        table.contains("12 expectations, 0 failed\nnot read: ConfigMap\n"),
        "{table}"
    );

    let contrary = EXPECTATIONS.into_iter().map(|(from, to, verdict)| {
        expectation((from, to, if verdict == "Deny" { "Allow" } else { "Deny" }))
    });
    let folder = folder(POLICIES, &contrary.collect::<String>());
    let said = weir(folder.path(), "table");
    assert_eq!(said.status.code(), Some(1), "{}", text(&said.stderr));
    let table = text(&said.stdout);
    assert!(table.contains("12 expectations, 12 failed"), "{table}");
    let words =
        "denied by ClusterNetworkPolicy fence spec.ingress[1] \"others\" (Admin, priority 7)";
    assert!(table.contains(words), "{table}");
    let said = weir(folder.path(), "json");
    assert_eq!(said.status.code(), Some(1));
    let report: Value = serde_json::from_slice(&said.stdout).unwrap();
    let results = report["results"].as_array().unwrap();
    assert!(results.len() == 12 && results.iter().all(|it| it["passed"] == false));
    let passed_by = &results[0]["cases"][0]["ingress"]["passed_by"][0];
    assert!(
        passed_by
            .as_str()
            .unwrap()
            .contains("fence spec.ingress[0]"),
        "{passed_by}"
    );
}

#[test]
fn what_is_wrong_ends_in_2_and_is_named_by_its_place() {
    let good = expectation(EXPECTATIONS[0]);
    let bad_policy = POLICIES.replacen("podSelector", "podSelectr", 1);
    let stranger = expectation(("shop/nobody", "shop/db:1", "Deny"));
    let outside = expectation(("outside", "shop/db:1", "Deny"));
    for (policies, expectations, words) in [
        (
            bad_policy.as_str(),
            good.as_str(),
            "policies.yaml document 1",
        ),
        (
            POLICIES,
            "\n  - {from: a/b, to: a/b:1, verdict: Maybe}\n",
            "spec.expectations[0].verdict",
        ),
        (
            POLICIES,
            "\n  - {from: a/b, to: a/b:1, verdict: Deny, why: x}\n",
            "spec.expectations[0].why",
        ),
        (POLICIES, " []\n", "no PolicyTest expects anything"),
        (
            POLICIES,
            &stranger,
            "spec.expectations[0]: shop/nobody -> shop/db:1: there is no pod shop/nobody",
        ),
        (POLICIES, &outside, "203.0.113.9"),
        (
            &format!("{POLICIES}---\n{{"),
            &good,
            "policies.yaml document 4",
        ),
    ] {
        let said = weir(folder(policies, expectations).path(), "table");
        let complaint = text(&said.stderr);
        assert_eq!(
            said.status.code(),
            Some(2),
            "{words}: {complaint}{}",
            text(&said.stdout)
        );
        assert!(complaint.contains(words), "{words}: {complaint}");
    }
    let said = weir(Path::new("/nonexistent/policies"), "table");
    assert_eq!(said.status.code(), Some(2));
}

fn diff(new: &Path, old: &Path) -> Output {
    let mut weir = Command::new(binary("weir"));
    weir.args(["policy", "diff", "-f"])
        .arg(new)
        .arg("-f")
        .arg(old);
    weir.output().unwrap()
}

#[test]
fn what_a_folder_changes_is_said_for_all_that_are_alike() {
    let old = folder(POLICIES, " []");
    let said = diff(old.path(), old.path());
    assert_eq!(
        text(&said.stdout),
        "no change between 3 pods and the world\n"
    );
    let wider = POLICIES.replacen("{port: sql}", "{port: sql}, {port: 80, endPort: 90}", 1);
    let wider = wider.replacen("203.0.113.8/29", "203.0.113.0/25", 1);
    assert_ne!(wider, POLICIES);
    let new = folder(&wider, " []");
    let said = diff(new.path(), old.path());
    println!("{}", text(&said.stdout));
    assert!(said.status.success(), "{}", text(&said.stderr));
    // That web may not send there is still so: nothing opens between the two.
    assert_eq!(
        text(&said.stdout),
        "shop/db\n  -> 203.0.113.0/25 except 203.0.113.8/29  (IPv4)\n     closes everything\n1 change between 3 pods and the world\n"
    );
    // What only one has is named, and is not looked at.
    let first =
        "kind: Pod\napiVersion: v1\nmetadata: {name: first, namespace: another}\nspec: {}\n";
    fs::write(old.path().join("first.yaml"), first).unwrap();
    assert_eq!(
        text(&diff(folder(POLICIES, " []").path(), old.path()).stdout),
        format!(
            "only before, not looked at: another/first\nno change between 3 pods and the world\nwarning: {}: \
             Namespace another is not there: only its name is known, and a selector that asks for another label of it does not match\n",
            old.path().display()
        )
    );
    let said = diff(Path::new("/nonexistent"), old.path());
    assert_eq!(said.status.code(), Some(2), "{}", text(&said.stdout));
}

/// As `weir policy diff … | head -1` is: whoever reads goes away, and nothing is said about it.
#[test]
fn a_reader_that_has_read_enough_is_no_fault() {
    let all: String = EXPECTATIONS.into_iter().map(expectation).collect();
    let folder = folder(POLICIES, &all);
    for command in ["test", "diff"] {
        for format in ["table", "json"] {
            let (reader, writer) = std::io::pipe().unwrap();
            drop(reader);
            let mut weir = Command::new(binary("weir"));
            weir.args(["policy", command, "-o", format, "-f"])
                .arg(folder.path());
            if command == "diff" {
                weir.arg("-f").arg(folder.path());
            }
            let said = weir.stdout(writer).output().unwrap();
            let complaint = text(&said.stderr);
            assert_eq!(
                said.status.code(),
                Some(0),
                "{command} {format}: {complaint}"
            );
            assert_eq!(complaint, "");
        }
    }
}

#[test]
fn a_scope_of_clusters_is_not_ignored_with_two_folders() {
    let folder = folder(POLICIES, " []");
    let mut weir = Command::new(binary("weir"));
    weir.args(["policy", "diff", "--whole", "-f"])
        .arg(folder.path())
        .arg("-f")
        .arg(folder.path());
    let said = weir.output().unwrap();
    assert_eq!(said.status.code(), Some(2), "{}", text(&said.stdout));
    assert!(text(&said.stderr).contains("--whole"));
}

/// What docs/policy.md shows is read, and holds.
#[test]
fn the_documented_test_is_one() {
    let page = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/policy.md");
    let page = fs::read_to_string(page).unwrap();
    let (_, shown) = page.split_once("```yaml\napiVersion: weir/").unwrap();
    let shown = format!("apiVersion: weir/{}", shown.split("```").next().unwrap());
    let folder = folder(POLICIES, " []");
    fs::write(folder.path().join("test.yaml"), shown).unwrap();
    let said = weir(folder.path(), "table");
    assert_eq!(said.status.code(), Some(0), "{}", text(&said.stderr));
    assert!(
        text(&said.stdout).contains("3 expectations, 0 failed"),
        "{}",
        text(&said.stdout)
    );
}
