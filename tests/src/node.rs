//! A node: a machine with its agent, its DNS and its pods, all as real processes of the real binaries. A
//! played kubelet calls `weir-cni` and starts an echo server per pod.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use crate::machine::Machine;
use crate::netns::Netns;
use crate::process::{Launch, Process};
use crate::workloads::{Transport, Workload};

/// The address of the DNS Service in every test cluster.
pub const CLUSTER_DNS: &str = "10.96.0.10";
/// Where the agent serves HTTP inside of its node's namespace.
const HTTP: &str = "127.0.0.1:9660";
/// How long an agent may take to become ready.
const PATIENCE: Duration = Duration::from_secs(20);

/// Where the objects of a node come from.
#[derive(Clone, Debug)]
pub enum Source {
    /// The folder [`Node::manifests`], which the played kubelet adds its pods to.
    Manifests,
    /// A real API server, reachable from the node's namespace.
    Kube {
        kubeconfig: PathBuf,
        api_server: String,
    },
}

/// How a node is to be.
#[derive(Clone, Debug)]
pub struct NodeOptions {
    pub name: String,
    pub pod_cidrs: Vec<String>,
    pub service_cidrs: Vec<String>,
    pub source: Source,
    /// Resolvers that weir-dns forwards to; none means that other names fail.
    pub upstreams: Vec<SocketAddr>,
    /// More arguments of the agent.
    pub agent_args: Vec<String>,
    /// The agent's program, when it is not the one that was built for this run.
    pub agent: PathBuf,
}

impl NodeOptions {
    /// Dual stack, from manifests.
    #[must_use]
    pub fn named(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            pod_cidrs: vec!["10.244.1.0/24".into(), "fd00:10:244:1::/64".into()],
            service_cidrs: vec!["10.96.0.0/16".into(), "fd00:10:96::/112".into()],
            source: Source::Manifests,
            upstreams: Vec::new(),
            agent_args: Vec::new(),
            agent: binary("weir-agent"),
        }
    }
}

/// A running node. Everything of it goes on drop.
#[derive(Debug)]
pub struct Node {
    pub options: NodeOptions,
    // Processes and pods are dropped before the machine that they are on.
    agent: Option<Process>,
    dns: Option<Process>,
    machine: Machine,
}

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

/// A program built with this test, in `WEIR_BIN_DIR` or beside the test's own folder.
#[must_use]
pub fn binary(name: &str) -> PathBuf {
    let folder = std::env::var_os("WEIR_BIN_DIR").map_or_else(
        || {
            let here = std::env::current_exe().unwrap_or_default();
            let folder = here.parent().unwrap_or(Path::new("."));
            // Tests lie in `deps`, programs one above.
            if folder.ends_with("deps") {
                folder.join("..")
            } else {
                folder.to_owned()
            }
        },
        PathBuf::from,
    );
    folder.join(name)
}

impl Node {
    /// Makes the machine and starts agent and DNS on it; returns when the agent says that it is ready.
    ///
    /// # Errors
    /// Not root, a binary is missing, or the agent does not become ready.
    pub fn start(options: NodeOptions) -> Result<Self> {
        let mut node = Self::prepare(options)?;
        node.start_agent()?;
        node.start_dns()?;
        node.wait_ready()?;
        Ok(node)
    }

    /// Makes the machine and starts nothing.
    ///
    /// # Errors
    /// Not root, or no bpffs or cgroup2 to be had.
    pub fn prepare(options: NodeOptions) -> Result<Self> {
        let machine = Machine::new(&options.name)?;
        for folder in [
            "manifests",
            "manifests/pods",
            "run",
            "state",
            "pods",
            "zone",
        ] {
            fs::create_dir_all(machine.dir().join(folder))?;
        }
        // The route lookup for a service address comes before any hook of ours: a node without a
        // default route could not even try.
        let netns = machine.netns();
        netns.ip("addr add 192.0.2.1/32 dev lo")?;
        netns.ip("-6 addr add 2001:db8::1/128 dev lo nodad")?;
        netns.ip("route add default dev lo src 192.0.2.1")?;
        netns.ip("-6 route add default dev lo src 2001:db8::1")?;
        Ok(Self {
            options,
            agent: None,
            dns: None,
            machine,
        })
    }

    /// Starts the agent, without waiting for it.
    ///
    /// # Errors
    /// The program is missing.
    pub fn start_agent(&mut self) -> Result<()> {
        self.agent = Some(self.agent_launch().spawn()?);
        Ok(())
    }

