//! Cluster DNS: the zone, the server, the way to everything else, and both ends of the feed that
//! brings the zone from the agent. `main` wires them; no privilege is needed past the binding of ports.

pub mod zone;
