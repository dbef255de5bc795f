//! Which ports: numbers, ranges, names, protocols. 80 is `web` and 81 `alt`, and the other way round on every pod `c`
//! (`super::super::objects`).

use super::{ALL, C, Situation, of_xa, situation};

pub(super) fn all() -> Vec<Situation> {
    vec![
        of_xa(
            "a number",
            "ingress: [{ports: [{port: 80}]}]",
            "<t80 * | <t81 | <u80 | <s80",
        ),
        of_xa(
            "the other number",
            "ingress: [{ports: [{port: 81, protocol: TCP}]}]",
            "<t81 * | <t80 | <u81",
        ),
        of_xa(
            "two numbers",
            "ingress: [{ports: [{port: 80}, {port: 81}]}]",
            "<t80 * | <t81 * | <u80",
        ),
        of_xa(
            "a number of UDP",
            "ingress: [{ports: [{port: 80, protocol: UDP}]}]",
            "<u80 * | <u81 | <t80 | <s80",
        ),
        of_xa(
            "a number of SCTP",
            "ingress: [{ports: [{port: 81, protocol: SCTP}]}]",
            "<s81 * | <s80 | <t81 | <u81",
        ),
        of_xa(
            "each protocol another",
            "ingress: [{ports: [{port: 80}, {port: 81, protocol: UDP}, {port: 80, protocol: SCTP}]}]",
            "<t80 * | <t81 | <u81 * | <u80 | <s80 * | <s81",
        ),
        of_xa(
            "all of a protocol",
            "ingress: [{ports: [{protocol: UDP}]}]",
            "<u80 * | <u81 * | <t80 | <s81",
        ),
        of_xa(
            "all of TCP, by default",
            "ingress: [{ports: [{}]}]",
            "<t80 * | <t81 * | <u80 | <s80",
        ),
        of_xa(
            "a range of both",
            "ingress: [{ports: [{port: 80, endPort: 81}]}]",
            "<t80 * | <t81 * | <u80",
        ),
        of_xa(
            "a range of one",
            "ingress: [{ports: [{port: 80, endPort: 80}]}]",
            "<t80 * | <t81",
        ),
        of_xa(
            "a range that ends before",
            "ingress: [{ports: [{port: 1, endPort: 79}]}]",
            "<t80 | <t81",
        ),
        of_xa(
            "a range that ends with it",
            "ingress: [{ports: [{port: 1, endPort: 80}]}]",
            "<t80 * | <t81",
        ),
        of_xa(
            "a range that begins with it",
            "ingress: [{ports: [{port: 81, endPort: 65535}]}]",
            "<t80 | <t81 *",
        ),
        of_xa(
            "a range that begins behind",
            "ingress: [{ports: [{port: 82, endPort: 65535}]}]",
            "<t80 | <t81",
        ),
        of_xa(
            "a range of everything",
            "ingress: [{ports: [{port: 1, endPort: 65535, protocol: UDP}]}]",
            "<t80 | <u80 * | <u81 *",
        ),
        of_xa(
            "a range of SCTP",
            "ingress: [{ports: [{port: 75, endPort: 80, protocol: SCTP}]}]",
            "<s80 * | <s81 | <t80",
        ),
        of_xa(
            "ranges that overlap",
            "ingress: [{ports: [{port: 70, endPort: 80}, {port: 79, endPort: 81}]}]",
            "<t80 * | <t81 *",
        ),
        of_xa(
            "a name",
            "ingress: [{ports: [{port: web}]}]",
            "<t80 * | <t81 | <u80",
        ),
        of_xa(
            "the other name",
            "ingress: [{ports: [{port: alt}]}]",
            "<t81 * | <t80",
        ),
        of_xa(
            "a name of UDP",
            "ingress: [{ports: [{port: uweb, protocol: UDP}]}]",
            "<u80 * | <u81 | <t80",
        ),
        of_xa(
            "a name of SCTP",
            "ingress: [{ports: [{port: salt, protocol: SCTP}]}]",
            "<s81 * | <s80",
        ),
        of_xa(
            "a name of another protocol",
            "ingress: [{ports: [{port: web, protocol: UDP}]}]",
            "<t80 | <u80 | <u81",
        ),
        of_xa(
            "a name that no pod has",
            "ingress: [{ports: [{port: nobodys}]}]",
            "<t80 | <t81",
        ),
        of_xa(
            "a name and a number",
            "ingress: [{ports: [{port: web}, {port: 81, protocol: UDP}]}]",
            "<t80 * | <t81 | <u81 *",
        ),
        situation(
            "one name, another number on each pod",
            &[("x", ALL, "ingress: [{ports: [{port: web}]}]")],
            "<t80 * | <t81 | >t80 xb y* z* n2 out | >t81 xc y* z* n2 out",
        ),
        situation(
            "a name on the pods that call it otherwise",
            &[(
                "x",
                C,
                "ingress: [{from: [{namespaceSelector: {}}], ports: [{port: web}]}]",
            )],
            "<t80 * | >t81 * | >t80 xb y* z* n2 out",
        ),
        of_xa(
            "a name of egress is the destination's",
            "policyTypes: [Egress], egress: [{ports: [{port: web}]}]",
            ">t80 xb ya yb za zb | >t81 xc yc zc",
        ),
        of_xa(
            "a name of egress that some do not have",
            "policyTypes: [Egress], egress: [{ports: [{port: alt}]}]",
            ">t81 ya yb za zb | >t80 xc yc zc",
        ),
        of_xa(
            "a name of egress of a namespace",
            "policyTypes: [Egress], egress: [{to: [{namespaceSelector: {matchLabels: {team: ty}}}], ports: [{port: web}]}]",
            ">t80 ya yb | >t81 yc",
        ),
        of_xa(
            "a name of egress of UDP",
            "policyTypes: [Egress], egress: [{ports: [{port: uweb, protocol: UDP}]}]",
            ">u80 xb ya yb za zb | >u81 xc yc zc | >t80",
        ),
        of_xa(
            "a name of egress of SCTP",
            "policyTypes: [Egress], egress: [{ports: [{port: sweb, protocol: SCTP}]}]",
            ">s80 xb ya yb za zb | >s81 xc yc zc",
        ),
        of_xa(
            "a name of a sidecar",
            "policyTypes: [Egress], egress: [{ports: [{port: side}]}]",
            ">t81 ya | >t80",
        ),
        of_xa(
            "a name of a sidecar of another protocol",
            "policyTypes: [Egress], egress: [{ports: [{port: web, protocol: UDP}]}]",
            ">u81 zb | >u80 | >t80",
        ),
        of_xa(
            "a name of egress and a range",
            "policyTypes: [Egress], egress: [{ports: [{port: web}, {port: 81, endPort: 82}]}]",
            ">t81 * | >t80 xb ya yb za zb",
        ),
        of_xa(
            "a range of egress",
            "policyTypes: [Egress], egress: [{ports: [{port: 80, endPort: 81, protocol: UDP}]}]",
            ">u80 * | >u81 * | >t80",
        ),
        of_xa(
            "ports by peer",
            "ingress: [{from: [{podSelector: {matchLabels: {pod: b}}}], ports: [{port: 80, protocol: UDP}]}, \
             {from: [{namespaceSelector: {matchLabels: {team: ty}}}], ports: [{port: 81}]}]",
            "<u80 xb | <t81 y* | <t80 | <u81",
        ),
    ]
}
