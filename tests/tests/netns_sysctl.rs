//! The settings that an agent changes on its node, and that a cleanup puts back: exactly those, and exactly
//! as they were. A namespace of its own stands for the node.

#![allow(clippy::unwrap_used, reason = "a test that fails should say where")]

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use weir_agent::kernel::sysctl;
use weir_tests::netns::Netns;

/// A device of a pod.
const DEVICE: &str = "weir0000000001";

#[test]
fn reverse_paths_are_filtered_everywhere_but_on_pods_devices() {
    let netns = Netns::new("paths").unwrap();
    let folder = tempfile::tempdir().unwrap();
    netns.ip("link add eth0 type veth peer name eth1").unwrap();
    netns
        .set_sysctl("net.ipv4.conf.all.rp_filter", "1")
        .unwrap();
    netns
        .set_sysctl("net.ipv4.conf.eth0.rp_filter", "2")
        .unwrap();
    set_node(&netns, folder.path());
    netns
        .ip(&format!("link add {DEVICE} type veth peer name far"))
        .unwrap();
    netns
        .run(|| sysctl::set_pod_device(DEVICE))
        .unwrap()
        .unwrap();
    for (device, expected) in [
        ("all", "0"),
        ("lo", "1"),
        ("eth0", "2"),
        ("default", "1"),
        (DEVICE, "0"),
    ] {
        let path = format!("/proc/sys/net/ipv4/conf/{device}/rp_filter");
        let found = netns
            .run(|| std::fs::read_to_string(&path).unwrap())
            .unwrap();
        assert_eq!(found.trim(), expected, "{device}");
    }
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
        ("net.ipv4.conf.eth1.rp_filter", "2"),
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
        assert!(changed.count() >= 12, "agent {agent}");
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
        ("net.ipv4.conf.all.rp_filter", "2"),
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
