//! The control plane of a cluster: etcd, API server, controllers, scheduler, with their certificates.
//! All of them are in one node's network namespace and in a cgroup of their own.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Result;

use super::options::{Family, Options};
use super::place::{CONTROL, Node, POD_RANGES, Place, SERVICE_RANGES, api_server};
use super::programs::Programs;
use super::start::{Inside, Starter};
use crate::kubectl::Kubectl;
use crate::pki::{Credential, Pki};

const ETCD: &str = "http://127.0.0.1:2379";
const ISSUER: &str = "https://kubernetes.default.svc.cluster.local";
pub(super) const SERVING: &str = "kube-apiserver";
const PROXY: &str = "system:kube-proxy";
const START: Duration = Duration::from_secs(120);

/// The certificates of a cluster, and the kubeconfigs of its parts.
#[derive(Debug)]
pub(super) struct Authority {
    pki: Pki,
    folder: PathBuf,
}

/// Where the administrator's kubeconfig of a cluster is.
#[must_use]
pub(super) fn admin(place: &Place) -> PathBuf {
    place.dir().join("pki/admin.kubeconfig")
}

impl Authority {
    /// # Errors
    /// The folder cannot be written.
    pub(super) fn new(place: &Place) -> Result<Self> {
        let folder = place.dir().join("pki");
        let pki = Pki::new(&folder)?;
        let names = [
            "kubernetes",
            "kubernetes.default",
            "kubernetes.default.svc",
            "localhost",
        ];
        let full = "kubernetes.default.svc.cluster.local".to_owned();
        let addresses = [api_server().ip().to_string(), "127.0.0.1".into()];
        let services = ["10.96.0.1", "fd00:10:96::1"];
        let reached_by: Vec<String> = names
            .into_iter()
            .chain(services)
            .map(str::to_owned)
            .chain(addresses)
            .chain([full])
            .collect();
        pki.server(SERVING, &reached_by)?;
        pki.client("kubelet-client", Some("system:masters"))?;
        let authority = Self { pki, folder };
        authority.kubeconfig("admin", Some("system:masters"))?;
        authority.kubeconfig(PROXY, None)?;
        Ok(authority)
    }

    /// The kubeconfig of kube-proxy, the same on every node.
    pub(super) fn proxy(&self) -> PathBuf {
        self.file(&format!("{}.kubeconfig", PROXY.replace(':', "-")))
    }

    fn kubeconfig(&self, user: &str, group: Option<&str>) -> Result<PathBuf> {
        let credential = Credential::Certificate(self.pki.client(user, group)?);
        self.pki
            .kubeconfig(&user.replace(':', "-"), api_server(), &credential)
    }

    /// The certificates of a node: it is a server and a user. Returns its kubeconfig.
    ///
    /// # Errors
    /// The folder cannot be written.
    pub(super) fn node(&self, node: Node) -> Result<PathBuf> {
        let addresses = node.addresses().map(|address| address.to_string());
        let reached_by: Vec<String> = addresses.into_iter().chain([node.name()]).collect();
        self.pki.server(&node.name(), &reached_by)?;
        self.kubeconfig(
            &format!("system:node:{}", node.name()),
            Some("system:nodes"),
        )
    }

    /// Where a certificate (`crt`) or key (`key`) is.
    #[must_use]
    pub(super) fn file(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }
}

/// Starts etcd and the API server, and waits for neither.
///
/// # Errors
/// A process cannot be started.
pub(super) fn start(
    starter: &Starter,
    programs: &Programs,
    place: &Place,
    authority: &Authority,
    options: &Options,
) -> Result<()> {
    let peers = "http://127.0.0.1:2380";
    let flags = vec![
        format!("--data-dir={}", place.dir().join("etcd").display()),
        format!("--listen-client-urls={ETCD}"),
        format!("--advertise-client-urls={ETCD}"),
        format!("--listen-peer-urls={peers}"),
        // A cluster of this kind need not survive a power cut.
        "--unsafe-no-fsync".to_owned(),
    ];
    run(starter, "etcd", &programs.plane.etcd, flags)?;
    start_api_server(starter, programs, authority, options)
}

