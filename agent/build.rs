//! Builds the BPF object that `kernel::object` embeds.

use std::env;
use std::fs::{self, File};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Context as _;
use object::build::elf::{Builder, SectionData};

/// What cargo is told when it builds the programs. Whoever asks for incremental builds means those of the host: programs
/// that are compiled in parts are not those that are tested, and the verifier refuses some for a misaligned store to
/// the stack. And `v3` of the instructions (kernel 5.1) compares 32 bits in one jump, where the oldest needs five
/// instructions and two jumps.
const TOLD: [(&str, &str); 4] = [
    ("CARGO_INCREMENTAL", "0"),
    ("CARGO_UNSTABLE_PROFILE_RUSTFLAGS", "true"),
    ("CARGO_PROFILE_RELEASE_RUSTFLAGS", "-Ctarget-cpu=v3"),
    ("CARGO_PROFILE_RELEASE_BUILD_OVERRIDE_RUSTFLAGS", ""),
];

fn main() -> anyhow::Result<()> {
    let is_told = |(name, value)| env::var(name).is_ok_and(|it| it == value);
    if !TOLD.into_iter().all(is_told) {
        let ended = Command::new(env::current_exe()?).envs(TOLD).status()?;
        anyhow::ensure!(
            ended.success(),
            "the build of the programs ended with {ended}"
        );
        return Ok(());
    }
    let features: &[&str] = match std::env::var_os("CARGO_FEATURE_OTHER_LAYOUT") {
        Some(_) => &["other-layout"],
        None => &[],
    };
    let _alone = share_folder().context("share the folder in which the BPF object is built")?;
    let out = PathBuf::from(env::var_os("OUT_DIR").context("no OUT_DIR")?);
    aya_build::build_ebpf(
        [aya_build::Package {
            name: "weir-ebpf",
            root_dir: "../ebpf",
            features,
            ..Default::default()
        }],
        aya_build::Toolchain::Custom(include_str!("../ebpf/TOOLCHAIN").trim()),
    )
    .context("build the BPF object; `cargo xtask setup` installs what it needs")?;
    without_debug(&out.join("weir")).context("strip the BPF object")
}

/// Takes out what only a debugger reads: four fifths of the object, which the agent would carry with it. What the
/// verifier says of lines of the source is from the type information, which stays.
fn without_debug(path: &Path) -> anyhow::Result<()> {
    let data = fs::read(path)?;
    let mut object = Builder::read(data.as_slice())?;
    for section in object.sections.iter_mut() {
        let name = section.name.as_slice();
        section.delete = name.starts_with(b".debug") || name.starts_with(b".rel.debug");
    }
    object.delete_orphans();
    // LLVM puts the names of sections among those of symbols, and what writes it here does not.
    let names = object.sections.add();
    names.name = b".shstrtab".as_slice().into();
    names.sh_type = object::elf::SHT_STRTAB;
    names.data = SectionData::SectionString;
    let mut stripped = Vec::new();
    object.write(&mut stripped)?;
    Ok(fs::write(path, stripped)?)
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
