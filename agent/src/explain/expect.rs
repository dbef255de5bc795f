//! Expectations of a folder of policies: the kind `PolicyTest`, and what comes of it. No kernel and no cluster takes part.

use std::path::Path;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use weir_cli::explained::{Case, Explained};
use weir_cli::question::Question;

use super::folder::{Folder, NODE};
use super::{Matter, compile};
use crate::compile::policy::NodeView;

/// The version of the kind.
const API_VERSION: &str = "weir/v1alpha1";

/// As it is written. What is not named here is refused.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct PolicyTest {
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

/// What became of all expectations.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    pub results: Vec<Checked>,
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
    pub passed: bool,
    pub cases: Vec<Case>,
}

/// Checks everything that a folder expects.
///
/// # Errors
/// All that is wrong with the folder, one line each.
pub fn check(path: &Path) -> Result<Report, Vec<String>> {
    let folder = Folder::read(path)?;
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
    let expectations = tests.iter().map(|(_, test)| test.spec.expectations.len());
    if wrong.is_empty() && expectations.sum::<usize>() == 0 {
        wrong.push(format!(
            "{}: no PolicyTest expects anything",
            path.display()
        ));
    }
    if !wrong.is_empty() {
        return Err(wrong);
    }
    let ranges: Vec<IpNet> = tests
        .iter()
        .flat_map(|(_, it)| it.spec.pod_cidrs.clone())
        .collect();
    let snapshot = folder.cluster(&ranges).map_err(|e| vec![e])?;
    let node = NodeView {
        name: NODE.into(),
        ..NodeView::default()
    };
    let compiler = compile(&snapshot, &node);
    let mut results = Vec::new();
    for (origin, test) in &tests {
        for (i, expectation) in test.spec.expectations.iter().enumerate() {
            let place = format!("{origin}: spec.expectations[{i}]");
            for from in expectation.from.all() {
                for to in expectation.to.all() {
                    let matter = Question::read(from, to)
                        .and_then(|it| Matter::take(&it, &compiler, &snapshot, &node));
                    match matter {
                        Ok(matter) => {
                            let Explained { cases, .. } = matter.explain(from, to);
                            results.push(expectation.checked(&place, from, to, cases));
                        }
                        Err(why) => wrong.push(format!("{place}: {from} -> {to}: {why}")),
                    }
                }
            }
        }
    }
    let not_read = folder.not_read.into_iter();
    match wrong.is_empty() {
        true => Ok(Report {
            results,
            not_read: not_read.map(|it| it.kind).collect(),
        }),
        false => Err(wrong),
    }
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
        Checked {
            place: place.to_owned(),
            from: from.to_owned(),
            to: to.to_owned(),
            expected: self.verdict,
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
            let wrong = it
                .cases
                .iter()
                .find(|case| case.allowed != (it.expected == Expected::Allow));
            let case = wrong.or(it.cases.first());
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
        for row in &rows {
            for (text, width) in row.iter().zip(&widths) {
                out.push_str(&format!("{text:width$}  "));
            }
            out.push_str(&row[4]);
            out.push('\n');
        }
        let failed = self.results.iter().filter(|it| !it.passed).count();
        out.push_str(&format!(
            "{} expectations, {failed} failed\n",
            self.results.len()
        ));
        if !self.not_read.is_empty() {
            out.push_str(&format!("not read: {}\n", self.not_read.join(", ")));
        }
        out
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
