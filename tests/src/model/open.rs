//! Packets that belong to nothing that is known: who may open a conversation, to which backend it goes, and which port of
//! the node stands for its opener.

use std::net::SocketAddr;

use weir_common::DropReason;
use weir_common::event::Hook;
use weir_common::way::Mark;
use weir_datapath::Verdict;

use super::cluster::{Cluster, From, Health};
use super::conversation::{BACK, Conversation, SECOND, Stage, THERE};
use super::oracle::{Arrival, Drawn, Fate, Oracle, Place, Seen, Why, goes};
use super::wire::{Packet, Segment, Tuple};

/// How many backends are tried before there counts as being none.
const BACKEND_TRIES: usize = 3;

impl Oracle {
    pub(super) fn open(
        &mut self,
        cluster: &Cluster,
        at: &Arrival,
        seen: &Seen,
        untouched: Fate,
    ) -> Result<Fate, String> {
        let tuple = at.packet.tuple;
        let answers = at.packet.answers();
        let resets = at.packet.segment().is_some_and(Segment::resets);
        let drawn = self.drawn(at);
        let no_flow = Ok(Fate::Drop(DropReason::NoFlow));
        match at.hook {
            Hook::FROM_POD => {
                let service = cluster.service(From::Pod, tuple.talk, tuple.to);
                if let Some(service) = service.filter(|_| !answers) {
                    return self.choose(cluster, at, seen, From::Pod, service);
                }
                // What a pod and its own node say to each other is always allowed.
                if cluster.is_own(tuple.to.ip()) {
                    return Ok(match untouched {
                        Fate::Goes { packet, .. } => Fate::Goes {
                            packet,
                            mark: Mark::PASSED,
                            device: 0,
                        },
                        Fate::Drop(reason) => Fate::Drop(reason),
                    });
                }
                if answers {
                    return no_flow;
                }
                // Nobody has the address of a service.
                if cluster.is_service(tuple.to.ip()) {
                    return Ok(Fate::Drop(DropReason::NoService));
                }
                Ok(self.direct(cluster, at))
            }
            Hook::TO_POD => {
                if at.received_by == 0 {
                    return Ok(untouched);
                }
                // A pod of this node sends from its own device, and what bears the mark of one is from one, or from the node.
                let is_so = match cluster.pod(tuple.from.ip()) {
                    Some((_, device)) => device == Some(at.received_by),
                    None => !at.mark.is_of_pod() || cluster.is_own(tuple.from.ip()),
                };
                if !is_so {
                    return Ok(Fate::Drop(DropReason::SpoofedAddress));
                }
                // A RST may be of an opener that wants no more of what was answered.
                let key = (at.hook, tuple);
                let mut asked = self.conversations.iter();
                let is_own = asked.any(|it| it.stage == Stage::Asked && it.key() == key);
                if answers && !(resets && is_own) {
                    return no_flow;
                }
                Ok(self.direct(cluster, at))
            }
            Hook::FROM_NET => match cluster.service(From::Outside, tuple.talk, tuple.to) {
                None => {
                    // Who asks a process of the node itself is answered by it, and not as he was when he asked a node port.
                    let index = self.conversations.iter().position(|it| {
                        it.stage == Stage::Asked
                            && it.is_of_hostnet()
                            && !it.is_proven
                            && (it.others_end[THERE] == 0
                                || cluster.now() - it.seen[THERE] > 3 * SECOND)
                            && it.arrives(BACK) == tuple.back()
                    });
                    if at.packet.opens_tcp()
                        && let Some(index) = index
                    {
                        self.remove(index, Why::AskedOtherwise);
                    }
                    Ok(untouched)
                }
                Some(_) if answers && !(resets && drawn.is_some()) => no_flow,
                Some(service) => self.choose(cluster, at, seen, From::Outside, service),
            },
            _ => {
                let Some(address) = cluster.address(at.ifindex) else {
                    return Ok(match at.mark {
                        Mark::LEAVING | Mark::TRANSLATED => Fate::Drop(DropReason::NotTranslatable),
                        Mark::REPLY => Fate::Drop(DropReason::NoFlow),
                        _ => untouched,
                    });
                };
                if tuple.from.ip() == address {
                    return Ok(untouched);
                }
                let is_drawn = drawn.is_some_and(|(_, goes)| goes.from.ip() == address);
                if at.mark == Mark::REPLY || (answers && !(resets && is_drawn)) {
                    return no_flow;
                }
                self.masquerade(cluster, at, seen)
            }
        }
    }

