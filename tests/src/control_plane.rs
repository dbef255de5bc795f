//! A real control plane on a machine of ours: etcd, API server, controller manager. It runs no
//! pods; `kubelet.rs` plays that.

use std::fs;
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::binaries::Binaries;
use crate::kubectl::Kubectl;
use crate::machine::Machine;
use crate::netns::{End, Netns, link};
use crate::pki::{Credential, Pki};
use crate::process::Process;

/// Where the API server listens, as seen from every attached node.
pub const API_SERVER: SocketAddr = SocketAddr::new(IpAddr::V4(ADDRESS), 6443);
/// Services get their cluster IPs from here; the first is the API server's own.
pub const SERVICE_RANGE: &str = "10.96.0.0/16";
/// Nodes get their pod ranges, a /24 each, from here.
pub const POD_RANGE: &str = "10.244.0.0/16";

const ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 210, 0, 1);
const SERVING: &str = "kube-apiserver";
const ETCD: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 2379);
const START: Duration = Duration::from_secs(60);
const STOP: Duration = Duration::from_secs(10);

/// What the tests' objects need, and no more: nothing here taints nodes or evicts pods.
const CONTROLLERS: &[&str] = &[
    "deployment-controller",
    "endpointslice-controller",
    "endpointslice-mirroring-controller",
    "garbage-collector-controller",
    "namespace-controller",
    "node-ipam-controller",
    "replicaset-controller",
    "root-ca-certificate-publisher-controller",
    "serviceaccount-controller",
    "serviceaccount-token-controller",
    "statefulset-controller",
];

/// A running control plane, on a machine of its own that is also the switch nodes are attached to.
#[derive(Debug)]
pub struct ControlPlane {
    // Processes are dropped before the machine that they are on.
    controller_manager: Process,
    api_server: Option<Process>,
    _etcd: Process,
    binaries: Binaries,
    pki: Pki,
    kubectl: Kubectl,
    admin: PathBuf,
    machine: Machine,
}

impl ControlPlane {
    /// Starts a control plane and waits until it is ready.
    ///
    /// # Errors
    /// A process ended or was not ready in a minute; the error shows its log.
    pub fn start(binaries: &Binaries) -> Result<Self> {
        let machine = Machine::new("control")?;
        let netns = machine.netns();
        netns.ip("link add fabric type bridge")?;
        netns.ip(&format!("addr add {ADDRESS}/24 dev fabric"))?;
        netns.ip("link set fabric up")?;
        // The API server wants to know which way out is; the controllers wait for it.
        netns.ip("route add default dev fabric")?;

        let pki = Pki::new(&dir_of(&machine))?;
        let kubeconfig = |user: &str, group| {
            let credential = Credential::Certificate(pki.client(user, group)?);
            pki.kubeconfig(&user.replace(':', "-"), API_SERVER, &credential)
        };
        let admin = kubeconfig("admin", Some("system:masters"))?;
        let manager = kubeconfig("system:kube-controller-manager", None)?;
        let names = [
            "kubernetes",
            "kubernetes.default",
            "kubernetes.default.svc",
            "localhost",
        ];
        let addresses = [ADDRESS.to_string(), "127.0.0.1".into(), "10.96.0.1".into()];
        let reached_by: Vec<String> = names
            .map(str::to_owned)
            .into_iter()
            .chain(addresses)
            .collect();
        pki.server(SERVING, &reached_by)?;

        let kubectl = Kubectl::new(&binaries.kubectl, &admin, &machine);
        let etcd = start_etcd(&machine, &binaries.etcd)?;
        let api_server = start_api_server(&machine, &binaries.kube_apiserver, &pki, &kubectl)?;
        let program = &binaries.kube_controller_manager;
        let mut controller_manager = start_controller_manager(&machine, program, &pki, &manager)?;
        // A pod can be created once its namespace has the default service account.
        controller_manager.wait_until("making service accounts", START, || {
            kubectl.run(&["get", "serviceaccount", "default"]).is_ok()
        })?;
        Ok(Self {
            controller_manager,
            api_server: Some(api_server),
            _etcd: etcd,
            binaries: binaries.clone(),
            pki,
            kubectl,
            admin,
            machine,
        })
    }

