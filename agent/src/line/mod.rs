//! The straight line: takes changes in, compiles what they dirtied and makes the kernel hold it. It alone
//! writes to the agent's tables, on a thread of its own. Where changes come from is not here.

mod conditions;
mod handle;
#[cfg(test)]
mod history;
mod inputs;
mod machine;
mod nodes;
mod pods;
mod policy;
mod services;
mod takeover;
mod upkeep;
mod views;

use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use arc_swap::ArcSwap;
use ipnet::IpNet;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;
use tracing::info;
use weir_common::service::Generation;

use crate::apply::routes::Wanted;
use crate::apply::{self, Devices, NodeAddresses, Policies, Uplinks};
use crate::compile::policy::RuleBook;
use crate::conditions::Board;
use crate::config::Settings;
use crate::events::Names;
use crate::kernel::clock;
use crate::model::Change;
use crate::tell::Roster;
use crate::watch::status::Health;
use crate::zone_feed::ZoneFeed;

use conditions::Said;
pub use handle::{Ended, Handle, Input, Question};
pub use inputs::{Dirty, Inputs};
pub use machine::{KernelMachine, Machine, Plain, Swept, Tables};
use nodes::Nodes;
use pods::Pods;
use policy::Policy;
use services::Services;
pub use views::{Sample, filled, flows};

/// The port at which weir-dns listens, host order.
const DNS_PORT: u16 = 53;
/// How often failed writes are tried again and old rows are reused, as long as something happens.
const TICK: Duration = Duration::from_secs(1);
/// How long after the last change nothing happens any more: what has to be done a little later is done.
const QUIET: Duration = Duration::from_secs(10);
/// Changes that one pass takes in at the most.
const BATCH: usize = 4096;

/// What the line says to those who make it so, and what others read of it without asking.
#[derive(Debug, Default)]
pub struct Published {
    /// What rule numbers mean.
    pub rules: ArcSwap<RuleBook>,
    /// The pod CIDRs of this node's Node object; none before it has some.
    pub pod_cidrs: watch::Sender<Vec<IpNet>>,
    /// The routes that this node should have.
    pub routes: watch::Sender<Wanted>,
    /// Whose programs are on the hooks.
    pub programs: watch::Sender<Programs>,
}

/// Whose programs are on the hooks?
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum Programs {
    /// An earlier agent's, or nobody's: our tables are not filled yet.
    #[default]
    OfBefore,
    Ours,
}

/// The one writer.
#[derive(Debug)]
pub struct Line<M: Machine> {
    settings: Arc<Settings>,
    machine: M,
    inputs: Inputs,
    health: watch::Receiver<Health>,

    services: Services<M>,
    policy: Policy<M>,
    pods: Pods<M>,
    nodes: Nodes<M>,
    /// Has everything been said once, and policy compiled from it?
    is_complete: bool,
    /// Whose programs are on the hooks?
    programs: Programs,

    board: Arc<Board>,
    said: Said,
    zone: ZoneFeed,
    published: Arc<Published>,
    started: Instant,
    /// Seconds, about, that it has been running.
    ticks: u64,
    due: upkeep::Due,
    drifted: usize,
}

/// What the line is made of.
#[derive(Debug)]
pub struct Parts<M> {
    pub settings: Arc<Settings>,
    pub machine: M,
    pub health: watch::Receiver<Health>,
    pub node_addresses: Vec<IpAddr>,
    /// What addresses of pods are leased from, as far as it is known.
    pub ranges: Vec<IpNet>,
    pub zone: ZoneFeed,
    pub names: Names,
    pub roster: Roster,
    pub board: Arc<Board>,
    pub published: Arc<Published>,
}

impl<M: Machine> Line<M> {
    /// Resumes from what the kernel holds, and changes nothing yet.
    ///
    /// # Errors
    /// A table cannot be read.
    pub fn resume(parts: Parts<M>) -> Result<Self> {
        let Parts {
            settings,
            mut machine,
            health,
            node_addresses,
            ranges,
            zone,
            names,
            roster,
            board,
            published,
        } = parts;
        let t = machine.tables().context("open the tables")?;
        // Milliseconds since the machine began: nothing that tables of another layout remember counts faster.
        let first = clock::monotonic().as_millis() as u32;
        let services = apply::Services::resume(t.frontends, t.backends, t.live)
            .context("read the tables of services")?
            .after_another_layout(t.frontends_are, t.live_is, Generation(first));
        let policies = Policies::resume(t.classes, t.cidrs, t.verdicts, t.ports, t.epoch)
            .context("read the tables of policy")?
            .beginning_with(first);
        let devices = Devices::resume(t.devices, t.pods).context("read the tables of pods")?;
        let addresses = NodeAddresses::resume(t.nodes).context("read the table of nodes")?;
        let uplinks =
            Uplinks::resume(t.uplinks, t.cluster).context("read the tables of uplinks")?;
        let mut inputs = Inputs::new(settings.node.clone(), names, roster);
        inputs.know_ranges(ranges);
        let mut line = Self {
            services: Services::resume(services, settings.dns.service.clone()),
            policy: Policy::resume(policies, t.policy_is),
            pods: Pods::resume(devices),
            nodes: Nodes::resume(addresses, uplinks, node_addresses),
            said: Said::on(&board),
            settings,
            machine,
            inputs,
            health,
            is_complete: false,
            programs: Programs::default(),
            board,
            zone,
            published,
            started: Instant::now(),
            ticks: 0,
            due: upkeep::Due::default(),
            drifted: 0,
        };
        line.report();
        Ok(line)
    }