/// Starts the API server, and does not wait for it.
///
/// # Errors
/// The process cannot be started.
pub(super) fn start_api_server(
    starter: &Starter,
    programs: &Programs,
    authority: &Authority,
    options: &Options,
) -> Result<()> {
    let file = |name: &str| authority.file(name).display().to_string();
    let flags = vec![
        format!("--etcd-servers={ETCD}"),
        format!("--advertise-address={}", api_server().ip()),
        format!("--secure-port={}", api_server().port()),
        services(options),
        "--allow-privileged=true".to_owned(),
        "--authorization-mode=Node,RBAC".to_owned(),
        "--enable-admission-plugins=NodeRestriction".to_owned(),
        format!("--client-ca-file={}", file("ca.crt")),
        format!("--tls-cert-file={}", file("kube-apiserver.crt")),
        format!("--tls-private-key-file={}", file("kube-apiserver.key")),
        format!("--kubelet-certificate-authority={}", file("ca.crt")),
        format!(
            "--kubelet-client-certificate={}",
            file("kubelet-client.crt")
        ),
        format!("--kubelet-client-key={}", file("kubelet-client.key")),
        "--kubelet-preferred-address-types=InternalIP".to_owned(),
        format!("--service-account-issuer={ISSUER}"),
        format!("--service-account-key-file={}", file("sa.pub")),
        format!("--service-account-signing-key-file={}", file("sa.key")),
    ];
    run(starter, SERVING, &programs.plane.kube_apiserver, flags)
}

/// Waits until the API server answers.
///
/// # Errors
/// It ended, or did not in time; the error shows its log.
pub(super) fn wait_for_api_server(starter: &Starter, kubectl: &Kubectl) -> Result<()> {
    starter.wait(SERVING, "ready", START, || {
        kubectl.run(&["get", "--raw", "/readyz"]).is_ok()
    })
}

/// Waits until the API server answers, then starts controllers and scheduler: they end when they
/// may not yet read what they need.
///
/// # Errors
/// Something ended, or was not ready in time; the error shows its log.
pub(super) fn start_controllers(
    starter: &Starter,
    programs: &Programs,
    authority: &Authority,
    kubectl: &Kubectl,
    options: &Options,
) -> Result<()> {
    wait_for_api_server(starter, kubectl)?;
    let file = |name: &str| authority.file(name).display().to_string();

    let as_user = |user: &str| -> Result<Vec<String>> {
        let path = authority.kubeconfig(user, None)?.display().to_string();
        let ways = [
            "kubeconfig",
            "authentication-kubeconfig",
            "authorization-kubeconfig",
        ];
        let mut flags: Vec<String> = ways.map(|way| format!("--{way}={path}")).into();
        flags.push("--leader-elect=false".to_owned());
        Ok(flags)
    };
    let mut flags = as_user("system:kube-controller-manager")?;
    flags.extend([
        "--use-service-account-credentials=true".to_owned(),
        format!("--service-account-private-key-file={}", file("sa.key")),
        format!("--root-ca-file={}", file("ca.crt")),
        "--allocate-node-cidrs=true".to_owned(),
        format!("--cluster-cidr={}", ranges(options, POD_RANGES)),
        services(options),
        "--kube-api-qps=100".to_owned(),
        "--kube-api-burst=200".to_owned(),
    ]);
    flags.extend(match options.family {
        Family::Ipv4 => vec!["--node-cidr-mask-size=24".to_owned()],
        Family::Dual => vec![
            "--node-cidr-mask-size-ipv4=24".to_owned(),
            "--node-cidr-mask-size-ipv6=64".to_owned(),
        ],
    });
    let program = &programs.plane.kube_controller_manager;
    run(starter, "kube-controller-manager", program, flags)?;
    let flags = as_user("system:kube-scheduler")?;
    run(starter, "kube-scheduler", &programs.kube_scheduler, flags)?;
    // Pods can be made once their namespace has its service account.
    starter.wait(
        "kube-controller-manager",
        "making service accounts",
        START,
        || {
            let wanted = ["-n", "kube-system", "get", "serviceaccount", "default"];
            kubectl.run(&wanted).is_ok()
        },
    )
}

fn run(starter: &Starter, name: &str, program: &Path, flags: Vec<String>) -> Result<()> {
    let cgroup = format!("plane/{name}");
    starter.start(name, Inside::NetworkOf(CONTROL), &cgroup, program, flags)
}

fn services(options: &Options) -> String {
    let ranges = ranges(options, SERVICE_RANGES);
    format!("--service-cluster-ip-range={ranges}")
}

fn ranges(options: &Options, of: [&str; 2]) -> String {
    match options.family {
        Family::Ipv4 => of[0].to_owned(),
        Family::Dual => of.join(","),
    }
}
