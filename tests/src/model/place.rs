//! Whose a place is: of the answers of a conversation that somebody opens; and whether there is room for its rows.

use weir_common::event::Hook;

use super::cluster::Cluster;
use super::conversation::{BACK, Stage, THERE};
use super::oracle::{Arrival, Oracle, Place, Why};
use super::wire::Tuple;

impl Oracle {
    /// Whose the place of a conversation's answers is.
    pub(super) fn place(
        &self,
        cluster: &Cluster,
        at: &Arrival,
        asked: Tuple,
        answer: (Hook, Tuple),
    ) -> Place {
        let now = cluster.now();
        let asked = (at.hook, asked);
        let has_plan = self
            .conversations
            .iter()
            .any(|it| it.stage == Stage::Asked && (it.hooks[BACK], it.arrives(BACK)) == answer);
        let plans = self.conversations.iter();
        let plans = plans.filter(|it| it.stage == Stage::Asked).count();
        if !has_plan && cluster.memory.most.is_some_and(|most| plans >= most) {
            return Place::Full;
        }
        let (mut own, mut torn, mut left, mut taken) = (None, None, [None; 2], false);
        for (index, it) in self.conversations.iter().enumerate() {
            let is_own = |direction| (it.hooks[direction], it.arrives(direction)) == asked;
            if it.stage == Stage::Asked && (it.hooks[BACK], it.arrives(BACK)) == answer {
                if is_own(THERE) && it.is_begun_anew(at.packet, now) {
                    left[0] = Some(index);
                } else if is_own(THERE) {
                    own = Some(index);
                } else if it.is_moved(asked.1) || it.is_forgotten(cluster, asked.1.from.ip()) {
                    left[0] = Some(index);
                } else {
                    return Place::Taken;
                }
            }
            for direction in [THERE, BACK] {
                if it.stage == Stage::Known
                    && it.rows[direction]
                    && (it.hooks[direction], it.arrives(direction)) == answer
                {
                    let other = 1 - direction;
                    if is_own(other) {
                        torn = Some((index, other));
                    } else if !it.claims[direction] && it.is_moved(asked.1)
                        || self.is_over(index, direction, now)
                    {
                        left[1] = Some(index);
                    } else {
                        taken = true;
                    }
                }
            }
        }
        if taken {
            // Named exception STRANGER: who finds another one's row there loses its own plan.
            self.fallen.borrow_mut().extend(own.or(left[0]));
            return Place::Taken;
        }
        match (torn, own) {
            (Some((index, direction)), _) => Place::Torn(index, direction, own.or(left[0])),
            (None, Some(own)) => Place::Own(own, left[1]),
            (None, None) if left == [None; 2] => Place::Free,
            (None, None) => Place::Left(left),
        }
    }

    /// Why does a conversation leave its place to one that is asked?
    pub(super) fn why_left(&self, index: usize, asked: Tuple) -> Why {
        if self.conversations[index].is_moved(asked) {
            Why::AskedOtherwise
        } else {
            Why::Replaced
        }
    }

    /// Can the ends of a conversation serve another one? TCP says so itself; otherwise silence does.
    fn is_over(&self, index: usize, direction: usize, now: u64) -> bool {
        let it = &self.conversations[index];
        if it.is_tcp() {
            return it.is_closed(direction, now);
        }
        let other = self.known(it.hooks[1 - direction], &it.arrives(1 - direction));
        let is_silent = |(of, at): (usize, usize)| self.conversations[of].is_silent(at, now);
        is_silent((index, direction)) && other.is_none_or(is_silent)
    }

    /// How many rows there are of conversations that are known.
    pub fn ways(&self) -> usize {
        let known = self.conversations.iter();
        known
            .filter(|it| it.stage == Stage::Known)
            .map(|it| it.rows.iter().filter(|row| **row).count())
            .sum()
    }

    /// A conversation gets a row for each direction, if there is room for both, and nobody else goes another way from the place
    /// of the first. Whose row is at a place already stays as it is.
    pub(super) fn settle(&mut self, cluster: &Cluster, index: usize) {
        let it = &self.conversations[index];
        let others = [THERE, BACK].map(|direction| {
            let found = self.known(it.hooks[direction], &it.arrives(direction));
            found.map(|(of, other)| self.conversations[of].step(other))
        });
        if others[THERE].is_some_and(|step| step != it.step(THERE)) {
            self.conversations[index].is_proven = true;
            return self.keep_drawn(index);
        }
        let rows = others.map(|other| other.is_none());
        let new = rows.iter().filter(|row| **row).count();
        let most = cluster.memory.most.unwrap_or(usize::MAX);
        if new > 0 && self.ways() + new > most {
            self.lacks_room();
            self.conversations[index].is_proven = true;
            return self.keep_drawn(index);
        }
        if !it.is_of_pod(cluster) {
            let key = it.key();
            self.drawn.remove(&key);
        }
        let it = &mut self.conversations[index];
        it.stage = Stage::Known;
        it.rows = rows;
    }

    /// What was drawn for a connection stays so.
    pub(super) fn keep_drawn(&mut self, index: usize) {
        let it = &self.conversations[index];
        if it.is_tcp() && (it.backend.is_some() || it.is_masqueraded) {
            self.drawn.insert(it.key(), (it.backend, it.goes));
        }
    }

    /// There is no room for rows of a conversation: it works from the one that it has.
    pub(super) fn lacks_room(&mut self) {
        *self.lost.entry(Why::NoRoom).or_default() += 1;
    }
}
