//! The straight line: one task that takes changes in, compiles what they dirtied and makes the kernel
//! hold it. It alone writes to the agent's tables. Where changes come from is not here.

mod handle;
mod inputs;
mod nodes;
mod pods;
mod services;
mod stale;
mod takeover;
mod uplinks;
mod views;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use arc_swap::{ArcSwap, ArcSwapOption};
use ipnet::IpNet;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};
use weir_common::Addr;
use weir_common::device::{Device, LocalPod};
use weir_common::nat::{ClusterKey, InCluster, Uplink};
use weir_common::policy::{Class, PortKey, PortRow, VerdictKey, VerdictRow};
use weir_common::service::{Backend, BackendId, Frontend, FrontendKey, Generation, NodeAddress};

use crate::apply::routes::{RouteReport, Wanted};
use crate::apply::{Devices, NodeAddresses, Policies, PolicyTarget, Services, Status, Uplinks};
use crate::compile::Owner;
use crate::compile::masquerade::Outlet;
use crate::compile::policy::{self, Compiled, NodeView, Retained, RuleBook};
use crate::config::Settings;
use crate::events::Names;
use crate::kernel::{Counters, DeviceFault, Flows, HookOf, Kernel, MapTable, clock};
use crate::model::Change;
use crate::pods::{Attachment, Lease, PodRef};
use crate::watch::status::Health;
use crate::zone_feed::ZoneFeed;

pub use handle::{Ended, Handle, Work};
pub use inputs::{Dirty, Inputs};
pub use pods::{Left, NodeDatapath};
use stale::Age;
pub use views::{Sample, flows};

type ServiceState = Services<
    MapTable<FrontendKey, Frontend>,
    MapTable<u32, Backend>,
    MapTable<BackendId, Generation>,
>;
type NodeState = NodeAddresses<MapTable<Addr, NodeAddress>>;
type PolicyState = Policies<
    MapTable<Addr, Class>,
    MapTable<VerdictKey, VerdictRow>,
    MapTable<PortKey, PortRow>,
    MapTable<u32, u32>,
>;
type DeviceState = Devices<MapTable<u32, Device>, MapTable<Addr, LocalPod>>;
type UplinkState = Uplinks<MapTable<u32, Uplink>, MapTable<ClusterKey, InCluster>>;

/// The port at which weir-dns listens, host order.
const DNS_PORT: u16 = 53;
/// How often failed writes are tried again and old rows are reused.
const TICK: Duration = Duration::from_secs(1);
/// Changes that one pass takes in at the most.
const BATCH: usize = 4096;
/// How often hooks are compared with what they should hold, in ticks.
const AUDIT_TICKS: u64 = 5;
/// How often tables are compared with the kernel and ended flows are swept, in ticks.
const SWEEP_TICKS: u64 = 30;

/// What others read of the line without asking it.
#[derive(Debug, Default)]
pub struct Published {
    /// Who has which address.
    pub names: ArcSwap<Names>,
    /// What rule numbers mean.
    pub rules: ArcSwap<RuleBook>,
    /// Every reason why the node is not ready.
    pub not_ready: ArcSwap<Vec<String>>,
    /// The pod CIDRs of this node's Node object; none before it has some.
    pub pod_cidrs: watch::Sender<Vec<IpNet>>,
    /// The routes that this node should have.
    pub routes: watch::Sender<Wanted>,
    /// What became of them.
    pub route_report: ArcSwap<RouteReport>,
    /// Why a pod cannot be started here; the first of the reasons why the node is not ready.
    pub closed_to_pods: ArcSwap<Vec<String>>,
    /// What is wrong with the second lock.
    pub lock_problem: ArcSwapOption<String>,
    /// Packets that the second lock has dropped, when it was last looked at.
    pub lock_drops: AtomicU64,
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
pub struct Line {
    settings: Arc<Settings>,
    kernel: Kernel,
    inputs: Inputs,
    health: watch::Receiver<Health>,
    node_addresses: Vec<IpAddr>,
    ranges: watch::Receiver<Vec<IpNet>>,