    /// What was drawn for the connection that a segment goes on with.
    fn drawn(&self, at: &Arrival) -> Option<Drawn> {
        let goes_on = at.packet.segment().is_some() && !at.packet.opens_tcp();
        let found = self.drawn.get(&(at.hook, at.packet.tuple));
        found.copied().filter(|_| goes_on)
    }

    /// A conversation with whom the packet names.
    fn direct(&mut self, cluster: &Cluster, at: &Arrival) -> Fate {
        self.fallen.borrow_mut().clear();
        match self.plan_at_pod(cluster, at, at.packet.tuple) {
            Ok((_, Place::Taken)) => {
                self.fall();
                Fate::Drop(DropReason::NatCollision)
            }
            Ok((_, Place::Full)) => Fate::Drop(DropReason::TableFull),
            Ok((planned, place)) => self.commit(cluster, at, planned, place),
            Err(reason) => Fate::Drop(reason),
        }
    }

    /// A conversation at a pod's device, judged by where it goes.
    fn plan_at_pod(
        &self,
        cluster: &Cluster,
        at: &Arrival,
        goes: Tuple,
    ) -> Result<(Conversation, Place), DropReason> {
        let is_local = cluster.pod(goes.to.ip()).is_some();
        let other = if at.hook == Hook::FROM_POD && !is_local {
            Hook::TO_POD
        } else {
            Hook::FROM_POD
        };
        let mut planned = Conversation::new(cluster, [at.hook, other], at.packet, goes, at.length);
        planned.rules = [planned.allowed(cluster, goes)?; 2];
        if at.hook == Hook::FROM_POD {
            // Whoever is outside of the cluster does not see pods' addresses.
            if !is_local && cluster.is_masquerading() && !cluster.is_in_cluster(goes.to.ip()) {
                planned.marks[THERE] = Mark::LEAVING;
            }
        } else if at.mark == Mark::TRANSLATED {
            planned.marks[BACK] = Mark::REPLY;
        }
        let place = self.place(cluster, at, planned.asked, (other, goes.back()));
        Ok((planned, place))
    }

    /// A conversation with a backend of a service. Who has been seen to begin the search at one backend begins there
    /// always, as long as the service has as many; with session affinity a client begins with the one that it had.
    fn choose(
        &mut self,
        cluster: &Cluster,
        at: &Arrival,
        seen: &Seen,
        from: From,
        service: usize,
    ) -> Result<Fate, String> {
        let asked = at.packet.tuple;
        // A segment goes on to whom the SYN went, as long as that one is there.
        if let Some((Some((index, which)), _)) = self.drawn(at) {
            let backend = cluster.backends[index];
            if backend.incarnation != which || backend.health == Health::Gone {
                return Ok(Fate::Drop(DropReason::BackendGone));
            }
            self.fallen.borrow_mut().clear();
            let outcome = self.with(cluster, at, from, index);
            return Ok(self.take(cluster, at, None, outcome));
        }
        let run = &cluster.services[service].run;
        if run.is_empty() {
            return Ok(Fate::Drop(DropReason::NoBackend));
        }
        let client = (asked.from.ip(), service, asked.talk);
        let affinity = u64::from(cluster.services[service].affinity) * SECOND;
        let stuck = self.sticky.get(&client).and_then(|(index, which, used)| {
            let backend = cluster.backends[*index];
            let counts = cluster.now() - used <= affinity
                && backend.health == Health::Usable
                && backend.incarnation == *which;
            run.iter().position(|other| counts && other == index)
        });
        let key = (from, asked, run.len());
        let starts = match stuck {
            Some(start) => vec![start],
            None => match self.backends.get(&key) {
                Some(starts) => starts.clone(),
                None => (0..run.len()).collect(),
            },
        };
        let mut outcomes = Vec::new();
        for start in starts {
            self.fallen.borrow_mut().clear();
            let outcome = self.backend_from(cluster, at, from, run, start);
            // Two searches may find the same, and only one of them meets a plan on its way.
            let mut fallen = self.fallen.take().into_iter();
            let is_fallen = fallen.all(|index| self.is_fallen(cluster, index));
            let agrees = is_fallen
                && match (&outcome, seen.verdict) {
                    (Err(reason), Verdict::Drop(seen) | Verdict::Refuse(seen)) => *reason == seen,
                    (Err(_), _) | (_, Verdict::Drop(_) | Verdict::Refuse(_)) => false,
                    (Ok((planned, _)), _) => planned.goes == seen.packet.tuple,
                };
            outcomes.push((start, outcome, agrees));
        }
        let agreeing: Vec<usize> = outcomes.iter().filter(|it| it.2).map(|it| it.0).collect();
        let Some(found) = outcomes.iter().position(|it| it.2) else {
            let possible: Vec<_> = outcomes
                .iter()
                .map(|(start, it, _)| (start, it.as_ref().map(|(planned, _)| planned.goes.to)))
                .collect();
            return Err(format!("of a service: none of {possible:?}"));
        };
        if stuck.is_none() {
            self.backends.insert(key, agreeing);
        }
        self.fallen.borrow_mut().clear();
        let outcome = self.backend_from(cluster, at, from, run, outcomes[found].0);
        Ok(self.take(cluster, at, Some(service), outcome))
    }

