//! What the cluster says: sources turn it into a stream of [`crate::model::Change`]. What the objects
//! mean for a node is `compile`'s.

pub mod controllers;
pub mod documents;
pub mod kube;
pub mod last_good;
pub mod ledger;
pub mod manifests;
pub mod saved;
pub mod saving;
pub mod status;
pub mod wire;

pub use self::kube::{Credentials, KubeOptions, KubeSource, Servers, Timing};
pub use controllers::Surroundings;
pub use manifests::{ManifestsOptions, ManifestsSource, PodAddresses};
pub use saved::SavedObjects;
pub use saving::{Pace, Saving};
pub use status::{Cause, Health, WatchStatus};

#[cfg(test)]
mod tests;
