//! What inputs make of what is said.

use super::*;
use crate::model::{EndpointSlice, Family, NamespacePhase};
use crate::pods::{LeaseState, Mac, Macs};

fn inputs() -> Inputs {
    let mut inputs = Inputs::new("n1".into(), Names::default(), Roster::default());
    inputs.know_ranges(vec!["10.0.1.0/24".parse().unwrap()]);
    inputs
}

fn slice(name: &str, service: &str) -> Change {
    Change::Applied(Object::EndpointSlice(Arc::new(EndpointSlice {
        id: ObjectName::new("shop", name),
        service: Some(ObjectName::new("shop", service)),
        family: Family::V4,
        endpoints: Vec::new(),
        ports: Vec::new(),
    })))
}

fn pod_on(node: &str, uid: &str, addresses: &[IpAddr]) -> Pod {
    Pod {
        id: ObjectName::new("shop", "web-0"),
        uid: uid.into(),
        static_uid: None,
        labels: BTreeMap::new(),
        node: Some(node.into()),
        addresses: addresses.to_vec(),
        network: PodNetwork::Own,
        phase: PodPhase::Running,
        ready: false,
        hostname: None,
        subdomain: None,
        ports: Vec::new(),
    }
}

fn applied(pod: Pod) -> Change {
    Change::Applied(Object::Pod(Arc::new(pod)))
}

fn node(name: &str, range: &str) -> Change {
    Change::Applied(Object::Node(Arc::new(Node {
        name: name.into(),
        labels: BTreeMap::new(),
        addresses: Vec::new(),
        internal: Vec::new(),
        pod_cidrs: vec![range.parse().unwrap()],
        network: Default::default(),
    })))
}

fn lease(uid: &str, container: &str, address: IpAddr) -> Arc<Lease> {
    Arc::new(Lease {
        attachment: Attachment::new(container, "eth0").unwrap(),
        network: "weir".into(),
        netns: 1,
        pod: Some(PodRef {
            namespace: "shop".into(),
            name: "web-0".into(),
            uid: Some(uid.into()),
        }),
        addresses: vec![address],
        macs: Macs {
            host: Mac([2; 6]),
            pod: Mac([4; 6]),
        },
        state: LeaseState::Leased,
        boot_id: String::new(),
        leased_at: 0,
    })
}

fn addresses(inputs: &Inputs) -> Vec<IpAddr> {
    let pod = ObjectName::new("shop", "web-0");
    inputs.snapshot().pods[&pod].addresses.clone()
}

const X: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(10, 0, 1, 7));
const Y: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(10, 0, 2, 7));
const FOREIGN: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(192, 0, 2, 9));

#[test]
fn a_slice_that_moves_dirties_both_services() {
    let mut inputs = inputs();
    inputs.take(slice("s", "old"));
    inputs.take_dirty();
    inputs.take(slice("s", "new"));
    let names = ["new", "old"].map(|n| ObjectName::new("shop", n));
    assert_eq!(inputs.take_dirty().services, BTreeSet::from(names));
}

#[test]
fn what_changes_nothing_dirties_nothing_and_readiness_is_nothing_to_policy() {
    let mut inputs = inputs();
    inputs.take(applied(pod_on("n2", "1", &[Y])));
    inputs.take_dirty();
    inputs.take(applied(pod_on("n2", "1", &[Y])));
    inputs.take(Change::Deleted(ObjectId {
        kind: Kind::Service,
        name: ObjectName::new("shop", "never"),
    }));
    inputs.take(applied(Pod {
        ready: true,
        ..pod_on("n2", "1", &[Y])
    }));
    assert_eq!(inputs.take_dirty(), Dirty::default());
}

#[test]
fn of_a_namespace_policy_hears_what_it_may_look_at() {
    let mut inputs = inputs();
    let mut said = |label: &str, phase| {
        let namespace = Namespace {
            name: "shop".into(),
            labels: BTreeMap::from([("team".into(), label.into())]),
            phase,
            keeps_established: false,
        };
        inputs.take(Change::Applied(Object::Namespace(Arc::new(namespace))));
        let dirty = inputs.take_dirty();
        assert!(!dirty.policy, "{dirty:?}");
        dirty.touched.namespaces.contains("shop")
    };
    let (active, leaving) = (NamespacePhase::Active, NamespacePhase::Terminating);
    assert!(said("a", active), "it is new");
    assert!(!said("a", active));
    assert!(said("b", active));
    assert!(said("b", leaving));
}

#[test]
fn a_lease_is_known_before_any_status_and_outlives_an_older_status() {
    let mut inputs = inputs();
    inputs.take(applied(pod_on("n1", "1", &[])));
    inputs.lease(lease("1", "c1", X));
    assert_eq!(addresses(&inputs), [X]);
    inputs.take_dirty();
    inputs.take(applied(pod_on("n1", "1", &[])));
    assert_eq!(addresses(&inputs), [X]);
    let dirty = inputs.take_dirty();
    assert_eq!(dirty, Dirty::default(), "the older status says nothing new");
}

#[test]
fn a_pod_of_the_same_name_on_another_node_has_its_own_address_and_not_the_lease() {
    let mut inputs = inputs();
    inputs.take(applied(pod_on("n1", "1", &[X])));
    inputs.lease(lease("1", "c1", X));
    // web-0 is deleted by force, and is recreated elsewhere while it still runs here.
    inputs.take(applied(pod_on("n2", "2", &[Y])));
    assert_eq!(addresses(&inputs), [Y]);
    let pod = lease("1", "c1", X);
    inputs.release(pod.pod.as_ref().unwrap(), &pod.attachment);
    assert_eq!(addresses(&inputs), [Y]);
}

