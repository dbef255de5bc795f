//! Which conditions become Events, and in which words. Pure.
//!
//! An Event is written when a condition has held for a moment, and not again for a while if it comes and goes. Of
//! other nodes there are none: each agent would tell of each peer, and `weir status` and metrics do.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::time::{Duration, SystemTime};

use super::Agents;
use crate::conditions::{About, Held, NodeFault};

/// How long a condition has to hold to be worth an Event.
const HOLDS: Duration = Duration::from_secs(5);
/// How long a condition that comes and goes is not told again.
const QUIET: Duration = Duration::from_secs(600);
/// After how long one is told again that was not taken; each time twice as long, and at the most [`QUIET`].
const SOON: Duration = Duration::from_secs(60);
/// The longest note that the API takes, in bytes.
const NOTE: usize = 1024;

/// The resource of pods.
pub(super) const POD: (&str, &str, &str, &str) = ("Pod", "", "v1", "pods");
/// The resources of objects that conditions are about: kind, group, version, plural.
const RESOURCES: [(&str, &str, &str, &str); 7] = [
    ("Service", "", "v1", "services"),
    POD,
    ("Namespace", "", "v1", "namespaces"),
    ("Node", "", "v1", "nodes"),
    ("EndpointSlice", "discovery.k8s.io", "v1", "endpointslices"),
    (
        "NetworkPolicy",
        "networking.k8s.io",
        "v1",
        "networkpolicies",
    ),
    (
        "ClusterNetworkPolicy",
        "policy.networking.k8s.io",
        "v1alpha2",
        "clusternetworkpolicies",
    ),
];

/// An Event to be.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) struct Note {
    about: About,
    /// When the condition began.
    since: SystemTime,
    pub(super) regarding: Regarding,
    /// The fault's label.
    pub(super) reason: &'static str,
    pub(super) text: String,
}

/// The object that an Event is about.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) enum Regarding {
    /// This node.
    ThisNode,
    /// A pod of this node.
    PodHere { namespace: String, name: String },
    /// An object that every agent knows.
    Object {
        kind: &'static str,
        /// Empty for one that is in none.
        namespace: String,
        name: String,
    },
}

/// What was told, or tried.
#[derive(Debug, Default)]
pub(super) struct Events {
    tried: BTreeMap<About, Tried>,
}

#[derive(Clone, Copy, Debug)]
struct Tried {
    /// Which of its lives.
    since: SystemTime,
    at: SystemTime,
    fate: Fate,
    /// How often in vain.
    in_vain: u32,
}

/// Who tells something.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum By {
    Us,
    Another,
}

/// What became of a note.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Fate {
    /// The API server has it.
    Told,
    /// Another agent tells it; if it holds on, it is looked again who.
    Left,
    NotTaken,
}

impl Tried {
    /// How long there is nothing to do about it.
    fn rest(&self) -> Duration {
        match self.fate {
            Fate::Told | Fate::Left => QUIET,
            Fate::NotTaken => (SOON * (1 << self.in_vain.min(4))).min(QUIET),
        }
    }
}

impl Events {
    /// What is to be told now, of all that holds.
    pub(super) fn due(&mut self, held: &[Held], now: SystemTime) -> Vec<Note> {
        let age = |of: SystemTime| now.duration_since(of).unwrap_or_default();
        let holding: BTreeSet<&About> = held.iter().map(|it| &it.condition.about).collect();
        self.tried
            .retain(|about, tried| age(tried.at) < QUIET || holding.contains(about));
        let rests = |about: &About, since: SystemTime| {
            let tried = self.tried.get(about);
            tried.is_some_and(|tried| {
                let is_told = tried.since == since && tried.fate == Fate::Told;
                is_told || age(tried.at) < tried.rest()
            })
        };
        let due = held
            .iter()
            .filter(|it| age(it.since) >= HOLDS && !rests(&it.condition.about, it.since));
        let note = |it: &Held| {
            let about = &it.condition.about;
            Some(Note {
                about: about.clone(),
                since: it.since,
                regarding: regarding(about)?,
                reason: about.fault(),
                text: text(&it.condition.to_string(), about.remedy()),
            })
        };
        let mut due: Vec<Note> = due.filter_map(note).collect();
        // Who has been tried in vain lets the others go before.
        due.sort_by_key(|note| self.tried.get(&note.about).map(|tried| tried.at));
        due
    }

