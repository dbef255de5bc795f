//! Pods of the cluster.

use std::net::IpAddr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use weir_common::Protocol;

use super::{Labels, ObjectName};

/// A Pod.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Pod {
    pub id: ObjectName,
    pub uid: Arc<str>,
    /// Of the mirror of a static pod: the uid by which the kubelet knows the static pod, and which it gives
    /// to the plugin. The mirror's own `uid` is another one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub static_uid: Option<Arc<str>>,
    pub labels: Labels,
    /// `spec.nodeName`, once it is scheduled.
    pub node: Option<Arc<str>>,
    /// `status.podIPs`; empty until it has some.
    pub addresses: Vec<IpAddr>,
    pub network: PodNetwork,
    pub phase: PodPhase,
    /// The condition `Ready`.
    pub ready: bool,
    /// `spec.hostname` and `spec.subdomain`, for the name of an endpoint.
    pub hostname: Option<Arc<str>>,
    pub subdomain: Option<Arc<str>>,
    /// The named and unnamed ports of all its containers, in order.
    pub ports: Vec<ContainerPort>,
}

impl Pod {
    /// Does a container runtime that gives this uid mean this pod?
    pub fn is_called(&self, uid: &str) -> bool {
        *self.uid == *uid || self.static_uid.as_deref() == Some(uid)
    }

    /// Has `other`, another state of this pod, everything that policy goes by as this one has it? What is not
    /// among it changes most often: `ready`, and whether it runs yet.
    pub fn policy_facts_equal(&self, other: &Self) -> bool {
        // One that is leaving gives way to another with its address.
        let end = |pod: &Self| match pod.phase {
            PodPhase::Pending | PodPhase::Running => None,
            phase @ (PodPhase::Terminating | PodPhase::Finished) => Some(phase),
        };
        self.id == other.id
            && self.uid == other.uid
            && self.labels == other.labels
            && self.node == other.node
            && self.addresses == other.addresses
            && self.network == other.network
            && end(self) == end(other)
            && self.named_ports().eq(other.named_ports())
    }

    /// The ports that a policy can name, in order.
    fn named_ports(&self) -> impl Iterator<Item = (&Arc<str>, Protocol, u16)> {
        self.ports
            .iter()
            .filter_map(|port| Some((port.name.as_ref()?, port.protocol, port.port)))
    }
}

/// Whose network a pod is in.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub enum PodNetwork {
    Own,
    /// `spec.hostNetwork`: its addresses are the node's, and no policy selects it.
    Host,
}

/// How far a pod is.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub enum PodPhase {
    Pending,
    Running,
    /// `metadata.deletionTimestamp` is set.
    Terminating,
    /// Succeeded or Failed: its addresses may belong to another pod already.
    Finished,
}

/// A port that a container declares.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct ContainerPort {
    pub name: Option<Arc<str>>,
    #[serde(with = "super::protocol::Number")]
    pub protocol: Protocol,
    /// Host order.
    pub port: u16,
    pub host: Option<HostPort>,
}

/// `hostPort`: where a container's port is reached on its node.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct HostPort {
    /// Host order.
    pub port: u16,
    /// `hostIP`; `None` for every address of the node, of both families.
    pub address: Option<IpAddr>,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn port(name: Option<&str>, port: u16, host: Option<u16>) -> ContainerPort {
        ContainerPort {
            name: name.map(Into::into),
            protocol: Protocol::TCP,
            port,
            host: host.map(|port| HostPort {
                port,
                address: None,
            }),
        }
    }

    fn pod() -> Pod {
        Pod {
            id: ObjectName::new("shop", "cart-0"),
            uid: "u-1".into(),
            static_uid: None,
            labels: Labels::from([("app".into(), "cart".into())]),
            node: Some("n1".into()),
            addresses: vec![[10, 244, 0, 7].into()],
            network: PodNetwork::Own,
            phase: PodPhase::Running,
            ready: false,
            hostname: None,
            subdomain: None,
            ports: vec![port(Some("web"), 80, None), port(None, 81, None)],
        }
    }

    type Edit = (&'static str, fn(&mut Pod));

    #[test]
    fn what_policy_does_not_go_by_is_no_difference() {
        let edits: [Edit; 7] = [
            ("ready", |p| p.ready = true),
            ("pending", |p| p.phase = PodPhase::Pending),
            ("static uid", |p| p.static_uid = Some("s".into())),
            ("hostname", |p| p.hostname = Some("h".into())),
            ("subdomain", |p| p.subdomain = Some("s".into())),
            ("a port without a name", |p| p.ports[1].port = 82),
            ("a host port", |p| {
                p.ports[0] = port(Some("web"), 80, Some(8080))
            }),
        ];
        for (what, edit) in edits {
            let mut other = pod();
            edit(&mut other);
            assert_ne!(pod(), other, "{what}");
            assert!(pod().policy_facts_equal(&other), "{what}");
            assert!(other.policy_facts_equal(&pod()), "{what}");
        }
    }

    #[test]
    fn what_policy_goes_by_is_a_difference() {
        let edits: [Edit; 13] = [
            ("namespace", |p| p.id.namespace = "bank".into()),
            ("uid", |p| p.uid = "u-2".into()),
            ("label", |p| {
                *p.labels.get_mut("app").unwrap() = "spy".into()
            }),
            ("one label more", |p| {
                p.labels.insert("x".into(), "y".into());
            }),
            ("node", |p| p.node = None),
            ("address", |p| p.addresses[0] = [10, 244, 0, 8].into()),
            ("no address", |p| p.addresses.clear()),
            ("network", |p| p.network = PodNetwork::Host),
            ("terminating", |p| p.phase = PodPhase::Terminating),
            ("finished", |p| p.phase = PodPhase::Finished),
            ("number of a name", |p| p.ports[0].port = 8080),
            ("name of a port", |p| p.ports[0].name = Some("http".into())),
            ("protocol", |p| p.ports[0].protocol = Protocol::UDP),
        ];
        for (what, edit) in edits {
            let mut other = pod();
            edit(&mut other);
            assert!(!pod().policy_facts_equal(&other), "{what}");
            assert!(!other.policy_facts_equal(&pod()), "{what}");
        }
    }
}
