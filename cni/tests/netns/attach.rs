//! ADD and CHECK when all goes well, for every version and family.

use std::sync::atomic::Ordering;

use serde_json::{Value, json};

use crate::node::{Answer, Call, Netns, Node, eventually};

const VERSIONS: [&str; 3] = ["0.4.0", "1.0.0", "1.1.0"];

const FAMILIES: [&[&str]; 3] = [
    &["10.64.0.0/24"],
    &["fd64::/64"],
    &["10.64.0.0/24", "fd64::/64"],
];

fn addresses(result: &Value) -> Vec<String> {
    let ips = result["ips"].as_array().unwrap();
    ips.iter()
        .map(|ip| {
            ip["address"]
                .as_str()
                .unwrap()
                .split('/')
                .next()
                .unwrap()
                .into()
        })
        .collect()
}

#[test]
fn a_pod_reaches_its_node_and_other_pods_in_every_family_and_version() {
    for cidrs in FAMILIES {
        let node = Node::new(cidrs);
        for version in VERSIONS {
            let (one, two) = (Netns::new("one"), Netns::new("two"));
            let call = |command, id, netns: &Netns, extra| {
                let mut call = Call::new(command, id, netns);
                call.version = version;
                call.extra = extra;
                node.call(&call)
            };
            let result = call("ADD", "c1", &one, json!({})).expect_ok();
            let other = call("ADD", "c2", &two, json!({})).expect_ok();
            assert_result(&result, version, cidrs, &one, &node.device("c1"));

            for own in ["192.0.2.1", "2001:db8::1"] {
                let family = cidrs.iter().any(|it| it.contains(':') == own.contains(':'));
                assert_eq!(
                    one.reaches(&node.netns, own),
                    family,
                    "{version} {cidrs:?} {own}"
                );
            }
            for (from, to, result) in [
                (&one, &two, &other),
                (&two, &one, &result),
                (&node.netns, &one, &result),
            ] {
                for address in addresses(result) {
                    assert!(from.reaches(to, &address), "{version} {address}");
                }
            }

            let prev = json!({"prevResult": result});
            call("CHECK", "c1", &one, prev.clone()).expect_ok();
            call("DEL", "c1", &one, prev.clone()).expect_ok();
            call("CHECK", "c1", &one, prev).expect_error(3);
            call("DEL", "c2", &two, json!({})).expect_ok();
            eventually("the interface goes", || !one.has_link("eth0"));
            node.expect_clean();
        }
    }
}

fn assert_result(result: &Value, version: &str, cidrs: &[&str], netns: &Netns, device: &str) {
    assert_eq!(result["cniVersion"], version);
    let interfaces = result["interfaces"].as_array().unwrap();
    assert_eq!(interfaces.len(), 2);
    assert_eq!(interfaces[0]["name"], device);
    assert_eq!(interfaces[0].get("sandbox"), None);
    assert_eq!(interfaces[1]["name"], "eth0");
    assert_eq!(interfaces[1]["sandbox"], netns.path().to_str().unwrap());
    let mtu = (version == "1.1.0").then(|| json!(1400));
    assert_eq!(interfaces[1].get("mtu"), mtu.as_ref());
    let inside = netns.run(&["ip", "link", "show", "dev", "eth0"]);
    assert!(inside.contains(interfaces[1]["mac"].as_str().unwrap()));
    assert!(inside.contains("mtu 1400"));

    let ips = result["ips"].as_array().unwrap();
    let routes = result["routes"].as_array().unwrap();
    assert_eq!((ips.len(), routes.len()), (cidrs.len(), cidrs.len()));
    for (ip, route) in ips.iter().zip(routes) {
        let v6 = ip["address"].as_str().unwrap().contains(':');
        let (length, gateway, everywhere) = match v6 {
            false => ("/32", "169.254.1.1", "0.0.0.0/0"),
            true => ("/128", "fe80::1", "::/0"),
        };
        assert!(ip["address"].as_str().unwrap().ends_with(length));
        assert_eq!(ip["interface"], 1);
        assert_eq!(ip["gateway"], gateway);
        assert_eq!(route, &json!({"dst": everywhere, "gw": gateway}));
        let family = (version == "0.4.0").then(|| json!(if v6 { "6" } else { "4" }));
        assert_eq!(ip.get("version"), family.as_ref());
    }
    assert_eq!(result["dns"], json!({"nameservers": ["10.96.0.10"]}));
}

