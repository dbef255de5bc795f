//! What the line tells about itself. Made when it is asked for, on the line's own thread.

use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use weir_cli::views::{
    ConditionView, EndpointView, FlowView, HookState, Input, PolicyView, ProgramInfo, Quarantined,
    ServiceView, Status, TableDrift, TableFill, Verify,
};
use weir_common::policy::{RuleId, RulesId};
use weir_common::service::Scope;
use weir_common::way::{Peer, WayState};

use super::conditions::problem;
use super::machine::Machine;
use super::pods::subject;
use super::{Line, Question};
use crate::apply;
use crate::compile::policy::{Direction, Report, RuleBook, RuleOwner};
use crate::compile::{FrontendPlan, Way};
use crate::conditions::{About, Effect, Held, ObjectFault, PodFault};
use crate::events::{Names, protocol};
use crate::kernel::{Conversation, Flows, clock};
use crate::model::{Kind, ObjectName, PodNetwork};
use crate::pods::Lease;

impl<M: Machine> Line<M> {
    /// Answers whoever asked; they may have stopped waiting.
    pub(super) fn answer(&mut self, question: Question) {
        match question {
            Question::Alive(to) => to.send(()).unwrap_or_default(),
            Question::Status(to) => drop(to.send(self.status())),
            Question::Services(to) => drop(to.send(self.services_view())),
            Question::Endpoints(to) => drop(to.send(self.endpoints())),
            Question::Policy(to) => drop(to.send(self.policy_view())),
            Question::Objects(to) => drop(to.send(self.told())),
            Question::Explain { question, to } => drop(to.send(self.matter(&question))),
            Question::Verify(to) => drop(to.send(self.verify().map_err(|e| e.to_string()))),
            Question::Sample(to) => drop(to.send(self.sample())),
        }
    }

