//! What clients can name in an application, and whether its policies let them: read from its manifests
//! and the pods that run, wherever they do.

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};
use serde_json::Value;
use weir_agent::model::{self, Object, ObjectName, TargetPort};
use weir_agent::watch::documents::{Parsed, parse};
use weir_common::Protocol;

use crate::oracle::{self, Cluster, Party, Who};

/// A port of a Service, as a client names it.
#[derive(Clone, Debug, PartialEq)]
pub struct ServicePort {
    pub id: ObjectName,
    pub protocol: Protocol,
    /// Host order.
    pub port: u16,
    pub kind: ServiceKind,
    /// Pods behind it, with the port that each serves.
    pub backends: Vec<(ObjectName, u16)>,
}

/// Whose addresses the name of a Service has.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum ServiceKind {
    ClusterIp,
    /// Its pods'.
    Headless,
}

impl ServicePort {
    /// The shortest name that a pod of this namespace finds it by.
    #[must_use]
    pub fn name_in(&self, namespace: &str) -> String {
        if *self.id.namespace == *namespace {
            self.id.name.to_string()
        } else {
            format!("{}.{}", self.id.name, self.id.namespace)
        }
    }
}

impl fmt::Display for ServicePort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.id, self.port)?;
        match self.protocol {
            Protocol::TCP => Ok(()),
            _ => f.write_str("/udp"),
        }
    }
}

/// Every port of every Service that selects pods, of these objects and these pods.
#[must_use]
pub fn service_ports(objects: &[Value], pods: &[model::Pod]) -> Vec<ServicePort> {
    let mut found = Vec::new();
    for object in objects {
        let Some(selector) = object["spec"]["selector"].as_object() else {
            continue;
        };
        if object["kind"] != "Service" || selector.is_empty() {
            continue;
        }
        let namespace = object["metadata"]["namespace"]
            .as_str()
            .unwrap_or("default");
        let name = object["metadata"]["name"].as_str().unwrap_or_default();
        let selected = |pod: &&model::Pod| {
            let has = |(key, value): (&String, &Value)| {
                pod.labels.get(key.as_str()).map(|v| &**v) == value.as_str()
            };
            *pod.id.namespace == *namespace && selector.iter().all(has)
        };
        let kind = if object["spec"]["clusterIP"] == "None" {
            ServiceKind::Headless
        } else {
            ServiceKind::ClusterIp
        };
        for port in object["spec"]["ports"].as_array().into_iter().flatten() {
            let Some(number) = number(&port["port"]) else {
                continue;
            };
            let protocol = match port["protocol"].as_str() {
                None | Some("TCP") => Protocol::TCP,
                Some("UDP") => Protocol::UDP,
                Some(_) => continue,
            };
            // A headless Service does not translate ports.
            let target = match (&port["targetPort"], kind) {
                (_, ServiceKind::Headless) => TargetPort::Number(number),
                (Value::String(name), _) => TargetPort::Name(name.as_str().into()),
                (other, _) => TargetPort::Number(self::number(other).unwrap_or(number)),
            };
            let backend =
                |pod: &model::Pod| Some((pod.id.clone(), served(pod, protocol, &target)?));
            found.push(ServicePort {
                id: ObjectName::new(namespace, name),
                protocol,
                port: number,
                kind,
                backends: pods.iter().filter(selected).filter_map(backend).collect(),
            });
        }
    }
    found
}

/// The objects below a folder as the oracle reads them, with the pods that run.
///
/// # Errors
/// A file cannot be read, or says something that the agent does not understand.
pub fn cluster(folder: &Path, pods: Vec<model::Pod>) -> Result<Cluster> {
    let mut namespaces: BTreeMap<String, model::Namespace> = BTreeMap::new();
    let mut policies = Vec::new();
    let mut cluster_policies = Vec::new();
    for (path, text) in texts(folder)? {
        for parsed in parse(&path, &text) {
            let Parsed::Ours(document) = parsed else {
                continue;
            };
            match document.outcome.map(|c| c.object) {
                Ok(Some(Object::Namespace(n))) => {
                    namespaces.insert(n.name.to_string(), (*n).clone());
                }
                Ok(Some(Object::Policy(p))) => policies.push((*p).clone()),
                Ok(Some(Object::ClusterPolicy(p))) => cluster_policies.push((*p).clone()),
                Ok(_) => {}
                Err(e) => bail!("{path}: {e:?}"),
            }
        }
    }
    for pod in &pods {
        let name = pod.id.namespace.to_string();
        let namespace = namespaces
            .entry(name.clone())
            .or_insert_with(|| model::Namespace {
                name: name.as_str().into(),
                labels: BTreeMap::new(),
                phase: model::NamespacePhase::Active,
                keeps_established: false,
            });
        // Every namespace of a real API has it.
        namespace
            .labels
            .insert("kubernetes.io/metadata.name".into(), name.as_str().into());
    }
    Ok(Cluster {
        namespaces: namespaces.into_values().collect(),
        pods,
        policies,
        cluster_policies,
    })
}

