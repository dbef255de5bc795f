//! The cold path: a packet whose way is not known. What is made here is data, a plan of both ways; what is done with
//! the packet is what the way says, as for every later one.

use core::sync::atomic::Ordering::Relaxed;

use weir_common::counter::Counter;
use weir_common::event::Hook;
use weir_common::policy::Class;
use weir_common::service::{Affinity, FrontendFlags, FrontendKey, NodeFlags, PortBits};
use weir_common::way::{Mark, Plan, Rewrite, Step, Way, WayState};
use weir_common::{Addr, DropReason, Port, Protocol};

use crate::answer;
use crate::fragment;
use crate::l4::Layout;
use crate::policy;
use crate::reserve::{Reserved, STRANGERS_PATIENCE};
use crate::service::{self, Asks, Candidates};
use crate::tables::Tables;
use crate::verdict::{Outcome, Scratch};
use crate::way::NO_BACKEND;
use crate::words::{hash, mixed, same};

/// How many backends are tried when the client's port is already in use towards one of them.
const BACKEND_TRIES: u32 = 3;

/// How many ports of the node are tried before there counts as being none.
const PORT_TRIES: u32 = 24;

/// Makes the plan of a conversation that a pod opens, or that is opened to one from elsewhere.
///
/// Drops for what policy denies ([`crate::policy::judge`]); [`DropReason::NoFlow`] for what only answers;
/// [`DropReason::NoBackend`], [`DropReason::NoLocalBackend`], [`DropReason::NoService`],
/// [`DropReason::NatCollision`], [`DropReason::SpoofedAddress`],
/// [`DropReason::TableFull`].
pub fn at_pod<T: Tables + ?Sized>(tables: &T, scratch: &mut Scratch) -> Outcome {
    let hook = scratch.trace.tuple.hook;
    let planned = if hook == Hook::FROM_POD {
        of_pod(tables, scratch)
    } else {
        to_pod(tables, scratch)
    };
    Outcome::of(planned.map(|()| true))
}

#[inline(always)]
fn of_pod<T: Tables + ?Sized>(tables: &T, scratch: &mut Scratch) -> Result<(), DropReason> {
    let opens = !scratch.arrival.segment.is_answer();
    if opens && tables.asks_service(scratch) != 0 {
        return choose(tables, scratch);
    }
    // What a pod and its own node say to each other is always allowed, and needs no memory.
    if tables.class(&scratch.trace.tuple.destination) == Class::OWN_NODE {
        scratch.pass(Mark::PASSED);
        fragment::remember(tables, scratch);
        return Ok(());
    }
    if !opens {
        return Err(DropReason::NoFlow);
    }
    // Nobody has a cluster IP: what no service there takes leads nowhere.
    let asked = FrontendKey::of_cluster_ip(scratch.trace.tuple.destination);
    if tables.frontend(&asked).is_some() {
        return Err(DropReason::NoService);
    }
    direct(tables, scratch)
}

#[inline(always)]
fn to_pod<T: Tables + ?Sized>(tables: &T, scratch: &mut Scratch) -> Result<(), DropReason> {
    let arrival = &scratch.arrival;
    if arrival.is_nodes() {
        scratch.pass(Mark::PASSED);
        fragment::remember(tables, scratch);
        return Ok(());
    }
    // A pod of this node sends from its own device, and what a pod has sent is from a pod of this node, or from the node in
    // whose name its own rules let it go on. What is found in a tunnel's packet bears the mark of that one.
    let key = &scratch.trace.tuple;
    let is_so = match tables.local_pod(&key.source) {
        Some(pod) => pod.ifindex == arrival.received_by,
        None if key.is_to_itself() => arrival.ifindex == arrival.received_by,
        None => !arrival.mark.is_of_pod() || tables.class(&key.source) == Class::OWN_NODE,
    };
    if !is_so {
        return Err(DropReason::SpoofedAddress);
    }
    let segment = arrival.segment;
    scratch.back.set_reversed(key, Hook::FROM_POD);
    let is_own = |plan: &Plan| plan.key.is(key);
    // A RST may be of an opener that wants no more of what was answered.
    if segment.is_answer()
        && !(segment.is_rst() && tables.plan(&scratch.back).is_some_and(|it| is_own(&it)))
    {
        return Err(DropReason::NoFlow);
    }
    direct(tables, scratch)
}

