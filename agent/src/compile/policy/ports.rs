//! Sets of ports as rows of the `PORTS` trie. Which rules contribute to a set is in `verdict`.

use weir_common::Protocol;
use weir_common::policy::{Action, PortKey, PortRow, RuleId};

use super::encode::{Canonical, Encoder};
use super::verdict::{Answer, Decision};

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

/// Disjoint prefixes, each with what holds for it, in order.
#[derive(Clone, Debug, Default, Eq, Ord, PartialEq, PartialOrd)]
pub(super) struct PortSet {
    prefixes: Vec<PortPrefix>,
    /// For every packet that is in none of them; `None`: [`Action::DENY`], by whoever asks for the set.
    others: Option<Decision>,
}

#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
struct PortPrefix {
    protocol: Protocol,
    /// Host order; the bits after the first `bits` are zero.
    port: u16,
    bits: u32,
    decision: Decision,
}

impl PortSet {
    /// What an answer says of ports.
    pub(super) fn of(answer: &Answer) -> Self {
        let others = answer.others;
        let prefixes = answer.ports.iter().flat_map(|(protocol, runs)| {
            let ends = runs.iter().skip(1).map(|(start, _)| u32::from(*start));
            let ends = ends.chain([u32::from(u16::MAX) + 1]);
            let runs = runs.iter().zip(ends);
            let runs = runs.filter(move |((_, decision), _)| *decision != others);
            runs.flat_map(move |(&(start, decision), end)| {
                prefixes(start.into(), end).map(move |(port, bits)| PortPrefix {
                    protocol: *protocol,
                    port,
                    bits,
                    decision,
                })
            })
        });
        Self {
            prefixes: prefixes.collect(),
            others: (others.action() != Action::DENY).then_some(others),
        }
    }

    /// The rows of the set under its number.
    pub(super) fn rows(&self, number: u32) -> impl Iterator<Item = (PortKey, PortRow)> {
        let row = |decision: Decision| PortRow {
            action: decision.action(),
            rule: decision.rule,
            audit: decision.audit,
            ..PortRow::default()
        };
        let others = self.others;
        let others = others.map(|decision| (PortKey::all(number), row(decision)));
        let prefixes = self.prefixes.iter().map(move |prefix| {
            let key = PortKey {
                prefix_len: PortKey::ANY_PORT + prefix.bits,
                ..PortKey::exact(number, prefix.protocol, prefix.port.into())
            };
            (key, row(prefix.decision))
        });
        others.into_iter().chain(prefixes)
    }
}

impl Canonical for PortSet {
    fn encode(&self, to: &mut Encoder) {
        to.list(self.prefixes.iter());
        // One that only allows has the bytes that it had when there was nothing else.
        if let Some(others) = self.others {
            if others.action() == Action::END {
                to.tag(Action::END.0);
            }
            to.integer(others.rule.0);
            audit(others, to);
        }
    }
}

impl Canonical for PortPrefix {
    fn encode(&self, to: &mut Encoder) {
        self.protocol.encode(to);
        to.integer(self.port.into());
        // More than any number of bits: one that denies.
        let denies = match self.decision.action() {
            Action::ALLOW => 0,
            Action::END => 1 << 9,
            _ => 1 << 8,
        };
        to.integer(self.bits | denies);
        to.integer(self.decision.rule.0);
        audit(self.decision, to);
    }
}

/// What nobody audits has the bytes that it had when nobody could.
fn audit(decision: Decision, to: &mut Encoder) {
    if decision.audit != RuleId::NONE {
        to.integer(decision.audit.0);
    }
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

    fn decision(allows: bool, rule: u32) -> Decision {
        let rule = RuleId(rule);
        Decision {
            allows,
            rule,
            ..Decision::OPEN
        }
    }

    fn set(rules: &[(u32, &[PortSpan])]) -> Vec<(u16, u32, u32)> {
        let spans = rules.iter().flat_map(|(_, spans)| spans.iter().copied());
        let answer = Answer::of(spans, |packet| {
            let has = |spans: &[PortSpan]| {
                packet.is_some_and(|(protocol, port)| {
                    let mut spans = spans.iter().filter(|it| it.protocol == protocol);
                    spans.any(|it| (it.first..=it.last).contains(&port))
                })
            };
            let first = rules.iter().find(|(_, spans)| has(spans));
            first.map_or(decision(false, 0), |(rule, _)| decision(true, *rule))
        });
        let prefixes = PortSet::of(&answer).prefixes;
        let of = |p: &PortPrefix| (p.port, p.bits, p.decision.rule.0);
        prefixes.iter().map(of).collect()
    }

    #[test]
    fn a_set_has_a_row_for_what_it_does_not_name_only_where_that_is_allowed() {
        for (others, rows) in [(false, 1), (true, 2)] {
            let answer = Answer::of([span(80, 80)].into_iter(), |packet| match packet {
                Some((_, 80)) => decision(!others, 7),
                _ => decision(others, 8),
            });
            assert_eq!(PortSet::of(&answer).rows(5).count(), rows);
        }
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
