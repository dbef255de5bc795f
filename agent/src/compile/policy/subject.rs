//! The pods whose policy this node enforces, and the lists of rules that they have. What a list says is in `rules`.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use super::claim::NodeView;
use super::predicate::NamespaceView;
use super::retain::Retained;
use super::rules::{
    ClusterRules, PolicyRules, RuleList, names_ports, names_ports_in_tier, resolve,
};
use super::{Direction, Report, Touched};
use crate::model::{ClusterPolicy, ObjectName, Pod, Policy, Snapshot, Tier};

/// The lists of a pod, of ingress and of egress; `None` where no policy says anything.
pub(super) type Lists = [Option<Arc<RuleList>>; 2];

/// Pods of this node, policies, and who has which rules.
#[derive(Debug, Default)]
pub(super) struct Subjects {
    pods: BTreeMap<ObjectName, Subject>,
    policies: BTreeMap<ObjectName, Arc<Policy>>,
    /// In the order in which they are asked.
    cluster_policies: BTreeMap<Rank, Arc<ClusterPolicy>>,
    ranks: HashMap<Arc<str>, Rank>,
    retained: Retained,
    /// Lists that some pod has, and how many do.
    lists: BTreeMap<Arc<RuleList>, usize>,
    /// Rules that are the same for every pod that has them.
    resolved: HashMap<(ObjectName, Direction), Option<Arc<PolicyRules>>>,
    /// The same of ClusterNetworkPolicies.
    resolved_tiers: HashMap<(Arc<str>, Direction), Option<Arc<ClusterRules>>>,
    reports: BTreeMap<ObjectName, Vec<Report>>,
}

/// Tier, priority, name.
type Rank = (Tier, u16, Arc<str>);

#[derive(Debug)]
struct Subject {
    pod: Arc<Pod>,
    lists: Lists,
}

/// Lists that came, and such that no pod has any more.
#[derive(Debug, Default)]
pub(super) struct ListDelta {
    pub(super) come: BTreeSet<Arc<RuleList>>,
    pub(super) gone: BTreeSet<Arc<RuleList>>,
}

impl Subjects {
    /// Takes in what was touched. The pods whose lists are others now are added.
    pub(super) fn update(
        &mut self,
        touched: &Touched,
        snapshot: &Snapshot,
        node: &NodeView,
        changed: &mut BTreeSet<ObjectName>,
    ) -> ListDelta {
        let mut stale: BTreeSet<ObjectName> = BTreeSet::new();
        let mut left: Vec<Arc<RuleList>> = Vec::new();
        let mut namespaces: BTreeSet<Arc<str>> = BTreeSet::new();
        for name in &touched.pods {
            match snapshot.pods.get(name).filter(|pod| node.enforces(pod)) {
                Some(pod) => {
                    let lists = self.pods.remove(name).map(|it| it.lists);
                    if lists.is_none() {
                        changed.insert(name.clone());
                    }
                    let subject = Subject {
                        pod: pod.clone(),
                        lists: lists.unwrap_or_default(),
                    };
                    self.pods.insert(name.clone(), subject);
                    stale.insert(name.clone());
                }
                None => {
                    if let Some(gone) = self.pods.remove(name) {
                        changed.insert(name.clone());
                        left.extend(gone.lists.into_iter().flatten());
                    }
                }
            }
            namespaces.insert(name.namespace.clone());
        }
        let with_pods = |namespace: &Arc<str>, pods: &BTreeMap<ObjectName, Subject>| {
            pods.keys().any(|pod| pod.namespace == *namespace)
        };
        for name in &touched.policies {
            let pods = &self.pods;
            let policy = match snapshot.policies.get(name) {
                Some(policy) => Some(policy.clone()),
                None => {
                    let gone = self.policies.get(name);
                    gone.filter(|_| {
                        self.retained.keeps(name, snapshot) && with_pods(&name.namespace, pods)
                    })
                    .cloned()
                }
            };
            self.know_policy(name, policy, snapshot);
            self.touch_namespace(&name.namespace, &mut stale);
        }
        namespaces.extend(touched.namespaces.iter().cloned());
        namespaces.extend(touched.policies.iter().map(|it| it.namespace.clone()));
        for namespace in &namespaces {
            let is_needed = with_pods(namespace, &self.pods);
            let released = self.retained.observe(namespace, is_needed, snapshot);
            for policy in released {
                self.know_policy(&policy, None, snapshot);
                self.touch_namespace(namespace, &mut stale);
            }
        }
        for name in &touched.cluster_policies {
            for direction in [Direction::Ingress, Direction::Egress] {
                self.resolved_tiers.remove(&(name.clone(), direction));
            }
            let before = self
                .ranks
                .remove(name)
                .map(|it| self.cluster_policies.remove(&it));
            let after = snapshot.cluster_policies.get(name);
            if let Some(policy) = after {
                let rank = (policy.tier, policy.priority, name.clone());
                self.ranks.insert(name.clone(), rank.clone());
                self.cluster_policies.insert(rank, policy.clone());
            }
            if before.flatten().as_ref() != after {
                stale.extend(self.pods.keys().cloned());
            }
        }
        if !self.cluster_policies.is_empty() {
            for namespace in &touched.namespaces {
                self.touch_namespace(namespace, &mut stale);
            }
        }
        self.list_again(stale, left, snapshot, changed)
    }

