//! Service.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use super::{
    Converted, Invalid, Problem, cidr, created, id, labels, optional, port, protocol, unicast,
};
use crate::model::{
    External, Family, NotReady, Object, Proxying, Service, ServiceKind, ServicePort, Sources,
    TargetPort, TrafficPolicy,
};
use crate::watch::wire::{self, IntOrString};

/// `sessionAffinityConfig.clientIP.timeoutSeconds` when it is absent (core/v1).
const AFFINITY_DEFAULT: i64 = 10_800;
/// Its maximum: a day.
const AFFINITY_MAX: i64 = 86_400;

/// Which families somebody asks addresses of (`ipFamilyPolicy`, `ipFamilies`).
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct FamilyRequest {
    pub policy: FamilyPolicy,
    /// In the order of preference; empty to take the cluster's.
    pub families: Vec<Family>,
}

/// `ipFamilyPolicy`.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum FamilyPolicy {
    Single,
    PreferDual,
    RequireDual,
}

/// A Service. A bad external address is left out.
pub fn service(wire: wire::Service) -> Result<Converted, Invalid> {
    let (meta, spec) = (wire.metadata, wire.spec);
    let id = id(&meta)?;
    let kind = kind(&spec)?;
    let mut problems = Vec::new();
    let sources = sources(&spec, &meta.annotations, &mut problems);
    let external = External {
        sources,
        ..external(&spec, wire.status, &mut problems)?
    };
    let has_node_ports = has_node_ports(&spec);
    let mut seen = BTreeSet::new();
    let ports = spec
        .ports
        .into_iter()
        .enumerate()
        .map(|(i, p)| {
            let mut port = service_port(p).map_err(|e| format!("spec.ports[{i}]: {e}"))?;
            port.node_port = port.node_port.filter(|_| has_node_ports);
            if !seen.insert((port.protocol, port.port)) {
                return Err(format!(
                    "spec.ports[{i}]: port {} is there twice with the same protocol",
                    port.port
                ));
            }
            Ok(port)
        })
        .collect::<Result<Vec<_>, String>>()?;
    let affinity = match spec.session_affinity.as_deref() {
        None | Some("" | "None") => None,
        Some("ClientIP") => Some(affinity(spec.session_affinity_config)?),
        Some(other) => return Err(format!("spec.sessionAffinity: unknown {other:?}").into()),
    };
    let internal_traffic_policy = traffic_policy(
        "spec.internalTrafficPolicy",
        spec.internal_traffic_policy.as_deref(),
    )?;
    let proxying = if meta
        .labels
        .contains_key("service.kubernetes.io/service-proxy-name")
        || meta.labels.contains_key("service.kubernetes.io/headless")
    {
        Proxying::Elsewhere
    } else {
        Proxying::Here
    };
    let object = Object::Service(Arc::new(Service {
        id,
        created: created(&meta),
        kind,
        ports,
        // An empty selector selects nothing, which is what no selector does (core/v1).
        selector: spec.selector.filter(|s| !s.is_empty()).map(labels),
        affinity,
        internal_traffic_policy,
        external,
        not_ready: if spec.publish_not_ready_addresses == Some(true) {
            NotReady::Published
        } else {
            NotReady::Hidden
        },
        proxying,
    }));
    Ok(Converted {
        object: Some(object),
        problems,
    })
}

/// Types that have node ports. The API server clears the numbers when a Service becomes another.
fn has_node_ports(spec: &wire::ServiceSpec) -> bool {
    matches!(spec.kind.as_deref(), Some("NodePort" | "LoadBalancer"))
}

/// Only a LoadBalancer may have ranges. The annotation counts where the field is empty, as it does for who makes the
/// load balancer (k8s.io/cloud-provider/service/helpers).
fn sources(
    spec: &wire::ServiceSpec,
    annotations: &wire::Annotations,
    problems: &mut Vec<Problem>,
) -> Sources {
    let annotation = annotations
        .source_ranges
        .as_deref()
        .unwrap_or_default()
        .trim();
    let texts: Vec<&str> = match spec.load_balancer_source_ranges.as_slice() {
        [] if annotation.is_empty() => return Sources::Everybody,
        [] => annotation.split(',').collect(),
        ranges => ranges.iter().map(String::as_str).collect(),
    };
    if spec.kind.as_deref() != Some("LoadBalancer") {
        return Sources::Everybody;
    }
    let mut ranges = Vec::with_capacity(texts.len());
    for (i, text) in texts.into_iter().enumerate() {
        match cidr(text.trim()) {
            Ok(range) => ranges.push(range),
            Err(reason) => problems.push(Problem {
                part: format!("load balancer source range {i}"),
                reason,
            }),
        }
    }
    Sources::In(ranges)
}

fn traffic_policy(field: &str, text: Option<&str>) -> Result<TrafficPolicy, String> {
    match text {
        None | Some("" | "Cluster") => Ok(TrafficPolicy::Cluster),
        Some("Local") => Ok(TrafficPolicy::Local),
        Some(other) => Err(format!("{field}: unknown {other:?}")),
    }
}

