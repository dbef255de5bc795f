//! From policies, pods, namespaces and nodes to the rows of the policy tables (docs/architecture.md,
//! "Policy: classes, not identities"). Writing them is not here.
//!
//! Read in this order: `predicate` (what a rule asks of an address), `region` (which blocks an address is in), `class` (who
//! satisfies what), `rules` (what holds for a pod), `verdict` and `ports` (what that answers to a class), `number` (how all of it is
//! numbered), `transition` (how to get from one state to the next).

mod address;
mod book;
mod class;
mod encode;
mod number;
mod ports;
mod predicate;
mod region;
mod report;
mod retain;
mod rules;
mod transition;
mod verdict;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::Arc;

use weir_common::policy::{Action, Class, RuleId, RulesId, VerdictKey, VerdictRow};
use weir_common::{Addr, Protocol};

pub use address::NodeView;
pub use book::{Direction, RuleBook, RuleOwner};
pub use report::{Claimant, Nothing, Part, Report};
pub use retain::Retained;
pub use transition::Transition;

use super::policy_rows::{PodRules, PolicyRows};
use crate::model::{ContainerPort, Labels, ObjectName, Pod, Policy, Snapshot};
use address::{Holder, holders};
use class::{ClassContent, Classifier, Facts};
use number::Numbers;
use ports::PortSet;
use predicate::{PortName, Predicate};
use region::Regions;
use rules::{PolicyRules, ResolvedPeers, RuleList, names_ports, reports, resolve};
use verdict::{Cell, Judge, PortSets};

/// The policy of a node, compiled, with what the numbers in it stand for.
#[derive(Clone, Debug)]
pub struct Compiled {
    rows: PolicyRows,
    book: RuleBook,
    reports: Vec<Report>,
    /// For each list of rules, the row that denies everything.
    denials: BTreeMap<RulesId, VerdictRow>,
    classes: Numbers<ClassContent>,
    lists: Numbers<Arc<RuleList>>,
    sets: Numbers<PortSet>,
    owners: Numbers<RuleOwner>,
    /// The class of each region of addresses that are nobody's in particular.
    regions: Regions<Class>,
    asks_for_namespaces: bool,
    mask: u32,
}

impl Default for Compiled {
    fn default() -> Self {
        Self::with_hash_bits(u32::BITS)
    }
}

impl Compiled {
    /// No policy at all, before a first compilation in which, and after which, only so many bits of
    /// every hash are used. For tests of what happens when contents collide.
    pub fn with_hash_bits(bits: u32) -> Self {
        Self {
            rows: PolicyRows::default(),
            book: RuleBook::default(),
            reports: Vec::new(),
            denials: BTreeMap::new(),
            classes: Numbers::default(),
            lists: Numbers::default(),
            sets: Numbers::default(),
            owners: Numbers::default(),
            regions: Regions::default(),
            asks_for_namespaces: false,
            mask: u32::MAX
                .checked_shr(u32::BITS.saturating_sub(bits))
                .unwrap_or(0),
        }
    }

    /// What the tables should hold.
    pub fn rows(&self) -> &PolicyRows {
        &self.rows
    }

    /// What the rule numbers in the rows mean.
    pub fn book(&self) -> &RuleBook {
        &self.book
    }

    /// The number under which a list of rules denies: its owner names the policies that isolate.
    pub fn denying_rule(&self, rules: RulesId) -> Option<RuleId> {
        self.denials.get(&rules).map(|row| row.rule)
    }

    /// Does any selector ask for the labels of namespaces?
    pub fn asks_for_namespaces(&self) -> bool {
        self.asks_for_namespaces
    }

    /// What a person should know, in order, each once.
    pub fn reports(&self) -> &[Report] {
        &self.reports
    }
}

