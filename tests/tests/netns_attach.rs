//! Where the agent's programs are attached on machines made of namespaces: filters, links, what is wrong with one, what
//! agents before left. What programs decide is not here. Needs root.

#![allow(clippy::unwrap_used, reason = "a test stops at the first surprise")]

use std::collections::BTreeMap;
use std::process::Command;
use std::time::{Duration, Instant};

use aya::programs::{ProgramInfo, SchedClassifier, TcAttachType};
use weir_agent::kernel::census::State;
use weir_agent::kernel::object::OBJECT;
use weir_agent::kernel::{DeviceFault, HookOf, Kernel};
use weir_common::node::NodeConfig;
use weir_tests::former;
use weir_tests::kernels::{
    DEVICE, add_device, assert_sound, filters_of_pods, links, load, output, pins,
    programs_of_filters, tc,
};
use weir_tests::machine::Machine;
use weir_tests::node::{Family, Node, NodeOptions};
use weir_tests::workloads::Workload;

/// The programs at a side of a device of this thread's namespace, in their order.
fn programs_of(device: &str, side: TcAttachType) -> Vec<String> {
    let (_, programs) = SchedClassifier::query_tcx(device, side).unwrap();
    let name = |it: &ProgramInfo| it.name_as_str().unwrap().to_owned();
    programs.iter().map(name).collect()
}

#[test]
fn a_link_keeps_its_number_when_its_program_is_replaced() {
    let machine = Machine::new("replace").unwrap();
    let pins = pins(&machine);
    let index = add_device(machine.netns());
    machine
        .netns()
        .run(|| {
            let first = load(&machine, &pins);
            first.join(DEVICE, index).unwrap();
            first.place_socket_hooks().unwrap();
            let before = links(&pins);
            assert_eq!(before.len(), 8, "{before:?}");
            let filters = filters_of_pods();
            drop(first);
            assert_eq!(links(&pins), before, "its maker is gone");
            assert_eq!(filters_of_pods(), filters, "its maker is gone");
            let second = load(&machine, &pins);
            second.join(DEVICE, index).unwrap();
            assert_eq!(filters_of_pods(), filters, "not yet for all pods");
            second.place_pod_hooks().unwrap();
            second.place_socket_hooks().unwrap();
            let after = links(&pins);
            for (name, (link, program)) in &before {
                assert_eq!(after[name].0, *link, "{name}");
                assert_ne!(after[name].1, *program, "{name}");
            }
            let now = filters_of_pods();
            assert_eq!(now.len(), 2);
            assert!(now.iter().zip(&filters).all(|(a, b)| a != b), "{now:?}");
            let hooks = second
                .hooks([(DEVICE.to_owned(), index)], &BTreeMap::new())
                .unwrap();
            assert_eq!(hooks.node.len(), 10);
            assert_sound(&hooks);
        })
        .unwrap();
}

#[test]
fn a_hook_on_another_cgroup_is_a_problem() {
    let machine = Machine::new("cgroup").unwrap();
    let pins = pins(&machine);
    let kernel = load(&machine, &pins);
    kernel.place_socket_hooks().unwrap();
    let child = machine.cgroup().child("other").unwrap();
    let other = Kernel::load(OBJECT, &pins, &child, NodeConfig::default(), &[]).unwrap();
    let problems = |kernel: &Kernel| {
        let hooks = kernel.hooks([], &BTreeMap::new()).unwrap().node.into_iter();
        hooks
            .filter_map(|hook| hook.problem)
            .filter(|problem| problem.contains("not on the node's cgroup"))
            .count()
    };
    assert_eq!(problems(&other), 8);
    other.place_socket_hooks().unwrap();
    assert_eq!(problems(&other), 0);
}

