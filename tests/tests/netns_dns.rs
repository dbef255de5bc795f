//! Ring 4: the cluster's DNS address, asked from a pod, answered by weir-dns of the node.

#![allow(clippy::unwrap_used, reason = "a test that fails should say where")]

use std::process::Command;

use weir_tests::node::{CLUSTER_DNS, Node, NodeOptions};
use weir_tests::traffic::{PATIENCE, eventually};
use weir_tests::workloads::{Transport, Workload};

const OBJECTS: &str = "
apiVersion: v1
kind: Service
metadata: {name: kube-dns, namespace: kube-system, labels: {k8s-app: kube-dns}}
spec:
  clusterIPs: ['10.96.0.10', 'fd00:10:96::10']
  ipFamilyPolicy: RequireDualStack
  ports: [{name: dns, port: 53, protocol: UDP}, {name: dns-tcp, port: 53, protocol: TCP}]
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop}
spec:
  clusterIPs: ['10.96.0.80', 'fd00:10:96::80']
  ipFamilyPolicy: RequireDualStack
  selector: {app: db}
  ports: [{name: http, port: 80, targetPort: 5432}]
---
apiVersion: v1
kind: Service
metadata: {name: single, namespace: shop}
spec: {clusterIP: 10.96.0.81, selector: {app: db}, ports: [{port: 80}]}
---
apiVersion: v1
kind: Service
metadata: {name: db, namespace: shop}
spec:
  clusterIP: None
  ipFamilyPolicy: RequireDualStack
  selector: {app: db}
  ports: [{name: sql, port: 5432}]
---
apiVersion: v1
kind: Service
metadata: {name: away, namespace: shop}
spec: {type: ExternalName, externalName: web.shop.svc.cluster.local}
";

/// The status, and the answers without owner, time to live and class, sorted.
fn dig(mut command: Command, question: &str) -> (String, Vec<String>) {
    command.args(["+noall", "+answer", "+comments", "+time=2", "+tries=1"]);
    let output = command.args(question.split_whitespace()).output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let status = said
        .lines()
        .find_map(|l| l.split("status: ").nth(1)?.split(',').next())
        .unwrap_or("no answer")
        .to_owned();
    let mut answers: Vec<String> = said
        .lines()
        .filter(|l| !l.starts_with(';') && !l.is_empty())
        .map(|l| l.split_whitespace().skip(3).collect::<Vec<_>>().join(" "))
        .collect();
    answers.sort();
    (status, answers)
}

