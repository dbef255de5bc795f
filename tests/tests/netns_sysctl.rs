//! The settings that an agent changes on its node, and that a cleanup puts back: exactly those, and exactly
//! as they were. A namespace of its own stands for the node.

#![allow(clippy::unwrap_used, reason = "a test that fails should say where")]

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Read as _};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::path::Path;

use serde_json::json;
use weir_agent::kernel::sysctl;
use weir_common::nat::PortRange;
use weir_tests::netns::Netns;
use weir_tests::node::{Node, NodeOptions};
use weir_tests::traffic::{PATIENCE, eventually};

/// A device of a pod.
const DEVICE: &str = "weir0000000001";

#[test]
fn a_pod_configures_no_node_and_reverse_paths_stay_as_they_are() {
    let netns = Netns::new("paths").unwrap();
    let folder = tempfile::tempdir().unwrap();
    for (key, value) in [
        ("net.ipv4.conf.all.rp_filter", "1"),
        ("net.ipv6.conf.default.accept_ra", "2"),
    ] {
        netns.set_sysctl(key, value).unwrap();
    }
    let of_before = filters(&netns);
    set_node(&netns, folder.path());
    assert_eq!(filters(&netns), of_before);
    netns
        .ip(&format!("link add {DEVICE} type veth peer name far"))
        .unwrap();
    let ipv6 = [("accept_ra", "2"), ("accept_redirects", "1")];
    for (key, value) in ipv6 {
        let key = format!("net.ipv6.conf.{DEVICE}.{key}");
        netns.set_sysctl(&key, value).unwrap();
    }
    let of_before = filters(&netns);
    let set = || netns.run(|| sysctl::set_pod_device(DEVICE)).unwrap();
    assert!(set().unwrap());
    assert_eq!(filters(&netns), of_before);
    for (key, _) in ipv6 {
        let path = format!("/proc/sys/net/ipv6/conf/{DEVICE}/{key}");
        assert_eq!(settings(&netns)[&path], "0", "{key}");
    }
    assert!(!set().unwrap());
}

/// What is said of reverse paths and addresses of the node's own, by path.
fn filters(netns: &Netns) -> BTreeMap<String, String> {
    let mut found = settings(netns);
    found.retain(|path, _| path.ends_with("/rp_filter") || path.ends_with("/accept_local"));
    assert!(found.len() >= 6, "{found:?}");
    found
}

/// Agents up to 60a8515 have moved the filter of `all` to every device but pods'.
#[test]
fn filters_of_reverse_paths_that_an_earlier_agent_has_moved_are_put_back() {
    let netns = unusual();
    let folder = tempfile::tempdir().unwrap();
    let before = settings(&netns);
    let moved = [
        ("default", "0", "1"),
        ("eth0", "0", "1"),
        ("lo", "0", "1"),
        ("all", "1", "0"),
    ];
    let path = |device| format!("/proc/sys/net/ipv4/conf/{device}/rp_filter");
    let record = moved.map(|(device, before, ours)| {
        let key = format!("net.ipv4.conf.{device}.rp_filter");
        netns.set_sysctl(&key, ours).unwrap();
        json!({"path": path(device), "before": before, "ours": ours})
    });
    fs::write(
        folder.path().join("sysctls.json"),
        json!(record).to_string(),
    )
    .unwrap();
    let of_earlier = filters(&netns);
    set_node(&netns, folder.path());
    assert_eq!(filters(&netns), of_earlier);
    let (restored, left) = restore(&netns, folder.path());
    assert_eq!(left, [""; 0]);
    assert_eq!(settings(&netns), before, "{restored:#?}");
}

#[test]
fn a_node_that_begins_to_forward_goes_on_listening_to_its_routers() {
    let netns = Netns::new("routers").unwrap();
    let folder = tempfile::tempdir().unwrap();
    netns.ip("link add eth0 type veth peer name eth1").unwrap();
    for (device, value) in [("eth0", "1"), ("eth1", "0")] {
        let key = format!("net.ipv6.conf.{device}.accept_ra");
        netns.set_sysctl(&key, value).unwrap();
    }
    set_node(&netns, folder.path());
    set_node(&netns, folder.path());
    netns.ip("link add late type veth peer name other").unwrap();
    for (setting, expected) in [
        ("eth0/accept_ra", "2"),
        ("eth1/accept_ra", "0"),
        ("late/accept_ra", "0"),
        ("eth0/forwarding", "1"),
    ] {
        let path = format!("/proc/sys/net/ipv6/conf/{setting}");
        let found = netns
            .run(|| std::fs::read_to_string(&path).unwrap())
            .unwrap();
        assert_eq!(found.trim(), expected, "{setting}");
    }
}

