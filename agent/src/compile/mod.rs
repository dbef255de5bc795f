//! From the snapshot to what the kernel should hold. Pure: no clock, no socket, no tokio.

pub mod service;
mod service_plan;

pub use service_plan::{BackendAddr, FrontendPlan, ServicePlan};
