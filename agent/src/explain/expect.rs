//! Expectations of a folder of policies: the kind `PolicyTest`, and what comes of it. No kernel and no cluster takes part.

use std::path::Path;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use weir_cli::explained::{self, Case};
use weir_cli::question::{Question, Source, Target};

use super::folder::{Folder, node};
use super::workload::Workloads;
use super::{Matter, compile, numbered};
use crate::model::{Family, ObjectName, PodNetwork, Snapshot};

/// The version of the kind.
const API_VERSION: &str = "weir/v1alpha1";

/// As it is written. What is not named here is refused.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct PolicyTest {
    api_version: String,
    #[serde(rename = "kind")]
    _kind: String,
    #[serde(rename = "metadata")]
    _metadata: serde_json::Value,
    spec: Spec,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Spec {
    /// Where pods without an address get one, one range of each family.
    #[serde(default, rename = "podCIDRs")]
    pod_cidrs: Vec<IpNet>,
    expectations: Vec<Expectation>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Expectation {
    from: OneOrMore,
    to: OneOrMore,
    verdict: Expected,
}

#[derive(Debug, Deserialize)]
#[serde(untagged, expecting = "expected a text or a list of texts")]
enum OneOrMore {
    One(String),
    More(Vec<String>),
}

/// What should become of it.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub enum Expected {
    Allow,
    Deny,
}

/// What became of it.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub enum Got {
    Allow,
    Deny,
    /// Some of its pairs of addresses the one, some the other.
    Both,
}

/// What became of all expectations.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    pub results: Vec<Checked>,
    /// What is no part of it, though its author may think so.
    pub warnings: Vec<String>,
    /// Kinds of documents that have no part in it.
    pub not_read: Vec<String>,
}

/// One of them.
#[derive(Clone, Debug, Serialize)]
pub struct Checked {
    /// The file and the place in it.
    pub place: String,
    pub from: String,
    pub to: String,
    pub expected: Expected,
    pub got: Got,
    pub passed: bool,
    pub cases: Vec<Case>,
}

/// Checks everything that a folder expects.
///
/// # Errors
/// All that is wrong with the folder, one line each.
pub fn check(path: &Path) -> Result<Report, Vec<String>> {
    let folder = Folder::read(path)?;
    let tests = tests(&folder)?;
    let expectations = tests.iter().map(|(_, test)| test.spec.expectations.len());
    let nothing = || {
        vec![format!(
            "{}: no PolicyTest expects anything",
            path.display()
        )]
    };
    if expectations.sum::<usize>() == 0 {
        return Err(nothing());
    }
    let ranges = pod_cidrs(&tests)?;
    let (snapshot, mut warnings) = folder.cluster(&ranges).map_err(|e| vec![e])?;
    let node = node();
    let compiler = compile(&snapshot, &node);
    let mut results = Vec::new();
    let mut wrong = Vec::new();
    for (origin, test) in &tests {
        for (i, expectation) in test.spec.expectations.iter().enumerate() {
            let place = format!("{origin}: spec.expectations[{i}]");
            for from in expectation.from.all() {
                for to in expectation.to.all() {
                    let question = question(from, to, &folder.workloads);
                    if let Ok(question) = &question
                        && let Some(pod) = no_party(question, &snapshot)
                    {
                        warnings.push(format!(
                            "{place}: {from} -> {to} is not judged: {pod} is in the network of its node, and not said to have its address"
                        ));
                        continue;
                    }
                    let matter =
                        question.and_then(|it| Matter::take(&it, &compiler, &snapshot, &node));
                    match matter {
                        Ok(matter) => {
                            let cases = match expectation.verdict {
                                Expected::Allow => matter.explain(from, to).cases,
                                Expected::Deny => matter.cases(),
                            };
                            results.push(expectation.checked(&place, from, to, cases));
                        }
                        Err(why) => wrong.push(format!("{place}: {from} -> {to}: {why}")),
                    }
                }
            }
        }
    }
    if results.is_empty() && wrong.is_empty() {
        wrong = nothing();
        wrong.append(&mut warnings);
    }
    let not_read = folder.not_read.into_iter();
    match wrong.is_empty() {
        true => Ok(Report {
            results,
            warnings,
            not_read: not_read.map(|it| it.kind).collect(),
        }),
        false => Err(wrong),
    }
}

/// The PolicyTests of a folder, each with its place.
///
/// # Errors
/// All that is not understood, one line each.
pub(super) fn tests(folder: &Folder) -> Result<Vec<(String, PolicyTest)>, Vec<String>> {
    let mut wrong = Vec::new();
    let mut tests = Vec::new();
    for (origin, value) in &folder.tests {
        match serde_path_to_error::deserialize::<_, PolicyTest>(value) {
            Ok(test) if test.api_version != API_VERSION => wrong.push(format!(
                "{origin}: apiVersion: {:?} is not {API_VERSION}",
                test.api_version
            )),
            Ok(test) => tests.push((origin.to_string(), test)),
            Err(e) => wrong.push(format!("{origin}: {}: {}", e.path(), e.inner())),
        }
    }
    match wrong.is_empty() {
        true => Ok(tests),
        false => Err(wrong),
    }
}

