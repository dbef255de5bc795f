//! Load from a pod, counted: `weir-load` and what it says. What load a test wants is in the test.

use std::collections::BTreeMap;
use std::io::Read;
use std::ops::AddAssign;
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, bail};
use serde::Deserialize;

use crate::node::{Pod, binary};

/// A `weir-load` that runs in a pod.
#[derive(Debug)]
pub struct Load {
    child: Child,
}

/// How attempts ended. Every one of them is in exactly one outcome.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct Tally {
    pub attempted: u64,
    pub outcomes: BTreeMap<String, u64>,
    /// When those that failed began (the second try, of one with a retry), in hundredths of a second since the start.
    #[serde(default)]
    pub failures_by_hundredth: BTreeMap<u64, u64>,
    /// Of all attempts, in milliseconds.
    pub slowest_ms: u64,
    /// From the first attempt to the end of the last, in milliseconds.
    pub took_ms: u64,
}

impl Load {
    /// Starts it with these words: `--kind http --target 10.96.0.20:80 --rate 100 --seconds 5`.
    ///
    /// # Errors
    /// The program is missing.
    pub fn start(pod: &Pod, words: &str) -> Result<Self> {
        let mut command = pod.command(&binary("weir-load").display().to_string());
        command.args(words.split_whitespace());
        Self::run(command)
    }

    /// As [`Self::start`], by a command that has its words; its stdin, if that is a pipe, is closed by
    /// [`Self::finish`].
    ///
    /// # Errors
    /// As there.
    pub fn run(mut command: Command) -> Result<Self> {
        let child = command
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn();
        Ok(Self {
            child: child.context("start weir-load")?,
        })
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// It failed itself; that attempts failed is no error.
    pub fn finish(mut self) -> Result<Tally> {
        drop(self.child.stdin.take());
        let mut said = String::new();
        let mut complaint = String::new();
        // What it says is one line, which a pipe holds.
        if let Some(mut out) = self.child.stdout.take() {
            out.read_to_string(&mut said)?;
        }
        if let Some(mut err) = self.child.stderr.take() {
            err.read_to_string(&mut complaint)?;
        }
        let status = self.child.wait()?;
        if !status.success() {
            bail!("weir-load: {status}: {}", complaint.trim());
        }
        serde_json::from_str(&said).with_context(|| format!("weir-load said {said:?}"))
    }
}

impl Tally {
    /// Attempts that succeeded, at once or after a retry.
    #[must_use]
    pub fn succeeded(&self) -> u64 {
        let good = self.outcomes.iter().filter(|(o, _)| o.starts_with("ok"));
        good.map(|(_, count)| count).sum()
    }

    /// Attempts that did not.
    #[must_use]
    pub fn failed(&self) -> u64 {
        self.attempted - self.succeeded()
    }
}

impl AddAssign for Tally {
    fn add_assign(&mut self, other: Self) {
        self.attempted += other.attempted;
        for (outcome, count) in other.outcomes {
            *self.outcomes.entry(outcome).or_default() += count;
        }
        for (moment, count) in other.failures_by_hundredth {
            *self.failures_by_hundredth.entry(moment).or_default() += count;
        }
        self.slowest_ms = self.slowest_ms.max(other.slowest_ms);
        self.took_ms = self.took_ms.max(other.took_ms);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_needed_a_retry_has_succeeded_and_nothing_else() {
        let line = r#"{"attempted":9,"outcomes":{"ok":5,"ok after a retry":2,"timeout":2},
                       "slowest_ms":7,"took_ms":100}"#;
        let mut tally: Tally = serde_json::from_str(line).unwrap();
        assert_eq!((tally.succeeded(), tally.failed()), (7, 2));
        tally += tally.clone();
        assert_eq!(
            (tally.attempted, tally.failed(), tally.slowest_ms),
            (18, 4, 7)
        );
    }
}
