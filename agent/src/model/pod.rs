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
