//! What a kubelet and the workload controllers would run of a folder of manifests: the pods of every
//! Deployment, StatefulSet and Pod. Running them is `node.rs`.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

/// A pod to run.
#[derive(Clone, Debug, PartialEq)]
pub struct Workload {
    pub namespace: String,
    pub name: String,
    pub labels: BTreeMap<String, String>,
    /// `spec.hostname` and `spec.subdomain`, as a StatefulSet gives them.
    pub hostname: Option<String>,
    pub subdomain: Option<String>,
    pub ports: Vec<Port>,
}

/// A container port.
#[derive(Clone, Debug, PartialEq)]
pub struct Port {
    pub name: Option<String>,
    /// Host order.
    pub number: u16,
    pub transport: Transport,
    /// `hostPort` and `hostIP`.
    pub host: Option<(u16, String)>,
}

/// What an echo server can serve.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Transport {
    Tcp,
    Udp,
}

impl Workload {
    /// A pod with one label, `app`, and nothing else.
    #[must_use]
    pub fn named(namespace: &str, name: &str) -> Self {
        Self {
            namespace: namespace.to_owned(),
            name: name.to_owned(),
            labels: BTreeMap::from([("app".to_owned(), name.to_owned())]),
            hostname: None,
            subdomain: None,
            ports: Vec::new(),
        }
    }

    /// With another label.
    #[must_use]
    pub fn label(mut self, key: &str, value: &str) -> Self {
        self.labels.insert(key.to_owned(), value.to_owned());
        self
    }

    /// With a port that is served.
    #[must_use]
    pub fn port(mut self, transport: Transport, number: u16) -> Self {
        self.ports.push(Port {
            name: None,
            number,
            transport,
            host: None,
        });
        self
    }

    /// With a port that is served and has a name.
    #[must_use]
    pub fn named_port(mut self, transport: Transport, number: u16, name: &str) -> Self {
        self.ports.push(Port {
            name: Some(name.to_owned()),
            number,
            transport,
            host: None,
        });
        self
    }

    /// With a port that is served, and reached on the node too: at `address`, everywhere if that is empty.
    #[must_use]
    pub fn host_port(
        mut self,
        transport: Transport,
        number: u16,
        host: u16,
        address: &str,
    ) -> Self {
        self.ports.push(Port {
            name: None,
            number,
            transport,
            host: Some((host, address.to_owned())),
        });
        self
    }

    /// `namespace/name`.
    #[must_use]
    pub fn id(&self) -> String {
        format!("{}/{}", self.namespace, self.name)
    }

    /// Is it in this namespace, with this label `app`? What a controller makes has no name to rely on.
    #[must_use]
    pub fn is_of(&self, namespace: &str, app: &str) -> bool {
        self.namespace == namespace && self.labels.get("app").is_some_and(|a| a == app)
    }

    /// The Pod object of it, bound to a node.
    #[must_use]
    pub fn manifest(&self, uid: &str, node: &str) -> Value {
        let ports: Vec<Value> = self
            .ports
            .iter()
            .map(|p| {
                let protocol = match p.transport {
                    Transport::Tcp => "TCP",
                    Transport::Udp => "UDP",
                };
                let mut port =
                    json!({"name": p.name, "containerPort": p.number, "protocol": protocol});
                if let Some((host, address)) = &p.host {
                    port["hostPort"] = json!(host);
                    port["hostIP"] = json!(address);
                }
                port
            })
            .collect();
        json!({
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {
                "namespace": self.namespace,
                "name": self.name,
                "uid": uid,
                "labels": self.labels,
            },
            "spec": {
                "nodeName": node,
                "hostname": self.hostname,
                "subdomain": self.subdomain,
                "containers": [{"name": "main", "image": "example.invalid/echo", "ports": ports}],
            },
        })
    }
}

/// Every object of the `.yaml` and `.yml` files below a folder, in the order of their paths.
///
/// # Errors
/// A file cannot be read or is not YAML.
pub fn objects(folder: &Path) -> Result<Vec<Value>> {
    let mut found = Vec::new();
    let mut entries: Vec<_> = fs::read_dir(folder)
        .with_context(|| format!("read {}", folder.display()))?
        .collect::<Result<_, _>>()?;
    entries.sort_by_key(fs::DirEntry::path);
    for entry in entries {
        let path = entry.path();
        if path.is_dir() {
            found.extend(objects(&path)?);
        } else if path.extension().is_some_and(|e| e == "yaml" || e == "yml") {
            let text = fs::read_to_string(&path)?;
            let documents: Vec<Value> = serde_saphyr::from_multiple(&text)
                .with_context(|| format!("parse {}", path.display()))?;
            found.extend(documents.into_iter().filter(|d| !d.is_null()));
        }
    }
    Ok(found)
}

