//! Downloads that are held while something happens, counted: `weir-download` and what it says. What happens meanwhile is
//! in the test.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read};
use std::process::{Child, ChildStdout, Command, Stdio};

use anyhow::{Context, Result, bail};
use serde::Deserialize;

/// A `weir-download fetch` that runs.
#[derive(Debug)]
pub struct Downloads {
    child: Child,
    said: BufReader<ChildStdout>,
}

/// How they ended. Each is in exactly one outcome.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct Held {
    pub attempted: u64,
    pub outcomes: BTreeMap<String, u64>,
    /// Who was asked, and who answered.
    pub served: BTreeMap<String, BTreeMap<String, u64>>,
    /// That were right, of all.
    pub bytes: u64,
    /// Of those that got all, in milliseconds.
    pub shortest_ms: u64,
}

#[derive(Deserialize)]
struct Begun {
    begun: u64,
}

impl Downloads {
    /// Starts them by a command that has its words, and waits until each has its first bytes.
    ///
    /// # Errors
    /// The program is missing, or some do not begin.
    pub fn begin(mut command: Command, expected: u64) -> Result<Self> {
        let child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn();
        let mut child = child.context("start weir-download")?;
        let said = child.stdout.take().context("stdout is a pipe")?;
        let mut downloads = Self {
            child,
            said: BufReader::new(said),
        };
        let mut line = String::new();
        downloads.said.read_line(&mut line)?;
        let begun: Result<Begun, _> = serde_json::from_str(&line);
        match begun {
            Ok(Begun { begun }) if begun == expected => Ok(downloads),
            _ => {
                let held = downloads.finish();
                bail!("of {expected} downloads began {}: {held:?}", line.trim())
            }
        }
    }

    /// Waits for the end of the last.
    ///
    /// # Errors
    /// It failed itself; that downloads failed is no error.
    pub fn finish(mut self) -> Result<Held> {
        let mut said = String::new();
        let mut complaint = String::new();
        // What it says is two lines, and a pipe holds what it complains about.
        self.said.read_to_string(&mut said)?;
        if let Some(mut err) = self.child.stderr.take() {
            err.read_to_string(&mut complaint)?;
        }
        let status = self.child.wait()?;
        if !status.success() {
            bail!("weir-download: {status}: {}", complaint.trim());
        }
        eprint!("{complaint}");
        Held::read(&said)
    }
}

impl Drop for Downloads {
    fn drop(&mut self) {
        // It has ended, or nobody waits for it any more.
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

impl Held {
    /// What `weir-download fetch` said at its end: the last line.
    ///
    /// # Errors
    /// It said something else.
    pub fn read(said: &str) -> Result<Self> {
        let last = said.lines().last().unwrap_or_default();
        serde_json::from_str(last).with_context(|| format!("weir-download said {said:?}"))
    }

    /// Those that did not get every byte.
    #[must_use]
    pub fn cut(&self) -> u64 {
        self.attempted - self.outcomes.get("ok").copied().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whatever_is_not_whole_is_cut() {
        let said = "{\"begun\":9}\n{\"attempted\":9,\"outcomes\":{\"ok\":6,\"reset\":1,\"ended early\":2},\
                    \"served\":{\"10.0.0.1:30080\":{\"a\":9}},\"bytes\":7,\"shortest_ms\":5}\n";
        let held = Held::read(said).unwrap();
        assert_eq!((held.attempted, held.cut()), (9, 3));
        assert!(Held::read("{\"begun\":9}\n").is_err());
    }
}
