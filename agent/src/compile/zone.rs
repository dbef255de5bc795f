//! A Service and its EndpointSlices as the names of cluster DNS. Which records follow from them is
//! `weir_dns::zone`.

use std::sync::Arc;

use weir_common::Protocol;
use weir_dns::zone::{
    EndpointSet, PortProtocol, ServiceKind as ZoneKind, ServiceName, ZoneEndpoint, ZonePort,
    ZoneService,
};

use crate::model::{EndpointSlice, ObjectName, Service, ServiceKind};

/// The service as the zone knows it. An endpoint has a name while its slice says that it is ready,
/// and the slice's controller says so of all when `publishNotReadyAddresses` is set (discovery/v1).
/// Ports without a name have none in DNS either.
pub fn zone_service<'a>(
    service: &Service,
    slices: impl IntoIterator<Item = &'a Arc<EndpointSlice>>,
) -> ZoneService {
    let kind = match &service.kind {
        ServiceKind::ClusterIp(addresses) => ZoneKind::ClusterIp {
            addresses: addresses.clone(),
            ports: service
                .ports
                .iter()
                .filter_map(|port| named(port.name.as_ref(), port.protocol, port.port))
                .collect(),
        },
        ServiceKind::Headless => ZoneKind::Headless {
            sets: slices.into_iter().filter_map(|s| endpoint_set(s)).collect(),
        },
        ServiceKind::ExternalName(target) => ZoneKind::ExternalName {
            target: target.clone(),
        },
    };
    ZoneService {
        name: Arc::new(zone_name(&service.id)),
        kind,
    }
}

/// The name of a service in the zone.
pub fn zone_name(id: &ObjectName) -> ServiceName {
    ServiceName {
        namespace: id.namespace.clone(),
        name: id.name.clone(),
    }
}

fn endpoint_set(slice: &EndpointSlice) -> Option<EndpointSet> {
    let endpoints: Vec<_> = slice
        .endpoints
        .iter()
        .filter(|endpoint| endpoint.conditions.ready)
        .map(|endpoint| ZoneEndpoint {
            address: endpoint.address,
            hostname: endpoint.hostname.clone().filter(|name| !name.is_empty()),
        })
        .collect();
    if endpoints.is_empty() {
        return None;
    }
    let ports = slice
        .ports
        .iter()
        .filter_map(|port| named(port.name.as_ref(), port.protocol, port.port?))
        .collect();
    Some(EndpointSet { ports, endpoints })
}

