//! What a list of rules answers to a class: one decision for every packet there is.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use weir_common::Protocol;
use weir_common::policy::{Action, RuleId, RulesId};

use super::class::{Class, Fact, Facts};
use super::number::Numbers;
use super::ports::PortSpan;
use super::predicate::{PortName, Predicate};
use super::question::Questions;
use super::rules::{ResolvedPeers, ResolvedPorts, RuleList, Stage};
use super::{Direction, RuleOwner};
use crate::model::RuleAction;

/// Yes or no, and by which rule.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub(super) struct Decision {
    pub(super) allows: bool,
    /// Of a no: is it one that no namespace softens for what is established? The Admin tier's, which is not its owner's.
    pub(super) is_final: bool,
    pub(super) rule: RuleId,
    /// Of a yes: who would say no, were policies that are only audited enforced.
    pub(super) audit: RuleId,
}

/// The decision about every packet, in one form.
#[derive(Clone, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub(super) struct Answer {
    /// About packets of protocols that are not in `ports`, those without ports among them.
    pub(super) others: Decision,
    /// For each protocol about which there is more to say: where each run of ports begins, and what holds for it.
    pub(super) ports: BTreeMap<Protocol, Vec<(u16, Decision)>>,
}

impl Decision {
    /// No policy takes part.
    pub(super) const OPEN: Self = Self {
        allows: true,
        is_final: false,
        rule: RuleId::NONE,
        audit: RuleId::NONE,
    };

    fn new(allows: bool, rule: RuleId) -> Self {
        Self {
            allows,
            rule,
            ..Self::OPEN
        }
    }

    /// What a row says.
    pub(super) fn action(self) -> Action {
        match (self.allows, self.is_final) {
            (true, _) => Action::ALLOW,
            (false, false) => Action::DENY,
            (false, true) => Action::END,
        }
    }

    /// Yes where both say so. The rule is the later one's, but for a no that only the earlier one says.
    fn meet(self, later: Self) -> Self {
        match later.allows && !self.allows {
            true => self,
            false => later,
        }
    }
}

impl Answer {
    /// The same for every packet.
    pub(super) fn always(others: Decision) -> Self {
        Self {
            others,
            ports: BTreeMap::new(),
        }
    }

    /// What `decide` says. It decides alike about ports between which none of `spans` begins or ends, and about all protocols of
    /// which there is none.
    pub(super) fn of(
        spans: impl Iterator<Item = PortSpan>,
        decide: impl Fn(Option<(Protocol, u16)>) -> Decision,
    ) -> Self {
        let mut cuts: BTreeMap<Protocol, BTreeSet<u16>> = BTreeMap::new();
        for span in spans {
            let cuts = cuts.entry(span.protocol).or_insert_with(|| [0].into());
            cuts.insert(span.first);
            cuts.extend(span.last.checked_add(1));
        }
        let cuts = cuts.into_iter();
        let ports = cuts.map(|(protocol, cuts)| {
            let decided = cuts.into_iter();
            let decided = decided.map(|port| (port, decide(Some((protocol, port)))));
            (protocol, decided.collect())
        });
        Self::canonical(decide(None), ports.collect())
    }

    /// What both allow, see [`Decision::meet`].
    pub(super) fn meet(&self, later: &Self) -> Self {
        let protocols: BTreeSet<Protocol> = self
            .ports
            .keys()
            .chain(later.ports.keys())
            .copied()
            .collect();
        let of_protocol = |protocol: &Protocol| {
            let (ours, theirs) = (self.runs(protocol), later.runs(protocol));
            let starts: BTreeSet<u16> = ours.iter().chain(theirs.iter()).map(|it| it.0).collect();
            let at = |runs: &[(u16, Decision)], port: u16| {
                let run = runs.partition_point(|(start, _)| *start <= port);
                runs[run - 1].1
            };
            let met = |port: u16| (port, at(&ours, port).meet(at(&theirs, port)));
            (*protocol, starts.into_iter().map(met).collect())
        };
        let ports = protocols.iter().map(of_protocol).collect();
        Self::canonical(self.others.meet(later.others), ports)
    }

    /// About one packet. The port of a protocol without ports is not looked at.
    pub(super) fn at(&self, (protocol, port): (Protocol, u16)) -> Decision {
        let runs = self.ports.get(&protocol).map_or(&[][..], |it| it);
        let begun = runs.iter().rev().find(|(start, _)| *start <= port);
        begun.map_or(self.others, |(_, decision)| *decision)
    }

    /// Where runs of ports of a protocol begin; the first at 0.
    pub(super) fn starts(&self, protocol: Protocol) -> Vec<u16> {
        self.runs(&protocol)
            .into_iter()
            .map(|(start, _)| start)
            .collect()
    }

    /// Every run of ports of a protocol; the first begins at 0.
    fn runs(&self, protocol: &Protocol) -> Vec<(u16, Decision)> {
        let runs = self.ports.get(protocol);
        runs.cloned().unwrap_or_else(|| vec![(0, self.others)])
    }

