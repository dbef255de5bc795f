//! What would allow what is denied: the smallest policy that says so. It is text, and whoever applies it decides.
//!
//! A NetworkPolicy isolates what it selects, so one that is suggested selects only pods that are isolated already: those with the labels of the
//! pod that some policy which isolates it selects too. So it opens what it says and closes nothing.

use std::net::IpAddr;

use weir_common::Protocol;

use super::{Outcome, Party, Verdict, Who};
use crate::compile::policy::{Direction, Finding, RuleOwner, Why};
use crate::events;
use crate::model::{
    Labels, ObjectName, Operator, Pod, Requirement, RuleAction, Selector, Snapshot, Tier,
};

/// Labels that a controller gives to each pod or each of its revisions: a policy that asks for them soon selects nobody.
const PASSING_LABELS: [&str; 10] = [
    "apps.kubernetes.io/pod-index",
    "batch.kubernetes.io/controller-uid",
    "batch.kubernetes.io/job-completion-index",
    "batch.kubernetes.io/job-name",
    "controller-revision-hash",
    "controller-uid",
    "job-name",
    "pod-template-generation",
    "pod-template-hash",
    "statefulset.kubernetes.io/pod-name",
];
/// So much of a name is made of the names of who is meant; with the rest it is as long as a label may be.
const NAME: usize = 63 - "allow-".len() - "-12345678".len();
/// The label that the API server gives every namespace: its name.
const NAMESPACE_NAME: &str = "kubernetes.io/metadata.name";

#[derive(Debug, Default)]
pub(super) struct Help {
    pub(super) yaml: Option<String>,
    /// What to know about it.
    pub(super) notes: Vec<String>,
    /// What no policy that is added helps against, and what to do about it.
    pub(super) obstacles: Vec<String>,
}

/// What would help where something is denied.
pub(super) fn help(outcome: &Outcome, objects: &Snapshot) -> Help {
    let mut help = Help::default();
    let mut documents = Vec::new();
    let pair = &outcome.pair;
    let sides = [
        (Direction::Egress, &outcome.egress, &pair.from, &pair.to),
        (Direction::Ingress, &outcome.ingress, &pair.to, &pair.from),
    ];
    for (direction, verdict, subject, peer) in sides {
        let (Verdict::Found(finding), Some(pod)) = (verdict, subject.subject()) else {
            continue;
        };
        if finding.allows {
            continue;
        }
        let end = End {
            direction,
            pod,
            peer,
            protocol: pair.protocol,
            port: pair.port,
        };
        documents.extend(end.help(finding, objects, &mut help));
    }
    help.yaml = (!documents.is_empty()).then(|| documents.join("---\n"));
    help
}

/// One that denies.
struct End<'a> {
    direction: Direction,
    pod: &'a Pod,
    peer: &'a Party,
    protocol: Protocol,
    port: Option<u16>,
}

