//! From nodes to routes: where the pods of each node are reached. Whether a next hop is on the link, and
//! what the kernel holds, is not here.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;

use crate::model::Node;

/// The routes that a node should have. Prefixes never overlap.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct RoutePlan {
    pub routes: BTreeMap<IpNet, Route>,
    /// Nodes with a range that no route leads to, and why.
    pub problems: Vec<NodeProblem>,
}

/// Where packets of a prefix go.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Route {
    /// To the pods of another node, which is itself at `via`.
    ToNode { node: Arc<str>, via: IpAddr },
    /// A range of this node's own: each pod has a route of its own, and what none has belongs to nobody.
    /// Without this it would leave by the default route, and may come back.
    Nowhere,
}

/// What keeps a node's pods from being reached, in words.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct NodeProblem {
    pub node: Arc<str>,
    pub reason: String,
}

/// Compiles the routes of the node `here`, whose pods have addresses of `own`. Of two nodes that claim the
/// same addresses, the first by name has them.
pub fn compile<'a>(
    nodes: impl IntoIterator<Item = &'a Node>,
    here: &str,
    own: &[IpNet],
) -> RoutePlan {
    let mut plan = RoutePlan::default();
    for range in own {
        plan.routes.insert(range.trunc(), Route::Nowhere);
    }
    let mut nodes: Vec<&Node> = nodes.into_iter().collect();
    nodes.sort_by(|a, b| a.name.cmp(&b.name));
    let addresses_here: Vec<IpAddr> = nodes
        .iter()
        .filter(|node| *node.name == *here)
        .flat_map(|node| &node.addresses)
        .copied()
        .collect();
    for node in nodes.iter().filter(|node| *node.name != *here) {
        for range in &node.pod_cidrs {
            match route(node, *range, &plan.routes, &addresses_here) {
                Ok(route) => {
                    plan.routes.insert(*range, route);
                }
                Err(reason) => plan.problems.push(NodeProblem {
                    node: node.name.clone(),
                    reason,
                }),
            }
        }
    }
    plan
}

fn route(
    node: &Node,
    range: IpNet,
    others: &BTreeMap<IpNet, Route>,
    addresses_here: &[IpAddr],
) -> Result<Route, String> {
    let name = &node.name;
    let of_family = |ip: &&IpAddr| ip.is_ipv4() == range.addr().is_ipv4();
    let via = *node
        .internal
        .iter()
        .find(of_family)
        .ok_or_else(|| format!("node {name} has no InternalIP of the family of {range}"))?;
    let nodes = addresses_here.iter().chain([&via]);
    if let Some(covered) = nodes.into_iter().find(|ip| range.contains(*ip)) {
        return Err(format!(
            "the pod CIDR {range} of node {name} covers {covered}, which is a node's"
        ));
    }
    if let Some((other, route)) = overlapping(range, others) {
        let whose = match route {
            Route::ToNode { node, .. } => format!("{other} of node {node}"),
            Route::Nowhere => format!("{other} of this node"),
        };
        return Err(format!(
            "the pod CIDR {range} of node {name} overlaps with {whose}"
        ));
    }
    Ok(Route::ToNode {
        node: name.clone(),
        via,
    })
}