    fn canonical(others: Decision, mut ports: BTreeMap<Protocol, Vec<(u16, Decision)>>) -> Self {
        for runs in ports.values_mut() {
            runs.dedup_by_key(|(_, decision)| *decision);
        }
        ports.retain(|_, runs| !matches!(runs[..], [(_, only)] if only == others));
        Self { others, ports }
    }
}

/// A list of rules, with its number, ready to answer.
#[derive(Debug)]
pub(super) struct Judge {
    pub(super) list: Arc<RuleList>,
    pub(super) number: RulesId,
    rules: Vec<Rule>,
    /// Positions of the rules that are for everybody.
    for_all: Vec<usize>,
    /// Positions of the rules that ask this.
    asking: HashMap<Fact, Vec<usize>>,
    /// The names of ports whose numbers depend on the class.
    names: BTreeSet<PortName>,
    /// What becomes of packets of an isolated pod that no rule allows.
    pub(super) denial: Option<RuleId>,
    /// The same, were those policies enforced that are only audited; of a list without such it is not asked.
    audited_denial: Option<RuleId>,
    audits: bool,
    /// The answer to those of whom nothing is true.
    pub(super) to_the_world: Answer,
}

#[derive(Debug)]
struct Rule {
    stage: Stage,
    action: RuleAction,
    is_audit: bool,
    id: RuleId,
    ports: ResolvedPorts,
}

impl Judge {
    pub(super) fn new(
        list: &Arc<RuleList>,
        number: RulesId,
        questions: &Questions,
        owners: &Numbers<RuleOwner>,
    ) -> Self {
        let id = |owner: &RuleOwner| RuleId(owners.number(owner).unwrap_or_default());
        let mut for_all = Vec::new();
        let mut asking: HashMap<Fact, Vec<usize>> = HashMap::new();
        let mut rules = Vec::new();
        for (position, asked) in list.rules().enumerate() {
            match &asked.rule.peers {
                ResolvedPeers::Any => for_all.push(position),
                ResolvedPeers::Of(predicates) => {
                    for predicate in predicates {
                        let fact = questions.fact(predicate).cloned();
                        let fact = fact.unwrap_or_else(|| Fact::new(predicate.clone()));
                        asking.entry(fact).or_default().push(position);
                    }
                }
            }
            rules.push(Rule {
                stage: asked.stage,
                action: asked.action,
                is_audit: asked.is_audit,
                id: id(&asked.owner),
                ports: asked.rule.ports.clone(),
            });
        }
        let mut judge = Self {
            number,
            rules,
            for_all,
            asking,
            names: list.names().cloned().collect(),
            denial: list.isolation().map(|owner| id(&owner)),
            audited_denial: list.audited_isolation().map(|owner| id(&owner)),
            audits: list.audits(),
            to_the_world: Answer::always(Decision::OPEN),
            list: list.clone(),
        };
        judge.to_the_world = judge.answer(&Class::world());
        judge
    }

    /// Who a decision is of.
    pub(super) fn owner(&self, rule: RuleId) -> Option<RuleOwner> {
        let owners = self.list.rules().map(|asked| asked.owner);
        let mut owned = self.rules.iter().map(|it| it.id).zip(owners);
        let of_rule = owned.find(|(id, _)| *id == rule).map(|(_, owner)| owner);
        of_rule.or_else(|| {
            if self.denial == Some(rule) {
                return self.list.isolation();
            }
            let audited = self.audits && self.audited_denial == Some(rule);
            audited.then(|| self.list.audited_isolation()).flatten()
        })
    }

    /// Rules that pass a packet on to the next tier, in the order in which they are asked.
    pub(super) fn passes(&self, facts: &Facts, packet: (Protocol, u16)) -> Vec<RuleOwner> {
        let mut passes = Vec::new();
        for stage in [Stage::Admin, Stage::Baseline] {
            if stage == Stage::Baseline && self.denial.is_some() {
                break;
            }
            let mut of_stage = self
                .list
                .rules()
                .filter(|asked| asked.stage == stage && !asked.is_audit);
            let first = of_stage.find(|asked| {
                asked.rule.peers.include(facts) && asked.rule.ports.contain(facts, packet)
            });
            match first {
                Some(first) if first.action == RuleAction::Pass => passes.push(first.owner),
                Some(_) => break,
                None => {}
            }
        }
        passes
    }

    /// Does an answer depend on it?
    pub(super) fn asks(&self, fact: &Fact) -> bool {
        self.asking.contains_key(fact)
            || matches!(fact.predicate(), Predicate::Port(name, _) if self.names.contains(name))
    }

    /// Is the answer to a class another than that to the world?
    pub(super) fn tells_apart(&self, class: &Class) -> bool {
        match class {
            Class::OwnNode => true,
            Class::Of(facts) => facts.iter().any(|fact| self.asks(fact)),
        }
    }

