//! From objects to rows: pure, no clock, socket or task. What the kernel then makes of them is not here.

pub mod policy;
pub mod policy_rows;