#[test]
fn the_first_device_that_joins_brings_the_filters_and_the_last_takes_them_along() {
    let machine = Machine::new("block").unwrap();
    let netns = machine.netns();
    let kernel = netns.run(|| load(&machine, &pins(&machine))).unwrap();
    let ours = kernel.programs();
    let ours = [ours["weir_from_pod"].0, ours["weir_to_pod"].0].map(u64::from);
    for _ in 0..2 {
        let index = add_device(netns);
        netns
            .run(|| {
                assert_eq!(filters_of_pods(), [0; 0], "a new block is empty");
                kernel.join(DEVICE, index).unwrap();
                assert_eq!(filters_of_pods(), ours);
                kernel.place_socket_hooks().unwrap();
                assert_sound(
                    &kernel
                        .hooks([(DEVICE.to_owned(), index)], &BTreeMap::new())
                        .unwrap(),
                );
            })
            .unwrap();
        netns.ip(&format!("link del {DEVICE}")).unwrap();
    }
}

#[test]
fn what_is_wrong_with_a_device_is_said_of_that_device() {
    let machine = Machine::new("device").unwrap();
    let netns = machine.netns();
    let index = add_device(netns);
    netns
        .ip("link add weir0000000002 type veth peer name far2")
        .unwrap();
    let kernel = netns.run(|| load(&machine, &pins(&machine))).unwrap();
    netns
        .run(|| {
            let other = nix::net::if_::if_nametoindex("weir0000000002").unwrap();
            let both = [(DEVICE.to_owned(), index), ("weir0000000002".into(), other)];
            kernel.place_socket_hooks().unwrap();
            for (device, index) in &both {
                kernel.join(device, *index).unwrap();
            }
            let hooks = || kernel.hooks(both.clone(), &BTreeMap::new()).unwrap();
            let faults = || {
                hooks()
                    .devices
                    .into_iter()
                    .map(|it| (it.ifindex, it.problem))
            };
            let faults = || faults().collect::<Vec<_>>();
            assert_sound(&hooks());
            // Somebody takes the queue off, or puts one of his own in its place.
            tc(&format!("qdisc del dev {DEVICE} clsact"));
            assert_eq!(faults(), [(index, DeviceFault::Left)]);
            tc(&format!("qdisc add dev {DEVICE} ingress"));
            assert_eq!(faults(), [(index, DeviceFault::Left)]);
            assert!(hooks().node.iter().all(|it| it.problem.is_none()));
            kernel.join(DEVICE, index).unwrap();
            assert_sound(&hooks());
            // Somebody deletes it, as a pod may do with its own end.
            netns.ip("link del far").unwrap();
            assert_eq!(faults(), [(index, DeviceFault::Gone)]);
            assert!(hooks().node.iter().all(|it| it.problem.is_none()));
            netns.ip("link del far2").unwrap();
            assert_eq!(faults().len(), 2);
            assert!(
                hooks().node.iter().all(|it| it.problem.is_none()),
                "nobody needs the blocks"
            );
        })
        .unwrap();
}

#[test]
fn a_filter_that_somebody_changes_is_a_problem_of_the_node() {
    let machine = Machine::new("filter").unwrap();
    let index = add_device(machine.netns());
    machine
        .netns()
        .run(|| {
            let kernel = load(&machine, &pins(&machine));
            kernel.place_socket_hooks().unwrap();
            kernel.join(DEVICE, index).unwrap();
            let hooks = || {
                kernel
                    .hooks([(DEVICE.to_owned(), index)], &BTreeMap::new())
                    .unwrap()
            };
            let problems = || {
                hooks()
                    .node
                    .iter()
                    .filter(|it| it.problem.is_some())
                    .count()
            };
            tc("filter del block 1464158465");
            assert_eq!((problems(), hooks().devices.len()), (1, 0));
            tc("filter del block 1464158466");
            assert_eq!((problems(), hooks().devices.len()), (2, 0));
            kernel.place_pod_hooks().unwrap();
            assert_sound(&hooks());
        })
        .unwrap();
}

