//! The server as clients see it: real sockets on loopback, a played upstream, a played agent.
#![allow(clippy::unwrap_used, reason = "a test that fails should say where")]

mod feed;
mod forward;
mod hand_over;
mod process;
mod server;
mod support;
