//! What agents tell the cluster, on a real control plane: Events about what is wrong, and that the agent of another
//! node is away. The pods of agents are played; who tells is a real one.

#![allow(clippy::unwrap_used, reason = "a test that fails should say where")]

use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::Value;
use weir_tests::binaries::ready_or_not_run;
use weir_tests::control_plane::ControlPlane;
use weir_tests::helm::Helm;
use weir_tests::not_run::not_run;
use weir_tests::real::RealNode;

/// An agent may be away for a minute, and what was not taken is tried again after one.
const PATIENCE: Duration = Duration::from_secs(100);

/// The rule for Events.
const EVENTS: &str = "  - apiGroups: [events.k8s.io]
    resources: [events]
    verbs: [create]
";
const CHART: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../deploy/helm/weir");

const OTHERS: &str = "
apiVersion: v1
kind: Node
metadata: {name: n2}
---
apiVersion: v1
kind: Node
metadata: {name: n3}
";

/// Asks for an address that no range allows.
const THIEF: &str = "
apiVersion: v1
kind: Service
metadata: {name: thief}
spec:
  externalIPs: [10.96.0.1]
  ports: [{port: 443}]
";

fn agent_of(node: &str) -> String {
    format!(
        "
apiVersion: v1
kind: Pod
metadata:
  name: weir-{node}
  namespace: kube-system
  labels: {{app.kubernetes.io/name: weir, app.kubernetes.io/component: agent}}
spec:
  nodeName: {node}
  tolerations: [{{operator: Exists}}]
  containers: [{{name: agent, image: weir}}]
"
    )
}

#[test]
fn faults_are_events_and_an_agent_that_is_away_is_a_condition_of_its_node() {
    let test = "faults_are_events_and_an_agent_that_is_away_is_a_condition_of_its_node";
    let Some(binaries) = ready_or_not_run(test) else {
        return;
    };
    let helm = match Helm::ready() {
        Ok(helm) => helm,
        Err(why) => return not_run(test, &why),
    };
    let values = ["k8sServiceHost=192.0.2.10", "tell.absence=true"];
    let chart = helm.template(Path::new(CHART), "kube-system", &values);
    let whole = of_rbac(&chart.unwrap());
    assert!(whole.contains(EVENTS), "{whole}");
    let plane = ControlPlane::start(&binaries).unwrap();
    // Without the permission nothing but the Event is missing.
    let mut real = RealNode::prepare(plane, "n1", &whole.replace(EVENTS, "")).unwrap();
    let arguments = [
        "--tell-events",
        "--tell-absence",
        "--pod-namespace=kube-system",
    ];
    let arguments = arguments.map(str::to_owned);
    real.node.options.agent_args.extend(arguments);
    real.start_node().unwrap();
    let agents = ["n1", "n2", "n3"].map(agent_of);
    for object in [OTHERS, THIEF]
        .into_iter()
        .chain(agents.each_ref().map(String::as_str))
    {
        real.kubectl().apply(object).unwrap();
    }
    // A cloud's controller has said something of this one.
    status(
        &real,
        "node",
        "n3",
        &["NetworkUnavailable", "False", "RouteCreated"],
    );
    // What kubelets say has to stay.
    status(&real, "node", "n2", &["Ready", "True", "KubeletReady"]);
    for pod in ["weir-n2", "weir-n3"] {
        status(&real, "pod", pod, &["Ready", "True", ""]);
    }
    eventually("the agent of n1 is ready", || {
        let pod = kubectl_json(&real, "-n kube-system get pod weir-n1 -o json");
        let conditions = pod["status"]["conditions"].as_array().cloned();
        let mut conditions = conditions.into_iter().flatten();
        conditions.any(|it| it["type"] == "Ready" && it["status"] == "True")
    });
    let gone = Instant::now();
    for pod in ["weir-n2", "weir-n3"] {
        status(&real, "pod", pod, &["Ready", "False", ""]);
    }

    let lacks = "cannot create resource";
    eventually("the missing permission is said", || {
        real.node.agent().unwrap().log().contains(lacks)
    });
    assert_eq!(events(&real), 0);
    real.kubectl().apply(&whole).unwrap();

    // Somebody said it of this node, whose agent is ready.
    let away = ["NetworkUnavailable", "True", "WeirAgentAway"];
    status(&real, "node", "n1", &away);
    eventually("who is back says so", || {
        condition(&real, "n1") == Some(("False".into(), "WeirAgentReady".into()))
    });
    nothing_else_may_be_written(&real);

    assert_eq!(condition(&real, "n2"), None, "it is not away for long");
    eventually("n2 says that its agent is away", || {
        condition(&real, "n2") == Some(("True".into(), "WeirAgentAway".into()))
    });
    let took = gone.elapsed();
    println!("n2 said that its agent is away after {took:?}");
    assert!(took > Duration::from_secs(58), "{took:?}");
    std::thread::sleep(Duration::from_secs(6));
    let foreign = condition(&real, "n3");
    assert_eq!(foreign, Some(("False".into(), "RouteCreated".into())));

    eventually("the Event is there", || events(&real) > 0);
    let described = real.run("describe service thief").unwrap();
    assert!(described.contains("ExternalIpNotAllowed"), "{described}");
    assert!(described.contains("--external-ip-range"), "{described}");
    std::thread::sleep(Duration::from_secs(11));
    assert_eq!(events(&real), 1, "it is told once");
    let said = real.node.agent().unwrap().log();
    assert_eq!(said.matches("has not taken an Event").count(), 1, "{said}");
}

