//! The agent on a real control plane: what kubectl does reaches the kernel, through outages too. What the
//! API may refuse is `control_permission.rs`.

#![allow(clippy::unwrap_used, reason = "a test that fails should say where")]

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use weir_tests::binaries::ready_or_not_run;
use weir_tests::node::Pod;
use weir_tests::real::RealNode;
use weir_tests::workloads::{Transport, Workload};

/// How long the controllers and the agent may take together.
const SETTLE: Duration = Duration::from_secs(30);
/// How long the agent may take, from when it can reach the API server, to know what it missed.
const CATCH_UP: Duration = Duration::from_secs(15);
const ECHO: &str = include_str!("manifests/echo.yaml");

const MORE: &str = "
apiVersion: v1
kind: Service
metadata: {name: doomed}
spec:
  selector: {app: echo}
  ports: [{port: 80, targetPort: 8080}]
---
apiVersion: v1
kind: Pod
metadata: {name: client, labels: {app: client}}
spec: {containers: [{name: client, image: client}]}
";

/// `$ALLOWED` is the label `app` of who may speak to the echo servers.
const POLICY: &str = "
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: echo}
spec:
  podSelector: {matchLabels: {app: echo}}
  ingress: [{from: [{podSelector: {matchLabels: {app: $ALLOWED}}}]}]
";

#[test]
fn what_kubectl_does_reaches_the_kernel() {
    let Some(real) = real_node("what_kubectl_does_reaches_the_kernel") else {
        return;
    };
    let client = application(&real);
    eventually("both are reached by name", || {
        backends(&client, "http://echo/", 8).len() == 2
    });

    real.run("scale deployment echo --replicas=3").unwrap();
    real.node
        .wait_for_service("default/echo", 3, SETTLE)
        .unwrap();
    eventually("all three are reached", || {
        backends(&client, "http://echo/", 12).len() == 3
    });

    let port = r#"{"spec":{"ports":[{"port":81,"targetPort":8080}]}}"#;
    real.kubectl()
        .run(&["patch", "service", "echo", "--type=merge", "--patch", port])
        .unwrap();
    wait_for_services(&real, "echo is at 81 alone", SETTLE, |rows| {
        ports(rows, "default/echo") == [81] && backends_of(rows, "default/echo").len() == 3
    });
    assert!(reaches(&client, "http://echo:81/"));
    assert!(!reaches(&client, "http://echo/"));

    let leaves = real.pods_of("default", "echo").remove(0);
    let name = &leaves.workload.name;
    real.run(&format!("label pod {name} app=other --overwrite"))
        .unwrap();
    // The Deployment makes another in its place.
    let old = format!("{}:8080", leaves.addresses[0]);
    wait_for_services(&real, "the pod is no backend now", SETTLE, |rows| {
        let backends = backends_of(rows, "default/echo");
        backends.len() == 3 && !backends.contains(&old)
    });

    policy_changes(&real, &client);

    real.run("delete deployment echo --wait=false").unwrap();
    wait_for_services(&real, "no backend is left", SETTLE, |rows| {
        ports(rows, "default/echo") == [81] && backends_of(rows, "default/echo").is_empty()
    });
    assert!(!reaches(&client, "http://echo:81/"));
    real.run("delete service echo doomed").unwrap();
    wait_for_services(&real, "the services are gone", SETTLE, |rows| {
        ports(rows, "default/echo").is_empty() && ports(rows, "default/doomed").is_empty()
    });
    real.run("delete pod client --wait=false").unwrap();
    real.run(&format!("delete pod {name} --wait=false"))
        .unwrap();
    let none = |rows: &[Value]| rows.is_empty();
    real.node
        .wait_for("no pod is left", SETTLE, "endpoints", none)
        .unwrap();
    assert_clean(&real);
}

