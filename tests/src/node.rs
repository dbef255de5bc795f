//! A node: a machine with its agent and its DNS, real processes of the real binaries. Its pods are
//! `pod.rs`.

use std::cell::Cell;
use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::Value;
use weir_dns::hand_over::FOLDER_NAME;

use crate::machine::Machine;
use crate::pod::{PodObjects, write_whole};
use crate::process::{Launch, Process};
use crate::workloads::Workload;

pub use crate::pod::{Family, Pod, Runtime};

/// The address of the DNS Service in every test cluster.
pub const CLUSTER_DNS: &str = "10.96.0.10";
/// What every cluster has before anything is installed in it: the Service of its DNS.
pub const CLUSTER: &str = r#"{
  "apiVersion": "v1",
  "kind": "Service",
  "metadata": {"name": "kube-dns", "namespace": "kube-system", "labels": {"k8s-app": "kube-dns"}},
  "spec": {
    "clusterIP": "10.96.0.10",
    "ports": [
      {"name": "dns", "port": 53, "protocol": "UDP"},
      {"name": "dns-tcp", "port": 53, "protocol": "TCP"}
    ]
  }
}"#;
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
        // The strictest that distributions set.
        netns.set_sysctl("net.ipv4.conf.all.rp_filter", "1")?;
        let node = Self {
            options,
            agent: None,
            dns: None,
            machine,
        };
        if matches!(node.options.source, Source::Manifests) {
            node.write_manifest("cluster.yaml", CLUSTER)?;
        }
        Ok(node)
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
        self.dns = Some(self.dns_launch("dns")?.spawn()?);
        Ok(())
    }

    /// A weir-dns to be, for tests that run several. Its name is its log's, and its status socket's.
    ///
    /// # Errors
    /// The machine's folder cannot be written.
    pub fn dns_launch(&self, name: &str) -> Result<Launch> {
        let dir = self.machine.dir();
        let mut launch = self
            .machine
            .launch(name, binary("weir-dns"))
            .args([
                "--listen",
                "169.254.53.53:53",
                "--listen",
                "[fd57:6569:7200::53]:53",
            ])
            .arg("--feed")
            .arg(dir.join("zone/zone.sock"))
            .arg("--hand-over")
            .arg(dir.join("zone").join(FOLDER_NAME))
            .arg("--status-socket")
            .arg(self.dns_status(name));
        for upstream in &self.options.upstreams {
            launch = launch.args(["--upstream", &upstream.to_string()]);
        }
        if self.options.upstreams.is_empty() {
            let empty = dir.join("no-upstream.conf");
            fs::write(&empty, "")?;
            launch = launch.arg("--resolv-conf").arg(empty);
        }
        Ok(launch)
    }

    /// Where a weir-dns of that name says whether it is ready.
    #[must_use]
    pub fn dns_status(&self, name: &str) -> PathBuf {
        self.machine.dir().join(format!("{name}.status"))
    }

    /// Puts a weir-dns in the place of the one that was started last, and gives that one back.
    pub fn replace_dns(&mut self, next: Process) -> Option<Process> {
        self.dns.replace(next)
    }

    /// Waits until the agent says that it is ready.
    ///
    /// # Errors
    /// It ended, or took too long; the error shows why and the end of its log.
    pub fn wait_ready(&mut self) -> Result<()> {
        let answer = Cell::new(String::new());
        let machine = &self.machine;
        let agent = self.agent.as_mut().context("no agent was started")?;
        agent
            .wait_until("ready", PATIENCE, || {
                let (code, said) = readyz(machine);
                answer.set(said);
                code == "200"
            })
            .with_context(|| format!("/readyz said {:?}", answer.take()))
    }

    /// What /readyz says, each reason on its line; "ok" from a node that is ready. Empty if nobody
    /// answers.
    #[must_use]
    pub fn readyz(&self) -> String {
        readyz(&self.machine).1
    }

    /// The conditions with this fault, a line each (`about: text`); empty if none holds or nobody answers.
    #[must_use]
    pub fn conditions(&self, fault: &str) -> String {
        let status = self.ask("status").unwrap_or_default();
        let all = status["conditions"].as_array().into_iter().flatten();
        let lines = all.filter(|it| it["fault"] == fault).map(|it| {
            let word = |name: &str| it[name].as_str().unwrap_or_default().to_owned();
            format!("{}: {}", word("about"), word("text"))
        });
        lines.collect::<Vec<_>>().join("\n")
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

    /// What runs this node's pods. Any thread may have it; it must not outlive the node.
    #[must_use]
    pub fn runtime(&self) -> Runtime {
        Runtime {
            node: self.options.name.clone(),
            netns: self.machine.netns().path(),
            cgroup: self.machine.cgroup().path().to_owned(),
            dir: self.machine.dir().to_owned(),
            objects: match self.options.source {
                Source::Manifests => PodObjects::Here(self.manifests().join("pods")),
                Source::Kube { .. } => PodObjects::Elsewhere,
            },
        }
    }

    /// [`Runtime::cni`].
    ///
    /// # Errors
    /// As there.
    pub fn cni(&self, verb: &str, env: &[(&str, &str)], config: &Value) -> Result<Output> {
        self.runtime().cni(verb, env, config)
    }

    /// [`Runtime::cni_config`].
    #[must_use]
    pub fn cni_config(&self, version: &str) -> Value {
        self.runtime().cni_config(version)
    }

    /// [`Runtime::run_pod`].
    ///
    /// # Errors
    /// As there.
    pub fn run_pod(&self, workload: Workload) -> Result<Pod> {
        self.runtime().run_pod(workload)
    }

    /// [`Runtime::declare_pod`].
    ///
    /// # Errors
    /// As there.
    pub fn declare_pod(&self, workload: Workload) -> Result<Pod> {
        self.runtime().declare_pod(workload)
    }

    /// [`Runtime::declare_pod_as`].
    ///
    /// # Errors
    /// As there.
    pub fn declare_pod_as(&self, workload: Workload, uid: String) -> Result<Pod> {
        self.runtime().declare_pod_as(workload, uid)
    }

    /// [`Runtime::add_pod`].
    ///
    /// # Errors
    /// As there.
    pub fn add_pod(&self, pod: &mut Pod) -> Result<Value> {
        self.runtime().add_pod(pod)
    }

    /// [`Runtime::start_echo`].
    ///
    /// # Errors
    /// As there.
    pub fn start_echo(&self, pod: &mut Pod) -> Result<()> {
        self.runtime().start_echo(pod)
    }

    /// [`Runtime::delete_pod`], and the pod's processes end.
    ///
    /// # Errors
    /// As there.
    pub fn delete_pod(&self, pod: Pod) -> Result<()> {
        self.runtime().delete_pod(&pod)
    }
}

/// The status code of /readyz, and its page.
fn readyz(machine: &Machine) -> (String, String) {
    let url = format!("http://{HTTP}/readyz");
    let mut curl = machine.netns().command("curl");
    match curl.args(["-s", "-w", "%{http_code}", &url]).output() {
        Ok(output) => {
            let said = String::from_utf8_lossy(&output.stdout).into_owned();
            let (page, code) = said.split_at(said.len().saturating_sub(3));
            (code.to_owned(), page.trim().to_owned())
        }
        Err(e) => (String::new(), e.to_string()),
    }
}
