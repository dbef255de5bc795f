//! The Debian packages that builds and tests use: how to tell that one is missing without asking
//! dpkg (so that other distributions can be checked too), and how to get it without ever starting
//! a service.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, bail};

use crate::command::{run_quietly, step};
use crate::workspace::{Workspace, require_root};

/// A package and what shows that it is there.
pub(crate) struct Package {
    name: String,
    proof: Proof,
    way: Way,
}

enum Proof {
    Program(&'static str),
    File(PathBuf),
}

/// How the package comes onto the machine.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    /// `apt-get install`.
    Install,
    /// Unpacked into `target/tools`: installing it would start a service now or at the next boot.
    Unpack,
}

pub(crate) fn for_tests() -> Vec<Package> {
    let installed = [
        ("build-essential", "g++"),
        ("iproute2", "ip"),
        ("nftables", "nft"),
        ("bind9-dnsutils", "dig"),
        ("curl", "curl"),
        ("ethtool", "ethtool"),
        ("bpftool", "bpftool"),
        ("qemu-system-x86", "qemu-system-x86_64"),
        ("busybox-static", "busybox"),
        ("cpio", "cpio"),
        ("libcap2-bin", "setcap"),
    ];
    let unpacked = [("etcd-server", "etcd"), ("prometheus", "promtool")];
    let program = |way| move |(name, program)| Package::new(name, Proof::Program(program), way);
    installed
        .map(program(Way::Install))
        .into_iter()
        .chain(unpacked.map(program(Way::Unpack)))
        // What `bench` measures the CNI plugin against.
        .chain([Package::file(
            "containernetworking-plugins".to_owned(),
            PathBuf::from("/usr/lib/cni/bridge"),
        )])
        .collect()
}

/// What compiling bpf-linker takes.
pub(crate) fn for_linker(llvm: u32) -> Vec<Package> {
    let prefix = PathBuf::from(format!("/usr/lib/llvm-{llvm}"));
    vec![
        Package::file(format!("llvm-{llvm}-dev"), prefix.join("bin/llvm-config")),
        Package::file(
            format!("libpolly-{llvm}-dev"),
            prefix.join("lib/libPolly.a"),
        ),
        Package::file(
            "libzstd-dev".to_owned(),
            PathBuf::from("/usr/include/zstd.h"),
        ),
    ]
}

/// What compiling and packing an image takes.
pub(crate) fn for_image() -> Vec<Package> {
    [("musl-tools", "musl-gcc"), ("binutils", "readelf")]
        .map(|(name, program)| Package::new(name, Proof::Program(program), Way::Install))
        .into()
}

/// What building and running a cluster of real nodes takes: a C library for runc, a root file system
/// for test images, what kube-proxy in iptables mode runs.
pub(crate) fn for_cluster() -> Vec<Package> {
    [
        ("mmdebstrap", "mmdebstrap"),
        ("iptables", "iptables"),
        ("pkg-config", "pkg-config"),
    ]
    .map(|(name, program)| Package::new(name, Proof::Program(program), Way::Install))
    .into_iter()
    .chain([Package::file(
        "libseccomp-dev".to_owned(),
        PathBuf::from("/usr/include/seccomp.h"),
    )])
    .collect()
}

pub(crate) fn missing(workspace: &Workspace, needed: Vec<Package>) -> Vec<Package> {
    needed
        .into_iter()
        .filter(|package| !package.is_present(workspace))
        .collect()
}

