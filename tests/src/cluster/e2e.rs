//! Kubernetes' own test suite against a cluster: run, and summed up.

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde::Deserialize;

use super::Cluster;
use super::place::CONTROL;
use super::plane;
use super::start::Inside;
use crate::cache::progress;

/// The specs that say what Kubernetes' networking is.
pub const CONFORMANCE: &str = r"\[sig-network\].*\[Conformance\]";
const SILENCE: Duration = Duration::from_secs(30);

/// Which specs, and how.
#[derive(Debug, Clone, clap::Args)]
pub struct Selection {
    /// Run the specs whose names match this regular expression.
    #[arg(default_value = CONFORMANCE)]
    pub focus: String,
    /// But not those that match this one.
    #[arg(long)]
    pub skip: Option<String>,
    /// Specs at a time.
    #[arg(long, default_value_t = 4)]
    pub procs: u8,
}

/// What came of the specs that were asked for.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    pub passed: usize,
    /// By name, with the reason.
    pub failed: BTreeMap<String, String>,
    /// Those that found that they cannot run here; not those that were not asked for.
    pub skipped: BTreeMap<String, String>,
    pub took: Duration,
}

impl Outcome {
    #[must_use]
    pub fn is_good(&self) -> bool {
        self.passed > 0 && self.failed.is_empty()
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (name, why) in &self.failed {
            writeln!(f, "failed: {name}\n    {why}")?;
        }
        for (name, why) in &self.skipped {
            writeln!(f, "skipped: {name}\n    {why}")?;
        }
        let (failed, skipped) = (self.failed.len(), self.skipped.len());
        let seconds = self.took.as_secs();
        write!(
            f,
            "{} passed, {failed} failed, {skipped} skipped in {seconds} s",
            self.passed
        )
    }
}

/// Runs the specs, each once: one that fails has failed.
///
/// # Errors
/// The suite cannot be started, or ends without a report; its log is named.
pub fn run(cluster: &Cluster, selection: &Selection) -> Result<Outcome> {
    let Cluster {
        programs, place, ..
    } = cluster;
    let dir = place.dir().join("e2e");
    fs::create_dir_all(&dir)?;
    let report = dir.join("report.json");
    if report.exists() {
        fs::remove_file(&report)?;
    }
    let mut command = cluster
        .starter
        .foreground(Inside::NetworkOf(CONTROL), "e2e")?;
    command
        .arg(&programs.ginkgo)
        .args(["run", "--no-color", "--timeout=3h"]);
    command.arg(format!("--procs={}", selection.procs));
    command.arg(format!("--focus={}", selection.focus));
    if let Some(skip) = &selection.skip {
        command.arg(format!("--skip={skip}"));
    }
    // Output interception waits for every process that a spec left behind.
    command.args(["--output-interceptor-mode=none", "--poll-progress-after=0"]);
    command
        .arg(format!("--output-dir={}", dir.display()))
        .arg("--json-report=report.json");
    command.arg(&programs.e2e).arg("--");
    command.args([
        "--provider=skeleton",
        "--disable-log-dump",
        "--prepull-images=false",
    ]);
    command.args(["--allowed-not-ready-nodes=0"]);
    command.arg(format!("--num-nodes={}", cluster.options.nodes));
    command.arg(format!("--kubeconfig={}", plane::admin(place).display()));
    command.arg(format!(
        "--kubectl-path={}",
        programs.plane.kubectl.display()
    ));
    let begin = Instant::now();
    let log = place.log("e2e");
    supervise("e2e", &mut command, &log)?;
    let reported =
        fs::read(&report).with_context(|| format!("no report: {} says why", log.display()))?;
    let mut outcome = parse(&reported)?;
    outcome.took = begin.elapsed();
    Ok(outcome)
}

