//! Builds the BPF object that `kernel::object` embeds.

use std::env;
use std::fs::{self, File};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Context as _;

fn main() -> anyhow::Result<()> {
    // Meant for what is built on the host. Compiled in pieces, the programs are of a shape that verifiers refuse.
    if env::var_os("CARGO_INCREMENTAL").is_some() {
        let mut again = Command::new(env::current_exe().context("find this build script")?);
        let status = again.env_remove("CARGO_INCREMENTAL").status();
        let status = status.context("run this build script again")?;
        anyhow::ensure!(status.success(), "this build script, run again: {status}");
        return Ok(());
    }
    let features: &[&str] = match std::env::var_os("CARGO_FEATURE_OTHER_LAYOUT") {
        Some(_) => &["other-layout"],
        None => &[],
    };
    let _alone = share_folder().context("share the folder in which the BPF object is built")?;
    aya_build::build_ebpf(
        [aya_build::Package {
            name: "weir-ebpf",
            root_dir: "../ebpf",
            features,
            ..Default::default()
        }],
        aya_build::Toolchain::Custom(include_str!("../ebpf/TOOLCHAIN").trim()),
    )
    .context("build the BPF object; `cargo xtask setup` installs what it needs")
}

/// The agent is built several times: for tests, by clippy, for an image. Each build has an `OUT_DIR` of its
/// own, in which aya-build would compile the programs anew, and `core` and everything else below them, which
/// takes a minute. So the folder in which it does that is a link to one for all of a target directory.
///
/// While the file that is returned is open, no other build is there.
fn share_folder() -> anyhow::Result<File> {
    let out = PathBuf::from(env::var_os("OUT_DIR").context("no OUT_DIR")?);
    let shared = target_directory(&out)?.join("bpf");
    fs::create_dir_all(&shared)?;
    let lock = File::create(shared.join(".lock"))?;
    lock.lock()?;
    let own = out.join("aya-build");
    fs::create_dir_all(&own)?;
    let link = own.join("target");
    if fs::read_link(&link).is_ok_and(|to| to == shared) {
        return Ok(lock);
    }
    if link.is_symlink() {
        fs::remove_file(&link)?;
    } else if link.is_dir() {
        fs::remove_dir_all(&link)?;
    }
    symlink(&shared, &link)?;
    Ok(lock)
}

/// `OUT_DIR` is `[TARGET/]PROFILE/build/PACKAGE/out` in it.
fn target_directory(out: &Path) -> anyhow::Result<&Path> {
    let above = out.ancestors().nth(4).context("a short OUT_DIR")?;
    match env::var_os("TARGET") {
        Some(target) if above.ends_with(&target) => above.parent().context("a short OUT_DIR"),
        _ => Ok(above),
    }
}
