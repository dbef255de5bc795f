//! What a change of policy opens and closes, as sets: between pods that are judged alike, and the blocks of the world that are. Who may
//! reach whom at all is not here.
//!
//! Both compilers are of a node that has every pod of the cluster, so that one has the lists and classes of all.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;

use ipnet::IpNet;
use weir_common::Protocol;
use weir_common::policy::RulesId;

use super::class::Class;
use super::verdict::Answer;
use super::{Compiler, Direction};
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
    let mut answers = Answers::default();
    let sides = [Direction::Egress, Direction::Ingress];
    let sides = sides.map(|direction| Side::of(&states, direction, &groups, &mut answers));
    let all: Vec<(&Key, &Members)> = groups.iter().collect();
    let mut differences: HashMap<[[usize; 2]; 2], Option<(Packets, Packets)>> = HashMap::new();
    for (i, (from_key, from)) in all.iter().enumerate() {
        for (j, (to_key, to)) in all.iter().enumerate() {
            let alone = i == j && from.pods.len() + from.world.len() + from.dns.len() == 1;
            if from_key.0 != to_key.0 || alone {
                continue;
            }
            // Before and after, of sender and receiver.
            let numbers =
                [0, 1].map(|state| [sides[0].answer(state, i, j), sides[1].answer(state, j, i)]);
            if numbers[0] == numbers[1] {
                continue;
            }
            let difference = differences.entry(numbers).or_insert_with(|| {
                let [old, new] =
                    numbers.map(|[sent, received]| answers.all[sent].and(&answers.all[received]));
                (old != new).then(|| (new.without(&old), old.without(&new)))
            });
            if let Some((opened, closed)) = difference {
                let row = rows.entry((from_key.0, opened.clone(), closed.clone(), (*from).clone()));
                row.or_default().add(to);
            }
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

/// Sets of packets, each once.
#[derive(Debug, Default)]
struct Answers {
    all: Vec<Packets>,
    numbers: BTreeMap<Packets, usize>,
}

impl Answers {
    fn number(&mut self, packets: Packets) -> usize {
        let Self { all, numbers } = self;
        *numbers.entry(packets).or_insert_with_key(|packets| {
            all.push(packets.clone());
            all.len() - 1
        })
    }
}

/// What groups let through in a direction, before and after: for the list of each group and the class of each other one.
struct Side {
    /// Positions in `answers` by group.
    lists: [Vec<usize>; 2],
    classes: [Vec<usize>; 2],
    answers: [Vec<Vec<usize>>; 2],
}

impl Side {
    fn of(
        states: &[&Compiler; 2],
        direction: Direction,
        groups: &BTreeMap<Key, Members>,
        answers: &mut Answers,
    ) -> Self {
        let all = answers.number(Packets::all());
        let of_state = |state: usize| {
            let (mut lists, mut classes) = (Positions::default(), Positions::default());
            for (_, standings) in groups.keys() {
                let ([ingress, egress], class) = &standings[state];
                lists.add(match direction {
                    Direction::Ingress => *ingress,
                    Direction::Egress => *egress,
                });
                classes.add(class.clone());
            }
            (lists, classes)
        };
        let [before, after] = [0, 1].map(of_state);
        let mut answer =
            |state: usize, lists: &Positions<Option<RulesId>>, classes: &Positions<Class>| {
                let judges = lists.distinct.iter();
                let judges = judges.map(|list| states[state].tables.judge((*list)?));
                judges
                    .map(|judge| match judge {
                        None => vec![all; classes.distinct.len()],
                        Some(judge) => {
                            let world = answers.number(Packets::of(&judge.to_the_world));
                            let of_class = |class: &Class| match judge.tells_apart(class) {
                                true => answers.number(Packets::of(&judge.answer(class))),
                                false => world,
                            };
                            classes.distinct.iter().map(of_class).collect()
                        }
                    })
                    .collect()
            };
        let answers = [
            answer(0, &before.0, &before.1),
            answer(1, &after.0, &after.1),
        ];
        Self {
            lists: [before.0.of_each, after.0.of_each],
            classes: [before.1.of_each, after.1.of_each],
            answers,
        }
    }

    fn answer(&self, state: usize, subject: usize, peer: usize) -> usize {
        self.answers[state][self.lists[state][subject]][self.classes[state][peer]]
    }
}

/// Things in a row, and which of them are the same.
struct Positions<T> {
    distinct: Vec<T>,
    known: BTreeMap<T, usize>,
    of_each: Vec<usize>,
}

impl<T> Default for Positions<T> {
    fn default() -> Self {
        Self {
            distinct: Vec::new(),
            known: BTreeMap::new(),
            of_each: Vec::new(),
        }
    }
}

impl<T: Clone + Ord> Positions<T> {
    fn add(&mut self, item: T) {
        let distinct = &mut self.distinct;
        let position = *self.known.entry(item).or_insert_with_key(|item| {
            distinct.push(item.clone());
            distinct.len() - 1
        });
        self.of_each.push(position);
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
