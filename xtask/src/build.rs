//! `cargo xtask build`: every host crate; the agent's build script makes the BPF object.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Context;

use crate::command::{self, step};
use crate::workspace::Workspace;

/// How to compile.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Profile {
    Debug,
    Release,
    /// What is measured, and what measures it: see the profile in the workspace's `Cargo.toml`.
    Measured,
}

impl Profile {
    /// The folder in `target` that it builds into.
    pub(crate) fn folder(self) -> PathBuf {
        match self {
            Self::Debug => "debug".into(),
            Self::Release => "release".into(),
            Self::Measured => Path::new(&image_target()).join(MEASURED),
        }
    }
}

const MEASURED: &str = "measured";

/// What images are built for: programs that find everything they need in themselves.
pub(crate) fn image_target() -> String {
    format!("{}-unknown-linux-musl", std::env::consts::ARCH)
}

/// What a measurement runs, with the package that each is of.
const MEASURED_PROGRAMS: [(&str, &str); 6] = [
    ("weir-agent", "weir-agent"),
    ("weir-dns", "weir-dns"),
    ("weir-cni", "weir-cni"),
    ("weir", "weir-cli"),
    ("weir-bench", "weir-bench"),
    ("weir-echo", "weir-tests"),
];

pub(crate) fn run(workspace: &Workspace, profile: Profile) -> anyhow::Result<()> {
    step("build", || {
        let mut cargo = cargo(workspace);
        cargo.arg("build");
        match profile {
            Profile::Debug => {}
            Profile::Release => drop(cargo.arg("--release")),
            Profile::Measured => measured(&mut cargo),
        }
        command::run(&mut cargo)
    })
}

/// The programs alone: everything else in the workspace is for tests, and would be compiled with optimisations. For
/// the target of an image: a plugin that is linked when it starts takes 0.7 ms longer for that, and memory comes from
/// another allocator.
fn measured(cargo: &mut Command) {
    cargo.args(["--profile", MEASURED, "--no-default-features"]);
    cargo.args(["--target", &image_target()]);
    for (program, package) in MEASURED_PROGRAMS {
        cargo.args(["--package", package, "--bin", program]);
    }
}

/// Builds what the tests run and the tests themselves, as one set: cargo then resolves features
/// once, and `cargo test` afterwards compiles nothing.
pub(crate) fn with_tests(workspace: &Workspace) -> anyhow::Result<()> {
    other_layout(workspace)?;
    for it in FORMER {
        former(workspace, it)?;
    }
    step("build binaries and tests", || {
        command::run(cargo(workspace).args(["build", "--all-targets"]))
    })
}

/// The agent of another version, as far as its programs and tables are concerned: what the tests of upgrades put
/// in place of the agent and the agent in place of. First, because both leave their program at one path.
fn other_layout(workspace: &Workspace) -> anyhow::Result<()> {
    step("build an agent of another layout", || {
        let mut cargo = cargo(workspace);
        cargo.args(["build", "--package", "weir-agent", "--bin", "weir-agent"]);
        command::run(cargo.args(["--features", "other-layout,ends-a-task"]))?;
        let folder = workspace.target().join("debug");
        let built = folder.join("weir-agent");
        std::fs::copy(&built, folder.join("weir-agent-other-layout"))
            .with_context(|| format!("copy {}", built.display()))?;
        Ok(())
    })
}

/// An agent out of the history: what a node may have been left by.
struct Former {
    revision: &'static str,
    /// What its program is called here.
    program: &'static str,
}

/// The last agent that held its programs by links of tcx, and the last that knew conversations as one row each.
const FORMER: [Former; 2] = [
    Former {
        revision: "b7e7e40",
        program: "weir-agent-tcx",
    },
    Former {
        revision: "8ae8392",
        program: "weir-agent-unwayed",
    },
];

/// Such an agent, for the tests of upgrades. It is kept between checkouts, since it does not change; not where the history
/// is not at hand, and the test says so then. They have a target directory of their own: cargo takes their crates for
/// those of this checkout.
fn former(workspace: &Workspace, Former { revision, program }: Former) -> anyhow::Result<()> {
    let built = workspace.target().join("debug").join(program);
    let folder = workspace.target().join("former");
    let kept = kept().map(|cache| cache.join(format!("weir-agent-{revision}")));
    if let Some(kept) = kept
        .as_ref()
        .filter(|kept| kept.exists() && !built.exists())
    {
        copy_whole(kept, &built)?;
    }
    let mut git = Command::new("git");
    git.current_dir(workspace.root());
    let is_known = git.args(["cat-file", "-e", revision]).status();
    if built.exists() || !is_known.is_ok_and(|status| status.success()) {
        return Ok(());
    }
    step(&format!("build the agent of {revision}"), || {
        std::fs::create_dir_all(&folder)?;
        let tar = folder.join("source.tar");
        let mut archive = Command::new("git");
        archive.current_dir(workspace.root());
        command::run(archive.args(["archive", "-o"]).arg(&tar).arg(revision))?;
        command::run(
            Command::new("tar")
                .arg("-xf")
                .arg(&tar)
                .arg("-C")
                .arg(&folder),
        )?;
        let mut cargo = cargo(workspace);
        cargo.current_dir(&folder);
        cargo.env("CARGO_TARGET_DIR", folder.join("target"));
        cargo.env("CARGO_PROFILE_DEV_DEBUG", "0");
        cargo.args(["build", "--package", "weir-agent", "--bin", "weir-agent"]);
        command::run(&mut cargo)?;
        let program = folder.join("target/debug/weir-agent");
        copy_whole(&program, &built)?;
        match &kept {
            Some(kept) => copy_whole(&program, kept),
            None => Ok(()),
        }
    })
}

/// Copies beside it first: one that is there is whole.
fn copy_whole(from: &Path, to: &Path) -> anyhow::Result<()> {
    let part = to.with_extension("part");
    std::fs::copy(from, &part).with_context(|| format!("copy {}", from.display()))?;
    std::fs::rename(&part, to).with_context(|| format!("make {}", to.display()))
}

/// Where what is expensive to make is kept between checkouts (`tests/src/cache.rs`), if there is such a place.
fn kept() -> Option<std::path::PathBuf> {
    let cache = match std::env::var_os("WEIR_CACHE") {
        Some(cache) => cache.into(),
        None => std::path::PathBuf::from(std::env::var_os("HOME")?).join(".cache/weir"),
    };
    std::fs::create_dir_all(&cache).ok()?;
    Some(cache)
}

/// The cargo that runs us, at the root of the workspace.
pub(crate) fn cargo(workspace: &Workspace) -> Command {
    let program = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(program);
    command.current_dir(workspace.root());
    // A checkout that is built once has no use for what the next build of it would go by.
    if std::env::var_os("CI").is_some() {
        command.env("CARGO_INCREMENTAL", "0");
    }
    // What cargo says to us about ourselves. The build script of `ring` would hear it, run again, and take
    // everything above it along, whenever a build from here follows one by hand.
    for (name, _) in std::env::vars_os() {
        let name = name.to_string_lossy();
        if name.starts_with("CARGO_PKG_") || name.starts_with("CARGO_MANIFEST_") {
            command.env_remove(&*name);
        }
    }
    command
}
