//! The answers of the local API. JSON names are part of `weir … -o json` and stay stable.

use std::net::{IpAddr, SocketAddr};

use serde::{Deserialize, Serialize};

/// `GET /v1/status`.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Status {
    pub node: String,
    pub version: String,
    /// Seconds since the agent started.
    pub uptime_seconds: u64,
    /// How often it was killed and its parent started it again.
    #[serde(default)]
    pub restarts: u64,
    /// Every reason why the node is not ready; empty when it is.
    pub not_ready: Vec<String>,
    pub inputs: Vec<Input>,
    pub tables: Vec<TableFill>,
    pub programs: Vec<ProgramInfo>,
    pub nodes: Nodes,
    pub pods: usize,
    pub services: usize,
    pub policies: usize,
    /// Objects that exist and could not be understood or applied; the last good state of each holds.
    pub quarantined: Vec<Quarantined>,
    /// Everything that is wrong, what has the greatest effect first.
    #[serde(default)]
    pub conditions: Vec<ConditionView>,
    /// Absent until conversations were counted for the first time, half a minute after the agent's start.
    #[serde(default)]
    pub nat: Option<NatPorts>,
}

/// Ports of the node's addresses that stand for pods, and for clients of backends elsewhere.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct NatPorts {
    /// How many there are towards each peer. A pod may have half of them.
    pub capacity: usize,
    /// All that are taken; a port that leads to two peers counts for each.
    pub used: u64,
    /// By how much the numbers of a peer and of a pod may be too low.
    pub error: u64,
    /// The ten with the most ports, the first first.
    pub peers: Vec<NatPeer>,
}

/// Ports of the node that lead to one peer.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct NatPeer {
    pub peer: FlowEnd,
    pub protocol: String,
    pub ports: u64,
    /// The pod of this node that has the most of them: `namespace/name`, or its address. Absent when no pod has any.
    pub pod: Option<String>,
    pub pod_ports: u64,
}

/// Something that is wrong. docs/operations.md says of each fault what it means and what to do.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct ConditionView {
    /// With whom: `this node`, `Service shop/web`, `Pod shop/a`, `Node n2`.
    pub about: String,
    /// `node`, `object`, `pod` or `peer`.
    pub kind: String,
    /// Its label, in CamelCase.
    pub fault: String,
    /// What the node does because of it, in words; nothing if it goes on as ever.
    pub effect: Option<String>,
    /// RFC 3339.
    pub since: String,
    /// In words.
    pub text: String,
    /// What can be done about it.
    pub remedy: String,
}

/// The nodes of the cluster, as this one sees them.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Nodes {
    /// This one included.
    pub known: usize,
    /// Those whose pods have no route from here.
    pub unreachable: Vec<UnreachableNode>,
}

/// A node whose pods have no route from here.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct UnreachableNode {
    pub node: String,
    /// In words.
    pub reason: String,
}

/// One kind of object that the agent reads.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Input {
    pub kind: String,
    pub synced: bool,
    pub objects: usize,
    /// What keeps it from being current, in words.
    pub problem: Option<String>,
}

/// How full a table is.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct TableFill {
    pub table: String,
    pub rows: usize,
    pub capacity: usize,
    /// What the desired state holds that the kernel does not, or the other way round.
    pub problem: Option<String>,
}

/// A program as the kernel reports it.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct ProgramInfo {
    pub name: String,
    pub id: u32,
    /// Instructions that the verifier visited.
    pub verified_instructions: Option<u32>,
    /// On how many hooks it sits.
    pub hooks: usize,
}

/// An object that could not be understood or applied.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Quarantined {
    pub object: String,
    pub reason: String,
}

/// A row of `GET /v1/services`: a frontend.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct ServiceView {
    /// `namespace/name`, or `hostport namespace/name` of a pod.
    pub service: String,
    /// `ClusterIP`, `NodePort`, `LoadBalancer`, `ExternalIP` or `HostPort`.
    pub kind: String,
    /// `inside` or `outside` of the cluster.
    pub clients: String,
    /// The unspecified address stands for those of nodes.
    pub address: SocketAddr,
    pub protocol: String,
    pub backends: Vec<SocketAddr>,
    /// Seconds; 0 for none.
    pub affinity_seconds: u32,
    /// What stands in the way of its being programmed, in words.
    pub problem: Option<String>,
}