/// A node on which everything that an agent changes is another way, also what the kernel changes along.
fn unusual() -> Netns {
    let netns = Netns::new("sysctls").unwrap();
    netns.ip("link add eth0 type veth peer name eth1").unwrap();
    for (key, value) in [
        ("net.ipv4.ip_forward", "0"),
        ("net.ipv4.conf.eth0.forwarding", "1"),
        ("net.ipv4.conf.all.accept_redirects", "0"),
        ("net.ipv4.conf.all.rp_filter", "1"),
        ("net.ipv6.conf.all.forwarding", "0"),
        ("net.ipv6.conf.eth1.forwarding", "1"),
        ("net.ipv6.conf.default.accept_ra", "1"),
        ("net.ipv6.conf.eth0.accept_ra", "1"),
    ] {
        netns.set_sysctl(key, value).unwrap();
    }
    netns
}

#[test]
fn every_setting_is_put_back_after_any_number_of_agents() {
    let netns = unusual();
    let folder = tempfile::tempdir().unwrap();
    let before = settings(&netns);
    assert!(before.len() > 100, "{before:?}");
    for agent in 1..=3 {
        set_node(&netns, folder.path());
        let changed = settings(&netns)
            .into_iter()
            .filter(|it| before[&it.0] != it.1);
        // Of each family what is changed, and what comes along: see `unusual`.
        assert!(changed.count() >= 8, "agent {agent}");
        // Somebody else's change, which the next agent undoes.
        netns.set_sysctl("net.ipv4.ip_forward", "0").unwrap();
    }
    set_node(&netns, folder.path());
    let (restored, left) = restore(&netns, folder.path());
    assert_eq!(left, [""; 0]);
    assert_eq!(settings(&netns), before, "{restored:#?}");
    let forwarding = "our value of net/ipv4/ip_forward, which is 0 again";
    assert!(restored.iter().any(|it| it == forwarding), "{restored:?}");
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    assert_eq!(restore(&netns, folder.path()), (Vec::new(), Vec::new()));
}

#[test]
fn what_somebody_else_changed_since_stays() {
    let netns = unusual();
    let folder = tempfile::tempdir().unwrap();
    let mut expected = settings(&netns);
    set_node(&netns, folder.path());
    for (key, value) in [
        ("net.ipv6.conf.default.accept_ra", "2"),
        ("net.ipv6.conf.eth0.accept_ra", "0"),
    ] {
        netns.set_sysctl(key, value).unwrap();
        let path = format!("/proc/sys/{}", key.replace('.', "/"));
        *expected.get_mut(&path).unwrap() = value.to_owned();
    }
    assert_eq!(restore(&netns, folder.path()).1, [""; 0]);
    assert_eq!(settings(&netns), expected);
}

#[test]
fn nothing_is_remembered_of_a_node_that_needs_no_change() {
    let netns = unusual();
    let (first, second) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    set_node(&netns, first.path());
    let as_we_want_it = settings(&netns);
    set_node(&netns, second.path());
    assert_eq!(fs::read_dir(second.path()).unwrap().count(), 0);
    assert_eq!(restore(&netns, second.path()), (Vec::new(), Vec::new()));
    assert_eq!(settings(&netns), as_we_want_it);
}

const RESERVED: &str = "/proc/sys/net/ipv4/ip_local_reserved_ports";

/// The whole list, which the kernel gives in one read alone.
fn reserved(netns: &Netns) -> String {
    let read = || {
        let mut list = vec![0; 1 << 18];
        let length = fs::File::open(RESERVED).unwrap().read(&mut list).unwrap();
        String::from_utf8(list[..length].to_vec()).unwrap()
    };
    netns.run(read).unwrap().trim().to_owned()
}

fn reserve(netns: &Netns, run_dir: &Path, (first, last): (u16, u16)) -> bool {
    let reserve = || sysctl::reserve_ports(run_dir, PortRange { first, last });
    netns.run(reserve).unwrap().unwrap()
}

#[test]
fn the_node_gets_none_of_the_ports_that_stand_for_pods() {
    let netns = Netns::new("ports").unwrap();
    let folder = tempfile::tempdir().unwrap();
    for (key, value) in [
        ("net.ipv4.ip_local_port_range", "19900 20099"),
        ("net.ipv4.ip_local_reserved_ports", "8080,19900-19909"),
    ] {
        netns.set_sysctl(key, value).unwrap();
    }
    for is_first in [true, false] {
        assert_eq!(reserve(&netns, folder.path(), (20_000, 29_999)), is_first);
        assert_eq!(reserved(&netns), "8080,19900-19909,20000-29999");
    }
    // Both ways in which the kernel chooses one: all that are left, and then none.
    let bound = || (0..91).map(|_| UdpSocket::bind("127.0.0.1:0")).collect();
    let bound: Vec<io::Result<UdpSocket>> = netns.run(bound).unwrap();
    let mut given: Vec<u16> = bound
        .iter()
        .filter_map(|socket| Some(socket.as_ref().ok()?.local_addr().ok()?.port()))
        .collect();
    given.sort_unstable();
    assert_eq!(given, (19_910..=19_999).collect::<Vec<_>>());
    let connected = || {
        let server = TcpListener::bind("127.0.0.1:80").unwrap();
        let to = server.local_addr().unwrap();
        (0..91)
            .map_while(|_| TcpStream::connect(to).ok())
            .map(|stream| (stream.local_addr().unwrap().port(), stream))
            .collect::<BTreeMap<_, _>>()
            .into_keys()
            .collect::<Vec<_>>()
    };
    assert_eq!(netns.run(connected).unwrap(), given);
    let (restored, left) = restore(&netns, folder.path());
    assert_eq!((restored.len(), left), (1, Vec::new()), "{restored:?}");
    assert_eq!(reserved(&netns), "8080,19900-19909");
}

