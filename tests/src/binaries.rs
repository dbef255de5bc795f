//! The programs of the control plane: found, or built from the Go module of `tests/gomod`.

use std::path::{Path, PathBuf};

use crate::cache::Cache;
use crate::debian;
use crate::go::KUBERNETES;
use crate::not_run::not_run;

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
    #[error(
        "Go cannot have {module}: it is older than 1.26, or has no way to its module proxy ({why})"
    )]
    NoModule { module: String, why: String },
    #[error("no etcd found: install Debian's etcd-server, or set KUBEBUILDER_ASSETS ({why:#})")]
    NoEtcd { why: anyhow::Error },
    #[error("cannot build the control plane: {0:#}")]
    Build(#[from] anyhow::Error),
}

impl Unavailable {
    /// Does this machine lack something? Otherwise it is there and does not do what it should.
    #[must_use]
    pub fn is_of_the_machine(&self) -> bool {
        !matches!(self, Self::Build(_))
    }
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
        let workshop = KUBERNETES.open()?;
        let program = |name: &str| match asset(name) {
            Some(path) => Ok(path),
            None => workshop.command(name),
        };
        Ok(Self {
            etcd,
            kube_apiserver: program("kube-apiserver")?,
            kube_controller_manager: program("kube-controller-manager")?,
            kubectl: program("kubectl")?,
        })
    }
}

/// [`Binaries::ready`] for a test of this name; reports it as not run on a machine that has no toolchain, or
/// no way to what it builds.
///
/// # Panics
/// They cannot be built though there is one.
#[must_use]
pub fn ready_or_not_run(test: &str) -> Option<Binaries> {
    match Binaries::ready() {
        Ok(binaries) => Some(binaries),
        Err(e) if e.is_of_the_machine() => {
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