/// May this pod reach this port? `None` if that depends on the backend that it gets: it is one itself,
/// which it may always reach, and may reach no other. All other backends must agree.
///
/// # Errors
/// They do not, or a pod is none of the cluster's.
pub fn is_allowed(
    cluster: &Cluster,
    client: &ObjectName,
    target: &ServicePort,
) -> Result<Option<bool>> {
    let mut answers = Vec::new();
    for (backend, port) in &target.backends {
        answers.push(may_reach(cluster, client, backend, target.protocol, *port)?);
    }
    let is_backend = target.backends.iter().any(|(backend, _)| backend == client);
    match (answers.contains(&true), answers.contains(&false)) {
        (true, true) if is_backend => Ok(None),
        (true, true) => bail!("the backends of {target} differ in policy"),
        (reachable, _) => Ok(Some(reachable)),
    }
}

/// May one pod reach this port of another's own address?
///
/// # Errors
/// A pod is none of the cluster's, or has no address.
pub fn may_reach(
    cluster: &Cluster,
    client: &ObjectName,
    server: &ObjectName,
    protocol: Protocol,
    port: u16,
) -> Result<bool> {
    let (from, to) = (party(cluster, client)?, party(cluster, server)?);
    Ok(oracle::allowed(cluster, &from, &to, protocol, port))
}

/// The text of every `.yaml` and `.yml` file below a folder, by its path there.
///
/// # Errors
/// One cannot be read.
pub fn texts(folder: &Path) -> Result<Vec<(String, String)>> {
    let mut found = Vec::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(at) = folders.pop() {
        for entry in fs::read_dir(&at).with_context(|| format!("read {}", at.display()))? {
            let path = entry?.path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|e| e == "yaml" || e == "yml") {
                let name = path.strip_prefix(folder)?.display().to_string();
                found.push((name, fs::read_to_string(&path)?));
            }
        }
    }
    found.sort();
    Ok(found)
}

fn number(value: &Value) -> Option<u16> {
    value.as_u64().and_then(|n| u16::try_from(n).ok())
}

fn served(pod: &model::Pod, protocol: Protocol, target: &TargetPort) -> Option<u16> {
    let is_it = |port: &&model::ContainerPort| {
        port.protocol == protocol
            && match target {
                TargetPort::Number(number) => port.port == *number,
                TargetPort::Name(name) => port.name.as_ref() == Some(name),
            }
    };
    pod.ports.iter().find(is_it).map(|port| port.port)
}

fn party(cluster: &Cluster, id: &ObjectName) -> Result<Party> {
    let found = cluster.pods.iter().find(|pod| pod.id == *id);
    let pod = found.with_context(|| format!("{id} is no pod of the cluster"))?;
    let first = pod.addresses.iter().find(|a| a.is_ipv4());
    let address = first.or(pod.addresses.first());
    Ok(Party {
        address: *address.with_context(|| format!("{id} has no address"))?,
        is: Who::Pod(pod.clone()),
    })
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use serde_json::json;

    use super::*;

    fn pod(name: &str, ports: &[(&str, Protocol, u16)]) -> model::Pod {
        let port = |(name, protocol, port): &(&str, Protocol, u16)| model::ContainerPort {
            name: Some(Arc::from(*name)),
            protocol: *protocol,
            port: *port,
            host: None,
        };
        model::Pod {
            id: ObjectName::new("shop", name),
            uid: "".into(),
            static_uid: None,
            labels: BTreeMap::from([("app".into(), "web".into())]),
            node: None,
            addresses: Vec::new(),
            network: model::PodNetwork::Own,
            phase: model::PodPhase::Running,
            ready: true,
            hostname: None,
            subdomain: None,
            ports: ports.iter().map(port).collect(),
        }
    }

    #[test]
    fn the_backends_of_a_port_are_the_pods_that_serve_it() {
        let pods = [
            pod(
                "a",
                &[("http", Protocol::TCP, 80), ("feed", Protocol::UDP, 90)],
            ),
            pod("b", &[("http", Protocol::TCP, 8080)]),
        ];
        for (spec, expected) in [
            (json!({"port": 1, "targetPort": "http"}), vec![80, 8080]),
            (json!({"port": 1, "targetPort": 8080}), vec![8080]),
            (json!({"port": 80}), vec![80]),
            (
                json!({"port": 1, "targetPort": "feed", "protocol": "UDP"}),
                vec![90],
            ),
            (json!({"port": 90}), vec![]),
        ] {
            let service = json!({
                "kind": "Service",
                "metadata": {"name": "web", "namespace": "shop"},
                "spec": {"selector": {"app": "web"}, "ports": [spec]},
            });
            let found = service_ports(&[service], &pods);
            let ports: Vec<u16> = found[0].backends.iter().map(|(_, port)| *port).collect();
            assert_eq!(ports, expected, "{spec}");
        }
    }

    #[test]
    fn a_service_is_named_as_short_as_it_can_be() {
        let service = json!({
            "kind": "Service",
            "metadata": {"name": "web", "namespace": "shop"},
            "spec": {"selector": {"app": "web"}, "ports": [{"port": 80}]},
        });
        let found = &service_ports(&[service], &[])[0];
        assert_eq!(found.name_in("shop"), "web");
        assert_eq!(found.name_in("default"), "web.shop");
    }
}
