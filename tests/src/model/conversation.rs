//! A conversation as the model keeps it, at one place: at a pod's device, or at an uplink.

use std::net::IpAddr;
use std::sync::atomic::Ordering::Relaxed;

use weir_common::DropReason;
use weir_common::event::Hook;
use weir_common::way::{Mark, Way, WayState};

use super::cluster::Cluster;
use super::wire::{Packet, Segment, Talk, Tuple};
use crate::tables::Memory;

pub const SECOND: u64 = 1_000_000_000;

/// Directions of a conversation: what its opener sends, and the answers.
pub const THERE: usize = 0;
pub const BACK: usize = 1;

/// What is kept of it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Stage {
    /// One row for both directions, under the key of the answers.
    Asked,
    /// A row for each direction, unless one was pushed out.
    Known,
}

#[derive(Clone, Debug)]
pub struct Conversation {
    pub stage: Stage,
    /// Where packets of each direction arrive.
    pub hooks: [Hook; 2],
    /// What its opener sends, before and after translation.
    pub asked: Tuple,
    pub goes: Tuple,
    /// The backend's index and incarnation.
    pub backend: Option<(usize, u32)>,
    /// A port of the node stands for the opener.
    pub is_masqueraded: bool,
    /// By which uplink it leaves.
    pub uplink: u32,
    pub marks: [Mark; 2],
    /// The rows that are there.
    pub rows: [bool; 2],
    /// Whose row says that it is of the one who opened it: where a lost row was made again by an answer, both do.
    pub claims: [bool; 2],
    pub seen: [u64; 2],
    pub epoch: [u32; 2],
    pub packets: [u64; 2],
    pub bytes: [u64; 2],
    /// What allows it at either end.
    pub rules: [[u32; 2]; 2],
    /// TCP: who has said goodbye, by row and direction; by row, what acknowledges the other side's; who has spoken after the
    /// other's goodbye, and who has acknowledged it.
    pub fin: [[bool; 2]; 2],
    pub others_end: [u32; 2],
    pub heard: [bool; 2],
    pub acknowledged: [bool; 2],
    /// Its opener has acknowledged the first answer, and there was no room for two rows.
    pub is_proven: bool,
    /// By row: either side has broken off, and neither spoken since. Of an answer's row before the first answer: somebody
    /// has refused.
    pub reset: [bool; 2],
}

impl Conversation {
    pub fn new(
        cluster: &Cluster,
        hooks: [Hook; 2],
        packet: &Packet,
        goes: Tuple,
        length: u64,
    ) -> Self {
        let is_fin = !packet.opens_tcp() && packet.segment().is_some_and(Segment::ends);
        let resets = packet.segment().is_some_and(Segment::resets);
        Self {
            stage: Stage::Asked,
            hooks,
            asked: packet.tuple,
            goes,
            backend: None,
            is_masqueraded: false,
            uplink: 0,
            marks: [Mark::PASSED; 2],
            rows: [false; 2],
            claims: [true, false],
            seen: [cluster.now(); 2],
            epoch: [cluster.epoch(); 2],
            packets: [1, 0],
            bytes: [length, 0],
            rules: [[0; 2]; 2],
            fin: [[is_fin, false]; 2],
            others_end: [0, packet.segment().map_or(0, Segment::end)],
            heard: [false; 2],
            acknowledged: [false; 2],
            is_proven: false,
            reset: [resets; 2],
        }
    }

    /// What its opener sends, and where.
    pub fn key(&self) -> (Hook, Tuple) {
        (self.hooks[THERE], self.asked)
    }

    /// A packet of a direction, as it arrives.
    pub fn arrives(&self, direction: usize) -> Tuple {
        if direction == THERE {
            self.asked
        } else {
            self.goes.back()
        }
    }

    /// The same as it goes on.
    pub fn goes_on(&self, direction: usize) -> Tuple {
        if direction == THERE {
            self.goes
        } else {
            self.asked.back()
        }
    }

    /// Is a pod its own backend? It then is sent what it sends, from the address that it asked.
    pub fn is_hairpin(&self) -> bool {
        self.goes.to.ip() == self.asked.from.ip()
    }

    /// Does it lead from outside to a process in the node's own host network?
    pub(super) fn is_of_hostnet(&self) -> bool {
        self.hooks == [Hook::FROM_NET, Hook::TO_NET] && self.marks[THERE] == Mark::NONE
    }

