//! The pods of a node: a played container runtime, which calls `weir-cni` and starts an echo server per
//! pod. The node itself is `node.rs`.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use crate::netns::{self, Netns};
use crate::node::{CLUSTER_DNS, binary};
use crate::process::{Launch, Process};
use crate::workloads::{Transport, Workload};

/// A pod: a namespace that `weir-cni` filled, with an echo server in it.
#[derive(Debug)]
pub struct Pod {
    pub workload: Workload,
    pub addresses: Vec<IpAddr>,
    pub container_id: String,
    uid: String,
    echo: Option<Process>,
    cgroup: PathBuf,
    resolv_conf: PathBuf,
    netns: Netns,
}

/// What runs the pods of one node, from any thread.
#[derive(Clone, Debug)]
pub struct Runtime {
    pub(crate) node: String,
    /// The node's namespace, where the plugin runs.
    pub(crate) netns: PathBuf,
    pub(crate) cgroup: PathBuf,
    pub(crate) dir: PathBuf,
    pub(crate) objects: PodObjects,
}

/// Who writes the objects of pods.
#[derive(Clone, Debug)]
pub(crate) enum PodObjects {
    /// The runtime, into this folder.
    Here(PathBuf),
    /// An API server has them.
    Elsewhere,
}

/// An address family.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Family {
    V4,
    V6,
}

impl Runtime {
    /// Runs `weir-cni`, as a container runtime would: in the node's namespace, configuration on stdin.
    ///
    /// # Errors
    /// The program cannot be started. What it says and how it ends is in the output.
    pub fn cni(&self, verb: &str, env: &[(&str, &str)], config: &Value) -> Result<Output> {
        let mut command = netns::command_in(&self.netns, binary("weir-cni"));
        command
            .env("CNI_COMMAND", verb)
            .env("CNI_PATH", "/opt/cni/bin");
        command.envs(env.iter().copied());
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context("start weir-cni")?;
        let mut stdin = child.stdin.take().context("weir-cni has a stdin")?;
        // A plugin that refuses early may close its stdin before it has read all.
        if let Err(e) = stdin.write_all(config.to_string().as_bytes())
            && e.kind() != std::io::ErrorKind::BrokenPipe
        {
            return Err(e).context("write the configuration");
        }
        drop(stdin);
        child.wait_with_output().context("wait for weir-cni")
    }

    /// The network configuration that `weir-cni` gets on this node.
    #[must_use]
    pub fn cni_config(&self, version: &str) -> Value {
        json!({
            "cniVersion": version,
            "name": "weir",
            "type": "weir-cni",
            "agentSocket": self.dir.join("run/cni.sock"),
            "releasedDir": self.dir.join("state/released"),
        })
    }

    /// Runs a pod: its object first (from manifests), then `weir-cni ADD`, then its echo server.
    ///
    /// # Errors
    /// The plugin refused, or a port cannot be served.
    pub fn run_pod(&self, workload: Workload) -> Result<Pod> {
        let mut pod = self.declare_pod(workload)?;
        self.add_pod(&mut pod)?;
        self.start_echo(&mut pod)?;
        Ok(pod)
    }

    /// Makes a pod's namespace and its object, and gives it no network yet.
    ///
    /// # Errors
    /// The namespace cannot be made.
    pub fn declare_pod(&self, workload: Workload) -> Result<Pod> {
        let uid = format!(
            "uid-{}-{}",
            workload.namespace,
            crate::run::unique_name("pod")
        );
        self.declare_pod_as(workload, uid)
    }

    /// As [`Self::declare_pod`], for a pod that an API server has given its uid.
    ///
    /// # Errors
    /// The namespace cannot be made.
    pub fn declare_pod_as(&self, workload: Workload, uid: String) -> Result<Pod> {
        let netns = Netns::new(&workload.name)?;
        let container_id = netns.name().to_owned();
        let cgroup = self.cgroup.join(&container_id);
        fs::create_dir_all(&cgroup).with_context(|| format!("create {}", cgroup.display()))?;
        let resolv_conf = self.dir.join("pods").join(format!("{container_id}.resolv"));
        fs::write(
            &resolv_conf,
            format!(
                "search {}.svc.cluster.local svc.cluster.local cluster.local\n\
                 nameserver {CLUSTER_DNS}\noptions ndots:5\n",
                workload.namespace
            ),
        )?;
        if let Some(path) = self.object_of(&workload) {
            let manifest = workload.manifest(&uid, &self.node);
            write_whole(&path, &manifest.to_string())?;
        }
        Ok(Pod {
            workload,
            addresses: Vec::new(),
            container_id,
            uid,
            echo: None,
            cgroup,
            resolv_conf,
            netns,
        })
    }