    services: ServiceState,
    nodes: NodeState,
    policies: PolicyState,
    devices: DeviceState,
    uplinks: UplinkState,
    /// The devices that could lead out of the node, once somebody has looked.
    outlets: Option<Vec<Outlet>>,
    compiled: Compiled,
    retained: Retained,
    /// The second half of a change of policy whose first half is not written yet.
    policy_after: Option<PolicyTarget>,
    /// Why the latest policy is not in the kernel, when it had no room.
    policy_refused: Option<String>,
    /// Has everything been said once, and policy compiled from it?
    is_complete: bool,

    /// Attachments whose devices carry the real programs, ours or an earlier agent's.
    open: BTreeMap<Attachment, Arc<Lease>>,
    /// Whose programs are on the hooks?
    programs: Programs,
    are_pods_resumed: bool,
    waiting: Vec<Waiting>,
    /// Addresses whose flows are still to be forgotten.
    closed: BTreeSet<Addr>,

    counters: Counters,
    flows: Arc<Flows>,
    sweep: Option<JoinHandle<()>>,
    zone: ZoneFeed,
    published: Arc<Published>,
    started: Instant,
    ticks: u64,
    hook_problems: BTreeMap<String, String>,
    drifted: usize,
}

/// An ADD that waits until its pod is known.
#[derive(Debug)]
struct Waiting {
    pod: PodRef,
    known: oneshot::Sender<()>,
}

/// What the line is made of.
#[derive(Debug)]
pub struct Parts {
    pub settings: Arc<Settings>,
    pub kernel: Kernel,
    pub health: watch::Receiver<Health>,
    pub node_addresses: Vec<IpAddr>,
    /// What addresses of pods are leased from.
    pub ranges: watch::Receiver<Vec<IpNet>>,
    pub zone: ZoneFeed,
    pub published: Arc<Published>,
}

impl Line {
    /// Resumes from what the kernel holds, and changes nothing yet.
    ///
    /// # Errors
    /// A table cannot be read.
    pub fn resume(parts: Parts) -> Result<Self> {
        let Parts {
            settings,
            kernel,
            health,
            node_addresses,
            ranges,
            zone,
            published,
        } = parts;
        let s = kernel
            .service_tables()
            .context("open the tables of services")?;
        let p = kernel
            .policy_tables()
            .context("open the tables of policy")?;
        let d = kernel.device_tables().context("open the tables of pods")?;
        let u = kernel
            .uplink_tables()
            .context("open the tables of uplinks")?;
        // Milliseconds since the machine began: nothing that tables of another layout remember counts faster.
        let first = clock::monotonic().as_millis() as u32;
        let services = Services::resume(s.frontends, s.backends, s.live)
            .context("read the tables of services")?;
        let policies = Policies::resume(p.classes, p.verdicts, p.ports, p.epoch)
            .context("read the tables of policy")?;
        Ok(Self {
            services: services.after_another_layout(s.frontends_are, s.live_is, Generation(first)),
            nodes: NodeAddresses::resume(s.nodes).context("read the table of nodes")?,
            policies: policies.beginning_with(first),
            devices: Devices::resume(d.devices, d.pods).context("read the tables of pods")?,
            uplinks: Uplinks::resume(u.uplinks, u.cluster).context("read the tables of uplinks")?,
            outlets: None,
            counters: kernel.counters().context("open the counters")?,
            flows: Arc::new(kernel.flows().context("open the tables of flows")?),
            sweep: None,
            settings,
            kernel,
            inputs: Inputs::default(),
            health,
            node_addresses,
            ranges,
            compiled: Compiled::default(),
            retained: Retained::default(),
            policy_after: None,
            policy_refused: None,
            is_complete: false,
            open: BTreeMap::new(),
            programs: Programs::default(),
            are_pods_resumed: false,
            waiting: Vec::new(),
            closed: BTreeSet::new(),
            zone,
            published,
            started: Instant::now(),
            ticks: 0,
            hook_problems: BTreeMap::new(),
            drifted: 0,
        })
    }

