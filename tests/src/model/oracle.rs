//! What must become of a packet: the model's own conversations, in a list, and what the texts say about each packet of
//! one. A choice (a backend, a port of the node) is learned from the packet that was translated first; what it says
//! about where the search began is kept, and every later choice has to agree with it.

use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, SocketAddr};

use weir_common::DropReason;
use weir_common::event::Hook;
use weir_common::way::Mark;
use weir_datapath::Verdict;

use super::cluster::{Cluster, From, Health};
use super::conversation::{BACK, Conversation, Stage, THERE};
use super::ports::Ports;
use super::wire::{Packet, Says, Segment, Talk, Tuple};

/// Why a conversation, or a row of it, is no longer there. What is sent of it afterwards is taken for its sender's own, and
/// its receiver may see an address that it never spoke to; [`super`] says what is promised of each.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum Why {
    /// A table that may push rows out did.
    PushedOut,
    /// The agent has swept it.
    Swept,
    /// Both sides' goodbyes are acknowledged.
    Finished,
    /// Policy denies it.
    Denied,
    /// Its backend takes nothing new, or is gone.
    Moved,
    /// It would be sent elsewhere if it began now: a service has come, or gone.
    Misled,
    /// The node has another address there.
    Renumbered,
    /// It was closed or silent, and somebody else has its ports.
    Replaced,
    /// Its opener asks in another way, from the same port, and is answered for that.
    AskedOtherwise,
    /// Its opener's next packet went elsewhere.
    Superseded,
    /// There is no room for both of its rows.
    NoRoom,
    /// Another one has a row at the place of one of its own.
    Stranger,
    /// A process of the node has said something other than SYN|ACK first: it speaks to somebody of its own.
    Unsaid,
}

/// A packet before a program.
#[derive(Clone, Copy, Debug)]
pub struct Arrival<'a> {
    pub hook: Hook,
    pub ifindex: u32,
    /// The device by which the node has received it, 0 for what it has made itself.
    pub received_by: u32,
    pub mark: Mark,
    pub packet: &'a Packet,
    /// The Ethernet address is the pod's.
    pub is_right_mac: bool,
    /// Of the IP packet.
    pub length: u64,
}

/// What became of it.
#[derive(Clone, Copy, Debug)]
pub struct Seen<'a> {
    pub verdict: Verdict,
    pub mark: Mark,
    pub packet: &'a Packet,
}

/// What must become of it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Fate {
    Drop(DropReason),
    Goes {
        packet: Packet,
        mark: Mark,
        /// Of the pod that it is handed to, 0 for the kernel's stack.
        device: u32,
    },
}

/// How often things must have happened.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Counts {
    pub opened: u64,
    pub answered: u64,
    pub ports: u64,
    pub delivered: u64,
    pub translated: u64,
    pub masqueraded: u64,
    /// Rows made again.
    pub lost: u64,
}

/// Whose is the place that an answer would have?
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Place {
    Free,
    /// Of one that is forgotten, of one that is over, or of both.
    Left([Option<usize>; 2]),
    /// Its own, which nobody has answered yet; and whose it was before, if there is still a row.
    Own(usize, Option<usize>),
    /// Its own, of which the row of a direction was lost; and a plan that is there as well.
    Torn(usize, usize, Option<usize>),
    Taken,
    /// There is no room for it.
    Full,
}

/// A backend, by its index and incarnation, and where the connection goes.
pub(super) type Drawn = (Option<(usize, u32)>, Tuple);

#[derive(Debug, Default)]
pub struct Oracle {
    pub conversations: Vec<Conversation>,
    pub counts: Counts,
    /// How often something was lost.
    pub lost: BTreeMap<Why, u64>,
    /// Why something is gone, by the client that it was about.
    pub gone: HashMap<SocketAddr, Why>,
    /// Where the search for a backend may begin, by who asks, for what, and how many there are.
    pub(super) backends: HashMap<(From, Tuple, usize), Vec<usize>>,
    pub(super) ports: Ports,
    /// Session affinity: backend, incarnation, and when it was used.
    pub(super) sticky: HashMap<(IpAddr, usize, Talk), (usize, u32, u64)>,
    /// What was drawn for a connection that was answered, by its opener's key: backend, and where it goes.
    pub(super) drawn: HashMap<(Hook, Tuple), Drawn>,
    /// Whose plans the datapath took out while it searched.
    pub(super) fallen: RefCell<Vec<usize>>,
    /// Must the policy be asked about the packet at hand, if that is certain?
    pub judged: Option<bool>,
    /// The conversation at hand, as it was asked.
    pub touched: Option<(Hook, Tuple)>,
}