#[test]
fn an_uplinks_queue_and_filters_of_others_stay() {
    let machine = Machine::new("uplink").unwrap();
    let netns = machine.netns();
    for (device, far) in [("bare", "far"), ("used", "far2")] {
        netns
            .ip(&format!("link add {device} type veth peer name {far}"))
            .unwrap();
    }
    netns
        .run(|| {
            tc("qdisc add dev used clsact");
            // A program of the classic kind, which says "not mine".
            tc("filter add dev used ingress pref 3 bpf bytecode 1,6\u{a0}0\u{a0}0\u{a0}0,");
            let listed = || {
                ["bare", "used"].map(|device| {
                    let shown = |what: &str, side: &str| {
                        let words = format!("{what} show dev {device} {side}");
                        let words = words.split_whitespace();
                        output(Command::new("tc").args(words))
                    };
                    [
                        shown("qdisc", ""),
                        shown("filter", "ingress"),
                        shown("filter", "egress"),
                    ]
                })
            };
            let before = listed();
            let kernel = load(&machine, &pins(&machine));
            let index = |name: &str| nix::net::if_::if_nametoindex(name).unwrap();
            let uplinks = ["bare", "used"].map(|name| (index(name), name.to_owned()));
            let uplinks = BTreeMap::from(uplinks);
            kernel.settle_net_hooks(&uplinks).unwrap();
            let hooks = kernel.hooks([], &uplinks).unwrap().node;
            let ours: Vec<_> = hooks.iter().filter(|it| it.of == HookOf::Uplink).collect();
            assert_eq!(ours.len(), 4);
            assert!(ours.iter().all(|it| it.problem.is_none()), "{ours:?}");
            for device in ["bare", "used"] {
                for side in ["ingress", "egress"] {
                    let there = programs_of_filters(&["dev", device, side]);
                    assert_eq!(there.len(), 1, "{device} {side}");
                }
            }
            // Another agent, which has no uplink any more, takes off what is ours and nothing else.
            drop(kernel);
            let next = load(&machine, &pins(&machine));
            next.settle_net_hooks(&BTreeMap::new()).unwrap();
            assert_eq!(listed(), before);
        })
        .unwrap();
}

/// A queue that holds no filter for what leaves does not disturb links. Where it keeps ours from taking their place, both sides
/// are ours all the same: a program of each agent on one uplink would not know what the other does.
#[test]
fn links_on_an_uplink_with_a_foreign_queue_hold_our_programs_on_both_sides() {
    let machine = Machine::new("formerq").unwrap();
    let netns = machine.netns();
    let pins = pins(&machine);
    netns.ip("link add wan type veth peer name far2").unwrap();
    netns
        .run(|| {
            let up = nix::net::if_::if_nametoindex("wan").unwrap();
            let uplink = format!("uplink-{up}");
            former::attach(&pins, "wan", &uplink, ["weir_from_net", "weir_to_net"]).unwrap();
            let added = Command::new("tc")
                .args(["qdisc", "add", "dev", "wan", "ingress"])
                .status();
            assert!(added.unwrap().success());
            let ids = |side| -> Vec<u32> {
                let (_, programs) = SchedClassifier::query_tcx("wan", side).unwrap();
                programs.iter().map(ProgramInfo::id).collect()
            };
            let before = former::SIDES.map(|(_, side)| ids(side));
            let kernel = load(&machine, &pins);
            let uplinks = BTreeMap::from([(up, "wan".to_owned())]);
            let refused = kernel.settle_net_hooks(&uplinks).unwrap_err();
            assert!(format!("{refused:#}").contains("clsact"), "{refused:#}");
            for ((_, side), before) in former::SIDES.into_iter().zip(before) {
                let now = ids(side);
                assert_eq!((now.len(), before.len()), (1, 1));
                assert_ne!(now, before, "{side:?}");
            }
        })
        .unwrap();
}