#[test]
fn reserved_ports_of_others_stay_however_many_and_ours_go_when_they_are_not_needed() {
    // Longer than a page, and as it comes.
    let many: Vec<String> = (1000..12_000).step_by(2).map(|p| p.to_string()).collect();
    let many = many.join(",");
    assert!(many.len() > 20_000);
    for before in [&many, "", "20000-20001,30000-32767"] {
        let netns = Netns::new("reserved").unwrap();
        let folder = tempfile::tempdir().unwrap();
        let range = |range| {
            netns
                .set_sysctl("net.ipv4.ip_local_port_range", range)
                .unwrap()
        };
        let set = |list: &str| {
            let written = netns
                .run(|| fs::write(RESERVED, format!("{list}\n")))
                .unwrap();
            written.unwrap();
        };
        let joined = |more: &[&str]| {
            let lists = [before].into_iter().chain(more.iter().copied());
            let lists: Vec<&str> = lists.filter(|list| !list.is_empty()).collect();
            lists.join(",")
        };
        set(before);
        // As it comes there is nothing to do.
        assert!(!reserve(&netns, folder.path(), (16_384, 19_999)));
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
        range("1024 65535");
        assert!(reserve(&netns, folder.path(), (40_000, 40_009)));
        assert_eq!(reserved(&netns), joined(&["40000-40009"]));
        // Another agent, with other ports.
        assert!(reserve(&netns, folder.path(), (40_005, 40_019)));
        assert_eq!(reserved(&netns), joined(&["40005-40019"]));
        // Somebody takes them away, adds one, and the range is narrowed at last.
        set(before);
        assert!(reserve(&netns, folder.path(), (40_005, 40_019)));
        set(&joined(&["40005-40019", "50000"]));
        assert!(!reserve(&netns, folder.path(), (40_005, 40_019)));
        range("50000 60000");
        assert!(reserve(&netns, folder.path(), (40_005, 40_019)));
        assert_eq!(reserved(&netns), joined(&["50000"]));
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
        // A cleanup does the same.
        range("1024 65535");
        assert!(reserve(&netns, folder.path(), (40_000, 40_009)));
        set(&joined(&["40000-40009", "60000"]));
        assert_eq!(restore(&netns, folder.path()).1, [""; 0]);
        assert_eq!(reserved(&netns), joined(&["60000"]));
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    }
}

#[test]
fn an_agent_reserves_ports_where_the_nodes_own_leave_no_room() {
    let mut node = Node::prepare(NodeOptions::named("noroom")).unwrap();
    let set = |node: &Node, range| {
        let netns = node.machine().netns();
        netns
            .set_sysctl("net.ipv4.ip_local_port_range", range)
            .unwrap();
    };
    set(&node, "1024 65535");
    let record = node.machine().dir().join("run/sysctls.json");
    node.start_agent().unwrap();
    node.wait_ready().unwrap();
    let list = || reserved(node.machine().netns());
    eventually("they are reserved", PATIENCE, list, |it| {
        it == "16384-29999"
    })
    .unwrap();
    assert!(record.exists());
    assert_eq!(node.conditions("PortsNotReserved"), "");
    node.agent().unwrap().stop(PATIENCE).unwrap();
    let run_dir = node.machine().dir().join("run");
    assert_eq!(restore(node.machine().netns(), &run_dir).1, [""; 0]);
    assert_eq!(reserved(node.machine().netns()), "");
    // What cannot be read cannot be added to.
    fs::write(
        &record,
        json!([{"path": RESERVED, "before": "9-1", "ours": "1-2"}]).to_string(),
    )
    .unwrap();
    node.start_agent().unwrap();
    node.wait_ready().unwrap();
    let said = || node.conditions("PortsNotReserved");
    eventually("it is said", PATIENCE, said, |it| it.contains("9-1")).unwrap();
}

fn set_node(netns: &Netns, run_dir: &Path) {
    netns.run(|| sysctl::set_node(run_dir)).unwrap().unwrap();
}

fn restore(netns: &Netns, run_dir: &Path) -> (Vec<String>, Vec<String>) {
    netns.run(|| sysctl::restore(run_dir)).unwrap()
}

/// Every setting of a namespace's IP that can be read, by its path.
fn settings(netns: &Netns) -> BTreeMap<String, String> {
    fn collect(folder: &Path, found: &mut BTreeMap<String, String>) {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                collect(&path, found);
            } else if let Ok(value) = fs::read_to_string(&path) {
                found.insert(path.display().to_string(), value.trim().to_owned());
            }
        }
    }
    let collect_all = || {
        let mut found = BTreeMap::new();
        for family in ["ipv4", "ipv6"] {
            collect(&Path::new("/proc/sys/net").join(family), &mut found);
        }
        found
    };
    netns.run(collect_all).unwrap()
}