#[test]
fn a_lease_that_ends_gives_the_pod_back_what_the_cluster_says() {
    let mut inputs = inputs();
    inputs.take(applied(pod_on("n1", "1", &[FOREIGN])));
    let leased = lease("1", "c1", X);
    inputs.lease(leased.clone());
    assert_eq!(addresses(&inputs), [X]);
    inputs.release(leased.pod.as_ref().unwrap(), &leased.attachment);
    assert_eq!(addresses(&inputs), [FOREIGN]);
}

#[test]
fn of_this_nodes_ranges_nobody_has_an_address_without_a_lease() {
    let mut inputs = inputs();
    for node in ["n1", "n2"] {
        inputs.take(applied(pod_on(node, "9", &[X, FOREIGN])));
        assert_eq!(addresses(&inputs), [FOREIGN], "{node}");
    }
    let host = Pod {
        network: PodNetwork::Host,
        ..pod_on("n2", "9", &[X])
    };
    inputs.take(applied(host));
    assert!(addresses(&inputs).is_empty());
}

#[test]
fn a_pods_claim_counts_within_the_ranges_of_its_node_whichever_is_said_first() {
    let elsewhere: IpAddr = [10, 0, 3, 7].into();
    let said = || applied(pod_on("n2", "1", &[Y, elsewhere]));
    let nodes = || [node("n2", "10.0.2.0/24"), node("n3", "10.0.3.0/24")];
    let mut first = inputs();
    first.take(said());
    for change in nodes().into_iter().chain([Change::Synced(Kind::Node)]) {
        first.take(change);
    }
    let mut last = inputs();
    last.take(Change::Synced(Kind::Node));
    for change in nodes() {
        last.take(change);
    }
    last.take(said());
    assert_eq!((addresses(&first), addresses(&last)), (vec![Y], vec![Y]));
    // A node that is given another range.
    last.take(node("n2", "10.0.4.0/24"));
    assert!(addresses(&last).is_empty());
}

#[test]
fn a_static_pods_lease_is_its_mirrors() {
    let mut inputs = inputs();
    let leased = lease("hash", "c1", X);
    inputs.lease(leased.clone());
    inputs.take(applied(pod_on("n1", "uid", &[])));
    assert!(inputs.pod_of(&leased).is_none());
    inputs.take(applied(Pod {
        static_uid: Some("hash".into()),
        ..pod_on("n1", "uid", &[])
    }));
    assert!(inputs.pod_of(&leased).is_some());
    assert_eq!(addresses(&inputs), [X]);
}

#[test]
fn of_two_sandboxes_of_a_pod_the_later_counts_and_then_the_other() {
    let mut inputs = inputs();
    inputs.take(applied(pod_on("n1", "1", &[])));
    let again: IpAddr = [10, 0, 1, 8].into();
    inputs.lease(lease("1", "c1", X));
    let second = lease("1", "c2", again);
    inputs.lease(second.clone());
    assert_eq!(addresses(&inputs), [again]);
    inputs.release(second.pod.as_ref().unwrap(), &second.attachment);
    assert_eq!(addresses(&inputs), [X]);
}

#[test]
fn a_pod_that_goes_after_its_addresses_is_forgotten_by_policy() {
    let mut inputs = inputs();
    let pod = ObjectName::new("shop", "web-0");
    let said = [
        applied(pod_on("n2", "1", &[Y])),
        applied(pod_on("n2", "1", &[])),
        Change::Deleted(ObjectId {
            kind: Kind::Pod,
            name: pod.clone(),
        }),
    ];
    for change in said {
        inputs.take(change);
        assert!(inputs.take_dirty().touched.pods.contains(&pod));
    }
}

#[test]
fn a_namespace_that_goes_before_its_pods_keeps_its_labels_until_the_last_is_gone() {
    let mut inputs = inputs();
    let namespace = Namespace {
        name: "shop".into(),
        labels: BTreeMap::from([("team".into(), "a".into())]),
        phase: NamespacePhase::Active,
        keeps_established: false,
    };
    let said = |it: &Namespace| Change::Applied(Object::Namespace(Arc::new(it.clone())));
    let gone = || Change::Deleted(namespace_id(&"shop".into()));
    let pod = |name: &str| Pod {
        id: ObjectName::new("shop", name),
        ..pod_on("n2", name, &[])
    };
    let pod_gone = |name: &str| {
        let name = ObjectName::new("shop", name);
        let kind = Kind::Pod;
        Change::Deleted(ObjectId { kind, name })
    };
    let known = |inputs: &Inputs| {
        let known = inputs.snapshot().namespaces.get("shop");
        known.map(|it| (it.labels.clone(), it.phase))
    };
    let leaving = Some((namespace.labels.clone(), NamespacePhase::Terminating));
    for change in [said(&namespace), applied(pod("a")), applied(pod("b"))] {
        inputs.take(change);
    }
    // Said twice is one pod.
    inputs.take(applied(Pod {
        ready: true,
        ..pod("a")
    }));
    inputs.take(gone());
    assert_eq!(known(&inputs), leaving);
    inputs.take(pod_gone("a"));
    assert_eq!(known(&inputs), leaving);
    inputs.take_dirty();
    inputs.take(pod_gone("b"));
    assert_eq!(known(&inputs), None);
    assert!(inputs.take_dirty().namespaces.contains("shop"));
    // It is another one that comes meanwhile.
    for change in [
        said(&namespace),
        applied(pod("a")),
        gone(),
        said(&namespace),
    ] {
        inputs.take(change);
    }
    inputs.take(pod_gone("a"));
    let active = Some((namespace.labels.clone(), NamespacePhase::Active));
    assert_eq!(known(&inputs), active);
    inputs.take(gone());
    assert_eq!(known(&inputs), None, "without pods it goes at once");
}