    /// `weir status`.
    fn status(&self) -> Status {
        let snapshot = self.inputs.snapshot();
        let health = self.health.borrow().clone();
        let missing: Vec<Kind> = snapshot.missing().collect();
        let inputs = Kind::ALL.map(|kind| Input {
            kind: kind.to_string(),
            synced: !missing.contains(&kind),
            objects: match kind {
                Kind::Service => snapshot.services.len(),
                Kind::EndpointSlice => snapshot.slices.len(),
                Kind::Pod => snapshot.pods.len(),
                Kind::Namespace => snapshot.namespaces.len(),
                Kind::Node => snapshot.nodes.len(),
                Kind::NetworkPolicy => snapshot.policies.len(),
                Kind::ClusterNetworkPolicy => snapshot.cluster_policies.len(),
            },
            problem: problem(health.get(&kind)),
        });
        let held = self.board.all();
        let not_ready = self
            .board
            .node()
            .unready
            .iter()
            .map(ToString::to_string)
            .collect();
        Status {
            node: self.settings.node.to_string(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            uptime_seconds: self.started.elapsed().as_secs(),
            restarts: self.settings.restarts,
            not_ready,
            inputs: inputs.into(),
            tables: self.fills(),
            programs: self.programs(),
            nodes: self.nodes_view(),
            pods: self.pods.open.len(),
            services: snapshot.services.len(),
            policies: snapshot.policies.len() + snapshot.cluster_policies.len(),
            quarantined: held.iter().filter_map(quarantined).collect(),
            conditions: held.iter().map(condition).collect(),
            nat: None,
        }
    }

    /// How full the tables are.
    pub(super) fn fills(&self) -> Vec<TableFill> {
        let fills = self.services.tables.fills().into_iter();
        let fills = fills
            .chain([self.nodes.table.fill()])
            .chain(self.policy.tables.fills())
            .chain(self.pods.devices.fills())
            .chain(self.nodes.uplinks.fills());
        fills.map(|fill| filled(&fill)).collect()
    }

    fn programs(&self) -> Vec<ProgramInfo> {
        let hooks = self.hooks();
        self.machine
            .programs()
            .into_iter()
            .map(|(name, (id, verified_instructions))| ProgramInfo {
                hooks: hooks
                    .iter()
                    .filter(|h| h.program == name && h.problem.is_none())
                    .count(),
                name,
                id,
                verified_instructions,
            })
            .collect()
    }

    /// `weir services`.
    fn services_view(&self) -> Vec<ServiceView> {
        let mut rows: Vec<_> = self
            .services
            .claims
            .asked()
            .flat_map(|plan| {
                let problem = match self.services.tables.statuses().get(&plan.id) {
                    Some(apply::Status::Failed(why)) => Some(why.clone()),
                    _ => None,
                };
                let taken = |frontend: &FrontendPlan| {
                    let holder = self.services.claims.holder(&frontend.key)?;
                    (*holder != plan.id).then(|| format!("belongs to {holder}"))
                };
                let frontends = plan.frontends.iter();
                let asked = frontends.filter(|frontend| !frontend.key.is_of_cluster_ip());
                asked.map(move |frontend| ServiceView {
                    service: plan.id.to_string(),
                    kind: kind(frontend.way).to_owned(),
                    clients: clients(frontend.key.scope).to_owned(),
                    address: SocketAddr::new(frontend.key.addr.into(), frontend.key.port.into()),
                    protocol: protocol(frontend.key.protocol),
                    backends: frontend
                        .backends
                        .iter()
                        .map(|b| SocketAddr::new(b.addr.into(), b.port.into()))
                        .collect(),
                    affinity_seconds: frontend.affinity,
                    problem: taken(frontend).or_else(|| problem.clone()),
                })
            })
            .collect();
        let order = |row: &ServiceView| (row.service.clone(), row.address, row.clients.clone());
        rows.sort_by_cached_key(order);
        rows
    }

    /// `weir endpoints`: pods of this node that run here or should.
    fn endpoints(&self) -> Vec<EndpointView> {
        let book = self.policy.compiler.book();
        let isolation = |pod: &ObjectName, direction| {
            let lists = self.policy.compiler.rules_of(pod).unwrap_or_default();
            let list = match direction {
                Direction::Ingress => lists.ingress,
                Direction::Egress => lists.egress,
            };
            self.isolating(list, &book)
        };
        let mut rows: Vec<EndpointView> = self
            .pods
            .open
            .values()
            .map(|lease| {
                let name = subject(lease);
                let state = match self.pods.status(lease) {
                    Some(apply::Status::Done) => "open".to_owned(),
                    Some(apply::Status::Failed(why)) => why.clone(),
                    Some(apply::Status::Pending) | None => {
                        "closed until its policy is known".into()
                    }
                };
                EndpointView {
                    ingress: isolation(&name, Direction::Ingress),
                    egress: isolation(&name, Direction::Egress),
                    pod: name.to_string(),
                    addresses: lease.addresses.clone(),
                    device: lease.device(),
                    ifindex: lease.devices().map_or(0, |d| d.host_ifindex),
                    mac: lease
                        .devices()
                        .map_or_else(String::new, |d| d.pod_mac.to_string()),
                    state,
                }
            })
            .collect();
        let here = self.inputs.snapshot().pods.values().filter(|pod| {
            pod.network == PodNetwork::Own && pod.node.as_deref() == Some(&*self.settings.node)
        });
        for pod in here {
            let name = pod.id.to_string();
            if !rows.iter().any(|row| row.pod == name) {
                rows.push(EndpointView {
                    ingress: isolation(&pod.id, Direction::Ingress),
                    egress: isolation(&pod.id, Direction::Egress),
                    pod: name,
                    addresses: Vec::new(),
                    device: String::new(),
                    ifindex: 0,
                    mac: String::new(),
                    state: "waiting for the CNI plugin".to_owned(),
                });
            }
        }
        rows.sort_by(|a, b| a.pod.cmp(&b.pod));
        rows
    }

    /// The policies that isolate by a list of rules: its denials name them.
    fn isolating(&self, list: RulesId, book: &RuleBook) -> Vec<String> {
        let denial = self.policy.compiler.denying_rule(list);
        match denial.and_then(|rule| book.owner(rule)) {
            Some(RuleOwner::Isolated { policies, .. }) => {
                policies.iter().map(ToString::to_string).collect()
            }
            _ => Vec::new(),
        }
    }

    /// `weir policy`.
    fn policy_view(&self) -> Vec<PolicyView> {
        let snapshot = self.inputs.snapshot();
        let enforcement = |is_audit: bool| match is_audit {
            true => "audit".to_owned(),
            false => "enforce".to_owned(),
        };
        let directions = |ingress: bool, egress: bool| {
            let both = [(ingress, "ingress"), (egress, "egress")];
            let said = both.into_iter().filter(|(says, _)| *says);
            said.map(|(_, direction)| direction.to_owned()).collect()
        };
        let names = |pods: Vec<&ObjectName>| pods.into_iter().map(ToString::to_string).collect();
        let compiler = &self.policy.compiler;
        let held = self.board.all();
        let mut rows: Vec<PolicyView> = Vec::new();
        for policy in snapshot.cluster_policies.values() {
            let id = format!("{} {}", Kind::ClusterNetworkPolicy, policy.name);
            let said = held
                .iter()
                .filter(|it| it.condition.about.to_string() == id);
            rows.push(PolicyView {
                kind: Kind::ClusterNetworkPolicy.to_string(),
                policy: policy.name.to_string(),
                tier: Some(format!("{} {}", policy.tier.as_str(), policy.priority)),
                enforcement: enforcement(policy.is_audit),
                directions: directions(!policy.ingress.is_empty(), !policy.egress.is_empty()),
                pods: names(compiler.selected_by_cluster_policy(policy, snapshot)),
                unsupported: said.map(|it| it.condition.text.clone()).collect(),
            });
        }
        for policy in snapshot.policies.values() {
            let unsupported = self.policy.reports.iter().filter(|report| {
                matches!(report, Report::AllowsNothing { policy: id, .. } if *id == policy.id)
            });
            rows.push(PolicyView {
                kind: Kind::NetworkPolicy.to_string(),
                policy: policy.id.to_string(),
                tier: None,
                enforcement: enforcement(policy.is_audit),
                directions: directions(policy.ingress.is_some(), policy.egress.is_some()),
                pods: names(compiler.selected_by(policy)),
                unsupported: unsupported.map(ToString::to_string).collect(),
            });
        }
        rows.sort_by(|a, b| (&a.kind, &a.policy).cmp(&(&b.kind, &b.policy)));
        rows
    }

    /// `weir verify`: reads every table again.
    ///
    /// # Errors
    /// A table cannot be read.
    fn verify(&mut self) -> Result<Verify, apply::TableError> {
        let drifts = self.services.tables.compare()?.into_iter();
        let drifts = drifts
            .chain([self.nodes.table.compare()?])
            .chain(self.policy.tables.compare()?)
            .chain(self.pods.devices.compare()?)
            .chain(self.nodes.uplinks.compare()?);
        let tables = drifts
            .map(|(table, c)| TableDrift {
                table: table.to_owned(),
                desired: c.desired,
                kernel: c.kernel,
                missing: c.missing,
                unexpected: c.unexpected,
                different: c.different,
            })
            .collect();
        let hooks = self.hooks().into_iter();
        let hooks = hooks
            .map(|hook| HookState {
                hook: hook.name,
                program: Some(hook.program.to_owned()),
                problem: hook.problem,
            })
            .collect();
        Ok(Verify { tables, hooks })
    }

    fn sample(&self) -> Sample {
        let snapshot = self.inputs.snapshot();
        Sample {
            nodes: snapshot.nodes.len(),
            fills: self.fills(),
            pods: self.pods.open.len(),
            services: snapshot.services.len(),
            policies: snapshot.policies.len() + snapshot.cluster_policies.len(),
            unsynced: snapshot.missing().count(),
            stale_for: self.stale_for(),
            drifted_rows: self.drifted,
            dns_clients: self.zone.clients(),
            epoch: self.policy.tables.epoch(),
            restarts: self.settings.restarts,
            devices: self
                .pods
                .open
                .values()
                .filter_map(|lease| device(lease))
                .collect(),
        }
    }
}

/// How full a table is, and whether that is too much.
pub fn filled(fill: &apply::Fill) -> TableFill {
    TableFill {
        table: fill.table.to_owned(),
        rows: fill.rows,
        capacity: fill.capacity,
        problem: (fill.ratio() > 0.9).then(|| "more than 90 % full".to_owned()),
    }
}

/// An object or pod whose last good state holds.
fn quarantined(held: &Held) -> Option<Quarantined> {
    match &held.condition.about {
        About::Object(_, ObjectFault::Quarantined | ObjectFault::NotWritten)
        | About::Pod(_, PodFault::NotWritten) => Some(Quarantined {
            object: held.condition.about.to_string(),
            reason: held.condition.text.clone(),
        }),
        _ => None,
    }
}

fn condition(held: &Held) -> ConditionView {
    let about = &held.condition.about;
    ConditionView {
        about: about.to_string(),
        kind: about.kind().to_owned(),
        fault: about.fault().to_owned(),
        effect: match about.effect() {
            Effect::Nothing => None,
            Effect::Unready => Some("the node is not ready".to_owned()),
            Effect::StopsPods => Some("no pod is started here".to_owned()),
        },
        since: humantime::format_rfc3339_seconds(held.since).to_string(),
        text: held.condition.text.clone(),
        remedy: about.remedy().to_owned(),
    }
}

/// `weir flows`, a row at a time. Reads the kernel's tables as a whole: not on the line's task.
///
/// # Errors
/// The kernel refuses to read.
pub fn flows(
    tables: &Flows,
    book: &RuleBook,
    names: &Names,
    mut take: impl FnMut(FlowView),
) -> std::io::Result<()> {
    let now = clock::monotonic();
    tables.each_conversation(|it| take(view(&it, now, book, names)))
}

/// Figures of one moment, as far as the line has them.
#[derive(Clone, Debug)]
pub struct Sample {
    pub fills: Vec<TableFill>,
    pub nodes: usize,
    pub pods: usize,
    pub services: usize,
    pub policies: usize,
    pub unsynced: usize,
    /// How old objects are that were saved by an earlier run and are gone by; `None` without such.
    pub stale_for: Option<Duration>,
    pub drifted_rows: usize,
    pub dns_clients: usize,
    pub epoch: u32,
    pub restarts: u64,
    /// Pods of this node, by the interface indexes of their devices.
    pub devices: Vec<(ObjectName, u32)>,
}

fn device(lease: &Lease) -> Option<(ObjectName, u32)> {
    Some((subject(lease), lease.devices()?.host_ifindex))
}

fn kind(way: Way) -> &'static str {
    match way {
        Way::ClusterIp => "ClusterIP",
        Way::LoadBalancer => "LoadBalancer",
        Way::NodePort => "NodePort",
        Way::ExternalIp => "ExternalIP",
        Way::HostPort => "HostPort",
    }
}

