//! An agent that starts while the API server is away: it goes by what it saved, says so, and catches up.
//! Outages of a server that the agent has heard are `control_agent.rs`.

#![allow(clippy::unwrap_used, reason = "a test that fails should say where")]

use std::fs;
use std::time::{Duration, Instant};

use serde_json::Value;
use weir_tests::binaries::ready_or_not_run;
use weir_tests::netns::Netns;
use weir_tests::node::{Family, Pod};
use weir_tests::real::RealNode;
use weir_tests::workloads::{Transport, Workload};

const SETTLE: Duration = Duration::from_secs(30);
/// How long the agent may take, from when it can reach the API server, to know what it missed.
const CATCH_UP: Duration = Duration::from_secs(20);
const REQUESTS: u32 = 20;
const ECHO: &str = include_str!("manifests/echo.yaml");

/// Clients, a service that will be deleted, and a policy that lets one of the clients in.
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
---
apiVersion: v1
kind: Pod
metadata: {name: stranger, labels: {app: stranger}}
spec: {containers: [{name: stranger, image: stranger}]}
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: echo}
spec:
  podSelector: {matchLabels: {app: echo}}
  ingress: [{from: [{podSelector: {matchLabels: {app: client}}}]}]
";

#[test]
fn a_node_that_boots_without_the_api_server_goes_by_what_it_saved() {
    let test = "a_node_that_boots_without_the_api_server_goes_by_what_it_saved";
    let Some(binaries) = ready_or_not_run(test) else {
        return;
    };
    let mut real = RealNode::start(&binaries, "n1").unwrap();
    let [client, stranger] = application(&real);
    let echo = real.pods_of("default", "echo").remove(0);
    let uid_of = |real: &RealNode, pod: &str| {
        let words = format!("get pod {pod} -o jsonpath={{.metadata.uid}}");
        real.run(&words).unwrap()
    };
    let uid = uid_of(&real, &echo.workload.name);
    let file = real.node.machine().dir().join("state/objects.jsonl");
    // A pod is known by its address only when its kubelet has said it, which is the last that is said.
    let last = [&client, &stranger].map(|pod| format!("\"{}\"", pod.address(Family::V4).unwrap()));
    eventually("all of it is saved", || {
        let text = fs::read_to_string(&file).unwrap_or_default();
        let has = |word: &str| text.contains(word);
        last.iter().all(|address| has(address)) && has("10.96.0.10") && has("\"Policy\"")
    });
    eventually("ready", || real.node.readyz() == "ok");
    assert_eq!(metric(&real, "weir_stale_inputs"), 0.0);

    // What is deleted while nobody looks is still there for a node that boots into the outage. Nothing
    // is left in the kernel.
    real.node.kill_agent().unwrap();
    real.run("delete service doomed").unwrap();
    real.run("delete networkpolicy echo").unwrap();
    real.plane.stop_api_server().unwrap();
    fs::remove_dir_all(real.node.machine().bpffs().path().join("weir")).unwrap();
    let netns = real.node.machine().netns();
    for device in pod_devices(netns) {
        let mut tc = netns.command("tc");
        let done = tc.args(["qdisc", "del", "dev", &device, "clsact"]).status();
        assert!(done.expect("tc").success(), "{device}");
    }
    // The kernel takes programs off cgroups some time after their last name has gone.
    eventually("no program, no network", || {
        !reaches(&client, "http://echo/")
    });

    let started = Instant::now();
    real.node.start_agent().unwrap();
    eventually("the agent goes by what it saved", || {
        metric(&real, "weir_stale_inputs") == 1.0
    });
    eventually("services are reached again", || {
        reaches(&client, "http://echo/")
    });
    println!("served its last good state after {:?}", started.elapsed());
    assert_stale(&real);
    let services = real.node.ask("services").unwrap();
    assert!(has_service(services.as_array().unwrap(), "default/doomed"));
    for i in 0..REQUESTS {
        assert!(reaches(&client, "http://echo/"), "{i} of {REQUESTS}");
    }
    assert!(!reaches(&stranger, "http://echo/"), "policy holds");

    pods_start(&real, &echo, uid, &client, &stranger);

    let stranger_reaches = || reaches(&stranger, "http://echo/");
    assert!(!stranger_reaches(), "policy holds on");
    real.plane.start_api_server().unwrap();
    let back = Instant::now();
    let settled = real
        .node
        .wait_for("doomed is gone", CATCH_UP, "services", |rows| {
            !has_service(rows, "default/doomed")
        });
    settled.unwrap();
    println!("caught up after {:?}", back.elapsed());
    eventually("the policy is gone", stranger_reaches);
    eventually("ready", || real.node.readyz() == "ok");
    assert_eq!(metric(&real, "weir_stale_inputs"), 0.0);
    eventually("the kernel holds what it should and no more", || {
        real.node.weir("verify").output().unwrap().status.success()
    });
}