/// Compiles the policy of a node.
///
/// `kept` are policies that no longer exist and still hold, see [`Retained`]. `previous` is the last
/// compilation, or the default: numbers in it keep their meaning.
///
/// Only policies that isolate a pod of this node take part, so the size of the tables does not depend
/// on what policies the rest of the cluster has. When a first pod of a policy arrives, the classes of
/// exactly the addresses that the policy's selectors match change.
pub fn compile(
    snapshot: &Snapshot,
    node: &NodeView,
    kept: &[Arc<Policy>],
    previous: &Compiled,
) -> Compiled {
    let policies = policies(snapshot, kept);
    let pods = rules_of_pods(snapshot, node, &policies);
    let lists: BTreeSet<Arc<RuleList>> = pods.values().flatten().flatten().cloned().collect();
    let owners = lists
        .iter()
        .flat_map(|list| {
            let rules = list.rules().map(|(owner, _)| owner);
            rules.chain([list.isolation()])
        })
        .collect();
    let owners = Numbers::assign(owners, &previous.owners, previous.mask);
    let lists = Numbers::assign(lists, &previous.lists, previous.mask);

    let dns = Dns::new();
    let mut predicates = predicates(&lists);
    predicates.extend(numbers_of_names(&lists, snapshot, &dns));
    let asks_for_namespaces = predicates.iter().any(|it| it.asks_for_namespaces());
    let mut classifier = Classifier::new(predicates, &snapshot.namespaces);
    let (holders, mut all_reports) = holders(snapshot, node);
    let facts = facts(&holders, &mut classifier, &dns);
    let regions = classifier.regions().clone();
    let of_regions = regions.iter().map(|(_, facts)| facts);
    let mut distinct: BTreeSet<&Facts> = facts.values().chain(of_regions).collect();
    // Of whom nothing is true that any policy of this node asks, it is what the world is.
    distinct.retain(|facts| !facts.is_empty());
    let classes = distinct
        .iter()
        .map(|facts| classifier.content(facts))
        .collect();
    let classes = Numbers::assign(classes, &previous.classes, previous.mask);
    let number = |facts: &Facts| Class(classes.number(&classifier.content(facts)));
    let numbered: BTreeMap<&Facts, Class> = distinct
        .iter()
        .map(|facts| (*facts, number(facts)))
        .collect();
    let class = |facts: &Facts| numbered.get(facts).copied().unwrap_or(Class::WORLD);
    let regions = regions.map(class);

    let mut cells: Vec<(VerdictKey, Cell, RuleId)> = Vec::new();
    let mut denials = BTreeMap::new();
    let mut port_sets = PortSets::default();
    for (list, rules) in lists.iter() {
        let rules = RulesId(rules);
        let mut judge = Judge::new(list, &classifier, &owners);
        denials.insert(rules, judge.denial_row());
        let world: (&[usize], Class) = (&[], Class::WORLD);
        for (facts, class) in numbered.iter().map(|(f, c)| (&***f, *c)).chain([world]) {
            let cell = judge.cell(facts, &classifier, &mut port_sets);
            cells.push((VerdictKey { rules, class }, cell, judge.denial));
        }
    }
    let port_sets = port_sets.into_order();
    let sets = port_sets.iter().cloned().collect();
    let sets = Numbers::assign(sets, &previous.sets, previous.mask);
    let set_numbers: Vec<u32> = port_sets.iter().map(|set| sets.number(set)).collect();

    let pod_rules = |[ingress, egress]: &[Option<Arc<RuleList>>; 2]| {
        let id = |list: &Option<Arc<RuleList>>| match list {
            None => RulesId::OPEN,
            Some(list) => RulesId(lists.number(list)),
        };
        PodRules {
            ingress: id(ingress),
            egress: id(egress),
        }
    };
    let class_of = |(addr, holder): (&Addr, &Holder<'_>)| {
        let class = match holder {
            Holder::OwnNode => Class::OWN_NODE,
            _ => facts.get(addr).map_or(Class::WORLD, class),
        };
        // No row says the same, and the table does not grow with pods that no policy of this node tells apart.
        (class != Class::WORLD).then_some((*addr, class))
    };
    let rows = PolicyRows {
        classes: holders.iter().filter_map(class_of).collect(),
        cidrs: region::rows(regions.iter().map(|(net, class)| (*net, *class))),
        verdicts: cells
            .into_iter()
            .map(|(key, cell, denial)| (key, row(cell, denial, &set_numbers)))
            .collect(),
        ports: sets.iter().flat_map(|(set, n)| set.rows(n)).collect(),
        rules: pods
            .iter()
            .map(|(pod, lists)| ((*pod).clone(), pod_rules(lists)))
            .collect(),
    };
    all_reports.extend(
        policies
            .values()
            .flatten()
            .flat_map(|policy| reports(policy)),
    );
    all_reports.sort();
    all_reports.dedup();
    Compiled {
        rows,
        book: RuleBook(owners.iter().map(|(o, n)| (RuleId(n), o.clone())).collect()),
        reports: all_reports,
        denials,
        classes,
        lists,
        sets,
        owners,
        regions,
        asks_for_namespaces,
        mask: previous.mask,
    }
}

/// The pods that people select in policies when they mean cluster DNS, and what those call their ports.
struct Dns {
    namespace: Arc<str>,
    labels: Labels,
    ports: [ContainerPort; 2],
}

impl Dns {
    fn new() -> Self {
        let port = |name: &str, protocol| ContainerPort {
            name: Some(name.into()),
            protocol,
            port: 53,
            host: None,
        };
        Self {
            namespace: "kube-system".into(),
            labels: Labels::from([("k8s-app".into(), "kube-dns".into())]),
            ports: [port("dns", Protocol::UDP), port("dns-tcp", Protocol::TCP)],
        }
    }
}

type PoliciesByNamespace<'a> = HashMap<&'a str, Vec<&'a Policy>>;

