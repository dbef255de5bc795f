//! How the zone comes from the agent: frames of JSON, one a line, over a unix socket. The agent has
//! the server's end, `weir-dns` the client's.

mod client;
mod server;
mod shared;

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::zone::{ServiceName, ZoneService};

pub use client::Client;
pub use server::{FeedError, Peer, Server};
pub use shared::SharedZone;

/// The version of the frames. Both ends are upgraded apart, so a change of meaning needs a new one.
pub const VERSION: u32 = 1;

/// The longest line, in bytes: a headless service with 100,000 endpoints takes about 6 MB.
const MAX_LINE: u64 = 32 << 20;

/// What the server says. A client that connects gets `Begin`, everything there is, and the changes
/// that follow; `Synced` comes once there is nothing that the server has yet to learn.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Frame {
    Begin { version: u32, domain: String },
    Upsert(Arc<ZoneService>),
    Remove(ServiceName),
    Namespace(Arc<str>),
    NamespaceGone(Arc<str>),
    Synced,
    Keepalive,
}

/// A change of the zone, as the agent says it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum ZoneChange {
    Upsert(Arc<ZoneService>),
    Remove(ServiceName),
    Namespace(Arc<str>),
    NamespaceGone(Arc<str>),
    /// Everything that existed has been said.
    Synced,
}
