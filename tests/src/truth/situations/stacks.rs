//! Several policies, both ends, and what changes: labels of pods and namespaces, policies that are updated and deleted, pods that go
//! and come.

use super::{A, ALL, C, Situation, of_xa, situation};

const FROM_B: &str = "ingress: [{from: [{podSelector: {matchLabels: {pod: b}}}]}]";
const FROM_TY: &str = "ingress: [{from: [{namespaceSelector: {matchLabels: {team: ty}}}]}]";
const TO_TY: &str =
    "policyTypes: [Egress], egress: [{to: [{namespaceSelector: {matchLabels: {team: ty}}}]}]";

pub(super) fn all() -> Vec<Situation> {
    vec![
        situation(
            "two policies add up",
            &[("x", A, FROM_B), ("x", A, FROM_TY)],
            "<t80 xb y*",
        ),
        situation(
            "their ports do not cross",
            &[
                (
                    "x",
                    A,
                    "ingress: [{from: [{podSelector: {matchLabels: {pod: b}}}], ports: [{port: 80}]}]",
                ),
                (
                    "x",
                    A,
                    "ingress: [{from: [{namespaceSelector: {matchLabels: {team: ty}}}], ports: [{port: 81}]}]",
                ),
            ],
            "<t80 xb | <t81 y*",
        ),
        situation(
            "one that denies takes nothing away",
            &[("x", ALL, "policyTypes: [Ingress]"), ("x", A, FROM_TY)],
            "<t80 y* | >t80 y* z* n2 out",
        ),
        situation(
            "one that allows all outdoes",
            &[
                ("x", ALL, "policyTypes: [Ingress]"),
                ("x", A, "ingress: [{}]"),
            ],
            "<t80 *",
        ),
        situation(
            "the same twice",
            &[("x", A, FROM_B), ("x", A, FROM_B)],
            "<t80 xb",
        ),
        situation("one deleted", &[("x", A, FROM_B)], "<t80 xb"),
        situation(
            "many",
            &[
                (
                    "x",
                    A,
                    "ingress: [{from: [{podSelector: {matchLabels: {pod: b}}}], ports: [{port: 80}]}]",
                ),
                (
                    "x",
                    A,
                    "ingress: [{from: [{podSelector: {matchLabels: {pod: c}}}], ports: [{port: 81}]}]",
                ),
                (
                    "x",
                    ALL,
                    "ingress: [{from: [{namespaceSelector: {matchLabels: {team: ty}}, podSelector: {matchLabels: {pod: b}}}]}]",
                ),
                (
                    "x",
                    "matchLabels: {role: web}",
                    "ingress: [{from: [{ipBlock: {cidr: @out4/32}}], ports: [{port: 80, endPort: 81}]}]",
                ),
                (
                    "x",
                    ALL,
                    "policyTypes: [Egress], egress: [{ports: [{port: web}]}]",
                ),
                ("y", ALL, "policyTypes: [Ingress, Egress], egress: [{}]"),
                ("z", C, "ingress: [{ports: [{protocol: SCTP}]}]"),
            ],
            "<4t80 xb yb out | <6t80 xb yb | <4t81 yb out | <6t81 yb | >t80 za zb | >u80",
        ),
        situation("egress of one end", &[("x", A, TO_TY)], ">t80 y*"),
        situation(
            "and ingress of the other, which does not",
            &[("x", A, TO_TY), ("y", A, "policyTypes: [Ingress]")],
            ">t80 yb yc",
        ),
        situation(
            "and ingress of the other, which does",
            &[
                ("x", A, TO_TY),
                (
                    "y",
                    A,
                    "ingress: [{from: [{namespaceSelector: {matchLabels: {team: tx}}}]}]",
                ),
            ],
            ">t80 y*",
        ),
        situation(
            "ingress allows what egress does not",
            &[
                ("x", ALL, "policyTypes: [Egress]"),
                ("y", A, "ingress: [{}]"),
            ],
            ">t80 | <t80 y* z* n2 out",
        ),
        situation(
            "the two ends allow different ports",
            &[
                (
                    "x",
                    A,
                    "policyTypes: [Egress], egress: [{ports: [{port: 80, endPort: 81}]}]",
                ),
                (
                    "y",
                    ALL,
                    "ingress: [{ports: [{port: 81}, {port: 80, protocol: UDP}]}]",
                ),
            ],
            ">t80 xb xc z* n2 out | >t81 * | >u80",
        ),
        situation(
            "ingress and egress in one policy",
            &[(
                "x",
                A,
                "ingress: [{from: [{podSelector: {}}]}], egress: [{to: [{namespaceSelector: {matchLabels: {team: tz}}}]}]",
            )],
            "<t80 x* | >t80 z*",
        ),
        situation(
            "answers are not egress",
            &[("x", A, "policyTypes: [Ingress, Egress], ingress: [{}]")],
            "<t80 * | <u81 * | >t80",
        ),
        // Labels of pods.
        of_xa("from pods b", FROM_B, "<t80 xb"),
        of_xa("a pod becomes a peer", FROM_B, "<t80 xb xc").labelled("xc", "pod: b"),
        of_xa("and is none again", FROM_B, "<t80 xb"),
        of_xa("a peer becomes none", FROM_B, "<t80").labelled("xb", "role: db"),
        of_xa("a subject becomes none", FROM_B, "<t80 *").labelled("xa", "pod: other"),
        of_xa("two subjects", FROM_B, "<t80 xb | >t80 xa xb y* z* n2 out").labelled("xc", "pod: a"),
        of_xa("a pod without labels", FROM_B, "<t80").labelled("xb", ""),
        // Labels of namespaces.
        of_xa("from the namespace of ty", FROM_TY, "<t80 y*"),
        of_xa("another namespace is of ty", FROM_TY, "<t80 y* z*").labelled("z", "team: ty"),
        of_xa("it is, and the first is not", FROM_TY, "<t80 z*")
            .labelled("z", "team: ty")
            .labelled("y", "team: tz"),
        of_xa("no namespace is", FROM_TY, "<t80").labelled("y", ""),
        of_xa("its own namespace is", FROM_TY, "<t80 x* y*").labelled("x", "team: ty"),
        of_xa("to the namespace of ty", TO_TY, ">t80 y*"),
        of_xa("to another, which is of ty now", TO_TY, ">t80 y* z*").labelled("z", "team: ty"),
        // The policy itself.
        of_xa(
            "updated to nobody",
            "policyTypes: [Ingress]",
            "<t80 | >t80 *",
        ),
        of_xa("updated to everybody", "ingress: [{}]", "<t80 *"),
        of_xa(
            "updated to the other direction",
            "policyTypes: [Egress]",
            "<t80 * | >t80",
        ),
        situation(
            "updated to another subject",
            &[("x", C, "policyTypes: [Egress]")],
            "<t80 xb y* z* n2 out | >t80 *",
        ),
        situation(
            "moved to another namespace",
            &[("y", A, "policyTypes: [Ingress]")],
            ">t80 xb xc yb yc z* n2 out",
        ),
        Situation::nothing(),
        // Pods that go and come, to a policy that is there.
        of_xa("a new peer", FROM_B, "<t80 xb").comes_again("xb"),
        of_xa("a new pod that is no peer", FROM_B, "<t80 xb").comes_again("xc"),
        of_xa("a new subject", FROM_B, "<t80 xb").comes_again("xa"),
        of_xa("a new pod of a namespace", FROM_TY, "<t80 y*").comes_again("yb"),
        situation(
            "a new pod where all is denied",
            &[("z", ALL, "policyTypes: [Ingress, Egress]")],
            "<t80 xb xc y* n2 out | >t80 xb xc y* n2 out",
        )
        .comes_again("zb"),
        of_xa(
            "a new destination of a name",
            "policyTypes: [Egress], egress: [{ports: [{port: web}]}]",
            ">t80 xb ya yb za zb | >t81 xc yc zc",
        )
        .comes_again("yc"),
        Situation::nothing(),
    ]
}
