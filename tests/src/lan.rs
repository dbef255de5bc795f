//! Machines on one layer 2: a bridge in a namespace of its own, and two nodes that know of each other and
//! of each other's pods by manifests.

use std::cell::Cell;
use std::net::{IpAddr, SocketAddr};

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::machine::Machine;
use crate::netns::{End, Netns, link};
use crate::node::{Family, Node, NodeOptions, Pod, binary};
use crate::process::Process;
use crate::workloads::Workload;

/// The device of a machine that is plugged in.
pub const DEVICE: &str = "eth0";

/// A switch. Machines may be plugged in at any time; it goes on drop.
#[derive(Debug)]
pub struct Lan {
    switch: Netns,
    ports: Cell<usize>,
}

impl Lan {
    /// # Errors
    /// Not root.
    pub fn new() -> Result<Self> {
        let switch = Netns::new("lan")?;
        switch.ip("link add br0 type bridge forward_delay 0")?;
        switch.ip("link set br0 up")?;
        Ok(Self {
            switch,
            ports: Cell::new(0),
        })
    }

    /// Gives a machine a device with these addresses (with prefix length) on this layer 2.
    ///
    /// # Errors
    /// It has such a device already, or an address is not one.
    pub fn plug(&self, machine: &Machine, addresses: &[&str]) -> Result<()> {
        let port = format!("port{}", self.ports.replace(self.ports.get() + 1));
        let here = End {
            netns: &self.switch,
            device: &port,
            addresses: &[],
        };
        let there = End {
            netns: machine.netns(),
            device: DEVICE,
            addresses,
        };
        link(here, there)?;
        // What forwards between nodes has to pass the strictest filter that distributions set.
        machine
            .netns()
            .set_sysctl("net.ipv4.conf.all.rp_filter", "1")?;
        self.switch.ip(&format!("link set {port} master br0"))?;
        Ok(())
    }
}

/// Where a node is in the cluster.
#[derive(Clone, Debug)]
pub struct Place {
    pub name: String,
    pub addresses: [String; 2],
    pub pod_cidrs: [String; 2],
}

impl Place {
    /// The node with this number, from 1.
    #[must_use]
    pub fn number(name: &str, number: u8) -> Self {
        Self {
            name: format!("{name}{number}"),
            addresses: [
                format!("10.210.0.{}", 10 + number),
                format!("fd00:210::{}", 10 + number),
            ],
            pod_cidrs: [
                format!("10.244.{number}.0/24"),
                format!("fd00:10:244:{number}::/64"),
            ],
        }
    }

    /// Its Node object, as kubelet and controller manager would have it.
    #[must_use]
    pub fn object(&self) -> Value {
        let addresses = self.addresses.iter();
        let addresses: Vec<Value> = addresses
            .map(|it| json!({"type": "InternalIP", "address": it}))
            .collect();
        json!({
            "apiVersion": "v1",
            "kind": "Node",
            "metadata": {"name": self.name},
            "spec": {"podCIDR": self.pod_cidrs[0], "podCIDRs": self.pod_cidrs},
            "status": {"addresses": addresses},
        })
    }

    /// The node's address of a family.
    ///
    /// # Errors
    /// It is not one.
    pub fn address(&self, family: Family) -> Result<IpAddr> {
        let text = match family {
            Family::V4 => &self.addresses[0],
            Family::V6 => &self.addresses[1],
        };
        text.parse().with_context(|| format!("parse {text}"))
    }
}

/// Two nodes of one cluster on one layer 2.
#[derive(Debug)]
pub struct Pair {
    pub nodes: [Node; 2],
    pub places: [Place; 2],
    // What runs on the nodes goes before the wires.
    pub lan: Lan,
}

impl Pair {
    /// Both run and are ready, and know each other.
    ///
    /// # Errors
    /// As of [`Node::start`].
    pub fn start(name: &str) -> Result<Self> {
        let mut pair = Self::prepare(name)?;
        for place in pair.places.clone() {
            pair.declare(&place)?;
        }
        for node in &mut pair.nodes {
            node.start_agent()?;
            node.start_dns()?;
        }
        for node in &mut pair.nodes {
            node.wait_ready()?;
        }
        Ok(pair)
    }

    /// Two machines with their wires; nothing runs, and no Node object is there.
    ///
    /// # Errors
    /// As of [`Node::prepare`].
    pub fn prepare(name: &str) -> Result<Self> {
        let lan = Lan::new()?;
        let places = [Place::number(name, 1), Place::number(name, 2)];
        let node = |place: &Place| -> Result<Node> {
            let node = Node::prepare(NodeOptions {
                pod_cidrs: Vec::new(),
                ..NodeOptions::named(&place.name)
            })?;
            let [v4, v6] = &place.addresses;
            lan.plug(node.machine(), &[&format!("{v4}/24"), &format!("{v6}/64")])?;
            Ok(node)
        };
        let nodes = [node(&places[0])?, node(&places[1])?];
        Ok(Self { nodes, places, lan })
    }

    /// Writes a Node object for both.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn declare(&self, place: &Place) -> Result<()> {
        self.write_manifest(
            &format!("node-{}.yaml", place.name),
            &place.object().to_string(),
        )
    }

    /// Writes a manifest for both.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn write_manifest(&self, file: &str, text: &str) -> Result<()> {
        self.nodes
            .iter()
            .try_for_each(|node| node.write_manifest(file, text))
    }

    /// Runs a pod on one node, and says so to the other as the API server would.
    ///
    /// # Errors
    /// As of [`Node::run_pod`].
    pub fn run_pod(&self, on: usize, workload: Workload) -> Result<Pod> {
        let pod = self.nodes[on].run_pod(workload)?;
        let addresses = pod.addresses.iter();
        let addresses: Vec<Value> = addresses.map(|ip| json!({"ip": ip})).collect();
        let mut object = pod
            .workload
            .manifest(&pod.container_id, &self.places[on].name);
        object["status"] = json!({"phase": "Running", "podIPs": addresses});
        let Workload {
            namespace, name, ..
        } = &pod.workload;
        self.nodes[1 - on].write_manifest(
            &format!("pods/{namespace}.{name}.elsewhere.yaml"),
            &object.to_string(),
        )?;
        Ok(pod)
    }

    /// Starts an echo server in the network of a node itself, on this port of TCP and UDP.
    ///
    /// # Errors
    /// The port cannot be served.
    pub fn serve_on_node(&self, on: usize, port: u16) -> Result<Process> {
        let port = port.to_string();
        let mut echo = self.nodes[on]
            .machine()
            .launch("host-echo", binary("weir-echo"))
            .args([
                "--name",
                &self.places[on].name,
                "--tcp",
                &port,
                "--udp",
                &port,
            ])
            .spawn()?;
        echo.wait_for_log("ready", std::time::Duration::from_secs(10))?;
        Ok(echo)
    }

    /// A port of a node itself.
    ///
    /// # Errors
    /// The node has no such address.
    pub fn on_node(&self, node: usize, family: Family, port: u16) -> Result<SocketAddr> {
        Ok(SocketAddr::new(self.places[node].address(family)?, port))
    }
}
