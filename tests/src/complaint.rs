//! A process that must refuse to serve: how it ends, and that it says why in one line.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::node::Node;
use crate::process::Launch;

/// How long it may take to refuse.
const PATIENCE: Duration = Duration::from_secs(20);

/// Runs it to its end; returns its exit code and the one line that it complained in. What it logged as
/// `INFO` or `WARN` before is no complaint.
///
/// # Errors
/// It does not end, or what it said is not one line.
pub fn complaint(node: &Node, launch: Launch) -> Result<(Option<i32>, String)> {
    let log = node.machine().dir().join("complaint.log");
    let mut process = launch.log_to(&log).spawn()?;
    let status = process.wait(PATIENCE)?;
    let said = fs::read_to_string(&log).context("read what it said")?;
    fs::remove_file(&log)?;
    let is_normal = |line: &&str| line.contains("  INFO ") || line.contains("  WARN ");
    let complaints: Vec<_> = said.lines().filter(|l| !is_normal(l)).collect();
    match complaints[..] {
        [line] if !line.contains("panicked") => Ok((status.code(), line.to_owned())),
        _ => bail!("not one line:\n{said}"),
    }
}
