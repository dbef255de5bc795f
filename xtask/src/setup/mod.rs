//! `cargo xtask setup`: finds out what is missing and brings it. Silent and quick when nothing is.
//! What is needed is listed in `packages` and `toolchain`; this file has the order.

mod packages;
mod toolchain;

pub(crate) use toolchain::{bpf_toolchain, cargo_deny, cargo_mutants};

use std::path::Path;

use crate::command::step;
use crate::workspace::Workspace;

/// What the programs of an image need beside all that: another standard library, and a C compiler for
/// the dependencies that are not Rust.
pub(crate) fn image(workspace: &Workspace, target: &str) -> anyhow::Result<()> {
    run(workspace)?;
    toolchain::target(target)?;
    let missing = packages::missing(workspace, packages::for_image());
    if !missing.is_empty() {
        packages::install(workspace, &missing)?;
    }
    Ok(())
}

/// What the programs and images of a cluster's nodes are built with, beside all that.
pub(crate) fn cluster(workspace: &Workspace) -> anyhow::Result<()> {
    run(workspace)?;
    let missing = packages::missing(workspace, packages::for_cluster());
    if !missing.is_empty() {
        packages::install(workspace, &missing)?;
    }
    Ok(())
}

/// Is there a Go toolchain, of whatever version, where the tests look for one? It is not installed here:
/// what Debian has may be too old.
pub(crate) fn has_go(workspace: &Workspace) -> bool {
    workspace.which("go").is_some() || Path::new("/usr/local/go/bin/go").is_file()
}

/// Rust first: which LLVM packages are needed depends on the nightly.
pub(crate) fn run(workspace: &Workspace) -> anyhow::Result<()> {
    toolchain::host_components()?;
    let nightly = toolchain::nightly()?;
    let linker = toolchain::Linker::matching(&nightly)?;

    let mut needed = packages::for_tests();
    if !linker.is_installed() {
        needed.extend(packages::for_linker(nightly.llvm));
    }
    let missing = packages::missing(workspace, needed);
    if !missing.is_empty() {
        packages::install(workspace, &missing)?;
    }
    if !linker.is_installed() {
        step("install bpf-linker (compiles it: minutes)", || {
            linker.install()
        })?;
    }
    Ok(())
}
