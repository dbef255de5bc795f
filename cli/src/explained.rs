//! The answer to `weir policy explain`, and its words for people. JSON names are part of `-o json` and stay stable.

use std::fmt::Arguments;
use std::net::IpAddr;

use serde::{Deserialize, Serialize};

/// `GET /v1/policy/explain?from=…&to=…`.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Explained {
    /// As they were asked.
    pub from: String,
    pub to: String,
    /// What was asked about instead of what was named: the backends of a Service. In words.
    pub note: Option<String>,
    /// A change of policy is on its way into the kernel of the node that was asked: what it waits for. Until it is there, packets are judged
    /// as before or as is said.
    #[serde(default)]
    pub awaits: Option<String>,
    /// One for each pair of addresses; of a Service for each backend.
    pub cases: Vec<Case>,
    /// Backends that were left out, since there are so many.
    pub left_out: usize,
}

/// One sender, one receiver.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Case {
    pub source: Party,
    pub destination: Party,
    pub protocol: String,
    /// Absent where the protocol has none.
    pub port: Option<u16>,
    /// Both ends allow it.
    pub allowed: bool,
    pub egress: Side,
    pub ingress: Side,
    /// Policies that would allow it, as YAML; absent where nothing has to be done or nothing of the kind helps.
    pub yaml: Option<String>,
    /// What to know about them, or what else to do. In words.
    pub advice: Vec<String>,
}

/// Who is at an end.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Party {
    pub address: IpAddr,
    /// `pod`, `host-network pod`, `node`, `dns` or `outside`.
    pub kind: String,
    /// `namespace/name` of a pod, the name of a node.
    pub name: Option<String>,
    /// Of a pod.
    pub node: Option<String>,
}

/// What one end makes of it.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Side {
    pub allowed: bool,
    /// `rule`, `isolated`, `open`, `itself`, `own-node`, `not-a-pod`, `host-network`.
    pub why: String,
    /// One sentence.
    pub words: String,
    /// The policy and rule that decides.
    pub rule: Option<String>,
    /// NetworkPolicies that isolate the pod in this direction.
    pub isolated_by: Vec<String>,
    /// Rules of ClusterNetworkPolicies that passed it on.
    pub passed_by: Vec<String>,
    /// Of a denial by isolation: the rules that lack the least.
    pub nearest: Vec<Nearest>,
    /// Of what is allowed: who would deny it, were policies enforced that are only audited.
    #[serde(default)]
    pub audit: Option<String>,
}

/// A rule that would allow it, but for something.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Nearest {
    /// Such as `shop/db spec.ingress[0]`.
    pub rule: String,
    pub missing: Vec<Lack>,
}

/// What is missing.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Lack {
    /// `pod-label`, `namespace-label`, `namespace`, `pod`, `block`, `port` or `peer`.
    pub kind: String,
    pub words: String,
}

impl Case {
    /// Is it the same of other addresses? Then people read it once.
    fn says_as(&self, other: &Self) -> bool {
        let rest = |it: &Self| {
            let mut it = it.clone();
            it.source.address = [0, 0, 0, 0].into();
            it.destination.address = it.source.address;
            it.protocol = if it.port.is_some() {
                it.protocol
            } else {
                String::new()
            };
            it
        };
        self.source.name.is_some() && self.destination.name.is_some() && rest(self) == rest(other)
    }
}

/// For people.
pub fn words(explained: &Explained) -> String {
    let mut out = String::new();
    if let Some(note) = &explained.note {
        line(&mut out, format_args!("{note}\n"));
    }
    if let Some(why) = &explained.awaits {
        line(
            &mut out,
            format_args!(
                "A change of policy is under way on this node ({why}): a packet may still be judged by what was before.\n"
            ),
        );
    }
    for (i, (case, same)) in distinct(&explained.cases).into_iter().enumerate() {
        if i > 0 {
            out.push('\n');
        }
        verdict(case, same, &mut out);
        help(case, &mut out);
    }
    if explained.left_out > 0 {
        line(
            &mut out,
            format_args!("\n{} more backends are not looked at", explained.left_out),
        );
    }
    out
}

/// What was decided and by what, without what would help.
pub fn verdicts(cases: &[Case]) -> String {
    let mut out = String::new();
    for (case, same) in distinct(cases) {
        verdict(case, same, &mut out);
    }
    out
}

/// Those that say another thing each, and how many more say the same.
fn distinct(cases: &[Case]) -> Vec<(&Case, usize)> {
    let mut said: Vec<(&Case, usize)> = Vec::new();
    for case in cases {
        match said.iter_mut().find(|(it, _)| it.says_as(case)) {
            Some((_, same)) => *same += 1,
            None => said.push((case, 0)),
        }
    }
    said
}

fn verdict(case: &Case, same: usize, out: &mut String) {
    let verdict = if case.allowed { "ALLOWED" } else { "DENIED" };
    let port = case
        .port
        .map_or_else(String::new, |port| format!(" port {port}"));
    line(
        out,
        format_args!(
            "{verdict}  {} -> {}  {}{port}",
            party(&case.source),
            party(&case.destination),
            case.protocol
        ),
    );
    if same > 0 {
        out.push_str("  the same for their addresses of the other family\n");
    }
    for (direction, side) in [("egress", &case.egress), ("ingress", &case.ingress)] {
        let sign = if side.allowed { "yes" } else { "NO" };
        line(out, format_args!("  {direction:8}{sign:4}{}", side.words));
        for rule in &side.passed_by {
            line(out, format_args!("{:14}{rule}", ""));
        }
        if let Some(audit) = &side.audit {
            line(
                out,
                format_args!("{:14}audit: would be denied: {audit}", ""),
            );
        }
        for near in &side.nearest {
            line(out, format_args!("{:14}nearest: {}", "", near.rule));
            for lack in &near.missing {
                line(out, format_args!("{:16}- {}", "", lack.words));
            }
        }
    }
}

fn help(case: &Case, out: &mut String) {
    for advice in &case.advice {
        line(out, format_args!("  {advice}"));
    }
    if let Some(yaml) = &case.yaml {
        out.push_str("\nThis would allow it:\n\n");
        out.push_str(yaml);
    }
}

fn party(party: &Party) -> String {
    match (&party.name, party.kind.as_str()) {
        (Some(name), "pod") => format!("{name} ({})", party.address),
        (Some(name), kind) => format!("{kind} {name} ({})", party.address),
        (None, kind) => format!("{} ({kind})", party.address),
    }
}

fn line(out: &mut String, text: Arguments<'_>) {
    out.push_str(&text.to_string());
    out.push('\n');
}
