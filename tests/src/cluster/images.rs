//! The images that Kubernetes' test suite asks for, and CoreDNS's: stand-ins made of Debian packages
//! and of our own builds, for no registry can be reached. The names are what the suite says.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use super::network_policy_api;
use super::oci::{Archive, Files, Running};
use crate::binaries::find;
use crate::cache::{Cache, run_slowly};
use crate::go::{KUBERNETES, Recipe, Workshop};
use crate::node::binary;

/// CoreDNS as the peer runs it.
pub(super) const COREDNS: &str = "weir.test/coredns:peer";
/// What every pod's sandbox runs.
pub(super) const PAUSE: &str = "weir.test/pause:cluster";

/// What specs start in their pods.
const PACKAGES: &str = "bash,curl,wget,bind9-dnsutils,iproute2,netcat-openbsd,iperf,iputils-ping,\
                        util-linux,procps,conntrack,nftables,iptables,tcpdump";

/// The archive with all of them, made if it is not there yet.
///
/// # Errors
/// No mmdebstrap, gcc, busybox or Go, or no space.
pub(super) fn archive(kubernetes: &Workshop, e2e: &Path, coredns: &Path) -> Result<PathBuf> {
    let cache = Cache::open("images")?;
    let path = cache.dir.join(format!("{}.tar", kubernetes.version()));
    if path.exists() {
        return Ok(path);
    }
    let rootfs = rootfs(&cache.dir)?;
    let of_kubernetes = |name: &str, package: &str| {
        let package = format!("k8s.io/kubernetes/test/images/{package}");
        kubernetes.program(name, &package, Recipe::Program)
    };
    let agnhost = of_kubernetes("agnhost", "agnhost")?;
    let issue = "regression-issue-74839";
    let regression = of_kubernetes(issue, issue)?;
    let names = Names::of(e2e)?;
    let source = KUBERNETES.source()?;
    let pause = pause(&cache.dir, &source)?;
    let busybox = find("busybox", &["/usr/bin", "/bin"]).context("no busybox (busybox-static)")?;

    let part = path.with_added_extension("part");
    let mut archive = Archive::create(&part)?;
    let debian = archive.layer_from(&rootfs)?;

    let mut files = Files::new();
    files.copy(&agnhost, "agnhost", 0o755)?;
    files.link("agnhost-2", "agnhost")?;
    files.copy(coredns, "coredns", 0o755)?;
    for file in ["localhost.crt", "localhost.key"] {
        let from = source.join("test/images/agnhost/porter").join(file);
        files.copy(&from, file, 0o644)?;
    }
    files.link("usr/local/bin/iperf", "/usr/bin/iperf")?;
    files.folder("uploads", 0o777)?;
    let top = archive.layer(files)?;
    let running = Running {
        entrypoint: &["/agnhost"],
        command: &["pause"],
        ..Running::default()
    };
    archive.image(&names.named("agnhost")?, &[&debian, &top], &running)?;

    // One spec runs conntrack in the second, another looks names up in the first.
    let mut tools = names.named("glibc-dns-testing")?;
    tools.extend(names.named("distroless-iptables")?);
    let running = Running {
        command: &["/bin/sleep", "infinity"],
        ..Running::default()
    };
    archive.image(&tools, &[&debian], &running)?;

    let mut pauses = names.named("pause")?;
    pauses.push(PAUSE);
    for (names, program, file, user) in [
        (pauses, &pause, "pause", "65535:65535"),
        (vec![COREDNS], &coredns.to_owned(), "coredns", ""),
        (names.named(issue)?, &regression, issue, ""),
    ] {
        let mut files = minimal()?;
        files.copy(program, file, 0o755)?;
        let layer = archive.layer(files)?;
        let entrypoint = format!("/{file}");
        archive.image(&names, &[&layer], &starting(&[&entrypoint], user))?;
    }

    let layer = archive.layer(shell(&busybox)?)?;
    let command = Running {
        command: &["sh"],
        ..Running::default()
    };
    archive.image(&names.named("busybox")?, &[&layer], &command)?;
    // Specs want something that answers HTTP, not nginx.
    let entrypoint = ["/bin/httpd", "-f", "-p", "80", "-h", "/tmp"];
    archive.image(
        &names.named("nginx")?,
        &[&layer],
        &starting(&entrypoint, ""),
    )?;
    archive.finish()?;
    fs::rename(&part, &path).with_context(|| format!("create {}", path.display()))?;
    Ok(path)
}

/// The name of the image that can be nearly anything: a server, a client with a shell, or idle.
///
/// # Errors
/// The suite does not know it.
pub(super) fn agnhost(e2e: &Path) -> Result<String> {
    let names = Names::of(e2e)?;
    let named = names.named("agnhost")?;
    let first = named.first().context("an image without a name")?;
    Ok((*first).to_owned())
}

