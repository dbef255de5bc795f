//! What a change of policy opens and closes, as sets: between pods that are judged alike, and the blocks of the world that are. Who may
//! reach whom at all is not here.
//!
//! Both compilers are of a node that has every pod of the cluster, so that one has the lists and classes of all.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use weir_common::Protocol;
use weir_common::policy::RulesId;

use super::Compiler;
use super::class::Class;
use super::verdict::{Answer, Judge};
use crate::model::{Family, ObjectName};

/// The protocols that policy knows ports of.
const WITH_PORTS: [Protocol; 3] = [Protocol::TCP, Protocol::UDP, Protocol::SCTP];

/// Packets.
#[derive(Clone, Debug, Default, Eq, Ord, PartialEq, PartialOrd)]
pub struct Packets {
    /// ICMP, and every protocol that policy knows no ports of.
    pub others: bool,
    /// Of TCP, UDP and SCTP: ranges in order that do not touch, both ends included, host order.
    pub ports: BTreeMap<Protocol, Vec<(u16, u16)>>,
}

/// Who is judged alike, before and after.
#[derive(Clone, Debug, Default, Eq, Ord, PartialEq, PartialOrd)]
pub struct Members {
    pub pods: BTreeSet<ObjectName>,
    /// Addresses that are no pod's: blocks without the blocks that are taken out of each.
    pub world: BTreeSet<(IpNet, Vec<IpNet>)>,
    /// Where nodes answer DNS.
    pub dns: BTreeSet<IpAddr>,
}

/// From each of some to each of some others; never from one to itself.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub struct Change {
    /// Between their addresses of these families.
    pub families: BTreeSet<Family>,
    pub from: Members,
    pub to: Members,
    pub opened: Packets,
    pub closed: Packets,
}

/// A state of policy for a member: lists of ingress and egress (none: open, or no pod), and the class that others see.
type Standing = ([Option<RulesId>; 2], Class);
type Key = (Family, [Standing; 2]);

/// What the second allows and the first does not, and the reverse, between these pods with their addresses, the DNS of nodes and the
/// world. Families do not speak with each other.
pub fn changes(
    before: &Compiler,
    after: &Compiler,
    pods: &[(ObjectName, Vec<IpAddr>)],
    dns: &[IpAddr],
) -> Vec<Change> {
    let states = [before, after];
    let mut groups: BTreeMap<Key, Members> = BTreeMap::new();
    for (pod, addresses) in pods {
        for address in addresses {
            let standing = states.map(|it| it.standing(Some(pod), *address));
            let group = groups.entry((Family::of(address), standing)).or_default();
            group.pods.insert(pod.clone());
        }
    }
    for address in dns {
        let standing = states.map(|it| it.standing(None, *address));
        let group = groups.entry((Family::of(address), standing)).or_default();
        group.dns.insert(*address);
    }
    world(&states, &mut groups);
    type Row = (Family, Packets, Packets, Members);
    let mut rows: BTreeMap<Row, Members> = BTreeMap::new();
    let mut allowed = Allowed {
        states,
        known: BTreeMap::new(),
    };
    let judged = |standings: &[Standing; 2]| standings.iter().any(|(lists, _)| *lists != [None; 2]);
    for (from_key, from) in &groups {
        for (to_key, to) in &groups {
            let alone =
                from_key == to_key && from.pods.len() + from.world.len() + from.dns.len() == 1;
            if from_key.0 != to_key.0 || alone || !(judged(&from_key.1) || judged(&to_key.1)) {
                continue;
            }
            let [old, new] = [0, 1].map(|state| allowed.between(state, &from_key.1, &to_key.1));
            if old == new {
                continue;
            }
            let row = rows.entry((
                from_key.0,
                new.without(&old),
                old.without(&new),
                from.clone(),
            ));
            row.or_default().add(to);
        }
    }
    // Whoever differs in nothing that the change is about is one row.
    let mut merged: BTreeMap<Row, Members> = BTreeMap::new();
    for ((family, opened, closed, from), to) in rows {
        merged
            .entry((family, opened, closed, to))
            .or_default()
            .add(&from);
    }
    let mut changes: Vec<Change> = Vec::new();
    for ((family, opened, closed, to), from) in merged {
        // What only one family has stays what it is beside the other's, since addresses of the two never meet.
        let is_other_half = |it: &&mut Change| {
            !it.families.contains(&family)
                && (&it.opened, &it.closed) == (&opened, &closed)
                && (&it.from.pods, &it.to.pods) == (&from.pods, &to.pods)
        };
        match changes.iter_mut().find(is_other_half) {
            Some(half) => {
                half.families.insert(family);
                half.from.add(&from);
                half.to.add(&to);
            }
            None => changes.push(Change {
                families: [family].into(),
                from,
                to,
                opened,
                closed,
            }),
        }
    }
    changes.sort_by(|a, b| (&a.from, &a.to).cmp(&(&b.from, &b.to)));
    changes
}

