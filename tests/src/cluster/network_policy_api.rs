//! The conformance suite of network-policy-api against a cluster: ClusterNetworkPolicy with real pods. The suite is run as it
//! comes, with its own pods; only the image of these is ours (`weir-agnhost`), for a kernel may be without SCTP.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use super::Cluster;
use super::e2e::{Outcome, supervise};
use super::images;
use super::node::until;
use super::place::CONTROL;
use super::plane;
use super::start::Inside;
use crate::cache::progress;
use crate::go::{NETWORK_POLICY_API, Recipe};
use crate::kubectl::Kubectl;

/// Where `weir-agnhost` has Kubernetes' own.
pub const AGNHOST: &str = "/agnhost-of-kubernetes";

/// The experimental features that Weir has; the suite names the tests of the others. The definition of the experimental
/// channel is that of the standard one and their fields.
const FEATURES: &str = "ClusterNetworkPolicyNamedPorts";
const DEFINITION: &str =
    "config/crd/experimental/policy.networking.k8s.io_clusternetworkpolicies.yaml";
const KIND: &str = "clusternetworkpolicies.policy.networking.k8s.io";
/// The function of the suite that has all tests as its own.
const ROOT: &str = "TestConformance";
/// Its namespaces have this label.
const NAMESPACES: [&str; 2] = ["namespace", "--selector=conformance-house"];

const IN_SYSTEM: [&str; 1] = ["--namespace=kube-system"];

/// A policy about nobody. An agent that has it looks for policies.
const SEEN: &str = "{apiVersion: policy.networking.k8s.io/v1alpha2, kind: ClusterNetworkPolicy, \
                    metadata: {name: weir-is-seen}, spec: {tier: Baseline, priority: 1000, \
                    subject: {namespaces: {matchLabels: {weir.test/is: nobodys}}}, \
                    ingress: [{action: Deny, from: [{namespaces: {}}]}]}}";
/// An agent looks every 30 s whether there are such policies, and has to list them.
const NOTICE: Duration = Duration::from_secs(60);

/// Which tests.
#[derive(Debug, Clone, clap::Args)]
pub struct Selection {
    /// Run the tests whose names match this regular expression.
    #[arg(default_value = ".*")]
    pub focus: String,
}

/// The suite, built.
#[derive(Debug, Clone)]
pub struct Suite {
    program: PathBuf,
    /// Where its module is.
    source: PathBuf,
}

impl Suite {
    /// # Errors
    /// It has to be built, and there is no Go or it does not compile.
    pub fn ready() -> Result<Self> {
        let package = "sigs.k8s.io/network-policy-api/conformance";
        let workshop = NETWORK_POLICY_API.open()?;
        Ok(Self {
            program: workshop.program("network-policy-api.test", package, Recipe::Test)?,
            source: NETWORK_POLICY_API.source()?,
        })
    }

    /// Runs the tests, each once. Leaves the definition of ClusterNetworkPolicy in the cluster, and nothing else.
    ///
    /// # Errors
    /// The cluster is not as the suite needs it: it has one node, or such policies. Or the suite cannot be started, or
    /// ends early; its log is named.
    pub fn run(&self, cluster: &Cluster, selection: &Selection) -> Result<Outcome> {
        let Cluster { place, options, .. } = cluster;
        ensure!(
            options.nodes > 1,
            "its pods in the host network need two nodes"
        );
        let kubectl = cluster.kubectl();
        self.import(cluster)?;
        self.define(cluster, &kubectl)?;
        let log = place.log("network-policy-api");
        let mut command = cluster
            .starter
            .foreground(Inside::NetworkOf(CONTROL), "network-policy-api")?;
        command.env("KUBECONFIG", plane::admin(place));
        command.arg(&self.program);
        command.args(["-test.v", "-test.timeout=2h"]);
        command.arg(format!("-test.run=^{ROOT}$/{}", selection.focus));
        command.arg(format!("-supported-features={FEATURES}"));
        let begin = Instant::now();
        supervise("network-policy-api", &mut command, &log)?;
        let took = begin.elapsed();
        let delete = [&["delete", "--ignore-not-found"], &NAMESPACES[..]].concat();
        kubectl.run(&delete)?;
        let said = fs::read_to_string(&log)?;
        let outcome = parse(&said).with_context(|| format!("{} says why", log.display()))?;
        Ok(Outcome { took, ..outcome })
    }

