//! Runs `cargo test`, shows what it prints, and counts: libtest's summary lines are the count, its per-test
//! lines give the names (`docs/decisions/0001`).

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, PipeReader, pipe};
use std::process::{Command, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::Duration;

use anyhow::Context;

use crate::command::words;

/// What a number of test binaries reported.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Results {
    pub(crate) passed: usize,
    /// At least `failures.len()`.
    pub(crate) failed: usize,
    pub(crate) ignored: usize,
    /// Names of failed tests, and commands that failed without naming one.
    pub(crate) failures: BTreeSet<String>,
    /// Names of tests with `#[ignore]`, with the reason if they give one.
    pub(crate) ignores: BTreeSet<String>,
}

impl Results {
    /// Of tests that could not even be started, for which they are not to blame.
    pub(crate) fn not_begun(why: &anyhow::Error) -> Self {
        Self {
            failed: 1,
            failures: [format!("{why:#}")].into(),
            ..Self::default()
        }
    }

    pub(crate) fn add(&mut self, other: Results) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.ignored += other.ignored;
        self.failures.extend(other.failures);
        self.ignores.extend(other.ignores);
    }

    fn read(&mut self, line: &str) {
        if let Some(rest) = line.strip_prefix("test result: ") {
            let count = |noun: &str| count_before(rest, noun);
            self.passed += count(" passed");
            self.failed += count(" failed");
            self.ignored += count(" ignored");
        } else if let Some(rest) = line.strip_prefix("test ") {
            // "- should panic" stands between the name and the outcome.
            let Some((name, outcome)) = rest.split_once(" ... ") else {
                return;
            };
            if outcome == "FAILED" {
                self.failures.insert(name.to_owned());
            } else if let Some(reason) = outcome.strip_prefix("ignored") {
                let reason = reason.strip_prefix(", ").unwrap_or("marked #[ignore]");
                self.ignores.insert(format!("{name}: {reason}"));
            }
        }
    }

    /// A command that failed although no test did: it did not compile, or a test binary died before
    /// it could report.
    fn ended(&mut self, command: &str, outcome: Outcome) {
        if outcome == Outcome::Failed && self.failed == 0 {
            self.failed = 1;
            self.failures
                .insert(format!("`{command}` failed before its tests could report"));
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Outcome {
    Succeeded,
    Failed,
}

/// How long output may still come after cargo has ended. It has all been written by then; but a
/// process that a test left behind holds the pipe open, and must not hold us with it.
const LAST_WORDS: Duration = Duration::from_millis(500);

/// Runs a `cargo test` command and shows what it prints as it comes. Only its not starting is an error; failing
/// tests are results.
pub(crate) fn run(command: &mut Command) -> anyhow::Result<Results> {
    watch(command, |line| println!("{line}"))
}

/// [`run`], but returns what the tests, and cargo, printed.
pub(crate) fn run_aside(command: &mut Command) -> anyhow::Result<(Results, String)> {
    let mut said = String::new();
    let results = watch(command, |line| {
        said.push_str(line);
        said.push('\n');
    })?;
    Ok((results, said))
}

fn watch(command: &mut Command, mut show: impl FnMut(&str)) -> anyhow::Result<Results> {
    let typed = words(command);
    let start = || format!("start `{typed}`");
    let (reader, writer) = pipe().with_context(start)?;
    let errors = writer.try_clone().with_context(start)?;
    let mut child = command
        .stdin(Stdio::null())
        .stdout(writer)
        .stderr(errors)
        .spawn()
        .with_context(start)?;
    // What the command keeps holds the pipe open.
    command.stdout(Stdio::null()).stderr(Stdio::null());
    let lines = lines(reader);

    let mut results = Results::default();
    let mut ended = false;
    loop {
        match lines.recv_timeout(LAST_WORDS) {
            Ok(line) => {
                if !says_nothing(&line) {
                    show(&line);
                }
                results.read(&line);
            }
            Err(RecvTimeoutError::Disconnected) => break,
            Err(RecvTimeoutError::Timeout) if ended => break,
            Err(RecvTimeoutError::Timeout) => {
                ended = child
                    .try_wait()
                    .with_context(|| format!("watch `{typed}`"))?
                    .is_some();
            }
        }
    }
    let status = child
        .wait()
        .with_context(|| format!("wait for `{typed}`"))?;
    results.ended(
        &typed,
        if status.success() {
            Outcome::Succeeded
        } else {
            Outcome::Failed
        },
    );
    Ok(results)
}

/// What comes out of a pipe.
fn lines(pipe: PipeReader) -> mpsc::Receiver<String> {
    let (sender, lines) = mpsc::sync_channel(64);
    // Ends with the pipe, or at its next line once nobody listens.
    thread::spawn(move || {
        for line in BufReader::new(pipe).split(b'\n').map_while(Result::ok) {
            let line = String::from_utf8_lossy(&line).into_owned();
            if sender.send(line).is_err() {
                return;
            }
        }
    });
    lines
}

fn count_before(line: &str, noun: &str) -> usize {
    line.split(noun)
        .next()
        .and_then(|head| head.rsplit(' ').next())
        .and_then(|number| number.parse().ok())
        .unwrap_or(0)
}

/// What a binary without tests prints.
fn says_nothing(line: &str) -> bool {
    line.is_empty() || line == "running 0 tests" || line.contains(" 0 passed; 0 failed; 0 ignored;")
}

#[cfg(test)]
mod tests {
    use super::*;

    const OUTPUT: &str = "\
running 4 tests
test a::first ... ok
test a::second ... FAILED
test a::third - should panic ... ok
test b ... ignored, needs a GPU

test result: FAILED. 2 passed; 1 failed; 1 ignored; 0 measured; 3 filtered out; finished in 0.01s

running 1 test
test c ... ok

test result: ok. 11 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.00s
";

    #[test]
    fn counts_are_summed_over_binaries() {
        let mut results = Results::default();
        OUTPUT.lines().for_each(|line| results.read(line));
        let expected = Results {
            passed: 13,
            failed: 1,
            ignored: 1,
            failures: ["a::second".to_owned()].into(),
            ignores: ["b: needs a GPU".to_owned()].into(),
        };
        assert_eq!(results, expected);
    }

    #[test]
    fn a_binary_that_dies_without_reporting_is_a_failure() {
        let mut results = Results {
            passed: 7,
            ..Results::default()
        };
        results.ended("cargo test --test vm", Outcome::Failed);
        assert_eq!(results.failed, 1);
        assert!(
            results
                .failures
                .iter()
                .any(|failure| failure.contains("--test vm"))
        );
    }

    #[test]
    fn a_process_that_a_test_left_behind_does_not_hold_up_the_run() {
        let line = "echo 'test result: ok. 3 passed; 0 failed; 0 ignored;'; sleep 20 &";
        let start = std::time::Instant::now();
        let results = run(Command::new("sh").args(["-c", line])).unwrap();
        assert_eq!(results.passed, 3);
        assert!(start.elapsed() < Duration::from_secs(15));
    }

    #[test]
    fn a_command_whose_failures_are_counted_is_not_counted_again() {
        let mut results = Results {
            failed: 2,
            ..Results::default()
        };
        results.ended("cargo test", Outcome::Failed);
        assert_eq!(results.failed, 2);
        results.ended("cargo test", Outcome::Succeeded);
        assert_eq!(results.failed, 2);
    }
}
