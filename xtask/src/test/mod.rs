//! `cargo xtask test`: checks, builds, runs the rings in order, looks for what was left behind, and
//! sums it all up. How the parts work is in the files beside this one.

mod cluster;
mod libtest;
mod ring;
mod summary;

use std::ffi::OsString;
use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;

use crate::build::{self, Profile};
use crate::census::Census;
use crate::check;
use crate::command::step;
use crate::workspace::Workspace;

use libtest::Results;
pub(crate) use ring::{Ring, Rings};
use summary::{Judge, Summary};

pub(crate) fn run(workspace: &Workspace, rings: &Rings) -> anyhow::Result<ExitCode> {
    let not_checked = check::run_all(workspace)?;
    build::with_tests(workspace)?;

    let before = Census::take(workspace)?;
    let mut summary = Summary::new(Judge::from_environment(), not_checked);
    for ring in rings.in_order() {
        clear_not_run(workspace)?;
        let variables = match ring {
            Ring::Cluster => cluster::prepare(workspace),
            _ => Ok(Vec::new()),
        };
        let result = match variables {
            Ok(variables) => step(&format!("test: {}", ring.title()), || {
                ring.run(workspace, &variables)
            })?,
            // What the rings before have found is still worth saying.
            Err(why) => Results::not_begun(&why),
        };
        summary.add(ring, result, &read_not_run(workspace)?);
    }
    summary.left_behind(Census::leftovers(workspace, &before)?);
    print!("{summary}");
    Ok(if summary.is_good() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// An environment variable and its value.
pub(crate) type Variable = (&'static str, OsString);

/// What every test and the demo can rely on; `docs/testing.md` describes each variable.
pub(crate) fn environment(
    workspace: &Workspace,
    profile: Profile,
) -> anyhow::Result<[Variable; 4]> {
    let binaries = workspace.target().join(profile.folder());
    Ok([
        ("PATH", workspace.search_path()?),
        ("WEIR_BIN_DIR", binaries.into()),
        ("WEIR_TOOLS_DIR", workspace.tools().into()),
        ("WEIR_NOT_RUN", not_run_file(workspace).into()),
    ])
}

fn not_run_file(workspace: &Workspace) -> PathBuf {
    workspace.target().join("not-run")
}

fn clear_not_run(workspace: &Workspace) -> anyhow::Result<()> {
    let file = not_run_file(workspace);
    fs::write(&file, "").with_context(|| format!("write {}", file.display()))
}

fn read_not_run(workspace: &Workspace) -> anyhow::Result<String> {
    let file = not_run_file(workspace);
    fs::read_to_string(&file).with_context(|| format!("read {}", file.display()))
}
