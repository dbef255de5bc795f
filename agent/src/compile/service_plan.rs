//! What should be in the kernel of whatever asks for frontends, before anything has a number. How it is
//! derived is not here.

use std::fmt;

use weir_common::service::FrontendKey;
use weir_common::{Addr, Port};

use crate::model::ObjectName;

/// What asks for frontends.
#[derive(Clone, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum Owner {
    Service(ObjectName),
    /// The host ports of a pod of this node.
    HostPorts(ObjectName),
}

/// All frontends of one owner.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct ServicePlan {
    pub id: Owner,
    /// Sorted by key, keys unique.
    pub frontends: Vec<FrontendPlan>,
}

/// One address that clients send to, and who may answer.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct FrontendPlan {
    pub key: FrontendKey,
    pub way: Way,
    /// The port of the Service that this is a way to; for a host port itself.
    pub port: Port,
    /// Sorted and unique. Empty means that nothing can serve, which is refused, not passed on.
    pub backends: Vec<BackendAddr>,
    /// Session affinity by client address in seconds, 0 for none.
    pub affinity: u32,
    /// Bits of [`weir_common::service::FrontendFlags`].
    pub flags: u32,
}

/// By what right an address is asked for. Of two who ask for the same one the earlier way has it: nobody
/// takes a cluster IP away by naming it as an external one (CVE-2020-8554).
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum Way {
    ClusterIp,
    LoadBalancer,
    NodePort,
    ExternalIp,
    HostPort,
}

/// Where a backend listens. Its protocol is the frontend's.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct BackendAddr {
    pub addr: Addr,
    pub port: Port,
}

/// `namespace/name`, or `hostport namespace/name`.
impl fmt::Display for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Service(name) => write!(f, "{name}"),
            Self::HostPorts(pod) => write!(f, "hostport {pod}"),
        }
    }
}