fn external(
    spec: &wire::ServiceSpec,
    status: wire::ServiceStatus,
    problems: &mut Vec<Problem>,
) -> Result<External, String> {
    let mut read = |what: &str, texts: Vec<&String>| -> Vec<IpAddr> {
        let mut addresses = Vec::with_capacity(texts.len());
        for (i, text) in texts.into_iter().enumerate() {
            match unicast(text) {
                Ok(ip) => addresses.push(ip),
                Err(reason) => problems.push(Problem {
                    part: format!("{what} {i}"),
                    reason,
                }),
            }
        }
        addresses
    };
    // An absent mode is VIP (core/v1 types.go).
    let ingress = status.load_balancer.ingress;
    let virtual_ips = ingress
        .iter()
        .filter(|at| at.ip_mode.as_deref() != Some("Proxy"))
        .filter_map(|at| at.ip.as_ref())
        .filter(|text| !text.is_empty() && spec.kind.as_deref() == Some("LoadBalancer"));
    Ok(External {
        traffic_policy: traffic_policy(
            "spec.externalTrafficPolicy",
            spec.external_traffic_policy.as_deref(),
        )?,
        sources: Sources::Everybody,
        load_balancer: read("load balancer address", virtual_ips.collect()),
        addresses: read("external IP", spec.external_ips.iter().collect()),
    })
}

/// The families that a Service asks for, of `spec`.
pub fn family_request(wire: &wire::Families) -> Result<FamilyRequest, String> {
    let policy = match wire.ip_family_policy.as_deref() {
        None | Some("" | "SingleStack") => FamilyPolicy::Single,
        Some("PreferDualStack") => FamilyPolicy::PreferDual,
        Some("RequireDualStack") => FamilyPolicy::RequireDual,
        Some(other) => return Err(format!("spec.ipFamilyPolicy: unknown {other:?}")),
    };
    let families = wire
        .ip_families
        .iter()
        .map(|f| match f.as_str() {
            "IPv4" => Ok(Family::V4),
            "IPv6" => Ok(Family::V6),
            other => Err(format!("spec.ipFamilies: unknown {other:?}")),
        })
        .collect::<Result<Vec<_>, _>>()?;
    if families.len() > 2 || (families.len() == 2 && families[0] == families[1]) {
        return Err("spec.ipFamilies: the same family twice".to_owned());
    }
    Ok(FamilyRequest { policy, families })
}

fn kind(spec: &wire::ServiceSpec) -> Result<ServiceKind, String> {
    match spec.kind.as_deref() {
        Some("ExternalName") => return external_name(spec),
        None | Some("" | "ClusterIP" | "NodePort" | "LoadBalancer") => {}
        Some(other) => return Err(format!("spec.type: unknown {other:?}")),
    }
    let texts = if spec.cluster_ips.is_empty() {
        spec.cluster_ip.as_slice()
    } else {
        spec.cluster_ips.as_slice()
    };
    if texts.first().is_some_and(|t| t == "None") {
        return Ok(ServiceKind::Headless);
    }
    let addresses = texts
        .iter()
        .filter(|t| !t.is_empty())
        .map(|t| unicast(t).map_err(|e| format!("spec.clusterIPs: {e}")))
        .collect::<Result<Vec<IpAddr>, _>>()?;
    if addresses.len() > 2
        || (addresses.len() == 2 && Family::of(&addresses[0]) == Family::of(&addresses[1]))
    {
        return Err("spec.clusterIPs: more than one address of a family".to_owned());
    }
    Ok(ServiceKind::ClusterIp(addresses))
}

fn external_name(spec: &wire::ServiceSpec) -> Result<ServiceKind, String> {
    let text = spec.external_name.as_deref().unwrap_or_default();
    let host = text.strip_suffix('.').unwrap_or(text);
    let is_host = !host.is_empty()
        && host.len() <= 253
        && host.split('.').all(|label| {
            (1..=63).contains(&label.len())
                && label
                    .bytes()
                    .all(|c| c.is_ascii_alphanumeric() || c == b'-' || c == b'_')
        });
    if is_host {
        Ok(ServiceKind::ExternalName(text.into()))
    } else {
        Err(format!("spec.externalName: {text:?} is not a host name"))
    }
}

fn service_port(wire: wire::ServicePort) -> Result<ServicePort, String> {
    let number = port(wire.port)?;
    let target = match wire.target_port {
        None | Some(IntOrString::Int(0)) => TargetPort::Number(number),
        Some(IntOrString::Int(n)) => {
            TargetPort::Number(port(n).map_err(|e| format!("targetPort: {e}"))?)
        }
        Some(IntOrString::String(name)) if name.is_empty() => TargetPort::Number(number),
        Some(IntOrString::String(name)) => TargetPort::Name(name.into()),
    };
    Ok(ServicePort {
        name: optional(wire.name),
        protocol: protocol(wire.protocol.as_deref())?,
        port: number,
        target,
        node_port: match wire.node_port {
            None | Some(0) => None,
            Some(number) => Some(port(number).map_err(|e| format!("nodePort: {e}"))?),
        },
    })
}

fn affinity(config: Option<wire::SessionAffinityConfig>) -> Result<Duration, String> {
    let seconds = config
        .and_then(|c| c.client_ip)
        .and_then(|c| c.timeout_seconds)
        .unwrap_or(AFFINITY_DEFAULT);
    match u64::try_from(seconds) {
        Ok(s) if (1..=AFFINITY_MAX).contains(&seconds) => Ok(Duration::from_secs(s)),
        _ => Err(format!(
            "spec.sessionAffinityConfig.clientIP.timeoutSeconds: {seconds} is not within 1 to {AFFINITY_MAX}"
        )),
    }
}
