//! `cargo xtask check`: formatting, lints on host and BPF code, and the dependencies' licences,
//! origins, duplicates and known vulnerabilities.

use std::process::Command;

use crate::build::cargo;
use crate::command::{self, run_quietly, step};
use crate::setup;
use crate::workspace::Workspace;

/// Fails at the first check that does. Returns what could not be checked, one line each.
pub(crate) fn run_all(workspace: &Workspace) -> anyhow::Result<Vec<String>> {
    step("check: formatting", || {
        command::run(cargo(workspace).args(["fmt", "--all", "--check"]))
    })?;
    step("check: lints", || {
        command::run(cargo(workspace).args(["clippy", "--all-targets", "--", "-D", "warnings"]))
    })?;
    // As `cargo xtask bench` builds them: alone, and so with fewer features than all crates together.
    step("check: lints of the bench", || {
        command::run(cargo(workspace).args(["clippy", "--package", "weir-bench"]))
    })?;
    step("check: lints of BPF code", || {
        command::run(&mut bpf_lints(workspace))
    })?;
    setup::cargo_deny()?;
    step("check: dependencies", || dependencies(workspace))
}

pub(crate) fn run(workspace: &Workspace) -> anyhow::Result<()> {
    for line in run_all(workspace)? {
        println!("not checked: {line}");
    }
    Ok(())
}

/// The same flags as the agent's build script compiles with. A folder of its own, so that this does
/// not undo the cache of that build.
fn bpf_lints(workspace: &Workspace) -> Command {
    let mut command = Command::new("rustup");
    command.args([
        "run",
        setup::bpf_toolchain(),
        "cargo",
        "clippy",
        "--package",
        "weir-ebpf",
    ]);
    command.args(["--target", "bpfel-unknown-none", "-Z", "build-std=core"]);
    command.args(["--", "-D", "warnings"]);
    command.current_dir(workspace.root());
    command.env("CARGO_TARGET_DIR", workspace.target().join("bpf-lints"));
    let arch = std::env::consts::ARCH;
    command.env(
        "CARGO_ENCODED_RUSTFLAGS",
        format!("--cfg=bpf_target_arch=\"{arch}\""),
    );
    command
}

fn dependencies(workspace: &Workspace) -> anyhow::Result<Vec<String>> {
    command::run(deny(workspace).args(["check", "licenses", "bans", "sources"]))?;
    // Fetching apart from checking tells "no network" from "a vulnerability".
    if let Err(error) = run_quietly(deny(workspace).args(["fetch", "db"])) {
        let report = format!("{error:#}");
        // git says why on the line that begins so.
        let cause = report
            .lines()
            .find(|line| line.starts_with("fatal: "))
            .unwrap_or(&report);
        return Ok(vec![format!(
            "advisories (known vulnerabilities): the RustSec database could not be fetched: {}",
            cause.trim_start_matches("fatal: ")
        )]);
    }
    command::run(deny(workspace).args(["--offline", "check", "advisories"]))?;
    Ok(Vec::new())
}

fn deny(workspace: &Workspace) -> Command {
    let mut command = cargo(workspace);
    command.args([
        "deny",
        "--color",
        "never",
        "--log-level",
        "warn",
        "--all-features",
    ]);
    command
}
