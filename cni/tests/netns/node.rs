//! A node in a network namespace of its own, with the agent's CNI server in this process and the real
//! plugin run as a process in that namespace. Everything goes when it is dropped.

use std::fs::File;
use std::io::{self, BufRead, BufReader, ErrorKind, Write};
use std::net::{IpAddr, TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use nix::sched::{CloneFlags, setns};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::runtime::Runtime;
use weir_agent::pods::{self, Leases, Places, Pods, Ranges, Settings};
use weir_cni::wire::{Reply, Request};

use crate::fake::Fake;

/// Nothing we wait for takes longer.
const PATIENCE: Duration = Duration::from_secs(10);

static NEXT: AtomicU32 = AtomicU32::new(0);

/// A network namespace, deleted when dropped.
pub(crate) struct Netns {
    pub(crate) name: String,
}

impl Netns {
    pub(crate) fn new(what: &str) -> Self {
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("weir-{}-{number}-{what}", std::process::id());
        ip(&["netns", "add", &name]);
        Self { name }
    }

    pub(crate) fn path(&self) -> PathBuf {
        Path::new("/run/netns").join(&self.name)
    }

    /// Runs `command` inside and returns its standard output if it succeeds.
    pub(crate) fn try_run(&self, command: &[&str]) -> Option<String> {
        let output = Command::new("ip")
            .args(["netns", "exec", &self.name])
            .args(command)
            .output()
            .unwrap();
        output
            .status
            .success()
            .then(|| String::from_utf8_lossy(&output.stdout).into_owned())
    }

    pub(crate) fn run(&self, command: &[&str]) -> String {
        self.try_run(command)
            .unwrap_or_else(|| panic!("{command:?} failed in {}", self.name))
    }

    pub(crate) fn has_link(&self, name: &str) -> bool {
        self.try_run(&["ip", "link", "show", "dev", name]).is_some()
    }

    /// Runs `work` on a thread inside; what it starts or opens belongs to the namespace.
    pub(crate) fn inside<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        let netns = File::open(self.path()).unwrap();
        thread::scope(|scope| {
            let entered = scope.spawn(|| {
                setns(&netns, CloneFlags::CLONE_NEWNET).unwrap();
                work()
            });
            entered.join().unwrap()
        })
    }

    /// Whether a connection from here reaches `address` of another namespace.
    pub(crate) fn reaches(&self, other: &Netns, address: &str) -> bool {
        let address: IpAddr = address.parse().unwrap();
        let listener = other.inside(|| TcpListener::bind((address, 0)));
        let Ok(listening) = listener.and_then(|it| Ok((it.local_addr()?, it))) else {
            return false;
        };
        self.inside(|| TcpStream::connect_timeout(&listening.0, Duration::from_secs(2)).is_ok())
    }

    /// Deletes it now; the end of the test is then no surprise.
    pub(crate) fn delete(&self) {
        ip(&["netns", "del", &self.name]);
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        let gone = Command::new("ip")
            .args(["netns", "del", &self.name])
            .stderr(Stdio::null())
            .status();
        drop(gone);
    }
}

pub(crate) fn ip(args: &[&str]) {
    let output = Command::new("ip").args(args).output().unwrap();
    assert!(
        output.status.success(),
        "ip {args:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
}

/// One call of the plugin.
#[derive(Clone, Debug)]
pub(crate) struct Call {
    pub(crate) command: &'static str,
    pub(crate) version: &'static str,
    pub(crate) container_id: String,
    pub(crate) ifname: String,
    pub(crate) netns: Option<PathBuf>,
    pub(crate) extra: Value,
}

impl Call {
    pub(crate) fn new(command: &'static str, container_id: &str, netns: &Netns) -> Self {
        Self {
            command,
            version: "1.1.0",
            container_id: container_id.into(),
            ifname: "eth0".into(),
            netns: Some(netns.path()),
            extra: json!({}),
        }
    }
}

/// What the plugin answered.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) ok: bool,
    pub(crate) json: Value,
    pub(crate) took: Duration,
}

impl Answer {
    #[track_caller]
    pub(crate) fn expect_ok(self) -> Value {
        assert!(self.ok, "{}", self.json);
        self.json
    }

    /// The code of the error, and what it says.
    #[track_caller]
    pub(crate) fn expect_error(self, code: u64) -> String {
        assert!(!self.ok, "{}", self.json);
        assert_eq!(self.json["code"], code, "{}", self.json);
        self.json["details"].as_str().unwrap_or_default().into()
    }
}

pub(crate) struct Node {
    pub(crate) netns: Netns,
    pub(crate) dir: TempDir,
    pub(crate) fake: Arc<Fake>,
    cidrs: Vec<String>,
    agent: Option<Agent>,
}

/// The agent's part; dropping it is what `kill -9` leaves.
pub(crate) struct Agent {
    pub(crate) leases: Arc<Leases>,
    runtime: Runtime,
}

impl Node {
    /// A node that forwards, with the addresses 192.0.2.1 and 2001:db8::1 and an agent.
    pub(crate) fn new(cidrs: &[&str]) -> Self {
        Self::in_dir(cidrs, tempfile::tempdir().unwrap())
    }

    pub(crate) fn in_dir(cidrs: &[&str], dir: TempDir) -> Self {
        let netns = Netns::new("node");
        netns.run(&["ip", "link", "set", "lo", "up"]);
        netns.run(&["ip", "addr", "add", "192.0.2.1/32", "dev", "lo"]);
        netns.run(&["ip", "addr", "add", "2001:db8::1/128", "dev", "lo"]);
        netns.run(&["sysctl", "-qw", "net.ipv4.ip_forward=1"]);
        netns.run(&["sysctl", "-qw", "net.ipv6.conf.all.forwarding=1"]);
        let fake = Arc::new(Fake::new(&netns.name));
        let mut node = Self {
            netns,
            dir,
            fake,
            cidrs: cidrs.iter().map(|it| (*it).into()).collect(),
            agent: None,
        };
        node.start_agent();
        node
    }