/// Runs it to its end with a line now and then. How it ended is in its report.
pub(super) fn supervise(what: &str, command: &mut Command, log: &Path) -> Result<()> {
    let file = fs::File::create(log)?;
    command
        .stdin(Stdio::null())
        .stdout(file.try_clone()?)
        .stderr(file);
    let begin = Instant::now();
    let mut spoken = begin;
    let mut child = command.spawn().context("start the test suite")?;
    while child.try_wait()?.is_none() {
        if spoken.elapsed() >= SILENCE {
            spoken = Instant::now();
            progress(&format!("{what} … {} s", begin.elapsed().as_secs()));
        }
        std::thread::sleep(Duration::from_millis(200));
    }
    Ok(())
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Suite {
    #[serde(default)]
    spec_reports: Option<Vec<Spec>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Spec {
    #[serde(default)]
    container_hierarchy_texts: Option<Vec<String>>,
    leaf_node_type: String,
    #[serde(default)]
    leaf_node_text: String,
    state: String,
    #[serde(default)]
    failure: Option<Failure>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Failure {
    #[serde(default)]
    message: String,
}

/// Reads a report of ginkgo's (<https://onsi.github.io/ginkgo/#generating-machine-readable-reports>).
fn parse(report: &[u8]) -> Result<Outcome> {
    let suites: Vec<Suite> = serde_json::from_slice(report).context("parse ginkgo's report")?;
    let mut outcome = Outcome::default();
    let specs = suites
        .into_iter()
        .flat_map(|suite| suite.spec_reports.unwrap_or_default());
    for spec in specs {
        let mut words = spec.container_hierarchy_texts.unwrap_or_default();
        words.push(spec.leaf_node_text);
        let name = words.join(" ");
        let message = spec.failure.map(|f| f.message).unwrap_or_default();
        let why = message.lines().next().unwrap_or_default().to_owned();
        match (spec.leaf_node_type.as_str(), spec.state.as_str()) {
            ("It", "passed") => outcome.passed += 1,
            // What the focus leaves out is skipped too, and for no reason.
            (_, "skipped" | "pending") if why.is_empty() => {}
            ("It", "skipped") => {
                outcome.skipped.insert(name, why);
            }
            // What runs before and after the specs is no spec, but it can fail all of them.
            (_, "passed" | "skipped" | "pending") => {}
            (kind, state) => {
                outcome
                    .failed
                    .insert(format!("{name} ({kind} {state})"), why);
            }
        }
    }
    Ok(outcome)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn outcome_of(kind: &str, state: &str, message: &str) -> (usize, usize, usize) {
        let spec = json!({
            "ContainerHierarchyTexts": ["[sig-network] DNS"],
            "LeafNodeType": kind,
            "LeafNodeText": "should resolve",
            "State": state,
            "Failure": { "Message": message },
        });
        let report = json!([{ "SpecReports": [spec] }]).to_string();
        let outcome = parse(report.as_bytes()).unwrap();
        (outcome.passed, outcome.failed.len(), outcome.skipped.len())
    }

    #[test]
    fn each_spec_counts_for_what_it_did() {
        for (kind, state, message, counts) in [
            ("It", "passed", "", (1, 0, 0)),
            ("It", "failed", "timed out", (0, 1, 0)),
            ("It", "panicked", "nil", (0, 1, 0)),
            ("It", "timedout", "", (0, 1, 0)),
            ("It", "interrupted", "", (0, 1, 0)),
            ("It", "skipped", "needs six nodes", (0, 0, 1)),
            ("It", "skipped", "", (0, 0, 0)),
            ("SynchronizedBeforeSuite", "passed", "", (0, 0, 0)),
            ("SynchronizedBeforeSuite", "failed", "no nodes", (0, 1, 0)),
        ] {
            assert_eq!(outcome_of(kind, state, message), counts, "{kind} {state}");
        }
    }

    #[test]
    fn a_run_of_nothing_is_not_good() {
        assert!(!parse(b"[]").unwrap().is_good());
    }
}
