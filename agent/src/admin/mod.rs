//! What the agent tells about itself: Prometheus and probes over TCP, the `weir` command over a unix
//! socket. Every answer is made when it is asked for.

mod http;

pub use http::{Local, Probes, Refusal, local, probes};
