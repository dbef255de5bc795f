//! Who is isolated at all: `policyTypes`, and empty and absent told apart.

use super::{A, ALL, Situation, of_xa, situation};

const NOTHING: &str = "policyTypes: [Ingress, Egress]";

pub(super) fn all() -> Vec<Situation> {
    vec![
        Situation::nothing(),
        of_xa("nothing but a subject: ingress alone", "", "<t80 | >t80 *"),
        of_xa(
            "types absent, an egress rule: both",
            "egress: [{}]",
            "<t80 | >t80 *",
        ),
        of_xa(
            "types absent, egress empty: ingress alone",
            "egress: []",
            "<t80 | >t80 *",
        ),
        of_xa(
            "types absent, rules of both",
            "egress: [{}], ingress: [{}]",
            "<t80 * | >t80 *",
        ),
        of_xa(
            "types empty are absent ones",
            "policyTypes: [], ingress: [{}]",
            "<t80 * | >t80 *",
        ),
        of_xa(
            "ingress absent",
            "policyTypes: [Ingress]",
            "<t80 | <u81 | >t80 *",
        ),
        of_xa(
            "ingress empty",
            "policyTypes: [Ingress], ingress: []",
            "<t80 | >t80 *",
        ),
        of_xa(
            "ingress null",
            "policyTypes: [Ingress], ingress: null",
            "<t80 | >t80 *",
        ),
        of_xa(
            "egress absent",
            "policyTypes: [Egress]",
            "<t80 * | >t80 | >u81",
        ),
        of_xa(
            "egress empty",
            "policyTypes: [Egress], egress: []",
            "<t80 * | >t80",
        ),
        of_xa("both absent", NOTHING, "<t80 | >t80"),
        of_xa(
            "an empty rule of ingress",
            "ingress: [{}]",
            "<t80 * | <s81 *",
        ),
        of_xa("an empty from", "ingress: [{from: []}]", "<t80 * | <u80 *"),
        of_xa(
            "a null from",
            "ingress: [{from: null, ports: [{port: 80}]}]",
            "<t80 * | <t81",
        ),
        of_xa("empty ports", "ingress: [{ports: []}]", "<t80 * | <s80 *"),
        of_xa(
            "a from with empty ports",
            "ingress: [{from: [{podSelector: {}}], ports: []}]",
            "<t80 x* | <s81 x*",
        ),
        of_xa(
            "an empty rule of egress",
            "policyTypes: [Egress], egress: [{}]",
            ">t80 * | >u81 *",
        ),
        of_xa(
            "an empty to",
            "policyTypes: [Egress], egress: [{to: []}]",
            ">t80 * | >u80 *",
        ),
        of_xa(
            "an empty to with a port",
            "policyTypes: [Egress], egress: [{to: [], ports: [{port: 81}]}]",
            ">t81 * | >t80",
        ),
        of_xa(
            "egress with empty ports",
            "policyTypes: [Egress], egress: [{ports: []}]",
            ">t80 * | >t81 *",
        ),
        of_xa(
            "rules of a type that it is not of",
            "policyTypes: [Egress], ingress: [{from: [{podSelector: {}}]}]",
            "<t80 * | >t80",
        ),
        of_xa(
            "and the other way round",
            "policyTypes: [Ingress], egress: [{to: [{podSelector: {}}]}]",
            "<t80 | >t80 *",
        ),
        situation(
            "default deny of a namespace",
            &[("x", ALL, "policyTypes: [Ingress]")],
            "<t80 | >t80 y* z* n2 out",
        ),
        situation(
            "default deny of what it sends",
            &[("x", ALL, "policyTypes: [Egress]")],
            "<t80 y* z* n2 out | >t80",
        ),
        situation(
            "default deny of a namespace, both",
            &[("x", ALL, NOTHING)],
            "<t80 | >t80",
        ),
        situation(
            "default deny everywhere",
            &[
                ("x", ALL, NOTHING),
                ("y", ALL, NOTHING),
                ("z", ALL, NOTHING),
            ],
            "<t80 | >t80",
        ),
        situation(
            "allow all of a namespace",
            &[("x", ALL, "ingress: [{}]")],
            "<t80 * | >t80 *",
        ),
        situation(
            "a subject that nobody is",
            &[("x", "matchLabels: {pod: z}", NOTHING)],
            "<t80 * | >t80 *",
        ),
        situation(
            "a subject of another namespace",
            &[("y", A, NOTHING)],
            "<t80 xb xc yb yc z* n2 out | >t80 xb xc yb yc z* n2 out",
        ),
        situation(
            "a subject by an operator",
            &[(
                "x",
                "matchExpressions: [{key: role, operator: Exists}]",
                "policyTypes: [Ingress]",
            )],
            "<t80 | >t80 xc y* z* n2 out",
        ),
        situation(
            "a subject by labels and an operator",
            &[(
                "x",
                "matchLabels: {pod: a}, matchExpressions: [{key: role, operator: In, values: [db]}]",
                NOTHING,
            )],
            "<t80 * | >t80 *",
        ),
        // A node's own pods are the node: no policy is about them.
        situation(
            "a pod of a node's network",
            &[("x", "matchLabels: {pod: h}", NOTHING)],
            "<t80 * | >t80 *",
        ),
        // A policy that nobody understands closes whom it selects.
        Situation::nothing(),
        of_xa(
            "a peer of no kind",
            "ingress: [{from: [{}]}]",
            "<t80 | >t80 *",
        ),
        Situation::nothing(),
        of_xa(
            "a field that there is not",
            "ingress: [{from: [{podSelectors: {}}]}]",
            "<t80 | >t80 *",
        ),
        Situation::nothing(),
        of_xa(
            "an operator that there is not",
            "ingress: [{from: [{podSelector: {matchExpressions: [{key: pod, operator: Is}]}}]}]",
            "<t80",
        ),
        Situation::nothing(),
        of_xa(
            "an except outside of its block",
            "ingress: [{from: [{ipBlock: {cidr: 10.0.0.0/8, except: [11.0.0.0/8]}}]}]",
            "<t80",
        ),
        Situation::nothing(),
    ]
}
