//! What the numbers in verdicts mean, for the words in events and on the command line.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use weir_common::policy::RuleId;

use super::encode::{Canonical, Encoder};
use crate::model::{ObjectName, RuleAction, Tier};

/// Ingress or egress, seen from the pod that a policy selects.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum Direction {
    Ingress,
    Egress,
}

/// Who decided.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum RuleOwner {
    /// The rule of a policy that allows; `rule` counts from 0, as in `spec.ingress[0]`.
    Allowed {
        policy: ObjectName,
        direction: Direction,
        rule: usize,
    },
    /// A rule of a ClusterNetworkPolicy; `rule` counts from 0.
    Tiered {
        policy: Arc<str>,
        tier: Tier,
        priority: u16,
        direction: Direction,
        rule: usize,
        name: Option<Arc<str>>,
        action: RuleAction,
    },
    /// No rule allows, and these policies isolate the pod.
    Isolated {
        policies: Vec<ObjectName>,
        direction: Direction,
    },
}

/// The owner of every rule number in the verdicts and ports of one compilation. A number means the
/// same in the compilation before and after, so books can be read one after the other.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct RuleBook(pub(super) BTreeMap<RuleId, RuleOwner>);

impl RuleBook {
    /// The owner of a rule number; `None` for [`RuleId::NONE`] and numbers of another time.
    pub fn owner(&self, rule: RuleId) -> Option<&RuleOwner> {
        self.0.get(&rule)
    }

    /// Both books in one, to explain what is seen while one compilation takes the other's place.
    pub fn with_earlier(&self, earlier: &Self) -> Self {
        let mut both = earlier.clone();
        both.0.extend(self.0.clone());
        both
    }

    /// All of them, in the order of the numbers.
    pub fn iter(&self) -> impl Iterator<Item = (RuleId, &RuleOwner)> {
        self.0.iter().map(|(rule, owner)| (*rule, owner))
    }
}

impl fmt::Display for Direction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ingress => "ingress",
            Self::Egress => "egress",
        })
    }
}

impl fmt::Display for RuleOwner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Allowed {
                policy,
                direction,
                rule,
            } => write!(f, "allowed by {policy} spec.{direction}[{rule}]"),
            Self::Tiered {
                policy,
                tier,
                priority,
                direction,
                rule,
                name,
                action,
            } => {
                let verb = match action {
                    RuleAction::Accept => "allowed",
                    RuleAction::Deny => "denied",
                    RuleAction::Pass => "passed on",
                };
                let tier = tier.as_str();
                write!(
                    f,
                    "{verb} by ClusterNetworkPolicy {policy} spec.{direction}[{rule}]"
                )?;
                if let Some(name) = name {
                    write!(f, " {name:?}")?;
                }
                write!(f, " ({tier}, priority {priority})")
            }
            Self::Isolated {
                policies,
                direction,
            } => {
                write!(f, "no rule allows it; {direction} is isolated by")?;
                for (i, policy) in policies.iter().enumerate() {
                    write!(f, "{} {policy}", if i == 0 { "" } else { "," })?;
                }
                Ok(())
            }
        }
    }
}

impl Canonical for Direction {
    fn encode(&self, to: &mut Encoder) {
        to.tag(*self as u8);
    }
}

impl Canonical for RuleOwner {
    fn encode(&self, to: &mut Encoder) {
        match self {
            Self::Allowed {
                policy,
                direction,
                rule,
            } => {
                to.tag(0);
                policy.encode(to);
                direction.encode(to);
                to.length(*rule);
            }
            Self::Isolated {
                policies,
                direction,
            } => {
                to.tag(1);
                to.list(policies.iter());
                direction.encode(to);
            }
            Self::Tiered {
                policy,
                tier,
                priority,
                direction,
                rule,
                name,
                action,
            } => {
                to.tag(2);
                to.text(policy);
                tier.encode(to);
                to.integer((*priority).into());
                direction.encode(to);
                to.length(*rule);
                to.optional(name.as_ref());
                action.encode(to);
            }
        }
    }
}
