//! Where all conditions meet: whoever finds one says so here, and whoever wants to know reads the fold. What a
//! condition means is in the folder's `mod.rs`.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use tokio::sync::watch;
use tracing::{info, warn};

use super::{About, Condition, Effect};

/// All conditions that hold on this node.
#[derive(Debug, Default)]
pub struct Board {
    /// By who says so: two may say the same, and each takes back its own.
    held: Mutex<BySource>,
    node: watch::Sender<Arc<NodeState>>,
}

type BySource = BTreeMap<&'static str, BTreeMap<About, Held>>;

/// A condition that holds.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Held {
    pub condition: Condition,
    /// When it began; a change of its text does not begin it anew.
    pub since: SystemTime,
}

/// The fold of all conditions: what the node does because of them.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct NodeState {
    /// Why no pod is started here.
    pub stops_pods: Vec<Condition>,
    /// Why the node is not ready: those, and more.
    pub unready: Vec<Condition>,
}

/// One of those who find faults. It takes back what it said, and nothing of others.
#[derive(Clone, Debug)]
pub struct Reporter {
    board: Arc<Board>,
    source: &'static str,
}

impl Board {
    /// The way for one source of conditions. Each has a name of its own.
    pub fn reporter(self: &Arc<Self>, source: &'static str) -> Reporter {
        Reporter {
            board: self.clone(),
            source,
        }
    }

    /// What the node does because of all conditions.
    pub fn node(&self) -> Arc<NodeState> {
        self.node.borrow().clone()
    }

    /// The same, to be waited for.
    pub fn watch(&self) -> watch::Receiver<Arc<NodeState>> {
        self.node.subscribe()
    }

    /// Every condition that holds; those with the greatest effect first.
    pub fn all(&self) -> Vec<Held> {
        let mut all: Vec<Held> = self
            .lock()
            .values()
            .flat_map(BTreeMap::values)
            .cloned()
            .collect();
        all.sort_by(|a, b| {
            let (a, b) = (&a.condition.about, &b.condition.about);
            b.effect().cmp(&a.effect()).then_with(|| a.cmp(b))
        });
        all
    }

    /// How many hold, by whom they are about and by fault.
    pub fn counts(&self) -> BTreeMap<(&'static str, &'static str), usize> {
        let mut counts = BTreeMap::new();
        for about in self.lock().values().flat_map(BTreeMap::keys) {
            *counts.entry((about.kind(), about.fault())).or_default() += 1;
        }
        counts
    }

    fn lock(&self) -> MutexGuard<'_, BySource> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn raise(&self, source: &'static str, condition: Condition) {
        let mut held = self.lock();
        if raise(held.entry(source).or_default(), condition) {
            self.fold(&held);
        }
    }

    fn clear(&self, source: &'static str, about: &About) {
        let mut held = self.lock();
        if held.get_mut(source).is_some_and(|own| clear(own, about)) {
            self.fold(&held);
        }
    }

    fn replace(&self, source: &'static str, conditions: impl IntoIterator<Item = Condition>) {
        let mut held = self.lock();
        let own = held.entry(source).or_default();
        let mut gone: BTreeSet<About> = own.keys().cloned().collect();
        let mut folds = false;
        for condition in conditions {
            gone.remove(&condition.about);
            folds |= raise(own, condition);
        }
        for about in gone {
            folds |= clear(own, &about);
        }
        if folds {
            self.fold(&held);
        }
    }

    fn fold(&self, held: &BySource) {
        let with = |least: Effect| -> Vec<Condition> {
            let mut found: Vec<Condition> = held
                .values()
                // Conditions of the node come first in the order of the keys.
                .flat_map(|own| {
                    own.values()
                        .take_while(|held| held.condition.about.is_node())
                })
                .map(|held| &held.condition)
                .filter(|condition| condition.about.effect() >= least)
                .cloned()
                .collect();
            found.sort_by(|a, b| a.about.cmp(&b.about));
            found
        };
        let now = NodeState {
            stops_pods: with(Effect::StopsPods),
            unready: with(Effect::Unready),
        };
        self.node.send_if_modified(|last| {
            if **last == now {
                return false;
            }
            match (last.unready.first(), now.unready.first()) {
                (Some(_), None) => info!("ready"),
                (before, Some(first)) if before != Some(first) => {
                    info!(reason = %first, "not ready")
                }
                _ => {}
            }
            *last = Arc::new(now);
            true
        });
    }
}

