//! What happened, for machines: Prometheus.

mod conversations;
mod metrics;
mod text;

pub use metrics::{Page, encode};
pub use text::text_of;
