//! What the ring `cluster` takes beside our binaries: programs of other projects, and an image of Weir, which is not
//! optimised.

use std::process::Command;

use anyhow::{Context as _, ensure};

use super::{Variable, environment};
use crate::build::Profile;
use crate::command::{self, step};
use crate::image;
use crate::workspace::Workspace;

/// What three nodes with their images, the programs of other projects and the image of Weir take at most, in bytes: 1.2 GiB for each
/// node that was measured, and as much again.
const ROOM: u64 = 6 << 30;

/// Where clusters are.
const PLACE: &str = "/tmp";

/// Makes what is not there yet, and says where the image is. Where the programs cannot be had, there is
/// no image either: each test then finds out for itself, and says by its name that it was not run.
///
/// # Errors
/// There is too little room, which would otherwise show as an image that cannot be read.
pub(super) fn prepare(workspace: &Workspace) -> anyhow::Result<Vec<Variable>> {
    let mut df = Command::new("df");
    let said = command::printed(df.args(["--output=avail", "--block-size=1", PLACE]));
    let said = said.context("run df")?;
    let room = said.lines().last().and_then(|it| it.trim().parse().ok());
    let room: u64 = room.with_context(|| format!("read what df says: {said}"))?;
    ensure!(
        room >= ROOM,
        "clusters need {} GiB in {PLACE}, and {:.1} are free: `cargo clean` helps where many versions were built",
        ROOM >> 30,
        room as f64 / f64::from(1 << 30)
    );
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
