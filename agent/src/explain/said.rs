//! An outcome in words. What would help is in `suggest`.

use std::sync::Arc;

use weir_cli::explained::{self, Case, Lack, Nearest, Side};
use weir_common::Protocol;

use super::suggest::Help;
use super::{Outcome, Party, Verdict, Who};
use crate::compile::policy::{Direction, Finding, Missing, MissingPorts, Near, RuleOwner, Why};
use crate::events;
use crate::model::{Operator, Requirement};

/// One case of an answer.
pub(super) fn case(outcome: &Outcome, help: Help) -> Case {
    let pair = &outcome.pair;
    let (yaml, advice) = match help.obstacles.is_empty() {
        true => (help.yaml, help.notes),
        false => (None, help.obstacles),
    };
    Case {
        source: party(&pair.from),
        destination: party(&pair.to),
        protocol: events::protocol(pair.protocol),
        port: pair.port,
        allowed: outcome.allows(),
        egress: side(&outcome.egress, &pair.from, Direction::Egress),
        ingress: side(&outcome.ingress, &pair.to, Direction::Ingress),
        yaml,
        advice,
    }
}

/// What denies a packet after something was added to a state that denied it: in the words of that state, where they hold.
pub(super) fn denial(before: &Outcome, after: &Outcome) -> String {
    let pair = &before.pair;
    let sides = [
        (&before.egress, &after.egress, &pair.from, Direction::Egress),
        (
            &before.ingress,
            &after.ingress,
            &pair.to,
            Direction::Ingress,
        ),
    ];
    let denying = sides.iter().filter(|(_, after, ..)| !after.allows());
    let words: Vec<String> = denying
        .map(|(before, after, subject, direction)| {
            let verdict = if before.allows() { after } else { before };
            let side = side(verdict, subject, *direction);
            format!("{direction}: {}", side.words)
        })
        .collect();
    words.join("; ")
}

fn party(party: &Party) -> explained::Party {
    let (kind, name, node) = match &party.is {
        Who::Pod(pod) => ("pod", Some(pod.id.to_string()), pod.node.as_ref()),
        Who::HostPod(pod) => ("host-network pod", Some(pod.to_string()), None),
        Who::Node(node) => ("node", Some(node.to_string()), None),
        Who::Dns => ("dns", None, None),
        Who::Outside => ("outside", None, None),
    };
    explained::Party {
        address: party.address,
        kind: kind.to_owned(),
        name,
        node: node.map(ToString::to_string),
    }
}

fn side(verdict: &Verdict, subject: &Party, direction: Direction) -> Side {
    let simple = |why: &str, words: String| Side {
        allowed: true,
        why: why.to_owned(),
        words,
        rule: None,
        isolated_by: Vec::new(),
        passed_by: Vec::new(),
        nearest: Vec::new(),
        audit: None,
    };
    let finding = match (verdict, &subject.is) {
        (Verdict::Found(finding), _) => finding,
        (Verdict::NoSubject, Who::Pod(pod)) => {
            let words = format!("{} is on no node yet, so nobody judges", pod.id);
            return simple("not-a-pod", words);
        }
        (Verdict::NoSubject, Who::HostPod(pod)) => {
            let words = format!("policies do not apply: {pod} is in the network of its node");
            return simple("host-network", words);
        }
        (Verdict::NoSubject, Who::Node(_) | Who::Dns | Who::Outside) => {
            return simple(
                "not-a-pod",
                "policies do not apply: it is no pod".to_owned(),
            );
        }
    };
    let (why, words, rule) = match &finding.why {
        Why::Itself => (
            "itself",
            "a pod and itself: always allowed".to_owned(),
            None,
        ),
        Why::OwnNode => {
            let words = "a pod and its own node: always allowed".to_owned();
            ("own-node", words, None)
        }
        Why::Open => (
            "open",
            format!("open: no policy isolates the pod for {direction}"),
            None,
        ),
        Why::Rule(owner @ RuleOwner::Isolated { .. }) => {
            ("isolated", owner.to_string(), Some(owner.to_string()))
        }
        Why::Rule(owner) => ("rule", owner.to_string(), Some(owner.to_string())),
    };
    Side {
        allowed: finding.allows,
        why: why.to_owned(),
        words,
        rule,
        isolated_by: finding
            .isolated_by
            .iter()
            .map(ToString::to_string)
            .collect(),
        passed_by: finding.passed_by.iter().map(ToString::to_string).collect(),
        nearest: nearest(finding),
        audit: finding.audit.as_ref().map(ToString::to_string),
    }
}

