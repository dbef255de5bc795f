//! What the cluster says: sources turn it into a stream of [`crate::model::Change`]. What the objects
//! mean for a node is `compile`'s.

pub mod documents;
pub mod wire;
