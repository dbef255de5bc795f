//! The table of situations. A row is a name that a reader understands, the policies, and what a person says about it.

mod blocks;
mod isolation;
mod peers;
mod ports;
mod stacks;
mod tiers;

use super::objects::PolicyText;

/// What is changed to, from the situation before it. Policies are named by their place, so one of the same namespace and place is an
/// update of the one before.
#[derive(Clone, Debug)]
pub struct Situation {
    pub name: &'static str,
    pub policies: Vec<PolicyText>,
    /// A pod (`xa`) or a namespace (`x`), and its labels instead of the usual ones.
    pub labels: Vec<(&'static str, &'static str)>,
    /// A pod that goes, and comes again with other addresses.
    pub comes_again: Option<&'static str>,
    /// What a person says about it; `super::who`.
    pub says: &'static str,
}

impl Situation {
    /// No policy, and everybody has the usual labels.
    #[must_use]
    pub fn nothing() -> Self {
        situation("no policy", &[], "<t80 * | >t80 *")
    }

    fn labelled(mut self, who: &'static str, labels: &'static str) -> Self {
        self.labels.push((who, labels));
        self
    }

    fn comes_again(mut self, who: &'static str) -> Self {
        self.comes_again = Some(who);
        self
    }
}

fn situation(name: &'static str, policies: &[PolicyText], says: &'static str) -> Situation {
    Situation {
        name,
        policies: policies.to_vec(),
        labels: Vec::new(),
        comes_again: None,
        says,
    }
}

/// A situation with one policy, of the pod `a` in `x`.
fn of_xa(name: &'static str, rest: &'static str, says: &'static str) -> Situation {
    situation(name, &[("x", A, rest)], says)
}

/// The subject: the pod `a`, the pod `c`, every pod of the policy's namespace.
const A: &str = "matchLabels: {pod: a}";
const C: &str = "matchLabels: {pod: c}";
const ALL: &str = "";

/// All of them, in an order.
#[must_use]
pub fn all() -> Vec<Situation> {
    [
        isolation::all(),
        peers::all(),
        ports::all(),
        blocks::all(),
        stacks::all(),
        tiers::all(),
    ]
    .concat()
}