    pub(super) fn answer(&self, class: &Class) -> Answer {
        let facts = match class {
            // What comes from the node itself is not asked about; what only says that it does is the world's.
            Class::OwnNode if self.list.direction == Direction::Ingress => {
                return self.to_the_world.clone();
            }
            Class::OwnNode => return Answer::always(Decision::OPEN),
            Class::Of(facts) => facts,
        };
        let asked = facts.iter().filter_map(|fact| self.asking.get(fact));
        let mut matching: Vec<usize> = asked.flatten().chain(&self.for_all).copied().collect();
        matching.sort_unstable();
        matching.dedup();
        let numbers = numbers(facts);
        let rules = matching.into_iter().map(|position| &self.rules[position]);
        let rules: Vec<(&Rule, Spans)> = rules
            .map(|rule| (rule, Spans::of(&rule.ports, &numbers)))
            .collect();
        let spans = rules.iter().flat_map(|(_, spans)| spans.iter());
        Answer::of(spans, |port| self.decide(&rules, port))
    }

    fn decide(&self, rules: &[(&Rule, Spans)], port: Option<(Protocol, u16)>) -> Decision {
        let decided = Self::ask(rules, self.denial, port, |rule| !rule.is_audit);
        if !self.audits || !decided.allows {
            return decided;
        }
        let audited = Self::ask(rules, self.audited_denial, port, |_| true);
        Decision {
            audit: match audited.allows {
                true => RuleId::NONE,
                false => audited.rule,
            },
            ..decided
        }
    }

    /// Admin, then the NetworkPolicies if there are any, else Baseline; and what nobody decides is allowed. Only rules that count
    /// are asked.
    fn ask(
        rules: &[(&Rule, Spans)],
        denial: Option<RuleId>,
        port: Option<(Protocol, u16)>,
        counts: impl Fn(&Rule) -> bool,
    ) -> Decision {
        let of_stage = |stage| {
            let counting = rules.iter().filter(|(rule, _)| counts(rule));
            counting.filter(move |(rule, _)| rule.stage == stage)
        };
        let first = |stage| {
            let mut of_stage = of_stage(stage);
            let (rule, _) = of_stage.find(|(_, spans)| spans.contain(port))?;
            let allows = match rule.action {
                RuleAction::Accept => true,
                RuleAction::Deny => false,
                RuleAction::Pass => return None,
            };
            Some(Decision {
                is_final: !allows && stage == Stage::Admin,
                ..Decision::new(allows, rule.id)
            })
        };
        if let Some(decided) = first(Stage::Admin) {
            return decided;
        }
        if let Some(denial) = denial {
            // Policies add up. A rule for every port is named before others, for then no set of ports has to be asked.
            let for_all = of_stage(Stage::Policies).find(|(_, spans)| matches!(spans, Spans::Any));
            let for_all = for_all.map(|(rule, _)| Decision::new(true, rule.id));
            return for_all
                .or_else(|| first(Stage::Policies))
                .unwrap_or(Decision::new(false, denial));
        }
        first(Stage::Baseline).unwrap_or(Decision::OPEN)
    }
}

/// What a class means by names of ports.
fn numbers(facts: &Facts) -> BTreeMap<&PortName, u16> {
    let numbers = facts.iter().filter_map(|fact| match fact.predicate() {
        Predicate::Port(name, number) => Some((name, *number)),
        _ => None,
    });
    numbers.collect()
}

impl ResolvedPeers {
    /// Is a class of which this is true among them?
    pub(super) fn include(&self, facts: &Facts) -> bool {
        match self {
            Self::Any => true,
            Self::Of(predicates) => predicates
                .iter()
                .any(|predicate| facts.contains(&Fact::new(predicate.clone()))),
        }
    }
}

impl ResolvedPorts {
    /// Is a packet to or from a class of which this is true among them?
    pub(super) fn contain(&self, facts: &Facts, packet: (Protocol, u16)) -> bool {
        Spans::of(self, &numbers(facts)).contain(Some(packet))
    }
}

/// The ports of a rule for one class.
enum Spans {
    Any,
    Of(Vec<PortSpan>),
}

impl Spans {
    fn of(ports: &ResolvedPorts, numbers: &BTreeMap<&PortName, u16>) -> Self {
        match ports {
            ResolvedPorts::Any => Self::Any,
            ResolvedPorts::Of { spans, names } => {
                let named = names.iter().filter_map(|name| {
                    let number = numbers.get(name)?;
                    Some(PortSpan::one(name.protocol, *number))
                });
                Self::Of(spans.iter().copied().chain(named).collect())
            }
        }
    }

    fn iter(&self) -> impl Iterator<Item = PortSpan> {
        let spans = match self {
            Self::Any => &[][..],
            Self::Of(spans) => spans,
        };
        spans.iter().copied()
    }

    /// `None` is a packet of no protocol that is named anywhere.
    fn contain(&self, port: Option<(Protocol, u16)>) -> bool {
        match (self, port) {
            (Self::Any, _) => true,
            (Self::Of(_), None) => false,
            (Self::Of(spans), Some((protocol, port))) => {
                let is_in = |it: &PortSpan| it.first <= port && port <= it.last;
                spans.iter().any(|it| it.protocol == protocol && is_in(it))
            }
        }
    }
}