/// A policy made, changed, a label that it selects by changed, and the policy deleted.
fn policy_changes(real: &RealNode, client: &Pod) {
    assert!(reaches(client, "http://echo:81/"));
    let allowing = |app: &str| POLICY.replace("$ALLOWED", app);
    real.kubectl().apply(&allowing("nobody")).unwrap();
    eventually("the policy denies", || !reaches(client, "http://echo:81/"));
    let rows = real.node.ask("endpoints").unwrap();
    let isolated = |row: &&Value| row["ingress"] == json!(["default/echo"]);
    let rows = rows.as_array().unwrap();
    assert_eq!(rows.iter().filter(isolated).count(), 3, "{rows:?}");

    real.kubectl().apply(&allowing("client")).unwrap();
    eventually("the changed policy allows", || {
        reaches(client, "http://echo:81/")
    });
    real.run("label pod client app=stranger --overwrite")
        .unwrap();
    eventually("the changed label is denied", || {
        !reaches(client, "http://echo:81/")
    });
    real.run("delete networkpolicy echo").unwrap();
    eventually("without the policy all is allowed", || {
        reaches(client, "http://echo:81/")
    });
}

#[test]
fn changes_around_a_stop_of_the_api_server_are_seen() {
    let Some(mut real) = real_node("changes_around_a_stop_of_the_api_server_are_seen") else {
        return;
    };
    let client = application(&real);

    real.plane.stop_api_server().unwrap();
    // Long enough that the agent has noticed.
    eventually("the agent notices", || !problems(&real).is_empty());
    assert_eq!(
        backends(&client, "http://echo/", 20).len(),
        2,
        "20 of 20 answered"
    );
    assert_eq!(
        real.node.readyz(),
        "ok",
        "an outage does not unready a node"
    );

    real.plane.start_api_server().unwrap();
    let started = Instant::now();
    real.run("delete service doomed").unwrap();
    real.run("scale deployment echo --replicas=3").unwrap();
    wait_for_services(&real, "doomed is gone", CATCH_UP, |rows| {
        ports(rows, "default/doomed").is_empty()
    });
    real.node
        .wait_for_service("default/echo", 3, SETTLE)
        .unwrap();
    println!("caught up after {:?}", started.elapsed());
    eventually("nothing is wrong any more", || problems(&real).is_empty());
    assert_clean(&real);
}

#[test]
fn deletions_behind_a_cut_are_seen_without_another_write() {
    let Some(real) = real_node("deletions_behind_a_cut_are_seen_without_another_write") else {
        return;
    };
    let client = application(&real);
    real.kubectl()
        .apply(&POLICY.replace("$ALLOWED", "nobody"))
        .unwrap();
    eventually("the policy denies", || !reaches(&client, "http://echo/"));

    real.cut().unwrap();
    real.run("delete service doomed").unwrap();
    real.run("delete networkpolicy echo").unwrap();
    assert!(!reaches(&client, "http://echo/"), "the policy holds on");
    let rows = real.node.ask("services").unwrap();
    assert_eq!(ports(rows.as_array().unwrap(), "default/doomed"), [80]);

    real.mend().unwrap();
    wait_for_services(&real, "doomed is gone", CATCH_UP, |rows| {
        ports(rows, "default/doomed").is_empty()
    });
    eventually("the policy is gone", || reaches(&client, "http://echo/"));
    assert_clean(&real);
}

