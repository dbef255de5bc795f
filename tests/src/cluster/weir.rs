//! Weir on a cluster, as its users install it and are rid of it: the image on every node, then `kubectl
//! apply`; the steps of `docs/install.md`, "Removing".

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use super::Cluster;
use super::node::{self, until};
use super::options::{Cni, Dns, Options, Proxy};
use super::place::{Node, api_server};
use crate::cgroup;
use crate::kubectl::Kubectl;
use crate::node::binary;

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

/// How long pods may take to go.
const REMOVAL: Duration = Duration::from_secs(120);
/// Weir's own, by their label.
const PODS: [&str; 4] = ["-n", "kube-system", "-l", "app.kubernetes.io/part-of=weir"];

impl Cluster {
    /// Installs Weir on a cluster that was started without. Returns how long it took from `kubectl apply`
    /// until every node was Ready.
    ///
    /// # Errors
    /// As at the start of a cluster with Weir.
    pub fn install_weir(&self) -> Result<Duration> {
        for node in Node::all(self.options.nodes) {
            node::import(&self.starter, &self.programs, node, &self.options.image)?;
        }
        install(&self.kubectl(), &self.options)
    }

    /// What `weir` says on a node, without the API server; `None` while no agent answers.
    #[must_use]
    pub fn weir(&self, node: &str, what: &str) -> Option<Value> {
        let mut weir = self.inside(node).ok()?;
        weir.arg(binary("weir")).args([what, "-o", "json"]);
        // It fails when the node is not ready, and says why.
        serde_json::from_slice(&weir.output().ok()?.stdout).ok()
    }

    /// How many backends a node knows of a Service, given as `namespace/name`.
    #[must_use]
    pub fn backends(&self, node: &str, service: &str) -> usize {
        let rows = self.weir(node, "services").unwrap_or_default();
        let mut rows = rows.as_array().into_iter().flatten();
        rows.find(|row| row["service"] == service)
            .and_then(|row| row["backends"].as_array())
            .map_or(0, Vec::len)
    }

    /// Takes Weir off the cluster with the manifest that installed it and `cleanup`, another. Returns what
    /// the cleanup of each node said.
    ///
    /// # Errors
    /// Something does not go, or a node is not cleaned, in two minutes each.
    pub fn remove_weir(&self, cleanup: &Path) -> Result<String> {
        let kubectl = self.kubectl();
        let gone = || {
            let pods = kubectl.run(&[&["get", "pods", "-o", "name"], &PODS[..]].concat())?;
            match pods.trim() {
                "" => Ok(()),
                some => bail!("there are {some}"),
            }
        };
        let delete = ["delete", "--wait", "-f", "-"];
        kubectl.run_with_input(&delete, &read(&self.options.manifest)?)?;
        until("the pods of Weir are gone", REMOVAL, gone)?;
        kubectl.apply(&read(cleanup)?)?;
        let cleaned = [
            "rollout",
            "status",
            "daemonset/weir-cleanup",
            "--timeout=120s",
        ];
        if let Err(why) = kubectl.run(&[&cleaned[..], &PODS[..2]].concat()) {
            let pods = kubectl.run(&[&["describe", "pods"], &PODS[..]].concat());
            bail!("{why:#}\n{}", pods.unwrap_or_else(|e| format!("{e:#}")));
        }
        let logs = ["logs", "-c", "cleanup", "--prefix", "--tail=-1"];
        let said = kubectl.run(&[&logs[..], &PODS[..]].concat())?;
        kubectl.run_with_input(&delete, &read(cleanup)?)?;
        until("the pods of the cleanup are gone", REMOVAL, gone)?;
        Ok(said)
    }
}

/// A manifest, fitted to this machine.
fn read(manifest: &Path) -> Result<String> {
    let text =
        fs::read_to_string(manifest).with_context(|| format!("read {}", manifest.display()))?;
    let cgroup = cgroup::mount_point()?;
    Ok(fitted(&text, &api_server().ip().to_string(), &cgroup))
}

/// Applies the manifest and waits until every node is Ready. Returns how long that took.
///
/// # Errors
/// The API server refuses it, or the nodes are not Ready in two minutes; the error shows the pods.
pub(super) fn install(kubectl: &Kubectl, options: &Options) -> Result<Duration> {
    let manifest = read(&options.manifest)?;
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