pub(super) fn is_at_pod(hook: Hook) -> bool {
    matches!(hook, Hook::FROM_POD | Hook::TO_POD)
}

impl Oracle {
    /// Learns what has become of a packet.
    ///
    /// # Errors
    /// Why it is wrong.
    pub fn watch(&mut self, cluster: &Cluster, at: &Arrival, seen: &Seen) -> Result<(), String> {
        self.judged = None;
        self.touched = None;
        let fate = self.fate(cluster, at, seen)?;
        let became = match seen.verdict {
            Verdict::Drop(reason) | Verdict::Refuse(reason) => Fate::Drop(reason),
            Verdict::Redirect(device) => Fate::Goes {
                packet: seen.packet.clone(),
                mark: at.mark,
                device,
            },
            Verdict::Pass => Fate::Goes {
                packet: seen.packet.clone(),
                mark: seen.mark,
                device: 0,
            },
        };
        if let Fate::Goes { device: 1.., .. } = fate {
            self.counts.delivered += 1;
        }
        self.part(cluster);
        let is_refused = matches!(seen.verdict, Verdict::Refuse(_));
        if let Fate::Drop(reason) = fate
            && is_refused != is_told(at, reason)
        {
            return Err(format!("it became {:?}", seen.verdict));
        }
        if fate == became {
            return Ok(());
        }
        Err(format!("it became {became:?}\n instead of {fate:?}"))
    }

    /// Named exception STRANGER: of a connection whose place is another one's in one direction only, what remains is
    /// taken out, since what ends one of them would end half of the other.
    fn part(&mut self, cluster: &Cluster) {
        for index in (0..self.conversations.len()).rev() {
            let it = &self.conversations[index];
            if it.stage == Stage::Asked || !it.is_tcp() || it.rows == [true; 2] {
                continue;
            }
            for direction in [THERE, BACK] {
                if it.rows[direction] {
                    let key = it.arrives(direction).row(it.hooks[direction]);
                    cluster.memory.ways.borrow_mut().remove(&key);
                }
            }
            self.remove(index, Why::Stranger);
        }
    }

    fn fate(&mut self, cluster: &Cluster, at: &Arrival, seen: &Seen) -> Result<Fate, String> {
        let Arrival { hook, packet, .. } = *at;
        let untouched = Fate::Goes {
            packet: packet.clone(),
            mark: at.mark,
            device: 0,
        };
        // What has passed a program of ours at this very device is not looked at again.
        if hook == Hook::FROM_POD && at.mark == Mark::PASSED {
            return Ok(untouched);
        }
        if let Some(reason) = impostor(cluster, at) {
            return Ok(Fate::Drop(reason));
        }
        let is_ours = matches!(at.mark, Mark::LEAVING | Mark::REPLY | Mark::TRANSLATED);
        // What the node's own processes send is theirs, unless it answers what a service has led to them.
        let is_nodes = at.received_by == 0 && at.mark == Mark::NONE;
        if hook == Hook::TO_NET && !is_ours && !is_nodes {
            return Ok(untouched);
        }
        if let Says::Error(about) = &packet.says {
            return Ok(self.error(cluster, at, about).unwrap_or(untouched));
        }
        if let Some((index, direction)) = self.known(hook, &packet.tuple)
            && let Some(fate) = self.go_on(cluster, at, index, direction)
        {
            return Ok(fate);
        }
        if hook == Hook::FROM_NET && cluster.pod(packet.tuple.to.ip()).is_some() {
            return Ok(untouched);
        }
        let asked = self.conversations.iter().position(|it| {
            // Who opens something to the node answers nobody.
            let opens = hook == Hook::FROM_NET && packet.opens_tcp();
            let is_it = it.hooks[BACK] == hook && it.arrives(BACK) == packet.tuple;
            it.stage == Stage::Asked && is_it && !opens
        });
        if let Some(index) = asked
            && hook == Hook::TO_NET
            && is_nodes
            && let it = &self.conversations[index]
            && it.is_tcp()
            && !packet.segment().is_some_and(|segment| {
                if packet.answers() {
                    // What was said first may have had data, and come again without; a RST may acknowledge nothing.
                    let end =
                        i64::from(it.others_end[BACK].wrapping_sub(segment.acknowledges) as i32);
                    end.unsigned_abs() <= it.bytes[THERE]
                        || (segment.resets() && segment.acknowledges == 0)
                } else {
                    it.others_end[THERE] != 0
                }
            })
        {
            self.miss(it.asked.from, Why::Unsaid);
            return Ok(untouched);
        }
        if let Some(index) = asked {
            return Ok(self.answer(cluster, at, index));
        }
        if hook == Hook::TO_NET && is_nodes {
            return Ok(untouched);
        }
        self.open(cluster, at, seen, untouched)
    }