    /// What became of it.
    pub(super) fn tried(&mut self, note: &Note, fate: Fate, now: SystemTime) {
        let before = self.tried.get(&note.about);
        let before = before.filter(|before| before.fate == Fate::NotTaken);
        let tried = Tried {
            since: note.since,
            at: now,
            fate,
            in_vain: before.map_or(0, |before| before.in_vain + 1),
        };
        self.tried.insert(note.about.clone(), tried);
    }
}

impl fmt::Display for Note {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.about, self.reason)
    }
}

impl Note {
    /// Who tells it, as the agent of node `own` sees it; `None` if that is not clear yet. What each knows, one tells.
    pub(super) fn teller(&self, agents: &Agents, own: &str) -> Option<By> {
        let Regarding::Object {
            kind,
            namespace,
            name,
        } = &self.regarding
        else {
            return Some(By::Us);
        };
        match agents.teller(&format!("{kind} {namespace}/{name}")) {
            Some(teller) if **teller == *own => Some(By::Us),
            // Who is not ready does not know yet whether the others see it so.
            Some(_) => agents.is_ready(own).then_some(By::Another),
            None => Some(By::Another),
        }
    }
}

fn regarding(about: &About) -> Option<Regarding> {
    match about {
        // Each agent knows that one, and there is no object to tell it of.
        About::Node(NodeFault::DnsServiceMissing, _) => None,
        About::Node(fault, _) => (!fault.is_no_news()).then_some(Regarding::ThisNode),
        About::Pod(pod, _) => (!pod.namespace.is_empty()).then(|| Regarding::PodHere {
            namespace: pod.namespace.to_string(),
            name: pod.name.to_string(),
        }),
        About::Object(object, _) => {
            let (kind, name) = object.split_once(' ')?;
            let (kind, ..) = resource(kind)?;
            // After the name there may be a part of it: `Service shop/web external IP 0`.
            let name = name.split_whitespace().next()?;
            let (namespace, name) = name.split_once('/').unwrap_or(("", name));
            Some(Regarding::Object {
                kind,
                namespace: namespace.to_owned(),
                name: name.to_owned(),
            })
        }
        About::Peer(..) => None,
    }
}

/// The resource of a kind: kind, group, version, plural.
pub(super) fn resource(
    kind: &str,
) -> Option<(&'static str, &'static str, &'static str, &'static str)> {
    RESOURCES.into_iter().find(|(it, ..)| *it == kind)
}

/// What is wrong and what can be done, cut to what the API takes.
fn text(what: &str, remedy: &str) -> String {
    let mut text = what.to_owned();
    let room = NOTE.saturating_sub(remedy.len() + " (…; )".len());
    if text.len() > room {
        text.truncate(text.floor_char_boundary(room));
        text.push('…');
    }
    format!("{text} ({remedy})")
}

#[cfg(test)]
mod tests {
    use super::super::roster::Roster;
    use super::super::roster::tests::{agent, roster};
    use super::*;
    use crate::conditions::{Condition, ObjectFault, PeerFault, PodFault};
    use crate::model::ObjectName;