    /// Works until it is told to stop. Nothing is taken back then: the kernel goes on by itself.
    pub async fn run(
        mut self,
        mut changes: mpsc::Receiver<Change>,
        mut work: mpsc::Receiver<Work>,
        stop: CancellationToken,
    ) {
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut batch = Vec::new();
        let mut is_fed = true;
        self.publish_routes();
        self.publish_readiness();
        loop {
            // The source may have begun before the line: what it says waits until this node's own pods are known.
            let listens = is_fed && self.are_pods_resumed;
            tokio::select! {
                () = stop.cancelled() => return,
                taken = changes.recv_many(&mut batch, BATCH), if listens => {
                    if taken == 0 {
                        warn!("the source of objects has ended; what is known holds on");
                        is_fed = false;
                    }
                }
                Some(work) = work.recv() => work(&mut self),
                _ = tick.tick() => self.tick(Instant::now()),
            }
            // What is there already belongs to this pass; nothing is waited for.
            while listens
                && batch.len() < BATCH
                && let Ok(change) = changes.try_recv()
            {
                batch.push(change);
            }
            for change in batch.drain(..) {
                self.log_quarantine(&change);
                self.inputs.take(change);
            }
            while let Ok(work) = work.try_recv() {
                work(&mut self);
            }
            self.pass(Instant::now());
        }
    }

    /// One line when an object is quarantined, or for another reason, and one when it is released.
    fn log_quarantine(&self, change: &Change) {
        let known = self.inputs.quarantined();
        match change {
            Change::Quarantined { object, reason } if known.get(object) != Some(reason) => {
                warn!(object, reason, "quarantined; its last good state holds");
            }
            Change::Released { object } if known.contains_key(object) => {
                info!(object, "no longer quarantined");
            }
            _ => {}
        }
    }

    /// Compiles what is dirty and writes it.
    fn pass(&mut self, now: Instant) {
        let dirty = self.inputs.take_dirty();
        if !self.is_complete && self.inputs.snapshot().is_complete() {
            self.complete(&dirty, now);
        } else {
            self.pass_services(&dirty, now);
            if dirty.policy && self.is_complete {
                self.pass_policy(now);
            }
        }
        if dirty.names {
            self.publish_names();
        }
        self.pass_nodes(&dirty);
        self.take_over(now);
        self.answer_waiting();
        self.publish_readiness();
    }