    /// A client may see strange things from now on.
    pub fn miss(&mut self, client: SocketAddr, why: Why) {
        self.gone.insert(client, why);
        *self.lost.entry(why).or_default() += 1;
    }

    /// A conversation is no longer known.
    pub fn remove(&mut self, index: usize, why: Why) -> Conversation {
        let lost = self.conversations.remove(index);
        self.miss(lost.asked.from, why);
        lost
    }

    /// A conversation is no longer known: the datapath has taken it out.
    pub fn lose(&mut self, index: usize, why: Why) {
        let lost = self.remove(index, why);
        if lost.stage == Stage::Asked {
            return;
        }
        // Named exception STRANGER: both keys are taken out, whoever has them by now.
        let keys = [THERE, BACK].map(|it| (lost.hooks[it], lost.arrives(it)));
        for index in (0..self.conversations.len()).rev() {
            for direction in [THERE, BACK] {
                let it = &mut self.conversations[index];
                let key = (it.hooks[direction], it.arrives(direction));
                if it.rows[direction] && keys.contains(&key) {
                    it.rows[direction] = false;
                    let client = it.asked.from;
                    self.miss(client, why);
                }
            }
            let it = &self.conversations[index];
            if it.stage == Stage::Known && it.rows == [false; 2] {
                self.conversations.remove(index);
            }
        }
    }

    /// The conversation and direction whose row a packet finds.
    pub fn known(&self, hook: Hook, tuple: &Tuple) -> Option<(usize, usize)> {
        self.conversations.iter().enumerate().find_map(|(at, it)| {
            let found = [THERE, BACK].into_iter().find(|direction| {
                it.stage == Stage::Known
                    && it.rows[*direction]
                    && it.hooks[*direction] == hook
                    && it.arrives(*direction) == *tuple
            });
            found.map(|direction| (at, direction))
        })
    }