    /// Links a node to the switch: `address` (with prefix length, in 10.210.0.0/24) is the node's,
    /// on its device `device`. Nodes reach the API server and each other through it.
    ///
    /// # Errors
    /// The device or the address is taken.
    pub fn attach(&self, node: &Netns, device: &str, address: &str) -> Result<()> {
        let ours = self.machine.netns();
        // Unique and short enough: the last part of the address.
        let host = address.split('/').next().and_then(|a| a.rsplit('.').next());
        let port = format!("port{}", host.context("an address with a last part")?);
        link(
            End {
                netns: ours,
                device: &port,
                addresses: &[],
            },
            End {
                netns: node,
                device,
                addresses: &[address],
            },
        )?;
        ours.ip(&format!("link set {port} master fabric")).map(drop)
    }

    /// The machine it runs on: its namespace, its logs.
    #[must_use]
    pub fn machine(&self) -> &Machine {
        &self.machine
    }

    /// The URL of the API server, for everything that is attached.
    #[must_use]
    pub fn url() -> String {
        format!("https://{API_SERVER}")
    }

    /// kubectl as the administrator.
    #[must_use]
    pub fn kubectl(&self) -> &Kubectl {
        &self.kubectl
    }

    /// The kubeconfig of the administrator.
    #[must_use]
    pub fn admin(&self) -> &Path {
        &self.admin
    }

    /// The certificate of the authority, as `ca.crt` is mounted into pods.
    #[must_use]
    pub fn ca(&self) -> PathBuf {
        self.pki.ca()
    }

    /// A token of a service account, valid for an hour.
    ///
    /// # Errors
    /// There is no such service account.
    pub fn token(&self, namespace: &str, service_account: &str) -> Result<String> {
        let args = [
            "-n",
            namespace,
            "create",
            "token",
            service_account,
            "--duration=1h",
        ];
        Ok(self.kubectl.run(&args)?.trim().to_owned())
    }

    /// A kubeconfig of a service account, with the permissions that are bound to it and no more.
    ///
    /// # Errors
    /// There is no such service account.
    pub fn kubeconfig_of(&self, namespace: &str, service_account: &str) -> Result<PathBuf> {
        let credential = Credential::Token(self.token(namespace, service_account)?);
        let name = format!("{namespace}-{service_account}");
        self.pki.kubeconfig(&name, API_SERVER, &credential)
    }

    /// Ends the API server with SIGKILL; etcd keeps every object.
    ///
    /// # Errors
    /// It cannot be killed.
    pub fn stop_api_server(&mut self) -> Result<()> {
        self.api_server
            .take()
            .map_or(Ok(()), |mut process| process.kill().map(drop))
    }

    /// Starts the API server again and waits until it is ready. It forgets the changes of before:
    /// a watch from an older resource version gets 410 Gone.
    ///
    /// # Errors
    /// It was not ready in a minute.
    pub fn start_api_server(&mut self) -> Result<()> {
        if self.api_server.is_none() {
            let program = &self.binaries.kube_apiserver;
            let started = start_api_server(&self.machine, program, &self.pki, &self.kubectl)?;
            self.api_server = Some(started);
        }
        Ok(())
    }