    /// The lists of a pod of this node.
    pub(super) fn lists(&self, pod: &ObjectName) -> Option<&Lists> {
        self.pods.get(pod).map(|it| &it.lists)
    }

    /// Policies that are enforced, whether they exist or are kept, in the order of their names.
    pub(super) fn policies(&self) -> impl Iterator<Item = &Arc<Policy>> {
        self.policies.values()
    }

    pub(super) fn selected_by(&self, policy: &Policy) -> Vec<&ObjectName> {
        let pods = self.pods.iter().filter(|(_, it)| selects(policy, &it.pod));
        pods.map(|(name, _)| name).collect()
    }

    pub(super) fn selected_by_cluster_policy(
        &self,
        policy: &ClusterPolicy,
        snapshot: &Snapshot,
    ) -> Vec<&ObjectName> {
        let mut views = HashMap::new();
        let pods = self.pods.iter().filter(|(_, subject)| {
            let namespace = &subject.pod.id.namespace;
            let view = views.entry(namespace.clone()).or_insert_with(|| {
                let known = snapshot.namespaces.get(namespace);
                NamespaceView::new(namespace, known.map(|it| &**it))
            });
            view.is_meant(&policy.subject, &subject.pod.labels)
        });
        pods.map(|(name, _)| name).collect()
    }

    pub(super) fn reports(&self) -> impl Iterator<Item = &Report> {
        self.reports.values().flatten()
    }

    fn know_policy(&mut self, name: &ObjectName, policy: Option<Arc<Policy>>, snapshot: &Snapshot) {
        for direction in [Direction::Ingress, Direction::Egress] {
            self.resolved.remove(&(name.clone(), direction));
        }
        let found: Vec<Report> = policy
            .iter()
            .flat_map(|it| super::rules::reports(it))
            .collect();
        match found.is_empty() {
            true => self.reports.remove(name),
            false => self.reports.insert(name.clone(), found),
        };
        match policy {
            None => {
                self.policies.remove(name);
            }
            Some(policy) => {
                self.retained
                    .know(name, snapshot.policies.contains_key(name));
                self.policies.insert(name.clone(), policy);
            }
        }
    }

    fn touch_namespace(&self, namespace: &Arc<str>, stale: &mut BTreeSet<ObjectName>) {
        let pods = self.pods.keys();
        stale.extend(pods.filter(|pod| pod.namespace == *namespace).cloned());
    }

