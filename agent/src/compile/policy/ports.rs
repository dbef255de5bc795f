//! Sets of ports as rows of the `PORTS` trie. Which rules contribute to a set is in `verdict`.

use weir_common::Protocol;
use weir_common::policy::{Action, PortKey, PortRow, RuleId};

use super::encode::{Canonical, Encoder};

/// Ports of a protocol, both ends included, host order.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(super) struct PortSpan {
    pub(super) protocol: Protocol,
    pub(super) first: u16,
    pub(super) last: u16,
}

impl PortSpan {
    pub(super) fn one(protocol: Protocol, port: u16) -> Self {
        Self {
            protocol,
            first: port,
            last: port,
        }
    }
}

/// Disjoint prefixes, each with the rule that allows it, in order.
#[derive(Clone, Debug, Default, Eq, Ord, PartialEq, PartialOrd)]
pub(super) struct PortSet(Vec<PortPrefix>);

#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
struct PortPrefix {
    protocol: Protocol,
    /// Host order; the bits after the first `bits` are zero.
    port: u16,
    bits: u32,
    rule: RuleId,
}

impl PortSet {
    /// All that the rules allow together. A port belongs to the first rule that has it.
    pub(super) fn union(rules: &[(RuleId, &[PortSpan])]) -> Self {
        let mut protocols: Vec<Protocol> = rules
            .iter()
            .flat_map(|(_, spans)| spans.iter().map(|span| span.protocol))
            .collect();
        protocols.sort();
        protocols.dedup();
        Self(
            protocols
                .into_iter()
                .flat_map(|protocol| of_protocol(protocol, rules))
                .collect(),
        )
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The rows of the set under its number.
    pub(super) fn rows(&self, number: u32) -> impl Iterator<Item = (PortKey, PortRow)> {
        self.0.iter().map(move |prefix| {
            let key = PortKey {
                prefix_len: PortKey::ANY_PORT + prefix.bits,
                ..PortKey::exact(number, prefix.protocol, prefix.port.into())
            };
            let row = PortRow {
                action: Action::ALLOW,
                rule: prefix.rule,
                ..PortRow::default()
            };
            (key, row)
        })
    }
}

impl Canonical for PortSet {
    fn encode(&self, to: &mut Encoder) {
        to.list(self.0.iter());
    }
}

impl Canonical for PortPrefix {
    fn encode(&self, to: &mut Encoder) {
        self.protocol.encode(to);
        to.integer(self.port.into());
        to.integer(self.bits);
        to.integer(self.rule.0);
    }
}

fn of_protocol(protocol: Protocol, rules: &[(RuleId, &[PortSpan])]) -> Vec<PortPrefix> {
    let spans: Vec<(RuleId, PortSpan)> = rules
        .iter()
        .flat_map(|(rule, spans)| spans.iter().map(|span| (*rule, *span)))
        .filter(|(_, span)| span.protocol == protocol && span.first <= span.last)
        .collect();
    // Between two neighbouring cuts every port is in the same spans.
    let mut cuts: Vec<u32> = spans
        .iter()
        .flat_map(|(_, span)| [u32::from(span.first), u32::from(span.last) + 1])
        .collect();
    cuts.sort_unstable();
    cuts.dedup();

    let mut runs: Vec<(u32, u32, RuleId)> = Vec::new();
    for pair in cuts.windows(2) {
        let &[start, end] = pair else { continue };
        let owner = spans
            .iter()
            .find(|(_, span)| u32::from(span.first) <= start && start <= u32::from(span.last));
        let Some((rule, _)) = owner else { continue };
        match runs.last_mut() {
            Some((_, last_end, last)) if *last_end == start && last == rule => *last_end = end,
            _ => runs.push((start, end, *rule)),
        }
    }
    runs.into_iter()
        .flat_map(|(start, end, rule)| {
            prefixes(start, end).map(move |(port, bits)| PortPrefix {
                protocol,
                port,
                bits,
                rule,
            })
        })
        .collect()
}

/// The fewest prefixes (port, bits) that make up `start..end`, in order.
fn prefixes(mut start: u32, end: u32) -> impl Iterator<Item = (u16, u32)> {
    std::iter::from_fn(move || {
        let port = u16::try_from(start).ok().filter(|_| start < end)?;
        let aligned = start.trailing_zeros().min(16);
        let fits = (end - start).ilog2();
        let free = aligned.min(fits);
        start += 1 << free;
        Some((port, 16 - free))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn span(first: u16, last: u16) -> PortSpan {
        PortSpan {
            protocol: Protocol::TCP,
            first,
            last,
        }
    }

    fn set(rules: &[(u32, &[PortSpan])]) -> Vec<(u16, u32, u32)> {
        let rules: Vec<_> = rules.iter().map(|(rule, s)| (RuleId(*rule), *s)).collect();
        let set = PortSet::union(&rules);
        set.0.iter().map(|p| (p.port, p.bits, p.rule.0)).collect()
    }

    #[test]
    fn sets_are_disjoint_prefixes_of_the_first_rule() {
        type Case<'a> = (&'a str, &'a [(u32, &'a [PortSpan])], &'a [(u16, u32, u32)]);
        let cases: &[Case] = &[
            ("no rule", &[], &[]),
            ("one port", &[(7, &[span(80, 80)])], &[(80, 16, 7)]),
            ("every port", &[(7, &[span(0, 65535)])], &[(0, 0, 7)]),
            (
                "the last port",
                &[(7, &[span(65535, 65535)])],
                &[(65535, 16, 7)],
            ),
            (
                "a range",
                &[(7, &[span(79, 84)])],
                &[(79, 16, 7), (80, 14, 7), (84, 16, 7)],
            ),
            (
                "a port inside of a later range",
                &[(7, &[span(81, 81)]), (8, &[span(80, 83)])],
                &[(80, 16, 8), (81, 16, 7), (82, 15, 8)],
            ),
            (
                "a port inside of an earlier range",
                &[(7, &[span(80, 83)]), (8, &[span(81, 81)])],
                &[(80, 14, 7)],
            ),
            (
                "neighbours of one rule",
                &[(7, &[span(80, 80), span(81, 81)])],
                &[(80, 15, 7)],
            ),
            (
                "a range that ends before it starts",
                &[(7, &[span(9, 8)])],
                &[],
            ),
        ];
        for (name, rules, expected) in cases {
            assert_eq!(set(rules), *expected, "{name}");
        }
    }

    #[test]
    fn every_range_is_covered_exactly() {
        for (first, last) in [(1, 65535), (1, 1), (1023, 1025), (32768, 60999), (0, 0)] {
            let mut covered = vec![0_u8; 65536];
            for (port, bits) in prefixes(first, last + 1) {
                let ports = covered.iter_mut().skip(port.into()).take(1 << (16 - bits));
                ports.for_each(|times| *times += 1);
            }
            for (port, times) in covered.iter().enumerate() {
                let inside = (first..=last).contains(&(port as u32));
                assert_eq!(*times, u8::from(inside), "port {port} of {first}-{last}");
            }
        }
    }
}
