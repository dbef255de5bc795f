//! Which devices lead out of the node, with which addresses traffic leaves there, and which addresses
//! belong to the cluster, so that a pod meets them as itself.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;
use weir_common::nat::Uplink;
use weir_common::{Addr, Prefix};

use super::prefix::prefix;
use crate::model::Snapshot;

/// A device of the node that could lead out of it: Ethernet, neither loopback nor a pod's.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Outlet {
    pub name: String,
    pub ifindex: u32,
    /// In the order of preference, none of them link-local.
    pub addresses: Vec<IpAddr>,
    pub routes: Routes,
}

/// What is routed over a device.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Routes {
    /// Everything that has no other route, in at least one family.
    Default,
    Some,
}

/// The uplinks among the outlets, by interface index: those with these names if there are names, else
/// those that carry a default route or one of the node's own addresses.
pub fn uplinks(
    outlets: &[Outlet],
    own: &[IpAddr],
    names: &[String],
) -> BTreeMap<u32, (String, Uplink)> {
    let is_uplink = |outlet: &&Outlet| {
        if names.is_empty() {
            outlet.routes == Routes::Default || outlet.addresses.iter().any(|ip| own.contains(ip))
        } else {
            names.contains(&outlet.name)
        }
    };
    let row = |outlet: &Outlet| {
        let of_family = |is_v4: bool| {
            let fits = |ip: &&IpAddr| ip.is_ipv4() == is_v4;
            let announced = outlet.addresses.iter().filter(|ip| own.contains(ip));
            let mut choice = announced.chain(&outlet.addresses).chain(own).filter(fits);
            choice.next().map_or(Addr::ABSENT, |ip| (*ip).into())
        };
        let row = Uplink {
            ipv4: of_family(true),
            ipv6: of_family(false),
        };
        (outlet.ifindex, (outlet.name.clone(), row))
    };
    outlets.iter().filter(is_uplink).map(row).collect()
}

/// What belongs to the cluster: the pods of every node, and the nodes. `ranges` and `addresses` are this
/// node's own, which it knows before any object says so.
pub fn cluster(snapshot: &Snapshot, ranges: &[IpNet], addresses: &[IpAddr]) -> BTreeSet<Prefix> {
    let nodes = || snapshot.nodes.values();
    let ranges = nodes().flat_map(|node| &node.pod_cidrs).chain(ranges);
    let addresses = nodes().flat_map(|node| &node.addresses).chain(addresses);
    let ranges = ranges.copied();
    let addresses = addresses.map(|ip| IpNet::from(*ip));
    let all = ranges.chain(addresses);
    all.map(|range| prefix(&range)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ips(all: &[&str]) -> Vec<IpAddr> {
        all.iter().map(|ip| ip.parse().unwrap()).collect()
    }

    fn outlet(name: &str, ifindex: u32, addresses: &[&str], routes: Routes) -> Outlet {
        Outlet {
            name: name.into(),
            ifindex,
            addresses: ips(addresses),
            routes,
        }
    }

    #[test]
    fn uplinks_are_those_with_a_default_route_or_an_address_of_the_node_or_a_name() {
        let outlets = [
            outlet("eth0", 2, &["192.0.2.7", "192.0.2.9"], Routes::Some),
            outlet("eth1", 3, &["198.51.100.1", "2001:db8::1"], Routes::Default),
            outlet("docker0", 4, &["172.17.0.1"], Routes::Some),
        ];
        let own = ips(&["192.0.2.9"]);
        type Case<'a> = (&'a [&'a str], &'a [(u32, &'a str, Option<&'a str>)]);
        let cases: [Case<'_>; 3] = [
            // Of two addresses the one that the node is known by; without one of its own, that one.
            (
                &[],
                &[
                    (2, "192.0.2.9", None),
                    (3, "198.51.100.1", Some("2001:db8::1")),
                ],
            ),
            (&["docker0"], &[(4, "172.17.0.1", None)]),
            (&["eth7"], &[]),
        ];
        for (names, expected) in cases {
            let names: Vec<String> = names.iter().map(ToString::to_string).collect();
            let found: Vec<_> = uplinks(&outlets, &own, &names)
                .into_iter()
                .map(|(index, (_, row))| (index, row.ipv4, row.ipv6))
                .collect();
            let addr = |ip: &str| Addr::from(ip.parse::<IpAddr>().unwrap());
            let expected: Vec<_> = expected
                .iter()
                .map(|(index, v4, v6)| (*index, addr(v4), v6.map_or(Addr::ABSENT, addr)))
                .collect();
            assert_eq!(found, expected, "{names:?}");
        }
    }

    #[test]
    fn an_ipv4_range_is_one_of_mapped_addresses() {
        let range = prefix(&"10.1.2.0/24".parse().unwrap());
        assert_eq!(range.prefix_len, 120);
        assert_eq!(range.addr, Addr::v4([10, 1, 2, 0]));
        let range = prefix(&"fd00:1::/64".parse().unwrap());
        assert_eq!(range.prefix_len, 64);
    }
}