/// To where the packet says.
#[inline(always)]
fn direct<T: Tables + ?Sized>(tables: &T, scratch: &mut Scratch) -> Result<(), DropReason> {
    let epoch = tables.epoch();
    begin(tables, scratch, epoch, 0);
    match attempt(tables, scratch)? {
        Reserved::Taken => Err(DropReason::NatCollision),
        reserved => {
            go(tables, scratch, reserved);
            Ok(())
        }
    }
}

/// To a backend of a service: the one that the client had last, if the service has session affinity and it still counts,
/// else the one that the hash of the packet's ends says, or the next one towards which these ports are free.
#[inline(always)]
fn choose<T: Tables + ?Sized>(tables: &T, scratch: &mut Scratch) -> Result<(), DropReason> {
    let first = tables.first(scratch);
    let mut candidates = Candidates::from(&scratch.frontend, first);
    let is_chosen = remembers(tables, scratch);
    // Ends at its end: the verifiers of Linux 5.15 and 6.1 want a branch there.
    let mut left = BACKEND_TRIES;
    loop {
        if is_chosen {
            let Affinity {
                backend,
                generation,
                ..
            } = scratch.last;
            if !service::is_current(tables, backend, generation, Asks::ToGoOn) {
                return Err(DropReason::BackendGone);
            }
        } else if let Some((backend, generation)) = candidates.next(tables) {
            let last = &mut scratch.last;
            (last.backend, last.generation) = (backend.id, generation);
            (last.addr, last.port) = (backend.addr, backend.port);
        } else {
            // As kube-proxy does: other nodes' endpoints would serve.
            let is_silent = scratch.frontend.flags & FrontendFlags::DROP_WHEN_EMPTY != 0;
            return Err(if is_silent {
                DropReason::NoLocalBackend
            } else {
                DropReason::NoBackend
            });
        }
        let reserved = try_backend(tables, scratch)?;
        if reserved != Reserved::Taken {
            let Scratch {
                frontend,
                client,
                last,
                ..
            } = scratch;
            // Which backend a client is to have next says what opens, not what goes on.
            if !is_chosen {
                service::stick(tables, frontend, client, last);
            }
            go(tables, scratch, reserved);
            return Ok(());
        }
        left -= 1;
        if is_chosen || left == 0 {
            return Err(DropReason::NatCollision);
        }
    }
}

/// Plans the conversation at hand with the backend that was chosen.
#[inline(always)]
fn try_backend<T: Tables + ?Sized>(
    tables: &T,
    scratch: &mut Scratch,
) -> Result<Reserved, DropReason> {
    // Who is its own backend would receive a packet from itself, which its kernel refuses.
    let is_hairpin = same(&scratch.last.addr, &scratch.trace.tuple.source);
    if is_hairpin && scratch.trace.tuple.hook != Hook::FROM_POD {
        return Ok(Reserved::Taken);
    }
    // Read before judging: a change in between makes the next packet ask again.
    let epoch = tables.epoch();
    begin(tables, scratch, epoch, 0);
    let Scratch {
        plan, trace, last, ..
    } = scratch;
    let step = &mut plan.way.step;
    step.rewrite = if is_hairpin {
        Rewrite::HAIRPIN_DESTINATION
    } else {
        Rewrite::DESTINATION
    };
    (step.addr, step.port) = (last.addr, last.port);
    (plan.way.backend, plan.way.generation) = (last.backend, last.generation);
    let step = &mut plan.back.step;
    step.rewrite = plan.way.step.rewrite.back();
    (step.addr, step.port) = (trace.tuple.destination, trace.tuple.destination_port);
    if trace.tuple.hook != Hook::FROM_POD {
        return enter(tables, scratch);
    }
    attempt(tables, scratch).inspect_err(|_| {
        let Scratch { plan, trace, .. } = scratch;
        // A hairpin's other address is its own.
        if !plan.way.step.rewrite.is_hairpin() {
            trace.tuple.go(&plan.way.step);
        }
    })
}

/// Has the connection at hand been answered, and something been drawn for it? It is then in the scratch: a segment goes on to
/// whom the SYN went, whoever has come or gone since.
#[inline(always)]
fn remembers<T: Tables + ?Sized>(tables: &T, scratch: &mut Scratch) -> bool {
    let key = &scratch.trace.tuple;
    if key.protocol != Protocol::TCP || scratch.arrival.segment.is_syn() {
        return false;
    }
    let Some(choice) = tables.choice(key) else {
        return false;
    };
    scratch.last = choice;
    // The row may have become another's while it was read.
    scratch.last.used == u64::from(scratch.trace.tuple.echo())
}

