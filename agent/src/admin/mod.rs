//! What the agent tells about itself: Prometheus and probes over TCP, the `weir` command over a unix
//! socket. Every answer is made when it is asked for.

mod http;
mod list;

pub use http::{Local, Probes, Refusal, local, probes};
pub use list::{JsonList, Pieces};