/// True if it is about the node, so that the fold may change.
fn raise(own: &mut BTreeMap<About, Held>, condition: Condition) -> bool {
    let before = own.get(&condition.about);
    if before.is_some_and(|before| before.condition == condition) {
        return false;
    }
    let since = before.map_or_else(SystemTime::now, |before| before.since);
    let about = condition.about.clone();
    let (fault, text) = (about.fault(), &condition.text);
    match &about {
        About::Node(fault, _) if fault.is_no_news() => info!(%about, text, "not yet, or not now"),
        _ => warn!(%about, fault, text, "a fault"),
    }
    let is_node = about.is_node();
    own.insert(about, Held { condition, since });
    is_node
}

fn clear(own: &mut BTreeMap<About, Held>, about: &About) -> bool {
    if own.remove(about).is_none() {
        return false;
    }
    info!(%about, fault = about.fault(), "no longer");
    about.is_node()
}

impl Reporter {
    /// This holds from now on; if it did before, with another text, it holds with this one.
    pub fn raise(&self, condition: Condition) {
        self.board.raise(self.source, condition);
    }

    /// This holds no longer, if it did.
    pub fn clear(&self, about: &About) {
        self.board.clear(self.source, about);
    }

    /// Exactly these hold, of all that this source says. For sources that find few.
    pub fn replace(&self, conditions: impl IntoIterator<Item = Condition>) {
        self.board.replace(self.source, conditions);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::conditions::{NodeFault, ObjectFault, PeerFault, PodFault};
    use crate::model::ObjectName;

    fn of_others() -> Vec<Condition> {
        let pod = ObjectName::new("shop", "a");
        let objects = ObjectFault::ALL
            .iter()
            .map(|fault| Condition::object("Service shop/a", *fault, "x"));
        let pods = PodFault::ALL
            .iter()
            .map(|fault| Condition::pod(pod.clone(), *fault, "x"));
        let peers = PeerFault::ALL
            .iter()
            .map(|fault| Condition::peer("n2", *fault, "x"));
        objects.chain(pods).chain(peers).collect()
    }

    #[test]
    fn no_fault_of_an_object_pod_or_peer_changes_what_the_node_does() {
        let board = Arc::new(Board::default());
        board.reporter("test").replace(of_others());
        assert_eq!(board.all().len(), of_others().len());
        assert_eq!(*board.node(), NodeState::default());
    }

    #[test]
    fn every_fault_of_the_node_does_what_its_effect_says() {
        for fault in NodeFault::ALL {
            let board = Arc::new(Board::default());
            let from = board.reporter("test");
            from.raise(Condition::node(*fault, "x"));
            let node = board.node();
            assert_eq!(
                node.stops_pods.len(),
                usize::from(fault.effect() == Effect::StopsPods)
            );
            assert_eq!(
                node.unready.len(),
                usize::from(fault.effect() >= Effect::Unready)
            );
            from.replace([]);
            assert_eq!(*board.node(), NodeState::default(), "{fault:?}");
        }
    }

    #[test]
    fn a_source_takes_back_its_own_and_nothing_of_others() {
        let board = Arc::new(Board::default());
        let (one, two) = (board.reporter("one"), board.reporter("two"));
        let same = Condition::node(NodeFault::SecondLock, "open");
        one.raise(same.clone());
        two.raise(same.clone());
        one.replace([]);
        assert_eq!(board.node().stops_pods, std::slice::from_ref(&same));
        two.clear(&same.about);
        assert!(board.all().is_empty());
    }

    #[test]
    fn another_text_does_not_begin_a_condition_anew() {
        let board = Arc::new(Board::default());
        let from = board.reporter("test");
        from.raise(Condition::part(NodeFault::HookLost, "hook a", "gone"));
        let since = board.all()[0].since;
        from.raise(Condition::part(NodeFault::HookLost, "hook a", "taken"));
        let all = board.all();
        assert_eq!(
            (all.len(), all[0].since, all[0].condition.text.as_str()),
            (1, since, "taken")
        );
    }
}
