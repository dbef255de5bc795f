//! What a Service should be in the kernel, before anything has a number. How it is derived is not here.

use weir_common::service::FrontendKey;
use weir_common::{Addr, Port};

use crate::model::ObjectName;

/// All frontends of one Service.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct ServicePlan {
    pub id: ObjectName,
    /// Sorted by key, keys unique.
    pub frontends: Vec<FrontendPlan>,
}

/// One address that clients send to, and who may answer.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct FrontendPlan {
    pub key: FrontendKey,
    /// Sorted and unique. Empty means that nothing can serve, which is refused, not passed on.
    pub backends: Vec<BackendAddr>,
    /// Session affinity by client address in seconds, 0 for none.
    pub affinity: u32,
    /// Bits of [`weir_common::service::FrontendFlags`].
    pub flags: u32,
}

/// Where a backend listens. Its protocol is the frontend's.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct BackendAddr {
    pub addr: Addr,
    pub port: Port,
}
