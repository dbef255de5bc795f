//! What the agent says when the API server does not let it in, or not everywhere. What it does with what
//! it is told is `control_agent.rs`.

#![allow(clippy::unwrap_used, reason = "a test that fails should say where")]

use std::fs;
use std::time::{Duration, Instant};

use weir_tests::binaries::ready_or_not_run;
use weir_tests::control_plane::ControlPlane;
use weir_tests::node::Source;
use weir_tests::real::{RealNode, cluster_role};

/// How long the agent may take to come to its conclusion, at the end of a run of failures too.
const PATIENCE: Duration = Duration::from_secs(30);

/// A rule of the role.
const POLICIES: &str = "  - apiGroups: [networking.k8s.io]
    resources: [networkpolicies]
    verbs: [list, watch]
";

#[test]
fn a_missing_permission_is_one_clear_message_until_it_is_given() {
    let Some(plane) = control_plane("a_missing_permission_is_one_clear_message_until_it_is_given")
    else {
        return;
    };
    let whole = cluster_role();
    let role = whole.replace(POLICIES, "");
    assert_ne!(role, whole, "the rule is in the role");
    let mut real = RealNode::prepare(plane, "n1", &role).unwrap();
    real.node.start_agent().unwrap();

    let advice = "not allowed to list networkpolicies: add apiGroups [\"networking.k8s.io\"], resources \
                  [\"networkpolicies\"], verbs [\"list\", \"watch\"] to the ClusterRole weir-agent";
    // The other six are synced then, and this is all that is missing.
    let said = eventually("/readyz has one reason", || {
        let said = real.node.readyz();
        (said.contains(advice) && said.lines().count() == 1).then_some(said)
    });
    assert!(
        said.starts_with("NetworkPolicy objects are not synced yet"),
        "{said}"
    );
    // Let it fail a few times more: it is tried every few seconds.
    let seconds = Duration::from_secs(5);
    let silent_until = Instant::now() + seconds;
    while Instant::now() < silent_until {
        assert!(real.node.readyz().contains(advice));
        std::thread::sleep(Duration::from_millis(250));
    }
    let warnings = warnings(&real.node.agent().unwrap().log());
    assert_eq!(warnings.len(), 1, "{warnings:#?}");
    assert!(
        warnings[0].contains(&advice.replace('"', "\\\"")) || warnings[0].contains(advice),
        "{warnings:#?}"
    );

    real.kubectl().apply(&whole).unwrap();
    eventually("ready with the permission", || {
        (real.node.readyz() == "ok").then_some(())
    });
    let log = real.node.agent().unwrap().log();
    eventually_log(&mut real, "watch recovered");
    assert!(!log.contains("panicked"), "{log}");
}

#[test]
fn a_token_that_nobody_knows_is_said_to_be_that() {
    let Some(plane) = control_plane("a_token_that_nobody_knows_is_said_to_be_that") else {
        return;
    };
    let mut real = RealNode::prepare(plane, "n1", &cluster_role()).unwrap();
    let Source::Kube { kubeconfig, .. } = &real.node.options.source else {
        panic!("it has an API server");
    };
    let valid = fs::read_to_string(kubeconfig).unwrap();
    let (before, token) = valid.split_once("\"token\": \"").unwrap();
    let (_, after) = token.split_once('"').unwrap();
    fs::write(
        kubeconfig,
        format!("{before}\"token\": \"of-nobody\"{after}"),
    )
    .unwrap();
    real.node.start_agent().unwrap();

    let said = eventually("/readyz tells of the token", || {
        let said = real.node.readyz();
        said.contains("the API server does not know who asks")
            .then_some(said)
    });
    assert!(
        said.contains("check the kubeconfig, or the token of the service account"),
        "{said}"
    );
    let pid = real.node.agent().unwrap().ended().unwrap();
    assert_eq!(pid, None, "it goes on trying");
}

#[test]
fn a_kubeconfig_that_cannot_be_used_ends_the_agent_with_its_name() {
    let Some(plane) =
        control_plane("a_kubeconfig_that_cannot_be_used_ends_the_agent_with_its_name")
    else {
        return;
    };
    let mut real = RealNode::prepare(plane, "n1", &cluster_role()).unwrap();
    let Source::Kube {
        kubeconfig,
        api_server,
    } = &real.node.options.source
    else {
        panic!("it has an API server");
    };
    let broken = kubeconfig.with_extension("broken");
    fs::write(&broken, "clusters: [").unwrap();
    let api_server = api_server.clone();
    let valid = kubeconfig.clone();
    let absent = valid.with_extension("absent");
    for (kubeconfig, api_server, said) in [
        (&absent, api_server.as_str(), absent.to_str().unwrap()),
        (&broken, api_server.as_str(), broken.to_str().unwrap()),
        (
            &valid,
            "10.210.0.1:6443:1",
            "must be http://HOST:PORT or https://HOST:PORT",
        ),
    ] {
        real.node.options.source = Source::Kube {
            kubeconfig: kubeconfig.clone(),
            api_server: api_server.to_owned(),
        };
        real.node.start_agent().unwrap();
        let agent = real.node.agent().unwrap();
        let ended = agent.wait(PATIENCE).unwrap();
        let log = agent.log();
        assert!(!ended.success(), "{log}");
        // The log goes on from the attempt before.
        let mut all = log.lines().filter(|line| line.starts_with("weir-agent: "));
        let last = all.next_back().unwrap_or_default();
        assert!(last.contains(said), "{said:?} is not in {last:?}");
    }
}

fn control_plane(test: &str) -> Option<ControlPlane> {
    let binaries = ready_or_not_run(test)?;
    Some(ControlPlane::start(&binaries).expect("a control plane"))
}

fn warnings(log: &str) -> Vec<String> {
    let loud = |line: &&str| line.contains(" WARN ") || line.contains(" ERROR ");
    log.lines().filter(loud).map(str::to_owned).collect()
}

fn eventually_log(real: &mut RealNode, text: &str) {
    let agent = real.node.agent().expect("an agent");
    agent
        .wait_for_log(text, PATIENCE)
        .expect("a line of its log");
}

fn eventually<T>(what: &str, wanted: impl Fn() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(found) = wanted() {
            return found;
        }
        assert!(Instant::now() < deadline, "not in {PATIENCE:?}: {what}");
        std::thread::sleep(Duration::from_millis(50));
    }
}
