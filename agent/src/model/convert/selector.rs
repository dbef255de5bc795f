//! Label selectors.

use std::sync::Arc;

use crate::model::{Operator, Requirement, Selector};
use crate::watch::wire::LabelSelector;

/// A selector in canonical order, so that two ways to write the same one are equal.
pub(super) fn selector(wire: LabelSelector) -> Result<Selector, String> {
    let mut requirements = Vec::new();
    for (key, value) in wire.match_labels {
        requirements.push(Requirement {
            key: label_key(key)?,
            operator: Operator::In(vec![value.into()]),
        });
    }
    for expression in wire.match_expressions {
        let mut values: Vec<Arc<str>> = expression.values.into_iter().map(Into::into).collect();
        values.sort_unstable();
        values.dedup();
        let operator = match (expression.operator.as_str(), values.is_empty()) {
            ("In", false) => Operator::In(values),
            ("NotIn", false) => Operator::NotIn(values),
            ("Exists", true) => Operator::Exists,
            ("DoesNotExist", true) => Operator::DoesNotExist,
            ("In" | "NotIn", true) => {
                return Err(format!(
                    "operator {} needs values for label {:?}",
                    expression.operator, expression.key
                ));
            }
            ("Exists" | "DoesNotExist", false) => {
                return Err(format!(
                    "operator {} takes no values for label {:?}",
                    expression.operator, expression.key
                ));
            }
            (other, _) => {
                return Err(format!(
                    "operator {other:?} is not In, NotIn, Exists or DoesNotExist"
                ));
            }
        };
        requirements.push(Requirement {
            key: label_key(expression.key)?,
            operator,
        });
    }
    requirements.sort_unstable();
    requirements.dedup();
    Ok(Selector { requirements })
}

fn label_key(key: String) -> Result<Arc<str>, String> {
    if key.is_empty() {
        return Err("a label key is empty".to_owned());
    }
    Ok(key.into())
}
