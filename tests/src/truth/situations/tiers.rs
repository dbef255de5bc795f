//! ClusterNetworkPolicies: tiers, priorities, the order of rules, and what is passed on.

use super::{A, Situation, situation};
use crate::truth::objects::{PolicyText, TIERED};

/// About the pod `a` of `x`.
const XA: &str =
    "pods: {namespaceSelector: {matchLabels: {team: tx}}, podSelector: {matchLabels: {pod: a}}}";
/// About every pod of `x`.
const X: &str = "namespaces: {matchLabels: {team: tx}}";

const DENY_ALL: PolicyText = ("x", A, "policyTypes: [Ingress, Egress]");

fn of_xa(name: &'static str, rest: &'static str, says: &'static str) -> Situation {
    situation(name, &[(TIERED, XA, rest)], says)
}

pub(super) fn all() -> Vec<Situation> {
    vec![
        of_xa(
            "a tier that says nothing",
            "tier: Admin, priority: 0",
            "<t80 * | >t80 *",
        ),
        of_xa(
            "a tier denies a namespace, and nobody is isolated by it",
            "tier: Admin, priority: 1, ingress: [{action: Deny, from: [{namespaces: {matchLabels: {team: ty}}}]}]",
            "<t80 x* z* n2 out | <s81 x* z* n2 out | >t80 *",
        ),
        of_xa(
            "pods of namespaces, one port of one protocol",
            "tier: Admin, priority: 1, ingress: [{action: Deny, from: [{pods: {namespaceSelector: {matchLabels: {team: ty}}, podSelector: {matchLabels: {pod: b}}}}], \
             protocols: [{tcp: {destinationPort: {number: 80}}}]}]",
            "<t80 x* ya yc z* n2 out | <t81 * | <u80 *",
        ),
        of_xa(
            "a range of ports, and UDP",
            "tier: Admin, priority: 1, ingress: [{action: Deny, from: [{namespaces: {}}], \
             protocols: [{tcp: {destinationPort: {range: {start: 81, end: 90}}}}, {udp: {destinationPort: {range: {start: 1, end: 65535}}}}]}]",
            "<t80 * | <t81 n2 out | <u80 n2 out | <s80 *",
        ),
        of_xa(
            "the first rule decides",
            "tier: Admin, priority: 1, ingress: [{action: Accept, from: [{pods: {namespaceSelector: {matchLabels: {team: ty}}, podSelector: {matchLabels: {pod: a}}}}]}, \
             {action: Deny, from: [{namespaces: {}}]}]",
            "<t80 ya n2 out",
        ),
        situation(
            "the lower priority decides",
            &[
                (
                    TIERED,
                    XA,
                    "tier: Admin, priority: 9, ingress: [{action: Accept, from: [{namespaces: {}}]}]",
                ),
                (
                    TIERED,
                    XA,
                    "tier: Admin, priority: 3, ingress: [{action: Deny, from: [{namespaces: {matchLabels: {team: tz}}}]}]",
                ),
            ],
            "<t80 x* y* n2 out",
        ),
        situation(
            "an Admin Accept stands over default deny",
            &[
                DENY_ALL,
                (
                    TIERED,
                    XA,
                    "tier: Admin, priority: 1, ingress: [{action: Accept, from: [{namespaces: {matchLabels: {team: ty}}}]}]",
                ),
            ],
            "<t80 y* | >t80",
        ),
        situation(
            "an Admin Deny stands over an allowing policy",
            &[
                ("x", A, "ingress: [{}]"),
                (
                    TIERED,
                    X,
                    "tier: Admin, priority: 1, ingress: [{action: Deny, from: [{namespaces: {matchLabels: {team: ty}}}]}]",
                ),
            ],
            "<t80 x* z* n2 out",
        ),
        situation(
            "what is passed on, policies decide",
            &[
                (
                    "x",
                    A,
                    "ingress: [{from: [{namespaceSelector: {}, podSelector: {matchLabels: {pod: b}}}]}]",
                ),
                (
                    TIERED,
                    XA,
                    "tier: Admin, priority: 1, ingress: [{action: Pass, from: [{namespaces: {matchLabels: {team: ty}}}]}, {action: Deny, from: [{namespaces: {}}]}]",
                ),
            ],
            "<t80 yb",
        ),
        of_xa(
            "or nobody does",
            "tier: Admin, priority: 1, ingress: [{action: Pass, from: [{namespaces: {matchLabels: {team: ty}}}]}, {action: Deny, from: [{namespaces: {}}]}]",
            "<t80 y* n2 out",
        ),
        of_xa(
            "Baseline decides where no policy isolates",
            "tier: Baseline, priority: 1, ingress: [{action: Deny, from: [{namespaces: {matchLabels: {team: ty}}}]}]",
            "<t80 x* z* n2 out",
        ),
        situation(
            "and not where one does",
            &[
                (
                    "x",
                    A,
                    "ingress: [{from: [{namespaceSelector: {matchLabels: {team: ty}}}]}]",
                ),
                (
                    TIERED,
                    XA,
                    "tier: Baseline, priority: 1, ingress: [{action: Deny, from: [{namespaces: {matchLabels: {team: ty}}}]}]",
                ),
            ],
            "<t80 y*",
        ),
        situation(
            "what is passed on where nobody isolates, Baseline decides",
            &[
                (
                    TIERED,
                    XA,
                    "tier: Admin, priority: 1, ingress: [{action: Pass, from: [{namespaces: {matchLabels: {team: ty}}}]}, \
                     {action: Deny, from: [{namespaces: {matchLabels: {team: tz}}}]}]",
                ),
                (
                    TIERED,
                    XA,
                    "tier: Baseline, priority: 1, ingress: [{action: Deny, from: [{pods: {namespaceSelector: {}, podSelector: {matchLabels: {pod: a}}}}]}]",
                ),
            ],
            "<t80 xb xc yb yc n2 out",
        ),
        of_xa(
            "Baseline denies what the pod sends",
            "tier: Baseline, priority: 1, egress: [{action: Deny, to: [{networks: [@yb4/32, '@yb6/128']}, {namespaces: {matchLabels: {team: tz}}}]}]",
            "<t80 * | >t80 x* ya yc n2 out",
        ),
        situation(
            "and not where a policy isolates what it sends",
            &[
                (
                    "x",
                    A,
                    "policyTypes: [Egress], egress: [{to: [{namespaceSelector: {matchLabels: {team: tz}}}]}]",
                ),
                (
                    TIERED,
                    XA,
                    "tier: Baseline, priority: 1, egress: [{action: Deny, to: [{namespaces: {matchLabels: {team: tz}}}]}]",
                ),
            ],
            "<t80 * | >t80 z*",
        ),
        of_xa(
            "a port of SCTP",
            "tier: Admin, priority: 1, ingress: [{action: Deny, from: [{namespaces: {matchLabels: {team: ty}}}], \
             protocols: [{sctp: {destinationPort: {number: 80}}}]}]",
            "<t80 * | <u80 * | <s80 x* z* n2 out | <s81 *",
        ),
        of_xa(
            "egress to networks, whosever they are",
            "tier: Admin, priority: 1, egress: [{action: Accept, to: [{networks: [@yb4/32, '@yb6/128']}]}, {action: Deny, to: [{networks: [0.0.0.0/0, '::/0']}]}]",
            "<t80 * | >t80 yb",
        ),
        of_xa(
            "a port by its name, on each destination",
            "tier: Admin, priority: 1, egress: [{action: Deny, to: [{namespaces: {}}], protocols: [{destinationNamedPort: web}]}]",
            "<t80 *",
        ),
        of_xa(
            "an Accept of something unknown matches nobody, the rule after it does",
            "tier: Admin, priority: 1, ingress: [{action: Accept, from: [{planets: {}}]}, {action: Deny, from: [{namespaces: {matchLabels: {team: ty}}}]}]",
            "<t80 x* z* n2 out",
        ),
        of_xa(
            "a Deny of something unknown matches all",
            "tier: Admin, priority: 1, ingress: [{action: Deny, from: [{planets: {}}]}]",
            "<t80",
        ),
        situation("tiers gone", &[], "<t80 * | >t80 *"),
    ]
}