    /// Finds the lists of these pods again.
    fn list_again(
        &mut self,
        pods: BTreeSet<ObjectName>,
        mut left: Vec<Arc<RuleList>>,
        snapshot: &Snapshot,
        changed: &mut BTreeSet<ObjectName>,
    ) -> ListDelta {
        let mut delta = ListDelta::default();
        let mut views = HashMap::new();
        for name in pods {
            let Some(pod) = self.pods.get(&name).map(|it| it.pod.clone()) else {
                continue;
            };
            let namespace = &pod.id.namespace;
            let view = views.entry(namespace.clone()).or_insert_with(|| {
                let known = snapshot.namespaces.get(namespace);
                NamespaceView::new(namespace, known.map(|it| &**it))
            });
            let after = self.lists_of(&pod, view);
            let after = after.map(|list| list.map(|list| self.take(list, &mut delta)));
            if let Some(subject) = self.pods.get_mut(&name) {
                if subject.lists != after {
                    changed.insert(name);
                }
                left.extend(
                    std::mem::replace(&mut subject.lists, after)
                        .into_iter()
                        .flatten(),
                );
            }
        }
        for list in left {
            self.leave(list, &mut delta);
        }
        delta
    }

    fn lists_of(&mut self, pod: &Pod, namespace: &NamespaceView) -> Lists {
        let selecting = self.policies.values().filter(|it| selects(it, pod));
        let selecting: Vec<Arc<Policy>> = selecting.cloned().collect();
        let tiers = self.cluster_policies.values();
        let tiers: Vec<Arc<ClusterPolicy>> = tiers
            .filter(|policy| namespace.is_meant(&policy.subject, &pod.labels))
            .cloned()
            .collect();
        [Direction::Ingress, Direction::Egress].map(|direction| {
            let rules = |policy: &Policy| resolve(policy, direction, &pod.ports).map(Arc::new);
            let policies: Vec<Arc<PolicyRules>> = selecting
                .iter()
                .filter_map(|policy| {
                    if names_ports(policy, direction) {
                        return rules(policy);
                    }
                    let known = self.resolved.entry((policy.id.clone(), direction));
                    known.or_insert_with(|| rules(policy)).clone()
                })
                .collect();
            let known = &mut self.resolved_tiers;
            let mut of_tier = |tier: Tier| {
                let tiers = tiers.iter().filter(|policy| policy.tier == tier);
                let rules = tiers.filter_map(|policy| {
                    let rules = || ClusterRules::of(policy, direction, &pod.ports).map(Arc::new);
                    if names_ports_in_tier(policy, direction) {
                        return rules();
                    }
                    let known = known.entry((policy.name.clone(), direction));
                    known.or_insert_with(rules).clone()
                });
                rules.collect::<Vec<_>>()
            };
            let list = RuleList {
                direction,
                admin: of_tier(Tier::Admin),
                policies,
                baseline: of_tier(Tier::Baseline),
            };
            (!list.is_empty()).then(|| Arc::new(list))
        })
    }

    /// One more pod has the list.
    fn take(&mut self, list: Arc<RuleList>, delta: &mut ListDelta) -> Arc<RuleList> {
        if let Some((known, _)) = self.lists.get_key_value(&list) {
            let known = known.clone();
            self.lists
                .entry(known.clone())
                .and_modify(|pods| *pods += 1);
            return known;
        }
        self.lists.insert(list.clone(), 1);
        if !delta.gone.remove(&list) {
            delta.come.insert(list.clone());
        }
        list
    }

    fn leave(&mut self, list: Arc<RuleList>, delta: &mut ListDelta) {
        let Some(pods) = self.lists.get_mut(&list) else {
            return;
        };
        *pods -= 1;
        if *pods == 0 {
            self.lists.remove(&list);
            if !delta.come.remove(&list) {
                delta.gone.insert(list);
            }
        }
    }
}

