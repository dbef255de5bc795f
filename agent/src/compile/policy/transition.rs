//! The way from one compilation to the next, such that every packet on the way is judged as before or
//! as after. Writing it is not here.

use std::collections::{BTreeMap, BTreeSet, HashSet};

use ipnet::IpNet;
use weir_common::policy::{Action, Class, PortKey, PortRow, RulesId, VerdictKey, VerdictRow};
use weir_common::{Addr, Prefix};

use super::number::free;
use super::{Compiled, PodRules, region};

/// What the tables hold on the way from `old` to `new`. In this order:
///
/// 1. put `verdicts` and `ports`: they contain all old and all new rows;
/// 2. make the addresses what `classes` and `cidrs` say;
/// 3. give each pod its new rules;
/// 4. make the addresses what the new rows say;
/// 5. delete the verdicts and ports that are not in the new rows.
///
/// Within a step the order of writes does not matter. A transition is finished before the next one is
/// computed from its `new`.
///
/// The trouble is a change of rules together with a change of classes: an address has one class, which
/// pods with old rules and pods with new rules ask at the same time. So in steps 2 to 4 an address that
/// changes has a class of its own, which answers old rules as the old class does and new rules as the
/// new one does. The same holds for the addresses of a block, to which a row for the prefix belongs. A row that comes for a part of
/// one, or goes, is no change by itself: rules that stay know no block that is not in both states.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Transition {
    pub verdicts: BTreeMap<VerdictKey, VerdictRow>,
    pub ports: BTreeMap<PortKey, PortRow>,
    pub classes: BTreeMap<Addr, Class>,
    pub cidrs: BTreeMap<Prefix, Class>,
}

impl Compiled {
    /// The way from `old`, the compilation that was given as `previous` to this one.
    pub fn transition_from(&self, old: &Self) -> Transition {
        let mut verdicts = old.rows.verdicts.clone();
        verdicts.extend(&self.rows.verdicts);
        let mut ports = old.rows.ports.clone();
        ports.extend(&self.rows.ports);

        let moves = Moves::between(old, self);
        if moves.are_none() {
            return Transition {
                verdicts,
                ports,
                classes: self.rows.classes.clone(),
                cidrs: self.rows.cidrs.clone(),
            };
        }
        let bridges = bridges(old, self);
        for rules in old.denials.keys().chain(self.denials.keys()) {
            for (&(before, after), &class) in &bridges {
                let row = moves.row(*rules, before, after, old, self);
                verdicts.insert(
                    VerdictKey {
                        rules: *rules,
                        class,
                    },
                    row,
                );
            }
        }
        close_crossings(&mut verdicts, old, self);
        let on_the_way = |before, after| bridges.get(&(before, after)).copied().unwrap_or(after);
        Transition {
            verdicts,
            ports,
            classes: changes(old, self)
                .map(|(addr, before, after)| (addr, on_the_way(before, after)))
                .collect(),
            cidrs: region::rows(
                changes_of_regions(old, self)
                    .map(|(net, before, after)| (net, on_the_way(before, after))),
            ),
        }
    }

    /// No way at all, from tables that an earlier process filled. Nobody remembers what its numbers stand for, but
    /// they mean what ours mean: rows that are as they should be stay. And while programs of another version serve,
    /// which ask verdicts of their own, no address gets a class that only a way knows.
    pub fn without_transition(&self) -> Transition {
        Transition {
            verdicts: self.rows.verdicts.clone(),
            ports: self.rows.ports.clone(),
            classes: self.rows.classes.clone(),
            cidrs: self.rows.cidrs.clone(),
        }
    }

    /// What the tables answer; `None` for rules that are not part of this compilation.
    fn answer(&self, rules: RulesId, class: Class) -> Option<VerdictRow> {
        match class {
            Class::OWN_NODE => Some(VerdictRow {
                action: Action::ALLOW,
                ..VerdictRow::default()
            }),
            class => self
                .rows
                .verdicts
                .get(&VerdictKey { rules, class })
                .copied(),
        }
    }

    /// A row that denies in the name of the policies behind the rules.
    fn denial(&self, rules: RulesId) -> Option<VerdictRow> {
        self.denials.get(&rules).copied()
    }

    fn class(&self, addr: &Addr) -> Class {
        let own = self.rows.classes.get(addr);
        let class = own.or_else(|| self.regions.at((*addr).into()));
        class.copied().unwrap_or(Class::WORLD)
    }