    /// Compacts etcd at its newest revision and returns that. What the API server has in its own
    /// watch cache it still serves: restart it to have watchers told 410 Gone.
    ///
    /// # Errors
    /// etcd does not answer as expected.
    pub fn compact(&self) -> Result<u64> {
        let answer = self.ask_etcd("/v3/kv/range", r#"{"key":"AA=="}"#)?;
        let revision = answer["header"]["revision"]
            .as_str()
            .and_then(|r| r.parse().ok());
        let revision: u64 = revision.with_context(|| format!("a revision in {answer}"))?;
        let body = format!(r#"{{"revision":"{revision}","physical":true}}"#);
        self.ask_etcd("/v3/kv/compaction", &body)?;
        Ok(revision)
    }

    /// One request to etcd's JSON gateway.
    fn ask_etcd(&self, path: &str, body: &str) -> Result<Value> {
        // HTTP/1.0: the answer ends with the connection, in one piece.
        let request = format!(
            "POST {path} HTTP/1.0\r\nHost: etcd\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        );
        let answer = self.machine.netns().run(|| -> Result<String> {
            let mut stream = TcpStream::connect_timeout(&ETCD, STOP)?;
            stream.set_read_timeout(Some(STOP))?;
            stream.write_all(request.as_bytes())?;
            let mut answer = String::new();
            stream.read_to_string(&mut answer)?;
            Ok(answer)
        })??;
        match answer.split_once("\r\n\r\n") {
            Some((head, body)) if head.contains(" 200 ") => Ok(serde_json::from_str(body)?),
            _ => bail!("etcd {path}: {answer}"),
        }
    }

    /// The controller manager, for tests that want it away.
    #[must_use]
    pub fn controller_manager(&mut self) -> &mut Process {
        &mut self.controller_manager
    }
}

fn dir_of(machine: &Machine) -> PathBuf {
    machine.dir().join("control-plane")
}

fn start_etcd(machine: &Machine, program: &Path) -> Result<Process> {
    let data = dir_of(machine).join("etcd");
    fs::create_dir(&data).with_context(|| format!("create {}", data.display()))?;
    let client = format!("http://{ETCD}");
    let mut etcd = machine
        .launch("etcd", program)
        .arg(format!("--data-dir={}", data.display()))
        .arg(format!("--listen-client-urls={client}"))
        .arg(format!("--advertise-client-urls={client}"))
        .arg("--listen-peer-urls=http://127.0.0.1:2380")
        // The objects of a test need not survive a power cut.
        .arg("--unsafe-no-fsync")
        .spawn()?;
    etcd.wait_until("listening", START, || accepts(machine, ETCD))?;
    Ok(etcd)
}

fn start_api_server(
    machine: &Machine,
    program: &Path,
    pki: &Pki,
    kubectl: &Kubectl,
) -> Result<Process> {
    let serving = pki.identity(SERVING);
    let mut process = machine
        .launch("kube-apiserver", program)
        .arg(format!("--etcd-servers=http://{ETCD}"))
        .arg(format!("--advertise-address={ADDRESS}"))
        .arg(format!("--secure-port={}", API_SERVER.port()))
        .arg(flag("tls-cert-file", &serving.certificate))
        .arg(flag("tls-private-key-file", &serving.key))
        .arg(flag("cert-dir", &dir_of(machine)))
        .arg(flag("client-ca-file", &pki.ca()))
        .arg(flag(
            "service-account-key-file",
            &pki.service_account_public_key(),
        ))
        .arg(flag(
            "service-account-signing-key-file",
            &pki.service_account_key(),
        ))
        .arg("--service-account-issuer=https://kubernetes.default.svc")
        .arg(format!("--service-cluster-ip-range={SERVICE_RANGE}"))
        .args(["--authorization-mode=RBAC", "--allow-privileged=true"])
        .spawn()?;
    // kubectl is a costly way to find out that nobody listens yet.
    process.wait_until("listening", START, || accepts(machine, API_SERVER))?;
    process.wait_until("ready", START, || {
        kubectl.run(&["get", "--raw", "/readyz"]).is_ok()
    })?;
    Ok(process)
}

fn start_controller_manager(
    machine: &Machine,
    program: &Path,
    pki: &Pki,
    kubeconfig: &Path,
) -> Result<Process> {
    machine
        .launch("kube-controller-manager", program)
        .arg(flag("kubeconfig", kubeconfig))
        .arg(format!("--controllers={}", CONTROLLERS.join(",")))
        .arg("--use-service-account-credentials")
        .arg(flag(
            "service-account-private-key-file",
            &pki.service_account_key(),
        ))
        .arg(flag("root-ca-file", &pki.ca()))
        .args(["--allocate-node-cidrs=true", "--leader-elect=false"])
        // It has no use for a port of its own but insists on one.
        .args(["--bind-address=127.0.0.1", "--secure-port=10257"])
        .arg(flag("cert-dir", &dir_of(machine)))
        .arg(format!("--cluster-cidr={POD_RANGE}"))
        .arg(format!("--service-cluster-ip-range={SERVICE_RANGE}"))
        // The defaults (20 and 30) hold a test back that creates many objects at once.
        .args(["--kube-api-qps=200", "--kube-api-burst=400"])
        .spawn()
}

fn accepts(machine: &Machine, address: SocketAddr) -> bool {
    let connected = machine.netns().run(|| TcpStream::connect(address).is_ok());
    connected.unwrap_or_default()
}

fn flag(name: &str, path: &Path) -> String {
    format!("--{name}={}", path.display())
}
