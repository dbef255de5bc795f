//! What happened: records of the kernel's ring, decoded, named and explained. Counters are exact and are
//! read elsewhere; records are samples.

mod decode;
mod explain;
mod names;
mod recent;

pub use decode::{Undecodable, decode};
pub use explain::{Explainer, explain, protocol, why};
pub use names::Names;
pub use recent::Recent;
