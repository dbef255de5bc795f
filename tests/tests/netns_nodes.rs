//! Ring 4: two nodes on one layer 2. Pods and nodes reach each other by address in both families, policy is
//! judged where the pod is, and routes come, stay and go as they should.

#![allow(clippy::unwrap_used, reason = "a test that fails should say where")]

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use weir_tests::lan::{Pair, Place};
use weir_tests::netns::Netns;
use weir_tests::node::{Family, Pod, binary};
use weir_tests::traffic::{
    Answer, Conversation, PATIENCE, SILENCE, any, ask_tcp, ask_udp, drops, eventually, exchange,
    is_echoed, recent_drops, udp_socket,
};
use weir_tests::workloads::{Transport, Workload};

/// How long a change of a manifest may take until packets meet it.
const SOON: Duration = Duration::from_secs(1);
const FAMILIES: [Family; 2] = [Family::V4, Family::V6];
/// The route protocol of ours, as `ip` writes it.
const OURS: &str = "proto 87";

fn web(namespace: &str, name: &str) -> Workload {
    Workload::named(namespace, name)
        .port(Transport::Tcp, 80)
        .port(Transport::Udp, 80)
}

fn port_80(pod: &Pod, family: Family) -> SocketAddr {
    SocketAddr::new(pod.address(family).unwrap(), 80)
}

/// What TCP and UDP say of a target.
fn ask_both(from: &Netns, target: SocketAddr, patience: Duration) -> [Answer; 2] {
    [
        ask_tcp(from, target, patience),
        ask_udp(from, target, patience),
    ]
}

fn by(name: &str) -> [Answer; 2] {
    [Answer::By(name.into()), Answer::By(name.into())]
}

/// Our routes of a node, of both families, sorted.
fn routes(netns: &Netns) -> Vec<String> {
    let mut lines: Vec<String> = ["-4", "-6"]
        .iter()
        .flat_map(|family| {
            let shown = netns.ip(&format!("{family} route show")).unwrap();
            shown
                .lines()
                .map(|it| it.trim().to_owned())
                .collect::<Vec<_>>()
        })
        .filter(|line| line.contains(OURS))
        .collect();
    lines.sort();
    lines
}

/// Is one of our routes to this prefix there?
fn has_route(netns: &Netns, to: &str) -> bool {
    routes(netns)
        .iter()
        .any(|line| line.split(' ').any(|word| word == to))
}

#[test]
fn pods_and_nodes_reach_each_other() {
    let pair = Pair::start("reach").unwrap();
    let pods = [0, 1].map(|on| {
        let pod = web("a", &format!("pod{on}"));
        pair.run_pod(on, pod).unwrap()
    });
    let _servers = [0, 1].map(|on| pair.serve_on_node(on, 8080).unwrap());
    for family in FAMILIES {
        for (here, there) in [(0, 1), (1, 0)] {
            let (pod, other) = (&pods[here], &pods[there]);
            let node = pair.nodes[here].machine().netns();
            let target = port_80(other, family);
            let what = format!("{family:?} from {here} to {there}");
            let answer = ask_both(pod.netns(), target, PATIENCE);
            assert_eq!(answer, by(&other.workload.name), "pod to pod, {what}");
            let answer = ask_both(node, target, PATIENCE);
            assert_eq!(answer, by(&other.workload.name), "node to pod, {what}");
            let host = pair.on_node(there, family, 8080).unwrap();
            let answer = ask_both(pod.netns(), host, PATIENCE);
            assert_eq!(answer, by(&pair.places[there].name), "pod to node, {what}");
            assert!(
                is_echoed(pod.netns(), target.ip(), PATIENCE).unwrap(),
                "{what}"
            );
        }
    }
    // What nobody has is refused where it would be, and does not go round.
    let nobody = "10.244.2.200".parse().unwrap();
    let asked = ask_tcp(pods[0].netns(), SocketAddr::new(nobody, 80), PATIENCE);
    assert!(matches!(asked, Answer::Other(_)), "{asked:?}");
    let status = pair.nodes[0].ask("status").unwrap();
    assert_eq!(status["nodes"]["known"], 2);
    assert_eq!(status["nodes"]["unreachable"].as_array().unwrap().len(), 0);
    let metrics = pair.nodes[0].metrics().unwrap();
    for line in ["weir_nodes 2", "weir_unreachable_nodes 0"] {
        assert!(metrics.lines().any(|it| it == line), "{line}");
    }
}