/// `kubectl patch` reads first what it patches, which the agent may not.
const READER: &str = "
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata: {name: reader}
rules: [{apiGroups: [''], resources: [nodes, nodes/status], verbs: [get]}]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: reader}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: reader}
subjects: [{kind: ServiceAccount, name: weir-agent, namespace: kube-system}]
";

/// With the token of the agent, of a Node only that condition.
fn nothing_else_may_be_written(real: &RealNode) {
    real.kubectl().apply(READER).unwrap();
    let patch = |of: &[&str], patch: &str| {
        let words = ["patch", "node", "n2", "--type=strategic", "--patch", patch];
        let who = ["--as=system:serviceaccount:kube-system:weir-agent"];
        real.kubectl().run(&[&words[..], &who, of].concat())
    };
    let status = ["--subresource=status"];
    for (part, refused) in [
        (
            r#"{"status":{"addresses":[{"type":"InternalIP","address":"192.0.2.66"}]}}"#,
            "addresses",
        ),
        (r#"{"status":{"capacity":{"cpu":"0"}}}"#, "capacity"),
        (
            r#"{"status":{"conditions":[{"type":"Ready","status":"False"}]}}"#,
            "no condition",
        ),
        (r#"{"metadata":{"labels":{"a":"b"}}}"#, "metadata"),
    ] {
        let said = format!("{:#}", patch(&status, part).unwrap_err());
        assert!(
            said.contains("weir-agent may change no") && said.contains(refused),
            "{said}"
        );
    }
    let said = patch(&[], r#"{"spec":{"unschedulable":true}}"#).unwrap_err();
    assert!(format!("{said:#}").contains("forbidden"), "{said:#}");
}

/// The objects of the template of permissions.
fn of_rbac(chart: &str) -> String {
    let documents = chart.split_inclusive("---\n");
    let ours = documents.filter(|it| it.contains("# Source: weir/templates/rbac.yaml\n"));
    ours.collect()
}

/// Writes a condition of an object's status, as its kubelet or a controller would.
fn status(real: &RealNode, kind: &str, name: &str, [condition, value, reason]: &[&str; 3]) {
    let phase = match kind {
        "pod" => r#""phase":"Running","#,
        _ => "",
    };
    let patch = format!(
        r#"{{"status":{{{phase}"conditions":[{{"type":"{condition}","status":"{value}","reason":"{reason}"}}]}}}}"#
    );
    let words = [
        "-n",
        "kube-system",
        "patch",
        kind,
        name,
        "--subresource=status",
        "--type=strategic",
        "--patch",
        &patch,
    ];
    real.kubectl().run(&words).unwrap();
}

/// Whether the network of a node is said to be unavailable, and why.
fn condition(real: &RealNode, node: &str) -> Option<(String, String)> {
    let node = kubectl_json(real, &format!("get node {node} -o json"));
    let conditions = node["status"]["conditions"].as_array()?;
    let mut found = conditions.iter();
    let found = found.find(|it| it["type"] == "NetworkUnavailable")?;
    let text = |key: &str| found[key].as_str().unwrap_or_default().to_owned();
    Some((text("status"), text("reason")))
}

/// How many Events there are of what the Service asks for.
fn events(real: &RealNode) -> usize {
    let list = kubectl_json(real, "get events -o json");
    let all = list["items"].as_array().unwrap();
    let ours = all.iter();
    ours.filter(|it| it["reason"] == "ExternalIpNotAllowed")
        .count()
}

fn kubectl_json(real: &RealNode, words: &str) -> Value {
    serde_json::from_str(&real.run(words).unwrap()).unwrap()
}

fn eventually(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !is_so() {
        assert!(Instant::now() < deadline, "not in {PATIENCE:?}: {what}");
        std::thread::sleep(Duration::from_millis(250));
    }
}
