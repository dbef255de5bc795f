//! Everything a cluster runs that is not ours: found in the cache, or built. Minutes the first time on
//! a machine.

use std::path::{Path, PathBuf};

use anyhow::Result;

use super::images;
use crate::binaries::Binaries;
use crate::go::{CONTAINERD, COREDNS, KUBERNETES, RUNC, Recipe};
use crate::not_run::not_run;

/// Paths of the programs.
#[derive(Debug, Clone)]
pub struct Programs {
    pub plane: Binaries,
    pub kube_scheduler: PathBuf,
    pub kubelet: PathBuf,
    pub kube_proxy: PathBuf,
    pub containerd: PathBuf,
    pub containerd_shim: PathBuf,
    pub ctr: PathBuf,
    pub runc: PathBuf,
    pub coredns: PathBuf,
    pub ginkgo: PathBuf,
    pub e2e: PathBuf,
    /// The images that the test suite and the peers use, one archive.
    pub images: PathBuf,
}

impl Programs {
    /// As [`Self::ready`], for a test of this name, which is not run where there are none.
    #[must_use]
    pub fn for_test(test: &str) -> Option<Self> {
        match Self::ready() {
            Ok(programs) => Some(programs),
            Err(why) => {
                not_run(test, &format!("{why:#}"));
                None
            }
        }
    }

    /// # Errors
    /// Something is missing and cannot be built: no Go, no C compiler, no libseccomp (for runc),
    /// no mmdebstrap (for the images).
    pub fn ready() -> Result<Self> {
        let plane = Binaries::ready()?;
        let kubernetes = KUBERNETES.open()?;
        let kubelet = kubernetes.command("kubelet")?;
        let kube_scheduler = kubernetes.command("kube-scheduler")?;
        let kube_proxy = kubernetes.command("kube-proxy")?;
        let ginkgo = "github.com/onsi/ginkgo/v2/ginkgo";
        let ginkgo = kubernetes.program("ginkgo", ginkgo, Recipe::Program)?;
        let e2e = kubernetes.program("e2e.test", "k8s.io/kubernetes/test/e2e", Recipe::Test)?;

        let containerd = CONTAINERD.open()?;
        let runc = "github.com/opencontainers/runc";
        let runc = RUNC
            .open()?
            .program("runc", runc, Recipe::WithC("seccomp"))?;
        let coredns = "github.com/coredns/coredns";
        let coredns = COREDNS
            .open()?
            .program("coredns", coredns, Recipe::Program)?;
        let images = images::archive(&kubernetes, &e2e, &coredns)?;
        Ok(Self {
            containerd: containerd.command("containerd")?,
            containerd_shim: containerd.command("containerd-shim-runc-v2")?,
            ctr: containerd.command("ctr")?,
            plane,
            kube_scheduler,
            kubelet,
            kube_proxy,
            runc,
            coredns,
            ginkgo,
            e2e,
            images,
        })
    }

    /// The name of the image that can be nearly anything: a server, a client with a shell, or idle.
    ///
    /// # Errors
    /// The suite does not know it.
    pub fn agnhost(&self) -> Result<String> {
        images::agnhost(&self.e2e)
    }

    /// Where they look for each other.
    #[must_use]
    pub fn folders(&self) -> Vec<PathBuf> {
        [&self.containerd, &self.runc, &self.kubelet]
            .into_iter()
            .filter_map(|program| program.parent().map(Path::to_owned))
            .collect()
    }
}