    /// Works until it is told to stop, or nobody can bring anything any more. Nothing is taken back then: the
    /// kernel goes on by itself.
    pub async fn run(
        mut self,
        mut changes: mpsc::Receiver<Change>,
        mut inputs: mpsc::Receiver<Input>,
        stop: CancellationToken,
    ) {
        let mut clock = upkeep::Clock::default();
        let mut health = self.health.clone();
        let mut batch = Vec::new();
        self.publish_routes();
        loop {
            // The source may have begun before the line: what it says waits until this node's own pods are known.
            let listens = self.pods.are_resumed;
            let mut is_news = false;
            tokio::select! {
                () = stop.cancelled() => return,
                taken = changes.recv_many(&mut batch, BATCH), if listens => if taken == 0 {
                    return;
                },
                input = inputs.recv() => match input {
                    Some(input) => {
                        is_news = input.is_news();
                        self.take(input);
                    }
                    None => return,
                },
                Ok(()) = health.changed() => {}
                ticks = clock.tick() => {
                    self.ticks = ticks;
                    self.tick(Instant::now());
                }
            }
            // What is there already belongs to this pass; nothing is waited for.
            while listens
                && batch.len() < BATCH
                && let Ok(change) = changes.try_recv()
            {
                batch.push(change);
            }
            is_news |= !batch.is_empty();
            for change in batch.drain(..) {
                self.inputs.take(change);
            }
            while let Ok(input) = inputs.try_recv() {
                is_news |= input.is_news();
                self.take(input);
            }
            if is_news {
                clock.is_news();
            }
            self.pass(Instant::now());
        }
    }

    /// Takes something of this node in. What follows from it, the next pass does.
    fn take(&mut self, input: Input) {
        match input {
            Input::Resumed(leases) => self.resume_pods(leases),
            Input::Leased { lease, opened } => self.take_lease(lease, opened),
            Input::Released { lease, closed } => self.take_release(lease, closed),
            Input::Devices {
                leases,
                devices,
                orphans,
            } => {
                // Who asked may have stopped waiting.
                let answer = self.audit_pods(&leases, &devices);
                orphans.send(answer).unwrap_or_default();
            }
            Input::NodeAddresses(addresses) => self.know_addresses(addresses),
            Input::Outlets(outlets) => self.know_outlets(outlets),
            Input::PodRanges(ranges) => self.inputs.know_ranges(ranges),
            Input::Question(question) => self.answer(question),
        }
    }

    /// Compiles what is dirty and writes it; then answers and says what came of it.
    fn pass(&mut self, now: Instant) {
        self.admit_pods();
        let dirty = self.inputs.take_dirty();
        if !self.is_complete && self.inputs.snapshot().is_complete() {
            self.complete(&dirty, now);
        } else {
            self.pass_services(&dirty, now);
            if self.is_complete && self.is_for_policy(&dirty) {
                self.pass_policy(&dirty.touched, now);
            }
        }
        self.pass_nodes(&dirty);
        self.take_over(now);
        self.answer_pods();
        self.report_quarantine(&dirty.quarantined);
        self.report();
    }

    /// Everything has been said: from now on what nobody asks for goes. Of Services it goes a little later,
    /// see [`Self::take_over`].
    fn complete(&mut self, dirty: &Dirty, now: Instant) {
        self.nodes.table.allow_deletes();
        self.policy.tables.allow_deletes();
        self.pass_node_addresses();
        self.pass_services(dirty, now);
        self.pass_policy(&dirty.touched, now);
        self.zone.everything_changed(self.inputs.snapshot());
        self.is_complete = true;
        self.pass_uplinks();
        let snapshot = self.inputs.snapshot();
        info!(
            services = snapshot.services.len(),
            pods = snapshot.pods.len(),
            policies = snapshot.policies.len(),
            "every input is synced"
        );
    }
}
