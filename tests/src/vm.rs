//! A virtual machine with one of Debian's kernels and a few programs of ours, without a disk and
//! without KVM: boots, runs a script, ends.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use tempfile::TempDir;

use crate::binaries::find;
use crate::cache::Cache;
use crate::debian;
use crate::process::Launch;

/// The console shows this when the script ended with success.
const DONE: &str = "WEIR-VM-OK";

/// A series of kernels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Series {
    /// The oldest on which a node has to work: Ubuntu 22.04's.
    V5_15,
    /// Debian 12's for clouds, and the one that comes with its security updates.
    V6_1,
    V6_12,
}

/// Where [`Series::V5_15`] is, and what of it, by SHA-256: one build, since there is no package here that knows the newest.
const UBUNTU: &str = "http://archive.ubuntu.com/ubuntu jammy-updates main";
const UBUNTU_PACKAGES: [(&str, &str); 2] = [
    (
        "linux-image-5.15.0-204-generic",
        "f64db5a37befdde1ca0bef10a5826614482ee903c3163e57ed776d97a5919c75",
    ),
    (
        "linux-modules-5.15.0-204-generic",
        "e205a3933a1f6551dc04e3975b46df119fe12a0ba4b5ea37bdcd30862ad69a98",
    ),
];

/// A kernel to boot.
#[derive(Debug, Clone)]
pub struct Kernel {
    pub series: Series,
    image: PathBuf,
    /// Where its modules are, by their names, unpacked.
    modules: PathBuf,
}

/// Why there can be no virtual machine here.
#[derive(Debug, thiserror::Error)]
pub enum NoVm {
    #[error("no {program} found: install {package}")]
    NoProgram {
        program: &'static str,
        package: &'static str,
    },
    #[error("no kernel {series}: {why:#}")]
    NoKernel {
        series: &'static str,
        why: anyhow::Error,
    },
}

/// What is in the machine besides busybox and `/proc`, `/sys`, `/dev`, a bpffs at `/sys/fs/bpf` and
/// a cgroup2 at `/sys/fs/cgroup`.
#[derive(Debug, Default)]
pub struct Contents {
    programs: Vec<PathBuf>,
    files: Vec<(String, Vec<u8>)>,
    modules: Vec<&'static str>,
}

impl Series {
    pub const ALL: [Self; 3] = [Self::V5_15, Self::V6_1, Self::V6_12];

    /// As `uname -r` begins.
    #[must_use]
    pub fn version(self) -> &'static str {
        match self {
            Self::V5_15 => "5.15",
            Self::V6_1 => "6.1",
            Self::V6_12 => "6.12",
        }
    }

    /// A folder with its files.
    fn download(self) -> Result<TempDir> {
        let newest_of = |package| {
            let prefix = format!("linux-image-{}.", self.version());
            debian::unpack(&debian::dependency(package, &prefix)?)
        };
        match self {
            Self::V5_15 => debian::unpack_from(UBUNTU, &UBUNTU_PACKAGES),
            Self::V6_1 => newest_of("linux-image-cloud-amd64"),
            Self::V6_12 => newest_of("linux-image-6.12-cloud-amd64"),
        }
    }
}

impl Kernel {
    /// Takes the kernel from the cache, or downloads it with apt, which installs nothing.
    ///
    /// # Errors
    /// apt knows no such kernel.
    pub fn ready(series: Series) -> Result<Self, NoVm> {
        let version = series.version();
        downloaded(series)
            .map(|(image, modules)| Self {
                series,
                image,
                modules,
            })
            .map_err(|why| NoVm::NoKernel {
                series: version,
                why,
            })
    }