/// Judges the conversation that is planned, says how its packets go on, and reserves its answers.
#[inline(always)]
fn attempt<T: Tables + ?Sized>(tables: &T, scratch: &mut Scratch) -> Result<Reserved, DropReason> {
    let Scratch {
        question,
        plan,
        trace,
        ..
    } = scratch;
    if plan.way.step.rewrite.is_hairpin() {
        question.set_to_itself(&trace.tuple);
    } else {
        *question = trace.tuple;
        question.go(&plan.way.step);
    }
    tables.judge(scratch).is_known()?;
    let Scratch {
        question,
        plan: Plan { way, back, .. },
        trace,
        judgement,
        arrival,
        ..
    } = scratch;
    for way in [&*way, &*back] {
        way.egress_rule.store(judgement.egress.0, Relaxed);
        way.ingress_rule.store(judgement.ingress.0, Relaxed);
    }
    if trace.tuple.hook == Hook::FROM_POD {
        (way.owner, back.owner) = (arrival.ifindex, arrival.ifindex);
    }
    let mut other = Hook::FROM_POD;
    if trace.tuple.hook == Hook::TO_POD {
        if arrival.mark == Mark::TRANSLATED {
            back.step.mark = Mark::REPLY;
        }
    } else if judgement.responder_device != 0 {
        way.device.store(judgement.responder_device, Relaxed);
        back.device.store(judgement.opener_device, Relaxed);
    } else {
        other = Hook::TO_POD;
        if leaves(tables, &question.destination) {
            way.step.mark = Mark::LEAVING;
        }
    }
    seal(scratch, other);
    let reserved = Reserved::of(tables.reserve(scratch))?;
    if reserved != Reserved::Taken {
        policy::tell(tables, scratch);
    }
    Ok(reserved)
}

/// Is the address one to which pods do not show their own?
#[inline(always)]
fn leaves<T: Tables + ?Sized>(tables: &T, addr: &Addr) -> bool {
    tables.masquerades() && !tables.is_in_cluster(addr)
}

/// Makes the plan of a conversation from outside, if it is for a service. What is not passes untouched.
///
/// Drops for [`DropReason::NoFlow`], [`DropReason::NoBackend`], [`DropReason::NoLocalBackend`],
/// [`DropReason::NatCollision`],
/// [`DropReason::NotTranslatable`], [`DropReason::TableFull`]. Who judges it is the pod's side.
pub fn from_net<T: Tables + ?Sized>(tables: &T, scratch: &mut Scratch) -> Outcome {
    Outcome::of(of_net(tables, scratch).map(|()| true))
}

#[inline(always)]
fn of_net<T: Tables + ?Sized>(tables: &T, scratch: &mut Scratch) -> Result<(), DropReason> {
    if tables.asks_service(scratch) == 0 {
        let key = &scratch.trace.tuple;
        // Who asks a process of the node itself is answered by it, and not as he was when he asked a node port.
        if scratch.arrival.segment.is_syn() && is_asked(tables, key.destination_port) {
            scratch.back.set_reversed(key, Hook::TO_NET);
            // But for one that may still go on.
            let is_its = |plan: &Plan| {
                let way = &plan.way;
                let is_unanswered = way.others_end.load(Relaxed) == 0;
                let age = tables.now().saturating_sub(way.seen.load(Relaxed));
                way.step.mark == Mark::NONE
                    && way.state.load(Relaxed) & WayState::PROVEN == 0
                    && (is_unanswered || age > STRANGERS_PATIENCE)
            };
            if tables.plan(&scratch.back).is_some_and(|plan| is_its(&plan)) {
                tables.remove_plan(&scratch.back);
            }
        }
        scratch.pass(Mark::NONE);
        return Ok(());
    }
    // A RST may be of an opener that wants no more of what was answered.
    let segment = scratch.arrival.segment;
    if segment.is_answer() && !(segment.is_rst() && tables.choice(&scratch.trace.tuple).is_some()) {
        return Err(DropReason::NoFlow);
    }
    choose(tables, scratch)
}

/// Was something from outside ever led to a process of the node with this port?
#[inline(always)]
pub(crate) fn is_asked<T: Tables + ?Sized>(tables: &T, port: Port) -> bool {
    let (row, bit) = PortBits::place(port);
    let row = tables.hostnet_ports(row);
    row.is_some_and(|row| row.has(bit))
}