    /// What policy says about it. A pod may always reach itself (Kubernetes, "Network Policies": a pod cannot block access to itself).
    ///
    /// # Errors
    /// Why it may not be.
    pub fn allowed(&self, cluster: &Cluster, question: Tuple) -> Result<[u32; 2], DropReason> {
        if self.is_hairpin() {
            return Ok([0; 2]);
        }
        cluster.allows(question.talk, question.from.ip(), question.to)
    }

    pub fn is_tcp(&self) -> bool {
        self.asked.talk == Talk::Tcp
    }

    /// RFC 9293 section 3.6: both have said goodbye; or one has broken off (section 3.5.2), and nothing has come for three seconds:
    /// anybody may claim that (RFC 5961).
    pub fn is_closed(&self, direction: usize, now: u64) -> bool {
        // One row has both directions until there are two.
        let seen = match self.stage {
            Stage::Asked => self.seen[THERE].max(self.seen[BACK]),
            Stage::Known => self.seen[direction],
        };
        let is_silent = now.saturating_sub(seen) > 3 * SECOND;
        self.fin[direction] == [true; 2] || (self.reset[direction] && is_silent)
    }

    /// Has nothing come in a direction for two minutes (RFC 4787 REQ-5)?
    pub fn is_silent(&self, direction: usize, now: u64) -> bool {
        now.saturating_sub(self.seen[direction]) > 120 * SECOND
    }

    /// Is it silent for so long that others may have its place? Who has made it himself, and was not answered, may soon.
    /// So may somebody else have that of a connection whose opener, elsewhere, has not acknowledged (RFC 4987 section 2: his address may
    /// be anybody's).
    pub fn is_forgotten(&self, cluster: &Cluster, asker: IpAddr) -> bool {
        let now = cluster.now();
        if self.is_tcp() && self.is_proven {
            // It is open, though there is no room for its rows.
            let is_silent = now - self.seen[THERE].max(self.seen[BACK]) > 3 * SECOND;
            let is_closed = self.fin[THERE] == [true; 2] || self.reset != [false; 2];
            return is_closed && is_silent;
        }
        let is_own = self.packets[BACK] == 0 && self.asked.from.ip() == asker;
        let is_strangers = self.is_tcp() && !self.is_of_pod(cluster);
        let patience = match (self.is_tcp(), is_own) {
            (true, _) if is_strangers => 3,
            (true, _) => 60,
            (false, true) => 2,
            (false, false) => 30,
        };
        let last = if is_strangers {
            self.seen[THERE]
        } else {
            self.seen[THERE].max(self.seen[BACK])
        };
        // Whoever breaks off in the opener's own name refuses nothing.
        let is_refused = self.reset == [false, true];
        is_refused || now.saturating_sub(last) > patience * SECOND
    }

    /// Does the packet at hand, which is counted, make two rows of one? The third packet does, or the 17th of somebody
    /// elsewhere whom nobody answers; of TCP the answer to a pod of this node, and what somebody elsewhere says who has heard it.
    pub fn is_settled(&self, cluster: &Cluster, packet: &Packet, direction: usize) -> bool {
        let is_of_pod = self.is_of_pod(cluster);
        let Some(segment) = packet.segment().filter(|_| self.is_tcp()) else {
            let packets = self.packets[THERE] + self.packets[BACK];
            return packets >= 17 || (packets >= 3 && (is_of_pod || self.packets[BACK] > 0));
        };
        let said = self.others_end[THERE];
        let beyond = u64::from(segment.acknowledges.wrapping_sub(said));
        let has_heard = beyond <= self.bytes[BACK];
        let is_elsewheres = direction == THERE && !packet.answers() && has_heard;
        said != 0 && !packet.opens_tcp() && (is_of_pod || is_elsewheres)
    }

    /// Has a pod of this node opened it?
    pub(super) fn is_of_pod(&self, cluster: &Cluster) -> bool {
        match self.hooks[THERE] {
            Hook::FROM_POD => true,
            Hook::TO_NET => cluster.pod(self.asked.from.ip()).is_some(),
            _ => false,
        }
    }

    /// What becomes of packets of a direction.
    pub fn step(&self, direction: usize) -> (Tuple, Mark, Hook) {
        let (mark, other) = (self.marks[direction], self.hooks[1 - direction]);
        (self.goes_on(direction), mark, other)
    }

    /// Does a packet of its opener begin another connection, of what has one row (RFC 9293 section 3.6.1)?
    pub fn is_begun_anew(&self, packet: &Packet, now: u64) -> bool {
        let is_closed = self.is_closed(THERE, now) || self.is_closed(BACK, now);
        packet.opens_tcp() && is_closed
    }

