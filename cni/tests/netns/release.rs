//! DEL, GC and STATUS, with the agent and without it.

use std::io::{ErrorKind, Write};
use std::os::unix::net::UnixStream;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use serde_json::json;
use weir_cni::attachment::Attachment;
use weir_cni::wire::{Add, Reply, Request};

use crate::fake::Policy;
use crate::node::{ByHand, Call, Netns, Node, eventually};

fn leased(node: &Node, container_id: &str) -> Option<String> {
    let all = node.leases().all();
    all.values()
        .find(|it| it.attachment.container_id() == container_id)
        .map(|it| it.addresses[0].to_string())
}

fn noted(node: &Node) -> Vec<String> {
    let notes = weir_cni::released::list(&node.released_dir()).unwrap();
    notes
        .iter()
        .map(|it| it.container_id().to_owned())
        .collect()
}

#[test]
fn del_succeeds_whatever_is_gone_already() {
    let node = Node::new(&["10.64.0.0/29"]);
    type Before<'a> = &'a dyn Fn(&Node, &Netns);
    let cases: &[(&str, Before<'_>)] = &[
        ("nothing", &|_, _| {}),
        ("the namespace", &|_, pod| pod.delete()),
        ("the pod's interface", &|_, pod| {
            pod.run(&["ip", "link", "del", "eth0"]);
        }),
        ("the node's device", &|node, _| {
            node.netns.run(&["ip", "link", "del", &node.device("c1")]);
        }),
        ("everything", &|node, pod| node.del("c1", pod)),
    ];
    for (what, before) in cases {
        for netns_given in [true, false] {
            let pod = Netns::new("pod");
            node.add("c1", &pod);
            before(&node, &pod);
            let mut del = Call::new("DEL", "c1", &pod);
            if !netns_given {
                del.netns = None;
            }
            for round in 0..2 {
                let answer = node.call(&del);
                assert!(answer.ok, "{what} gone, round {round}: {}", answer.json);
                // The address is free when DEL returns, not when the device is gone.
                assert_eq!(leased(&node, "c1"), None, "{what}");
            }
            node.expect_clean();
        }
    }
}

#[test]
fn del_succeeds_without_the_agent_and_the_address_is_free_when_it_is_back() {
    // A /30 has one address for a pod.
    let mut node = Node::new(&["10.64.0.0/30"]);
    for agent_knows_before_it_serves in [true, false] {
        let (one, two) = (Netns::new("one"), Netns::new("two"));
        node.add("c1", &one);
        node.kill_agent();
        if !agent_knows_before_it_serves {
            node.start_agent();
            // As if it were hung: the socket is there, nobody answers.
            node.kill_agent();
        }
        for _ in 0..2 {
            node.del("c1", &one);
        }
        assert!(!one.has_link("eth0"));
        assert!(!node.netns.has_link(&node.device("c1")));
        assert_eq!(
            weir_cni::released::list(&node.released_dir())
                .unwrap()
                .len(),
            1
        );
        node.start_agent();
        node.add("c2", &two);
        assert_eq!(leased(&node, "c2").unwrap(), "10.64.0.2");
        assert_eq!(weir_cni::released::list(&node.released_dir()).unwrap(), []);
        node.del("c2", &two);
        node.expect_clean();
    }
}

#[test]
fn a_release_written_while_the_agent_runs_frees_the_address_for_the_next_add() {
    let node = Node::new(&["10.64.0.0/30"]);
    let (one, two) = (Netns::new("one"), Netns::new("two"));
    node.add("c1", &one);
    let mut del = Call::new("DEL", "c1", &one);
    del.extra = json!({"agentSocket": "/nowhere/cni.sock"});
    node.call(&del).expect_ok();
    node.add("c2", &two);
    assert_eq!(leased(&node, "c1"), None);
    node.del("c2", &two);
    node.expect_clean();
}

#[test]
fn del_asks_to_be_called_again_when_nothing_remembers_it() {
    let mut node = Node::new(&["10.64.0.0/29"]);
    let pod = Netns::new("pod");
    node.add("c1", &pod);
    node.kill_agent();
    let in_the_way = node.dir.path().join("file");
    std::fs::write(&in_the_way, "").unwrap();
    let mut del = Call::new("DEL", "c1", &pod);
    del.extra = json!({"releasedDir": in_the_way.join("released")});
    let details = node.call(&del).expect_error(5);
    assert!(
        details.contains("the release cannot be written"),
        "{details}"
    );
    node.start_agent();
    node.del("c1", &pod);
    node.expect_clean();
}

#[test]
fn del_of_a_stale_container_leaves_its_successor_alone() {
    let node = Node::new(&["10.64.0.0/29"]);
    let pod = Netns::new("pod");
    node.add("old", &pod);
    node.del("old", &pod);
    node.add("new", &pod);
    let address = leased(&node, "new").unwrap();
    node.del("old", &pod);
    assert_eq!(leased(&node, "new"), Some(address.clone()));
    assert!(node.netns.reaches(&pod, &address));
    node.del("new", &pod);
    node.expect_clean();
}

#[test]
fn an_address_is_reused_only_when_all_others_were() {
    let node = Node::new(&["10.64.0.0/29"]);
    let pod = Netns::new("pod");
    let mut seen = Vec::new();
    for round in 0..7 {
        let id = format!("c{round}");
        node.add(&id, &pod);
        seen.push(leased(&node, &id).unwrap());
        node.del(&id, &pod);
    }
    let expected = [2, 3, 4, 5, 6, 2, 3].map(|it| format!("10.64.0.{it}"));
    assert_eq!(seen, expected);
}

#[test]
fn an_address_is_the_next_pods_before_the_last_ones_device_is_gone() {
    for (cidr, address) in [("10.64.0.0/30", "10.64.0.2"), ("fd64::2/128", "fd64::2")] {
        let node = Node::new(&[cidr]);
        let (one, two) = (Netns::new("one"), Netns::new("two"));
        node.add("c1", &one);
        node.fake.deletes.send_replace(false);
        node.del("c1", &one);
        assert!(node.netns.has_link(&node.device("c1")));
        node.add("c2", &two);
        assert!(node.netns.reaches(&two, address));

        // In the namespace of the old device there is no place yet, so this one waits.
        let third = node.spawn(&Call::new("ADD", "c3", &one));
        node.del("c2", &two);
        node.fake.deletes.send_replace(true);
        assert!(third.wait_with_output().unwrap().status.success());
        eventually("the old devices go", || {
            !node.netns.has_link(&node.device("c1")) && !node.netns.has_link(&node.device("c2"))
        });
        assert!(node.netns.reaches(&one, address));
        node.del("c3", &one);
        node.expect_clean();
    }
}

#[test]
fn gc_frees_what_the_runtime_no_longer_lists() {
    let node = Node::new(&["10.64.0.0/29"]);
    let pods: Vec<Netns> = (0..3).map(|_| Netns::new("pod")).collect();
    for (number, pod) in pods.iter().enumerate() {
        node.add(&format!("c{number}"), pod);
    }
    // A device that nothing explains, as a killed ADD leaves it.
    node.netns.run(&[
        "ip",
        "link",
        "add",
        &node.device("lost"),
        "type",
        "veth",
        "peer",
        "name",
        "stray",
    ]);
    let gc = |network: &str, valid| {
        let mut gc = Call::new("GC", "", &pods[0]);
        gc.netns = None;
        gc.extra = json!({"name": network, "cni.dev/valid-attachments": valid});
        node.call(&gc).expect_ok();
    };
    gc("another", json!([]));
    assert_eq!(node.leases().all().len(), 3);
    gc(
        "pods",
        json!([{"containerID": "c1", "ifname": "eth0"}, {"containerID": "../x", "ifname": "eth0"}]),
    );
    assert_eq!(leased(&node, "c0"), None);
    assert_eq!(leased(&node, "c1").unwrap(), "10.64.0.3");
    assert!(!node.netns.has_link(&node.device("lost")));
    assert!(!pods[2].has_link("eth0"));
    assert!(node.netns.reaches(&pods[1], "10.64.0.3"));
    gc("pods", json!([]));
    node.expect_clean();
}

#[test]
fn status_says_whether_an_add_could_be_served() {
    let mut node = Node::new(&["10.64.0.0/30"]);
    let (one, two) = (Netns::new("one"), Netns::new("two"));
    let status = Call::new("STATUS", "", &one);
    node.call(&status).expect_ok();

    *node.fake.ready.lock().unwrap() = Err("the API server has not been reached yet".into());
    let details = node.call(&status).expect_error(50);
    assert!(details.contains("API server"), "{details}");
    let details = node.call(&Call::new("ADD", "c1", &one)).expect_error(11);
    assert!(details.contains("API server"), "{details}");
    *node.fake.ready.lock().unwrap() = Ok(());

    node.add("c1", &one);
    let details = node.call(&status).expect_error(50);
    assert!(
        details.contains("no address is free in 10.64.0.0/30"),
        "{details}"
    );
    let details = node.call(&Call::new("ADD", "c2", &two)).expect_error(11);
    assert!(details.contains("no address is free"), "{details}");
    assert!(!two.has_link("eth0"));
    node.del("c1", &one);
    node.call(&status).expect_ok();

    node.kill_agent();
    node.call(&status).expect_error(50);
}

#[test]
fn leases_outlive_the_agent_and_follow_their_devices() {
    let mut node = Node::new(&["10.64.0.0/29"]);
    let (one, two, three) = (Netns::new("one"), Netns::new("two"), Netns::new("three"));
    node.add("c1", &one);
    node.add("c2", &two);
    let before = node.leases().all();
    node.kill_agent();
    // No DEL ever comes for this one.
    two.delete();
    eventually("the device goes with its namespace", || {
        !node.netns.has_link(&node.device("c2"))
    });
    node.fake.open.lock().unwrap().remove("10.64.0.3");
    node.start_agent();
    let after = node.leases().all();
    assert_eq!(after.keys().count(), 1);
    assert_eq!(after.values().next(), before.values().next());
    assert!(node.netns.reaches(&one, "10.64.0.2"));
    node.add("c3", &three);
    assert_eq!(leased(&node, "c3").unwrap(), "10.64.0.4");
    node.del("c1", &one);
    node.del("c3", &three);
    node.expect_clean();
}

#[test]
fn the_address_of_a_live_pod_is_not_leased_when_its_lease_is_lost() {
    let mut node = Node::new(&["10.64.0.0/30"]);
    let (one, two) = (Netns::new("one"), Netns::new("two"));
    node.add("c1", &one);
    node.kill_agent();
    std::fs::remove_file(node.dir.path().join("state/leases.redb")).unwrap();
    node.start_agent();
    node.call(&Call::new("ADD", "c2", &two)).expect_error(11);
    assert!(node.netns.reaches(&one, "10.64.0.2"));
    node.del("c1", &one);
    node.fake.open.lock().unwrap().clear();
    node.add("c2", &two);
    node.del("c2", &two);
    node.expect_clean();
}

#[test]
fn a_del_whose_caller_has_gone_does_not_free_what_is_leased_since() {
    let node = Node::new(&["10.64.0.0/29"]);
    let pod = Netns::new("pod");
    node.fake.policy.send_replace(Policy::Unknown);
    let add = node.spawn(&Call::new("ADD", "c1", &pod));
    eventually("the ADD waits for its policy", || {
        *node.fake.waiting.borrow() == 1
    });
    // A plugin that is killed while it waits for the ADD to end, as the runtime does when it has no patience left.
    let attachment = Attachment::new("c1", "eth0").unwrap();
    let mut request = serde_json::to_vec(&Request::Del { attachment }).unwrap();
    request.push(b'\n');
    let mut gone = UnixStream::connect(node.socket()).unwrap();
    gone.write_all(&request).unwrap();
    // Until it is read, and waits.
    std::thread::sleep(Duration::from_millis(200));
    drop(gone);
    std::thread::sleep(Duration::from_millis(200));
    node.fake.policy.send_replace(Policy::Known);
    let said = add.wait_with_output().unwrap();
    assert!(said.status.success(), "{said:?}");
    std::thread::sleep(Duration::from_millis(500));
    assert!(leased(&node, "c1").is_some());
    assert!(node.netns.has_link(&node.device("c1")));
    node.del("c1", &pod);
    node.expect_clean();
}

#[test]
fn the_last_word_of_an_add_counts_unanswered_and_a_late_one_is_refused() {
    let node = Node::new(&["10.64.0.0/29"]);
    let pod = Netns::new("pod");
    for is_late in [false, true] {
        let begun = Instant::now();
        let mut plugin = ByHand::connect(&node);
        let add = Request::Add(Add {
            attachment: Attachment::new("c1", "eth0").unwrap(),
            network: "pods".into(),
            netns: 7,
            pod: None,
        });
        plugin.say(&add).unwrap();
        let Reply::Leased(leased) = plugin.hear() else {
            panic!("no lease");
        };
        let device = leased.device.as_str();
        node.netns.run(&[
            "ip", "link", "add", device, "type", "veth", "peer", "name", "stray",
        ]);
        let shown = node.netns.run(&["ip", "-o", "link", "show", "dev", device]);
        let host_ifindex = shown.split(':').next().unwrap().parse().unwrap();
        plugin.say(&Request::Attach { host_ifindex }).unwrap();
        assert_eq!(plugin.hear(), Reply::Ok);
        if is_late {
            // What follows its answer takes the agent longer than this: the connection is still there.
            node.fake.deletes.send_replace(false);
            std::thread::sleep(Duration::from_millis(2500).saturating_sub(begun.elapsed()));
            let said = plugin.say(&Request::Done);
            node.fake.deletes.send_replace(true);
            assert_eq!(said.unwrap_err().kind(), ErrorKind::BrokenPipe);
            let Reply::Refused(refused) = plugin.hear() else {
                panic!("not refused");
            };
            assert!(refused.message.contains("in time"), "{refused:?}");
        } else {
            plugin.say(&Request::Done).unwrap();
            drop(plugin);
            std::thread::sleep(Duration::from_millis(300));
            assert!(self::leased(&node, "c1").is_some());
            node.del("c1", &pod);
        }
        node.expect_clean();
    }
}

#[test]
fn a_del_that_a_killed_agent_has_answered_is_finished_by_the_next() {
    let mut node = Node::new(&["10.64.0.0/29"]);
    let pod = Netns::new("pod");
    node.add("c1", &pod);
    let device = node.device("c1");
    node.fake.deletes.send_replace(false);
    node.del("c1", &pod);
    // The record is gone soon, and the device stays until the agent is killed.
    std::thread::sleep(Duration::from_millis(500));
    assert!(node.netns.has_link(&device));
    assert_eq!(noted(&node), ["c1"]);
    node.kill_agent();
    node.fake.deletes.send_replace(true);
    node.start_agent();
    assert!(!node.netns.has_link(&device));
    node.expect_clean();
}

#[test]
fn a_device_that_the_kernel_keeps_is_asked_for_again() {
    let node = Node::new(&["10.64.0.0/29"]);
    let pod = Netns::new("pod");
    node.fake.keeps_devices.store(true, Ordering::Relaxed);
    for is_known in [true, false] {
        if is_known {
            node.add("c1", &pod);
        } else {
            let device = node.device("c1");
            node.netns
                .run(&["ip", "link", "add", &device, "type", "veth"]);
        }
        node.del("c1", &pod);
        // Until it has been tried, and for as long as it fails.
        std::thread::sleep(Duration::from_millis(300));
        node.call(&Call::new("STATUS", "", &pod)).expect_ok();
        assert_eq!(noted(&node), ["c1"]);
        node.fake.keeps_devices.store(false, Ordering::Relaxed);
        node.call(&Call::new("STATUS", "", &pod)).expect_ok();
        node.expect_clean();
        node.fake.keeps_devices.store(true, Ordering::Relaxed);
    }
}