impl End<'_> {
    fn help(&self, finding: &Finding, objects: &Snapshot, help: &mut Help) -> Option<String> {
        let Why::Rule(owner) = &finding.why else {
            return None;
        };
        match owner {
            RuleOwner::Isolated { policies, .. } => {
                self.warn(&mut help.notes);
                Some(self.network_policy(policies, objects))
            }
            RuleOwner::Tiered {
                policy,
                tier,
                priority,
                action: RuleAction::Deny,
                ..
            } => {
                let Some(before) = priority.checked_sub(1) else {
                    help.obstacles.push(format!(
                        "No policy can be asked before one of priority 0: change ClusterNetworkPolicy {policy} itself."
                    ));
                    return None;
                };
                if self.direction == Direction::Ingress && self.peer_pod().is_none() {
                    help.obstacles.push(format!(
                        "A ClusterNetworkPolicy cannot name addresses that send: change {policy} itself."
                    ));
                    return None;
                }
                help.notes.push(format!(
                    "A NetworkPolicy {}; the ClusterNetworkPolicy below is asked before {policy}.",
                    match tier {
                        Tier::Admin => "has no say here",
                        Tier::Baseline =>
                            "would isolate the pod and leave open only what it says itself",
                    }
                ));
                self.warn(&mut help.notes);
                Some(self.cluster_policy(*tier, before))
            }
            RuleOwner::Allowed { .. } | RuleOwner::Tiered { .. } => None,
        }
    }

    fn warn(&self, notes: &mut Vec<String>) {
        if lasting(&self.pod.labels).next().is_none() {
            notes.push(format!(
                "{} has no labels of its own: the policy below is for every pod of {} that is selected like it.",
                self.pod.id, self.pod.id.namespace
            ));
        }
        if let Who::Pod(peer) = &self.peer.is
            && lasting(&peer.labels).next().is_none()
        {
            notes.push(format!(
                "{} has no labels of its own: the policy below means every pod of {}.",
                peer.id, peer.id.namespace
            ));
        }
        if self.port.is_none() {
            notes.push("Policies know no ICMP: the policy below allows every protocol.".to_owned());
        }
    }

    fn network_policy(&self, isolating: &[ObjectName], objects: &Snapshot) -> String {
        let (section, list, kind) = self.fields();
        let selector = selector(&self.pod.labels, &self.already(isolating, objects), 2);
        let mut says = format!(
            "  namespace: {}\nspec:\n  podSelector:{selector}  policyTypes: [{kind}]\n  {section}:\n  - {list}:\n",
            scalar(&self.pod.id.namespace)
        );
        says.push_str(&match self.peer_pod() {
            None => format!("    - ipBlock: {{cidr: {}}}\n", self.block()),
            Some((namespace, labels)) if *namespace == *self.pod.id.namespace => {
                format!("    - podSelector:{}", self::selector(&labels, &[], 6))
            }
            Some((namespace, labels)) => format!(
                "    - namespaceSelector:\n        matchLabels: {{{NAMESPACE_NAME}: {}}}\n      podSelector:{}",
                scalar(&namespace),
                self::selector(&labels, &[], 6)
            ),
        });
        if let Some(port) = self.port {
            let protocol = events::protocol(self.protocol);
            says.push_str(&format!(
                "    ports:\n    - {{protocol: {protocol}, port: {port}}}\n"
            ));
        }
        let name = self.name(Some(&self.pod.id.namespace), &says);
        format!(
            "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata:\n  name: {name}\n{says}"
        )
    }

    fn cluster_policy(&self, tier: Tier, priority: u16) -> String {
        let (section, list, _) = self.fields();
        let mut says = format!(
            "spec:\n  tier: {}\n  priority: {priority}\n  subject:\n    pods:\n      namespaceSelector:\n        \
             matchLabels: {{{NAMESPACE_NAME}: {}}}\n      podSelector:{}  {section}:\n  - action: Accept\n    {list}:\n",
            tier.as_str(),
            scalar(&self.pod.id.namespace),
            selector(&self.pod.labels, &[], 6),
        );
        says.push_str(&match self.peer_pod() {
            None => format!("    - networks: [{}]\n", scalar(&self.block())),
            Some((namespace, labels)) => format!(
                "    - pods:\n        namespaceSelector:\n          matchLabels: {{{NAMESPACE_NAME}: {}}}\n        \
                 podSelector:{}",
                scalar(&namespace),
                selector(&labels, &[], 8)
            ),
        });
        if let Some(port) = self.port {
            let protocol = events::protocol(self.protocol).to_lowercase();
            says.push_str(&format!(
                "    protocols:\n    - {protocol}: {{destinationPort: {{number: {port}}}}}\n"
            ));
        }
        let name = self.name(None, &says);
        format!(
            "apiVersion: policy.networking.k8s.io/v1alpha2\nkind: ClusterNetworkPolicy\nmetadata:\n  name: {name}\n{says}"
        )
    }

    fn fields(&self) -> (&'static str, &'static str, &'static str) {
        match self.direction {
            Direction::Ingress => ("ingress", "from", "Ingress"),
            Direction::Egress => ("egress", "to", "Egress"),
        }
    }

    /// The namespace and labels of who is at the other end, if policy sees a pod there.
    fn peer_pod(&self) -> Option<(String, Labels)> {
        match &self.peer.is {
            Who::Pod(pod) => Some((pod.id.namespace.to_string(), pod.labels.clone())),
            Who::Dns => {
                let labels = Labels::from([("k8s-app".into(), "kube-dns".into())]);
                Some(("kube-system".to_owned(), labels))
            }
            _ => None,
        }
    }

    fn block(&self) -> String {
        match self.peer.address {
            IpAddr::V4(v4) => format!("{v4}/32"),
            IpAddr::V6(v6) => format!("{v6}/128"),
        }
    }

    /// What a policy that isolates the pod asks beyond the labels that are asked for anyway: of several the one with the least.
    fn already(&self, isolating: &[ObjectName], objects: &Snapshot) -> Vec<Requirement> {
        let asked: Labels = lasting(&self.pod.labels)
            .map(|(k, v)| (k.clone(), v.clone()))
            .collect();
        let policies = isolating.iter().filter_map(|id| objects.policies.get(id));
        let more = policies.map(|policy| -> Vec<Requirement> {
            let requirements = policy.subject.requirements.iter();
            let is_new = |requirement: &&Requirement| {
                let alone = Selector {
                    requirements: vec![(*requirement).clone()],
                };
                // The API takes no such list, and it excludes nobody.
                let is_nothing =
                    matches!(&requirement.operator, Operator::NotIn(values) if values.is_empty());
                let is_implied = asked.contains_key(&requirement.key) && alone.matches(&asked);
                !is_nothing && !is_implied
            };
            requirements.filter(is_new).cloned().collect()
        });
        more.min_by_key(Vec::len).unwrap_or_default()
    }

    /// Readable, and another for each other thing that is said: whoever applies two has both. `within` is the namespace of the policy.
    fn name(&self, within: Option<&str>, says: &str) -> String {
        let preposition = match self.direction {
            Direction::Ingress => "from",
            Direction::Egress => "to",
        };
        let of = |pod: &ObjectName| match within {
            Some(namespace) if namespace == &*pod.namespace => pod.name.to_string(),
            _ => format!("{}-{}", pod.namespace, pod.name),
        };
        let peer = match &self.peer.is {
            Who::Pod(pod) => of(&pod.id),
            _ => self.peer.address.to_string(),
        };
        let port = self.port.map_or_else(String::new, |port| {
            format!("-{}-{port}", events::protocol(self.protocol))
        });
        let text = format!("{}-{preposition}-{peer}{port}", of(&self.pod.id)).to_lowercase();
        let plain = text.chars().map(|c| match c {
            'a'..='z' | '0'..='9' => c,
            _ => '-',
        });
        let plain: String = plain.take(NAME).collect();
        format!("allow-{}-{:08x}", plain.trim_end_matches('-'), hash(says))
    }
}

