//! The node agent: one straight line from what the cluster says to what the kernel holds, and back
//! from what happened to what is exported. `app` wires it; docs/architecture.md is the map.

<<<<<<< HEAD
pub mod admin;
pub mod apply;
pub mod compile;
pub mod config;
pub mod events;
pub mod kernel;
pub mod line;
pub mod model;
pub mod pods;
pub mod watch;
=======
pub mod compile;
pub mod model;
pub mod zone_feed;
>>>>>>> dns