    /// A packet of a conversation that is known. `None` if the packet is another one's.
    fn go_on(
        &mut self,
        cluster: &Cluster,
        at: &Arrival,
        index: usize,
        direction: usize,
    ) -> Option<Fate> {
        let packet = at.packet;
        let it = &self.conversations[index];
        let (is_tcp, opens) = (it.is_tcp(), packet.opens_tcp());
        let is_established = is_tcp && !opens;
        let is_closed = it.is_closed(direction, cluster.now());
        // Established TCP goes on while its endpoint exists; what is new, and datagrams, go to one that takes them
        // (Kubernetes, EndpointSlice conditions; kube-proxy deletes UDP entries of endpoints that are gone).
        if direction == THERE
            && let Some((backend, incarnation)) = it.backend
        {
            let backend = &cluster.backends[backend];
            let serves = backend.incarnation == incarnation
                && match backend.health {
                    Health::Usable => true,
                    Health::Draining => is_tcp && !(opens && is_closed),
                    Health::Gone => false,
                };
            if !serves {
                if is_established {
                    // Its opener hears of it.
                    self.conversations[index].reset = [true; 2];
                    return Some(Fate::Drop(DropReason::BackendGone));
                }
                self.lose(index, Why::Moved);
                return None;
            }
        }
        let is_noticed = cluster.now() >> 30 != it.seen[direction] >> 30
            || it.epoch[direction] != cluster.epoch()
            || (at.hook == Hook::TO_NET && it.uplink != at.ifindex);
        let other = 1 - direction;
        // Is the row of the answers lost, or does it lead elsewhere?
        let found = self.known(it.hooks[other], &it.arrives(other));
        let is_torn = found.is_none_or(|(of, direction)| {
            let of = &self.conversations[of];
            let key = (of.hooks[1 - direction], of.arrives(1 - direction));
            key != (at.hook, packet.tuple)
        });
        let asks = match at.hook {
            Hook::FROM_POD => cluster.service(From::Pod, packet.tuple.talk, packet.tuple.to),
            _ => cluster.service(From::Outside, packet.tuple.talk, packet.tuple.to),
        };
        let has_backend = direction == THERE && it.backend.is_some();
        let is_asking = matches!(at.hook, Hook::FROM_POD | Hook::FROM_NET);
        let is_streams = !is_tcp && it.claims[direction] && is_noticed;
        let why = if is_streams && is_torn {
            self.counts.lost += 1;
            Some(Why::PushedOut)
        } else if is_streams && is_asking && asks.is_some() != has_backend {
            Some(Why::Misled)
        } else {
            (opens && is_closed).then_some(Why::Replaced)
        };
        if let Some(why) = why {
            self.lose(index, why);
            return None;
        }
        if is_at_pod(at.hook) {
            // A SYN of the other side asks for itself.
            let opens_back = opens && !it.claims[direction];
            let question = if opens_back {
                packet.tuple
            } else if it.claims[direction] {
                it.goes_on(direction)
            } else {
                it.arrives(direction).back()
            };
            self.judged = Some(opens || it.epoch[direction] != cluster.epoch());
            let allowed = if opens_back {
                cluster.allows(question.talk, question.from.ip(), question.to)
            } else {
                it.allowed(cluster, question)
            };
            match allowed {
                Ok(_) if opens_back => {}
                Ok(rules) => {
                    let it = &mut self.conversations[index];
                    if self.judged == Some(true) {
                        it.rules[direction] = rules;
                    }
                    it.epoch[direction] = cluster.epoch();
                }
                Err(reason) => {
                    // What is no connection is forgotten, so that what the other side sends asks for itself.
                    if !opens_back && !is_tcp {
                        self.lose(index, Why::Denied);
                    }
                    return Some(Fate::Drop(reason));
                }
            }
        } else {
            self.judged = Some(false);
            if at.hook == Hook::TO_NET
                && it.is_masqueraded
                && cluster.address(at.ifindex) != Some(it.goes.from.ip())
            {
                self.lose(index, Why::Renumbered);
                return None;
            }
            let it = &mut self.conversations[index];
            it.epoch[direction] = cluster.epoch();
            if at.hook == Hook::TO_NET {
                it.uplink = at.ifindex;
            }
        }
        let it = &mut self.conversations[index];
        self.touched = Some((it.hooks[THERE], it.asked));
        let seen = it.seen[direction];
        it.account(direction, cluster.now(), at.length);
        // Who asks again does not make the silence shorter after which a RST is believed.
        if opens && it.reset[direction] {
            it.seen[direction] = seen;
        }
        let fate = goes(cluster, at, it, direction);
        let (is_rewritten, is_masqueraded) = (
            it.asked.from != it.goes.from || it.asked.to != it.goes.to,
            it.is_masqueraded,
        );
        if is_rewritten {
            self.counts.rewrote(is_masqueraded);
        }
        if let Some(segment) = packet.segment()
            && it.end(direction, segment)
        {
            self.lose(index, Why::Finished);
        }
        Some(fate)
    }