    /// What was found is taken; by what opens, for a service, which may remember it.
    fn take(
        &mut self,
        cluster: &Cluster,
        at: &Arrival,
        opens: Option<usize>,
        outcome: Result<(Conversation, Place), DropReason>,
    ) -> Fate {
        let asked = at.packet.tuple;
        match outcome {
            Err(reason) => {
                self.fall();
                Fate::Drop(reason)
            }
            Ok((planned, place)) => {
                if let Some(service) = opens
                    && cluster.services[service].affinity != 0
                    && let Some((index, which)) = planned.backend
                {
                    let client = (asked.from.ip(), service, asked.talk);
                    self.sticky.insert(client, (index, which, cluster.now()));
                }
                self.commit(cluster, at, planned, place)
            }
        }
    }

    /// Was the plan of a conversation taken out?
    fn is_fallen(&self, cluster: &Cluster, index: usize) -> bool {
        let it = &self.conversations[index];
        let answer = it.arrives(BACK).row(it.hooks[BACK]);
        let plans = cluster.memory.plans.borrow();
        let plan = plans.get(&answer);
        plan.is_none_or(|plan| plan.key != it.asked.row(it.hooks[THERE]))
    }

    /// Those whose plans were taken out during a search that found nothing.
    fn fall(&mut self) {
        let mut fallen = self.fallen.take();
        fallen.sort_unstable();
        fallen.dedup();
        for index in fallen.into_iter().rev() {
            self.remove(index, Why::Stranger);
        }
    }

    /// The backend that a search finds which begins at one.
    fn backend_from(
        &self,
        cluster: &Cluster,
        at: &Arrival,
        from: From,
        run: &[usize],
        start: usize,
    ) -> Result<(Conversation, Place), DropReason> {
        let asked = at.packet.tuple;
        let mut next = start;
        for _ in 0..BACKEND_TRIES {
            let around = (0..run.len()).map(|step| (next + step) % run.len());
            let usable = |place: &usize| cluster.backends[run[*place]].health == Health::Usable;
            let place = around.into_iter().find(usable);
            let place = place.ok_or(DropReason::NoBackend)?;
            next = (place + 1) % run.len();
            let index = run[place];
            let is_hairpin = cluster.backends[index].at.ip() == asked.from.ip();
            if is_hairpin && from != From::Pod {
                continue;
            }
            match self.with(cluster, at, from, index) {
                Err(DropReason::NatCollision) => {}
                outcome => return outcome,
            }
        }
        Err(DropReason::NatCollision)
    }

    /// With one backend.
    fn with(
        &self,
        cluster: &Cluster,
        at: &Arrival,
        from: From,
        index: usize,
    ) -> Result<(Conversation, Place), DropReason> {
        let asked = at.packet.tuple;
        let backend = cluster.backends[index];
        let mut client = asked.from;
        if backend.at.ip() == asked.from.ip() {
            client.set_ip(asked.to.ip());
        }
        let goes = Tuple::new(asked.talk, client, backend.at);
        let (mut planned, found) = if from == From::Pod {
            self.plan_at_pod(cluster, at, goes)?
        } else {
            let hooks = [Hook::FROM_NET, Hook::TO_NET];
            let mut planned = Conversation::new(cluster, hooks, at.packet, goes, at.length);
            // The node's own processes, too, which mark nothing that they send.
            let is_nodes = cluster.is_own(backend.at.ip());
            let mark = [Mark::TRANSLATED, Mark::NONE][usize::from(is_nodes)];
            planned.marks = [mark, Mark::NONE];
            let answer = (Hook::TO_NET, goes.back());
            (planned, self.place(cluster, at, asked, answer))
        };
        match found {
            Place::Full => Err(DropReason::TableFull),
            Place::Taken => Err(DropReason::NatCollision),
            _ => {
                planned.backend = Some((index, backend.incarnation));
                Ok((planned, found))
            }
        }
    }

