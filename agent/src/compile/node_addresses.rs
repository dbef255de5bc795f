//! Which addresses are those of nodes, at which node ports and host ports are reached.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use weir_common::Addr;
use weir_common::service::{NodeAddress, NodeFlags};

use crate::model::Node;

/// Rows of `NODES`. `addresses` are those that this node's devices have: kube-proxy answers node ports at
/// all of them, at loopback for the node's own processes, and so do we. `dns` are those at which weir-dns answers:
/// the devices have them too, and nothing else is answered there.
pub fn compile<'a>(
    nodes: impl IntoIterator<Item = &'a Arc<Node>>,
    own_name: &str,
    addresses: &[IpAddr],
    dns: &[IpAddr],
) -> BTreeMap<Addr, NodeAddress> {
    let own = NodeAddress {
        flags: NodeFlags::OWN,
    };
    let mut rows = BTreeMap::new();
    let mut own_addresses = vec![
        IpAddr::V4(Ipv4Addr::LOCALHOST),
        IpAddr::V6(Ipv6Addr::LOCALHOST),
    ];
    own_addresses.extend(
        addresses
            .iter()
            .filter(|ip| !is_link_local(ip) && !dns.contains(ip)),
    );
    for node in nodes {
        if *node.name == *own_name {
            own_addresses.extend(&node.addresses);
        } else {
            let others = node.addresses.iter();
            rows.extend(others.map(|ip| (Addr::from(*ip), NodeAddress::default())));
        }
    }
    rows.extend(own_addresses.into_iter().map(|ip| (Addr::from(ip), own)));
    rows
}

/// Means another machine on every link.
fn is_link_local(ip: &IpAddr) -> bool {
    match ip {
        IpAddr::V4(v4) => v4.is_link_local(),
        IpAddr::V6(v6) => v6.is_unicast_link_local(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_knows_its_own_addresses_from_those_of_others() {
        let node = |name: &str, addresses: &[&str]| {
            Arc::new(Node {
                name: name.into(),
                labels: BTreeMap::new(),
                addresses: addresses.iter().map(|a| a.parse().unwrap()).collect(),
                internal: Vec::new(),
                pod_cidrs: Vec::new(),
                network: Default::default(),
            })
        };
        let nodes = [
            node("here", &["192.0.2.1", "203.0.113.1"]),
            // Claims an address that is not its own.
            node("there", &["192.0.2.2", "2001:db8::2", "192.0.2.1"]),
        ];
        let devices = [
            "192.0.2.1",
            "172.17.0.1",
            "fe80::1",
            "169.254.20.10",
            "fd02::10",
        ];
        let devices: Vec<IpAddr> = devices.iter().map(|a| a.parse().unwrap()).collect();
        let dns: Vec<IpAddr> = ["169.254.20.10", "fd02::10"]
            .map(|a| a.parse().unwrap())
            .into();
        let rows = compile(&nodes, "here", &devices, &dns);
        let rows: Vec<(String, u32)> = rows
            .into_iter()
            .map(|(addr, row)| (IpAddr::from(addr).to_string(), row.flags))
            .collect();
        let wanted = [
            ("::1", 1),
            ("127.0.0.1", 1),
            ("172.17.0.1", 1),
            ("192.0.2.1", 1),
            ("192.0.2.2", 0),
            ("203.0.113.1", 1),
            ("2001:db8::2", 0),
        ];
        assert_eq!(rows, wanted.map(|(a, f)| (a.to_owned(), f)));
    }
}