    /// The image of its pods, onto every node.
    fn import(&self, cluster: &Cluster) -> Result<()> {
        let manifests = self.source.join("conformance/base/manifests.yaml");
        let text = fs::read_to_string(&manifests)
            .with_context(|| format!("read {}", manifests.display()))?;
        let names = images_of(&text);
        ensure!(!names.is_empty(), "{} names no image", manifests.display());
        let archive = cluster.place.dir().join("network-policy-api.tar");
        images::agnhost_with_sctp(&Vec::from_iter(names), &archive)?;
        cluster.import(&archive)
    }

    /// The definition, and waits until every agent has seen it.
    fn define(&self, cluster: &Cluster, kubectl: &Kubectl) -> Result<()> {
        kubectl.apply(&read(&self.source.join(DEFINITION))?)?;
        let established = ["wait", "--for=condition=Established", "--timeout=60s"];
        kubectl.run(&[&established[..], &["crd", KIND]].concat())?;
        let there = until("the API server has the kind", NOTICE, || {
            kubectl.run(&["get", KIND, "--output=name"])
        })?;
        ensure!(there.is_empty(), "there are policies already: {there}");
        kubectl.apply(SEEN)?;
        let begin = Instant::now();
        let all = agents(kubectl, cluster.options.nodes).and_then(|agents| {
            agents.iter().try_for_each(|agent| {
                until(&format!("{agent} sees the policy"), NOTICE, || {
                    match seen(&status(kubectl, agent)?) {
                        Some(1) => Ok(()),
                        other => bail!("it has {other:?}"),
                    }
                })
            })
        });
        kubectl.run_with_input(&["delete", "-f", "-"], SEEN)?;
        all?;
        let took = begin.elapsed().as_secs_f64();
        progress(&format!(
            "every agent sees ClusterNetworkPolicies, after {took:.1} s"
        ));
        Ok(())
    }
}

fn read(path: &Path) -> Result<String> {
    fs::read_to_string(path).with_context(|| format!("read {}", path.display()))
}

/// The pods of the agents, one on each node.
fn agents(kubectl: &Kubectl, nodes: u8) -> Result<Vec<String>> {
    let of_weir = "--selector=app.kubernetes.io/name=weir";
    let words = [&IN_SYSTEM[..], &["get", "pods", of_weir, "--output=name"]].concat();
    let agents: Vec<String> = kubectl.run(&words)?.lines().map(str::to_owned).collect();
    ensure!(agents.len() == usize::from(nodes), "agents: {agents:?}");
    Ok(agents)
}

/// What an agent says as its status.
fn status(kubectl: &Kubectl, agent: &str) -> Result<Value> {
    let weir = ["exec", agent, "--container=agent", "--", "weir"];
    let words = [&IN_SYSTEM[..], &weir, &["status", "--output=json"]].concat();
    serde_json::from_str(&kubectl.run(&words)?).context("parse its answer")
}

/// How many ClusterNetworkPolicies the agent has that says this as its status.
fn seen(status: &Value) -> Option<u64> {
    let mut inputs = status["inputs"].as_array()?.iter();
    inputs.find(|input| input["kind"] == "ClusterNetworkPolicy")?["objects"].as_u64()
}

/// The images that manifests name.
fn images_of(manifests: &str) -> BTreeSet<&str> {
    let lines = manifests
        .lines()
        .map(|line| line.trim_start_matches([' ', '-']));
    lines
        .filter_map(|line| line.strip_prefix("image: "))
        .collect()
}

