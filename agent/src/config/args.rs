//! What was typed.

use std::ffi::OsString;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use clap::{ArgAction, Parser, Subcommand, ValueEnum};
use ipnet::IpNet;
use weir_dns::hand_over::FOLDER;
use weir_dns::host_port::host_port;
use weir_dns::kept::Kept;
use weir_dns::privilege::USER;

/// Where a node answers DNS if nothing else is said.
pub const DNS_ADDRESSES: [&str; 2] = ["169.254.53.53", "fd57:6569:7200::53"];

/// Weir's node agent: Services, NetworkPolicy, pod networking and cluster DNS through eBPF.
#[derive(Clone, Debug, Parser)]
#[command(name = "weir-agent", version, about)]
pub struct Args {
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Clone, Debug, Subcommand)]
pub enum Command {
    /// Serve this node until told to stop. Stopping detaches nothing: the kernel goes on by itself.
    Run(Box<RunArgs>),
    /// Say what this node offers and what is missing, and change nothing.
    Doctor(DoctorArgs),
    /// Put the CNI plugin where the container runtime looks for it. The network configuration, which
    /// makes the runtime use it, is written by `run` when the node is ready.
    Install(InstallArgs),
    /// Remove everything that Weir left on this node, the pods' devices included: pods lose their
    /// network. Leases stay unless asked for.
    Cleanup(CleanupArgs),
    /// Run a program and start it again whenever it is killed, until it ends by itself or we are told to
    /// stop. What the containers of agent and DNS run.
    Keep(KeepArgs),
    /// What policies do, from a folder of manifests: without a kernel and without a cluster. `weir policy test` is this.
    Policy(PolicyArgs),
    /// Do nothing until told to stop: what a DaemonSet runs when its work is done.
    #[command(hide = true)]
    Wait,
}

/// What to find out about policies.
#[derive(Clone, Debug, clap::Args)]
pub struct PolicyArgs {
    /// A table for people, or JSON for programs.
    #[arg(short, long, global = true, default_value = "table")]
    pub output: PolicyOutput,
    #[command(subcommand)]
    pub command: PolicyCommand,
}

/// How to say it.
#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
pub enum PolicyOutput {
    Table,
    Json,
}

/// What to find out.
#[derive(Clone, Debug, Subcommand)]
pub enum PolicyCommand {
    /// Do the policies of a folder do what its PolicyTests expect? Exits 1 if one does not, 2 if the folder is wrong.
    Test {
        /// A folder of manifests, or one file.
        #[arg(short, long)]
        file: PathBuf,
    },
    /// What do the policies of a folder open and close?
    Diff {
        /// A folder of manifests, or one file: what is new, and then what was before. Without that it is what standard input
        /// tells of a cluster.
        #[arg(short, long, required = true)]
        file: Vec<PathBuf>,
        /// Against a cluster: the folder has all policies that there are.
        #[arg(long)]
        whole: bool,
    },
}

/// What to keep running.
#[derive(Clone, Debug, clap::Args)]
pub struct KeepArgs {
    /// Keep the sockets open that weir-dns has on this address and port while it is dead: what is asked
    /// meanwhile is answered by the next one. Repeatable.
    #[arg(long, value_name = "ADDRESS:PORT")]
    pub hold: Vec<SocketAddr>,
    /// Where weir-dns offers them, as in its own --hand-over.
    #[arg(long, default_value = FOLDER)]
    pub hand_over: PathBuf,
    /// The program, by its path, and its arguments.
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    pub command: Vec<OsString>,
}

/// Options of `install`.
#[derive(Clone, Debug, clap::Args)]
pub struct InstallArgs {
    /// Where the container runtime looks for CNI plugins.
    #[arg(long, default_value = "/opt/cni/bin")]
    pub cni_bin_dir: PathBuf,
    /// The plugin; weir-cni beside this program if not given.
    #[arg(long)]
    pub plugin: Option<PathBuf>,
    /// Stay, and install it again when it has gone or another one is in its place.
    #[arg(long)]
    pub keep: bool,
}

/// Options of `cleanup`.
#[derive(Clone, Debug, clap::Args)]
pub struct CleanupArgs {
    #[command(flatten)]
    pub kernel: DoctorArgs,
    /// Where the agent keeps its sockets and its lock: one that runs must be stopped first.
    #[arg(long, default_value = "/run/weir")]
    pub run_dir: PathBuf,
    /// Where weir-dns was given its zone.
    #[arg(long, default_value = "/run/weir-dns/zone.sock")]
    pub zone_socket: PathBuf,
    /// Where the container runtime looks for network configurations.
    #[arg(long, default_value = "/etc/cni/net.d")]
    pub cni_conf_dir: PathBuf,
    /// Where the container runtime looks for CNI plugins.
    #[arg(long, default_value = "/opt/cni/bin")]
    pub cni_bin_dir: PathBuf,
    /// Where the agent keeps its leases.
    #[arg(long, default_value = "/var/lib/weir")]
    pub state_dir: PathBuf,
    /// Remove the leases too: this node's pods will not keep their addresses.
    #[arg(long)]
    pub leases: bool,
}

/// Where a node keeps what the agent needs.
#[derive(Clone, Debug, clap::Args)]
pub struct DoctorArgs {
    /// Where programs, links and tables are pinned: a folder on the node's bpffs.
    #[arg(long, env = "WEIR_BPFFS", default_value = "/sys/fs/bpf/weir")]
    pub bpffs: PathBuf,
    /// The cgroup2 folder whose processes are balanced at their sockets.
    #[arg(long, env = "WEIR_CGROUP", default_value = "/sys/fs/cgroup")]
    pub cgroup: PathBuf,
}