    /// Everything has been said: from now on what nobody asks for goes. Of Services it goes a little later,
    /// see [`Self::take_over`].
    fn complete(&mut self, dirty: &Dirty, now: Instant) {
        self.nodes.allow_deletes();
        self.policies.allow_deletes();
        self.pass_node_addresses();
        self.pass_services(dirty, now);
        self.pass_policy(now);
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

    fn pass_policy(&mut self, now: Instant) {
        if self.is_policy_half_way() {
            self.continue_policy(now);
            if self.is_policy_half_way() {
                // What the kernel holds is neither the old nor the new: the way there is finished first.
                self.inputs.mark_policy();
                return;
            }
        }
        let snapshot = self.inputs.snapshot();
        let node = NodeView {
            name: self.settings.node.clone(),
            addresses: self.node_addresses.clone(),
            dns: self.settings.dns.addresses.clone(),
        };
        let kept = self.retained.observe(snapshot);
        let compiled = policy::compile(snapshot, &node, &kept, &self.compiled);
        // Words first: an event must not carry a number that nobody can explain. Until the kernel is there,
        // and until events that wait are read, numbers of before are seen too.
        let words = compiled.book().with_earlier(self.compiled.book());
        self.published.rules.store(Arc::new(words));
        let before = std::mem::replace(&mut self.compiled, compiled);
        self.write_policy(&before, now);
    }

    fn tick(&mut self, now: Instant) {
        self.ticks += 1;
        self.services.tick(now);
        self.nodes.tick();
        if self.is_complete {
            self.continue_policy(now);
        }
        if self.ticks.is_multiple_of(AUDIT_TICKS) && self.programs == Programs::Ours {
            self.repair_hooks();
        }
        if self.ticks.is_multiple_of(SWEEP_TICKS) || !self.closed.is_empty() {
            self.sweep_flows();
        }
        if self.ticks.is_multiple_of(SWEEP_TICKS) {
            self.audit_tables();
        }
    }

    /// Puts programs back that somebody took off.
    fn repair_hooks(&mut self) {
        let hooks = match self.kernel.hooks(self.open_devices()) {
            Ok(hooks) => hooks,
            Err(error) => {
                warn!(%error, "hooks cannot be looked at");
                return;
            }
        };
        let mut broken = BTreeSet::new();
        let mut problems = BTreeMap::new();
        for hook in hooks.node {
            if let Some(problem) = hook.problem {
                broken.insert(hook.of);
                problems.insert(hook.name, problem);
            }
        }
        let is_new =
            |(hook, problem): &(&String, &String)| self.hook_problems.get(*hook) != Some(*problem);
        let news: Vec<_> = problems.iter().filter(is_new).collect();
        for (hook, problem) in &news {
            warn!(
                hook,
                problem, "a hook does not hold our program; putting it back"
            );
        }
        for of in broken {
            let repaired = match of {
                HookOf::Sockets => self.kernel.place_socket_hooks(),
                HookOf::Pods => self.kernel.place_pod_hooks(),
                HookOf::Uplink => self.kernel.place_net_hooks(),
            };
            // Once, not at every audit.
            if let Err(error) = repaired
                && !news.is_empty()
            {
                warn!(?of, error = format!("{error:#}"), "cannot be put back");
            }
        }
        for it in hooks.devices {
            // One that is gone is its pod's fault, and nothing can be put back.
            if it.problem == DeviceFault::Gone {
                continue;
            }
            let device = &it.device;
            match self.kernel.join(device, it.ifindex) {
                Ok(()) => warn!(device, problem = %it.problem, "put back"),
                Err(error) => warn!(device, error = format!("{error:#}"), "cannot be put back"),
            }
        }
        self.hook_problems = problems;
    }

    /// Beside the line: it takes a while, and nothing waits for it. One sweep at a time.
    fn sweep_flows(&mut self) {
        if self
            .sweep
            .as_ref()
            .is_some_and(|sweep| !sweep.is_finished())
        {
            return;
        }
        let gone = std::mem::take(&mut self.closed);
        let flows = self.flows.clone();
        self.sweep = Some(tokio::task::spawn_blocking(move || {
            // An address that could not be swept now is swept with its flows' patience.
            if let Err(error) = flows.sweep(clock::monotonic(), |addr| gone.contains(addr)) {
                warn!(%error, "ended flows cannot be swept");
            }
        }));
    }

    /// Desired against kernel, for all tables that we fill.
    fn audit_tables(&mut self) {
        let found = self.services.audit().and_then(|rows| {
            Ok(rows + self.nodes.audit()? + self.policies.audit()? + self.devices.audit()?)
        });
        let found = found.and_then(|rows| Ok(rows + self.uplinks.audit()?));
        self.pass_uplinks();
        match found {
            Ok(0) => {}
            Ok(rows) => {
                warn!(
                    rows,
                    "the kernel's tables were not as we left them; repairing"
                );
                self.drifted += rows;
            }
            Err(error) => warn!(%error, "the kernel's tables cannot be audited"),
        }
    }

    fn open_devices(&self) -> impl Iterator<Item = (String, u32)> + use<'_> {
        self.open
            .values()
            .filter_map(|lease| Some((lease.device(), lease.devices()?.host_ifindex)))
    }