    /// The agent's process to be, for tests that expect it to fail.
    #[must_use]
    pub fn agent_launch(&self) -> Launch {
        let dir = self.machine.dir();
        let mut launch = self
            .machine
            .launch("agent", &self.options.agent)
            .arg("run")
            .args(["--node-name", &self.options.name, "--http", HTTP])
            .arg("--bpffs")
            .arg(self.machine.bpffs().path().join("weir"))
            .arg("--cgroup")
            .arg(self.machine.cgroup().path())
            .arg("--run-dir")
            .arg(dir.join("run"))
            .arg("--state-dir")
            .arg(dir.join("state"))
            .arg("--zone-socket")
            .arg(dir.join("zone/zone.sock"));
        for cidr in &self.options.pod_cidrs {
            launch = launch.args(["--pod-cidr", cidr]);
        }
        launch = match &self.options.source {
            Source::Manifests => {
                for cidr in &self.options.service_cidrs {
                    launch = launch.args(["--service-cidr", cidr]);
                }
                launch.arg("--manifests").arg(self.manifests())
            }
            Source::Kube {
                kubeconfig,
                api_server,
            } => launch
                .arg("--kubeconfig")
                .arg(kubeconfig)
                .args(["--kube-api-server", api_server]),
        };
        launch.args(&self.options.agent_args)
    }

    /// Starts weir-dns, without waiting for it.
    ///
    /// # Errors
    /// The program is missing.
    pub fn start_dns(&mut self) -> Result<()> {
        let mut launch = self
            .machine
            .launch("dns", binary("weir-dns"))
            .args([
                "--listen",
                "169.254.53.53:53",
                "--listen",
                "[fd57:6569:7200::53]:53",
            ])
            .arg("--feed")
            .arg(self.machine.dir().join("zone/zone.sock"));
        for upstream in &self.options.upstreams {
            launch = launch.args(["--upstream", &upstream.to_string()]);
        }
        if self.options.upstreams.is_empty() {
            let empty = self.machine.dir().join("no-upstream.conf");
            fs::write(&empty, "")?;
            launch = launch.arg("--resolv-conf").arg(empty);
        }
        self.dns = Some(launch.spawn()?);
        Ok(())
    }

    /// Waits until the agent says that it is ready.
    ///
    /// # Errors
    /// It ended, or took too long; the error shows why and the end of its log.
    pub fn wait_ready(&mut self) -> Result<()> {
        let answer = Cell::new(String::new());
        let netns = &self.machine.netns();
        let agent = self.agent.as_mut().context("no agent was started")?;
        agent
            .wait_until("ready", PATIENCE, || {
                let asked = netns
                    .command("curl")
                    .args(["-s", "-w", "%{http_code}", &format!("http://{HTTP}/readyz")])
                    .output();
                let said = asked.map(|o| String::from_utf8_lossy(&o.stdout).into_owned());
                let said = said.unwrap_or_else(|e| e.to_string());
                let ready = said.ends_with("200");
                answer.set(said);
                ready
            })
            .with_context(|| format!("/readyz said {:?}", answer.take()))
    }

    /// The agent's process.
    ///
    /// # Errors
    /// None was started.
    pub fn agent(&mut self) -> Result<&mut Process> {
        self.agent.as_mut().context("no agent was started")
    }

    /// The process of weir-dns.
    ///
    /// # Errors
    /// None was started.
    pub fn dns(&mut self) -> Result<&mut Process> {
        self.dns.as_mut().context("no DNS was started")
    }

    /// Kills the agent with SIGKILL and waits until it is gone.
    ///
    /// # Errors
    /// None was started.
    pub fn kill_agent(&mut self) -> Result<()> {
        self.agent()?.kill()?;
        self.agent = None;
        Ok(())
    }

    /// What the node is made of.
    #[must_use]
    pub fn machine(&self) -> &Machine {
        &self.machine
    }

    /// The folder that the manifests source watches.
    #[must_use]
    pub fn manifests(&self) -> PathBuf {
        self.machine.dir().join("manifests")
    }