/// Does a NetworkPolicy isolate a pod?
fn selects(policy: &Policy, pod: &Pod) -> bool {
    policy.id.namespace == pod.id.namespace && policy.subject.matches(&pod.labels)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{
        ClusterRule, ContainerPort, Peers, PodNetwork, PodPeers, PodPhase, PortMatch, PortRange,
        Ports, Rule, RuleAction, Selector,
    };
    use weir_common::Protocol;

    fn pod(name: &str, port: u16) -> Pod {
        Pod {
            id: ObjectName::new("shop", name),
            uid: name.into(),
            static_uid: None,
            labels: [("app".into(), name.into())].into(),
            node: Some("n1".into()),
            addresses: Vec::new(),
            network: PodNetwork::Own,
            phase: PodPhase::Running,
            ready: true,
            hostname: None,
            subdomain: None,
            ports: vec![ContainerPort {
                name: Some("web".into()),
                protocol: Protocol::TCP,
                port,
                host: None,
            }],
        }
    }

    fn walls(ports: Ports) -> ClusterPolicy {
        let everybody = || PodPeers {
            namespaces: Some(Selector::default()),
            pods: Selector::default(),
        };
        ClusterPolicy {
            name: "walls".into(),
            tier: Tier::Admin,
            priority: 1,
            subject: everybody(),
            ingress: vec![ClusterRule {
                name: None,
                action: RuleAction::Deny,
                rule: Rule {
                    peers: Peers::Any,
                    ports,
                },
            }],
            egress: Vec::new(),
            is_audit: false,
            is_stand_in: false,
        }
    }

    /// The Admin rules of two pods of which only one is isolated, so that their lists are two.
    fn rules(subjects: &mut Subjects, policy: ClusterPolicy) -> [Arc<ClusterRules>; 2] {
        let mut snapshot = Snapshot::default();
        for pod in [pod("a", 80), pod("b", 81)] {
            snapshot.pods.insert(pod.id.clone(), Arc::new(pod));
        }
        let isolated = Policy {
            id: ObjectName::new("shop", "a"),
            subject: Selector {
                requirements: vec![crate::model::Requirement {
                    key: "app".into(),
                    operator: crate::model::Operator::In(vec!["a".into()]),
                }],
            },
            ingress: Some(Vec::new()),
            egress: None,
            is_audit: false,
        };
        snapshot
            .policies
            .insert(isolated.id.clone(), Arc::new(isolated));
        snapshot
            .cluster_policies
            .insert("walls".into(), Arc::new(policy));
        let node = NodeView {
            name: "n1".into(),
            ..NodeView::default()
        };
        let touched = Touched::all(&snapshot);
        subjects.update(&touched, &snapshot, &node, &mut BTreeSet::new());
        let lists = ["a", "b"].map(|pod| {
            let lists = subjects.lists(&ObjectName::new("shop", pod)).unwrap();
            lists[0].clone().unwrap()
        });
        assert_ne!(lists[0], lists[1]);
        lists.map(|it| it.admin[0].clone())
    }

    #[test]
    fn rules_of_a_tier_are_held_once_unless_a_pod_gives_them_their_ports() {
        let mut subjects = Subjects::default();
        let port = |port| {
            let protocol = Protocol::TCP;
            Ports::Of(vec![PortMatch { protocol, port }])
        };
        let [a, b] = rules(&mut subjects, walls(Ports::Any));
        assert!(Arc::ptr_eq(&a, &b));
        // Another policy of the same name.
        let [first, last] = [22, 22];
        let [c, d] = rules(
            &mut subjects,
            walls(port(PortRange::Numbers { first, last })),
        );
        assert!(Arc::ptr_eq(&c, &d));
        assert_ne!(a, c);
        let [e, f] = rules(&mut subjects, walls(port(PortRange::Named("web".into()))));
        assert_ne!(e, f);
    }
}