    /// Its opener speaks again: what is known of the answers stays, and of ends what a segment of a connection with two rows
    /// leaves, too.
    pub fn take_over(&mut self, was: &Self, packet: &Packet) {
        let segment = packet.segment();
        let (opens, resets) = (packet.opens_tcp(), segment.is_some_and(Segment::resets));
        self.packets[THERE] += was.packets[THERE];
        self.bytes[THERE] += was.bytes[THERE];
        (self.packets[BACK], self.bytes[BACK]) = (was.packets[BACK], was.bytes[BACK]);
        if was.packets[BACK] > 0 {
            self.seen[BACK] = was.seen[BACK];
        }
        // A SYN that comes again for what is open says nothing (RFC 5961 section 4); after a RST, or before there is anything
        // open, its sender has said no goodbye.
        let is_open = was.is_proven && was.reset == [false; 2];
        if !opens || is_open {
            for direction in [THERE, BACK] {
                let both = self.fin[direction].iter_mut().zip(was.fin[direction]);
                both.for_each(|(fin, was)| *fin |= was);
            }
            // Who speaks after the other's goodbye has heard it.
            self.heard = [
                was.heard[THERE] || (was.fin[THERE][BACK] && !opens),
                was.heard[BACK],
            ];
        }
        // Who speaks has not been broken off with, and who asks again was not refused for good. But of an open connection a SYN
        // alone shows nothing of that, nor when it was last heard of.
        if opens && was.is_proven {
            self.reset = was.reset;
            self.others_end[BACK] = was.others_end[BACK];
            if !is_open {
                self.seen[THERE] = was.seen[THERE];
            }
        } else {
            self.reset = [resets; 2];
        }
        self.others_end[THERE] = was.others_end[THERE];
    }

    /// May the agent's sweep remove it (docs/architecture.md; the durations are those of Linux and kube-proxy)?
    pub fn is_stale(&self, now: u64) -> bool {
        let last = self.seen[THERE].max(self.seen[BACK]);
        let is_known = self.stage == Stage::Known && self.rows[BACK] && self.packets[BACK] > 0;
        // An open connection without room.
        let is_proven = self.stage == Stage::Asked && self.is_tcp() && self.is_proven;
        let is_answered = is_known || is_proven;
        let seconds = match (self.is_tcp(), is_answered) {
            (true, _) if self.reset[THERE] || self.fin[THERE] == [true; 2] => 30,
            (true, false) => 60,
            (true, true) if self.fin[THERE] != [false; 2] => {
                if self.heard == [false; 2] {
                    120
                } else {
                    3600
                }
            }
            (true, true) => 3 * 3600,
            (false, true) => 120,
            (false, false) => 30,
        };
        now.saturating_sub(last) > seconds * SECOND
    }

    /// Does its opener ask in another way now, from the same port: for a service, or its backend itself? The answers to datagrams
    /// are those to the latest question (RFC 768 has no other), and a connection keeps its own (RFC 9293 section 3.4).
    pub fn is_moved(&self, asked: Tuple) -> bool {
        !self.is_tcp() && self.asked.from == asked.from
    }

    /// Counts a packet of a direction.
    pub fn account(&mut self, direction: usize, now: u64, length: u64) {
        self.packets[direction] += 1;
        self.bytes[direction] += length;
        self.seen[direction] = now;
    }

    /// Notes what a segment says about the end of its connection; is that over? RFC 9293 section 3.6: it is when both
    /// goodbyes are acknowledged.
    pub fn end(&mut self, direction: usize, segment: Segment) -> bool {
        let other = 1 - direction;
        let (was_fin, was_reset) = (self.fin[direction], self.reset[direction]);
        let is_plain = !segment.opens() && !segment.ends() && !segment.resets();
        if segment.opens() {
            // Who asks again after a RST has not said goodbye, and neither has who answers.
            if was_reset && self.claims[direction] {
                self.fin = [[false; 2]; 2];
                (self.heard, self.acknowledged) = ([false; 2], [false; 2]);
            }
            return false;
        }
        if segment.resets() {
            self.reset = [true; 2];
        } else if was_reset {
            // What goes on talking was not ended by it.
            self.reset = [false; 2];
        }
        if segment.ends() {
            self.fin[direction][direction] = true;
            self.fin[other][direction] = true;
            self.others_end[other] = segment.end();
        } else if was_fin[direction] && is_plain {
            let beyond = segment.end().wrapping_sub(self.others_end[other]);
            if self.others_end[other] != 0 && (1..1 << 31).contains(&beyond) {
                // Nobody speaks after a goodbye: it was none.
                self.fin[direction][direction] = false;
                self.fin[other][direction] = false;
                (self.heard[other], self.acknowledged[other]) = (false, false);
                return false;
            }
        }
        if !was_fin[other] {
            return false;
        }
        self.heard[direction] = true;
        if segment.acknowledges != self.others_end[direction] {
            return false;
        }
        self.acknowledged[direction] = true;
        // Of what a process of the node has in its host network the rows are left to the sweep: whoever repeats a goodbye is
        // answered by the node port, too.
        was_fin[direction] && is_plain && self.acknowledged[other] && !self.is_of_hostnet()
    }