/// Where pods without an address get one, as the tests say that say it. A cluster has one range of each family.
///
/// # Errors
/// Two say it differently, or one says two of a family.
pub(super) fn pod_cidrs(tests: &[(String, PolicyTest)]) -> Result<Vec<IpNet>, Vec<String>> {
    let mut known: Option<(&String, Vec<IpNet>)> = None;
    for (origin, test) in tests.iter().filter(|(_, it)| !it.spec.pod_cidrs.is_empty()) {
        let mut said: Vec<IpNet> = test.spec.pod_cidrs.iter().map(IpNet::trunc).collect();
        said.sort_unstable();
        for two in said.windows(2) {
            if Family::of(&two[0].addr()) == Family::of(&two[1].addr()) {
                return Err(vec![format!(
                    "{origin}: spec.podCIDRs: {} and {} are of one family",
                    two[0], two[1]
                )]);
            }
        }
        match &known {
            Some((first, before)) if *before != said => {
                return Err(vec![format!(
                    "{origin}: spec.podCIDRs: {first} says others, and the pods of a folder have one address of each family"
                )]);
            }
            _ => known = Some((origin, said)),
        }
    }
    Ok(known.map_or_else(Vec::new, |(_, said)| said))
}

/// What is asked, of the pods that stand for workloads. Of a workload with more than one the other is asked about where it is both ends.
fn question(from: &str, to: &str, workloads: &Workloads) -> Result<Question, String> {
    let mut question = Question::read(&workloads.asked(from)?, &workloads.asked(to)?)?;
    if let (
        Source::Pod { namespace, name },
        Target::Pod {
            namespace: to_namespace,
            name: to_name,
        },
    ) = (&question.from, &mut question.to)
        && (namespace, name) == (&*to_namespace, &*to_name)
        && let Some(other) = workloads.another(&ObjectName::new(namespace.as_str(), name.as_str()))
    {
        *to_name = other.name.to_string();
    }
    Ok(question)
}

/// An end that is a pod without an address, since its node's is not known.
fn no_party(question: &Question, snapshot: &Snapshot) -> Option<ObjectName> {
    let from = match &question.from {
        Source::Pod { namespace, name } => Some((namespace, name)),
        Source::Address(_) => None,
    };
    let to = match &question.to {
        Target::Pod { namespace, name } => Some((namespace, name)),
        Target::Service { .. } | Target::Address(_) => None,
    };
    let mut ends = from.into_iter().chain(to);
    ends.find_map(|(namespace, name)| {
        let id = ObjectName::new(namespace.as_str(), name.as_str());
        let pod = snapshot.pods.get(&id)?;
        (pod.network == PodNetwork::Host && pod.addresses.is_empty()).then_some(id)
    })
}

impl OneOrMore {
    fn all(&self) -> &[String] {
        match self {
            Self::One(one) => std::slice::from_ref(one),
            Self::More(more) => more,
        }
    }
}

impl Expectation {
    /// Of a Service, every backend has to be as expected.
    fn checked(&self, place: &str, from: &str, to: &str, cases: Vec<Case>) -> Checked {
        let is_allowed = self.verdict == Expected::Allow;
        let allowed = cases.iter().filter(|it| it.allowed).count();
        let got = match allowed {
            0 => Got::Deny,
            all if all == cases.len() => Got::Allow,
            _ => Got::Both,
        };
        Checked {
            place: place.to_owned(),
            from: from.to_owned(),
            to: to.to_owned(),
            expected: self.verdict,
            got,
            passed: cases.iter().all(|case| case.allowed == is_allowed),
            cases,
        }
    }
}

impl Report {
    pub fn passed(&self) -> bool {
        self.results.iter().all(|it| it.passed)
    }

    /// A table for people.
    pub fn table(&self) -> String {
        let mut rows = vec![["", "FROM", "TO", "EXPECTED", "WHY"].map(str::to_owned)];
        for it in &self.results {
            let case = it.wrong().next().or(it.cases.first());
            rows.push([
                if it.passed { "ok" } else { "FAILED" }.to_owned(),
                it.from.clone(),
                it.to.clone(),
                format!("{:?}", it.expected),
                case.map_or_else(String::new, why),
            ]);
        }
        let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max();
        let widths: Vec<usize> = (0..4).map(|it| width(it).unwrap_or(0)).collect();
        let mut out = String::new();
        let results = [None].into_iter().chain(self.results.iter().map(Some));
        for (row, result) in rows.iter().zip(results) {
            for (text, width) in row.iter().zip(&widths) {
                out.push_str(&format!("{text:width$}  "));
            }
            out.push_str(&row[4]);
            out.push('\n');
            if let Some(failed) = result.filter(|it| !it.passed) {
                for line in failed.words().lines() {
                    out.push_str(&format!("        {line}\n"));
                }
            }
        }
        let failed = self.results.iter().filter(|it| !it.passed).count();
        out.push_str(&format!(
            "{}, {failed} failed\n",
            numbered(self.results.len(), "expectation")
        ));
        for warning in &self.warnings {
            out.push_str(&format!("warning: {warning}\n"));
        }
        if !self.not_read.is_empty() {
            out.push_str(&format!("not read: {}\n", self.not_read.join(", ")));
        }
        out
    }
}

impl Checked {
    /// What is not as expected.
    fn wrong(&self) -> impl Iterator<Item = &Case> {
        let is_allowed = self.expected == Expected::Allow;
        self.cases.iter().filter(move |it| it.allowed != is_allowed)
    }

    /// What was expected and what came of it, each as `weir policy explain` says it.
    fn words(&self) -> String {
        let Self {
            place,
            expected,
            got,
            ..
        } = self;
        let all: Vec<Case> = self.wrong().cloned().collect();
        let verdicts = explained::verdicts(&all);
        format!("{place}: expected {expected:?}, got {got:?}\n{verdicts}")
    }
}

/// The end that decides, or both.
fn why(case: &Case) -> String {
    let sides = [("egress", &case.egress), ("ingress", &case.ingress)];
    let deciding = sides
        .iter()
        .filter(|(_, side)| case.allowed || !side.allowed);
    let said: Vec<String> = deciding
        .map(|(direction, side)| format!("{direction}: {}", side.words))
        .collect();
    said.join("; ")
}