/// Options of `run`.
#[derive(Clone, Debug, clap::Args)]
pub struct RunArgs {
    #[command(flatten)]
    pub kernel: DoctorArgs,
    #[command(flatten)]
    pub kept: Kept,

    /// The name of this node in the cluster.
    #[arg(long, env = "NODE_NAME")]
    pub node_name: String,

    /// Read objects from the YAML files of this folder, instead of from an API server.
    #[arg(long)]
    pub manifests: Option<PathBuf>,
    /// Reach the API server as this kubeconfig says. Without it and without --manifests, the
    /// ServiceAccount of the pod is used.
    #[arg(long, env = "KUBECONFIG")]
    pub kubeconfig: Option<PathBuf>,
    /// Reach the API server at this URL, whatever kubeconfig or environment say. It cannot be the
    /// kubernetes Service: that is ours to provide. Repeat for several servers of one cluster: the first
    /// that answers is asked, and the next one when it no longer does.
    #[arg(
        long = "kube-api-server",
        env = "WEIR_KUBE_API_SERVER",
        value_delimiter = ','
    )]
    pub kube_api_servers: Vec<String>,

    /// The addresses of this node's pods: one range of each family. Repeat for dual stack. Without it, those
    /// of this node's Node object (spec.podCIDRs), which are waited for.
    #[arg(long = "pod-cidr")]
    pub pod_cidrs: Vec<IpNet>,
    /// With --manifests: where Services without a cluster IP get one. One range of each family.
    #[arg(long = "service-cidr", default_value = "10.96.0.0/16")]
    pub service_cidrs: Vec<IpNet>,
    /// Where Services may have external IPs (spec.externalIPs). Repeatable; without it they have none. Whoever may
    /// create a Service gets what pods send to an address there: allow no range that others have.
    #[arg(long = "external-ip-range", value_name = "CIDR")]
    pub external_ip_ranges: Vec<IpNet>,
    /// The largest packet of the pods' devices, in bytes; 0 for that of the default route's device.
    #[arg(long, default_value_t = 0)]
    pub mtu: u32,

    /// Does what pods send out of the cluster leave with the node's address?
    #[arg(long, default_value_t = true, action = ArgAction::Set)]
    pub masquerade: bool,
    /// A device that leads out of the node. Repeatable; without it those that carry a default route or one
    /// of the node's addresses.
    #[arg(long = "device")]
    pub devices: Vec<String>,

    /// The addresses at which weir-dns listens on this node, put on the loopback device.
    #[arg(long = "dns-address", default_values = DNS_ADDRESSES)]
    pub dns_addresses: Vec<IpAddr>,
    /// The Service whose port 53 is answered by this node's weir-dns.
    #[arg(long, default_value = "kube-system/kube-dns")]
    pub dns_service: String,
    /// The user that weir-dns runs as, and its group: it may read the zone, and its next process may have its
    /// sockets. Nobody else should have this uid.
    #[arg(long, default_value_t = USER.uid)]
    pub dns_uid: u32,
    /// Where weir-dns is given its zone. Not in --run-dir, which is root's alone. Its folder `handover`, where one
    /// weir-dns gives its sockets to the next, is beside it.
    #[arg(long, default_value = "/run/weir-dns/zone.sock")]
    pub zone_socket: PathBuf,
    /// The domain of cluster names.
    #[arg(long, default_value = "cluster.local")]
    pub cluster_domain: String,

    /// Sockets and locks; lost at a reboot.
    #[arg(long, default_value = "/run/weir")]
    pub run_dir: PathBuf,
    /// Leases; kept over a reboot.
    #[arg(long, default_value = "/var/lib/weir")]
    pub state_dir: PathBuf,

    /// Write the network configuration 05-weir.conflist into this folder once the node is ready for
    /// pods. Without it, somebody else has to tell the container runtime.
    #[arg(long)]
    pub cni_conf_dir: Option<PathBuf>,
    /// Write it only once this version's plugin is in this folder, where `install` puts it beside us.
    #[arg(long, requires = "cni_conf_dir")]
    pub cni_bin_dir: Option<PathBuf>,

    /// Write an Event when something is wrong with an object, a pod of this node or the node. Takes the permission to
    /// create Events.
    #[arg(long, env = "WEIR_TELL_EVENTS")]
    pub tell_events: bool,
    /// When the agent of another node is not ready for a minute, say so in the condition NetworkUnavailable of its Node,
    /// and take that back for this node. Takes the permission to patch nodes/status, and --pod-namespace.
    #[arg(long, env = "WEIR_TELL_ABSENCE")]
    pub tell_absence: bool,
    /// The namespace of this agent's pod and those of the others, which have its labels app.kubernetes.io/name and
    /// component. Of an object that all agents know, one of them tells.
    #[arg(long, env = "POD_NAMESPACE")]
    pub pod_namespace: Option<String>,

    /// Where /metrics, /healthz and /readyz are served. An IPv6 address may lack its brackets.
    #[arg(long, default_value = "127.0.0.1:9660", value_parser = host_port)]
    pub http: SocketAddr,
    /// Lines for people, or JSON.
    #[arg(long, value_enum, default_value = "text")]
    pub log_format: LogFormat,
    /// As of tracing's EnvFilter: `info`, `weir_agent=debug`, …
    #[arg(long, env = "WEIR_LOG", default_value = "info")]
    pub log: String,
}

/// The format of log lines.
#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
pub enum LogFormat {
    Text,
    Json,
}