    /// Compares with the rows of the datapath. Whose own row was lost may find another one's at its place.
    ///
    /// # Errors
    /// What differs.
    pub fn compare(&self, memory: &Memory, is_others: [bool; 2]) -> Result<(), String> {
        let keys = [THERE, BACK].map(|it| self.arrives(it).row(self.hooks[it]));
        if self.stage == Stage::Asked {
            let plans = memory.plans.borrow();
            let plan = plans.get(&keys[BACK]).ok_or("no plan is there")?;
            if plan.key != keys[THERE] {
                return Err("the plan is another one's".to_owned());
            }
            self.compare_row(THERE, &plan.way)?;
            return self.compare_row(BACK, &plan.back);
        }
        let ways = memory.ways.borrow();
        for direction in [THERE, BACK] {
            match (ways.get(&keys[direction]), self.rows[direction]) {
                (Some(way), true) => self.compare_row(direction, way)?,
                (None, false) => {}
                (Some(_), false) if is_others[direction] => {}
                (row, _) => {
                    let is = if row.is_some() { "there" } else { "away" };
                    return Err(format!("the row of direction {direction} is {is}"));
                }
            }
        }
        Ok(())
    }

    fn compare_row(&self, direction: usize, way: &Way) -> Result<(), String> {
        let load = |cell: &weir_common::shared::AtomicU64| cell.load(Relaxed);
        let state = way.state.load(Relaxed);
        let has = |bit| state & bit != 0;
        let other = 1 - direction;
        let rules = [&way.egress_rule, &way.ingress_rule].map(|rule| rule.load(Relaxed));
        let facts = [
            ("packets", load(&way.packets), self.packets[direction]),
            ("bytes", load(&way.bytes), self.bytes[direction]),
            ("seen", load(&way.seen), self.seen[direction]),
            (
                "egress rule",
                rules[0].into(),
                self.rules[direction][0].into(),
            ),
            (
                "ingress rule",
                rules[1].into(),
                self.rules[direction][1].into(),
            ),
        ];
        let is_leaving = self.hooks[direction] == Hook::TO_NET;
        let device = way.device.load(Relaxed);
        if is_leaving && device != self.uplink {
            return Err(format!("uplink {device} instead of {}", self.uplink));
        }
        for (what, is, should) in facts {
            if is != should {
                return Err(format!(
                    "{what} of direction {direction}: {is} instead of {should}"
                ));
            }
        }
        let (backend, incarnation) = self
            .backend
            .filter(|_| direction == THERE)
            .map_or((0, 0), |(index, incarnation)| {
                (index as u32 + 1, incarnation)
            });
        let facts = [
            ("opener", has(WayState::OPENER), self.claims[direction]),
            ("masquerade", has(WayState::MASQUERADE), self.is_masqueraded),
            (
                "goodbye",
                has(WayState::FIN),
                self.fin[direction][direction],
            ),
            (
                "the other's goodbye",
                has(WayState::OTHER_FIN),
                self.fin[direction][other],
            ),
            (
                "acknowledged",
                has(WayState::FIN_ACKNOWLEDGED),
                self.acknowledged[direction],
            ),
            ("heard", has(WayState::FIN_HEARD), self.heard[direction]),
            ("reset", has(WayState::RESET), self.reset[direction]),
            (
                "backend",
                (way.backend, way.generation.0 / 4) == (backend, incarnation),
                true,
            ),
        ];
        for (what, is, should) in facts {
            if is != should {
                return Err(format!("{what} of direction {direction}: {is}"));
            }
        }
        Ok(())
    }
}
