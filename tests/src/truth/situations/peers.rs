//! Who a peer is: selectors of pods, of namespaces, of both; the four operators.

use super::{ALL, Situation, of_xa, situation};

pub(super) fn all() -> Vec<Situation> {
    vec![
        of_xa(
            "every pod of the namespace",
            "ingress: [{from: [{podSelector: {}}]}]",
            "<t80 x*",
        ),
        of_xa(
            "a pod of the namespace",
            "ingress: [{from: [{podSelector: {matchLabels: {pod: b}}}]}]",
            "<t80 xb",
        ),
        of_xa(
            "two labels, both",
            "ingress: [{from: [{podSelector: {matchLabels: {pod: b, role: web}}}]}]",
            "<t80",
        ),
        of_xa(
            "two labels, each",
            "ingress: [{from: [{podSelector: {matchLabels: {pod: b}}}, {podSelector: {matchLabels: {pod: c}}}]}]",
            "<t80 xb xc",
        ),
        of_xa(
            "In",
            "ingress: [{from: [{podSelector: {matchExpressions: [{key: pod, operator: In, values: [b, c, d]}]}}]}]",
            "<t80 xb xc",
        ),
        of_xa(
            "NotIn, which whoever has no such label is",
            "ingress: [{from: [{podSelector: {matchExpressions: [{key: role, operator: NotIn, values: [db]}]}}]}]",
            "<t80 xc",
        ),
        of_xa(
            "Exists",
            "ingress: [{from: [{podSelector: {matchExpressions: [{key: role, operator: Exists}]}}]}]",
            "<t80 xb",
        ),
        of_xa(
            "DoesNotExist",
            "ingress: [{from: [{podSelector: {matchExpressions: [{key: role, operator: DoesNotExist}]}}]}]",
            "<t80 xc",
        ),
        of_xa(
            "two operators, both",
            "ingress: [{from: [{podSelector: {matchExpressions: [{key: role, operator: Exists}, {key: pod, operator: NotIn, values: [a]}]}}]}]",
            "<t80 xb",
        ),
        of_xa(
            "a label that nobody has",
            "ingress: [{from: [{podSelector: {matchLabels: {no: body}}}]}]",
            "<t80",
        ),
        of_xa(
            "every namespace",
            "ingress: [{from: [{namespaceSelector: {}}]}]",
            "<t80 x* y* z*",
        ),
        of_xa(
            "a namespace",
            "ingress: [{from: [{namespaceSelector: {matchLabels: {team: ty}}}]}]",
            "<t80 y*",
        ),
        of_xa(
            "a namespace by its name",
            "ingress: [{from: [{namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: z}}}]}]",
            "<t80 z*",
        ),
        of_xa(
            "namespaces In",
            "ingress: [{from: [{namespaceSelector: {matchExpressions: [{key: team, operator: In, values: [ty, tz]}]}}]}]",
            "<t80 y* z*",
        ),
        of_xa(
            "namespaces NotIn",
            "ingress: [{from: [{namespaceSelector: {matchExpressions: [{key: tier, operator: NotIn, values: [one]}]}}]}]",
            "<t80 y* z*",
        ),
        of_xa(
            "namespaces NotIn by name",
            "ingress: [{from: [{namespaceSelector: {matchExpressions: [{key: kubernetes.io/metadata.name, operator: NotIn, values: [x, z]}]}}]}]",
            "<t80 y*",
        ),
        of_xa(
            "namespaces Exists",
            "ingress: [{from: [{namespaceSelector: {matchExpressions: [{key: tier, operator: Exists}]}}]}]",
            "<t80 x* y*",
        ),
        of_xa(
            "namespaces DoesNotExist",
            "ingress: [{from: [{namespaceSelector: {matchExpressions: [{key: tier, operator: DoesNotExist}]}}]}]",
            "<t80 z*",
        ),
        of_xa(
            "a namespace that there is not",
            "ingress: [{from: [{namespaceSelector: {matchLabels: {team: tw}}}]}]",
            "<t80",
        ),
        of_xa(
            "pods of a namespace",
            "ingress: [{from: [{namespaceSelector: {matchLabels: {team: ty}}, podSelector: {matchLabels: {pod: b}}}]}]",
            "<t80 yb",
        ),
        of_xa(
            "either, in two items",
            "ingress: [{from: [{namespaceSelector: {matchLabels: {team: ty}}}, {podSelector: {matchLabels: {pod: b}}}]}]",
            "<t80 y* xb",
        ),
        of_xa(
            "pods of every namespace",
            "ingress: [{from: [{namespaceSelector: {}, podSelector: {matchLabels: {role: db}}}]}]",
            "<t80 xb yb zb",
        ),
        of_xa(
            "every pod of a namespace, said twice",
            "ingress: [{from: [{namespaceSelector: {matchLabels: {team: tz}}, podSelector: {}}]}]",
            "<t80 z*",
        ),
        of_xa(
            "operators on both",
            "ingress: [{from: [{namespaceSelector: {matchExpressions: [{key: tier, operator: Exists}]}, \
             podSelector: {matchExpressions: [{key: role, operator: DoesNotExist}]}}]}]",
            "<t80 xc yc",
        ),
        of_xa(
            "pods of a node's network are no pods",
            "ingress: [{from: [{podSelector: {matchLabels: {pod: h}}}]}]",
            "<t80",
        ),
        of_xa(
            "nor are they by a label that others have",
            "ingress: [{from: [{podSelector: {matchLabels: {role: web}}}, {podSelector: {matchLabels: {pod: b}}}]}]",
            "<t80 xb",
        ),
        of_xa(
            "to pods of the namespace",
            "policyTypes: [Egress], egress: [{to: [{podSelector: {}}]}]",
            ">t80 x* | <t80 *",
        ),
        of_xa(
            "to a namespace",
            "policyTypes: [Egress], egress: [{to: [{namespaceSelector: {matchLabels: {team: ty}}}]}]",
            ">t80 y* | >s81 y*",
        ),
        of_xa(
            "to pods of a namespace",
            "policyTypes: [Egress], egress: [{to: [{namespaceSelector: {matchLabels: {team: ty}}, podSelector: {matchLabels: {pod: b}}}]}]",
            ">t80 yb",
        ),
        of_xa(
            "to either",
            "policyTypes: [Egress], egress: [{to: [{namespaceSelector: {matchLabels: {team: ty}}}, {podSelector: {matchLabels: {pod: b}}}]}]",
            ">t80 y* xb",
        ),
        of_xa(
            "to namespaces NotIn",
            "policyTypes: [Egress], egress: [{to: [{namespaceSelector: {matchExpressions: [{key: tier, operator: NotIn, values: [two]}]}}]}]",
            ">t80 x* z*",
        ),
        of_xa(
            "to every pod, and not the world",
            "policyTypes: [Egress], egress: [{to: [{namespaceSelector: {}}]}]",
            ">t80 x* y* z*",
        ),
        situation(
            "each namespace among itself",
            &[
                ("x", ALL, "ingress: [{from: [{podSelector: {}}]}]"),
                ("y", ALL, "ingress: [{from: [{podSelector: {}}]}]"),
                ("z", ALL, "ingress: [{from: [{podSelector: {}}]}]"),
            ],
            "<t80 x* | >t80 x* n2 out",
        ),
    ]
}
