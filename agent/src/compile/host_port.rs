//! The host ports of a pod: addresses of its node behind which the pod alone stands, as long as it has
//! its address. For the pod's own node only.

use weir_common::service::{FrontendFlags, FrontendKey, Scope};

use super::{BackendAddr, FrontendPlan, Owner, ServicePlan, Way};
use crate::model::{Family, Pod, PodNetwork, PodPhase};

/// The frontends of the host ports of `pod`, which runs on this node; `None` if it has none. Its addresses
/// are those of its lease, so a host port leads to it as soon as it has a network.
///
/// A `hostIP` that is not an address of the node leads nowhere: the programs look it up in `NODES`.
pub fn compile(pod: &Pod) -> Option<ServicePlan> {
    if pod.network == PodNetwork::Host || pod.phase == PodPhase::Finished {
        return None;
    }
    let mut frontends = Vec::new();
    for port in &pod.ports {
        let Some(host) = &port.host else {
            continue;
        };
        for address in &pod.addresses {
            let at = match host.address {
                Some(at) if Family::of(&at) != Family::of(address) => continue,
                at => at,
            };
            for scope in [Scope::INTERNAL, Scope::EXTERNAL] {
                let key = FrontendKey {
                    addr: at.unwrap_or(*address).into(),
                    port: host.port.into(),
                    protocol: port.protocol,
                    scope,
                    pad: [0; 4],
                };
                frontends.push(FrontendPlan {
                    key: if at.is_some() { key } else { key.of_nodes() },
                    way: Way::HostPort,
                    port: host.port.into(),
                    backends: vec![BackendAddr {
                        addr: (*address).into(),
                        port: port.port.into(),
                    }],
                    affinity: 0,
                    flags: FrontendFlags::OWN_NODE_ONLY,
                });
            }
        }
    }
    frontends.sort_by_key(|f| f.key);
    frontends.dedup_by_key(|f| f.key);
    (!frontends.is_empty()).then(|| ServicePlan {
        id: Owner::HostPorts(pod.id.clone()),
        created: None,
        frontends,
        draining: Vec::new(),
        reports: Vec::new(),
    })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::net::IpAddr;

    use weir_common::{Addr, Protocol};

    use super::*;
    use crate::model::{ContainerPort, HostPort, ObjectName};

    fn pod(ports: &[(u16, Protocol, u16, Option<&str>)], addresses: &[&str]) -> Pod {
        Pod {
            id: ObjectName::new("default", "web"),
            uid: "1".into(),
            static_uid: None,
            labels: BTreeMap::new(),
            node: Some("here".into()),
            addresses: addresses.iter().map(|a| a.parse().unwrap()).collect(),
            network: PodNetwork::Own,
            phase: PodPhase::Running,
            ready: true,
            hostname: None,
            subdomain: None,
            ports: ports
                .iter()
                .map(|(port, protocol, host, at)| ContainerPort {
                    name: None,
                    protocol: *protocol,
                    port: *port,
                    host: Some(HostPort {
                        port: *host,
                        address: at.map(|a| a.parse().unwrap()),
                    }),
                })
                .collect(),
        }
    }

    /// `address:port/protocol -> backend`, for clients inside.
    fn rows(pod: &Pod) -> Vec<String> {
        let plan = compile(pod).map(|plan| plan.frontends).unwrap_or_default();
        let inside = plan.iter().filter(|f| f.key.scope.0 & 1 == 0);
        inside
            .map(|f| {
                assert_eq!(f.flags, FrontendFlags::OWN_NODE_ONLY);
                assert_eq!(f.backends.len(), 1);
                let (addr, to) = (IpAddr::from(f.key.addr), IpAddr::from(f.backends[0].addr));
                let any = if f.key.scope.is_of_nodes() {
                    "any "
                } else {
                    ""
                };
                format!(
                    "{any}{addr} {}/{} -> {to} {}",
                    u16::from(f.key.port),
                    f.key.protocol.0,
                    u16::from(f.backends[0].port)
                )
            })
            .collect()
    }

    #[test]
    fn a_host_port_leads_to_its_pod_in_the_families_that_both_have() {
        let both = ["10.0.0.7", "fd00::7"];
        type Case<'a> = (&'a str, Option<&'a str>, &'a [&'a str], &'a [&'a str]);
        let cases: [Case<'_>; 5] = [
            (
                "no address means all",
                None,
                &both,
                &[
                    "any :: 9000/6 -> fd00::7 80",
                    "any 0.0.0.0 9000/6 -> 10.0.0.7 80",
                ],
            ),
            (
                "an address means itself",
                Some("192.0.2.1"),
                &both,
                &["192.0.2.1 9000/6 -> 10.0.0.7 80"],
            ),
            (
                "loopback is an address",
                Some("127.0.0.1"),
                &both,
                &["127.0.0.1 9000/6 -> 10.0.0.7 80"],
            ),
            (
                "the other family leads nowhere",
                Some("2001:db8::1"),
                &both[..1],
                &[],
            ),
            ("no address yet, no host port", None, &[], &[]),
        ];
        for (name, at, addresses, wanted) in cases {
            let pod = pod(&[(80, Protocol::TCP, 9000, at)], addresses);
            assert_eq!(rows(&pod), wanted, "{name}");
        }
    }

    #[test]
    fn protocols_and_addresses_tell_equal_host_ports_apart() {
        let pod = pod(
            &[
                (80, Protocol::TCP, 9000, Some("127.0.0.1")),
                (80, Protocol::TCP, 9000, Some("192.0.2.1")),
                (53, Protocol::UDP, 9000, Some("192.0.2.1")),
            ],
            &["10.0.0.7"],
        );
        assert_eq!(
            rows(&pod),
            [
                "127.0.0.1 9000/6 -> 10.0.0.7 80",
                "192.0.2.1 9000/6 -> 10.0.0.7 80",
                "192.0.2.1 9000/17 -> 10.0.0.7 53",
            ]
        );
        let outside = compile(&pod).unwrap();
        assert!(outside.frontends.iter().any(|f| f.key
            == FrontendKey {
                addr: Addr::v4([192, 0, 2, 1]),
                port: 9000.into(),
                protocol: Protocol::UDP,
                scope: Scope::EXTERNAL,
                pad: [0; 4],
            }));
    }

    #[test]
    fn pods_in_the_nodes_network_and_finished_pods_have_none() {
        let running = pod(&[(80, Protocol::TCP, 9000, None)], &["10.0.0.7"]);
        assert!(compile(&running).is_some());
        let host = Pod {
            network: PodNetwork::Host,
            ..running.clone()
        };
        assert_eq!(compile(&host), None);
        let finished = Pod {
            phase: PodPhase::Finished,
            ..running
        };
        assert_eq!(compile(&finished), None);
    }
}