/// In prefixes that do not overlap, one that contains `range` is the last before it, and one that it
/// contains is the first behind it.
fn overlapping(range: IpNet, others: &BTreeMap<IpNet, Route>) -> Option<(&IpNet, &Route)> {
    let before = others.range(..=range).next_back();
    let behind = others.range(range..).next();
    before
        .filter(|(other, _)| other.contains(&range))
        .or(behind.filter(|(other, _)| range.contains(*other)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Labels;

    fn node((name, internal, ranges): &(&str, &[&str], &[&str])) -> Node {
        let internal: Vec<IpAddr> = internal.iter().map(|it| it.parse().unwrap()).collect();
        Node {
            name: (*name).into(),
            labels: Labels::new(),
            addresses: internal.clone(),
            internal,
            pod_cidrs: ranges.iter().map(|it| it.parse().unwrap()).collect(),
            network: Default::default(),
        }
    }

    /// The routes and problems of node `a` in words.
    fn planned(own: &[&str], nodes: &[(&str, &[&str], &[&str])]) -> (Vec<String>, Vec<String>) {
        let nodes: Vec<Node> = nodes.iter().map(node).collect();
        let own: Vec<IpNet> = own.iter().map(|it| it.parse().unwrap()).collect();
        let plan = compile(&nodes, "a", &own);
        let words = |(range, route): (&IpNet, &Route)| match route {
            Route::ToNode { node, via } => format!("{range} via {via} ({node})"),
            Route::Nowhere => format!("{range} nowhere"),
        };
        let problems = plan.problems.into_iter().map(|it| it.reason);
        (plan.routes.iter().map(words).collect(), problems.collect())
    }

    #[test]
    fn each_range_of_another_node_leads_to_its_address_of_that_family() {
        type Case<'a> = (
            &'a str,
            &'a [&'a str],
            &'a [(&'a str, &'a [&'a str], &'a [&'a str])],
            &'a [&'a str],
            &'a [&'a str],
        );
        let cases: &[Case<'_>] = &[
            ("nobody", &[], &[], &[], &[]),
            (
                "both families, and this node's ranges lead nowhere",
                &["10.244.1.0/24", "fd00:1::/64"],
                &[
                    (
                        "b",
                        &["10.0.0.2", "fd01::2"],
                        &["10.244.2.0/24", "fd00:2::/64"],
                    ),
                    (
                        "a",
                        &["10.0.0.1", "fd01::1"],
                        &["10.244.1.0/24", "fd00:1::/64"],
                    ),
                ],
                &[
                    "10.244.1.0/24 nowhere",
                    "10.244.2.0/24 via 10.0.0.2 (b)",
                    "fd00:1::/64 nowhere",
                    "fd00:2::/64 via fd01::2 (b)",
                ],
                &[],
            ),
            (
                "this node's Node has other ranges than it serves",
                &["10.244.1.0/24"],
                &[("a", &["10.0.0.1"], &["10.244.9.0/24"])],
                &["10.244.1.0/24 nowhere"],
                &[],
            ),
            (
                "a node without a range yet, and one without an address of its range's family",
                &[],
                &[
                    ("b", &["10.0.0.2"], &[]),
                    ("c", &["10.0.0.3"], &["10.244.3.0/24", "fd00:3::/64"]),
                ],
                &["10.244.3.0/24 via 10.0.0.3 (c)"],
                &["node c has no InternalIP of the family of fd00:3::/64"],
            ),
            (
                "claimed twice: the first by name, whatever the order",
                &[],
                &[
                    ("c", &["10.0.0.3"], &["10.244.2.0/24"]),
                    ("b", &["10.0.0.2"], &["10.244.2.0/24"]),
                ],
                &["10.244.2.0/24 via 10.0.0.2 (b)"],
                &["the pod CIDR 10.244.2.0/24 of node c overlaps with 10.244.2.0/24 of node b"],
            ),
            (
                "larger and smaller than another's",
                &["10.244.1.0/24"],
                &[
                    ("b", &["10.0.0.2"], &["10.244.2.0/24"]),
                    ("c", &["10.0.0.3"], &["10.244.2.128/25"]),
                    ("d", &["10.0.0.4"], &["10.244.0.0/16"]),
                    ("e", &["10.0.0.5"], &["10.244.1.0/26"]),
                ],
                &["10.244.1.0/24 nowhere", "10.244.2.0/24 via 10.0.0.2 (b)"],
                &[
                    "the pod CIDR 10.244.2.128/25 of node c overlaps with 10.244.2.0/24 of node b",
                    "the pod CIDR 10.244.0.0/16 of node d overlaps with 10.244.1.0/24 of this node",
                    "the pod CIDR 10.244.1.0/26 of node e overlaps with 10.244.1.0/24 of this node",
                ],
            ),
            (
                "a range never takes the nodes' own addresses",
                &[],
                &[
                    ("a", &["10.0.0.1"], &[]),
                    ("b", &["10.1.0.2"], &["10.0.0.0/24"]),
                    ("c", &["10.2.0.3"], &["10.2.0.0/16"]),
                    ("d", &["10.2.0.4"], &["0.0.0.0/0"]),
                ],
                &[],
                &[
                    "the pod CIDR 10.0.0.0/24 of node b covers 10.0.0.1, which is a node's",
                    "the pod CIDR 10.2.0.0/16 of node c covers 10.2.0.3, which is a node's",
                    "the pod CIDR 0.0.0.0/0 of node d covers 10.0.0.1, which is a node's",
                ],
            ),
        ];
        for (what, own, nodes, routes, problems) in cases {
            let (found, said) = planned(own, nodes);
            assert_eq!(found, *routes, "{what}");
            assert_eq!(said, *problems, "{what}");
        }
    }
}
