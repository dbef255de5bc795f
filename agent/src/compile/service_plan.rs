//! What the kernel should hold for one Service. Which segment and which numbers it gets is `apply`'s.

use weir_common::service::FrontendKey;
use weir_common::{Addr, Port};

use crate::model::ObjectName;

/// All frontends of a Service; none for one that is not proxied.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct ServicePlan {
    pub id: ObjectName,
    pub frontends: Vec<FrontendPlan>,
}

/// A frontend and where it leads.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct FrontendPlan {
    pub key: FrontendKey,
    /// Without duplicates, in a fixed order.
    pub backends: Vec<BackendAddr>,
    /// Session affinity in seconds, 0 for none.
    pub affinity: u32,
    /// Bits of [`weir_common::service::FrontendFlags`].
    pub flags: u32,
}

/// Where a backend listens.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct BackendAddr {
    pub addr: Addr,
    pub port: Port,
}
