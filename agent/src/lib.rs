//! The node agent: one straight line from what the cluster says to what the kernel holds, and back
//! from what happened to what is exported. `app` wires it; docs/architecture.md is the map.

pub mod compile;
pub mod model;
pub mod zone_feed;