#[test]
fn no_device_is_up_before_its_policy_is_in_force() {
    let node = Node::new(&["10.64.0.0/24"]);
    node.fake.looks.store(true, Ordering::Relaxed);
    let pod = Netns::new("pod");
    node.add("c1", &pod);
    assert_eq!(
        *node.fake.calls.lock().unwrap(),
        ["open down", "protect down"]
    );
}

#[test]
fn version_needs_no_agent() {
    let mut node = Node::new(&["10.64.0.0/24"]);
    node.kill_agent();
    let pod = Netns::new("pod");
    let answer = node.call(&Call::new("VERSION", "", &pod)).expect_ok();
    assert_eq!(answer["cniVersion"], "1.1.0");
    for version in VERSIONS {
        let supported = answer["supportedVersions"].as_array().unwrap();
        assert!(supported.contains(&json!(version)));
    }
}

#[test]
fn wrong_input_is_refused_with_the_code_of_the_specification() {
    let node = Node::new(&["10.64.0.0/24"]);
    let pod = Netns::new("pod");
    let plain = Call::new("ADD", "c1", &pod);
    let with = |change: &dyn Fn(&mut Call)| {
        let mut call = plain.clone();
        change(&mut call);
        call
    };
    let a_file = node.dir.path().join("file");
    std::fs::write(&a_file, "").unwrap();
    let cases: Vec<(&str, Call, u64)> = vec![
        ("an unknown version", with(&|c| c.version = "9.0.0"), 1),
        (
            "a missing namespace",
            with(&|c| c.netns = Some("/run/netns/weir-none".into())),
            3,
        ),
        ("no namespace", with(&|c| c.netns = None), 4),
        (
            "a relative path",
            with(&|c| c.netns = Some("netns".into())),
            4,
        ),
        (
            "a file that is no namespace",
            with(&|c| c.netns = Some(a_file.clone())),
            4,
        ),
        (
            "a namespace of another kind",
            with(&|c| c.netns = Some("/proc/self/ns/mnt".into())),
            5,
        ),
        (
            "the node's own namespace",
            with(&|c| c.netns = Some(node.netns.path())),
            4,
        ),
        (
            "a bad container id",
            with(&|c| c.container_id = "../c1".into()),
            4,
        ),
        (
            "a long container id",
            with(&|c| c.container_id = "c".repeat(201)),
            4,
        ),
        (
            "no container id",
            with(&|c| c.container_id = String::new()),
            4,
        ),
        (
            "a bad interface name",
            with(&|c| c.ifname = "eth/0".into()),
            4,
        ),
        (
            "a pattern for a name",
            with(&|c| c.ifname = "eth%d".into()),
            4,
        ),
        (
            "a long interface name",
            with(&|c| c.ifname = "e".repeat(16)),
            4,
        ),
        ("an unknown command", with(&|c| c.command = "RUN"), 4),
        (
            "a field of a wrong type",
            with(&|c| c.extra = json!({"mtu": "big"})),
            7,
        ),
        (
            "a bad network name",
            with(&|c| c.extra = json!({"name": "a/b"})),
            7,
        ),
        (
            "CHECK without prevResult",
            with(&|c| c.command = "CHECK"),
            7,
        ),
        ("GC without a list", with(&|c| c.command = "GC"), 7),
        (
            "GC in an old version",
            with(&|c| {
                c.command = "GC";
                c.version = "1.0.0"
            }),
            1,
        ),
    ];
    for (what, call, code) in cases {
        let answer: Answer = node.call(&call);
        assert!(!answer.ok, "{what}");
        assert_eq!(answer.json["code"], code, "{what}: {}", answer.json);
    }
    node.expect_clean();
}