#[test]
fn ingress_is_judged_by_the_real_source_where_the_pod_is() {
    let pair = Pair::start("ingress").unwrap();
    let server = pair.run_pod(1, web("a", "server")).unwrap();
    let friend = pair.run_pod(0, Workload::named("a", "friend")).unwrap();
    let stranger = pair.run_pod(0, Workload::named("a", "stranger")).unwrap();
    let policy = "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\n\
                  metadata: {name: friends, namespace: a}\nspec:\n  \
                  podSelector: {matchLabels: {app: server}}\n  policyTypes: [Ingress]\n  \
                  ingress: [{from: [{podSelector: {matchLabels: {app: friend}}}]}]\n";
    pair.write_manifest("policy.yaml", policy).unwrap();
    for family in FAMILIES {
        let target = port_80(&server, family);
        let silent = [Answer::Silence, Answer::Silence];
        let patience = SOON + 4 * SILENCE;
        eventually(
            "the stranger is refused",
            patience,
            || ask_both(stranger.netns(), target, SILENCE),
            |a| *a == silent,
        )
        .unwrap();
        eventually(
            "the friend is not",
            patience,
            || ask_both(friend.netns(), target, SILENCE),
            |a| *a == by("server"),
        )
        .unwrap();

        // Every refusal is counted where the pod is, and nowhere else. On a slow machine an earlier
        // question may still be under way; that none is counted twice, `netns_policy` knows.
        const BURST: u64 = 200;
        let count = || [0, 1].map(|on| drops(&pair.nodes[on], "ingress_denied").unwrap());
        let before = count();
        let socket = udp_socket(stranger.netns(), any(target), SILENCE).unwrap();
        for _ in 0..BURST {
            socket.send_to(b"x", target).unwrap();
        }
        let at_receiver = || count()[1] - before[1];
        eventually("all are counted", SOON, at_receiver, |n| *n >= BURST).unwrap();
        assert_eq!(count()[0], before[0], "{family:?}");

        // The pod's own node is always allowed, another node is not.
        let own = pair.nodes[1].machine().netns();
        assert_eq!(ask_both(own, target, PATIENCE), by("server"));
        let other = pair.nodes[0].machine().netns();
        assert_eq!(ask_both(other, target, SILENCE), silent);
    }
    let explained = recent_drops(&pair.nodes[1], "ingress_denied").unwrap();
    let mut said = explained.iter().map(ToString::to_string);
    let named = |it: &String| it.contains("a/stranger") && it.contains("a/friends");
    assert!(said.any(|it| named(&it)), "{explained:?}");
}

/// As a StatefulSet's pod of a node that is drained, whose runtime has not called DEL yet.
#[test]
fn a_pod_made_again_on_another_node_has_its_rules_there_and_its_old_sandbox_has_none() {
    let pair = Pair::start("moved").unwrap();
    let server = pair.run_pod(1, web("a", "server")).unwrap();
    let old = pair.run_pod(1, Workload::named("a", "db-0")).unwrap();
    let policy = "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\n\
                  metadata: {name: friends, namespace: a}\nspec:\n  \
                  podSelector: {matchLabels: {app: server}}\n  policyTypes: [Ingress]\n  \
                  ingress: [{from: [{podSelector: {matchLabels: {app: db-0}}}]}]\n";
    pair.write_manifest("policy.yaml", policy).unwrap();
    let asked = |from: &Pod, what: &str, expected: [Answer; 2]| {
        for family in FAMILIES {
            let target = port_80(&server, family);
            let ask = || ask_both(from.netns(), target, SILENCE);
            eventually(what, SOON + 4 * SILENCE, ask, |a| *a == expected).unwrap();
        }
    };
    asked(&old, "it is allowed", by("server"));

    let of_old = [(1, "pods/a.db-0.yaml"), (0, "pods/a.db-0.elsewhere.yaml")];
    for (on, file) in of_old {
        std::fs::remove_file(pair.nodes[on].manifests().join(file)).unwrap();
    }
    let new = pair.run_pod(0, Workload::named("a", "db-0")).unwrap();
    assert_ne!(new.addresses, old.addresses);
    let silent = || [Answer::Silence, Answer::Silence];
    asked(&new, "the new one is allowed", by("server"));
    asked(&old, "what runs in the old sandbox is not", silent());

    // Then DEL comes.
    let env = old.cni_env();
    let env: Vec<_> = env
        .iter()
        .map(|(key, value)| (*key, value.as_str()))
        .collect();
    let node = &pair.nodes[1];
    let said = node.cni("DEL", &env, &node.cni_config("1.1.0")).unwrap();
    assert!(said.status.success(), "{said:?}");
    asked(&new, "the new one is allowed still", by("server"));
}

