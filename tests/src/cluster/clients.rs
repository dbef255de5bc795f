//! Load from pods of a cluster: `weir-load` and `weir-download` in containers that kubelet started, counted by themselves.
//! What load a test wants is in the test.

use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::json;

use super::node::until;
use super::{Cluster, images};
use crate::downloads::Held;
use crate::kubectl::Kubectl;
use crate::load::Tally;
use crate::node::binary;

/// How long a pod may take to start.
const START: Duration = Duration::from_secs(60);

/// A pod that makes load, and is deleted on drop.
#[derive(Debug)]
pub struct Client {
    kubectl: Kubectl,
    namespace: String,
    name: String,
}

impl Client {
    /// Starts `weir-load` with these words in a pod of the node, and returns when it runs.
    ///
    /// # Errors
    /// The API server refuses the pod, or it does not start.
    pub fn start(
        cluster: &Cluster,
        namespace: &str,
        name: &str,
        node: &str,
        words: &str,
    ) -> Result<Self> {
        Self::run_program(cluster, namespace, name, node, "weir-load", words)
    }

    /// Likewise `weir-download fetch`; returns when each download has its first bytes.
    ///
    /// # Errors
    /// As [`Self::start`], or some do not begin.
    pub fn download(
        cluster: &Cluster,
        namespace: &str,
        name: &str,
        node: &str,
        count: u64,
        words: &str,
    ) -> Result<Self> {
        let words = format!("fetch --count {count} {words}");
        let client = Self::run_program(cluster, namespace, name, node, "weir-download", &words)?;
        let begun = format!("{{\"begun\":{count}}}");
        until(&format!("the downloads of {name} begin"), START, || {
            let said = client.run(&["logs", name])?;
            match said.lines().any(|line| line == begun) {
                true => Ok(()),
                false => bail!("it said {said:?}"),
            }
        })?;
        Ok(client)
    }

    fn run_program(
        cluster: &Cluster,
        namespace: &str,
        name: &str,
        node: &str,
        program: &str,
        words: &str,
    ) -> Result<Self> {
        let image = images::agnhost(&cluster.programs.e2e)?;
        let path = binary(program).canonicalize()?;
        let folder = path.parent().context("a program is in a folder")?;
        let command: Vec<String> = std::iter::once(format!("/weir/{program}"))
            .chain(words.split_whitespace().map(str::to_owned))
            .collect();
        let pod = json!({
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": { "name": name, "namespace": namespace, "labels": { "app": name } },
            "spec": {
                "nodeName": node,
                "restartPolicy": "Never",
                "terminationGracePeriodSeconds": 0,
                "containers": [{
                    "name": "load",
                    "image": image,
                    "command": command,
                    "volumeMounts": [{ "name": "weir", "mountPath": "/weir" }],
                }],
                "volumes": [{ "name": "weir", "hostPath": { "path": folder } }],
            },
        });
        let kubectl = cluster.kubectl();
        // A namespace that is new has no account for pods yet.
        until("the client is taken", START, || {
            kubectl.apply(&pod.to_string())
        })?;
        let client = Self {
            kubectl,
            namespace: namespace.to_owned(),
            name: name.to_owned(),
        };
        until(&format!("{name} runs"), START, || {
            match client.phase()?.as_str() {
                "Pending" => bail!("it is still pending"),
                _ => Ok(()),
            }
        })?;
        Ok(client)
    }

    /// Waits for the end of one that [`Self::start`] started, at most so long, and reads what it counted.
    ///
    /// # Errors
    /// It failed itself or goes on; that attempts failed is no error.
    pub fn finish(self, within: Duration) -> Result<Tally> {
        let said = self.said(within)?;
        serde_json::from_str(&said).with_context(|| format!("weir-load said {said:?}"))
    }

    /// Likewise one of [`Self::download`].
    ///
    /// # Errors
    /// As [`Self::finish`].
    pub fn held(self, within: Duration) -> Result<Held> {
        Held::read(&self.said(within)?)
    }

    fn said(&self, within: Duration) -> Result<String> {
        let end = || match self.phase()?.as_str() {
            "Succeeded" => Ok(()),
            phase => bail!("its phase is {phase}"),
        };
        let log = || self.run(&["logs", &self.name]);
        if let Err(why) = until(&format!("the end of {}", self.name), within, end) {
            bail!("{why:#}: {}", log().unwrap_or_else(|e| format!("{e:#}")));
        }
        log()
    }

    fn phase(&self) -> Result<String> {
        self.run(&["get", "pod", &self.name, "-o", "jsonpath={.status.phase}"])
    }

    fn run(&self, args: &[&str]) -> Result<String> {
        let args: Vec<&str> = ["-n", &self.namespace]
            .into_iter()
            .chain(args.to_vec())
            .collect();
        self.kubectl.run(&args)
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        let gone = self.run(&[
            "delete",
            "pod",
            &self.name,
            "--wait=false",
            "--ignore-not-found",
        ]);
        if let Err(why) = gone {
            eprintln!("delete pod {}: {why:#}", self.name);
        }
    }
}
