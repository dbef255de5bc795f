//! The objects of a situation, as text for the agents and as the oracle reads them.

use std::net::IpAddr;

use anyhow::{Context as _, Result, bail};
use serde_json::{Value, json};
use weir_agent::model::{self, Object};
use weir_agent::watch::documents::{Parsed, parse};

use crate::lan::Place;
use crate::oracle::{Cluster, Party, Who};

/// The namespaces, with the label `tier` of each that has one.
pub const NAMESPACES: [(&str, Option<&str>); 3] =
    [("x", Some("one")), ("y", Some("two")), ("z", None)];
/// The pods of each namespace, with the label `role` of each that has one.
pub const PODS: [(&str, Option<&str>); 3] = [("a", Some("web")), ("b", Some("db")), ("c", None)];
/// Who is no pod: two nodes, and a machine outside.
pub const OTHERS: [&str; 3] = ["n1", "n2", "out"];
/// How many pods there are; the others follow them in every list.
pub const PEOPLE: usize = NAMESPACES.len() * PODS.len();

/// Everybody: `xa`, `xb` … `zc`, then [`OTHERS`].
#[must_use]
pub fn everybody() -> Vec<String> {
    let pods = NAMESPACES
        .iter()
        .flat_map(|(space, _)| PODS.iter().map(move |(name, _)| format!("{space}{name}")));
    pods.chain(OTHERS.map(ToOwned::to_owned)).collect()
}

/// A policy: its namespace, what is in its `podSelector`, and the rest of its `spec`, both in YAML's flow style without the
/// braces. In the rest `@xa4` stands for the IPv4 address of the pod `a` of `x`, `@n16` for the IPv6 address of the first node.
/// For a ClusterNetworkPolicy the namespace is [`TIERED`], and what comes second is in its `subject`.
pub type PolicyText = (&'static str, &'static str, &'static str);

/// Instead of a namespace: it is a ClusterNetworkPolicy.
pub const TIERED: &str = "";

/// What there is besides the nodes.
#[derive(Clone, Debug)]
pub struct Scene<'a> {
    /// Of everybody, as far as they are known.
    pub addresses: &'a [[IpAddr; 2]],
    /// The place of each pod.
    pub homes: &'a [&'a Place],
    pub host_pod: &'a Place,
    pub policies: &'a [PolicyText],
    /// A pod (`xa`) or a namespace (`x`), and its labels instead of those that it has.
    pub labels: &'a [(&'static str, &'static str)],
}