    /// A conversation that leaves with the node's address.
    fn masquerade(&mut self, cluster: &Cluster, at: &Arrival, seen: &Seen) -> Result<Fate, String> {
        let asked = at.packet.tuple;
        let config = cluster.memory.config;
        let many = config.last_port - config.first_port + 1;
        let address = cluster.address(at.ifindex).ok_or("no uplink")?;
        let goes = |number: u16| {
            let end = SocketAddr::new(address, config.first_port + number);
            Tuple::new(asked.talk, end, asked.to)
        };
        let places: Vec<Place> = (0..many)
            .map(|number| {
                let answer = (Hook::FROM_NET, goes(number).back());
                self.place(cluster, at, asked, answer)
            })
            .collect();
        // Of a port of the node nobody has a row but who it stands for.
        self.fallen.borrow_mut().clear();
        let drawn = self.drawn(at).map(|(_, goes)| goes.from);
        let drawn = drawn.filter(|end| end.ip() == address);
        let drawn = drawn.map(|end| end.port().wrapping_sub(config.first_port));
        let is_pods = cluster.pod(asked.from.ip()).is_some();
        let end = (asked.talk, asked.from);
        let number = match seen.verdict {
            _ if drawn.is_some() => drawn.unwrap_or_default(),
            Verdict::Drop(DropReason::NoNatPort) => {
                self.ports.none(end, is_pods, &places)?;
                return Ok(Fate::Drop(DropReason::NoNatPort));
            }
            Verdict::Drop(DropReason::TableFull) => {
                self.ports.full(end, &places)?;
                return Ok(Fate::Drop(DropReason::TableFull));
            }
            _ => seen
                .packet
                .tuple
                .from
                .port()
                .wrapping_sub(config.first_port),
        };
        match places[usize::from(number)] {
            _ if drawn.is_none() => self.ports.choose(end, is_pods, &places, number)?,
            Place::Taken => return Ok(Fate::Drop(DropReason::NoNatPort)),
            Place::Full => return Ok(Fate::Drop(DropReason::TableFull)),
            _ => {}
        }
        let goes = goes(number);
        let place = places[usize::from(number)];
        let hooks = [Hook::TO_NET, Hook::FROM_NET];
        let mut planned = Conversation::new(cluster, hooks, at.packet, goes, at.length);
        planned.is_masqueraded = true;
        planned.uplink = at.ifindex;
        // Conversations that came in translated keep their word.
        planned.marks[THERE] = at.mark;
        let is_translated = at.mark == Mark::TRANSLATED;
        planned.marks[BACK] = [Mark::NONE, Mark::REPLY][usize::from(is_translated)];
        if matches!(place, Place::Free | Place::Left(_)) {
            self.counts.ports += 1;
        }
        Ok(self.commit(cluster, at, planned, place))
    }

    /// The conversation takes its place, and its packet goes on.
    fn commit(
        &mut self,
        cluster: &Cluster,
        at: &Arrival,
        planned: Conversation,
        place: Place,
    ) -> Fate {
        let fate = goes(cluster, at, &planned, THERE);
        if planned.asked != planned.goes {
            self.counts.rewrote(planned.is_masqueraded);
        }
        let asked = (at.hook, planned.asked);
        self.touched = Some(asked);
        let fallen = self.fallen.take();
        let fallen: Vec<_> = fallen
            .into_iter()
            .map(|index| self.conversations[index].key())
            .filter(|key| *key != asked)
            .collect();
        let mut keeps = None;
        let index = match place {
            Place::Own(mut index, before) => {
                if let Some(before) = before {
                    let why = self.why_left(before, asked.1);
                    self.lose(before, why);
                    index -= usize::from(before < index);
                }
                self.ask_again(cluster, at, planned, index);
                index
            }
            Place::Torn(torn, direction, plan) => {
                let most = cluster.memory.most.unwrap_or(usize::MAX);
                if self.ways() < most {
                    self.counts.lost += 1;
                    self.mend(cluster, planned, torn, direction, plan, at.packet)
                } else {
                    // Without room there is a plan as well.
                    self.lacks_room();
                    keeps = Some(self.conversations[torn].key());
                    match plan {
                        Some(plan) if self.conversations[plan].key() == asked => {
                            self.ask_again(cluster, at, planned, plan);
                            plan
                        }
                        _ => {
                            self.conversations.push(planned);
                            if let Some(plan) = plan {
                                self.remove(plan, Why::Replaced);
                            }
                            self.conversations.len() - 1
                        }
                    }
                }
            }
            Place::Free | Place::Left(_) | Place::Taken | Place::Full => {
                self.counts.opened += 1;
                self.conversations.push(planned);
                if let Place::Left(left) = place {
                    let mut left: Vec<usize> = left.into_iter().flatten().collect();
                    left.sort_unstable();
                    for index in left.into_iter().rev() {
                        let why = self.why_left(index, asked.1);
                        self.lose(index, why);
                    }
                }
                self.conversations.len() - 1
            }
        };
        if keeps.is_none() {
            self.supersede(cluster, asked, index);
        }
        for key in fallen {
            let found = self.conversations.iter();
            if let Some(index) = found.clone().position(|it| it.key() == key) {
                self.remove(index, Why::Stranger);
            }
        }
        fate
    }