fn clients(scope: Scope) -> &'static str {
    if scope.is_external() {
        "outside"
    } else {
        "inside"
    }
}

fn socket(peer: Peer) -> SocketAddr {
    SocketAddr::new(IpAddr::from(peer.addr), peer.port.into())
}

fn view(conversation: &Conversation, now: Duration, book: &RuleBook, names: &Names) -> FlowView {
    let Conversation {
        key,
        way,
        back,
        is_answered,
        via,
    } = conversation;
    let ways = [way, back];
    let load = |cell: &AtomicU64| cell.load(Ordering::Relaxed);
    let bits = way.state.load(Ordering::Relaxed);
    let state = if WayState::is_closed(bits) {
        "closed"
    } else if WayState::is_half_closed(bits) {
        "closing"
    } else if *is_answered {
        "open"
    } else {
        "opening"
    };
    let rule = |number: u32| {
        let owner = book.owner(RuleId(number));
        owner.map(ToString::to_string)
    };
    let age = |since: u64| now.saturating_sub(Duration::from_nanos(since)).as_secs();
    let responder = if way.step.rewrite.is_destination() {
        way.step.peer()
    } else {
        key.destination()
    };
    FlowView {
        source: names.end(socket(key.source())),
        destination: names.end(socket(responder)),
        protocol: protocol(key.protocol),
        state: state.to_owned(),
        via: via.map(socket),
        packets: ways.map(|way| load(&way.packets)),
        bytes: ways.map(|way| load(&way.bytes)),
        age_seconds: age(way.created),
        idle_seconds: age(load(&way.seen).max(load(&back.seen))),
        egress_rule: rule(way.egress_rule.load(Ordering::Relaxed)),
        ingress_rule: rule(way.ingress_rule.load(Ordering::Relaxed)),
    }
}