pub(crate) fn install(workspace: &Workspace, missing: &[Package]) -> anyhow::Result<()> {
    let names = |way| {
        missing
            .iter()
            .filter(|p| p.way == way)
            .map(|p| p.name.as_str())
            .collect::<Vec<_>>()
    };
    if !Path::new("/etc/debian_version").exists() || workspace.which("apt-get").is_none() {
        bail!("{}", by_hand(missing));
    }
    require_root(&format!("packages are missing: {}", by_name(missing)))?;

    step("apt-get update", || run_quietly(apt().arg("update")))?;
    let install = names(Way::Install);
    if !install.is_empty() {
        step(&format!("apt-get install {}", install.join(" ")), || {
            let _no_services = NoServices::begin()?;
            run_quietly(
                apt()
                    .args(["install", "-y", "--no-install-recommends"])
                    .args(&install),
            )
            .context(
                "a package that apt does not know has to come from elsewhere; \
                     LLVM is at https://apt.llvm.org",
            )
        })?;
    }
    for name in names(Way::Unpack) {
        step(&format!("unpack {name} into target/tools"), || {
            unpack(workspace, name)
        })?;
    }
    let still: Vec<_> = missing
        .iter()
        .filter(|p| !p.is_present(workspace))
        .collect();
    if !still.is_empty() {
        bail!(
            "apt succeeded, yet these are still not there: {}",
            by_name(still)
        );
    }
    Ok(())
}

impl Package {
    fn new(name: &str, proof: Proof, way: Way) -> Self {
        Self {
            name: name.to_owned(),
            proof,
            way,
        }
    }

    fn file(name: String, file: PathBuf) -> Self {
        Self {
            name,
            proof: Proof::File(file),
            way: Way::Install,
        }
    }

    fn is_present(&self, workspace: &Workspace) -> bool {
        match &self.proof {
            Proof::Program(program) => workspace.which(program).is_some(),
            Proof::File(file) => file.exists(),
        }
    }
}

fn by_name<'a>(packages: impl IntoIterator<Item = &'a Package>) -> String {
    packages
        .into_iter()
        .map(|p| p.name.as_str())
        .collect::<Vec<_>>()
        .join(" ")
}

fn by_hand(missing: &[Package]) -> String {
    let mut text = String::from(
        "this is neither Debian nor Ubuntu, so install these by hand and run this again \
         (do not let them start services):\n",
    );
    for package in missing {
        let proof = match &package.proof {
            Proof::Program(program) => format!("the program `{program}`"),
            Proof::File(file) => format!("the file {}", file.display()),
        };
        text.push_str(&format!("  {proof:<50} (Debian: {})\n", package.name));
    }
    text
}

fn apt() -> Command {
    let mut command = Command::new("apt-get");
    command.env("DEBIAN_FRONTEND", "noninteractive");
    command
}

fn unpack(workspace: &Workspace, name: &str) -> anyhow::Result<()> {
    let tools = workspace.tools();
    let download = tools.join("download").join(name);
    fs::create_dir_all(&download).with_context(|| format!("create {}", download.display()))?;
    // As root apt would rather fetch as `_apt`, who may not write here; it says so and goes on.
    run_quietly(apt().args(["download", name]).current_dir(&download))?;
    for entry in fs::read_dir(&download)? {
        run_quietly(
            Command::new("dpkg-deb")
                .arg("-x")
                .arg(entry?.path())
                .arg(&tools),
        )?;
    }
    fs::remove_dir_all(&download).with_context(|| format!("remove {}", download.display()))
}

/// While this lives, no package that is being installed may start a service: Debian's
/// `invoke-rc.d` asks `policy-rc.d` first, and 101 means "no".
struct NoServices {
    ours: Option<PathBuf>,
}

impl NoServices {
    fn begin() -> anyhow::Result<Self> {
        use std::os::unix::fs::PermissionsExt;
        let path = PathBuf::from("/usr/sbin/policy-rc.d");
        if path.exists() {
            // Somebody's own policy: containers and build machines have one that says no.
            return Ok(Self { ours: None });
        }
        fs::write(
            &path,
            "#!/bin/sh\n# Made by `cargo xtask setup`, for its own time.\nexit 101\n",
        )
        .with_context(|| format!("write {}", path.display()))?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
        Ok(Self { ours: Some(path) })
    }
}

impl Drop for NoServices {
    fn drop(&mut self) {
        if let Some(path) = &self.ours
            && let Err(error) = fs::remove_file(path)
        {
            eprintln!("remove {} by hand: {error}", path.display());
        }
    }
}
