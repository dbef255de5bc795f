//! The real plugin in real namespaces, against the agent's server with a fake datapath. What eBPF does
//! to packets is tested elsewhere.
#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot go on fails where it stands"
)]

mod attach;
mod failures;
mod fake;
mod node;
mod release;
