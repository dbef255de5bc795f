//! Where everything of a cluster is: the names of its namespaces and cgroups, its folder, its
//! addresses. Nothing is made here.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};

/// Where the kube-dns Service is, by convention the tenth address of the range.
pub(super) const CLUSTER_DNS: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 10);
pub(super) const SERVICE_RANGES: [&str; 2] = ["10.96.0.0/16", "fd00:10:96::/112"];
pub(super) const POD_RANGES: [&str; 2] = ["10.244.0.0/16", "fd00:10:244::/56"];
/// The world outside the cluster: the way out of every node, and the resolver it uses.
pub(super) const OUTSIDE: [IpAddr; 2] = [
    IpAddr::V4(Ipv4Addr::new(10, 210, 0, 1)),
    IpAddr::V6(Ipv6Addr::new(0xfd10, 0x210, 0, 0, 0, 0, 0, 1)),
];
/// Prefix lengths of the nodes' own network, IPv4 and IPv6.
pub(super) const FABRIC_BITS: [u8; 2] = [24, 64];

/// The names of one cluster.
#[derive(Debug, Clone)]
pub(super) struct Place {
    name: String,
}

impl Place {
    #[must_use]
    pub(super) fn of(cluster: &str) -> Self {
        Self {
            name: format!("weirc-{cluster}"),
        }
    }

    /// The folder of its files: logs, certificates, the disks of its nodes. Not below `/var`,
    /// which the nodes see through an overlay.
    #[must_use]
    pub(super) fn dir(&self) -> PathBuf {
        Path::new("/tmp").join(&self.name)
    }

    #[must_use]
    pub(super) fn node_dir(&self, node: Node) -> PathBuf {
        self.dir().join(node.name())
    }

    #[must_use]
    pub(super) fn log(&self, process: &str) -> PathBuf {
        self.dir().join("log").join(format!("{process}.log"))
    }

    /// The cgroup that every process of the cluster is in or below, as a path below the root of
    /// each hierarchy.
    #[must_use]
    pub(super) fn cgroup(&self) -> &str {
        &self.name
    }

    #[must_use]
    pub(super) fn cgroup_of(&self, part: &str) -> String {
        format!("{}/{part}", self.name)
    }

    /// The namespace of the switch between the nodes, which is also the world outside.
    #[must_use]
    pub(super) fn switch(&self) -> String {
        format!("{}-out", self.name)
    }

    #[must_use]
    pub(super) fn netns(&self, node: Node) -> String {
        format!("{}-{}", self.name, node.name())
    }
}

/// A node by its number, from 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Node(pub(super) u8);

impl Node {
    /// All nodes of a cluster of so many.
    pub(super) fn all(count: u8) -> impl Iterator<Item = Self> {
        (1..=count).map(Self)
    }

    #[must_use]
    pub(super) fn name(self) -> String {
        format!("n{}", self.0)
    }

    /// IPv4 and IPv6 on the nodes' own network.
    #[must_use]
    pub(super) fn addresses(self) -> [IpAddr; 2] {
        let last = 10 + self.0;
        [
            Ipv4Addr::new(10, 210, 0, last).into(),
            Ipv6Addr::new(0xfd10, 0x210, 0, 0, 0, 0, 0, last.into()).into(),
        ]
    }
}

/// The node in whose network namespace the control plane is: the API server must reach pods, and
/// a pod network gives only nodes a way to them.
pub(super) const CONTROL: Node = Node(1);

/// Where the API server listens.
#[must_use]
pub(super) fn api_server() -> SocketAddr {
    SocketAddr::new(CONTROL.addresses()[0], 6443)
}