#[test]
fn egress_is_judged_where_the_sender_is_and_replies_pass() {
    let pair = Pair::start("egress").unwrap();
    let client = pair.run_pod(0, web("a", "client")).unwrap();
    let allowed = pair.run_pod(1, web("b", "allowed")).unwrap();
    let denied = pair.run_pod(1, web("b", "denied")).unwrap();
    let policies = "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\n\
                    metadata: {name: out, namespace: a}\nspec:\n  podSelector: {}\n  \
                    policyTypes: [Egress, Ingress]\n  egress: [{to: [{namespaceSelector: {}, \
                    podSelector: {matchLabels: {app: allowed}}}]}]\n---\n\
                    apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\n\
                    metadata: {name: silent, namespace: b}\nspec:\n  podSelector: {}\n  \
                    policyTypes: [Egress]\n";
    pair.write_manifest("policy.yaml", policies).unwrap();
    let silent = [Answer::Silence, Answer::Silence];
    for family in FAMILIES {
        let ask = |pod: &Pod| ask_both(client.netns(), port_80(pod, family), SILENCE);
        let patience = SOON + 4 * SILENCE;
        eventually("denied", patience, || ask(&denied), |a| *a == silent).unwrap();
        let before = [0, 1].map(|on| drops(&pair.nodes[on], "egress_denied").unwrap());
        assert_eq!(ask(&denied), silent);
        eventually(
            "allowed",
            patience,
            || ask(&allowed),
            |a| *a == by("allowed"),
        )
        .unwrap();
        let after = [0, 1].map(|on| drops(&pair.nodes[on], "egress_denied").unwrap());
        assert!(after[0] > before[0], "counted where the sender is");
        assert_eq!(after[1], before[1], "replies are no egress of their own");
        // The other way round: neither may b send, nor would a receive.
        let back = ask_both(allowed.netns(), port_80(&client, family), SILENCE);
        assert_eq!(back, silent);
    }
}

#[test]
fn routes_come_back_within_a_second_and_go_with_their_node() {
    let pair = Pair::start("routes").unwrap();
    let netns = pair.nodes[0].machine().netns();
    let [v4, v6] = &pair.places[1].pod_cidrs;
    for (family, to) in [("-4", v4), ("-6", v6)] {
        assert!(has_route(netns, to), "{:?}", routes(netns));
        let mut slowest = Duration::ZERO;
        const TRIES: usize = 20;
        for _ in 0..TRIES {
            netns
                .ip(&format!("{family} route del {to} {OURS}"))
                .unwrap();
            let begun = Instant::now();
            eventually("the route is back", SOON, || has_route(netns, to), |is| *is).unwrap();
            slowest = slowest.max(begun.elapsed());
        }
        println!("{to}: back after {slowest:?} at the most, of {TRIES}");
    }
    // A device that goes down takes routes with it without a word, and IPv6 addresses if it may.
    let keep = "net.ipv6.conf.eth0.keep_addr_on_down";
    netns.set_sysctl(keep, "1").unwrap();
    netns.ip("link set eth0 down").unwrap();
    assert!(!has_route(netns, v4));
    netns.ip("link set eth0 up").unwrap();
    eventually(
        "back with the device",
        SOON,
        || has_route(netns, v4),
        |is| *is,
    )
    .unwrap();

    // Somebody else's route stays, and is said.
    let third = Place::number("routes", 3);
    let file = format!("node-{}.yaml", third.name);
    netns.ip("route add 10.244.3.0/24 via 10.210.0.99").unwrap();
    pair.declare(&third).unwrap();
    let reason = "a route to 10.244.3.0/24 that is not ours is in the way";
    eventually(
        "said",
        SOON,
        || pair.nodes[0].conditions("Unreachable"),
        |it| it.contains(reason),
    )
    .unwrap();
    assert_eq!(
        pair.nodes[0].readyz(),
        "ok",
        "another node's trouble is that node's"
    );
    assert!(!has_route(netns, "10.244.3.0/24"));
    assert!(
        has_route(netns, "fd00:10:244:3::/64"),
        "the other family is not hindered"
    );
    netns.ip("route del 10.244.3.0/24").unwrap();
    let third_is_there = || has_route(netns, "10.244.3.0/24");
    eventually("ours instead", SOON, third_is_there, |is| *is).unwrap();
    eventually(
        "no longer said",
        2 * SOON,
        || pair.nodes[0].conditions("Unreachable"),
        |it| !it.contains(reason),
    )
    .unwrap();

    // A node that goes leaves nothing.
    for node in &pair.nodes {
        std::fs::remove_file(node.manifests().join(&file)).unwrap();
    }
    let gone = || {
        routes(netns)
            .into_iter()
            .filter(|it| it.contains("244.3.") || it.contains("244:3:"))
            .count()
    };
    eventually("gone", SOON, gone, |n| *n == 0).unwrap();
    assert!(has_route(netns, v4) && has_route(netns, v6));
    let own = format!("unreachable {}", pair.places[0].pod_cidrs[0]);
    assert!(
        routes(netns).iter().any(|it| it.starts_with(&own)),
        "{:?}",
        routes(netns)
    );
}

