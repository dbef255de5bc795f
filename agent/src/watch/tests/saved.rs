//! What is saved is there again, or it is not gone by: the file alone, damaged in every way.

use std::fs;
use std::net::IpAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use weir_common::Protocol;

use crate::model::{
    Block, ClusterPolicy, ClusterRule, Conditions, ContainerPort, Endpoint, EndpointSlice,
    External, Family, HostPort, Labels, Namespace, NamespacePhase, Node, NotReady, Object,
    ObjectName, Operator, PeerSelector, Peers, Pod, PodNetwork, PodPeers, PodPhase, Policy,
    PortMatch, PortRange, Ports, Proxying, Requirement, Rule, RuleAction, Selector, Service,
    ServiceKind, ServicePort, SlicePort, Sources, TargetPort, Tier, TrafficPolicy,
};
use crate::watch::saved::{Changes, SAVED_OBJECTS, SavedObjects};

/// A file of its own, and the objects in it.
struct Disk {
    folder: tempfile::TempDir,
    saved: SavedObjects,
}

impl Disk {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let saved = SavedObjects::new(folder.path().join(SAVED_OBJECTS), "n1".into());
        Self { folder, saved }
    }

    fn path(&self) -> PathBuf {
        self.folder.path().join(SAVED_OBJECTS)
    }

    fn text(&self) -> String {
        fs::read_to_string(self.path()).unwrap()
    }

    fn files(&self) -> Vec<String> {
        let entries = fs::read_dir(self.folder.path()).unwrap();
        let mut names: Vec<_> = entries
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }
}

fn labels(pairs: &[(&str, &str)]) -> Labels {
    pairs
        .iter()
        .map(|(k, v)| ((*k).into(), (*v).into()))
        .collect()
}

fn selector(key: &str, operator: Operator) -> Selector {
    let key = key.into();
    Selector {
        requirements: vec![Requirement { key, operator }],
    }
}

/// One of each kind, with something in every field.
fn objects() -> Vec<Object> {
    let shop = |name: &str| ObjectName::new("shop", name);
    let v4: IpAddr = [10, 244, 1, 7].into();
    let v6: IpAddr = "fd00::7".parse().unwrap();
    let service = Service {
        id: shop("cart"),
        created: None,
        kind: ServiceKind::ClusterIp(vec![[10, 96, 0, 9].into(), "fd96::9".parse().unwrap()]),
        ports: vec![ServicePort {
            name: Some("http".into()),
            protocol: Protocol::TCP,
            port: 80,
            target: TargetPort::Name("web".into()),
            node_port: Some(30080),
        }],
        selector: Some(labels(&[("app", "cart")])),
        affinity: Some(Duration::from_secs(10800)),
        internal_traffic_policy: TrafficPolicy::Local,
        external: External {
            traffic_policy: TrafficPolicy::Cluster,
            load_balancer: vec![[192, 0, 2, 1].into()],
            sources: Sources::Everybody,
            addresses: vec![[192, 0, 2, 2].into()],
        },
        not_ready: NotReady::Hidden,
        proxying: Proxying::Here,
    };
    let slice = EndpointSlice {
        id: shop("cart-1"),
        service: Some(shop("cart")),
        family: Family::V4,
        endpoints: vec![Endpoint {
            address: v4,
            conditions: Conditions {
                ready: true,
                serving: true,
                terminating: false,
            },
            hostname: Some("cart-0".into()),
            node: Some("n1".into()),
            zone: Some("z".into()),
            pod: Some(shop("cart-0")),
        }],
        ports: vec![SlicePort {
            name: None,
            protocol: Protocol::UDP,
            port: Some(8080),
        }],
    };
    let pod = Pod {
        id: shop("cart-0"),
        uid: "u-1".into(),
        static_uid: Some("s-1".into()),
        labels: labels(&[("app", "cart")]),
        node: Some("n1".into()),
        addresses: vec![v4, v6],
        network: PodNetwork::Own,
        phase: PodPhase::Running,
        ready: true,
        hostname: Some("cart-0".into()),
        subdomain: None,
        ports: vec![ContainerPort {
            name: Some("web".into()),
            protocol: Protocol::SCTP,
            port: 8080,
            host: Some(HostPort {
                port: 9090,
                address: Some([10, 0, 0, 1].into()),
            }),
        }],
    };
    let namespace = Namespace {
        name: "shop".into(),
        labels: labels(&[("team", "a")]),
        phase: NamespacePhase::Terminating,
        keeps_established: false,
    };
    let node = Node {
        name: "n1".into(),
        labels: labels(&[("zone", "z")]),
        addresses: vec![[10, 0, 0, 1].into()],
        internal: vec![[10, 0, 0, 1].into()],
        pod_cidrs: vec!["10.244.1.0/24".parse().unwrap()],
        network: Default::default(),
    };
    let policy = Policy {
        id: shop("cart"),
        subject: selector("app", Operator::In(vec!["cart".into()])),
        ingress: Some(vec![Rule {
            peers: Peers::Of(vec![
                PeerSelector::Pods(PodPeers {
                    namespaces: Some(selector("team", Operator::Exists)),
                    pods: selector("app", Operator::NotIn(vec!["spy".into()])),
                }),
                PeerSelector::Block(Block {
                    cidr: "10.0.0.0/8".parse().unwrap(),
                    except: vec!["10.1.0.0/16".parse().unwrap()],
                }),
                PeerSelector::Unsupported("what is this".into()),
            ]),
            ports: Ports::Of(vec![
                PortMatch {
                    protocol: Protocol::TCP,
                    port: PortRange::Numbers {
                        first: 80,
                        last: 90,
                    },
                },
                PortMatch {
                    protocol: Protocol::TCP,
                    port: PortRange::Named("web".into()),
                },
            ]),
        }]),
        egress: None,
        is_audit: false,
    };
    vec![
        Object::Service(Arc::new(service)),
        Object::EndpointSlice(Arc::new(slice)),
        Object::Pod(Arc::new(pod)),
        Object::Namespace(Arc::new(namespace)),
        Object::Node(Arc::new(node)),
        Object::Policy(Arc::new(policy)),
    ]
}