    fn class_around(&self, net: &IpNet) -> Class {
        self.regions.around(net).copied().unwrap_or(Class::WORLD)
    }
}

/// Which lists of rules pods come to and go from.
#[derive(Default)]
struct Moves {
    joined: HashSet<RulesId>,
    left: HashSet<RulesId>,
}

impl Moves {
    fn between(old: &Compiled, new: &Compiled) -> Self {
        let mut moves = Self::default();
        let (before, after) = (&old.rows.rules, &new.rows.rules);
        for pod in before.keys().chain(after.keys()) {
            let of = |rules: Option<&PodRules>| rules.map(|r| [r.ingress, r.egress]);
            let (from, to) = (of(before.get(pod)), of(after.get(pod)));
            for direction in 0..2 {
                let (from, to) = (from.map(|r| r[direction]), to.map(|r| r[direction]));
                if from != to {
                    moves.left.extend(from);
                    moves.joined.extend(to);
                }
            }
        }
        moves
    }

    fn are_none(&self) -> bool {
        self.joined.is_empty() && self.left.is_empty()
    }

    /// What rules answer to an address on its way between two classes. Pods that had the rules want the
    /// old answer, pods that come to them the new one; pods that stay take either.
    fn row(
        &self,
        rules: RulesId,
        before: Class,
        after: Class,
        old: &Compiled,
        new: &Compiled,
    ) -> VerdictRow {
        let (before, after) = (old.answer(rules, before), new.answer(rules, after));
        let row = match (self.joined.contains(&rules), self.left.contains(&rules)) {
            (false, _) => before,
            (true, false) => after,
            (true, true) => before.filter(|_| before == after),
        };
        row.or_else(|| old.denial(rules))
            .or_else(|| new.denial(rules))
            .unwrap_or_default()
    }
}

/// A number for each pair of classes, old and new, that some address changes between.
fn bridges(old: &Compiled, new: &Compiled) -> BTreeMap<(Class, Class), Class> {
    let of_addresses = changes(old, new).map(|(_, before, after)| (before, after));
    let of_regions = changes_of_regions(old, new).map(|(_, before, after)| (before, after));
    let pairs: BTreeSet<(Class, Class)> = of_addresses
        .chain(of_regions)
        .filter(|(before, after)| before != after)
        .collect();
    let numbers = old.classes.iter().chain(new.classes.iter());
    let mut taken: HashSet<u32> = numbers.map(|(_, number)| number).collect();
    pairs
        .into_iter()
        .map(|pair| {
            let (Class(before), Class(after)) = pair;
            let number = free(before.rotate_left(16) ^ after, &taken);
            taken.insert(number);
            (pair, Class(number))
        })
        .collect()
}

/// Every address with its class before and after.
fn changes(old: &Compiled, new: &Compiled) -> impl Iterator<Item = (Addr, Class, Class)> {
    let addresses: BTreeSet<Addr> = old
        .rows
        .classes
        .keys()
        .chain(new.rows.classes.keys())
        .copied()
        .collect();
    addresses
        .into_iter()
        .map(|addr| (addr, old.class(&addr), new.class(&addr)))
}

/// Every prefix of a region with its class before and after.
fn changes_of_regions(
    old: &Compiled,
    new: &Compiled,
) -> impl Iterator<Item = (IpNet, Class, Class)> {
    let nets = old.regions.iter().chain(new.regions.iter());
    let nets: BTreeSet<IpNet> = nets.map(|(net, _)| *net).collect();
    nets.into_iter()
        .map(|net| (net, old.class_around(&net), new.class_around(&net)))
}

/// Old rules never meet a class that is only new, nor new rules one that is only old, while the order
/// is kept. Should they, the row is there and says no.
fn close_crossings(
    verdicts: &mut BTreeMap<VerdictKey, VerdictRow>,
    old: &Compiled,
    new: &Compiled,
) {
    let classes = |of: &Compiled| -> BTreeSet<u32> { of.classes.iter().map(|(_, n)| n).collect() };
    let (before, after) = (classes(old), classes(new));
    for (compiled, other, foreign) in [
        (old, new, after.difference(&before)),
        (new, old, before.difference(&after)),
    ] {
        let only_here = compiled
            .denials
            .iter()
            .filter(|(r, _)| !other.denials.contains_key(r));
        let foreign: Vec<Class> = foreign.copied().map(Class).collect();
        for (&rules, &row) in only_here {
            for &class in &foreign {
                verdicts.entry(VerdictKey { rules, class }).or_insert(row);
            }
        }
    }
}