fn named(name: Option<&Arc<str>>, protocol: Protocol, port: u16) -> Option<ZonePort> {
    let name = name.filter(|name| !name.is_empty())?.clone();
    let protocol = match protocol {
        Protocol::TCP => PortProtocol::Tcp,
        Protocol::UDP => PortProtocol::Udp,
        Protocol::SCTP => PortProtocol::Sctp,
        _ => return None,
    };
    Some(ZonePort {
        name,
        protocol,
        port,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{
        Conditions, Endpoint, External, Family, NotReady, Proxying, ServicePort, SlicePort,
        TargetPort, TrafficPolicy,
    };

    fn service(kind: ServiceKind, ports: &[(Option<&str>, Protocol, u16)]) -> Service {
        Service {
            id: ObjectName::new("default", "web"),
            created: None,
            kind,
            ports: ports
                .iter()
                .map(|(name, protocol, port)| ServicePort {
                    name: name.map(Into::into),
                    protocol: *protocol,
                    port: *port,
                    target: TargetPort::Number(8080),
                    node_port: None,
                })
                .collect(),
            selector: None,
            affinity: None,
            internal_traffic_policy: TrafficPolicy::Cluster,
            external: External::default(),
            not_ready: NotReady::Hidden,
            proxying: Proxying::Here,
        }
    }

    fn slice(
        name: &str,
        family: Family,
        endpoints: &[(&str, Option<&str>, bool)],
        ports: &[(Option<&str>, Option<u16>)],
    ) -> Arc<EndpointSlice> {
        Arc::new(EndpointSlice {
            id: ObjectName::new("default", name),
            service: Some(ObjectName::new("default", "web")),
            family,
            endpoints: endpoints
                .iter()
                .map(|(address, hostname, ready)| Endpoint {
                    address: address.parse().unwrap(),
                    conditions: Conditions {
                        ready: *ready,
                        serving: true,
                        terminating: false,
                    },
                    hostname: hostname.map(Into::into),
                    node: None,
                    zone: None,
                    pod: None,
                })
                .collect(),
            ports: ports
                .iter()
                .map(|(name, port)| SlicePort {
                    name: name.map(Into::into),
                    protocol: Protocol::TCP,
                    port: *port,
                })
                .collect(),
        })
    }

    fn shown(kind: &ZoneKind) -> String {
        match kind {
            ZoneKind::ClusterIp { addresses, ports } => {
                format!("cluster {addresses:?} {}", ports_shown(ports))
            }
            ZoneKind::ExternalName { target } => format!("external {target}"),
            ZoneKind::Headless { sets } => sets.iter().fold("headless".to_owned(), |text, set| {
                let endpoints: Vec<_> = set
                    .endpoints
                    .iter()
                    .map(|e| format!("{}={}", e.hostname.as_deref().unwrap_or("-"), e.address))
                    .collect();
                format!("{text} {} {}", endpoints.join(","), ports_shown(&set.ports))
            }),
        }
    }

    fn ports_shown(ports: &[ZonePort]) -> String {
        let ports: Vec<_> = ports
            .iter()
            .map(|p| format!("{}{}={}", p.name, p.protocol.label(), p.port))
            .collect();
        format!("[{}]", ports.join(","))
    }

    #[test]
    fn a_service_becomes_its_names() {
        let v4 = || "10.96.0.1".parse().unwrap();
        let v6 = || "fd00::1".parse().unwrap();
        let ready = slice(
            "a",
            Family::V4,
            &[
                ("10.0.0.1", Some("web-0"), true),
                ("10.0.0.2", Some("web-1"), false),
                ("10.0.0.3", Some(""), true),
            ],
            &[
                (Some("http"), Some(8080)),
                (Some("any"), None),
                (Some(""), Some(1)),
            ],
        );
        let six = slice(
            "b",
            Family::V6,
            &[("fd00::5", None, true)],
            &[(None, Some(8080))],
        );
        let nobody = slice("c", Family::V4, &[("10.0.0.9", None, false)], &[]);
        let table = [
            (
                "unnamed ports have no record",
                service(
                    ServiceKind::ClusterIp(vec![v4()]),
                    &[(None, Protocol::TCP, 80), (Some(""), Protocol::TCP, 81)],
                ),
                vec![],
                "cluster [10.96.0.1] []",
            ),
            (
                "both families and every named port",
                service(
                    ServiceKind::ClusterIp(vec![v4(), v6()]),
                    &[
                        (Some("http"), Protocol::TCP, 80),
                        (Some("dns"), Protocol::UDP, 53),
                    ],
                ),
                vec![ready.clone()],
                "cluster [10.96.0.1, fd00::1] [http_tcp=80,dns_udp=53]",
            ),
            (
                "no address yet",
                service(ServiceKind::ClusterIp(vec![]), &[]),
                vec![],
                "cluster [] []",
            ),
            (
                "headless: ready endpoints, by slice, with the ports of the pods",
                service(ServiceKind::Headless, &[(Some("http"), Protocol::TCP, 80)]),
                vec![ready, six],
                "headless web-0=10.0.0.1,-=10.0.0.3 [http_tcp=8080] -=fd00::5 []",
            ),
            (
                "headless with nobody ready",
                service(ServiceKind::Headless, &[]),
                vec![nobody],
                "headless",
            ),
            (
                "external",
                service(
                    ServiceKind::ExternalName("db.example.com".into()),
                    &[(Some("x"), Protocol::TCP, 1)],
                ),
                vec![],
                "external db.example.com",
            ),
        ];
        for (name, service, slices, expected) in table {
            let zone = zone_service(&service, &slices);
            assert_eq!(*zone.name, ServiceName::new("default", "web"), "{name}");
            assert_eq!(shown(&zone.kind), expected, "{name}");
        }
    }
}