    /// An answer to what has one row.
    fn answer(&mut self, cluster: &Cluster, at: &Arrival, index: usize) -> Fate {
        let it = &self.conversations[index];
        let (packet, is_tcp) = (at.packet, it.is_tcp());
        let opens = packet.opens_tcp();
        if is_at_pod(at.hook) {
            let question = if opens { packet.tuple } else { it.goes };
            self.judged = Some(opens || it.epoch[BACK] != cluster.epoch());
            let allowed = if opens {
                cluster.allows(question.talk, question.from.ip(), question.to)
            } else {
                it.allowed(cluster, question)
            };
            match allowed {
                Ok(rules) if !opens => {
                    let it = &mut self.conversations[index];
                    it.rules = [rules; 2];
                    it.epoch = [cluster.epoch(); 2];
                }
                Ok(_) => {}
                Err(reason) => {
                    if !opens && !is_tcp {
                        self.lose(index, Why::Denied);
                    }
                    return Fate::Drop(reason);
                }
            }
        }
        let it = &mut self.conversations[index];
        self.touched = Some((it.hooks[THERE], it.asked));
        let is_first = it.packets[BACK] == 0;
        if !packet.segment().is_some_and(Segment::resets) {
            it.account(BACK, cluster.now(), at.length);
        }
        let fate = goes(cluster, at, it, BACK);
        if it.asked.from != it.goes.from || it.asked.to != it.goes.to {
            self.counts.rewrote(it.is_masqueraded);
        }
        // A refusal is no answer, and neither is a SYN that crosses another.
        let segment = packet.segment();
        if segment.is_some_and(Segment::resets) {
            it.reset[BACK] = true;
            it.seen[BACK] = cluster.now();
        } else if !opens {
            it.heard[BACK] |= it.fin[BACK][THERE];
            it.reset = [false; 2];
            let is_first_word = it.others_end[THERE] == 0;
            if let Some(segment) = segment.filter(|it| it.answers() || is_first_word) {
                it.others_end[THERE] = segment.end();
            }
            if let Some(segment) = segment.filter(|segment| segment.ends()) {
                it.fin = [[it.fin[THERE][THERE], true], [it.fin[BACK][THERE], true]];
                it.others_end[THERE] = segment.end();
            }
            let is_settled = it.is_settled(cluster, packet, BACK);
            self.counts.answered += u64::from(is_first);
            if is_settled {
                self.settle(cluster, index);
            } else {
                self.keep_drawn(index);
            }
        }
        fate
    }
}

impl Counts {
    pub(super) fn rewrote(&mut self, is_masqueraded: bool) {
        if is_masqueraded {
            self.masqueraded += 1;
        } else {
            self.translated += 1;
        }
    }
}

/// Who claims to be somebody else (RFC 2827; the pod's lease).
fn impostor(cluster: &Cluster, at: &Arrival) -> Option<DropReason> {
    let tuple = &at.packet.tuple;
    let own = |ip| matches!(cluster.pod(ip), Some((_, Some(device))) if device == at.ifindex);
    match at.hook {
        Hook::FROM_POD if !own(tuple.from.ip()) => Some(DropReason::SpoofedAddress),
        Hook::FROM_POD if !at.is_right_mac => Some(DropReason::SpoofedMac),
        Hook::TO_POD if !own(tuple.to.ip()) => Some(DropReason::NotForPod),
        _ => None,
    }
}

/// Is who has sent it told that it cannot go on? Nobody answers a RST (RFC 9293 section 3.10.7.1).
fn is_told(at: &Arrival, reason: DropReason) -> bool {
    let is_about_service = matches!(
        reason,
        DropReason::NoBackend | DropReason::BackendGone | DropReason::NoService
    );
    let resets = at.packet.segment().is_some_and(Segment::resets);
    is_about_service && matches!(at.hook, Hook::FROM_POD | Hook::FROM_NET) && !resets
}

/// What becomes of a packet of a direction.
pub(super) fn goes(cluster: &Cluster, at: &Arrival, it: &Conversation, direction: usize) -> Fate {
    let (mark, device) = onward(cluster, at, it, direction);
    Fate::Goes {
        packet: Packet {
            tuple: it.goes_on(direction),
            says: at.packet.says.clone(),
        },
        mark,
        device,
    }
}

/// With which mark it goes on, and to which device.
pub(super) fn onward(
    cluster: &Cluster,
    at: &Arrival,
    it: &Conversation,
    direction: usize,
) -> (Mark, u32) {
    match at.hook {
        Hook::FROM_POD => match cluster.pod(it.goes_on(direction).to.ip()) {
            Some((_, Some(device))) => (at.mark, device),
            _ => (it.marks[direction], 0),
        },
        Hook::FROM_NET if it.marks[direction] != Mark::NONE => (it.marks[direction], 0),
        _ => (at.mark, 0),
    }
}
