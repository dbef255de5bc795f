//! Flat tables answer as the oracle does, whatever the cluster.

use proptest::prelude::*;
use weir_agent::compile::policy::{Direction, RuleOwner};
use weir_agent::model::{Operator, PeerSelector, Peers, Ports, Rule, Selector};
use weir_common::Protocol;
use weir_common::policy::RuleId;
use weir_tests::oracle::{Cluster, Party, Who, may_receive, may_send};

use super::nouns::{Compiled, NODES, compiled, compiler, parties, snapshot, touched, view};
use super::random::{PROBES, Parts, cluster};
use super::walk::{Answer, judge};

/// One question to both: may `pod` of this node exchange this with `peer`?
#[derive(Debug)]
#[expect(dead_code, reason = "read by people, when a test fails")]
struct Question<'a> {
    subject: &'a Party,
    direction: Direction,
    peer: &'a Party,
    probe: (Protocol, u16),
}

/// Asks everything there is to ask of the tables of a node, and hands over what the oracle and the
/// tables say.
fn ask_everything(
    cluster: &Cluster,
    node: &str,
    compiled: &Compiled,
    mut check: impl FnMut(Question<'_>, bool, Answer),
) {
    let parties = parties(cluster);
    for subject in &parties {
        let Who::Pod(pod) = &subject.is else { continue };
        if pod.node.as_deref() != Some(node) {
            continue;
        }
        // The datapath lets a pod reach itself without asking.
        for peer in parties.iter().filter(|peer| peer.is != subject.is) {
            for probe in PROBES {
                for direction in [Direction::Ingress, Direction::Egress] {
                    let (protocol, port) = probe;
                    let oracle = match direction {
                        Direction::Ingress => may_receive(cluster, peer, subject, protocol, port),
                        Direction::Egress => may_send(cluster, subject, peer, protocol, port),
                    };
                    let answer = judge(compiled.rows(), &pod.id, direction, peer.address, probe);
                    let question = Question {
                        subject,
                        direction,
                        peer,
                        probe,
                    };
                    check(question, oracle, answer);
                }
            }
        }
    }
}

/// Does the book name an owner that can give such an answer?
fn is_owned(compiled: &Compiled, answer: Answer, asked: Direction) -> bool {
    match answer {
        Answer::Allowed(RuleId::NONE) => true,
        Answer::Allowed(rule) => matches!(
            compiled.book().owner(rule),
            Some(RuleOwner::Allowed { direction, .. }) if *direction == asked
        ),
        Answer::Denied(rule) => matches!(
            compiled.book().owner(rule),
            Some(RuleOwner::Isolated { direction, .. }) if *direction == asked
        ),
        Answer::Missing => false,
    }
}

fn agrees(cluster: &Cluster, node: &str, compiled: &Compiled) {
    ask_everything(cluster, node, compiled, |question, oracle, answer| {
        assert_eq!(answer.is_allowed(), oracle, "{answer:?} for {question:?}");
        let direction = question.direction;
        assert!(
            is_owned(compiled, answer, direction),
            "{answer:?} for {question:?}"
        );
    });
}

/// The same cluster, written down in another order wherever order means nothing.
fn reversed(cluster: &Cluster) -> Cluster {
    let mut cluster = cluster.clone();
    cluster.namespaces.reverse();
    cluster.pods.reverse();
    cluster.policies.reverse();
    for policy in &mut cluster.policies {
        reverse_selector(&mut policy.subject);
        for rules in [&mut policy.ingress, &mut policy.egress] {
            rules.iter_mut().flatten().for_each(reverse_rule);
        }
    }
    cluster
}

fn reverse_rule(rule: &mut Rule) {
    if let Peers::Of(peers) = &mut rule.peers {
        peers.reverse();
        for peer in peers {
            if let PeerSelector::Pods(pods) = peer {
                reverse_selector(&mut pods.pods);
                pods.namespaces.iter_mut().for_each(reverse_selector);
            }
        }
    }
    if let Ports::Of(ports) = &mut rule.ports {
        ports.reverse();
    }
}

fn reverse_selector(selector: &mut Selector) {
    selector.requirements.reverse();
    for requirement in &mut selector.requirements {
        if let Operator::In(values) | Operator::NotIn(values) = &mut requirement.operator {
            values.reverse();
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn tables_answer_as_the_oracle_does(cluster in cluster(Parts::Supported)) {
        for (node, _) in NODES {
            let compiled = compiled(&cluster, node);
            prop_assert!(compiled.reports().is_empty(), "{:?}", compiled.reports());
            agrees(&cluster, node, &compiled);
        }
    }

    #[test]
    fn numbers_that_collide_change_no_answer(
        before in cluster(Parts::Supported),
        after in cluster(Parts::Supported),
    ) {
        let (first, second) = (snapshot(&before), snapshot(&after));
        let mut compiler = compiler(&first, "n1", 2);
        agrees(&before, "n1", &Compiled::of(&compiler));
        compiler.update(&touched(&first, &second), &second, &view("n1"));
        compiler.plan();
        compiler.commit();
        // Policies of a namespace that is being deleted may be gone, and hold.
        let policies = compiler.policies().map(|it| (**it).clone()).collect();
        let after = Cluster { policies, ..after };
        agrees(&after, "n1", &Compiled::of(&compiler));
    }

    #[test]
    fn what_is_not_supported_never_allows_more(cluster in cluster(Parts::All)) {
        let compiled = compiled(&cluster, "n1");
        ask_everything(&cluster, "n1", &compiled, |question, oracle, answer| {
            assert!(answer != Answer::Missing, "{question:?}");
            assert!(oracle || !answer.is_allowed(), "{answer:?} for {question:?}");
            if oracle && !answer.is_allowed() {
                assert!(!compiled.reports().is_empty(), "unreported: {question:?}");
            }
        });
    }

    #[test]
    fn order_changes_no_row(cluster in cluster(Parts::All)) {
        let fresh = compiled(&cluster, "n1");
        let shuffled = compiled(&reversed(&cluster), "n1");
        prop_assert_eq!(fresh.rows(), shuffled.rows());
        prop_assert_eq!(fresh.book(), shuffled.book());
    }
}