#[test]
fn routes_and_traffic_outlive_the_agent_until_cleanup() {
    let mut pair = Pair::start("outlive").unwrap();
    let client = pair.run_pod(0, Workload::named("a", "client")).unwrap();
    let server = pair.run_pod(1, web("a", "server")).unwrap();
    let mut open: Vec<Conversation> = FAMILIES
        .map(|family| {
            let target = port_80(&server, family);
            Conversation::open_in(client.netns(), target, PATIENCE).unwrap()
        })
        .into();
    let before = [0, 1].map(|on| routes(pair.nodes[on].machine().netns()));
    assert_eq!(
        before[0].len(),
        4,
        "two to the other node, two of its own: {before:?}"
    );
    for node in &mut pair.nodes {
        node.kill_agent().unwrap();
    }
    for (old, family) in open.iter_mut().zip(FAMILIES) {
        let target = port_80(&server, family);
        assert_eq!(old.ask().unwrap(), "server");
        assert_eq!(ask_both(client.netns(), target, PATIENCE), by("server"));
        let socket = udp_socket(client.netns(), any(target), PATIENCE).unwrap();
        socket.connect(target).unwrap();
        assert_eq!(exchange(&socket).unwrap(), "server");
    }
    let after = [0, 1].map(|on| routes(pair.nodes[on].machine().netns()));
    assert_eq!(after, before);

    // An agent that starts before it has heard of any node holds them, and the pods' ranges.
    let folder = pair.nodes[0].manifests();
    let away = pair.nodes[0].machine().dir().join("manifests-away");
    let hidden = |name: &str| (folder.join(name), away.join(name));
    std::fs::create_dir(&away).unwrap();
    let own = hidden(&format!("node-{}.yaml", pair.places[0].name));
    std::fs::rename(&own.0, &own.1).unwrap();
    pair.nodes[0].start_agent().unwrap();
    pair.nodes[0].wait_ready().unwrap();
    assert_eq!(routes(pair.nodes[0].machine().netns()), before[0]);
    let late = pair.run_pod(0, Workload::named("a", "late")).unwrap();
    let answer = ask_both(late.netns(), port_80(&server, Family::V4), PATIENCE);
    assert_eq!(answer, by("server"), "a pod of the last known range");
    pair.nodes[0].kill_agent().unwrap();

    let machine = pair.nodes[0].machine();
    let output = machine
        .netns()
        .command(binary("weir-agent"))
        .arg("cleanup")
        .arg("--bpffs")
        .arg(machine.bpffs().path().join("weir"))
        .arg("--cgroup")
        .arg(machine.cgroup().path())
        .arg("--run-dir")
        .arg(machine.dir().join("run"))
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    assert_eq!(routes(machine.netns()), [""; 0]);
}

