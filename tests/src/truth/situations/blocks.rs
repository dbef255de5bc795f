//! `ipBlock`: what is in it is meant, whosever it is. Pods are in 10.244.0.0/16 and fd00:10:244::/48, nodes and the machine outside
//! in 10.210.0.0/24 and fd00:210::/64.

use super::{A, Situation, of_xa, situation};

pub(super) fn all() -> Vec<Situation> {
    vec![
        of_xa(
            "every address",
            "ingress: [{from: [{ipBlock: {cidr: 0.0.0.0/0}}, {ipBlock: {cidr: '::/0'}}]}]",
            "<t80 * | <u81 *",
        ),
        of_xa(
            "every address of one family",
            "ingress: [{from: [{ipBlock: {cidr: 0.0.0.0/0}}]}]",
            "<4t80 * | <6t80",
        ),
        of_xa(
            "and of the other",
            "ingress: [{from: [{ipBlock: {cidr: '::/0'}}]}]",
            "<6t80 * | <4t80",
        ),
        of_xa(
            "the address of a pod",
            "ingress: [{from: [{ipBlock: {cidr: @yb4/32}}, {ipBlock: {cidr: '@yb6/128'}}]}]",
            "<t80 yb",
        ),
        of_xa(
            "the address of a node",
            "ingress: [{from: [{ipBlock: {cidr: @n24/32}}, {ipBlock: {cidr: '@n26/128'}}]}]",
            "<t80 n2",
        ),
        of_xa(
            "the address of a machine outside",
            "ingress: [{from: [{ipBlock: {cidr: @out4/32}}, {ipBlock: {cidr: '@out6/128'}}]}]",
            "<t80 out | <s81 out",
        ),
        of_xa(
            "every pod",
            "ingress: [{from: [{ipBlock: {cidr: 10.244.0.0/16}}, {ipBlock: {cidr: 'fd00:10:244::/48'}}]}]",
            "<t80 x* y* z*",
        ),
        of_xa(
            "every pod but one",
            "ingress: [{from: [{ipBlock: {cidr: 10.244.0.0/16, except: [@yb4/32]}}, {ipBlock: {cidr: 'fd00:10:244::/48', except: ['@yb6/128']}}]}]",
            "<t80 x* ya yc z*",
        ),
        of_xa(
            "everybody but pods",
            "ingress: [{from: [{ipBlock: {cidr: 0.0.0.0/0, except: [10.244.0.0/16]}}, {ipBlock: {cidr: '::/0', except: ['fd00:10:244::/48']}}]}]",
            "<t80 n2 out",
        ),
        of_xa(
            "everybody but two",
            "ingress: [{from: [{ipBlock: {cidr: 0.0.0.0/0, except: [@out4/32, @zc4/32]}}, {ipBlock: {cidr: '::/0', except: ['@zc6/128', '@out6/128']}}]}]",
            "<t80 x* y* za zb n2",
        ),
        of_xa(
            "an except of the whole block",
            "ingress: [{from: [{ipBlock: {cidr: 10.244.0.0/16, except: [10.244.0.0/16]}}]}]",
            "<t80",
        ),
        of_xa(
            "an except takes nothing from another block",
            "ingress: [{from: [{ipBlock: {cidr: 0.0.0.0/0, except: [10.210.0.0/24]}}, {ipBlock: {cidr: @out4/32}}]}]",
            "<4t80 x* y* z* out | <6t80",
        ),
        of_xa(
            "nor from a selector",
            "ingress: [{from: [{ipBlock: {cidr: 0.0.0.0/0, except: [10.244.0.0/16]}}, {podSelector: {matchLabels: {pod: b}}}]}]",
            "<4t80 xb n2 out | <6t80 xb",
        ),
        of_xa(
            "nor from another policy's rule",
            "ingress: [{from: [{ipBlock: {cidr: 10.0.0.0/8, except: [10.244.0.0/16]}}]}, {from: [{namespaceSelector: {matchLabels: {team: ty}}}]}]",
            "<4t80 y* n2 out | <6t80 y*",
        ),
        of_xa(
            "blocks in blocks",
            "ingress: [{from: [{ipBlock: {cidr: 10.0.0.0/8}}, {ipBlock: {cidr: 10.244.0.0/16}}, {ipBlock: {cidr: @yb4/32}}]}]",
            "<4t80 * | <6t80",
        ),
        of_xa(
            "blocks in blocks, each with a port",
            "ingress: [{from: [{ipBlock: {cidr: 10.0.0.0/8}}], ports: [{port: 80}]}, {from: [{ipBlock: {cidr: 10.244.0.0/16}}], ports: [{port: 81}]}, \
             {from: [{ipBlock: {cidr: @yb4/32}}], ports: [{port: 80, protocol: UDP}]}]",
            "<4t80 * | <4t81 x* y* z* | <4u80 yb | <6t80",
        ),
        of_xa(
            "two halves",
            "ingress: [{from: [{ipBlock: {cidr: 0.0.0.0/1}}, {ipBlock: {cidr: 128.0.0.0/1}}]}]",
            "<4t80 * | <6t80",
        ),
        of_xa(
            "nobody's address",
            "ingress: [{from: [{ipBlock: {cidr: 192.0.2.0/24}}, {ipBlock: {cidr: '2001:db8::/32'}}]}]",
            "<t80",
        ),
        of_xa(
            "a block with bits behind its length",
            "ingress: [{from: [{ipBlock: {cidr: 10.244.77.7/16}}]}]",
            "<4t80 x* y* z* | <6t80",
        ),
        of_xa(
            "to every address",
            "policyTypes: [Egress], egress: [{to: [{ipBlock: {cidr: 0.0.0.0/0}}, {ipBlock: {cidr: '::/0'}}]}]",
            ">t80 * | >u81 *",
        ),
        of_xa(
            "to a machine outside",
            "policyTypes: [Egress], egress: [{to: [{ipBlock: {cidr: @out4/32}}, {ipBlock: {cidr: '@out6/128'}}]}]",
            ">t80 out | >u81 out",
        ),
        of_xa(
            "to a node",
            "policyTypes: [Egress], egress: [{to: [{ipBlock: {cidr: @n24/32}}]}]",
            ">4t80 n2 | >6t80",
        ),
        of_xa(
            "to everybody but pods",
            "policyTypes: [Egress], egress: [{to: [{ipBlock: {cidr: 0.0.0.0/0, except: [10.244.0.0/16]}}, {ipBlock: {cidr: '::/0', except: ['fd00:10:244::/48']}}]}]",
            ">t80 n2 out",
        ),
        of_xa(
            "to pods but one, at a port",
            "policyTypes: [Egress], egress: [{to: [{ipBlock: {cidr: 10.244.0.0/16, except: [@zb4/32]}}, \
             {ipBlock: {cidr: 'fd00:10:244::/48', except: ['@zb6/128']}}], ports: [{port: 81, protocol: UDP}]}]",
            ">u81 x* y* za zc | >u80 | >t81",
        ),
        of_xa(
            "to a name in a block",
            "policyTypes: [Egress], egress: [{to: [{ipBlock: {cidr: 0.0.0.0/0}}], ports: [{port: web}]}]",
            ">4t80 xb ya yb za zb | >4t81 xc yc zc | >6t80",
        ),
        of_xa(
            "its own node and itself, by an except",
            "ingress: [{from: [{ipBlock: {cidr: 0.0.0.0/0, except: [@n14/32, @xa4/32]}}]}]",
            "<4t80 x* y* z* n2 out",
        ),
        situation(
            "blocks of both ends",
            &[
                (
                    "x",
                    A,
                    "policyTypes: [Egress], egress: [{to: [{ipBlock: {cidr: 10.244.0.0/16}}]}]",
                ),
                (
                    "y",
                    A,
                    "ingress: [{from: [{ipBlock: {cidr: 0.0.0.0/0, except: [@xa4/32]}}]}]",
                ),
                ("z", A, "ingress: [{from: [{ipBlock: {cidr: @xa4/32}}]}]"),
            ],
            ">4t80 xb xc yb yc z* | >6t80",
        ),
    ]
}
