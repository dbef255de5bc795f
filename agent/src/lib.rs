//! The node agent: one straight line from what the cluster says to what the kernel holds, and back
//! from what happened to what is exported. `app` wires it; docs/architecture.md is the map.

pub mod admin;
pub mod app;
pub mod apply;
pub mod beat;
pub mod compile;
pub mod conditions;
pub mod config;
pub mod events;
pub mod explain;
pub mod export;
pub mod install;
pub mod keep;
pub mod kernel;
pub mod line;
pub mod model;
pub mod pods;
pub mod tell;
pub mod watch;
pub mod zone_feed;