    /// Where flows are read without the line.
    pub fn flow_tables(&self) -> Arc<Flows> {
        self.flows.clone()
    }

    fn publish_names(&self) {
        let names = Names::of(
            self.inputs.snapshot(),
            self.open_devices().map(|(d, i)| (i, d)),
        );
        self.published.names.store(Arc::new(names));
    }

    fn publish_readiness(&self) {
        let mut not_ready = self.lacking();
        not_ready.extend(self.staleness(Age::Omitted));
        let closed = self.closed_to_pods();
        if **self.published.closed_to_pods.load() != closed {
            self.published.closed_to_pods.store(Arc::new(closed));
        }
        if **self.published.not_ready.load() != not_ready {
            match not_ready.first() {
                None => info!("ready"),
                Some(reason) => info!(reason, "not ready"),
            }
            self.published.not_ready.store(Arc::new(not_ready));
        }
    }

    /// Every reason why the node is not ready.
    pub fn not_ready(&self) -> Vec<String> {
        let mut reasons = self.lacking();
        reasons.extend(self.staleness(Age::Told));
        reasons
    }

    /// Those reasons that are the node's own, and not that the API server is away.
    pub fn lacking(&self) -> Vec<String> {
        let mut reasons = self.closed_to_pods();
        reasons.extend(self.left_behind());
        reasons.extend(self.published.route_report.load().lines().cloned());
        reasons
    }

    /// Those reasons for which no pod is started here. Pods that some other node does not reach are better
    /// than none.
    fn closed_to_pods(&self) -> Vec<String> {
        let mut reasons: Vec<String> = Vec::new();
        if !self.is_complete {
            let health = self.health.borrow();
            for kind in self.inputs.snapshot().missing() {
                let trouble = match health.get(&kind) {
                    Some(crate::watch::status::WatchStatus::Retrying { error, .. }) => {
                        format!(": {error}")
                    }
                    _ => String::new(),
                };
                reasons.push(format!("{kind} objects are not synced yet{trouble}"));
            }
        }
        reasons.extend(self.awaits_take_over());
        reasons.extend(self.lacks_range());
        reasons.extend(
            self.hook_problems
                .iter()
                .map(|(hook, p)| format!("hook {hook}: {p}")),
        );
        if let Some(problem) = &*self.published.lock_problem.load() {
            reasons.push(format!("second lock: {problem}"));
        }
        reasons.extend(
            self.unapplied()
                .into_iter()
                .map(|(object, why)| format!("{object}: {why}")),
        );
        reasons
    }

    /// Objects that are understood and could not be written, with the reason.
    fn unapplied(&self) -> Vec<(String, String)> {
        let failed = |object: String, status: &Status| match status {
            Status::Failed(why) => Some((object, why.clone())),
            Status::Pending | Status::Done => None,
        };
        let services = self.services.statuses().iter();
        let services = services.filter_map(|(owner, status)| {
            let object = match owner {
                Owner::Service(name) => format!("Service {name}"),
                Owner::HostPorts(pod) => format!("host ports of Pod {pod}"),
            };
            failed(object, status)
        });
        let pods = self.devices.statuses().iter();
        let pods = pods.filter_map(|(pod, status)| failed(format!("Pod {pod}"), status));
        let mut all: Vec<_> = services.chain(pods).collect();
        if let Status::Failed(why) = self.nodes.status() {
            all.push(("Node addresses".into(), why.clone()));
        }
        match (&self.policy_refused, self.policies.status()) {
            (Some(why), _) | (None, Status::Failed(why)) => {
                all.push(("NetworkPolicy".into(), why.clone()));
            }
            (None, Status::Pending | Status::Done) => {}
        }
        all
    }
}
