//! The wires of a cluster: a namespace per node, and one that is the switch between them and the
//! world outside. No device ever appears in the machine's own namespace.

use std::mem::ManuallyDrop;
use std::path::Path;

use anyhow::Result;

use super::place::{FABRIC_BITS, Node, OUTSIDE, Place};
use crate::netns::{self, DIR, End, Netns, link};

const SWITCH: &str = "fabric";
/// A node's device.
pub(super) const DEVICE: &str = "eth0";

/// Makes the switch. Its bridge has the address of the world outside.
///
/// # Errors
/// The namespace is there already, or `ip` refuses.
pub(super) fn create(place: &Place) -> Result<()> {
    let switch = ManuallyDrop::new(Netns::named(place.switch())?);
    switch.ip(&format!("link add {SWITCH} type bridge"))?;
    for (address, bits) in OUTSIDE.iter().zip(FABRIC_BITS) {
        let nodad = if address.is_ipv6() { "nodad" } else { "" };
        switch.ip(&format!("addr add {address}/{bits} dev {SWITCH} {nodad}"))?;
    }
    switch.ip(&format!("link set {SWITCH} up")).map(drop)
}

/// Makes a node's namespace and plugs it in.
///
/// # Errors
/// As [`create`].
pub(super) fn attach(place: &Place, node: Node) -> Result<()> {
    let netns = ManuallyDrop::new(Netns::named(place.netns(node))?);
    let switch = Netns::existing(place.switch());
    let addresses = node.addresses();
    let addresses: Vec<String> = addresses
        .iter()
        .zip(FABRIC_BITS)
        .map(|(address, bits)| format!("{address}/{bits}"))
        .collect();
    let addresses: Vec<&str> = addresses.iter().map(String::as_str).collect();
    let port = node.name();
    link(
        End {
            netns: &switch,
            device: &port,
            addresses: &[],
        },
        End {
            netns: &netns,
            device: DEVICE,
            addresses: &addresses,
        },
    )?;
    switch.ip(&format!("link set {port} master {SWITCH}"))?;
    // The route of a Service's address is looked up before its NAT: there must be one.
    OUTSIDE
        .iter()
        .try_for_each(|outside| netns.add_route("default", *outside))?;
    for key in ["net.ipv4.ip_forward", "net.ipv6.conf.all.forwarding"] {
        netns.set_sysctl(key, "1")?;
    }
    Ok(())
}

/// Removes every namespace of the cluster. Absent is success.
///
/// # Errors
/// `ip` refuses.
pub(super) fn remove(place: &Place, nodes: u8) -> Result<()> {
    let of_nodes = Node::all(nodes).map(|node| place.netns(node));
    of_nodes
        .chain([place.switch()])
        .try_for_each(|name| netns::remove(&Path::new(DIR).join(name)))
}
