//! The programs of the control plane: found, or built from the Go module of `tests/gomod`.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::cache::{Cache, run_slowly};
use crate::debian;
use crate::not_run::not_run;

const GO_MOD: &str = include_str!("../gomod/go.mod");
const GO_MODULE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/gomod");

/// Paths of the programs.
#[derive(Debug, Clone)]
pub struct Binaries {
    pub etcd: PathBuf,
    pub kube_apiserver: PathBuf,
    pub kube_controller_manager: PathBuf,
    pub kubectl: PathBuf,
}

/// Why a control plane cannot run here.
#[derive(Debug, thiserror::Error)]
pub enum Unavailable {
    #[error(
        "no Go toolchain found to build {program} with: install Go 1.26, or set KUBEBUILDER_ASSETS \
         to a directory that has it"
    )]
    NoGo { program: String },
    #[error("no etcd found: install Debian's etcd-server, or set KUBEBUILDER_ASSETS ({why:#})")]
    NoEtcd { why: anyhow::Error },
    #[error("cannot build the control plane: {0:#}")]
    Build(#[from] anyhow::Error),
}

impl Binaries {
    /// Finds each program in `KUBEBUILDER_ASSETS`, then in the cache; etcd also in `PATH`. Builds
    /// what is missing, which takes minutes the first time on a machine; etcd is Debian's.
    ///
    /// # Errors
    /// Something is missing and cannot be built.
    pub fn ready() -> Result<Self, Unavailable> {
        // First what needs no building, so that its absence shows at once.
        let etcd = match asset("etcd").or_else(|| find("etcd", &["/usr/bin"])) {
            Some(path) => path,
            None => debian_etcd().map_err(|why| Unavailable::NoEtcd { why })?,
        };
        let version = version()?;
        let cache = Cache::open(&format!("control-plane-{version}"))?;
        let program = |name: &str| match asset(name) {
            Some(path) => Ok(path),
            None => built(name, version, &cache),
        };
        Ok(Self {
            etcd,
            kube_apiserver: program("kube-apiserver")?,
            kube_controller_manager: program("kube-controller-manager")?,
            kubectl: program("kubectl")?,
        })
    }
}

/// [`Binaries::ready`] for a test of this name; reports it as not run on a machine that has no toolchain.
///
/// # Panics
/// They cannot be built though there is one.
#[must_use]
pub fn ready_or_not_run(test: &str) -> Option<Binaries> {
    match Binaries::ready() {
        Ok(binaries) => Some(binaries),
        Err(e @ (Unavailable::NoGo { .. } | Unavailable::NoEtcd { .. })) => {
            not_run(test, &e);
            None
        }
        Err(e) => panic!("{e}"),
    }
}

/// Unpacked rather than installed: the package would start a service.
fn debian_etcd() -> anyhow::Result<PathBuf> {
    let cache = Cache::open("etcd")?;
    let path = cache.dir.join("etcd");
    if !path.exists() {
        let package = debian::unpack("etcd-server")?;
        debian::keep(&package.path().join("usr/bin/etcd"), &path)?;
    }
    Ok(path)
}

fn built(name: &str, version: &str, cache: &Cache) -> Result<PathBuf, Unavailable> {
    let path = cache.dir.join(name);
    if path.exists() {
        return Ok(path);
    }
    let go = find("go", &["/usr/local/go/bin"]).ok_or_else(|| Unavailable::NoGo {
        program: name.to_owned(),
    })?;
    let part = cache.dir.join(format!("{name}.part"));
    let mut build = Command::new(go);
    build
        .current_dir(GO_MODULE)
        .env("CGO_ENABLED", "0")
        .env("GOFLAGS", "");
    build.args([
        "build",
        "-mod=readonly",
        "-trimpath",
        "-buildvcs=false",
        "-ldflags",
    ]);
    build.arg(linker_flags(version)).arg("-o").arg(&part);
    build.arg(format!("k8s.io/kubernetes/cmd/{name}"));
    run_slowly(&format!("build {name} {version}"), &mut build)?;
    fs::rename(&part, &path).map_err(anyhow::Error::from)?;
    Ok(path)
}

/// Without a version the API server calls itself v0.0.0 and refuses its own feature gates.
fn linker_flags(version: &str) -> String {
    let package = "k8s.io/component-base/version";
    let minor = version.split('.').nth(1).unwrap_or("0");
    format!(
        "-s -w -X {package}.gitVersion={version} -X {package}.gitMajor=1 -X {package}.gitMinor={minor}"
    )
}

/// The version of Kubernetes that `go.mod` requires: `v1.36.x`.
fn version() -> Result<&'static str, Unavailable> {
    let line = GO_MOD
        .lines()
        .find_map(|l| l.trim().strip_prefix("require k8s.io/kubernetes "));
    Ok(line.ok_or_else(|| anyhow::anyhow!("tests/gomod/go.mod requires no k8s.io/kubernetes"))?)
}

fn asset(name: &str) -> Option<PathBuf> {
    let path = Path::new(&std::env::var_os("KUBEBUILDER_ASSETS")?).join(name);
    path.is_file().then_some(path)
}

/// In `PATH`, then in `more`.
pub(crate) fn find(name: &str, more: &[&str]) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let dirs = std::env::split_paths(&path).chain(more.iter().map(PathBuf::from));
    dirs.map(|dir| dir.join(name)).find(|p| p.is_file())
}