/// A row of `GET /v1/endpoints`: a pod of this node.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct EndpointView {
    pub pod: String,
    pub addresses: Vec<IpAddr>,
    pub device: String,
    pub ifindex: u32,
    pub mac: String,
    /// Policies that isolate the pod, by direction; empty where none does.
    pub ingress: Vec<String>,
    pub egress: Vec<String>,
    pub state: String,
}

/// A row of `GET /v1/policy`: a policy and what became of it.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct PolicyView {
    /// `NetworkPolicy` or `ClusterNetworkPolicy`.
    pub kind: String,
    pub policy: String,
    /// `Admin 10`, of a ClusterNetworkPolicy: where it is asked.
    pub tier: Option<String>,
    /// `enforce` or `audit`.
    pub enforcement: String,
    /// `ingress`, `egress` or both.
    pub directions: Vec<String>,
    /// Pods of this node that it selects.
    pub pods: Vec<String>,
    /// Parts that are not understood and allow nothing.
    pub unsupported: Vec<String>,
}

/// A row of `GET /v1/flows`.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct FlowView {
    pub source: FlowEnd,
    pub destination: FlowEnd,
    pub protocol: String,
    /// `opening`, `open`, `closing`, `closed`.
    pub state: String,
    /// The service that the opener spoke to, when the packets are translated.
    pub via: Option<SocketAddr>,
    /// From the opener, then towards it.
    pub packets: [u64; 2],
    /// IP packets with their headers.
    pub bytes: [u64; 2],
    pub age_seconds: u64,
    pub idle_seconds: u64,
    /// The rules that allowed it; absent where none was needed.
    pub egress_rule: Option<String>,
    pub ingress_rule: Option<String>,
}

/// One end of a flow or of a drop.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct FlowEnd {
    pub address: IpAddr,
    /// The port, or the identifier of an ICMP echo.
    pub port: u16,
    /// `namespace/name` of the pod, the service or the node, when it is known.
    pub name: Option<String>,
}

/// `GET /v1/drops`.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Drops {
    /// Exact, since the tables were made.
    pub totals: Vec<DropTotal>,
    /// The latest events, oldest first. Rate-limited samples.
    pub recent: Vec<DropView>,
    /// The same, of flows that were allowed: what would have been dropped, were policies enforced that are only audited.
    #[serde(default)]
    pub audited: Vec<DropView>,
}

/// The exact count of a reason.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct DropTotal {
    pub reason: String,
    pub help: String,
    pub packets: u64,
    pub bytes: u64,
}

/// A drop, explained, or an audit.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct DropView {
    /// RFC 3339, UTC.
    pub time: String,
    pub reason: String,
    /// One sentence: which policy and rule, or what is wrong.
    pub why: String,
    pub hook: String,
    pub device: String,
    pub protocol: String,
    pub source: FlowEnd,
    pub destination: FlowEnd,
    /// 0 in an audit, which is of a flow.
    pub bytes: u32,
    /// Events of the same reason, or audits, left out before this one.
    pub limited: u32,
}

/// `GET /v1/verify`: desired against kernel.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Verify {
    pub tables: Vec<TableDrift>,
    pub hooks: Vec<HookState>,
}

/// The difference of one table.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct TableDrift {
    pub table: String,
    pub desired: usize,
    pub kernel: usize,
    pub missing: usize,
    pub unexpected: usize,
    pub different: usize,
}

/// Whether a hook holds our program.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct HookState {
    pub hook: String,
    pub program: Option<String>,
    pub problem: Option<String>,
}

impl Verify {
    /// Does the kernel hold exactly what it should?
    pub fn is_clean(&self) -> bool {
        self.tables
            .iter()
            .all(|t| t.missing == 0 && t.unexpected == 0 && t.different == 0)
            && self.hooks.iter().all(|h| h.problem.is_none())
    }
}
