//! The rows that policy asks of the kernel. Who computes them is `policy`, who writes them is `apply`.

use std::collections::BTreeMap;

use weir_common::policy::{Class, PortKey, PortRow, RulesId, VerdictKey, VerdictRow};
use weir_common::{Addr, Prefix};

use crate::model::ObjectName;

/// Everything that the policy tables of this node should hold.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct PolicyRows {
    pub classes: BTreeMap<Addr, Class>,
    /// Of addresses that have no row there.
    pub cidrs: BTreeMap<Prefix, Class>,
    pub verdicts: BTreeMap<VerdictKey, VerdictRow>,
    pub ports: BTreeMap<PortKey, PortRow>,
    /// Of every pod of this node that is in a network of its own.
    pub rules: BTreeMap<ObjectName, PodRules>,
}

/// The rules of a pod in each direction.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct PodRules {
    pub ingress: RulesId,
    pub egress: RulesId,
}