/// Reserves the answers of the conversation that is planned, from outside.
#[inline(always)]
fn enter<T: Tables + ?Sized>(tables: &T, scratch: &mut Scratch) -> Result<Reserved, DropReason> {
    let Plan { way, back, .. } = &mut scratch.plan;
    way.step.mark = Mark::TRANSLATED;
    back.step.mark = Mark::NONE;
    // A process in the host network. What it answers has no mark: `to_net` finds it by its port.
    if let Some(node) = tables.node(&way.step.addr)
        && node.flags & NodeFlags::OWN != 0
    {
        way.step.mark = Mark::NONE;
        let (row, bit) = PortBits::place(way.step.port);
        let row = tables.hostnet_ports(row);
        let row = row.ok_or(DropReason::TableFull)?;
        if !row.has(bit) {
            row.0.fetch_or(bit, Relaxed);
        }
    }
    seal(scratch, Hook::TO_NET);
    Reserved::of(tables.reserve(scratch))
}

/// Makes the plan of what leaves the node with the node's address: a pod's conversation with somebody outside, or a
/// client's with a backend on another node.
///
/// Drops for [`DropReason::NoFlow`], [`DropReason::NotTranslatable`], [`DropReason::NoNatPort`],
/// [`DropReason::TableFull`].
pub fn to_net<T: Tables + ?Sized>(tables: &T, scratch: &mut Scratch) -> Outcome {
    Outcome::of(leave(tables, scratch).map(|()| true))
}

#[inline(always)]
fn leave<T: Tables + ?Sized>(tables: &T, scratch: &mut Scratch) -> Result<(), DropReason> {
    let arrival = scratch.arrival;
    scratch.pass(arrival.mark);
    // Without an address to leave with there is nothing to do.
    let Some(uplink) = tables.uplink(arrival.ifindex) else {
        return match arrival.mark {
            Mark::LEAVING | Mark::TRANSLATED => Err(DropReason::NotTranslatable),
            Mark::REPLY => Err(DropReason::NoFlow),
            _ => Ok(()),
        };
    };
    let node = *arrival.family().uplink(&uplink);
    let key = &scratch.trace.tuple;
    // Neither a pod nor a client has the node's address: it is translated already.
    if same(&key.source, &node) {
        return Ok(());
    }
    let mut mark = scratch.arrival.mark;
    if mark == Mark::FORMER {
        if !former_leaves(tables, scratch) {
            return Ok(());
        }
        mark = Mark::LEAVING;
    }
    let is_chosen = remembers(tables, scratch) && same(&scratch.last.addr, &node);
    let segment = scratch.arrival.segment;
    if mark == Mark::REPLY || (segment.is_answer() && !(segment.is_rst() && is_chosen)) {
        return Err(DropReason::NoFlow);
    }
    let key = &scratch.trace.tuple;
    if Layout::of(scratch.arrival.family(), key.protocol).is_none() || same(&node, &Addr::ABSENT) {
        return Err(DropReason::NotTranslatable);
    }
    let range = tables.port_range();
    let (first, last) = (u32::from(range.first), u32::from(range.last));
    let many = last.saturating_sub(first) + 1;
    // The same end keeps its port towards everybody, where it can: a lost row is found again, and peers who tell each
    // other of it (STUN) find it, too.
    scratch.question = *key;
    let words = scratch.question.words_mut();
    (words[2], words[3]) = (0, 0);
    scratch.question.destination_port = Port::ABSENT;
    let start = hash(&scratch.question);
    scratch.question.source_port = Port::ABSENT;
    let seed = hash(&scratch.question);
    let owner = tables.local_pod(&key.source).map_or(0, |pod| pod.ifindex);
    // Of each two ports next to each other a pod may have one, another pod with the odds of a coin the other: whatever
    // one takes, half of what each other may have is left.
    let has_half = owner != 0 && many > 1;
    let many = if has_half { many / 2 } else { many };
    let epoch = tables.epoch();
    begin(tables, scratch, epoch, WayState::MASQUERADE);
    let Scratch {
        plan,
        trace,
        arrival,
        ..
    } = scratch;
    plan.way.device.store(arrival.ifindex, Relaxed);
    (plan.way.owner, plan.back.owner) = (owner, owner);
    let step = &mut plan.way.step;
    step.rewrite = Rewrite::SOURCE;
    step.addr = node;
    step.mark = mark;
    let step = &mut plan.back.step;
    step.rewrite = Rewrite::DESTINATION;
    (step.addr, step.port) = (trace.tuple.source, trace.tuple.source_port);
    step.mark = if mark == Mark::TRANSLATED {
        Mark::REPLY
    } else {
        Mark::NONE
    };
    seal(scratch, Hook::FROM_NET);
    let mut found = Reserved::Taken;
    for i in 0..PORT_TRIES {
        if found != Reserved::Taken {
            break;
        }
        let mut number = mixed(start.wrapping_add(i)) % many;
        if has_half {
            number = 2 * number + (mixed(seed ^ number) >> 31);
        }
        scratch.plan.way.step.port = if is_chosen {
            scratch.last.port
        } else {
            ((first + number) as u16).into()
        };
        found = Reserved::of(tables.reserve(scratch))?;
        if is_chosen {
            break;
        }
    }
    tables.settle(scratch);
    match found {
        Reserved::Taken => return Err(DropReason::NoNatPort),
        Reserved::New => tables.count(Counter::NatPortsTaken),
        Reserved::Again => {}
    }
    go(tables, scratch, found);
    Ok(())
}

