//! Which Service is the cluster's DNS, so that lookups of its address lead to this node's weir-dns: the one that was
//! named, or the only one that distributions call otherwise. Where its port leads is in `service`.

use std::collections::BTreeSet;
use std::fmt;

use weir_common::Protocol;

use crate::model::{ObjectName, Service};

/// The port of DNS.
const PORT: u16 = 53;
/// Whom the Services of cluster DNS select, whatever they are called: kubeadm's `kube-dns`, RKE2's
/// `rke2-coredns-rke2-coredns`. It is also what policies name who allow DNS.
const SELECTED: (&str, &str) = ("k8s-app", "kube-dns");
const NAMESPACE: &str = "kube-system";
/// OpenShift's, which selects otherwise.
const OPENSHIFT: (&str, &str) = ("openshift-dns", "dns-default");

/// What is known of it. Each change of a Service costs what it touches.
#[derive(Clone, Debug)]
pub struct DnsServices {
    wanted: ObjectName,
    named: Named,
    /// Others that are meant for DNS, by their looks.
    others: BTreeSet<ObjectName>,
}

/// The Service that was named.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Named {
    Absent,
    WithoutPort,
    There,
}

/// The answer. Its text is what a person should read when it is `Missing`.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum DnsService {
    /// The one that was named.
    Named(ObjectName),
    /// Another one, and the only one that can be meant.
    Found(ObjectName),
    Missing(Missing),
}

/// Why there is none.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Missing {
    wanted: ObjectName,
    named: Named,
    /// Those that could be meant: none, or several.
    others: Vec<ObjectName>,
}

impl DnsServices {
    /// Looks for this one first. Nothing is known yet.
    pub fn new(wanted: ObjectName) -> Self {
        Self {
            wanted,
            named: Named::Absent,
            others: BTreeSet::new(),
        }
    }

    /// A Service changed or, without one, went. Says which Services lead elsewhere from now on, and have to be
    /// compiled again: the one that was the cluster's DNS until now, and the one that is.
    #[must_use]
    pub fn take(&mut self, id: &ObjectName, service: Option<&Service>) -> Vec<ObjectName> {
        let before = self.service().cloned();
        if *id == self.wanted {
            self.named = match service {
                None => Named::Absent,
                Some(service) if has_port(service) => Named::There,
                Some(_) => Named::WithoutPort,
            };
        } else if service.is_some_and(looks_like_it) {
            self.others.insert(id.clone());
        } else {
            self.others.remove(id);
        }
        let now = self.service().cloned();
        match before == now {
            true => Vec::new(),
            false => before.into_iter().chain(now).collect(),
        }
    }

    /// The Service whose port 53 weir-dns answers.
    pub fn service(&self) -> Option<&ObjectName> {
        match (self.named, self.others.first()) {
            (Named::There, _) => Some(&self.wanted),
            // With two it would be a guess.
            (_, Some(only)) if self.others.len() == 1 => Some(only),
            _ => None,
        }
    }

    /// The same, with what to say about it. Only once every Service has been said: what is not synced is not
    /// missing.
    pub fn answer(&self) -> DnsService {
        match self.service() {
            Some(id) if *id == self.wanted => DnsService::Named(id.clone()),
            Some(id) => DnsService::Found(id.clone()),
            None => DnsService::Missing(Missing {
                wanted: self.wanted.clone(),
                named: self.named,
                others: self.others.iter().cloned().collect(),
            }),
        }
    }
}

fn has_port(service: &Service) -> bool {
    let mut ports = service.ports.iter();
    ports.any(|port| port.port == PORT && matches!(port.protocol, Protocol::UDP | Protocol::TCP))
}

fn looks_like_it(service: &Service) -> bool {
    let (namespace, name) = (&*service.id.namespace, &*service.id.name);
    let selects = service.selector.as_ref().is_some_and(|selector| {
        selector
            .get(SELECTED.0)
            .is_some_and(|value| **value == *SELECTED.1)
    });
    let is_meant = (namespace == NAMESPACE && selects) || (namespace, name) == OPENSHIFT;
    is_meant && has_port(service)
}