/// The same of the same text on every machine and in every version: 64-bit FNV-1a, its halves folded into one.
fn hash(text: &str) -> u32 {
    let fold = |hash: u64, byte: u8| (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
    let hash = text.bytes().fold(0xcbf2_9ce4_8422_2325, fold);
    ((hash >> 32) ^ (hash & 0xffff_ffff)) as u32
}

/// Labels that stay as long as the pod's owner.
fn lasting(labels: &Labels) -> impl Iterator<Item = (&std::sync::Arc<str>, &std::sync::Arc<str>)> {
    let labels = labels.iter();
    labels.filter(|(key, _)| !PASSING_LABELS.contains(&&***key))
}

/// What stands behind `podSelector:`, up to the end of its last line. `depth` is that of the field.
fn selector(labels: &Labels, more: &[Requirement], depth: usize) -> String {
    let inner = " ".repeat(depth + 2);
    let mut out = String::new();
    let labels: Vec<String> = lasting(labels)
        .map(|(key, value)| format!("{}: {}", scalar(key), scalar(value)))
        .collect();
    if !labels.is_empty() {
        out.push_str(&format!("{inner}matchLabels: {{{}}}\n", labels.join(", ")));
    }
    if !more.is_empty() {
        out.push_str(&format!("{inner}matchExpressions:\n"));
    }
    for Requirement { key, operator } in more {
        let (operator, values) = match operator {
            Operator::In(values) => ("In", Some(values)),
            Operator::NotIn(values) => ("NotIn", Some(values)),
            Operator::Exists => ("Exists", None),
            Operator::DoesNotExist => ("DoesNotExist", None),
        };
        let values = values.map_or_else(String::new, |values| {
            let values: Vec<String> = values.iter().map(|it| scalar(it)).collect();
            format!(", values: [{}]", values.join(", "))
        });
        out.push_str(&format!(
            "{inner}- {{key: {}, operator: {operator}{values}}}\n",
            scalar(key)
        ));
    }
    match out.is_empty() {
        true => " {}\n".to_owned(),
        false => format!("\n{out}"),
    }
}

/// Text as YAML reads it back: in quotes, unless it can be nothing but text.
fn scalar(text: &str) -> String {
    let is_plain = text.bytes().next().is_some_and(|c| c.is_ascii_lowercase())
        && text
            .bytes()
            .all(|c| c.is_ascii_alphanumeric() || matches!(c, b'-' | b'.' | b'/' | b'_'))
        && !["true", "false", "null", "yes", "no", "on", "off", "y", "n"].contains(&text);
    match is_plain {
        true => text.to_owned(),
        false => format!("{text:?}"),
    }
}
