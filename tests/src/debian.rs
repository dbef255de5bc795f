//! Debian packages, fetched with the machine's own apt and unpacked, never installed: no script of
//! theirs runs and no service starts.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};
use tempfile::TempDir;

use crate::cache::run_slowly;
use crate::run;

/// Fetches the package and returns a directory with the files that it would install.
///
/// # Errors
/// There is no apt, it does not know the package, or its lists are out of date.
pub fn unpack(package: &str) -> Result<TempDir> {
    let scratch = scratch_dir("deb")?;
    let mut download = Command::new("apt-get");
    // As root apt would fetch as another user, who may not write here.
    download.args(["-o", "APT::Sandbox::User=root", "download", package]);
    run_slowly(
        &format!("download {package}"),
        download.current_dir(scratch.path()),
    )?;
    let deb = fs::read_dir(scratch.path())?
        .next()
        .context("apt downloaded nothing")??
        .path();
    let mut unpack = Command::new("dpkg");
    unpack.arg("-x").arg(&deb).arg(scratch.path());
    run_slowly(&format!("unpack {package}"), &mut unpack)?;
    Ok(scratch)
}

/// Fetches packages of another archive than the machine's own, with lists of its own, and returns a directory with the files
/// that they would install. Nobody here has the archive's key, so each package has to have the given SHA-256.
///
/// # Errors
/// There is no apt, the archive is not reached or has not these packages, or one is not the one that is meant.
pub fn unpack_from(source: &str, packages: &[(&str, &str)]) -> Result<TempDir> {
    let scratch = scratch_dir("archive")?;
    let [lists, cache, debs] = ["lists", "cache", "debs"].map(|name| scratch.path().join(name));
    for folder in [
        &lists.join("partial"),
        &cache.join("archives/partial"),
        &debs,
    ] {
        fs::create_dir_all(folder)?;
    }
    let list = scratch.path().join("sources.list");
    fs::write(&list, format!("deb [trusted=yes] {source}\n"))?;
    let apt = |arguments: &[&str]| {
        let mut apt = Command::new("apt-get");
        for option in [
            "APT::Sandbox::User=root".to_owned(),
            "Acquire::Languages=none".to_owned(),
            "Acquire::Retries=1".to_owned(),
            "Acquire::http::Timeout=20".to_owned(),
            "Dir::Etc::sourceparts=-".to_owned(),
            format!("Dir::Etc::sourcelist={}", list.display()),
            format!("Dir::State::lists={}", lists.display()),
            format!("Dir::Cache={}", cache.display()),
        ] {
            apt.args(["-o", &option]);
        }
        apt.args(arguments).current_dir(&debs);
        apt
    };
    // What cannot be reached is only a warning otherwise.
    let update = ["update", "--error-on=any"];
    run_slowly(&format!("the lists of {source}"), &mut apt(&update))?;
    for (package, sum) in packages {
        run_slowly(
            &format!("download {package}"),
            &mut apt(&["download", package]),
        )?;
        let mut found = fs::read_dir(&debs)?.filter_map(Result::ok);
        let prefix = format!("{package}_");
        let deb = found.find(|it| it.file_name().to_string_lossy().starts_with(&prefix));
        let deb = deb.context("apt downloaded nothing")?.path();
        let output = Command::new("sha256sum").arg(&deb).output()?;
        if !output.stdout.starts_with(sum.as_bytes()) {
            bail!("{package} is not the one that is meant: another SHA-256");
        }
        let mut unpack = Command::new("dpkg");
        unpack.arg("-x").arg(&deb).arg(scratch.path());
        run_slowly(&format!("unpack {package}"), &mut unpack)?;
    }
    Ok(scratch)
}

/// The first package named `linux-image-…` and the like that a package of packages depends on.
///
/// # Errors
/// apt does not know `package`, or it depends on nothing of that name.
pub fn dependency(package: &str, prefix: &str) -> Result<String> {
    let output = Command::new("apt-cache")
        .args(["depends", package])
        .output();
    let said = output.context("run apt-cache")?;
    let text = String::from_utf8_lossy(&said.stdout);
    let mut depends = text
        .lines()
        .filter_map(|l| l.trim().strip_prefix("Depends: "));
    let found = depends.find(|name| name.starts_with(prefix));
    found
        .map(str::to_owned)
        .with_context(|| format!("apt knows no {package}: try apt-get update"))
}

/// Moves one file of a package into the cache, where it is there completely or not at all.
///
/// # Errors
/// It is not in the package, or the cache cannot be written.
pub fn keep(from: &Path, to: &Path) -> Result<()> {
    let part = to.with_added_extension("part");
    fs::copy(from, &part).with_context(|| format!("copy {}", from.display()))?;
    fs::rename(&part, to).with_context(|| format!("create {}", to.display()))
}

/// A directory that goes on drop, or at the next run if this one is killed.
///
/// # Errors
/// It cannot be created.
pub(crate) fn scratch_dir(label: &str) -> Result<TempDir> {
    let prefix = format!("{}-", run::unique_name(label));
    Ok(tempfile::Builder::new().prefix(&prefix).tempdir()?)
}