/// The pods that these objects ask for; other kinds ask for none.
///
/// # Errors
/// A workload lacks its name or its pod template.
pub fn expand(objects: &[Value]) -> Result<Vec<Workload>> {
    let mut pods = Vec::new();
    for object in objects {
        let kind = object["kind"].as_str().unwrap_or_default();
        let name = object["metadata"]["name"].as_str();
        let namespace = object["metadata"]["namespace"]
            .as_str()
            .unwrap_or("default");
        let replicas = object["spec"]["replicas"].as_u64().unwrap_or(1);
        let named = || name.with_context(|| format!("a {kind} without a name"));
        match kind {
            "Pod" => pods.push(workload(namespace, named()?.to_owned(), object)?),
            "Deployment" | "StatefulSet" => {
                let name = named()?;
                let template = &object["spec"]["template"];
                if template.is_null() {
                    bail!("{kind} {namespace}/{name} has no pod template");
                }
                for ordinal in 0..replicas {
                    let mut pod = workload(namespace, format!("{name}-{ordinal}"), template)?;
                    if kind == "StatefulSet" {
                        pod.hostname = Some(pod.name.clone());
                        pod.subdomain = object["spec"]["serviceName"]
                            .as_str()
                            .map(ToOwned::to_owned);
                    }
                    pods.push(pod);
                }
            }
            _ => {}
        }
    }
    Ok(pods)
}

/// The workload of one Pod object.
///
/// # Errors
/// It has no name, or a port that no echo server can serve.
pub fn of_pod(pod: &Value) -> Result<Workload> {
    let metadata = &pod["metadata"];
    let name = metadata["name"].as_str().context("a pod without a name")?;
    let namespace = metadata["namespace"].as_str().unwrap_or("default");
    workload(namespace, name.to_owned(), pod)
}

fn workload(namespace: &str, name: String, template: &Value) -> Result<Workload> {
    let labels = template["metadata"]["labels"].as_object();
    let containers = template["spec"]["containers"].as_array();
    let ports = containers
        .into_iter()
        .flatten()
        .flat_map(|c| c["ports"].as_array().into_iter().flatten())
        .map(port)
        .collect::<Result<_>>()
        .with_context(|| format!("pod {namespace}/{name}"))?;
    Ok(Workload {
        namespace: namespace.to_owned(),
        name,
        labels: labels
            .into_iter()
            .flatten()
            .filter_map(|(k, v)| Some((k.clone(), v.as_str()?.to_owned())))
            .collect(),
        hostname: template["spec"]["hostname"].as_str().map(ToOwned::to_owned),
        subdomain: template["spec"]["subdomain"]
            .as_str()
            .map(ToOwned::to_owned),
        ports,
    })
}

fn port(port: &Value) -> Result<Port> {
    let number = port["containerPort"]
        .as_u64()
        .context("a port without containerPort")?;
    Ok(Port {
        name: port["name"].as_str().map(ToOwned::to_owned),
        number: u16::try_from(number).context("containerPort")?,
        transport: match port["protocol"].as_str().unwrap_or("TCP") {
            "UDP" => Transport::Udp,
            "TCP" => Transport::Tcp,
            other => bail!("no echo server speaks {other}"),
        },
        host: None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn expand_text(text: &str) -> Vec<Workload> {
        expand(&serde_saphyr::from_multiple::<Value>(text).unwrap()).unwrap()
    }

    #[test]
    fn a_stateful_set_names_its_pods_by_ordinal() {
        let pods = expand_text(
            "kind: StatefulSet\nmetadata: {name: db, namespace: shop}\nspec:\n  replicas: 2\n  \
             serviceName: db\n  template:\n    metadata: {labels: {app: db}}\n    spec:\n      \
             containers: [{ports: [{name: sql, containerPort: 5432}]}]\n",
        );
        assert_eq!(
            pods.iter().map(Workload::id).collect::<Vec<_>>(),
            ["shop/db-0", "shop/db-1"]
        );
        assert_eq!(pods[1].hostname.as_deref(), Some("db-1"));
        assert_eq!(pods[1].subdomain.as_deref(), Some("db"));
        assert_eq!(pods[1].labels["app"], "db");
        assert_eq!(
            pods[1].ports,
            [Port {
                name: Some("sql".into()),
                number: 5432,
                transport: Transport::Tcp,
                host: None,
            }]
        );
    }

    #[test]
    fn other_kinds_ask_for_no_pod() {
        assert_eq!(
            expand_text("kind: Service\nmetadata: {name: a}\n---\nkind: ConfigMap\n"),
            []
        );
    }
}