#[test]
fn the_cluster_dns_address_answers_as_the_specification_says() {
    let node = Node::start(NodeOptions::named("dns")).unwrap();
    node.write_manifest("cluster.yaml", OBJECTS).unwrap();
    let mut db = Workload::named("shop", "db-0").port(Transport::Tcp, 5432);
    db.labels.insert("app".into(), "db".into());
    db.hostname = Some("db-0".into());
    db.subdomain = Some("db".into());
    let db = node.run_pod(db).unwrap();
    let client = node.run_pod(Workload::named("shop", "client")).unwrap();
    node.wait_for_service("kube-system/kube-dns", 2, PATIENCE)
        .or_else(|_| node.wait_for_service("kube-system/kube-dns", 1, PATIENCE))
        .unwrap();
    node.wait_for_service("shop/web", 1, PATIENCE).unwrap();
    let a = format!("A {}", db.addresses[0]);
    let aaaa = format!("AAAA {}", db.addresses[1]);

    let full = "shop.svc.cluster.local";
    let cases: Vec<(String, &str, Vec<&str>)> = vec![
        (format!("web.{full} A"), "NOERROR", vec!["A 10.96.0.80"]),
        (
            format!("web.{full} AAAA"),
            "NOERROR",
            vec!["AAAA fd00:10:96::80"],
        ),
        (format!("single.{full} AAAA"), "NOERROR", vec![]),
        (format!("web.{full} TXT"), "NOERROR", vec![]),
        (format!("db.{full} A"), "NOERROR", vec![&a]),
        (format!("db.{full} AAAA"), "NOERROR", vec![&aaaa]),
        (format!("db-0.db.{full} A"), "NOERROR", vec![&a]),
        (
            format!("_sql._tcp.db.{full} SRV"),
            "NOERROR",
            vec!["SRV 0 100 5432 db-0.db.shop.svc.cluster.local."],
        ),
        (
            format!("_http._tcp.web.{full} SRV"),
            "NOERROR",
            vec!["SRV 0 100 80 web.shop.svc.cluster.local."],
        ),
        (
            "-x 10.96.0.80".into(),
            "NOERROR",
            vec!["PTR web.shop.svc.cluster.local."],
        ),
        (
            "-x fd00:10:96::80".into(),
            "NOERROR",
            vec!["PTR web.shop.svc.cluster.local."],
        ),
        (
            format!("away.{full} CNAME"),
            "NOERROR",
            vec!["CNAME web.shop.svc.cluster.local."],
        ),
        (
            format!("away.{full} A"),
            "NOERROR",
            vec!["A 10.96.0.80", "CNAME web.shop.svc.cluster.local."],
        ),
        (format!("nobody.{full} A"), "NXDOMAIN", vec![]),
        (format!("db-9.db.{full} A"), "NXDOMAIN", vec![]),
        (
            "dns-version.cluster.local TXT".into(),
            "NOERROR",
            vec!["TXT \"1.1.0\""],
        ),
        // Short names, through the search path of the pod.
        ("+search web A".into(), "NOERROR", vec!["A 10.96.0.80"]),
        ("+search web.shop A".into(), "NOERROR", vec!["A 10.96.0.80"]),
        (
            "+search kube-dns.kube-system.svc A".into(),
            "NOERROR",
            vec!["A 10.96.0.10"],
        ),
    ];
    let mut asked = 0;
    for (question, status, answers) in &cases {
        for transport in ["+notcp", "+tcp"] {
            // dig asks the pod's resolver, the cluster's address, through the socket hooks.
            let question = format!("{transport} {question}");
            let (said, found) = dig(client.command("dig"), &question);
            assert_eq!(
                (said.as_str(), &found),
                (*status, &to_owned(answers)),
                "{question}"
            );
            asked += 1;
        }
    }
    // The same address packet by packet, from outside of the node's cgroup, in both families.
    for server in [CLUSTER_DNS, "fd00:10:96::10"] {
        for transport in ["+notcp", "+tcp"] {
            let question = format!("@{server} {transport} web.{full} A");
            let (said, found) = dig(client.netns().command("dig"), &question);
            assert_eq!(
                (said.as_str(), found),
                ("NOERROR", vec!["A 10.96.0.80".to_owned()]),
                "{question}"
            );
            asked += 1;
        }
    }
    println!("{asked} questions");
}

fn to_owned(answers: &[&str]) -> Vec<String> {
    answers.iter().map(|a| (*a).to_owned()).collect()
}

/// As RKE2 calls it: the only Service in kube-system that selects what DNS is labelled with.
#[test]
fn a_cluster_dns_service_of_another_name_is_answered_too() {
    let node = Node::start(NodeOptions::named("dnsother")).unwrap();
    let other = "
apiVersion: v1
kind: Service
metadata: {name: rke2-coredns-rke2-coredns, namespace: kube-system}
spec:
  clusterIP: 10.96.0.10
  selector: {k8s-app: kube-dns}
  ports: [{name: udp-53, port: 53, protocol: UDP}, {name: tcp-53, port: 53, protocol: TCP}]
";
    node.write_manifest("cluster.yaml", other).unwrap();
    let client = node.run_pod(Workload::named("shop", "client")).unwrap();
    let name = "rke2-coredns-rke2-coredns.kube-system.svc.cluster.local";
    let wanted = ("NOERROR".to_owned(), vec![format!("A {CLUSTER_DNS}")]);
    for transport in ["+notcp", "+tcp"] {
        let ask = || {
            let words = format!("@{CLUSTER_DNS} {transport} {name} A");
            dig(client.netns().command("dig"), &words)
        };
        eventually("an answer", PATIENCE, ask, |said| *said == wanted).unwrap();
    }
}
