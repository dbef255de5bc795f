//! Which policy answers, which one holds, and what people are told about it.

use weir_agent::compile::policy::{Direction, Report, RuleOwner};
use weir_agent::model::{
    Block, ClusterPolicy, ClusterRule, PeerSelector, Peers, PodPeers, PortMatch, PortRange, Ports,
    Rule, RuleAction, Selector, Tier,
};
use weir_common::policy::{Action, Class, PortKey, RuleId, VerdictKey};
use weir_common::{Port, Protocol};

use super::nouns::{anything, compiled, compiler, name, only, pods, policy, select, snapshot, tcp};
use super::walk::{Answer, judge};

use super::cases::{party, shop_with};

#[test]
fn a_policy_that_isolates_no_pod_here_costs_nothing() {
    let mut cluster = shop_with(vec![policy(
        "shop/p",
        select("app=db"),
        Some(vec![only(vec![pods(select("app=web"))])]),
        None,
    )]);
    cluster.pods[1].node = Some("n2".into());
    let with = compiled(&cluster, "n1");
    cluster.policies.clear();
    assert_eq!(with.rows(), compiled(&cluster, "n1").rows());
    assert!(with.rows().verdicts.is_empty());
}

#[test]
fn verdicts_name_their_owners() {
    let web_on_80 = Rule {
        peers: Peers::Of(vec![pods(select("app=web"))]),
        ports: Ports::Of(vec![tcp(80, 80)]),
    };
    let everybody_on_443 = Rule {
        peers: Peers::Any,
        ports: Ports::Of(vec![tcp(80, 443)]),
    };
    let cluster = shop_with(vec![
        policy(
            "shop/b",
            select("app=db"),
            Some(vec![everybody_on_443, web_on_80.clone()]),
            None,
        ),
        policy("shop/a", Selector::default(), Some(vec![web_on_80]), None),
    ]);
    let compiled = compiled(&cluster, "n1");
    let owner = |peer: &str, port| {
        let peer = party(&cluster, peer).address;
        let probe = (Protocol::TCP, port);
        let answer = judge(
            compiled.rows(),
            &name("shop/db"),
            Direction::Ingress,
            peer,
            probe,
        );
        let (Answer::Allowed(rule) | Answer::Denied(rule)) = answer else {
            panic!("{answer:?}")
        };
        compiled.book().owner(rule).unwrap().to_string()
    };
    assert_eq!(owner("shop/web", 80), "allowed by shop/a spec.ingress[0]");
    assert_eq!(owner("shop/web", 81), "allowed by shop/b spec.ingress[0]");
    assert_eq!(owner("outside", 80), "allowed by shop/b spec.ingress[0]");
    let denied = "no rule allows it; ingress is isolated by shop/a, shop/b";
    assert_eq!(owner("outside", 22), denied);
    assert!(compiled.book().owner(RuleId::NONE).is_none());
    let isolated = RuleOwner::Isolated {
        policies: vec![name("shop/a"), name("shop/b")],
        direction: Direction::Ingress,
    };
    assert!(compiled.book().iter().any(|(_, owner)| *owner == isolated));
}

#[test]
fn an_audit_names_who_would_deny() {
    let mut audited = policy("shop/c", select("app=db"), Some(vec![]), None);
    audited.is_audit = true;
    let mut cluster = shop_with(vec![audited]);
    let found = |cluster: &_| {
        let compiled = compiled(cluster, "n1");
        let rules = compiled.rows().rules[&name("shop/db")].ingress;
        let class = Class::WORLD;
        let row = compiled.rows().verdicts[&VerdictKey { rules, class }];
        let owner = |rule| compiled.book().owner(rule).map(ToString::to_string);
        (row.action, owner(row.rule), owner(row.audit))
    };
    let denied = "no rule allows it; ingress is isolated by shop/c";
    assert_eq!(
        found(&cluster),
        (Action::ALLOW, None, Some(denied.to_owned()))
    );
    // Who denies already has nothing more to say.
    let enforced = policy("shop/a", Selector::default(), Some(vec![]), None);
    cluster.policies.push(enforced);
    let denied = "no rule allows it; ingress is isolated by shop/a";
    assert_eq!(
        found(&cluster),
        (Action::DENY, Some(denied.to_owned()), None)
    );
    // What another allows, an isolation more does not take away.
    cluster.policies[1].ingress = Some(vec![anything()]);
    let allowed = "allowed by shop/a spec.ingress[0]";
    assert_eq!(
        found(&cluster),
        (Action::ALLOW, Some(allowed.to_owned()), None)
    );
}