/// Reads what a test program of Go prints with `-test.v` (`go doc cmd/test2json`). Its tests are those directly below the root;
/// of one that failed the steps are named that did, of one that was skipped its last words.
fn parse(said: &str) -> Result<Outcome> {
    let mut outcome = Outcome::default();
    let mut steps: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    let mut words: BTreeMap<&str, &str> = BTreeMap::new();
    let mut speaker = ROOT;
    let mut end = None;
    for line in said.lines().map(str::trim) {
        if let Some(marked) = line.strip_prefix("=== ") {
            // RUN, PAUSE, CONT or NAME.
            speaker = marked.split_whitespace().nth(1).unwrap_or(ROOT);
            continue;
        }
        let ended = line.strip_prefix("--- ").and_then(|it| it.split_once(": "));
        let Some((word, name)) = ended else {
            // After the end there is the verdict on the whole program.
            if end.is_none() {
                words.insert(speaker, line);
            }
            continue;
        };
        let name = name.split(' ').next().unwrap_or_default();
        let mut path = name.splitn(3, '/');
        let (root, test, step) = (path.next(), path.next(), path.next());
        ensure!(root == Some(ROOT), "a test of another name: {name}");
        match (test, step, word) {
            (None, ..) => end = Some(word),
            (Some(test), Some(step), "FAIL") => steps.entry(test).or_default().push(step),
            (Some(_), Some(_), _) => {}
            (Some(_), None, "PASS") => outcome.passed += 1,
            (Some(test), None, "SKIP") => {
                let why = words.get(name).copied().unwrap_or_default();
                outcome.skipped.insert(test.to_owned(), why.to_owned());
            }
            (Some(test), None, _) => {
                outcome.failed.insert(test.to_owned(), String::new());
            }
        }
    }
    for (test, why) in &mut outcome.failed {
        let steps = steps.get(test.as_str());
        *why = steps.map_or_else(String::new, |steps| steps.join(", "));
    }
    let word = end.context("the suite did not come to its end")?;
    if word != "PASS" && outcome.failed.is_empty() {
        let why = words.get(ROOT).copied().unwrap_or_default();
        outcome.failed.insert(ROOT.to_owned(), why.to_owned());
    }
    Ok(outcome)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SAID: &str = "\
=== RUN   TestConformance
    suite.go:133: Test Setup: Applying base manifests
=== RUN   TestConformance/A
=== RUN   TestConformance/A/Should_allow
    suite.go:187: Applying base/a.yaml
=== RUN   TestConformance/B
=== RUN   TestConformance/B/Should_deny
    helper.go:73: Error: Condition never satisfied
=== RUN   TestConformance/B/Should_pass
=== RUN   TestConformance/C
    suite.go:176: Skipping C: suite does not support Nodes
=== NAME  TestConformance
    apply.go:101: Deleting harry-potter StatefulSet
--- FAIL: TestConformance (61.20s)
    --- PASS: TestConformance/A (20.10s)
        --- PASS: TestConformance/A/Should_allow (20.00s)
    --- FAIL: TestConformance/B (30.00s)
        --- FAIL: TestConformance/B/Should_deny/at_once (20.00s)
        --- PASS: TestConformance/B/Should_pass (10.00s)
    --- SKIP: TestConformance/C (0.00s)
FAIL
";

    #[test]
    fn each_test_counts_for_what_it_did() {
        let outcome = parse(SAID).unwrap();
        assert_eq!(outcome.passed, 1);
        let failed = [("B".to_owned(), "Should_deny/at_once".to_owned())];
        assert_eq!(outcome.failed, failed.into());
        let why = &outcome.skipped["C"];
        assert!(why.contains("does not support Nodes"), "{why}");
    }

    #[test]
    fn a_suite_that_fails_before_its_tests_or_does_not_end_is_not_good() {
        let early = "    suite.go:133: no pods\n--- FAIL: TestConformance (300.00s)\nFAIL\n";
        let outcome = parse(early).unwrap();
        assert_eq!(outcome.failed[ROOT], "suite.go:133: no pods");
        assert!(!outcome.is_good());
        let (cut, _) = SAID.split_once("--- FAIL: TestConformance (").unwrap();
        assert!(parse(cut).is_err());
        assert!(
            !parse("--- PASS: TestConformance (0.00s)\nPASS\n")
                .unwrap()
                .is_good()
        );
    }

    #[test]
    fn images_are_read_from_manifests() {
        let manifests = "  - name: a\n    image: r/x:1\n  - image: r/y:2\n    image: r/x:1\n";
        assert_eq!(images_of(manifests), ["r/x:1", "r/y:2"].into());
    }
}
