//! Which nodes have been without their agent for too long, and which have it back. Pure.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::Agents;
use crate::model::NetworkSaid;

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
            // What somebody else says of the network is his.
            let is_free = matches!(
                agents.network(node),
                NetworkSaid::Nothing | NetworkSaid::AgentReady
            );
            if is_free
                && !self.told.contains_key(node)
                && agents.other_teller(node, node) == Some(own)
            {
                due.push(Notice::Away(node.clone()));
            }
        }
        // Who is back says so.
        let is_said = agents.network(own) == NetworkSaid::AgentAway;
        if is_said && agents.is_ready(own) && !self.told.contains_key(own) {
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
        let objects = names.map(|name| node(name, NetworkSaid::Nothing));
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
        let said = [
            NetworkSaid::Nothing,
            NetworkSaid::AgentAway,
            NetworkSaid::AgentReady,
        ];
        let [unsaid, away, back] = said.map(|said| node("n2", said));
        roster.changed(Some(&unsaid), Some(&away));
        assert!(due(200).is_empty(), "it is known");
        roster.changed(Some(&agent("n2", false)), Some(&agent("n2", true)));
        assert_eq!(due(205), [Notice::Back("n2".into())]);
        roster.changed(Some(&away), Some(&back));
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
            node("n1", NetworkSaid::Nothing),
            agent("n1", true),
            node("windows", NetworkSaid::Nothing),
            node("n2", NetworkSaid::Nothing),
            agent("n2", false),
        ]);
        let (mut absence, own) = (Absence::default(), "n1".into());
        let start = Instant::now();
        let mut due =
            |after| roster.read(|agents| absence.due(agents, &own, start + seconds(after)));
        assert!(due(0).is_empty());
        roster.changed(Some(&node("n2", NetworkSaid::Nothing)), None);
        assert!(due(100).is_empty());
    }

    #[test]
    fn what_somebody_else_says_of_the_network_stays_and_a_condition_that_is_taken_off_stays_off() {
        let nodes = ["n1", "n2"].map(|name| node(name, NetworkSaid::BySomebodyElse));
        let roster = roster(&nodes);
        roster.changed(None, Some(&agent("n1", true)));
        roster.changed(None, Some(&agent("n2", false)));
        let (mut absence, own) = (Absence::default(), "n1".into());
        let start = Instant::now();
        let mut due =
            |after| roster.read(|agents| absence.due(agents, &own, start + seconds(after)));
        assert!(due(0).is_empty());
        assert!(due(100).is_empty());
        let said = [NetworkSaid::Nothing, NetworkSaid::AgentAway];
        let [unsaid, away] = said.map(|said| node("n2", said));
        roster.changed(Some(&nodes[1]), Some(&unsaid));
        assert_eq!(due(105), [Notice::Away("n2".into())]);
        roster.changed(Some(&unsaid), Some(&away));
        // Its pod is there: who takes the condition off is told again.
        roster.changed(Some(&away), Some(&unsaid));
        assert_eq!(due(200), [Notice::Away("n2".into())]);
        roster.changed(Some(&unsaid), Some(&away));
        // It is gone: the node is not ours any more.
        roster.changed(Some(&agent("n2", false)), None);
        roster.changed(Some(&away), Some(&unsaid));
        assert!(due(400).is_empty());
        assert!(due(500).is_empty());
    }
}
