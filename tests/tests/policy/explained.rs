//! What is said about a packet is what the oracle says of it, and what is said to allow it does, and opens nothing else.

use std::sync::Arc;

use proptest::prelude::*;
use weir_agent::explain::Matter;
use weir_agent::model::{Labels, Object, PeerSelector, Peers, Pod, Rule, Selector, Snapshot};
use weir_agent::watch::documents::{Parsed, parse};
use weir_cli::explained::{Case, Side};
use weir_cli::question::{AskedPort, AskedProtocol, Question, Source, Target};
use weir_common::Protocol;
use weir_tests::oracle::{Cluster, Party, Who, allowed, may_receive, may_send};

use super::cases::{party, shop_with};
use super::nouns::{
    OUTSIDE, anything, compiler, ip, only, parties, pods, policy, select, snapshot, tcp, view,
};
use super::random::{PROBES, Parts, cluster};

fn question(from: &Party, to: &Party, (protocol, port): (Protocol, u16)) -> Question {
    let (protocol, port) = match protocol {
        Protocol::TCP => (AskedProtocol::Tcp, AskedPort::Number(port)),
        Protocol::UDP => (AskedProtocol::Udp, AskedPort::Number(port)),
        Protocol::SCTP => (AskedProtocol::Sctp, AskedPort::Number(port)),
        _ => (AskedProtocol::Icmp, AskedPort::None),
    };
    Question {
        from: Source::Address(from.address),
        to: Target::Address(to.address),
        port,
        protocol,
    }
}

/// As the node `n1` answers.
struct Asked {
    snapshot: Snapshot,
    compiler: weir_agent::compile::policy::Compiler,
}

impl Asked {
    fn of(cluster: &Cluster) -> Self {
        let snapshot = snapshot(cluster);
        let compiler = compiler(&snapshot, "n1", u32::BITS);
        Self { snapshot, compiler }
    }

    fn case(&self, from: &Party, to: &Party, probe: (Protocol, u16)) -> Case {
        let question = question(from, to, probe);
        let matter = Matter::take(&question, &self.compiler, &self.snapshot, &view("n1"));
        let mut explained = matter.unwrap().explain("", "");
        assert_eq!(explained.cases.len(), 1);
        explained.cases.remove(0)
    }
}

/// Does some node judge there?
fn is_judged(party: &Party) -> bool {
    matches!(&party.is, Who::Pod(pod) if pod.node.is_some())
}

fn is_sound(side: &Side) -> bool {
    let rule = side.rule.as_deref().unwrap_or_default();
    let is_worded = match (side.allowed, side.why.as_str()) {
        (true, "rule") => rule.starts_with("allowed by"),
        (true, why) => why != "isolated" && side.rule.is_none(),
        (false, "rule") => rule.starts_with("denied by"),
        (false, "isolated") => {
            rule.starts_with("no rule allows it") && !side.isolated_by.is_empty()
        }
        (false, _) => false,
    };
    // A rule that lacks nothing would allow it.
    is_worded && side.nearest.iter().all(|near| !near.missing.is_empty())
}

/// The objects of what was said to help, added.
fn with(cluster: &Cluster, yaml: &str) -> Cluster {
    let mut cluster = cluster.clone();
    for parsed in parse("advice.yaml", yaml) {
        let Parsed::Ours(document) = parsed else {
            panic!("{parsed:?}");
        };
        let converted = document.outcome.unwrap();
        assert!(converted.problems.is_empty(), "{yaml}");
        match converted.object.unwrap() {
            Object::Policy(policy) => cluster.policies.push(Arc::unwrap_or_clone(policy)),
            Object::ClusterPolicy(policy) => {
                cluster.cluster_policies.push(Arc::unwrap_or_clone(policy));
            }
            other => panic!("{other:?}"),
        }
    }
    cluster
}