    /// The opener of a conversation that has one row speaks again.
    fn ask_again(
        &mut self,
        cluster: &Cluster,
        at: &Arrival,
        mut planned: Conversation,
        index: usize,
    ) {
        let was = &self.conversations[index];
        let is_same = was.step(THERE) == planned.step(THERE)
            && was.step(BACK) == planned.step(BACK)
            && was.backend == planned.backend;
        let is_begun = at.packet.opens_tcp() && !is_same;
        if is_begun || was.is_begun_anew(at.packet, cluster.now()) {
            self.conversations[index] = planned;
            return;
        }
        planned.take_over(was, at.packet);
        let seen = was.seen[BACK];
        planned.is_proven = is_same && was.is_proven;
        self.conversations[index] = planned;
        if self.conversations[index].is_settled(cluster, at.packet, THERE) {
            self.settle(cluster, index);
        }
        let it = &mut self.conversations[index];
        if it.stage == Stage::Asked && is_same {
            it.seen[BACK] = seen;
        }
    }

    /// A row that was lost is made again. Where is the conversation then?
    fn mend(
        &mut self,
        cluster: &Cluster,
        mut planned: Conversation,
        index: usize,
        direction: usize,
        plan: Option<usize>,
        packet: &Packet,
    ) -> usize {
        if let Some(plan) = plan
            && self.conversations[plan].key() == planned.key()
            && !self.conversations[plan].is_begun_anew(packet, cluster.now())
        {
            planned.take_over(&self.conversations[plan], packet);
        }
        let it = &mut self.conversations[index];
        it.rows[direction] = true;
        it.claims[direction] = true;
        it.packets[direction] = planned.packets[THERE];
        it.bytes[direction] = planned.bytes[THERE];
        it.seen[direction] = cluster.now();
        it.epoch[direction] = cluster.epoch();
        it.rules[direction] = planned.rules[THERE];
        it.marks[direction] = planned.marks[THERE];
        if direction == THERE {
            it.backend = planned.backend;
            if it.is_masqueraded {
                it.uplink = planned.uplink;
            }
        }
        let Some(plan) = plan else {
            return index;
        };
        self.remove(plan, Why::Replaced);
        index - usize::from(plan < index)
    }

    /// What the same opener asked before, and was sent elsewhere for, is pushed out at once: it would be anyway, longest
    /// unused.
    fn supersede(&mut self, cluster: &Cluster, asked: (Hook, Tuple), by: usize) {
        for index in (0..self.conversations.len()).rev() {
            let it = &self.conversations[index];
            if index == by || (it.hooks[THERE], it.asked) != asked {
                continue;
            }
            let key = it.arrives(BACK).row(it.hooks[BACK]);
            if it.stage == Stage::Asked {
                cluster.memory.plans.borrow_mut().remove(&key);
            } else if it.rows[BACK] {
                cluster.memory.ways.borrow_mut().remove(&key);
            }
            self.remove(index, Why::Superseded);
            if index < by {
                return self.supersede(cluster, asked, by - 1);
            }
        }
    }

    /// Ends and clients are spread: what is drawn for each is not the same for all.
    ///
    /// # Errors
    /// It is.
    pub fn are_spread(&self) -> Result<(), String> {
        let few = self.backends.iter().filter(|(key, _)| key.2 > 2);
        let few = few.filter(|(_, starts)| starts.len() == 1);
        let backends: Vec<usize> = few.map(|(_, starts)| starts[0]).collect();
        // Of as many it is less than once in a million that all are the same by chance, with three to choose from.
        if backends.len() > 14 && backends.windows(2).all(|two| two[0] == two[1]) {
            return Err(format!("all begin at one backend: {backends:?}"));
        }
        self.ports.are_spread()
    }
}