#[test]
fn links_of_earlier_agents_are_taken_over_and_go() {
    let machine = Machine::new("former").unwrap();
    let netns = machine.netns();
    let pins = pins(&machine);
    let index = add_device(netns);
    netns.ip("link add wan type veth peer name far2").unwrap();
    netns
        .run(|| {
            let up = nix::net::if_::if_nametoindex("wan").unwrap();
            let programs = ["weir_from_pod", "weir_to_pod"];
            former::attach(&pins, DEVICE, DEVICE, programs).unwrap();
            let uplink = format!("uplink-{up}");
            former::attach(&pins, "wan", &uplink, ["weir_from_net", "weir_to_net"]).unwrap();
            assert_eq!(links(&pins).len(), 4);
            let kernel = load(&machine, &pins);
            let devices = [(DEVICE.to_owned(), index)];
            let states = |kernel: &Kernel| -> Vec<State> {
                let found = kernel.census(&devices).unwrap();
                let found = found.into_iter().filter(|it| it.what.starts_with("link "));
                found.map(|it| it.state).collect()
            };
            // Before the new programs are in place the old ones are what judges.
            assert_eq!(states(&kernel), [State::InUse; 4]);
            kernel.place_socket_hooks().unwrap();
            kernel.place_pod_hooks().unwrap();
            let uplinks = BTreeMap::from([(up, "wan".to_owned())]);
            kernel.settle_net_hooks(&uplinks).unwrap();
            kernel.adopt(DEVICE, index).unwrap();
            kernel.end_take_over();
            for device in [DEVICE, "wan"] {
                for (_, side) in former::SIDES {
                    // The kernel takes a link off in its own time.
                    let end = Instant::now() + Duration::from_secs(5);
                    while !programs_of(device, side).is_empty() {
                        assert!(Instant::now() < end, "{device} {side:?}");
                        std::thread::sleep(Duration::from_millis(20));
                    }
                }
            }
            assert_eq!(links(&pins).len(), 8, "those of sockets");
            assert_eq!(states(&kernel), [State::Current; 8]);
            assert_sound(&kernel.hooks(devices.clone(), &uplinks).unwrap());
            // An agent before this one comes back, and goes again.
            former::attach(&pins, DEVICE, DEVICE, programs).unwrap();
            assert_eq!(
                states(&kernel)
                    .iter()
                    .filter(|it| **it == State::Stale)
                    .count(),
                2
            );
            for it in kernel.census(&devices).unwrap() {
                if it.state == State::Stale {
                    it.remove().unwrap();
                }
            }
            assert_eq!(states(&kernel), [State::Current; 8]);
        })
        .unwrap();
}

#[test]
fn strays_are_found_and_removed() {
    let machine = Machine::new("stray").unwrap();
    let index = add_device(machine.netns());
    let devices = [(DEVICE.to_owned(), index)];
    machine
        .netns()
        .run(|| {
            let elsewhere = machine.bpffs().path().join("other");
            let other = load(&machine, &elsewhere);
            other.place_socket_hooks().unwrap();
            former::attach(&elsewhere, DEVICE, DEVICE, ["weir_from_pod", "weir_to_pod"]).unwrap();
            let ours = load(&machine, &pins(&machine));
            ours.join(DEVICE, index).unwrap();
            ours.place_pod_hooks().unwrap();
            ours.place_socket_hooks().unwrap();
            // One of ours beside ours, in the block of all pods.
            let (program, _) = ours.programs()["weir_from_pod"];
            let pin = machine.bpffs().path().join("program");
            let id = program.to_string();
            output(
                Command::new("bpftool")
                    .args(["prog", "pin", "id", &id])
                    .arg(&pin),
            );
            let pin = pin.display();
            tc(&format!(
                "filter add block 1464158465 pref 9 bpf da object-pinned {pin}"
            ));
            let strays = || {
                let mut found = ours.census(&devices).unwrap();
                found.retain(|it| it.state == State::Stray);
                found
            };
            assert_eq!(strays().len(), 11, "{:?}", strays());
            for stray in strays() {
                stray.remove().unwrap();
            }
            assert_eq!(strays().len(), 0);
            assert_sound(&ours.hooks(devices.clone(), &BTreeMap::new()).unwrap());
            let lost = other.hooks([], &BTreeMap::new()).unwrap().node;
            assert!(lost.iter().all(|h| h.problem.is_some()), "{lost:?}");
        })
        .unwrap();
}