/// The regions of both, by what they are to both.
fn world(states: &[&Compiler; 2], groups: &mut BTreeMap<Key, Members>) {
    let mut nets: BTreeSet<IpNet> = states
        .iter()
        .flat_map(|it| it.tables.region_nets())
        .collect();
    let whole = [IpAddr::from([0; 4]), IpAddr::from([0; 16])];
    nets.extend(whole.into_iter().filter_map(|ip| IpNet::new(ip, 0).ok()));
    // Each with the position of what it is a part of, all of one kind.
    let mut kinds: Vec<(IpNet, Key, usize)> = Vec::new();
    let mut around: Vec<usize> = Vec::new();
    let mut excepted: BTreeMap<usize, Vec<IpNet>> = BTreeMap::new();
    for net in nets {
        while around.last().is_some_and(|it| !kinds[*it].0.contains(&net)) {
            around.pop();
        }
        let family = Family::of(&net.addr());
        let key = (
            family,
            states.map(|it| ([None; 2], it.tables.class_around(&net))),
        );
        let at = kinds.len();
        let root = match around.last().map(|it| &kinds[*it]) {
            Some((_, outer, root)) if *outer == key => *root,
            Some((_, _, root)) => {
                excepted.entry(*root).or_default().push(net);
                at
            }
            None => at,
        };
        around.push(at);
        kinds.push((net, key, root));
    }
    for (at, (net, key, root)) in kinds.into_iter().enumerate() {
        if root == at {
            let except = excepted.remove(&at).unwrap_or_default();
            groups.entry(key).or_default().world.insert((net, except));
        }
    }
}

/// What is allowed, found out once for each list and class.
struct Allowed<'a> {
    states: [&'a Compiler; 2],
    known: BTreeMap<(usize, RulesId, Class), Arc<Packets>>,
}

impl Allowed<'_> {
    fn between(&mut self, state: usize, from: &[Standing; 2], to: &[Standing; 2]) -> Packets {
        let (([_, egress], from_class), ([ingress, _], to_class)) = (&from[state], &to[state]);
        let sent = self.by(state, *egress, to_class);
        let received = self.by(state, *ingress, from_class);
        match (sent, received) {
            (None, None) => Packets::all(),
            (Some(one), None) | (None, Some(one)) => Packets::clone(&one),
            (Some(one), Some(other)) => one.and(&other),
        }
    }

    fn by(&mut self, state: usize, list: Option<RulesId>, class: &Class) -> Option<Arc<Packets>> {
        let list = list?;
        let judge: &Judge = self.states[state].tables.judge(list)?;
        let known = self.known.entry((state, list, class.clone()));
        Some(
            known
                .or_insert_with(|| Arc::new(Packets::of(&judge.answer(class))))
                .clone(),
        )
    }
}

impl Compiler {
    fn standing(&self, pod: Option<&ObjectName>, address: IpAddr) -> Standing {
        let lists = pod.and_then(|pod| self.tables.judges_of(pod));
        let lists = lists.map(|lists| lists.each_ref().map(|it| it.as_ref().map(|it| it.number)));
        (lists.unwrap_or_default(), self.tables.class_at(address))
    }
}

impl Members {
    fn add(&mut self, other: &Self) {
        self.pods.extend(other.pods.iter().cloned());
        self.world.extend(other.world.iter().cloned());
        self.dns.extend(&other.dns);
    }
}

impl Packets {
    fn all() -> Self {
        Self {
            others: true,
            ports: WITH_PORTS.map(|it| (it, vec![(0, u16::MAX)])).into(),
        }
    }

    pub fn is_empty(&self) -> bool {
        !self.others && self.ports.is_empty()
    }

    /// Every packet there is?
    pub fn is_everything(&self) -> bool {
        *self == Self::all()
    }

    fn of(answer: &Answer) -> Self {
        let of_protocol = |protocol| {
            let starts = answer.starts(protocol);
            let ends = starts
                .iter()
                .skip(1)
                .map(|start| start - 1)
                .chain([u16::MAX]);
            let runs = starts.iter().copied().zip(ends);
            let runs = runs.filter(|(start, _)| answer.at((protocol, *start)).allows);
            (protocol, runs.collect::<Vec<_>>())
        };
        Self::canonical(answer.others.allows, WITH_PORTS.map(of_protocol).into())
    }

    fn and(&self, other: &Self) -> Self {
        self.without(&Self::all().without(other))
    }

    fn without(&self, other: &Self) -> Self {
        let left = self.ports.iter().map(|(protocol, ranges)| {
            let taken = other.ports.get(protocol).map_or(&[][..], |it| it);
            let mut left = Vec::new();
            for &(first, last) in ranges {
                let mut from = u32::from(first);
                for &(begin, end) in taken
                    .iter()
                    .filter(|(begin, end)| *end >= first && *begin <= last)
                {
                    if u32::from(begin) > from {
                        left.push((from as u16, begin - 1));
                    }
                    from = from.max(u32::from(end) + 1);
                }
                if from <= u32::from(last) {
                    left.push((from as u16, last));
                }
            }
            (*protocol, left)
        });
        Self::canonical(self.others && !other.others, left.collect())
    }

    fn canonical(others: bool, mut ports: BTreeMap<Protocol, Vec<(u16, u16)>>) -> Self {
        for ranges in ports.values_mut() {
            let mut joined: Vec<(u16, u16)> = Vec::new();
            for &(first, last) in ranges.iter() {
                match joined.last_mut() {
                    Some(before) if before.1.checked_add(1) == Some(first) => before.1 = last,
                    _ => joined.push((first, last)),
                }
            }
            *ranges = joined;
        }
        ports.retain(|_, ranges| !ranges.is_empty());
        Self { others, ports }
    }
}