#[test]
fn check_notices_what_is_missing() {
    let node = Node::new(&["10.64.0.0/24", "fd64::/64"]);
    let device = node.device("c1");
    let cases: &[(&str, bool, &[&str])] = &[
        (
            "an address",
            true,
            &["ip", "addr", "del", "10.64.0.2/32", "dev", "eth0"],
        ),
        (
            "the default route",
            true,
            &["ip", "-6", "route", "del", "default"],
        ),
        (
            "the gateway",
            true,
            &["ip", "neigh", "del", "169.254.1.1", "dev", "eth0"],
        ),
        ("the interface", true, &["ip", "link", "del", "eth0"]),
        (
            "the interface is up",
            true,
            &["ip", "link", "set", "eth0", "down"],
        ),
        (
            "the pod's route",
            false,
            &["ip", "route", "del", "10.64.0.2"],
        ),
        (
            "the pod's neighbour",
            false,
            &["ip", "neigh", "del", "fd64::2", "dev", &device],
        ),
        (
            "the node's address",
            false,
            &["ip", "link", "set", &device, "address", "02:00:00:00:00:01"],
        ),
    ];
    for (what, inside, command) in cases {
        let pod = Netns::new("pod");
        let mut node = Node::new(&["10.64.0.0/24", "fd64::/64"]);
        let result = node.add("c1", &pod);
        let mut check = Call::new("CHECK", "c1", &pod);
        check.extra = json!({"prevResult": result});
        node.call(&check).expect_ok();
        let netns = if *inside { &pod } else { &node.netns };
        netns.run(command);
        let details = node.call(&check).expect_error(102);
        assert!(!details.is_empty(), "{what}");
        node.kill_agent();
        node.call(&check).expect_error(11);
    }
}

#[test]
fn a_chained_add_keeps_what_came_before() {
    let node = Node::new(&["10.64.0.0/24"]);
    let pod = Netns::new("pod");
    let mut call = Call::new("ADD", "c1", &pod);
    call.extra = json!({"prevResult": {
        "cniVersion": "1.1.0",
        "interfaces": [{"name": "other0"}],
        "ips": [{"address": "198.51.100.7/32", "interface": 0}],
    }});
    let result = node.call(&call).expect_ok();
    assert_eq!(result["interfaces"][0]["name"], "other0");
    assert_eq!(result["interfaces"][2]["name"], "eth0");
    assert_eq!(result["ips"][0]["interface"], 0);
    assert_eq!(result["ips"][1]["interface"], 2);
}

#[test]
fn ipv6_works_where_the_runtime_switched_it_off() {
    let node = Node::new(&["fd64::/64"]);
    for (container, of) in [("c1", "all"), ("c2", "default")] {
        let pod = Netns::new("pod");
        let switch = format!("net.ipv6.conf.{of}.disable_ipv6=1");
        pod.run(&["sysctl", "-qw", &switch]);
        node.add(container, &pod);
        assert!(pod.reaches(&node.netns, "2001:db8::1"), "{of}");
    }
}

/// Not a target: row 14 of docs/targets.md is measured by the bench, with a release build.
#[test]
fn thirty_adds_at_once_get_thirty_addresses() {
    let node = Node::new(&["10.64.0.0/24"]);
    let pods: Vec<Netns> = (0..30).map(|_| Netns::new("pod")).collect();
    let call = |command, number: usize| {
        node.call(&Call::new(command, &format!("c{number}"), &pods[number]))
    };
    let mut alone = Vec::new();
    let mut nothing = Vec::new();
    for number in 0..30 {
        nothing.push(call("VERSION", number).took);
        let added = call("ADD", number);
        let took = added.took;
        added.expect_ok();
        let deleted = call("DEL", number);
        alone.push((took, deleted.took));
        deleted.expect_ok();
    }
    let median = |mut of: Vec<std::time::Duration>| {
        of.sort();
        of[of.len() / 2]
    };
    let (adds, dels) = alone.into_iter().unzip();
    println!(
        "one at a time: VERSION {:?}, ADD {:?}, DEL {:?}",
        median(nothing),
        median(adds),
        median(dels)
    );

    let took: Vec<_> = std::thread::scope(|scope| {
        let call = &call;
        let threads: Vec<_> = (0..30)
            .map(|number| scope.spawn(move || call("ADD", number)))
            .collect();
        threads
            .into_iter()
            .map(|it| it.join().unwrap())
            .map(|answer| {
                let took = answer.took;
                answer.expect_ok();
                took
            })
            .collect()
    });
    println!(
        "thirty at once: median {:?}, last {:?}",
        median(took.clone()),
        took.iter().max()
    );
    let all = node.leases().all();
    let distinct: std::collections::HashSet<_> = all.values().map(|it| &it.addresses).collect();
    assert_eq!(distinct.len(), 30);
    for number in 0..30 {
        call("DEL", number).expect_ok();
    }
    node.expect_clean();
}
