//! A test that cannot run on this machine says so by name; it never passes silently.

use std::fmt::Display;
use std::fs::File;
use std::io::Write;

use crate::cache::progress;

/// Reports that `test` could not run. With `CI=true` that is a failure. Elsewhere the line
/// `<test>: <reason>` is appended to the file named by `WEIR_NOT_RUN`, which `cargo xtask test`
/// prints last, and shown on stderr.
///
/// # Panics
/// With `CI=true`, or if the line cannot be written.
pub fn not_run(test: &str, reason: &dyn Display) {
    let line = line(test, reason);
    assert!(
        std::env::var_os("CI").is_none_or(|ci| ci != "true"),
        "cannot run in CI: {line}"
    );
    not_here(test, reason);
}

/// As [`not_run`], for what a machine need not have: no failure in CI either.
///
/// # Panics
/// The line cannot be written.
pub fn not_here(test: &str, reason: &dyn Display) {
    let line = line(test, reason);
    progress(&format!("not run: {}", line.trim_end()));
    if let Some(path) = std::env::var_os("WEIR_NOT_RUN") {
        let file = File::options().create(true).append(true).open(&path);
        // One write, so that lines of tests side by side do not mix.
        let written = file.and_then(|mut f| f.write_all(line.as_bytes()));
        assert!(written.is_ok(), "append to {}: {written:?}", path.display());
    }
}

/// One line, whatever the reason is made of: whoever reads the file takes each for a test.
fn line(test: &str, reason: &dyn Display) -> String {
    let reason = reason.to_string();
    let lines: Vec<&str> = reason.lines().map(str::trim).collect();
    format!("{test}: {}\n", lines.join("; "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reason_of_many_lines_is_one_line() {
        let said = line("a_test", &"go: ended with 1\n  go.mod: requires go 1.26\n");
        assert_eq!(said, "a_test: go: ended with 1; go.mod: requires go 1.26\n");
    }
}