impl Scene<'_> {
    /// All of it as a node should see it: of its own pods it knows the addresses itself.
    ///
    /// # Errors
    /// Labels are no YAML, or a policy names somebody who is not there.
    pub fn text(&self, reader: Option<&Place>) -> Result<String> {
        let mut documents = Vec::new();
        for (name, tier) in NAMESPACES {
            let own = match tier {
                Some(tier) => json!({"team": format!("t{name}"), "tier": tier}),
                None => json!({"team": format!("t{name}")}),
            };
            let metadata = json!({"name": name, "labels": self.labels_of(name, own)?});
            documents.push(json!({"apiVersion": "v1", "kind": "Namespace", "metadata": metadata}));
        }
        for at in 0..self.homes.len() {
            documents.push(self.pod(at, reader)?);
        }
        documents.push(json!({
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"namespace": "x", "name": "h", "uid": "uid-h", "labels": {"pod": "h", "role": "web"}},
            "spec": {
                "nodeName": self.host_pod.name,
                "hostNetwork": true,
                "containers": [{"name": "main", "ports": [{"name": "web", "containerPort": 80}]}],
            },
            "status": running(&self.host_pod.addresses),
        }));
        let mut texts: Vec<String> = documents.iter().map(Value::to_string).collect();
        for (number, (namespace, subject, rest)) in self.policies.iter().enumerate() {
            let rest = self.with_addresses(rest)?;
            if *namespace == TIERED {
                texts.push(format!(
                    "{{apiVersion: policy.networking.k8s.io/v1alpha2, kind: ClusterNetworkPolicy, \
                     metadata: {{name: p{number}}}, spec: {{subject: {{{subject}}}, {rest}}}}}"
                ));
                continue;
            }
            texts.push(format!(
                "{{apiVersion: networking.k8s.io/v1, kind: NetworkPolicy, \
                 metadata: {{namespace: \"{namespace}\", name: p{number}}}, spec: {{podSelector: {{{subject}}}, {rest}}}}}"
            ));
        }
        Ok(texts.join("\n---\n"))
    }

    fn pod(&self, at: usize, reader: Option<&Place>) -> Result<Value> {
        let (namespace, name) = (NAMESPACES[at / PODS.len()].0, PODS[at % PODS.len()]);
        let own = match name.1 {
            Some(role) => json!({"pod": name.0, "role": role}),
            None => json!({"pod": name.0}),
        };
        let id = format!("{namespace}{}", name.0);
        let mut pod = json!({
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {
                "namespace": namespace,
                "name": name.0,
                "uid": uid(at),
                "labels": self.labels_of(&id, own)?,
            },
            "spec": {"nodeName": self.homes[at].name, "containers": containers(&id)},
        });
        let is_own = reader.is_some_and(|it| it.name == self.homes[at].name);
        if let Some(addresses) = self.addresses.get(at)
            && !is_own
        {
            pod["status"] = running(addresses);
        }
        Ok(pod)
    }

    fn labels_of(&self, id: &str, own: Value) -> Result<Value> {
        match self.labels.iter().find(|(of, _)| *of == id) {
            Some((_, labels)) => {
                serde_saphyr::from_str(&format!("{{{labels}}}")).with_context(|| labels.to_string())
            }
            None => Ok(own),
        }
    }

    fn with_addresses(&self, text: &str) -> Result<String> {
        let mut text = text.to_owned();
        for (name, addresses) in everybody().iter().zip(self.addresses) {
            for (digit, address) in [4, 6].iter().zip(addresses) {
                text = text.replace(&format!("@{name}{digit}"), &address.to_string());
            }
        }
        match text.contains('@') {
            true => bail!("somebody in {text:?} is not there"),
            false => Ok(text),
        }
    }

    /// The same objects for the oracle, and everybody as it knows them.
    ///
    /// # Errors
    /// An object is not understood.
    pub fn cluster(&self) -> Result<(Cluster, Vec<[Party; 2]>)> {
        let mut cluster = Cluster {
            namespaces: Vec::new(),
            pods: Vec::new(),
            policies: Vec::new(),
            cluster_policies: Vec::new(),
        };
        let text = self.text(None)?;
        for parsed in parse("situation", &text) {
            let Parsed::Ours(document) = parsed else {
                bail!("an object of another kind in {text}");
            };
            match document.outcome {
                Ok(converted) => match converted.object {
                    Some(Object::Namespace(it)) => cluster.namespaces.push((*it).clone()),
                    Some(Object::Pod(it)) => cluster.pods.push((*it).clone()),
                    Some(Object::Policy(it)) => cluster.policies.push((*it).clone()),
                    Some(Object::ClusterPolicy(it)) => cluster.cluster_policies.push((*it).clone()),
                    other => bail!("{other:?} is not part of a situation"),
                },
                // What is not understood closes whom it selects; a person says so beside.
                Err(invalid) => match invalid.closed {
                    Some(Object::Policy(it)) => cluster.policies.push((*it).clone()),
                    _ => bail!("{invalid:?}"),
                },
            }
        }
        let is_own = |pod: &model::Pod| pod.network == model::PodNetwork::Own;
        cluster.pods.retain(is_own);
        let who = |at: usize| match at.checked_sub(PEOPLE) {
            None => Who::Pod(cluster.pods[at].clone()),
            Some(2) => Who::Outside,
            Some(node) => Who::Node(format!("{}{}", self.stem(), node + 1).into()),
        };
        let party = |(at, addresses): (usize, &[IpAddr; 2])| {
            addresses.map(|address| Party {
                address,
                is: who(at),
            })
        };
        let parties = self.addresses.iter().enumerate().map(party).collect();
        Ok((cluster, parties))
    }

    /// What the names of the nodes begin with.
    fn stem(&self) -> &str {
        self.host_pod
            .name
            .trim_end_matches(|it: char| it.is_ascii_digit())
    }
}

/// Of the pod at this place.
#[must_use]
pub fn uid(at: usize) -> String {
    format!("uid-{at}")
}

fn running(addresses: &[impl ToString]) -> Value {
    let ips: Vec<Value> = addresses
        .iter()
        .map(|ip| json!({"ip": ip.to_string()}))
        .collect();
    json!({"phase": "Running", "podIPs": ips})
}

/// Everybody serves 80 and 81 of TCP, UDP and SCTP. 80 is `web`, `uweb`, `sweb` and 81 `alt`, `ualt`, `salt`, but the other way round on
/// every pod `c`; `xb` has no `alt`; `ya` has a sidecar that calls 81 `side`; `zb` one that calls 81 of UDP `web`.
fn containers(id: &str) -> Value {
    let (web, alt) = match id.ends_with('c') {
        true => (81, 80),
        false => (80, 81),
    };
    let mut ports = Vec::new();
    for (protocol, prefix) in [("TCP", ""), ("UDP", "u"), ("SCTP", "s")] {
        for (name, number) in [("web", web), ("alt", alt)] {
            let name = match (id, name, protocol) {
                ("xb", "alt", "TCP") => None,
                _ => Some(format!("{prefix}{name}")),
            };
            ports.push(json!({"name": name, "containerPort": number, "protocol": protocol}));
        }
    }
    let mut all = vec![json!({"name": "main", "image": "example.invalid/main", "ports": ports})];
    let sidecar = match id {
        "ya" => Some(json!({"name": "side", "containerPort": 81})),
        "zb" => Some(json!({"name": "web", "containerPort": 81, "protocol": "UDP"})),
        _ => None,
    };
    let sidecar = sidecar.map(
        |port| json!({"name": "sidecar", "image": "example.invalid/sidecar", "ports": [port]}),
    );
    all.extend(sidecar);
    all.into()
}