/// All policies that hold, in the order of their names. One that exists comes before a kept one.
fn policies<'a>(snapshot: &'a Snapshot, kept: &'a [Arc<Policy>]) -> PoliciesByNamespace<'a> {
    let kept = kept
        .iter()
        .filter(|p| !snapshot.policies.contains_key(&p.id));
    let all: BTreeMap<&ObjectName, &Policy> = snapshot
        .policies
        .values()
        .chain(kept)
        .map(|policy| (&policy.id, &**policy))
        .collect();
    let mut by_namespace = PoliciesByNamespace::new();
    for (id, policy) in all {
        by_namespace.entry(&id.namespace).or_default().push(policy);
    }
    by_namespace
}

/// The lists of rules, ingress and egress, of every pod whose policy this node enforces; `None` where
/// no policy isolates it.
fn rules_of_pods<'a>(
    snapshot: &'a Snapshot,
    node: &NodeView,
    policies: &PoliciesByNamespace<'_>,
) -> BTreeMap<&'a ObjectName, [Option<Arc<RuleList>>; 2]> {
    let mut resolved: HashMap<(&ObjectName, Direction), Option<Arc<PolicyRules>>> = HashMap::new();
    let mut of_pods = BTreeMap::new();
    for pod in snapshot.pods.values().filter(|pod| node.enforces(pod)) {
        let selecting: Vec<&Policy> = policies
            .get(&*pod.id.namespace)
            .into_iter()
            .flatten()
            .filter(|policy| policy.subject.matches(&pod.labels))
            .copied()
            .collect();
        let lists = [Direction::Ingress, Direction::Egress].map(|direction| {
            let rules = |policy: &&'_ Policy| resolve(policy, direction, &pod.ports).map(Arc::new);
            let policies: Vec<Arc<PolicyRules>> = selecting
                .iter()
                .filter_map(|policy| {
                    if names_ports(policy, direction) {
                        return rules(policy);
                    }
                    let known = resolved.entry((&policy.id, direction));
                    known.or_insert_with(|| rules(policy)).clone()
                })
                .collect();
            (!policies.is_empty()).then(|| {
                Arc::new(RuleList {
                    direction,
                    policies,
                })
            })
        });
        of_pods.insert(&pod.id, lists);
    }
    of_pods
}

/// Every predicate that some list asks.
fn predicates(lists: &Numbers<Arc<RuleList>>) -> BTreeSet<Arc<predicate::Predicate>> {
    lists
        .iter()
        .flat_map(|(list, _)| list.rules())
        .filter_map(|(_, rule)| match &rule.peers {
            ResolvedPeers::Any => None,
            ResolvedPeers::Of(predicates) => Some(predicates),
        })
        .flatten()
        .cloned()
        .collect()
}

/// The numbers that pods mean by the names of ports that lists ask.
fn numbers_of_names(
    lists: &Numbers<Arc<RuleList>>,
    snapshot: &Snapshot,
    dns: &Dns,
) -> BTreeSet<Arc<Predicate>> {
    let names: BTreeSet<&PortName> = lists.iter().flat_map(|(list, _)| list.names()).collect();
    if names.is_empty() {
        return BTreeSet::new();
    }
    let pods = snapshot.pods.values().map(|pod| &pod.ports[..]);
    pods.chain([&dns.ports[..]])
        .flat_map(|ports| {
            names
                .iter()
                .filter_map(|name| Some((*name, name.on(ports)?)))
        })
        .collect::<BTreeSet<(&PortName, u16)>>()
        .into_iter()
        .map(|(name, number)| Arc::new(Predicate::Port(name.clone(), number)))
        .collect()
}

/// What holds for each address, those of this node aside.
fn facts<'a>(
    holders: &BTreeMap<Addr, Holder<'a>>,
    classifier: &mut Classifier<'a>,
    dns: &'a Dns,
) -> BTreeMap<Addr, Facts> {
    holders
        .iter()
        .filter_map(|(addr, holder)| {
            let address = IpAddr::from(*addr);
            let facts = match *holder {
                Holder::OwnNode => return None,
                Holder::Node => classifier.of_address(address),
                Holder::Dns => classifier.of_pod(address, &dns.namespace, &dns.labels, &dns.ports),
                Holder::Pod(Pod {
                    id, labels, ports, ..
                }) => classifier.of_pod(address, &id.namespace, labels, ports),
            };
            Some((*addr, facts))
        })
        .collect()
}

fn row(cell: Cell, denial: RuleId, set_numbers: &[u32]) -> VerdictRow {
    let (action, ports, rule) = match cell {
        Cell::Deny => (Action::DENY, 0, denial),
        Cell::Allow(rule) => (Action::ALLOW, 0, rule),
        Cell::ByPort(set) => (Action::BY_PORT, set_numbers[set], denial),
    };
    VerdictRow {
        action,
        ports,
        rule,
        ..VerdictRow::default()
    }
}
