//! What policy should be in the kernel: plain rows. How they are derived is not here.

use std::collections::BTreeMap;

use weir_common::Addr;
use weir_common::policy::{Class, PortKey, PortRow, RulesId, VerdictKey, VerdictRow};

use crate::model::ObjectName;

/// Every row of policy at once. Numbers are derived from content: a (rules, class) pair and a set of
/// ports never change their meaning, so rows of two successive outputs can stand side by side.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct PolicyRows {
    pub classes: BTreeMap<Addr, Class>,
    pub verdicts: BTreeMap<VerdictKey, VerdictRow>,
    /// Needed only while the tables move from the previous output to this one: pairs of a new class
    /// with an old list of rules and the reverse. Never in conflict with `verdicts`.
    pub transitional: BTreeMap<VerdictKey, VerdictRow>,
    pub ports: BTreeMap<PortKey, PortRow>,
    /// The pods of this node.
    pub pods: BTreeMap<ObjectName, PodRules>,
}

/// Which lists of rules hold for a pod.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, PartialEq)]
pub struct PodRules {
    pub ingress: RulesId,
    pub egress: RulesId,
}