/// The API server comes back with no memory of the revision at which the agent was, and only a list can
/// tell what is gone. The node is cut off meanwhile, so that nothing of it is in the agent's sockets: it finds its
/// watches silent, asks to go on from there, and is answered 410 Gone.
#[test]
fn deletions_before_a_compaction_are_seen() {
    let Some(mut real) = real_node("deletions_before_a_compaction_are_seen") else {
        return;
    };
    let client = application(&real);
    let fell_behind = "watch fell behind";
    assert!(!real.node.agent().unwrap().log().contains(fell_behind));

    real.cut().unwrap();
    real.run("delete service doomed").unwrap();
    real.run("annotate service echo later=1").unwrap();
    real.plane.compact().unwrap();
    real.plane.stop_api_server().unwrap();
    real.plane.start_api_server().unwrap();
    assert_eq!(
        backends(&client, "http://echo/", 20).len(),
        2,
        "20 of 20 answered"
    );

    real.mend().unwrap();
    let agent = real.node.agent().unwrap();
    agent.wait_for_log(fell_behind, SILENCE + CATCH_UP).unwrap();
    wait_for_services(&real, "doomed is gone", CATCH_UP, |rows| {
        ports(rows, "default/doomed").is_empty()
    });
    real.run("scale deployment echo --replicas=3").unwrap();
    real.node
        .wait_for_service("default/echo", 3, SETTLE)
        .unwrap();
    assert_clean(&real);
}

#[test]
fn pods_that_the_agent_knows_start_without_the_api_server() {
    let Some(real) = real_node("pods_that_the_agent_knows_start_without_the_api_server") else {
        return;
    };
    let client = application(&real);
    let uid = real
        .run("get pod client -o jsonpath={.metadata.uid}")
        .unwrap();
    real.cut().unwrap();

    let unknown = Workload::named("default", "unknown");
    let unknown = real
        .node
        .declare_pod_as(unknown, "uid-unknown".into())
        .unwrap();
    let started = Instant::now();
    let env = unknown.cni_env();
    let env: Vec<_> = env.iter().map(|(k, v)| (*k, v.as_str())).collect();
    let output = real
        .node
        .cni("ADD", &env, &real.node.cni_config("1.1.0"))
        .unwrap();
    let took = started.elapsed();
    let said: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(said["code"], 11, "{said}");
    assert!(took < Duration::from_millis(2500), "{took:?}: {said}");
    real.node.delete_pod(unknown).unwrap();

    // A new sandbox for a pod that runs.
    real.node.runtime().delete_pod(&client).unwrap();
    let again = Workload::named("default", "client").port(Transport::Tcp, 8080);
    let mut again = real.node.declare_pod_as(again, uid).unwrap();
    real.node.add_pod(&mut again).unwrap();
    assert_eq!(
        backends(&again, "http://echo/", 20).len(),
        2,
        "20 of 20 answered"
    );
    real.node.delete_pod(again).unwrap();
}

#[test]
fn routes_hold_while_an_agent_starts_without_the_api_server() {
    let Some(mut real) = real_node("routes_hold_while_an_agent_starts_without_the_api_server")
    else {
        return;
    };
    let other = json!({
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": "n2"},
        "spec": {"podCIDR": "10.244.77.0/24", "podCIDRs": ["10.244.77.0/24"]},
        "status": {"addresses": [{"type": "InternalIP", "address": "10.210.0.12"}]},
    });
    real.kubectl().apply(&other.to_string()).unwrap();
    let routes = |real: &RealNode| {
        let shown = real.node.machine().netns().ip("route show proto 87");
        shown.expect("ip route")
    };
    eventually("a route to n2", || {
        routes(&real).contains("10.244.77.0/24 via 10.210.0.12")
    });
    eventually("ready", || real.node.readyz() == "ok");
    let before = routes(&real);
    assert_eq!(before.lines().count(), 2, "n2's and its own: {before}");

    real.plane.stop_api_server().unwrap();
    real.node.kill_agent().unwrap();
    // Nothing stands in for the Nodes: what an agent goes by that has saved them is `control_stale.rs`.
    let saved = real.node.machine().dir().join("state/objects.jsonl");
    match std::fs::remove_file(&saved) {
        // It was killed before it had saved any.
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        removed => removed.unwrap(),
    }
    real.node.start_agent().unwrap();
    let waits = "Node objects are not synced yet: ";
    eventually("the agent runs and is not answered", || {
        real.node.readyz().contains(waits)
    });
    let reasons = real.node.readyz();
    assert!(!reasons.contains("CIDR"), "the range is known: {reasons}");
    assert_eq!(routes(&real), before);

    real.plane.start_api_server().unwrap();
    real.run("delete node n2").unwrap();
    eventually("the route is gone", || routes(&real).lines().count() == 1);
    eventually("ready again", || real.node.readyz() == "ok");
}