fn nearest(finding: &Finding) -> Vec<Nearest> {
    let all = finding.nearest.iter();
    all.map(|Near { rule, missing }| Nearest {
        rule: place(rule),
        missing: missing.iter().map(lack).collect(),
    })
    .collect()
}

/// Where a rule stands, without what it does.
fn place(rule: &RuleOwner) -> String {
    match rule {
        RuleOwner::Allowed {
            policy,
            direction,
            rule,
        } => format!("{policy} spec.{direction}[{rule}]"),
        other => other.to_string(),
    }
}

fn lack(missing: &Missing) -> Lack {
    let (kind, words) = match missing {
        Missing::PodLabel(asked, is) => (
            "pod-label",
            format!("the pod at the other end {}", label(asked, is.as_ref())),
        ),
        Missing::NamespaceLabel(asked, is) => (
            "namespace-label",
            format!(
                "the namespace at the other end {}",
                label(asked, is.as_ref())
            ),
        ),
        Missing::NamespaceUnknown(name) => (
            "namespace",
            format!("there is no Namespace {name}, so its labels are not known"),
        ),
        Missing::Namespace(name) => (
            "namespace",
            format!(
                "it means pods of {name} only, the policy's own namespace (it has no namespaceSelector)"
            ),
        ),
        Missing::APod => ("pod", "it means pods, and the other end is none".to_owned()),
        Missing::Block(cidr) => ("block", format!("the other end's address is not in {cidr}")),
        Missing::Excepted { cidr, by } => (
            "block",
            format!("the other end's address is in {cidr}, and `except` {by} takes it out"),
        ),
        Missing::Anybody => (
            "peer",
            "it means nobody: none of its peers is understood".to_owned(),
        ),
        Missing::Port(ports) => ("port", format!("it is for {}", self::ports(ports))),
    };
    Lack {
        kind: kind.to_owned(),
        words,
    }
}

fn label(Requirement { key, operator }: &Requirement, is: Option<&Arc<str>>) -> String {
    let has = match is {
        Some(value) => format!("has {key}={value}"),
        None => format!("has no label {key}"),
    };
    let list = |values: &[Arc<str>]| values.join(", ");
    match operator {
        Operator::In(values) => match &values[..] {
            [value] => format!("{has}, not {key}={value}"),
            values => format!("{has}, not one of {key}={}", list(values)),
        },
        Operator::NotIn(values) => format!("{has}, and it must not be {}", list(values)),
        Operator::Exists => format!("{has} (any value would do)"),
        Operator::DoesNotExist => format!("{has}, which it must not have"),
    }
}

fn ports(ports: &MissingPorts) -> String {
    let numbers = ports.numbers.iter().map(|(protocol, first, last)| {
        let protocol = events::protocol(*protocol);
        match (first, last) {
            (0, &u16::MAX) => format!("every port of {protocol}"),
            _ if first == last => format!("{protocol} {first}"),
            _ => format!("{protocol} {first}-{last}"),
        }
    });
    let names = ports.names.iter().map(|(protocol, name): &(Protocol, _)| {
        let protocol = events::protocol(*protocol);
        format!("the {protocol} port that the other end calls {name:?}")
    });
    let all: Vec<String> = numbers.chain(names).collect();
    match all.is_empty() {
        true => "a port by a name that the pod has not".to_owned(),
        false => format!("{} only", all.join(", ")),
    }
}