    fn at(seconds: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)
    }

    fn held(condition: Condition, since: u64) -> Held {
        Held {
            condition,
            since: at(since),
        }
    }

    fn taken() -> Condition {
        Condition::object(
            "Service shop/thief",
            ObjectFault::AddressTaken,
            "10.96.0.1:443",
        )
    }

    #[test]
    fn a_condition_that_holds_is_told_once_and_one_that_flaps_seldom() {
        let mut events = Events::default();
        let mut told = |since: u64, now: u64| {
            let due = events.due(&[held(taken(), since)], at(now));
            let again = events.due(&[held(taken(), since)], at(now));
            assert_eq!(due, again, "nobody has told it yet");
            due.iter()
                .for_each(|note| events.tried(note, Fate::Told, at(now)));
            due.len()
        };
        assert_eq!(told(0, 3), 0, "it may pass");
        assert_eq!(told(0, 5), 1);
        assert_eq!(told(0, 10_000), 0);
        assert_eq!(told(10_010, 10_020), 1, "another time, much later");
        assert_eq!(told(10_100, 10_200), 0, "it flaps");
        assert_eq!(told(10_100, 10_700), 1, "and stays");
    }

    #[test]
    fn what_is_not_taken_is_tried_again_and_keeps_nobody_back() {
        let mut events = Events::default();
        let of = |name: &str| {
            let about = format!("Service shop/{name}");
            held(Condition::object(about, ObjectFault::AddressTaken, "x"), 0)
        };
        let all = ["a", "b", "c"].map(of);
        let due = |events: &mut Events, now: u64| -> Vec<String> {
            let due = events.due(&all, at(now)).into_iter();
            due.map(|note| note.about.to_string()).collect()
        };
        let [a, b, c] = ["a", "b", "c"].map(|name| format!("Service shop/{name}"));
        assert_eq!(due(&mut events, 10), [&*a, &*b, &*c]);
        let notes = events.due(&all, at(10));
        events.tried(&notes[0], Fate::NotTaken, at(10));
        assert_eq!(due(&mut events, 69), [&*b, &*c]);
        assert_eq!(
            due(&mut events, 70),
            [&*b, &*c, &*a],
            "who was tried comes last"
        );
        for (now, rest) in [(70, 120), (190, 240), (430, 480), (910, 600), (1510, 600)] {
            events.tried(&notes[0], Fate::NotTaken, at(now));
            assert_eq!(due(&mut events, now + rest - 1), [&*b, &*c]);
            assert_eq!(due(&mut events, now + rest), [&*b, &*c, &*a]);
        }
        events.tried(&notes[0], Fate::Told, at(2110));
        assert_eq!(due(&mut events, 9000), [&*b, &*c]);
    }

    #[test]
    fn each_kind_of_condition_is_told_where_people_look() {
        let pod = ObjectName::new("shop", "a");
        let container = ObjectName::cluster("c1");
        let all = [
            (taken(), Some("AddressTaken")),
            (
                Condition::object("Node n9", ObjectFault::Quarantined, "x"),
                Some("Quarantined"),
            ),
            (
                Condition::pod(pod, PodFault::DeviceGone, "x"),
                Some("DeviceGone"),
            ),
            (Condition::pod(container, PodFault::DeviceGone, "x"), None),
            (
                Condition::node(NodeFault::SecondLock, "x"),
                Some("SecondLock"),
            ),
            (Condition::node(NodeFault::NotSynced, "x"), None),
            (Condition::node(NodeFault::DnsServiceMissing, "x"), None),
            (Condition::peer("n2", PeerFault::Unreachable, "x"), None),
        ];
        for (condition, expected) in all {
            let notes = Events::default().due(&[held(condition.clone(), 0)], at(60));
            let reasons: Vec<_> = notes.iter().map(|note| note.reason).collect();
            assert_eq!(reasons, expected.as_slice(), "{condition}");
        }
    }

    #[test]
    fn a_part_of_an_object_is_told_of_the_object() {
        let about = "Service shop/web external IP 0";
        let part = Condition::object(about, ObjectFault::Quarantined, "x");
        let note = Events::default().due(&[held(part, 0)], at(60)).remove(0);
        let expected = Regarding::Object {
            kind: "Service",
            namespace: "shop".into(),
            name: "web".into(),
        };
        assert_eq!(note.regarding, expected);
        assert!(note.text.contains("external IP 0"), "{note:?}");
    }

    #[test]
    fn of_an_object_that_all_know_one_agent_tells_and_another_when_it_goes() {
        let names = ["n1", "n2", "n3"];
        let roster = roster(&names.map(|name| agent(name, true)));
        let mut events = Events::default();
        let note = events.due(&[held(taken(), 0)], at(60)).remove(0);
        let by = |own: &str| roster.read(|agents| note.teller(agents, own));
        let tells = |own: &&&str| by(own) == Some(By::Us);
        let first: Vec<_> = names.iter().filter(tells).collect();
        assert_eq!(first.len(), 1);
        let gone = agent(first[0], true);
        roster.changed(Some(&gone), Some(&agent(first[0], false)));
        assert_eq!(by(first[0]), None, "it does not know how the others see it");
        let next: Vec<_> = names.iter().filter(tells).collect();
        assert_eq!(next.len(), 1);
        assert_ne!(first, next);
        // Whoever left it to another looks again in a while.
        events.tried(&note, Fate::Left, at(60));
        assert!(events.due(&[held(taken(), 0)], at(300)).is_empty());
        assert_eq!(events.due(&[held(taken(), 0)], at(700)).len(), 1);
        events.tried(&note, Fate::Told, at(700));
        assert!(events.due(&[held(taken(), 0)], at(9000)).is_empty());
        let nobody = Roster::default();
        let by = nobody.read(|agents| note.teller(agents, "n1"));
        assert_eq!(by, Some(By::Another), "no agent is known to tell it");
    }

    #[test]
    fn a_note_is_as_long_as_the_api_takes_and_keeps_the_remedy() {
        let note = text(&"ü".repeat(2000), "mend it");
        assert!(note.len() <= NOTE && note.ends_with("(mend it)"), "{note}");
    }
}
