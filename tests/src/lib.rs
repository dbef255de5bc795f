//! What the tests stand on. No test is here; they are in `tests/tests`.

pub mod bytes;
pub mod edges;
pub mod frames;
pub mod mix;
pub mod programs;
pub mod tables;
pub mod world;