    /// Boots, runs `script` with busybox's shell and returns what the console showed.
    ///
    /// # Errors
    /// No qemu or busybox, a command of the script failed, or it was not done in time; the error
    /// shows the console.
    pub fn run(&self, contents: &Contents, script: &str, within: Duration) -> Result<String> {
        let qemu = program("qemu-system-x86_64", "qemu-system-x86")?;
        let scratch = debian::scratch_dir("vm")?;
        let initramfs = scratch.path().join("initramfs");
        let root = scratch.path().join("root");
        let mut inserts = String::new();
        for module in self.with_dependencies(&contents.modules)? {
            let name = format!("{module}.ko");
            install(&self.modules.join(&name), &root.join("modules").join(&name))?;
            inserts.push_str(&format!("insmod /modules/{name}\n"));
        }
        contents.pack(&format!("{inserts}{script}"), &root, &initramfs)?;
        let console = scratch.path().join("console");
        let mut machine = Launch::new("qemu", qemu)
            .args(["-accel", "tcg", "-cpu", "max", "-m", "1024", "-smp", "1"])
            .args([
                "-nodefaults",
                "-display",
                "none",
                "-serial",
                "stdio",
                "-no-reboot",
            ])
            .arg("-kernel")
            .arg(&self.image)
            .arg("-initrd")
            .arg(&initramfs)
            // A panic ends the machine: it reboots at once, and qemu does not.
            .args(["-append", "console=ttyS0 quiet panic=-1 mitigations=off"])
            .log_to(&console)
            .spawn()?;
        machine.wait(within)?;
        let shown = machine.log();
        if !shown.lines().any(|line| line.trim_end() == DONE) {
            bail!(
                "Linux {}: the script failed\n{shown}",
                self.series.version()
            );
        }
        Ok(shown)
    }
}

impl Kernel {
    /// Modules in an order in which they can be inserted. What the kernel has built in is left out.
    fn with_dependencies(&self, wanted: &[&str]) -> Result<Vec<String>> {
        let mut order = Vec::new();
        let mut open: Vec<String> = wanted.iter().rev().map(|it| (*it).to_owned()).collect();
        while let Some(module) = open.pop() {
            let path = self.modules.join(format!("{module}.ko"));
            if order.contains(&module) || !path.exists() {
                continue;
            }
            let bytes = fs::read(&path).with_context(|| format!("read {}", path.display()))?;
            let missing: Vec<String> = depends(&bytes)
                .into_iter()
                .filter(|it| !order.contains(it))
                .filter(|it| self.modules.join(format!("{it}.ko")).exists())
                .collect();
            if missing.is_empty() {
                order.push(module);
            } else {
                open.push(module);
                open.extend(missing);
            }
        }
        Ok(order)
    }
}

/// The modules that a module says it needs.
fn depends(module: &[u8]) -> Vec<String> {
    const KEY: &[u8] = b"\0depends=";
    let Some(at) = module.windows(KEY.len()).position(|it| it == KEY) else {
        return Vec::new();
    };
    let rest = &module[at + KEY.len()..];
    let end = rest.iter().position(|byte| *byte == 0).unwrap_or(0);
    let names = String::from_utf8_lossy(&rest[..end]);
    let names = names.split(',').filter(|name| !name.is_empty());
    names.map(|name| name.replace('-', "_")).collect()
}

