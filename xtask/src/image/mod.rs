//! `cargo xtask image`: our programs, linked statically, in one image archive that a container runtime
//! imports. What is in the image is here; how it is packed is in `layer` and `archive`, which texts go along
//! in `licences`.

mod archive;
mod layer;
mod licences;

use std::env::consts::ARCH;
use std::fs;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, bail};

use self::archive::Image;
use self::layer::{File, Privilege};
use crate::build::{cargo, image_target};
use crate::command::{self, step};
use crate::setup;
use crate::workspace::Workspace;

/// What runs in the kernel is compiled into the agent, by its build script.
const KERNEL_SIDE: &str = "weir-ebpf";

/// The registry part is a name that no registry has: the image is loaded, never pulled.
const REPOSITORY: &str = "weir.local/weir";

/// The programs, with the package that each is of.
const PROGRAMS: [(&str, &str, Privilege); 4] = [
    ("weir-agent", "weir-agent", Privilege::None),
    ("weir-cni", "weir-cni", Privilege::None),
    // It never is root, so it can have its port only by the file's own capability.
    ("weir-dns", "weir-dns", Privilege::BindPorts),
    ("weir", "weir-cli", Privilege::None),
];

#[derive(clap::Args)]
pub(crate) struct Options {
    /// The image's name, `[REGISTRY/]REPOSITORY:TAG`. `weir.local/weir:VERSION` if not given.
    #[arg(long)]
    tag: Option<String>,
    /// The archive to write. `target/image/weir-ARCH.tar` if not given.
    #[arg(long)]
    output: Option<PathBuf>,
    /// The cargo profile to build with.
    #[arg(long, default_value = "image")]
    profile: String,
    /// Cargo features, `weir-agent/other-layout`: an image for the tests of upgrades.
    #[arg(long)]
    features: Option<String>,
}

impl Options {
    /// An image to be tried here and now: quick to make, and beside the one for others.
    pub(crate) fn trial(workspace: &Workspace) -> Self {
        Self {
            tag: None,
            output: Some(workspace.target().join(format!("image/trial-{ARCH}.tar"))),
            profile: "trial".to_owned(),
            features: None,
        }
    }
}

/// Returns where the archive is.
pub(crate) fn run(workspace: &Workspace, options: Options) -> anyhow::Result<PathBuf> {
    let name = options
        .tag
        .unwrap_or_else(|| format!("{REPOSITORY}:{}", env!("CARGO_PKG_VERSION")));
    let (_, tag) = archive::split(&name)?;
    let target = image_target();
    let output = options
        .output
        .unwrap_or_else(|| workspace.target().join(format!("image/weir-{ARCH}.tar")));
    setup::image(workspace, &target)?;
    step("build the image's programs", || {
        let mut cargo = cargo(workspace);
        cargo.args(["build", "--bins", "--target", &target]);
        cargo.args(["--profile", &options.profile]);
        for (_, package, _) in PROGRAMS {
            cargo.args(["--package", package]);
        }
        if let Some(features) = &options.features {
            cargo.args(["--features", features]);
        }
        command::run(&mut cargo)
    })?;
    let folder = match options.profile.as_str() {
        "dev" => "debug",
        profile => profile,
    };
    let built = workspace.target().join(&target).join(folder);
    let packed = step("pack the image", || {
        let mut files = licences::files(workspace, &target, &packages())?;
        for (program, _, privilege) in PROGRAMS {
            let path = built.join(program);
            require_static(&path)?;
            let bytes = fs::read(&path).with_context(|| format!("read {}", path.display()))?;
            let path = format!("usr/bin/{program}");
            files.push(File::program(path, bytes, privilege));
        }
        let image = Image {
            name: name.clone(),
            version: tag.to_owned(),
            architecture: architecture()?,
            layer: layer::pack(files)?,
        };
        let packed = archive::pack(&image)?;
        if let Some(folder) = output.parent() {
            fs::create_dir_all(folder).with_context(|| format!("create {}", folder.display()))?;
        }
        fs::write(&output, &packed.bytes).with_context(|| format!("write {}", output.display()))?;
        Ok(packed)
    })?;
    println!("{name}");
    println!("  archive  {}", output.display());
    println!("  size     {:.1} MiB", mebibytes(packed.bytes.len()));
    println!("  digest   {}", packed.manifest);
    println!(
        "  load it  ctr -n k8s.io images import {}",
        output.display()
    );
    Ok(output)
}

