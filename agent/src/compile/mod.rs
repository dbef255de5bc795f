//! From the snapshot to what the kernel should hold: pure functions and plain data. No clock, socket,
//! map or tokio.

pub mod zone;