    pub(crate) fn start_agent(&mut self) {
        let cidrs: Vec<_> = self.cidrs.iter().map(|it| it.parse().unwrap()).collect();
        let places = Places {
            store: self.dir.path().join("state/leases.redb"),
            released: self.released_dir(),
        };
        let leases = Arc::new(Leases::open(places, Ranges::Given(&cidrs), "boot".into()).unwrap());
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .unwrap();
        let settings = Settings { mtu: 1400 };
        let pods = Arc::new(Pods::new(leases.clone(), self.fake.clone(), settings));
        let listener = runtime.block_on(async {
            pods.reconcile().await.unwrap();
            pods::listen(&self.socket()).unwrap()
        });
        runtime.spawn(pods.serve(listener));
        self.agent = Some(Agent { leases, runtime });
    }

    pub(crate) fn kill_agent(&mut self) {
        if let Some(Agent { leases, runtime }) = self.agent.take() {
            runtime.shutdown_timeout(PATIENCE);
            drop(leases);
        }
    }

    /// Starts the agent if there is none.
    pub(crate) fn restart_agent(&mut self) {
        if self.agent.is_none() {
            self.start_agent();
        }
    }

    pub(crate) fn leases(&self) -> &Leases {
        &self.agent.as_ref().unwrap().leases
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.dir.path().join("run/cni.sock")
    }

    pub(crate) fn released_dir(&self) -> PathBuf {
        self.dir.path().join("released")
    }

    pub(crate) fn device(&self, container_id: &str) -> String {
        pods::Attachment::new(container_id, "eth0")
            .unwrap()
            .device()
    }

    /// Starts the plugin in the node's namespace.
    pub(crate) fn spawn(&self, call: &Call) -> Child {
        let mut conf = json!({
            "cniVersion": call.version,
            "name": "pods",
            "type": "weir-cni",
            "agentSocket": self.socket(),
            "releasedDir": self.released_dir(),
            "dns": {"nameservers": ["10.96.0.10"]},
        });
        for (key, value) in call.extra.as_object().unwrap() {
            conf[key] = value.clone();
        }
        self.netns.inside(|| {
            let mut command = Command::new(env!("CARGO_BIN_EXE_weir-cni"));
            command
                .env_clear()
                .env("CNI_COMMAND", call.command)
                .env("CNI_CONTAINERID", &call.container_id)
                .env("CNI_IFNAME", &call.ifname)
                .env("CNI_PATH", "/opt/cni/bin")
                .env("CNI_ARGS", "K8S_POD_NAMESPACE=default;K8S_POD_NAME=web")
                .stdin(Stdio::piped())
                .stdout(Stdio::piped());
            if let Some(path) = &call.netns {
                command.env("CNI_NETNS", path);
            }
            let mut child = command.spawn().unwrap();
            let mut stdin = child.stdin.take().unwrap();
            match stdin.write_all(conf.to_string().as_bytes()) {
                // It has refused its environment already.
                Err(error) if error.kind() == ErrorKind::BrokenPipe => {}
                written => written.unwrap(),
            }
            child
        })
    }

    pub(crate) fn call(&self, call: &Call) -> Answer {
        let begun = Instant::now();
        let output = self.spawn(call).wait_with_output().unwrap();
        Answer {
            ok: output.status.success(),
            took: begun.elapsed(),
            json: match output.stdout.as_slice() {
                [] => Value::Null,
                json => serde_json::from_slice(json).unwrap(),
            },
        }
    }

    #[track_caller]
    pub(crate) fn add(&self, container_id: &str, netns: &Netns) -> Value {
        self.call(&Call::new("ADD", container_id, netns))
            .expect_ok()
    }

    #[track_caller]
    pub(crate) fn del(&self, container_id: &str, netns: &Netns) {
        self.call(&Call::new("DEL", container_id, netns))
            .expect_ok();
    }

    /// Nothing of ours is left anywhere: no device, no lease, nothing open.
    #[track_caller]
    pub(crate) fn expect_clean(&self) {
        eventually("no device is left", || {
            !self.netns.run(&["ip", "-br", "link"]).contains("weir")
        });
        if let Some(agent) = &self.agent {
            eventually("no lease is left", || agent.leases.all().is_empty());
            eventually("no note is left", || {
                weir_cni::released::list(&self.released_dir())
                    .unwrap()
                    .is_empty()
            });
        }
        assert!(self.fake.open.lock().unwrap().is_empty());
        assert_eq!(*self.fake.doubled.lock().unwrap(), [""; 0]);
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.kill_agent();
    }
}

/// Polls until it holds.
#[track_caller]
pub(crate) fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !holds() {
        assert!(begun.elapsed() < PATIENCE, "not in time: {what}");
        thread::sleep(Duration::from_millis(2));
    }
}

/// A plugin whose words the test chooses.
pub(crate) struct ByHand(BufReader<UnixStream>);

impl ByHand {
    pub(crate) fn connect(node: &Node) -> Self {
        Self(BufReader::new(UnixStream::connect(node.socket()).unwrap()))
    }

    pub(crate) fn say(&mut self, request: &Request) -> io::Result<()> {
        let mut frame = serde_json::to_vec(request).unwrap();
        frame.push(b'\n');
        self.0.get_mut().write_all(&frame)
    }

    pub(crate) fn hear(&mut self) -> Reply {
        let mut line = String::new();
        self.0.read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap()
    }
}
