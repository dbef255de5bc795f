//! Load from pods of a cluster: `weir-load` in containers that kubelet started, counted by itself. What load a
//! test wants is in the test.

use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::json;

use super::node::until;
use super::{Cluster, images};
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
        let image = images::agnhost(&cluster.programs.e2e)?;
        let program = binary("weir-load").canonicalize()?;
        let folder = program.parent().context("weir-load is in no folder")?;
        let command: Vec<String> = std::iter::once("/weir/weir-load".to_owned())
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

    /// Waits for its end, at most so long, and reads what it counted.
    ///
    /// # Errors
    /// It failed itself or goes on; that attempts failed is no error.
    pub fn finish(self, within: Duration) -> Result<Tally> {
        let end = || match self.phase()?.as_str() {
            "Succeeded" => Ok(()),
            phase => bail!("its phase is {phase}"),
        };
        let log = || self.run(&["logs", &self.name]);
        if let Err(why) = until(&format!("the end of {}", self.name), within, end) {
            bail!("{why:#}: {}", log().unwrap_or_else(|e| format!("{e:#}")));
        }
        let said = log()?;
        serde_json::from_str(&said).with_context(|| format!("weir-load said {said:?}"))
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
