//! What happened, for machines: Prometheus.

mod metrics;

pub use metrics::encode;
