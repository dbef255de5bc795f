//! Label selectors (apimachinery `LabelSelector`).

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

/// Labels of an object.
pub type Labels = BTreeMap<Arc<str>, Arc<str>>;

/// All requirements must hold; none at all selects everything.
#[derive(Clone, Debug, Default, Deserialize, Eq, Hash, Ord, PartialEq, PartialOrd, Serialize)]
pub struct Selector {
    pub requirements: Vec<Requirement>,
}

/// One requirement of a label.
#[derive(Clone, Debug, Deserialize, Eq, Hash, Ord, PartialEq, PartialOrd, Serialize)]
pub struct Requirement {
    pub key: Arc<str>,
    pub operator: Operator,
}

/// What is required of the label.
#[derive(Clone, Debug, Deserialize, Eq, Hash, Ord, PartialEq, PartialOrd, Serialize)]
pub enum Operator {
    /// The label exists, with one of the values.
    In(Vec<Arc<str>>),
    /// The label does not exist, or has none of the values.
    NotIn(Vec<Arc<str>>),
    Exists,
    DoesNotExist,
}

impl Selector {
    /// Does it select an object with these labels?
    pub fn matches(&self, labels: &Labels) -> bool {
        self.requirements.iter().all(|r| {
            let value = labels.get(&r.key);
            match &r.operator {
                Operator::In(values) => value.is_some_and(|v| values.contains(v)),
                Operator::NotIn(values) => value.is_none_or(|v| !values.contains(v)),
                Operator::Exists => value.is_some(),
                Operator::DoesNotExist => value.is_none(),
            }
        })
    }
}
