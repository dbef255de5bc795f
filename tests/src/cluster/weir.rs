//! Weir on a cluster, as its users install it: the image on every node, then `kubectl apply`.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::options::{Cni, Dns, Options, Proxy};
use super::place::api_server;
use crate::cgroup;
use crate::kubectl::Kubectl;

/// Says early what would fail late.
///
/// # Errors
/// There is no image or no manifest, or Weir is asked for a part only.
pub(super) fn check(options: &Options) -> Result<()> {
    let all = (Cni::Weir, Proxy::Weir, Dns::Weir);
    if (options.cni, options.proxy, options.dns) != all {
        bail!("the manifest installs Weir whole: ask for it as CNI, proxy and DNS, or as none");
    }
    for (path, how) in [
        (
            &options.image,
            "make it with `cargo xtask image`, or say --image",
        ),
        (&options.manifest, "say --manifest"),
    ] {
        if !path.is_file() {
            bail!("there is no {}: {how}", path.display());
        }
    }
    Ok(())
}

/// Applies the manifest and waits until every node is Ready. Returns how long that took.
///
/// # Errors
/// The API server refuses it, or the nodes are not Ready in two minutes; the error shows the pods.
pub(super) fn install(kubectl: &Kubectl, options: &Options) -> Result<Duration> {
    let manifest = fs::read_to_string(&options.manifest)
        .with_context(|| format!("read {}", options.manifest.display()))?;
    let cgroup = cgroup::mount_point()?;
    let manifest = fitted(&manifest, &api_server().ip().to_string(), &cgroup);
    let begin = Instant::now();
    kubectl.apply(&manifest)?;
    let ready = [
        "wait",
        "--for=condition=Ready",
        "node",
        "--all",
        "--timeout=120s",
    ];
    if let Err(why) = kubectl.run(&ready) {
        let pods = kubectl.run(&["-n", "kube-system", "describe", "pods"]);
        bail!("{why:#}\n{}", pods.unwrap_or_else(|e| format!("{e:#}")));
    }
    Ok(begin.elapsed())
}

/// What `docs/install.md` has a user change: how nodes reach the API server, and where cgroup2 is on
/// a host that also has version 1.
fn fitted(manifest: &str, api_server: &str, cgroup: &Path) -> String {
    let root = "path: /sys/fs/cgroup\n";
    manifest
        .replace("API_SERVER_HOST", api_server)
        .replace(root, &format!("path: {}\n", cgroup.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_manifest_is_fitted_to_the_cluster() {
        let manifest =
            "https://API_SERVER_HOST:6443\n  path: /sys/fs/cgroup\n  path: /sys/fs/bpf\n";
        let fitted = fitted(manifest, "10.0.0.1", Path::new("/sys/fs/cgroup/unified"));
        let expected =
            "https://10.0.0.1:6443\n  path: /sys/fs/cgroup/unified\n  path: /sys/fs/bpf\n";
        assert_eq!(fitted, expected);
    }
}