/// Has whoever is there the labels of the one that was asked about, in its namespace; or its address?
fn is_like(party: &Party, asked: &Party) -> bool {
    let includes = |all: &Labels, some: &Labels| some.iter().all(|(k, v)| all.get(k) == Some(v));
    match (&party.is, &asked.is) {
        (Who::Pod(pod), Who::Pod(asked)) => {
            pod.id.namespace == asked.id.namespace && includes(&pod.labels, &asked.labels)
        }
        (_, Who::Pod(_)) => false,
        _ => party.address == asked.address,
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn what_is_said_is_what_the_api_says(
        cluster in prop_oneof![cluster(Parts::Supported), cluster(Parts::Tiers), cluster(Parts::All)],
    ) {
        let asked = Asked::of(&cluster);
        let parties = parties(&cluster);
        for from in &parties {
            for to in parties.iter().filter(|to| to.address.is_ipv4() == from.address.is_ipv4()) {
                for probe in PROBES {
                    let case = asked.case(from, to, probe);
                    let (protocol, port) = probe;
                    if is_judged(from) {
                        let sent = may_send(&cluster, from, to, protocol, port);
                        prop_assert_eq!(case.egress.allowed, sent, "{:?} {:?}", probe, case);
                    }
                    if is_judged(to) {
                        let received = may_receive(&cluster, from, to, protocol, port);
                        prop_assert_eq!(case.ingress.allowed, received, "{:?} {:?}", probe, case);
                    }
                    prop_assert!(is_sound(&case.egress) && is_sound(&case.ingress), "{:?}", case);
                    prop_assert_eq!(case.allowed, case.egress.allowed && case.ingress.allowed);
                }
            }
        }
    }

    #[test]
    fn what_is_said_to_help_helps_and_opens_no_more_than_it_says(
        cluster in prop_oneof![cluster(Parts::Supported), cluster(Parts::Tiers)],
        pick in any::<prop::sample::Index>(),
    ) {
        let asked = Asked::of(&cluster);
        let parties = parties(&cluster);
        let of_pods = |party: &&Party| is_judged(party) || matches!(party.is, Who::Outside);
        let ends: Vec<&Party> = parties.iter().filter(of_pods).collect();
        let mut denied = Vec::new();
        for from in &ends {
            for to in ends.iter().filter(|to| to.address.is_ipv4() == from.address.is_ipv4()) {
                let case = asked.case(from, to, PROBES[1]);
                denied.extend((!case.allowed).then_some((*from, *to, case)));
            }
        }
        prop_assume!(!denied.is_empty());
        let (from, to, case) = pick.get(&denied);
        let (protocol, port) = PROBES[1];
        let Some(yaml) = &case.yaml else {
            prop_assert!(!case.advice.is_empty(), "{:?}", case);
            return Ok(());
        };
        let after = with(&cluster, yaml);
        prop_assert!(allowed(&after, from, to, protocol, port), "{}", yaml);
        for a in &parties {
            for b in parties.iter().filter(|b| b.address.is_ipv4() == a.address.is_ipv4()) {
                for probe in PROBES {
                    type Half = fn(&Cluster, &Party, &Party, Protocol, u16) -> bool;
                    for half in [may_send as Half, may_receive as Half] {
                        let [before, now] = [&cluster, &after]
                            .map(|it| half(it, a, b, probe.0, probe.1));
                        prop_assert!(before <= now, "closes {:?} {:?} {:?}\n{}", a, b, probe, yaml);
                        let is_said = probe == (protocol, port) && is_like(a, from) && is_like(b, to);
                        prop_assert!(before == now || is_said, "opens {:?} {:?} {:?}\n{}", a, b, probe, yaml);
                    }
                }
            }
        }
    }
}

fn said(policies: Vec<weir_agent::model::Policy>, from: &str, to: &str, port: u16) -> Case {
    let cluster = shop_with(policies);
    let from = match from {
        "outside" => Party {
            address: ip(OUTSIDE[0]),
            is: Who::Outside,
        },
        pod => party(&cluster, pod),
    };
    let to = party(&cluster, to);
    Asked::of(&cluster).case(&from, &to, (Protocol::TCP, port))
}

fn lacks(case: &Case) -> Vec<&str> {
    let near = case.ingress.nearest.iter().flat_map(|it| &it.missing);
    near.map(|it| it.words.as_str()).collect()
}

#[test]
fn a_denial_names_what_the_nearest_rule_lacks() {
    let web_on_80 = Rule {
        peers: Peers::Of(vec![pods(select("app=api"))]),
        ports: weir_agent::model::Ports::Of(vec![tcp(80, 80)]),
    };
    let isolating = || {
        policy(
            "shop/p",
            select("app=db"),
            Some(vec![web_on_80.clone()]),
            None,
        )
    };
    let case = said(vec![isolating()], "shop/web", "shop/db", 80);
    assert_eq!(
        lacks(&case),
        ["the pod at the other end has app=web, not app=api"]
    );
    let case = said(vec![isolating()], "shop/web", "shop/db", 81);
    assert_eq!(
        lacks(&case),
        [
            "the pod at the other end has app=web, not app=api",
            "it is for TCP 80 only"
        ]
    );
    let case = said(vec![isolating()], "outside", "shop/db", 80);
    assert_eq!(lacks(&case), ["it means pods, and the other end is none"]);
    // Nothing is near an empty list, and an empty rule lacks nothing.
    let none = policy("shop/p", Selector::default(), Some(vec![]), None);
    let case = said(vec![none], "shop/web", "shop/db", 80);
    assert!(!case.allowed && lacks(&case).is_empty());
    let all = policy("shop/p", Selector::default(), Some(vec![anything()]), None);
    assert!(said(vec![all], "shop/web", "shop/db", 80).allowed);
}

#[test]
fn an_except_is_named_where_it_takes_an_address_out() {
    let block = PeerSelector::Block(weir_agent::model::Block {
        cidr: "192.0.2.0/24".parse().unwrap(),
        except: vec!["192.0.2.0/29".parse().unwrap()],
    });
    let isolating = policy(
        "shop/p",
        select("app=db"),
        Some(vec![only(vec![block])]),
        None,
    );
    let case = said(vec![isolating], "outside", "shop/db", 80);
    assert_eq!(
        lacks(&case),
        ["the other end's address is in 192.0.2.0/24, and `except` 192.0.2.0/29 takes it out"]
    );
}

#[test]
fn labels_of_one_pod_are_not_in_what_is_said_to_help() {
    let mut cluster = shop_with(vec![policy(
        "shop/p",
        Selector::default(),
        Some(vec![]),
        None,
    )]);
    for pod in &mut cluster.pods {
        let Pod { labels, .. } = pod;
        labels.insert("pod-template-hash".into(), "5d4f".into());
    }
    let (from, to) = (party(&cluster, "shop/web"), party(&cluster, "shop/db"));
    let case = Asked::of(&cluster).case(&from, &to, (Protocol::TCP, 80));
    let yaml = case.yaml.unwrap();
    assert!(!yaml.contains("pod-template-hash"), "{yaml}");
    assert_eq!(
        yaml,
        "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata:\n  name: allow-db-from-web-tcp-80-710e9ae4\n  \
         namespace: shop\nspec:\n  podSelector:\n    matchLabels: {app: db, tier: back}\n  policyTypes: [Ingress]\n  ingress:\n  \
         - from:\n    - podSelector:\n        matchLabels: {app: web, tier: front}\n    ports:\n    - {protocol: TCP, port: 80}\n"
    );
}

/// Whoever applies two of them has both, and the same one twice is one.
#[test]
fn what_says_another_thing_has_another_name() {
    let isolating = ["shop", "blog"].map(|it| {
        let id = format!("{it}/p");
        policy(&id, Selector::default(), Some(vec![]), None)
    });
    let cluster = shop_with(isolating.to_vec());
    let asked = Asked::of(&cluster);
    let name = |from: &str, to: &str, probe| {
        let (from, to) = (party(&cluster, from), party(&cluster, to));
        let yaml = asked.case(&from, &to, probe).yaml.unwrap();
        let (_, rest) = yaml.split_once("\n  name: ").unwrap();
        rest.lines().next().unwrap().to_owned()
    };
    let names = [
        name("shop/web", "shop/db", (Protocol::TCP, 80)),
        name("shop/web", "shop/db", (Protocol::UDP, 80)),
        name("shop/web", "shop/db", (Protocol::TCP, 81)),
        name("shop/web", "shop/db", (Protocol::ICMP, 80)),
        name("blog/web", "shop/db", (Protocol::TCP, 80)),
        name("blog/db", "shop/db", (Protocol::TCP, 80)),
    ];
    let distinct: std::collections::BTreeSet<&String> = names.iter().collect();
    assert_eq!(distinct.len(), names.len(), "{names:?}");
    assert_eq!(
        name("shop/web", "shop/db", (Protocol::TCP, 80)),
        names[0],
        "it is stable"
    );
    assert!(names.iter().all(|it| it.len() <= 63), "{names:?}");
    assert!(
        names[4].starts_with("allow-db-from-blog-web-tcp-80-"),
        "{}",
        names[4]
    );
    // The same pods with other labels: what was applied for those of before stays.
    let mut other = cluster.clone();
    other.pods[0].labels = super::nouns::labels("app=front");
    let case = Asked::of(&other).case(
        &party(&other, "shop/web"),
        &party(&other, "shop/db"),
        (Protocol::TCP, 80),
    );
    assert!(!case.yaml.unwrap().contains(&names[0]));
}

/// The address of the one is another's: a policy that names the one by its labels does not let it in.
#[test]
fn what_would_not_help_is_not_said_to() {
    let mut cluster = shop_with(vec![policy("shop/p", select("app=db"), Some(vec![]), None)]);
    cluster.pods[2].addresses = cluster.pods[0].addresses.clone();
    let asked = Asked::of(&cluster);
    let case = |from: &str| {
        let (namespace, name) = from.split_once('/').unwrap();
        let question = Question {
            from: Source::Pod {
                namespace: namespace.into(),
                name: name.into(),
            },
            to: Target::Address(party(&cluster, "shop/db").address),
            port: AskedPort::Number(80),
            protocol: AskedProtocol::Tcp,
        };
        let matter = Matter::take(&question, &asked.compiler, &asked.snapshot, &view("n1"));
        matter.unwrap().explain("", "").cases.remove(0)
    };
    let [holder, other] = ["blog/web", "shop/web"].map(case);
    assert!(
        holder.yaml.is_some() && holder.advice.is_empty(),
        "{holder:?}"
    );
    assert!(!other.allowed && other.yaml.is_none(), "{other:?}");
    assert!(
        other.advice[0].ends_with("ingress: no rule allows it; ingress is isolated by shop/p"),
        "{other:?}"
    );
}
