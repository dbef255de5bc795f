//! What the ring `cluster` takes beside our binaries: programs of other projects, and an image of Weir, which is not
//! optimised.

use std::process::Command;

use super::{Variable, environment};
use crate::build::Profile;
use crate::command::{self, step};
use crate::image;
use crate::workspace::Workspace;

/// Makes what is not there yet, and says where the image is. Where the programs cannot be had, there is
/// no image either: each test then finds out for itself, and says by its name that it was not run.
pub(super) fn prepare(workspace: &Workspace) -> anyhow::Result<Vec<Variable>> {
    let programs = step("programs and images of a cluster", || {
        let mut build = Command::new(workspace.target().join("debug/cluster"));
        build.arg("build");
        command::run(build.envs(environment(workspace, Profile::Debug)?))
    });
    if let Err(why) = programs {
        eprintln!("    no cluster, and no image for it: {why:#}");
        return Ok(Vec::new());
    }
    let image = image::run(workspace, image::Options::trial(workspace))?;
    Ok(vec![
        ("WEIR_IMAGE", image.into()),
        ("WEIR_SLOW", "yes".into()),
    ])
}