#[test]
fn a_node_waits_for_its_ranges() {
    let mut pair = Pair::prepare("late").unwrap();
    let place = pair.places[0].clone();
    let mut early = place.object();
    early["spec"] = serde_json::json!({});
    let file = format!("node-{}.yaml", place.name);
    let node = &mut pair.nodes[0];
    node.start_agent().unwrap();
    node.start_dns().unwrap();
    let name = &place.name;
    let patience = Duration::from_secs(30);
    let absent = format!("there is no Node {name} yet: is that what its kubelet calls it?");
    eventually("no Node", patience, || node.readyz(), |it| *it == absent).unwrap();
    node.write_manifest(&file, &early.to_string()).unwrap();
    let reason = format!(
        "Node {name} has no spec.podCIDRs yet: is the controller manager run with --allocate-node-cidrs?"
    );
    eventually("no range", SOON, || node.readyz(), |it| *it == reason).unwrap();

    let mut pod = node.declare_pod(Workload::named("a", "pod")).unwrap();
    let refused = format!("{:#}", node.add_pod(&mut pod).unwrap_err());
    assert!(
        refused.contains("\"code\":11") && refused.contains(&reason),
        "{refused}"
    );
    let status = node.cni("STATUS", &[], &node.cni_config("1.1.0")).unwrap();
    let said = String::from_utf8_lossy(&status.stdout).into_owned();
    assert!(
        said.contains("\"code\":50") && said.contains(name),
        "{said}"
    );

    // IPv4 first, IPv6 later: pods get what is there.
    let mut half = place.object();
    half["spec"] = serde_json::json!({"podCIDR": place.pod_cidrs[0]});
    node.write_manifest(&file, &half.to_string()).unwrap();
    node.wait_ready().unwrap();
    node.add_pod(&mut pod).unwrap();
    assert_eq!(pod.addresses, ["10.244.1.2".parse::<IpAddr>().unwrap()]);
    node.write_manifest(&file, &place.object().to_string())
        .unwrap();
    let netns = node.machine().netns();
    let joined = || has_route(netns, &place.pod_cidrs[1]);
    eventually("the second range", SOON, joined, |is| *is).unwrap();
    let both = node.run_pod(web("a", "both")).unwrap();
    assert_eq!(both.addresses.len(), 2, "{:?}", both.addresses);

    // The Node was deleted and made anew, with other ranges: what runs goes on and is named.
    let mut moved = place.clone();
    moved.pod_cidrs = ["10.244.9.0/24".into(), "fd00:10:244:9::/64".into()];
    node.write_manifest(&file, &moved.object().to_string())
        .unwrap();
    let outside = || node.conditions("OutsideRange");
    let are_named = |it: &String| it.contains("Pod a/pod: ") && it.contains("Pod a/both: ");
    eventually("named", SOON, outside, are_named).unwrap();
    assert_eq!(node.readyz(), "ok", "what runs goes on");
    assert_eq!(
        ask_both(netns, port_80(&both, Family::V4), PATIENCE),
        by("both")
    );
    let new = node.run_pod(web("a", "new")).unwrap();
    let address = new.address(Family::V4).unwrap();
    assert_eq!(address, "10.244.9.2".parse::<IpAddr>().unwrap());
    for old in [pod, both] {
        node.delete_pod(old).unwrap();
    }
    eventually("all well", 2 * SOON, outside, String::is_empty).unwrap();
}

#[test]
fn a_node_behind_a_router_is_named_and_stops_nobody() {
    let mut pair = Pair::start("router").unwrap();
    let mut far = Place::number("far", 7);
    far.addresses = ["10.1.2.3".into(), "fd00:1::3".into()];
    pair.declare(&far).unwrap();
    let node = &pair.nodes[0];
    let reason = "node far7 at 10.1.2.3 is not on this node's link: native routes need one layer 2";
    eventually(
        "named",
        SOON,
        || node.conditions("Unreachable"),
        |it| it.contains(reason),
    )
    .unwrap();
    assert_eq!(node.readyz(), "ok", "a rolling update goes on");
    let status = node.ask("status").unwrap();
    assert_eq!(status["nodes"]["known"], 3);
    let unreachable = status["nodes"]["unreachable"].as_array().unwrap();
    assert_eq!(unreachable.len(), 1);
    assert_eq!(unreachable[0]["node"], "far7");
    let words = node.weir("status").output().unwrap();
    let words = String::from_utf8_lossy(&words.stdout).into_owned();
    assert!(words.contains("Unreachable Node far7"), "{words}");
    assert!(node.metrics().unwrap().contains("weir_unreachable_nodes 1"));
    let server = pair.run_pod(1, web("a", "server")).unwrap();
    let client = pair.run_pod(0, Workload::named("a", "client")).unwrap();
    let answer = ask_both(client.netns(), port_80(&server, Family::V6), PATIENCE);
    assert_eq!(
        answer,
        by("server"),
        "pods are started and reach who can be reached"
    );

    // Nor does it keep an agent that starts from announcing the network.
    let node = &mut pair.nodes[0];
    node.kill_agent().unwrap();
    let conf = node.machine().dir().join("cni/net.d");
    let conf_dir = ["--cni-conf-dir".to_owned(), conf.display().to_string()];
    node.options.agent_args.extend(conf_dir);
    node.start_agent().unwrap();
    node.wait_ready().unwrap();
    let conflist = conf.join("05-weir.conflist");
    eventually("announced", SOON, || conflist.exists(), |it| *it).unwrap();
    assert!(node.conditions("Unreachable").contains(reason));
}
