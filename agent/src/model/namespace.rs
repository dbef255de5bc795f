//! Namespaces.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::Labels;

/// A Namespace.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Namespace {
    pub name: Arc<str>,
    pub labels: Labels,
    pub phase: NamespacePhase,
    /// Do connections of its pods go on that a policy has allowed once, when policy denies them later? It is asked
    /// for by the annotation `weir.local/established-connections: keep`.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub keeps_established: bool,
}

/// Is the namespace being deleted? Its policies hold until its pods are gone (kubernetes#126587).
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub enum NamespacePhase {
    Active,
    Terminating,
}