    /// Writes a file of manifests, in one step.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn write_manifest(&self, file: &str, text: &str) -> Result<()> {
        write_whole(&self.manifests().join(file), text)
    }

    /// The `weir` command on this node, with these words.
    #[must_use]
    pub fn weir(&self, words: &str) -> Command {
        let mut command = self.machine.netns().command(binary("weir"));
        command
            .arg("--socket")
            .arg(self.machine.dir().join("run/admin.sock"))
            .args(words.split_whitespace());
        command
    }

    /// The answer of a `weir` command as JSON.
    ///
    /// # Errors
    /// The agent does not answer.
    pub fn ask(&self, what: &str) -> Result<Value> {
        let output = self.weir(&format!("{what} -o json")).output()?;
        serde_json::from_slice(&output.stdout).with_context(|| {
            format!(
                "weir {what}: {}",
                String::from_utf8_lossy(&output.stderr).trim()
            )
        })
    }

    /// Waits until a service has this many backends on one of its frontends.
    ///
    /// # Errors
    /// It took longer.
    pub fn wait_for_service(&self, service: &str, backends: usize, within: Duration) -> Result<()> {
        self.wait_for(
            &format!("{service} has {backends} backends"),
            within,
            "services",
            |rows| {
                rows.iter().any(|row| {
                    row["service"] == service
                        && row["backends"]
                            .as_array()
                            .is_some_and(|b| b.len() == backends)
                })
            },
        )
    }

    /// Waits until the agent knows a pod, by `namespace/name`.
    ///
    /// # Errors
    /// It took longer.
    pub fn wait_for_pod(&self, pod: &str, within: Duration) -> Result<()> {
        self.wait_for(&format!("{pod} is known"), within, "endpoints", |rows| {
            rows.iter().any(|row| row["pod"] == pod)
        })
    }

    /// Asks `weir` until the rows that it lists are as wanted.
    ///
    /// # Errors
    /// They were not within that time; the error shows the last answer.
    pub fn wait_for(
        &self,
        what: &str,
        within: Duration,
        ask: &str,
        is_so: impl Fn(&[Value]) -> bool,
    ) -> Result<()> {
        let deadline = Instant::now() + within;
        loop {
            let answer = self.ask(ask);
            if let Ok(Value::Array(rows)) = &answer
                && is_so(rows)
            {
                return Ok(());
            }
            if Instant::now() >= deadline {
                bail!("not within {within:?}: {what}; weir {ask} said {answer:?}");
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// The page of Prometheus metrics.
    ///
    /// # Errors
    /// The agent does not answer.
    pub fn metrics(&self) -> Result<String> {
        let page = self
            .machine
            .netns()
            .command("curl")
            .args(["-sf", &format!("http://{HTTP}/metrics")])
            .output()?;
        if !page.status.success() {
            bail!("/metrics: curl ended with {}", page.status);
        }
        Ok(String::from_utf8(page.stdout)?)
    }

    /// Runs `weir-cni`, as a container runtime would: in the node's namespace, configuration on stdin.
    ///
    /// # Errors
    /// The program cannot be started. What it says and how it ends is in the output.
    pub fn cni(&self, verb: &str, env: &[(&str, &str)], config: &Value) -> Result<Output> {
        let mut command = self.machine.netns().command(binary("weir-cni"));
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
            "agentSocket": self.machine.dir().join("run/cni.sock"),
            "releasedDir": self.machine.dir().join("state/released"),
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
        let cgroup = self.machine.cgroup().child(&container_id)?;
        let resolv_conf = self
            .machine
            .dir()
            .join("pods")
            .join(format!("{container_id}.resolv"));
        fs::write(
            &resolv_conf,
            format!(
                "search {}.svc.cluster.local svc.cluster.local cluster.local\n\
                 nameserver {CLUSTER_DNS}\noptions ndots:5\n",
                workload.namespace
            ),
        )?;
        if matches!(self.options.source, Source::Manifests) {
            let manifest = workload.manifest(&uid, &self.options.name);
            write_whole(&self.pod_manifest(&workload), &manifest.to_string())?;
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
            .machine
            .dir()
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

    /// `weir-cni DEL` for a pod; its processes end and its object goes.
    ///
    /// # Errors
    /// The plugin failed, which it never should.
    pub fn delete_pod(&self, pod: Pod) -> Result<()> {
        let env = pod.cni_env();
        let env: Vec<_> = env.iter().map(|(k, v)| (*k, v.as_str())).collect();
        let output = self.cni("DEL", &env, &self.cni_config("1.1.0"))?;
        if !output.status.success() {
            bail!("weir-cni DEL: {}", String::from_utf8_lossy(&output.stdout));
        }
        if matches!(self.options.source, Source::Manifests) {
            fs::remove_file(self.pod_manifest(&pod.workload)).context("remove the pod's object")?;
        }
        Ok(())
    }

    fn pod_manifest(&self, workload: &Workload) -> PathBuf {
        let file = format!("{}.{}.yaml", workload.namespace, workload.name);
        self.manifests().join("pods").join(file)
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

/// An address family.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Family {
    V4,
    V6,
}

/// Writes beside and renames, so that a watcher never sees half a file.
fn write_whole(path: &Path, text: &str) -> Result<()> {
    let beside = path.with_extension("tmp");
    fs::write(&beside, text).with_context(|| format!("write {}", beside.display()))?;
    fs::rename(&beside, path).with_context(|| format!("rename to {}", path.display()))
}