/// Seen failing with the links of before: the node was not ready, and the second pod did not start.
#[test]
fn a_pod_that_deletes_its_device_stops_nobody() {
    let node = Node::start(NodeOptions::named("deletes")).unwrap();
    let pod = node.run_pod(Workload::named("shop", "deletes")).unwrap();
    pod.netns().ip("link del eth0").unwrap();
    // Longer than an audit of the hooks takes to come around.
    std::thread::sleep(Duration::from_secs(7));
    assert_eq!(node.readyz().trim(), "ok");
    node.run_pod(Workload::named("shop", "other")).unwrap();
}

/// As udev does it, after us, on a host whose sysctl.d says so for every device. Seen failing before hooks were looked at
/// for it: 2 stayed.
#[test]
fn settings_of_a_pods_device_are_put_back() {
    let node = Node::start(NodeOptions::named("udev")).unwrap();
    let pod = node.run_pod(Workload::named("shop", "a")).unwrap();
    let devices = node.machine().netns().ip("-o link").unwrap();
    let device = devices.split([' ', '@']).find(|it| it.starts_with("weir"));
    let path = format!("/proc/sys/net/ipv6/conf/{}/accept_ra", device.unwrap());
    let inside = node.machine().netns();
    let read = || {
        inside
            .run(|| std::fs::read_to_string(&path).unwrap())
            .unwrap()
    };
    assert_eq!(read().trim(), "0");
    inside.run(|| std::fs::write(&path, "2").unwrap()).unwrap();
    let deadline = Instant::now() + Duration::from_secs(10);
    while read().trim() != "0" {
        assert!(Instant::now() < deadline, "{}", read());
        std::thread::sleep(Duration::from_millis(100));
    }
    drop(pod);
}

/// Once a minute leases are compared with devices and pods. Seen failing without the audit: the lease stayed.
#[test]
fn a_lease_whose_del_never_comes_is_freed_and_a_pod_that_exists_keeps_its_own() {
    const AUDIT: Duration = Duration::from_secs(60);
    let node = Node::start(NodeOptions::named("audited")).unwrap();
    let run = |name: &str| node.run_pod(Workload::named("shop", name)).unwrap();
    let (lost, broken, whole) = (run("lost"), run("broken"), run("whole"));
    let address = lost.address(Family::V4).unwrap();
    for pod in [&lost, &broken] {
        pod.netns().ip("link del eth0").unwrap();
    }
    // Its object goes, and its sandbox with it: nobody will ever call DEL.
    std::fs::remove_file(node.manifests().join("pods/shop.lost.yaml")).unwrap();

    let log = node.machine().dir().join("agent.log");
    let released = "released: its device and its pod are gone";
    let deadline = Instant::now() + AUDIT + Duration::from_secs(10);
    let said = loop {
        let said = std::fs::read_to_string(&log).unwrap();
        if said.contains(released) {
            break said;
        }
        assert!(Instant::now() < deadline, "{said}");
        std::thread::sleep(Duration::from_millis(500));
    };
    let freed: Vec<&str> = said.lines().filter(|it| it.contains(released)).collect();
    assert_eq!(freed.len(), 1, "{freed:?}");
    assert!(
        freed[0].contains(&lost.cni_env()["CNI_CONTAINERID"]),
        "{freed:?}"
    );
    let conditions = node.conditions("DeviceGone");
    assert!(conditions.contains("shop/broken"), "{conditions:?}");
    assert!(!conditions.contains("shop/lost"), "{conditions:?}");
    assert_eq!(node.readyz().trim(), "ok");
    // The pod that is whole is as it was, and others get addresses; the one that is broken still has its own.
    let other = run("other").address(Family::V4).unwrap();
    let taken = [&broken, &whole].map(|pod| pod.address(Family::V4).unwrap());
    assert!(
        !taken.contains(&other),
        "{other} of {taken:?}; {address} was freed"
    );
}
