//! From the snapshot to what the kernel should hold: pure functions and plain data. No clock, socket,
//! map or tokio.

pub mod claims;
pub mod dns_service;
pub mod host_port;
pub mod masquerade;
pub mod node_addresses;
pub mod policy;
mod policy_rows;
mod prefix;
pub mod route;
pub mod service;
mod service_plan;
pub mod zone;

pub use policy_rows::{PodRules, PolicyRows};
pub use service_plan::{BackendAddr, FrontendPlan, Owner, Report, ServicePlan, Way};