/// What is established goes on against a denial, where its namespace keeps it, unless it is the Admin tier's.
#[test]
fn only_the_admin_tier_ends_what_is_established() {
    let on = |ports| ClusterRule {
        name: None,
        action: RuleAction::Deny,
        rule: Rule {
            peers: Peers::Any,
            ports,
        },
    };
    let walls = |tier, ports| ClusterPolicy {
        name: "walls".into(),
        tier,
        priority: 1,
        subject: PodPeers {
            namespaces: Some(Selector::default()),
            pods: Selector::default(),
        },
        ingress: vec![on(ports)],
        egress: Vec::new(),
        is_audit: false,
        is_stand_in: false,
    };
    // What is done to TCP port 80, to 81, and to what has no ports.
    let done = |cluster: &_| {
        let compiled = compiled(cluster, "n1");
        let rows = compiled.rows();
        let rules = rows.rules[&name("shop/db")].ingress;
        let class = Class::WORLD;
        let row = rows.verdicts[&VerdictKey { rules, class }];
        let of_port = |port: u16| {
            let key = PortKey::exact(row.ports, Protocol::TCP, Port::from(port));
            let all = || rows.ports.get(&PortKey::all(row.ports));
            let port = rows.ports.get(&key).or_else(all);
            port.map_or(Action::DENY, |it| it.action)
        };
        let all = PortKey::all(row.ports);
        let others = rows.ports.get(&all).map_or(Action::DENY, |it| it.action);
        match row.action {
            Action::BY_PORT => [of_port(80), of_port(81), others],
            action => [action; 3],
        }
    };
    let only_80 = || Ports::Of(vec![tcp(80, 80)]);
    let (no, end) = (Action::DENY, Action::END);
    let mut cluster = shop_with(vec![policy(
        "shop/a",
        Selector::default(),
        Some(vec![]),
        None,
    )]);
    cluster.cluster_policies = vec![walls(Tier::Admin, only_80())];
    assert_eq!(done(&cluster), [end, no, no]);
    cluster.policies[0].ingress = Some(vec![Rule {
        peers: Peers::Any,
        ports: Ports::Of(vec![tcp(80, 81)]),
    }]);
    assert_eq!(done(&cluster), [end, Action::ALLOW, no]);
    cluster.cluster_policies = vec![walls(Tier::Admin, Ports::Any)];
    assert_eq!(done(&cluster), [end; 3]);
    let accept = ClusterRule {
        action: RuleAction::Accept,
        ..on(only_80())
    };
    cluster.cluster_policies[0].ingress.insert(0, accept);
    assert_eq!(done(&cluster), [Action::ALLOW, end, end]);
    cluster.policies.clear();
    cluster.cluster_policies = vec![walls(Tier::Baseline, Ports::Any)];
    assert_eq!(done(&cluster), [no; 3]);
}

#[test]
fn only_what_is_enforced_passes_a_packet_on() {
    let pass = ClusterRule {
        name: None,
        action: RuleAction::Pass,
        rule: anything(),
    };
    let mut cluster = shop_with(Vec::new());
    cluster.cluster_policies.push(ClusterPolicy {
        name: "walls".into(),
        tier: Tier::Admin,
        priority: 1,
        subject: PodPeers {
            namespaces: Some(Selector::default()),
            pods: Selector::default(),
        },
        ingress: vec![pass],
        egress: Vec::new(),
        is_audit: false,
        is_stand_in: false,
    });
    for (is_audit, passed) in [(false, 1), (true, 0)] {
        cluster.cluster_policies[0].is_audit = is_audit;
        let compiler = compiler(&snapshot(&cluster), "n1", u32::BITS);
        let peer = party(&cluster, "outside").address;
        let hearing = compiler.hearing(&name("shop/db"), Direction::Ingress, peer);
        let finding = hearing.unwrap().finding((Protocol::TCP, 80));
        assert_eq!(finding.passed_by.len(), passed);
    }
}

#[test]
fn parts_that_allow_nothing_are_reported_in_words() {
    let block = PeerSelector::Block(Block {
        cidr: "10.0.0.0/8".parse().unwrap(),
        except: Vec::new(),
    });
    let odd = vec![
        PortMatch {
            protocol: Protocol::TCP,
            port: PortRange::Named("http".into()),
        },
        PortMatch {
            protocol: Protocol(47),
            port: PortRange::Any,
        },
        tcp(90, 80),
    ];
    let egress = vec![
        anything(),
        Rule {
            peers: Peers::Of(vec![pods(Selector::default()), block]),
            ports: Ports::Of(odd),
        },
    ];
    let ingress = vec![only(vec![PeerSelector::Unsupported("services".into())])];
    let cluster = shop_with(vec![policy(
        "shop/p",
        Selector::default(),
        Some(ingress),
        Some(egress),
    )]);
    let words: Vec<String> = compiled(&cluster, "n1")
        .reports()
        .iter()
        .map(Report::to_string)
        .collect();
    assert_eq!(
        words,
        [
            "NetworkPolicy shop/p: spec.ingress[0].from[0] is a peer that is not understood (services) \
             and allows nothing",
            "NetworkPolicy shop/p: spec.egress[1].ports[1] has protocol 47, not TCP, UDP or SCTP, and \
             allows nothing",
            "NetworkPolicy shop/p: spec.egress[1].ports[2] ends at 80, before 90, and allows nothing",
        ]
    );
}