/// The cart has gone, and a namespace has come.
fn changes() -> Changes {
    let namespace = Namespace {
        name: "bank".into(),
        labels: labels(&[]),
        phase: NamespacePhase::Active,
        keeps_established: false,
    };
    let namespace = Object::Namespace(Arc::new(namespace));
    let pod = objects()[2].id();
    Changes::from([(pod, None), (namespace.id(), Some(namespace))])
}

fn objects_and_changes() -> Vec<Object> {
    let mut all = objects();
    all.remove(2);
    all.insert(2, changes().into_values().flatten().next().unwrap());
    all
}

/// A change of this text is a change of the format: raise `FORMAT`, so that no agent takes what another
/// version meant for what it means itself.
#[test]
fn what_is_saved_reads_as_it_always_did() {
    let disk = Disk::new();
    let mut log = disk.saved.save(&objects()).unwrap();
    assert_eq!(disk.saved.load().unwrap().objects, objects());
    log.append(&changes()).unwrap();
    let expected = include_str!("objects.jsonl");
    assert_eq!(disk.text(), expected, "\n{}", disk.text());
    assert_eq!(disk.saved.load().unwrap().objects, objects_and_changes());
}

/// The kind came later than the format; no agent before it has a line of this text.
#[test]
fn a_cluster_policy_is_saved_as_it_is() {
    let all = PodPeers {
        namespaces: Some(Selector::default()),
        pods: Selector::default(),
    };
    let mut policy = ClusterPolicy {
        name: "walls".into(),
        tier: Tier::Admin,
        priority: 7,
        subject: all,
        ingress: vec![ClusterRule {
            name: Some("out".into()),
            action: RuleAction::Pass,
            rule: Rule {
                peers: Peers::Any,
                ports: Ports::Any,
            },
        }],
        egress: Vec::new(),
        is_audit: false,
        is_stand_in: false,
    };
    let object = |policy: &ClusterPolicy| Object::ClusterPolicy(Arc::new(policy.clone()));
    let disk = Disk::new();
    disk.saved.save(&[object(&policy)]).unwrap();
    let text = disk.text();
    let line = concat!(
        r#"{"object":{"ClusterPolicy":{"name":"walls","tier":"Admin","priority":7,"#,
        r#""subject":{"namespaces":{"requirements":[]},"pods":{"requirements":[]}},"#,
        r#""ingress":[{"name":"out","action":"Pass","rule":{"peers":"Any","ports":"Any"}}],"egress":[]}}}"#,
    );
    assert_eq!(text.lines().nth(1), Some(line), "{text}");
    assert_eq!(disk.saved.load().unwrap().objects, [object(&policy)]);
    policy.is_stand_in = true;
    disk.saved.save(&[object(&policy)]).unwrap();
    let text = disk.text();
    let line = line.replace(r#""egress":[]"#, r#""egress":[],"is_stand_in":true"#);
    assert_eq!(text.lines().nth(1), Some(line.as_str()), "{text}");
    assert_eq!(disk.saved.load().unwrap().objects, [object(&policy)]);
}

/// Of the agent before this format, which had no log and no mirror pods.
#[test]
fn a_file_of_the_format_before_is_read() {
    let disk = Disk::new();
    fs::write(disk.path(), include_str!("objects-1.jsonl")).unwrap();
    let mut expected = objects();
    let Object::Pod(pod) = &mut expected[2] else {
        panic!("the third is a pod");
    };
    Arc::make_mut(pod).static_uid = None;
    assert_eq!(disk.saved.load().unwrap().objects, expected);
}

/// A file with a log of three batches, and what it holds up to each of them.
fn with_log(disk: &Disk) -> (Vec<u8>, Vec<(usize, Vec<Object>)>) {
    let mut log = disk.saved.save(&objects()).unwrap();
    let mut states = vec![(disk.text().len(), objects())];
    let back = Changes::from([(objects()[2].id(), Some(objects()[2].clone()))]);
    let gone = Changes::from([(objects()[0].id(), None)]);
    for batch in [changes(), back, gone] {
        log.append(&batch).unwrap();
        states.push((disk.text().len(), disk.saved.load().unwrap().objects));
    }
    let distinct = |i: usize| states[i + 1..].iter().all(|(_, s)| *s != states[i].1);
    assert!(
        (0..states.len()).all(distinct),
        "each batch changes something"
    );
    (disk.text().into_bytes(), states)
}

/// What a loss of power leaves: the file up to any byte.
#[test]
fn a_torn_end_is_left_out_at_whatever_byte_it_is_torn() {
    let disk = Disk::new();
    let (text, states) = with_log(&disk);
    // Everything from the first batch behind the objects on, which holds every kind of line.
    for length in states[0].0..=text.len() {
        fs::write(disk.path(), &text[..length]).unwrap();
        let whole = states.iter().rev().find(|(end, _)| *end <= length);
        let loaded = disk.saved.load().map(|saved| saved.objects);
        assert_eq!(loaded.as_ref(), whole.map(|(_, o)| o), "cut at {length}");
        // As some file systems leave it: the length is there, and the content is not.
        let mut zeroes = text[..length].to_vec();
        zeroes.resize(text.len(), 0);
        fs::write(disk.path(), zeroes).unwrap();
        let loaded = disk.saved.load().map(|saved| saved.objects);
        assert_eq!(
            loaded.as_ref(),
            whole.map(|(_, o)| o),
            "zeroes from {length}"
        );
    }
}

#[test]
fn no_damage_of_a_log_is_gone_by() {
    let disk = Disk::new();
    let (text, states) = with_log(&disk);
    let last = states.len() - 1;
    let lines = &text[..states[last - 1].0 - 1];
    let end_of_last_but_one = lines.iter().rposition(|b| *b == b'\n').unwrap();
    for at in 0..text.len() {
        let mut damaged = text.clone();
        damaged[at] ^= 1;
        fs::write(disk.path(), &damaged).unwrap();
        let loaded = disk.saved.load().map(|saved| saved.objects);
        // Damage of the last batch looks like an end that was torn, and so does damage of the end before,
        // which makes one batch of two.
        let before = if at >= states[last - 1].0 {
            Some(&states[last - 1].1)
        } else if at >= end_of_last_but_one {
            loaded.as_ref().map(|_| &states[last - 2].1)
        } else {
            None
        };
        assert!(
            loaded.as_ref() == before,
            "byte {at} is another: {loaded:?}"
        );
    }
}

#[test]
fn a_log_whose_file_was_taken_away_says_so() {
    let disk = Disk::new();
    let mut log = disk.saved.save(&objects()).unwrap();
    fs::remove_file(disk.path()).unwrap();
    assert!(log.append(&changes()).is_err(), "nobody would read it");
}

/// However many objects there are, and however long it goes on.
#[test]
fn what_is_written_for_a_change_is_bounded_by_the_change() {
    let disk = Disk::new();
    let pods: Vec<_> = (0..2000).map(|n| pod(n, 0)).collect();
    let size = || fs::metadata(disk.path()).unwrap().len();
    let mut log = disk.saved.save(&pods).unwrap();
    let (whole, mut written, mut of_changes, mut anew) = (size(), 0, 0, 0);
    let mut state: std::collections::BTreeMap<_, _> =
        pods.into_iter().map(|p| (p.id(), p)).collect();
    for round in 1..=1000_u32 {
        let mut changes = Changes::new();
        for i in 0..20 {
            let changed = pod((round * 20 + i) * 7 % 2000, round);
            of_changes += serde_json::to_vec(&changed).unwrap().len() as u64;
            state.insert(changed.id(), changed.clone());
            changes.insert(changed.id(), Some(changed));
        }
        if log.has_outgrown() {
            log = disk.saved.save(state.values()).unwrap();
            written += size();
            anew += 1;
        } else {
            let before = size();
            log.append(&changes).unwrap();
            written += size() - before;
        }
    }
    assert!(anew >= 2, "it was written anew {anew} times");
    assert!(
        written < 3 * of_changes,
        "{written} bytes for changes of {of_changes}, {whole} bytes at first"
    );
    let objects: Vec<_> = state.into_values().collect();
    assert_eq!(disk.saved.load().unwrap().objects, objects);
}

/// A pod that is another one in every round.
fn pod(number: u32, round: u32) -> Object {
    let Object::Pod(pod) = &objects()[2] else {
        panic!("the third is a pod");
    };
    let mut pod = Pod::clone(pod);
    pod.id.name = format!("pod-{number:05}").into();
    pod.uid = round.to_string().into();
    Object::Pod(Arc::new(pod))
}

#[test]
fn who_may_use_a_load_balancer_is_saved_with_it() {
    let disk = Disk::new();
    let mut objects = objects();
    let Object::Service(service) = &mut objects[0] else {
        unreachable!("a Service comes first");
    };
    let service = Arc::make_mut(service);
    service.created = Some(1_700_000_000);
    service.external.sources = Sources::In(vec!["198.51.100.0/24".parse().unwrap()]);
    disk.saved.save(&objects).unwrap();
    assert_eq!(disk.saved.load().unwrap().objects, objects);
}

#[test]
fn only_root_reads_it_and_nothing_is_left_beside_it() {
    let disk = Disk::new();
    // What a crash between writing and renaming leaves.
    fs::write(disk.path().with_added_extension("part"), "half").unwrap();
    assert!(disk.saved.load().is_none(), "half a file is no file");
    disk.saved.save(&objects()).unwrap();
    disk.saved.save(&objects()[..2]).unwrap();
    assert_eq!(disk.files(), [SAVED_OBJECTS]);
    let mode = fs::metadata(disk.path()).unwrap().permissions().mode();
    assert_eq!(mode & 0o7777, 0o600);
    assert_eq!(disk.saved.load().unwrap().objects, objects()[..2]);
}

#[test]
fn a_crash_while_writing_leaves_the_file_of_before() {
    let disk = Disk::new();
    disk.saved.save(&objects()).unwrap();
    let other = Disk::new();
    other.saved.save(&objects()[..1]).unwrap();
    let whole = other.text();
    for length in [0, 1, whole.len() / 2, whole.len()] {
        let part = disk.path().with_added_extension("part");
        fs::write(part, &whole[..length]).unwrap();
        assert_eq!(disk.saved.load().unwrap().objects, objects());
    }
}

#[test]
fn what_is_not_whole_is_set_aside() {
    let disk = Disk::new();
    disk.saved.save(&objects()).unwrap();
    let whole = disk.text();
    let cases: Vec<(&str, String)> = vec![
        ("empty", String::new()),
        ("not ours", "hello\n".to_owned()),
        (
            "of another node",
            whole.replace(r#""node":"n1"}"#, r#""node":"n2"}"#),
        ),
        (
            "of another format",
            whole.replace(r#""format":2"#, r#""format":3"#),
        ),
        ("without a format", whole.replace(r#""format":2,"#, "")),
        ("one digit is another", whole.replace("30080", "30081")),
        ("an object is missing", without_line(&whole, 3)),
        ("the end is missing", without_line(&whole, 7)),
        ("it goes on after its end", whole.repeat(3)),
        ("two files in one", without_line(&whole, 7) + &whole),
    ];
    for (what, text) in cases {
        assert_ne!(text, whole, "{what}");
        fs::write(disk.path(), &text).unwrap();
        assert!(disk.saved.load().is_none(), "{what}");
        assert_eq!(disk.files(), ["objects.jsonl.set-aside"], "{what}");
    }
    fs::write(disk.path(), &whole).unwrap();
    assert!(disk.saved.load().is_some());
}

/// Every cut, and every byte changed.
#[test]
fn no_damage_is_gone_by() {
    let disk = Disk::new();
    disk.saved.save(&objects()).unwrap();
    let whole = disk.text().into_bytes();
    for length in 0..whole.len() - 1 {
        fs::write(disk.path(), &whole[..length]).unwrap();
        assert!(disk.saved.load().is_none(), "cut at {length}");
    }
    for at in 0..whole.len() - 1 {
        let mut damaged = whole.clone();
        damaged[at] ^= 1;
        fs::write(disk.path(), &damaged).unwrap();
        assert!(disk.saved.load().is_none(), "byte {at} is another");
    }
}

#[test]
fn it_is_as_old_as_it_was_last_known_to_be_so() {
    let disk = Disk::new();
    assert!(disk.saved.confirm(SystemTime::now()).is_err(), "no file");
    disk.saved.save(&objects()).unwrap();
    let then = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000);
    disk.saved.confirm(then).unwrap();
    assert_eq!(disk.saved.load().unwrap().of, then);
}

fn without_line(text: &str, line: usize) -> String {
    let lines = text.split_inclusive('\n').enumerate();
    lines.filter(|(i, _)| *i != line).map(|(_, l)| l).collect()
}
