//! The straight line.

pub mod inputs;
