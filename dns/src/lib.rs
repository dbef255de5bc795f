//! Cluster DNS: the zone, the server, the way to everything else, and both ends of the feed that
//! brings the zone from the agent. `main` wires them; no privilege is needed past the binding of ports.

pub mod feed;
pub mod hand_over;
pub mod hold;
pub mod host_port;
pub mod kept;
pub mod listen;
pub mod metrics;
pub mod privilege;
pub mod probe;
pub mod reply;
pub mod request;
pub mod resolve;
pub mod selinux;
pub mod server;
pub mod status;
pub mod turn;
pub mod upstream;
pub mod zone;