    /// `weir-cni ADD` for a pod.
    ///
    /// # Errors
    /// The plugin refused; the error is what it said.
    pub fn add_pod(&self, pod: &mut Pod) -> Result<Value> {
        let config = self.cni_config("1.1.0");
        let env = pod.cni_env();
        let env: Vec<_> = env.iter().map(|(k, v)| (*k, v.as_str())).collect();
        let output = self.cni("ADD", &env, &config)?;
        let said = String::from_utf8_lossy(&output.stdout);
        if !output.status.success() {
            let noise = String::from_utf8_lossy(&output.stderr);
            bail!("weir-cni ADD for {}: {said} {noise}", pod.workload.id());
        }
        let result: Value = serde_json::from_str(&said).context("the result of ADD")?;
        pod.addresses = result["ips"]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(|ip| ip["address"].as_str()?.split('/').next()?.parse().ok())
            .collect();
        Ok(result)
    }

    /// Starts the echo server of a pod's ports.
    ///
    /// # Errors
    /// A port cannot be served.
    pub fn start_echo(&self, pod: &mut Pod) -> Result<()> {
        let log = self
            .dir
            .join("pods")
            .join(format!("{}.log", pod.container_id));
        let mut launch = Launch::new(&pod.workload.name, binary("weir-echo"))
            .in_netns(&pod.netns)
            .in_cgroup(&pod.cgroup)
            .log_to(&log)
            .args(["--name", &pod.workload.name]);
        for port in &pod.workload.ports {
            let option = match port.transport {
                Transport::Tcp => "--tcp",
                Transport::Udp => "--udp",
            };
            launch = launch.arg(option).arg(port.number.to_string());
        }
        let mut echo = launch.spawn()?;
        echo.wait_for_log("ready", Duration::from_secs(10))?;
        pod.echo = Some(echo);
        Ok(())
    }

    /// `weir-cni DEL` for a pod; then its object goes. Its processes end when it is dropped.
    ///
    /// # Errors
    /// The plugin failed, which it never should.
    pub fn delete_pod(&self, pod: &Pod) -> Result<()> {
        let env = pod.cni_env();
        let env: Vec<_> = env.iter().map(|(k, v)| (*k, v.as_str())).collect();
        let output = self.cni("DEL", &env, &self.cni_config("1.1.0"))?;
        if !output.status.success() {
            bail!("weir-cni DEL: {}", String::from_utf8_lossy(&output.stdout));
        }
        if let Some(path) = self.object_of(&pod.workload) {
            fs::remove_file(path).context("remove the pod's object")?;
        }
        Ok(())
    }

    fn object_of(&self, workload: &Workload) -> Option<PathBuf> {
        match &self.objects {
            PodObjects::Here(folder) => {
                Some(folder.join(format!("{}.{}.yaml", workload.namespace, workload.name)))
            }
            PodObjects::Elsewhere => None,
        }
    }
}

impl Pod {
    /// A command in the pod, with the pod's resolver: what `kubectl exec` would run.
    #[must_use]
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "--", "sh", "-c"]);
        // The mount namespace is the command's own; the machine's /etc stays as it is.
        command.arg(
            r#"echo $$ >"$0/cgroup.procs" && net=$1 resolv=$2 && shift 2 && exec nsenter --net="$net" \
               unshare --mount sh -c 'mount --bind "$0" /etc/resolv.conf && exec "$@"' "$resolv" "$@""#,
        );
        command
            .arg(&self.cgroup)
            .arg(self.netns.path())
            .arg(&self.resolv_conf)
            .arg(program);
        command
    }

    /// A long-running process in the pod.
    #[must_use]
    pub fn launch(&self, name: &str, program: impl AsRef<std::ffi::OsStr>) -> Launch {
        Launch::new(name, program)
            .in_netns(&self.netns)
            .in_cgroup(&self.cgroup)
    }

    /// The pod's namespace.
    #[must_use]
    pub fn netns(&self) -> &Netns {
        &self.netns
    }

    /// Its first address of this family.
    ///
    /// # Errors
    /// It has none.
    pub fn address(&self, family: Family) -> Result<IpAddr> {
        let wanted = |a: &&IpAddr| a.is_ipv4() == (family == Family::V4);
        let found = self.addresses.iter().find(wanted).copied();
        found.with_context(|| format!("{} has no {family:?} address", self.workload.id()))
    }

    /// What a runtime tells the plugin about it.
    #[must_use]
    pub fn cni_env(&self) -> BTreeMap<&'static str, String> {
        let Workload {
            namespace, name, ..
        } = &self.workload;
        BTreeMap::from([
            ("CNI_CONTAINERID", self.container_id.clone()),
            ("CNI_NETNS", self.netns.path().display().to_string()),
            ("CNI_IFNAME", "eth0".to_owned()),
            (
                "CNI_ARGS",
                format!(
                    "IgnoreUnknown=1;K8S_POD_NAMESPACE={namespace};K8S_POD_NAME={name};\
                     K8S_POD_UID={};K8S_POD_INFRA_CONTAINER_ID={}",
                    self.uid, self.container_id
                ),
            ),
        ])
    }
}

/// Writes beside and renames, so that a watcher never sees half a file.
pub(crate) fn write_whole(path: &Path, text: &str) -> Result<()> {
    let beside = path.with_extension("tmp");
    fs::write(&beside, text).with_context(|| format!("write {}", beside.display()))?;
    fs::rename(&beside, path).with_context(|| format!("rename to {}", path.display()))
}