/// Those whose code is in the image.
fn packages() -> Vec<&'static str> {
    let programs = PROGRAMS.iter().map(|(_, package, _)| *package);
    programs.chain([KERNEL_SIDE]).collect()
}

fn mebibytes(bytes: usize) -> f64 {
    // Exact up to 8 PiB.
    bytes as f64 / f64::from(1 << 20)
}

/// What the image specification calls this machine's processor (GOARCH).
fn architecture() -> anyhow::Result<&'static str> {
    match ARCH {
        "x86_64" => Ok("amd64"),
        "aarch64" => Ok("arm64"),
        other => bail!("Weir makes images for amd64 and arm64, and this machine is {other}"),
    }
}

/// Fails for a program that asks for a dynamic loader: the image has none that it may rely on.
fn require_static(program: &std::path::Path) -> anyhow::Result<()> {
    let headers = command::printed(Command::new("readelf").arg("-lW").arg(program))
        .with_context(|| format!("read the headers of {} with readelf", program.display()))?;
    if headers
        .lines()
        .any(|line| line.trim().starts_with("INTERP"))
    {
        bail!("{} is not linked statically", program.display());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::io::Read;

    use super::*;

    #[test]
    fn the_licences_of_all_that_is_in_the_image_are_in_it() {
        let workspace = Workspace::find().unwrap();
        let target = format!("{ARCH}-unknown-linux-gnu");
        let files = licences::files(&workspace, &target, &packages()).unwrap();
        let layer = layer::pack(files).unwrap();
        let mut texts = BTreeMap::new();
        for entry in tar::Archive::new(layer.as_slice()).entries().unwrap() {
            let mut entry = entry.unwrap();
            let path = entry.path().unwrap().display().to_string();
            let Some(name) = path.strip_prefix("usr/share/licenses/weir/") else {
                continue;
            };
            let (name, mode) = (name.to_owned(), entry.header().mode().unwrap());
            let mut text = String::new();
            entry.read_to_string(&mut text).unwrap();
            if !name.is_empty() {
                assert_eq!(mode, 0o644, "{name}");
                texts.insert(name, text);
            }
        }
        // A phrase that only the right text has.
        for (name, phrase) in [
            ("LICENSE", "Apache License"),
            ("MIT.txt", "Permission is hereby granted, free of charge"),
            ("GPL-2.0-only.txt", "GNU GENERAL PUBLIC LICENSE"),
            ("LLVM-exception.txt", "LLVM Exceptions"),
            ("musl.txt", "Rich Felker"),
            ("RUST-STANDARD-LIBRARY.html", "The Rust Standard Library"),
            // Of each program one crate that is its own, of the kernel's side another, and a notice.
            ("THIRD-PARTY.txt", "\nredb "),
            ("THIRD-PARTY.txt", "\nhickory-proto "),
            ("THIRD-PARTY.txt", "\nrscni-plugin "),
            ("THIRD-PARTY.txt", "\ncomfy-table "),
            ("THIRD-PARTY.txt", "\naya-ebpf "),
            ("THIRD-PARTY.txt", "Brian Smith"),
        ] {
            let text = texts.get(name).unwrap_or_else(|| panic!("no {name}"));
            assert!(text.contains(phrase), "{name} lacks {phrase:?}");
        }
        for absent in ["\nproptest ", "\nsyn "] {
            assert!(!texts["THIRD-PARTY.txt"].contains(absent), "{absent}");
        }
    }
}
