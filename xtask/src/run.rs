//! `demo`, `bench`, `cluster` and `vm`: each makes the machine and the binaries ready and hands over to the
//! program that does the work, which lives in `tests/` or `bench/`.

use std::ffi::OsString;
use std::process::{Command, ExitCode};

use anyhow::Context;

use crate::build::{self, Profile, cargo};
use crate::command;
use crate::test::environment;
use crate::workspace::{Workspace, require_root};

pub(crate) fn demo(workspace: &Workspace, arguments: Vec<OsString>) -> anyhow::Result<ExitCode> {
    require_root("the demo makes network namespaces and loads BPF programs")?;
    crate::setup::run(workspace)?;
    build::run(workspace, Profile::Debug)?;
    let mut demo = cargo(workspace);
    demo.args([
        "run",
        "--quiet",
        "--package",
        "weir-tests",
        "--bin",
        "demo",
        "--",
    ]);
    hand_over(workspace, demo.args(arguments), Profile::Debug)
}

pub(crate) fn bench(workspace: &Workspace, arguments: Vec<OsString>) -> anyhow::Result<ExitCode> {
    require_root("the benchmarks make network namespaces and load BPF programs")?;
    crate::setup::image(workspace, &build::image_target())?;
    build::run(workspace, Profile::Measured)?;
    // Not through cargo, which would choose other features for this program alone and build it again.
    let folder = workspace.target().join(Profile::Measured.folder());
    let mut bench = Command::new(folder.join("weir-bench"));
    bench.current_dir(workspace.root());
    hand_over(workspace, bench.args(arguments), Profile::Measured)
}

/// The program that makes clusters, and what runs in their pods and outside of them.
const CLUSTER: [&str; 4] = ["cluster", "weir-agnhost", "weir-download", "weir-load"];

/// Weir comes onto the cluster as an image, so nothing else of it is built here.
pub(crate) fn cluster(workspace: &Workspace, arguments: Vec<OsString>) -> anyhow::Result<ExitCode> {
    require_root("a cluster's nodes are namespaces and cgroups")?;
    crate::setup::cluster(workspace)?;
    let mut cargo = cargo(workspace);
    cargo.args(["build", "--quiet", "--package", "weir-tests"]);
    for program in CLUSTER {
        cargo.args(["--bin", program]);
    }
    command::run(&mut cargo)?;
    let folder = workspace.target().join(Profile::Debug.folder());
    let mut cluster = Command::new(folder.join("cluster"));
    cluster.current_dir(workspace.root());
    hand_over(workspace, cluster.args(arguments), Profile::Debug)
}

pub(crate) fn vm(workspace: &Workspace) -> anyhow::Result<ExitCode> {
    crate::setup::run(workspace)?;
    build::run(workspace, Profile::Debug)?;
    let mut vm = cargo(workspace);
    vm.args([
        "test",
        "--package",
        "weir-tests",
        "--test",
        "vm",
        "--",
        "--nocapture",
    ]);
    hand_over(workspace, &mut vm, Profile::Debug)
}

/// Runs it in our place: it gets the terminal (Ctrl-C reaches it, being in our process group) and
/// its exit code is ours.
fn hand_over(
    workspace: &Workspace,
    command: &mut Command,
    profile: Profile,
) -> anyhow::Result<ExitCode> {
    command.envs(environment(workspace, profile)?);
    let status = command::status(command)?;
    let code = status.code().unwrap_or(1);
    Ok(ExitCode::from(u8::try_from(code).context("exit code")?))
}
