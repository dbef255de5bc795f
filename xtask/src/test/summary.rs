//! The last lines of a run: counts per ring, what was not run and why, what failed, what was left
//! behind, and one plain line of totals that machines read.

use std::collections::BTreeMap;
use std::fmt;

use super::libtest::Results;
use super::ring::Ring;

/// Who is asking: a person may lack a part of the machine, CI may not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Judge {
    Person,
    Ci,
}

impl Judge {
    /// CI systems set `CI`.
    pub(crate) fn from_environment() -> Self {
        match std::env::var("CI") {
            Ok(value) if !matches!(value.as_str(), "" | "0" | "false") => Judge::Ci,
            _ => Judge::Person,
        }
    }
}

/// One ring, counted. `passed + failed + skipped` is how many tests there are.
#[derive(Debug, PartialEq, Eq)]
struct Row {
    ring: Ring,
    passed: usize,
    failed: usize,
    skipped: usize,
}

pub(crate) struct Summary {
    judge: Judge,
    rows: Vec<Row>,
    not_checked: Vec<String>,
    /// Tests that are marked to be run by hand.
    by_hand: Vec<String>,
    not_run: Vec<String>,
    failures: Vec<String>,
    left_behind: Vec<String>,
}

impl Summary {
    pub(crate) fn new(judge: Judge, not_checked: Vec<String>) -> Self {
        Self {
            judge,
            rows: Vec::new(),
            not_checked,
            by_hand: Vec::new(),
            not_run: Vec::new(),
            failures: Vec::new(),
            left_behind: Vec::new(),
        }
    }

    /// `not_run` is what the ring's tests wrote to `$WEIR_NOT_RUN`: `name: reason` lines. Such a test
    /// returned early, so libtest counted it as passed.
    pub(crate) fn add(&mut self, ring: Ring, results: Results, not_run: &str) {
        let early: BTreeMap<_, _> = not_run
            .lines()
            .filter_map(|line| line.split_once(": "))
            .collect();
        let mut row = Row {
            ring,
            passed: results.passed.saturating_sub(early.len()),
            failed: results.failed,
            skipped: results.ignored,
        };
        match self.judge {
            Judge::Person => row.skipped += early.len(),
            Judge::Ci => row.failed += early.len(),
        }
        let name = ring.name();
        if row.passed + row.failed + row.skipped == 0 {
            // A renamed file must not make a ring vanish in silence.
            self.not_run
                .push(format!("{name}: no test belongs to this ring"));
            row.failed = usize::from(self.judge == Judge::Ci);
        }
        self.rows.push(row);

        self.failures.extend(
            results
                .failures
                .iter()
                .map(|failure| format!("{name}: {failure}")),
        );
        let of_ring = |line: String| format!("{name}: {line}");
        self.by_hand
            .extend(results.ignores.into_iter().map(of_ring));
        let early = early
            .into_iter()
            .map(|(test, reason)| format!("{test}: {reason}"));
        self.not_run.extend(early.map(of_ring));
    }

    /// What the census found; anything is a failure.
    pub(crate) fn left_behind(&mut self, leftovers: Vec<String>) {
        self.left_behind = leftovers;
    }

    pub(crate) fn is_good(&self) -> bool {
        self.failed() == 0
    }

    fn failed(&self) -> usize {
        let tests: usize = self.rows.iter().map(|row| row.failed).sum();
        tests + usize::from(!self.left_behind.is_empty())
    }
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "\n{:<10}{:>8}{:>8}{:>9}",
            "ring", "passed", "failed", "skipped"
        )?;
        for Row {
            ring,
            passed,
            failed,
            skipped,
        } in &self.rows
        {
            writeln!(f, "{:<10}{passed:>8}{failed:>8}{skipped:>9}", ring.name())?;
        }
        let because = match self.judge {
            Judge::Person => "not run",
            Judge::Ci => "not run, which in CI is a failure",
        };
        for (title, lines) in [
            ("not checked", &self.not_checked),
            ("left to be run by hand", &self.by_hand),
            (because, &self.not_run),
            ("failed", &self.failures),
            ("left behind by this run", &self.left_behind),
        ] {
            for (index, line) in lines.iter().enumerate() {
                if index == 0 {
                    writeln!(f, "\n{title}:")?;
                }
                writeln!(f, "  {line}")?;
            }
        }
        let passed: usize = self.rows.iter().map(|row| row.passed).sum();
        let skipped: usize = self.rows.iter().map(|row| row.skipped).sum();
        writeln!(
            f,
            "\n{passed} passed, {} failed, {skipped} skipped",
            self.failed()
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ran(passed: usize) -> Results {
        Results {
            passed,
            ..Results::default()
        }
    }

    fn last_line(summary: &Summary) -> String {
        summary.to_string().lines().last().unwrap().to_owned()
    }

    #[test]
    fn the_last_line_is_the_plain_total() {
        let mut summary = Summary::new(Judge::Person, Vec::new());
        summary.add(Ring::Host, ran(40), "");
        summary.add(
            Ring::Kernel,
            Results {
                failed: 2,
                ..ran(2)
            },
            "",
        );
        assert_eq!(last_line(&summary), "42 passed, 2 failed, 0 skipped");
        assert!(!summary.is_good());
    }

    #[test]
    fn a_test_that_returned_early_is_skipped_for_a_person_and_failed_in_ci() {
        let line = "deletions_reach_the_kernel: no Go toolchain found\n";
        for (judge, expected, good) in [
            (Judge::Person, "2 passed, 0 failed, 1 skipped", true),
            (Judge::Ci, "2 passed, 1 failed, 0 skipped", false),
        ] {
            let mut summary = Summary::new(judge, Vec::new());
            summary.add(Ring::Control, ran(3), line);
            assert_eq!(last_line(&summary), expected, "{judge:?}");
            assert_eq!(summary.is_good(), good, "{judge:?}");
            assert!(summary.to_string().contains(line.trim()), "{judge:?}");
        }
    }

    #[test]
    fn a_test_to_be_run_by_hand_is_named_as_such_and_fails_nothing() {
        for judge in [Judge::Person, Judge::Ci] {
            let mut summary = Summary::new(judge, Vec::new());
            let marked = Results {
                ignored: 1,
                ignores: ["upgrade: takes two images".to_owned()].into(),
                ..ran(1)
            };
            summary.add(Ring::Cluster, marked, "");
            assert!(summary.is_good(), "{judge:?}");
            let said = summary.to_string();
            assert!(said.contains("by hand:\n  cluster: upgrade: takes two images"));
            assert!(!said.contains("not run"), "{said}");
        }
    }

    #[test]
    fn a_ring_without_tests_is_named_and_fails_in_ci() {
        for (judge, good) in [(Judge::Person, true), (Judge::Ci, false)] {
            let mut summary = Summary::new(judge, Vec::new());
            summary.add(Ring::Vm, ran(0), "");
            assert_eq!(summary.is_good(), good, "{judge:?}");
            assert!(
                summary
                    .to_string()
                    .contains("vm: no test belongs to this ring")
            );
        }
    }

    #[test]
    fn something_left_behind_fails_a_run_whose_tests_all_passed() {
        let mut summary = Summary::new(Judge::Person, Vec::new());
        summary.add(Ring::Netns, ran(1), "");
        assert!(summary.is_good());
        summary.left_behind(vec!["network namespace weir-node".to_owned()]);
        assert!(!summary.is_good());
        assert_eq!(last_line(&summary), "1 passed, 1 failed, 0 skipped");
    }
}