/// Does a packet leave with the node's address that an earlier agent's program has let a pod send? What that has
/// translated is no pod's any more, and what somebody outside has asked a pod itself has a way at the pod's device.
#[inline(always)]
fn former_leaves<T: Tables + ?Sized>(tables: &T, scratch: &mut Scratch) -> bool {
    let key = &scratch.trace.tuple;
    if tables.local_pod(&key.source).is_none() || !leaves(tables, &key.destination) {
        return false;
    }
    scratch.other = *key;
    scratch.other.hook = Hook::FROM_POD;
    match tables.way(&scratch.other) {
        Some(way) => way.step.mark == Mark::LEAVING,
        None => tables.plan(&scratch.other).is_none(),
    }
}

/// Begins a plan for the packet at hand, which goes as it is until somebody says otherwise.
#[inline(always)]
fn begin<T: Tables + ?Sized>(tables: &T, scratch: &mut Scratch, epoch: u32, state: u32) {
    let Scratch {
        plan,
        trace,
        arrival,
        ..
    } = scratch;
    let now = tables.now();
    plan.key = trace.tuple;
    let (mut there, mut back) = (state | WayState::OPENER, state);
    // One that opens ends nothing.
    if arrival.segment.is_fin() && !arrival.segment.is_syn() {
        there |= WayState::FIN;
        back |= WayState::OTHER_FIN;
    }
    if arrival.segment.is_rst() {
        there |= WayState::RESET;
        back |= WayState::RESET;
    }
    let end = arrival.end;
    fresh(&mut plan.way, now, epoch, there);
    plan.way.packets.store(1, Relaxed);
    plan.way.bytes.store(u64::from(arrival.length), Relaxed);
    fresh(&mut plan.back, now, epoch, back);
    plan.back.others_end.store(end, Relaxed);
    plan.back.packets.store(0, Relaxed);
    plan.back.bytes.store(0, Relaxed);
}

#[inline(always)]
fn fresh(way: &mut Way, now: u64, epoch: u32, state: u32) {
    way.created = now;
    way.seen.store(now, Relaxed);
    way.epoch.store(epoch, Relaxed);
    way.state.store(state, Relaxed);
    way.others_end.store(0, Relaxed);
    (way.backend, way.generation) = NO_BACKEND;
    way.device.store(0, Relaxed);
    way.owner = 0;
    way.egress_rule.store(0, Relaxed);
    way.ingress_rule.store(0, Relaxed);
    way.step = Step::marked(Mark::PASSED);
}

/// Ends a plan, whose answers arrive at `other`.
#[inline(always)]
fn seal(scratch: &mut Scratch, other: Hook) {
    let plan = &mut scratch.plan;
    plan.way.step.other = other;
    plan.back.step.other = plan.key.hook;
    plan.way.echo.store(plan.key.echo(), Relaxed);
}

/// Sends the packet of a plan its way.
#[inline(always)]
fn go<T: Tables + ?Sized>(tables: &T, scratch: &mut Scratch, reserved: Reserved) {
    fragment::remember(tables, scratch);
    let Scratch {
        plan,
        back,
        arrival,
        ..
    } = scratch;
    scratch.step = plan.way.step;
    scratch.state = plan.way.state.load(Relaxed);
    // The device of a way out is the uplink, where the packet is already.
    scratch.device = if back.hook == Hook::FROM_NET {
        0
    } else {
        plan.way.device.load(Relaxed)
    };
    match reserved {
        Reserved::New => tables.count(Counter::FlowsOpened),
        Reserved::Again if answer::is_settled(plan, arrival, true) => {
            // Without room it stays a plan.
            let _room: Outcome = tables.establish(scratch);
        }
        Reserved::Again | Reserved::Taken => {}
    }
}