/// Writes an archive of one image: `weir-agnhost`, under these names.
///
/// # Errors
/// As [`archive`], or the program is not built.
pub(super) fn agnhost_with_sctp(names: &[&str], path: &Path) -> Result<()> {
    let rootfs = rootfs(&Cache::open("images")?.dir)?;
    let package = "k8s.io/kubernetes/test/images/agnhost";
    let agnhost = KUBERNETES.open()?;
    let agnhost = agnhost.program("agnhost", package, Recipe::Program)?;
    let mut files = Files::new();
    let place = network_policy_api::AGNHOST.trim_start_matches('/');
    files.copy(&agnhost, place, 0o755)?;
    files.copy(&binary("weir-agnhost"), "agnhost", 0o755)?;
    let mut archive = Archive::create(path)?;
    let debian = archive.layer_from(&rootfs)?;
    let top = archive.layer(files)?;
    let running = Running {
        entrypoint: &["/agnhost"],
        command: &["pause"],
        ..Running::default()
    };
    archive.image(names, &[&debian, &top], &running)?;
    archive.finish()
}

fn starting<'a>(entrypoint: &'a [&'a str], user: &'a str) -> Running<'a> {
    Running {
        entrypoint,
        user,
        ..Running::default()
    }
}

/// The names that the suite knows.
struct Names(Vec<String>);

impl Names {
    fn of(e2e: &Path) -> Result<Self> {
        let output = Command::new(e2e).arg("--list-images").output();
        let output = output.with_context(|| format!("run {}", e2e.display()))?;
        let text = String::from_utf8_lossy(&output.stdout);
        let names: Vec<String> = text
            .lines()
            .map(str::trim)
            .filter(|l| l.contains('/') && l.contains(':'))
            .map(str::to_owned)
            .collect();
        if names.is_empty() {
            bail!("{} --list-images lists none", e2e.display());
        }
        Ok(Self(names))
    }

    /// All versions of one image: some specs ask for older ones.
    fn named(&self, image: &str) -> Result<Vec<&str>> {
        let is_it = |name: &&str| {
            let last = name.rsplit('/').next();
            last.and_then(|l| l.split(':').next()) == Some(image)
        };
        let found: Vec<&str> = self.0.iter().map(String::as_str).filter(is_it).collect();
        if found.is_empty() {
            bail!("the suite knows no image {image}");
        }
        Ok(found)
    }
}

/// A small Debian (or Ubuntu) of this machine's own release.
fn rootfs(dir: &Path) -> Result<PathBuf> {
    let path = dir.join("rootfs.tar");
    if path.exists() {
        return Ok(path);
    }
    let release = fs::read_to_string("/etc/os-release").context("read /etc/os-release")?;
    let value = |key: &str| {
        let line = release.lines().find_map(|l| l.strip_prefix(key));
        line.map(|v| v.trim_matches('"').to_owned())
    };
    let codename = value("VERSION_CODENAME=").context("a release without a code name")?;
    // Not in place yet, but with the ending that says what it is.
    let part = dir.join("rootfs.part.tar");
    let mut make = Command::new("mmdebstrap");
    make.args(["--variant=minbase", &format!("--include={PACKAGES}")]);
    if value("ID=").as_deref() == Some("ubuntu") {
        make.arg("--components=main,universe");
    }
    for folder in ["doc", "man", "locale"] {
        make.arg(format!("--dpkgopt=path-exclude=/usr/share/{folder}/*"));
    }
    make.arg(codename).arg(&part).current_dir("/");
    run_slowly("make the root file system of test images", &mut make)
        .context("install the package mmdebstrap if there is none")?;
    fs::rename(&part, &path)?;
    Ok(path)
}

/// Kubernetes' own, static: one file of C.
fn pause(dir: &Path, kubernetes: &Path) -> Result<PathBuf> {
    let path = dir.join("pause");
    if !path.exists() {
        let part = dir.join("pause.part");
        let mut gcc = Command::new("gcc");
        gcc.args(["-Os", "-static", "-s", "-DVERSION=weir", "-o"])
            .arg(&part);
        gcc.arg(kubernetes.join("build/pause/linux/pause.c"));
        run_slowly("build pause", &mut gcc)?;
        fs::rename(&part, &path)?;
    }
    Ok(path)
}

/// What a program without a distribution still looks for.
fn minimal() -> Result<Files> {
    let mut files = Files::new();
    for (folder, mode) in [("bin", 0o755), ("etc", 0o755), ("tmp", 0o1777)] {
        files.folder(folder, mode)?;
    }
    let users = b"root:x:0:0::/:/bin/sh\nnobody:x:65534:65534::/:/bin/false\n";
    files.file("etc/passwd", 0o644, users)?;
    files.file("etc/group", 0o644, b"root:x:0:\nnogroup:x:65534:\n")?;
    Ok(files)
}

fn shell(busybox: &Path) -> Result<Files> {
    let mut files = minimal()?;
    files.copy(busybox, "bin/busybox", 0o755)?;
    let output = Command::new(busybox).arg("--list").output()?;
    for applet in String::from_utf8_lossy(&output.stdout).lines() {
        if applet != "busybox" {
            files.link(&format!("bin/{applet}"), "busybox")?;
        }
    }
    Ok(files)
}