impl Contents {
    /// Modules that are inserted before the script runs, with those that they need.
    #[must_use]
    pub fn modules(mut self, names: &[&'static str]) -> Self {
        self.modules.extend(names);
        self
    }

    /// A program from the host, at `/bin/<its name>`, with the libraries that it needs.
    #[must_use]
    pub fn program(mut self, path: &Path) -> Self {
        self.programs.push(path.to_owned());
        self
    }

    /// A file at an absolute path.
    #[must_use]
    pub fn file(mut self, path: &str, bytes: impl Into<Vec<u8>>) -> Self {
        self.files.push((path.to_owned(), bytes.into()));
        self
    }

    /// Whether this machine has what it takes to run any.
    ///
    /// # Errors
    /// It has not.
    pub fn check_tools() -> Result<(), NoVm> {
        program("qemu-system-x86_64", "qemu-system-x86")?;
        program("busybox", "busybox-static").map(drop)
    }

    fn pack(&self, script: &str, root: &Path, initramfs: &Path) -> Result<()> {
        let busybox = program("busybox", "busybox-static")?;
        for dir in ["bin", "proc", "sys", "dev", "tmp"] {
            fs::create_dir_all(root.join(dir))?;
        }
        install(&busybox, &root.join("bin/busybox"))?;
        for applet in [
            "sh", "mount", "reboot", "cat", "echo", "ls", "uname", "grep", "dmesg", "mkdir",
            "insmod", "ip", "sleep", "wget", "nslookup", "unshare", "nsenter", "tail", "seq",
            "touch", "readlink", "cut", "test", "[",
        ] {
            symlink("busybox", root.join("bin").join(applet))?;
        }
        // Debian has it static and, in another package, not.
        let mut libraries = BTreeSet::from_iter(libraries_of(&busybox)?);
        for program in &self.programs {
            let name = program.file_name().context("a program has a name")?;
            install_stripped(program, &root.join("bin").join(name))?;
            libraries.extend(libraries_of(program)?);
        }
        for library in libraries {
            install(&library, &root.join(library.strip_prefix("/")?))?;
        }
        for (path, bytes) in &self.files {
            let path = root.join(path.trim_start_matches('/'));
            fs::create_dir_all(path.parent().context("a file is in a directory")?)?;
            fs::write(path, bytes)?;
        }
        fs::write(
            root.join("script"),
            format!("set -e\n{script}\necho {DONE}\n"),
        )?;
        let init = root.join("init");
        fs::write(&init, INIT)?;
        fs::set_permissions(&init, fs::Permissions::from_mode(0o755))?;
        let archive = Command::new("sh")
            .args(["-c", r#"find . | "$0" cpio -o -H newc 2>/dev/null"#])
            .arg(busybox)
            .current_dir(root)
            .stdout(fs::File::create(initramfs)?)
            .stderr(Stdio::inherit())
            .status()?;
        if !archive.success() {
            bail!("pack the initramfs: {archive}");
        }
        Ok(())
    }
}

const INIT: &str = "#!/bin/sh
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mount -t bpf bpf /sys/fs/bpf
mount -t cgroup2 cgroup /sys/fs/cgroup
export PATH=/bin
sh /script
reboot -f
";

fn program(program: &'static str, package: &'static str) -> Result<PathBuf, NoVm> {
    find(program, &["/usr/bin", "/bin"]).ok_or(NoVm::NoProgram { program, package })
}

fn install(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to.parent().context("a file is in a directory")?)?;
    fs::copy(from, to).with_context(|| format!("copy {}", from.display()))?;
    Ok(())
}

/// Without what only a debugger reads, which is most of a program that is built to be tested; as it is where there is
/// no `strip`.
fn install_stripped(from: &Path, to: &Path) -> Result<()> {
    let stripped = Command::new("strip").arg("-o").arg(to).arg(from).status();
    match stripped {
        Ok(status) if status.success() => Ok(()),
        _ => install(from, to),
    }
}

/// The shared libraries of a program and its loader, by absolute path; none if it is static.
fn libraries_of(program: &Path) -> Result<Vec<PathBuf>> {
    let output = Command::new("ldd")
        .arg(program)
        .output()
        .context("run ldd")?;
    let said = String::from_utf8_lossy(&output.stdout);
    let words = said
        .lines()
        .filter_map(|l| l.split_whitespace().find(|w| w.starts_with('/')));
    Ok(words.map(PathBuf::from).collect())
}

/// Its image, and the folder of its modules.
fn downloaded(series: Series) -> Result<(PathBuf, PathBuf)> {
    let cache = Cache::open(&format!("kernel-{}-with-modules", series.version()))?;
    let (image, modules) = (cache.dir.join("vmlinuz"), cache.dir.join("modules"));
    // The image is the last that is put there.
    if image.exists() {
        return Ok((image, modules));
    }
    let package = series.download()?;
    fs::create_dir_all(&modules)?;
    keep_modules(&package.path().join("lib/modules"), &modules)?;
    let found = fs::read_dir(package.path().join("boot"))?
        .filter_map(Result::ok)
        .find(|e| e.file_name().to_string_lossy().starts_with("vmlinuz"));
    debian::keep(&found.context("no kernel in the package")?.path(), &image)?;
    Ok((image, modules))
}

/// Every module below a folder, uncompressed, by its name alone.
fn keep_modules(from: &Path, to: &Path) -> Result<()> {
    for entry in fs::read_dir(from).with_context(|| format!("list {}", from.display()))? {
        let entry = entry?;
        let path = entry.path();
        if entry.file_type()?.is_dir() {
            keep_modules(&path, to)?;
            continue;
        }
        let name = entry.file_name().to_string_lossy().replace('-', "_");
        if let Some(name) = name.strip_suffix(".xz") {
            let unpacked = fs::File::create(to.join(name))?;
            let status = Command::new("xz")
                .arg("-dc")
                .arg(&path)
                .stdout(unpacked)
                .status();
            let status = status.context("run xz")?;
            if !status.success() {
                bail!("unpack {}: {status}", path.display());
            }
        } else if name.ends_with(".ko") {
            fs::copy(&path, to.join(name))?;
        }
    }
    Ok(())
}