impl fmt::Display for Missing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let wanted = &self.wanted;
        match self.named {
            Named::WithoutPort => write!(f, "the Service {wanted} has no port {PORT}")?,
            Named::Absent | Named::There => write!(f, "there is no Service {wanted}")?,
        }
        match self.others.as_slice() {
            [] => write!(
                f,
                ", nor one of another name that selects k8s-app=kube-dns in {NAMESPACE}"
            ),
            others => {
                let others: Vec<String> = others.iter().map(ToString::to_string).collect();
                write!(
                    f,
                    "; {} could be meant: choose by --dns-service",
                    others.join(" and ")
                )
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{
        External, NotReady, Proxying, ServiceKind, ServicePort, TargetPort, TrafficPolicy,
    };

    fn service(id: &str, selects: &str, port: u16) -> Service {
        let (namespace, name) = id.split_once('/').unwrap();
        Service {
            id: ObjectName::new(namespace, name),
            kind: ServiceKind::ClusterIp(vec![]),
            ports: vec![ServicePort {
                name: None,
                protocol: Protocol::UDP,
                port,
                target: TargetPort::Number(port),
                node_port: None,
            }],
            selector: Some([("k8s-app".into(), selects.into())].into()),
            affinity: None,
            internal_traffic_policy: TrafficPolicy::Cluster,
            external: External::default(),
            not_ready: NotReady::Hidden,
            proxying: Proxying::Here,
        }
    }

    fn name(id: &str) -> ObjectName {
        let (namespace, name) = id.split_once('/').unwrap();
        ObjectName::new(namespace, name)
    }

    /// What the answer is, and what is to be compiled again, after each change. `-` before a name: it goes.
    fn history(changes: &[(&str, &str, u16)]) -> Vec<(String, Vec<String>)> {
        let mut known = DnsServices::new(name("kube-system/kube-dns"));
        let step = |(id, selects, port): &(&str, &str, u16)| {
            let again = match id.strip_prefix('-') {
                Some(id) => known.take(&name(id), None),
                None => known.take(&name(id), Some(&service(id, selects, *port))),
            };
            let answer = match known.answer() {
                DnsService::Named(id) => format!("named {id}"),
                DnsService::Found(id) => format!("found {id}"),
                DnsService::Missing(why) => why.to_string(),
            };
            (answer, again.iter().map(ToString::to_string).collect())
        };
        changes.iter().map(step).collect()
    }

    #[test]
    fn the_named_one_is_it_whatever_else_there_is() {
        let steps = history(&[
            ("kube-system/rke2", "kube-dns", 53),
            ("kube-system/kube-dns", "anything", 53),
            ("kube-system/other", "kube-dns", 53),
            ("-kube-system/kube-dns", "", 0),
        ]);
        let answers = [
            ("found kube-system/rke2", vec!["kube-system/rke2"]),
            (
                "named kube-system/kube-dns",
                vec!["kube-system/rke2", "kube-system/kube-dns"],
            ),
            ("named kube-system/kube-dns", vec![]),
            (
                "there is no Service kube-system/kube-dns; kube-system/other and kube-system/rke2 could be \
                 meant: choose by --dns-service",
                vec!["kube-system/kube-dns"],
            ),
        ];
        let answers = answers.map(|(answer, again)| {
            (
                answer.to_owned(),
                again.into_iter().map(str::to_owned).collect(),
            )
        });
        assert_eq!(steps, answers);
    }

    #[test]
    fn only_what_is_certainly_the_clusters_dns_is_taken_for_it() {
        let missing = "there is no Service kube-system/kube-dns, nor one of another name that selects \
                       k8s-app=kube-dns in kube-system";
        let without_port = "the Service kube-system/kube-dns has no port 53, nor one of another name that \
                            selects k8s-app=kube-dns in kube-system";
        for (id, selects, port, expected) in [
            (
                "kube-system/rke2-coredns-rke2-coredns",
                "kube-dns",
                53,
                "found kube-system/rke2-coredns-rke2-coredns",
            ),
            (
                "openshift-dns/dns-default",
                "",
                53,
                "found openshift-dns/dns-default",
            ),
            ("kube-system/metrics", "kube-dns", 9153, missing),
            ("kube-system/other", "other", 53, missing),
            // Of a tenant.
            ("shop/kube-dns", "kube-dns", 53, missing),
            ("kube-system/kube-dns", "kube-dns", 9153, without_port),
        ] {
            let steps = history(&[(id, selects, port)]);
            assert_eq!(steps[0].0, expected, "{id}");
            let again = history(&[(id, selects, port), (&format!("-{id}"), "", 0)]);
            assert_eq!(again[1].0, missing, "{id} goes");
        }
    }
}