/// A new sandbox for a pod that was saved gets a network and its policy; a pod that was not gets none.
fn pods_start(real: &RealNode, echo: &Pod, uid: String, client: &Pod, stranger: &Pod) {
    real.node.runtime().delete_pod(echo).unwrap();
    let again = Workload::named("default", &echo.workload.name).port(Transport::Tcp, 8080);
    let mut again = real.node.declare_pod_as(again, uid).unwrap();
    let started = Instant::now();
    real.node.add_pod(&mut again).unwrap();
    println!("a pod's ADD took {:?}", started.elapsed());
    real.node.start_echo(&mut again).unwrap();
    let url = format!("http://{}:8080/", again.addresses[0]);
    for i in 0..REQUESTS {
        assert!(reaches(client, &url), "{i} of {REQUESTS}");
    }
    assert!(!reaches(stranger, &url), "its policy is there");

    let unknown = Workload::named("default", "unknown");
    let unknown = real
        .node
        .declare_pod_as(unknown, "uid-unknown".into())
        .unwrap();
    let env = unknown.cni_env();
    let env: Vec<_> = env.iter().map(|(k, v)| (*k, v.as_str())).collect();
    let config = real.node.cni_config("1.1.0");
    let output = real.node.cni("ADD", &env, &config).unwrap();
    let said: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(said["code"], 11, "{said}");
    real.node.delete_pod(unknown).unwrap();
    real.node.delete_pod(again).unwrap();
}

/// Readiness, status and the log say that it is stale, and since when.
fn assert_stale(real: &RealNode) {
    let said = real.node.readyz();
    assert!(
        said.contains("all objects are stale, as saved 20") && said.contains("; the API"),
        "{said}"
    );
    let status = real.node.ask("status").unwrap();
    let inputs = status["inputs"].as_array().unwrap();
    for input in inputs {
        let problem = input["problem"].as_str().unwrap_or_default();
        assert!(problem.starts_with("stale, as saved 20"), "{input}");
        assert_eq!(input["synced"], true, "{input}");
    }
    let age = metric(real, "weir_stale_seconds");
    assert!((0.0..120.0).contains(&age), "{age} s");
}

/// The application runs, and its policy holds. The client it lets in, and the one that it does not.
fn application(real: &RealNode) -> [Pod; 2] {
    for manifests in [ECHO, MORE] {
        real.kubectl().apply(manifests).expect("apply");
    }
    for service in ["default/echo", "default/doomed"] {
        let settled = real.node.wait_for_service(service, 2, SETTLE);
        settled.expect("two backends");
    }
    let [client, stranger] = ["client", "stranger"].map(|name| {
        real.wait_for_pods("default", name, 1, SETTLE)
            .expect("a client")
    });
    eventually("the client is let in", || reaches(&client, "http://echo/"));
    eventually("the stranger is not", || {
        !reaches(&stranger, "http://echo/")
    });
    [client, stranger]
}

/// The node's ends of its pods' pairs.
fn pod_devices(netns: &Netns) -> Vec<String> {
    let links = netns.ip("-br link").expect("ip");
    let names = links
        .lines()
        .filter_map(|line| line.split(['@', ' ']).next());
    let ours = names.filter(|name| weir_cni::attachment::is_device(name));
    ours.map(str::to_owned).collect()
}

fn has_service(rows: &[Value], service: &str) -> bool {
    rows.iter().any(|row| row["service"] == service)
}

/// The value of a metric without labels; not a number while the agent does not answer.
fn metric(real: &RealNode, name: &str) -> f64 {
    let page = real.node.metrics().unwrap_or_default();
    let value = page.lines().find_map(|line| line.strip_prefix(name));
    value
        .and_then(|v| v.trim().parse().ok())
        .unwrap_or(f64::NAN)
}

fn reaches(client: &Pod, url: &str) -> bool {
    let mut curl = client.command("curl");
    let output = curl.args(["-sS", "--max-time", "1", url]).output();
    output.expect("curl").status.success()
}

fn eventually(what: &str, is_so: impl Fn() -> bool) {
    let deadline = Instant::now() + SETTLE;
    while !is_so() {
        assert!(Instant::now() < deadline, "not in {SETTLE:?}: {what}");
        std::thread::sleep(Duration::from_millis(50));
    }
}
