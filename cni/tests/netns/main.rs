//! The real plugin in real namespaces, against the agent's server with a fake datapath. What eBPF does
//! to packets is tested elsewhere.

mod attach;
mod failures;
mod fake;
mod node;
mod release;