fn real_node(test: &str) -> Option<RealNode> {
    let binaries = ready_or_not_run(test)?;
    Some(RealNode::start(&binaries, "n1").expect("a node on a control plane"))
}

/// Applies the application, waits until the kernel has it, and returns its client.
fn application(real: &RealNode) -> Pod {
    for manifests in [ECHO, MORE] {
        real.kubectl().apply(manifests).expect("apply");
    }
    for service in ["default/echo", "default/doomed"] {
        let settled = real.node.wait_for_service(service, 2, SETTLE);
        settled.expect("two backends");
    }
    let client = real
        .wait_for_pods("default", "client", 1, SETTLE)
        .expect("a client");
    // weir-dns refuses until it has the zone, and it may have started before there was one.
    eventually("names are answered", || reaches(&client, "http://echo/"));
    client
}

/// The names of the backends that answer so many requests; fails if one is not answered.
fn backends(client: &Pod, url: &str, requests: usize) -> BTreeSet<String> {
    let ask = |_| {
        let output = client
            .command("curl")
            .args(["-sS", "--max-time", "3", url])
            .output()
            .expect("curl");
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        let noise = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{url}: {noise}");
        said.split(' ').next().unwrap_or_default().to_owned()
    };
    (0..requests).map(ask).collect()
}

fn reaches(client: &Pod, url: &str) -> bool {
    let mut curl = client.command("curl");
    let output = curl.args(["-sS", "--max-time", "1", url]).output();
    output.expect("curl").status.success()
}

fn wait_for_services(
    real: &RealNode,
    what: &str,
    within: Duration,
    is_so: impl Fn(&[Value]) -> bool,
) {
    let settled = real.node.wait_for(what, within, "services", is_so);
    settled.expect("services as wanted");
}

fn rows_of<'a>(rows: &'a [Value], service: &'a str) -> impl Iterator<Item = &'a Value> {
    rows.iter().filter(move |row| row["service"] == service)
}

/// The ports of a service's frontends.
fn ports(rows: &[Value], service: &str) -> Vec<u16> {
    rows_of(rows, service)
        .filter_map(|row| row["address"].as_str()?.rsplit(':').next()?.parse().ok())
        .collect()
}

fn backends_of(rows: &[Value], service: &str) -> Vec<String> {
    rows_of(rows, service)
        .flat_map(|row| row["backends"].as_array().into_iter().flatten())
        .filter_map(|backend| Some(backend.as_str()?.to_owned()))
        .collect()
}

/// After how long the agent takes a server that says nothing for dead.
const SILENCE: Duration = Duration::from_secs(60);

/// What keeps inputs from being current.
fn problems(real: &RealNode) -> Vec<String> {
    let status = real.node.ask("status").expect("status");
    let inputs = status["inputs"].as_array().into_iter().flatten();
    inputs
        .filter_map(|input| Some(input["problem"].as_str()?.to_owned()))
        .collect()
}

/// Rows that nothing points to any more stay for a grace period.
fn assert_clean(real: &RealNode) {
    eventually("the kernel holds what it should and no more", || {
        let output = real.node.weir("verify").output().expect("weir verify");
        output.status.success()
    });
}

fn eventually(what: &str, is_so: impl Fn() -> bool) {
    let deadline = Instant::now() + SETTLE;
    while !is_so() {
        assert!(Instant::now() < deadline, "not in {SETTLE:?}: {what}");
        std::thread::sleep(Duration::from_millis(50));
    }
}
