//! Which nodes have been without their agent for too long, and which have it back. Pure.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::Agents;

/// How long an agent may be away: an update takes seconds.
const PATIENCE: Duration = Duration::from_secs(60);
/// How long what was told may take to be heard of.
const ECHO: Duration = Duration::from_secs(30);

/// Something to tell of a node.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) enum Notice {
    /// Nobody does the agent's work there.
    Away(Arc<str>),
    Back(Arc<str>),
}

/// Since when.
#[derive(Debug, Default)]
pub(super) struct Absence {
    since: BTreeMap<Arc<str>, Instant>,
    told: BTreeMap<Arc<str>, Instant>,
}

impl Absence {
    /// What the agent of `own` has to tell now.
    pub(super) fn due(&mut self, agents: &Agents, own: &Arc<str>, now: Instant) -> Vec<Notice> {
        let last = std::mem::take(&mut self.since);
        for node in agents.away() {
            let since = last.get(node).copied().unwrap_or(now);
            self.since.insert(node.clone(), since);
        }
        self.told
            .retain(|_, at| now.saturating_duration_since(*at) < ECHO);
        let mut due = Vec::new();
        let is_long = |since: &Instant| now.saturating_duration_since(*since) >= PATIENCE;
        let long = self.since.iter().filter(|(_, since)| is_long(since));
        for node in long.map(|(node, _)| node) {
            let is_ours = agents.teller(node, Some(node)) == Some(own);
            if is_ours && !agents.is_told_away(node) && !self.told.contains_key(node) {
                due.push(Notice::Away(node.clone()));
            }
        }
        // Who is back says so.
        if agents.is_ready(own) && agents.is_told_away(own) && !self.told.contains_key(own) {
            due.push(Notice::Back(own.clone()));
        }
        for Notice::Away(node) | Notice::Back(node) in &due {
            self.told.insert(node.clone(), now);
        }
        due
    }
}

#[cfg(test)]
mod tests {
    use super::super::roster::tests::{agent, node, roster};
    use super::*;

    fn seconds(n: u64) -> Duration {
        Duration::from_secs(n)
    }

    #[test]
    fn one_of_the_others_tells_of_an_agent_that_is_away_for_a_minute_and_once() {
        let names = ["n1", "n2", "n3"];
        let objects = names.map(|name| node(name, false));
        let roster = roster(&objects);
        for name in names {
            roster.changed(None, Some(&agent(name, true)));
        }
        let start = Instant::now();
        let mut all = names.map(|name| (Arc::<str>::from(name), Absence::default()));
        let mut due = |after: u64| -> Vec<Notice> {
            let now = start + seconds(after);
            let of = |(own, absence): &mut (Arc<str>, Absence)| {
                roster.read(|agents| absence.due(agents, own, now))
            };
            all.iter_mut().flat_map(of).collect()
        };
        assert!(due(0).is_empty());
        roster.changed(Some(&agent("n2", true)), Some(&agent("n2", false)));
        assert!(due(10).is_empty());
        assert!(due(69).is_empty());
        assert_eq!(due(70), [Notice::Away("n2".into())]);
        assert!(due(75).is_empty(), "it is told already");
        roster.changed(Some(&node("n2", false)), Some(&node("n2", true)));
        assert!(due(200).is_empty(), "it is known");
        roster.changed(Some(&agent("n2", false)), Some(&agent("n2", true)));
        assert_eq!(due(205), [Notice::Back("n2".into())]);
        roster.changed(Some(&node("n2", true)), Some(&node("n2", false)));
        assert!(due(300).is_empty());
        // A pod that goes for good is away too, and a restart in between begins anew.
        roster.changed(Some(&agent("n3", true)), None);
        assert!(due(310).is_empty());
        roster.changed(None, Some(&agent("n3", true)));
        assert!(due(340).is_empty());
        roster.changed(Some(&agent("n3", true)), None);
        assert!(due(345).is_empty());
        assert!(due(375).is_empty());
        assert_eq!(due(405), [Notice::Away("n3".into())]);
    }

    #[test]
    fn nodes_that_never_had_an_agent_and_nodes_that_are_gone_are_nobodys_news() {
        let roster = roster(&[
            node("n1", false),
            agent("n1", true),
            node("windows", false),
            node("n2", false),
            agent("n2", false),
        ]);
        let (mut absence, own) = (Absence::default(), "n1".into());
        let start = Instant::now();
        let mut due =
            |after| roster.read(|agents| absence.due(agents, &own, start + seconds(after)));
        assert!(due(0).is_empty());
        roster.changed(Some(&node("n2", false)), None);
        assert!(due(100).is_empty());
    }
}
