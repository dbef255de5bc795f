//! ADDs that fail: each leaves nothing behind, and what was there before stays.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::Ordering;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use weir_cni::attachment::Attachment;
use weir_cni::wire::{Refusal, Reply, Request};

use crate::fake::Policy;
use crate::node::{ByHand, Call, Netns, Node, eventually};

#[test]
fn a_second_add_fails_and_leaves_the_first_alone() {
    let node = Node::new(&["10.64.0.0/29"]);
    let pod = Netns::new("pod");
    node.add("c1", &pod);
    let before = node.leases().all();
    let details = node.call(&Call::new("ADD", "c1", &pod)).expect_error(100);
    assert!(details.contains("stays as it is"), "{details}");
    // Another container that wants the same name in the same namespace.
    let details = node.call(&Call::new("ADD", "c2", &pod)).expect_error(101);
    assert!(details.contains("eth0"), "{details}");
    assert_eq!(node.leases().all(), before);
    assert!(node.netns.reaches(&pod, "10.64.0.2"));

    // Another name, or another namespace, is another matter.
    let mut second = Call::new("ADD", "c1", &pod);
    second.ifname = "net1".into();
    node.call(&second).expect_error(5);
    let other = Netns::new("other");
    node.add("c3", &other);
    node.del("c1", &pod);
    node.del("c3", &other);
    node.expect_clean();
}

#[test]
fn of_parallel_adds_for_one_attachment_one_succeeds() {
    let node = Node::new(&["10.64.0.0/29"]);
    let pod = Netns::new("pod");
    let call = Call::new("ADD", "c1", &pod);
    let answers: Vec<_> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..8).map(|_| scope.spawn(|| node.call(&call))).collect();
        threads.into_iter().map(|it| it.join().unwrap()).collect()
    });
    let (added, refused): (Vec<_>, Vec<_>) = answers.into_iter().partition(|it| it.ok);
    assert_eq!(added.len(), 1);
    for answer in refused {
        answer.expect_error(100);
    }
    assert!(node.netns.reaches(&pod, "10.64.0.2"));
    node.del("c1", &pod);
    node.expect_clean();
}

#[test]
fn the_agent_refuses_what_it_does_not_understand() {
    let node = Node::new(&["10.64.0.0/29"]);
    let too_long = vec![b'x'; weir_cni::wire::MAX_FRAME];
    let frames: &[&[u8]] = &[
        b"GET / HTTP/1.1\n",
        b"{\"request\":\"done\"}\n",
        b"{\"request\":\"del\",\"attachment\":{\"container_id\":\"../x\",\"ifname\":\"eth0\"}}\n",
        b"{\"request\":\"sta",
        &too_long,
    ];
    for frame in frames {
        let mut stream = UnixStream::connect(node.socket()).unwrap();
        stream.write_all(frame).unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        assert!(answer.contains("invalid"), "{answer}");
    }
    let pod = Netns::new("pod");
    node.call(&Call::new("STATUS", "", &pod)).expect_ok();
}

#[test]
fn an_interface_of_somebody_else_is_left_alone() {
    let node = Node::new(&["10.64.0.0/29"]);
    let pod = Netns::new("pod");
    pod.run(&[
        "ip", "link", "add", "eth0", "type", "veth", "peer", "name", "stray",
    ]);
    node.call(&Call::new("ADD", "c1", &pod)).expect_error(101);
    assert!(pod.has_link("eth0"));
    node.expect_clean();
}

#[test]
fn a_device_that_a_killed_add_left_is_replaced() {
    let node = Node::new(&["10.64.0.0/29"]);
    let pod = Netns::new("pod");
    node.netns.run(&[
        "ip",
        "link",
        "add",
        &node.device("c1"),
        "type",
        "veth",
        "peer",
        "name",
        "stray",
    ]);
    node.add("c1", &pod);
    assert!(node.netns.reaches(&pod, "10.64.0.2"));
}

#[test]
fn without_an_agent_add_says_try_again() {
    let mut node = Node::new(&["10.64.0.0/29"]);
    node.kill_agent();
    let pod = Netns::new("pod");
    let answer = node.call(&Call::new("ADD", "c1", &pod));
    let details = answer.expect_error(11);
    assert!(details.contains("cni.sock"), "{details}");
    assert!(!pod.has_link("eth0"));
    node.expect_clean();
}

#[test]
fn an_agent_that_hangs_fails_the_add_after_two_seconds() {
    let mut node = Node::new(&["10.64.0.0/29"]);
    node.kill_agent();
    std::fs::remove_file(node.socket()).unwrap();
    let hung = UnixListener::bind(node.socket()).unwrap();
    let pod = Netns::new("pod");
    let answer = node.call(&Call::new("ADD", "c1", &pod));
    assert!(answer.took >= Duration::from_secs(2), "{:?}", answer.took);
    answer.expect_error(11);
    assert!(!pod.has_link("eth0"));
    // What the agent made of the request is unknown, so the release waits for it.
    assert_eq!(
        weir_cni::released::list(&node.released_dir())
            .unwrap()
            .len(),
        1
    );
    node.del("c1", &pod);
    drop(hung);
    std::fs::remove_file(node.socket()).unwrap();
    node.start_agent();
    assert_eq!(weir_cni::released::list(&node.released_dir()).unwrap(), []);
    node.expect_clean();
}

#[test]
fn a_policy_that_is_unknown_or_broken_fails_the_add() {
    let node = Node::new(&["10.64.0.0/30"]);
    let pod = Netns::new("pod");
    for (policy, says) in [
        (
            Policy::Unknown,
            "does not know pod default/web and its policy in time",
        ),
        (Policy::Broken, "cannot be compiled"),
    ] {
        node.fake.policy.send_replace(policy);
        let details = node.call(&Call::new("ADD", "c1", &pod)).expect_error(11);
        assert!(details.contains(says), "{details}");
        eventually("the interface goes", || !pod.has_link("eth0"));
        node.expect_clean();
    }
    node.fake.policy.send_replace(Policy::Known);
    node.add("c1", &pod);
    node.del("c1", &pod);
    node.expect_clean();
}

#[test]
fn a_namespace_that_goes_during_add_fails_it() {
    let node = Node::new(&["10.64.0.0/30"]);
    node.fake.policy.send_replace(Policy::Unknown);
    let pod = Netns::new("pod");
    let plugin = node.spawn(&Call::new("ADD", "c1", &pod));
    eventually("the ADD waits for the policy", || {
        *node.fake.waiting.borrow() == 1
    });
    // The plugin holds the namespace open; its interface is what can go.
    pod.run(&["ip", "link", "del", "eth0"]);
    pod.delete();
    node.fake.policy.send_replace(Policy::Known);
    let output = plugin.wait_with_output().unwrap();
    assert!(!output.status.success());
    let error: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(error["code"], 5, "{error}");
    node.expect_clean();
}

#[test]
fn a_killed_plugin_leaves_nothing() {
    let node = Node::new(&["10.64.0.0/30"]);
    let pod = Netns::new("pod");
    for round in 1..=3 {
        node.fake.policy.send_replace(Policy::Unknown);
        let mut plugin = node.spawn(&Call::new("ADD", "c1", &pod));
        eventually("the ADD waits for the policy", || {
            *node.fake.waiting.borrow() == round
        });
        kill(Pid::from_raw(plugin.id() as i32), Signal::SIGKILL).unwrap();
        plugin.wait().unwrap();
        // Before the policy comes, and before the deadline.
        node.expect_clean();
        node.fake.policy.send_replace(Policy::Known);
    }
    node.add("c1", &pod);
    node.del("c1", &pod);
    node.expect_clean();
}

#[test]
fn a_plugin_that_is_held_up_until_nobody_waits_for_it_fails_and_leaves_nothing() {
    let node = Node::new(&["10.64.0.0/30"]);
    let pod = Netns::new("pod");
    node.fake.policy.send_replace(Policy::Unknown);
    let plugin = node.spawn(&Call::new("ADD", "c1", &pod));
    eventually("the ADD waits for the policy", || {
        *node.fake.waiting.borrow() == 1
    });
    let process = Pid::from_raw(plugin.id() as i32);
    kill(process, Signal::SIGSTOP).unwrap();
    node.fake.policy.send_replace(Policy::Known);
    std::thread::sleep(Duration::from_millis(2200));
    kill(process, Signal::SIGCONT).unwrap();
    let output = plugin.wait_with_output().unwrap();
    let error: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(error["code"], 11, "{error}");
    assert!(!pod.has_link("eth0"));
    // What it could not say it has noted; the runtime asks this all the time.
    node.call(&Call::new("STATUS", "", &pod)).expect_ok();
    node.expect_clean();
}

#[test]
fn a_killed_agent_leaves_nothing() {
    let mut node = Node::new(&["10.64.0.0/30"]);
    let pod = Netns::new("pod");
    node.fake.policy.send_replace(Policy::Unknown);
    let plugin = node.spawn(&Call::new("ADD", "c1", &pod));
    eventually("the ADD waits for the policy", || {
        *node.fake.waiting.borrow() == 1
    });
    node.kill_agent();
    let output = plugin.wait_with_output().unwrap();
    let error: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(error["code"], 11, "{error}");
    assert!(!pod.has_link("eth0"));
    node.fake.policy.send_replace(Policy::Known);
    node.start_agent();
    node.expect_clean();
    node.add("c1", &pod);
}

#[test]
fn both_killed_leaves_nothing_after_the_next_start() {
    let mut node = Node::new(&["10.64.0.0/30"]);
    let pod = Netns::new("pod");
    node.fake.policy.send_replace(Policy::Unknown);
    let mut plugin = node.spawn(&Call::new("ADD", "c1", &pod));
    eventually("the ADD waits for the policy", || {
        *node.fake.waiting.borrow() == 1
    });
    kill(Pid::from_raw(plugin.id() as i32), Signal::SIGKILL).unwrap();
    plugin.wait().unwrap();
    node.kill_agent();
    node.fake.policy.send_replace(Policy::Known);
    node.start_agent();
    // There is a lease, and its device: both stay until DEL, which always follows.
    node.del("c1", &pod);
    node.expect_clean();
    node.add("c1", &pod);
    node.del("c1", &pod);
}

/// A small one; the large one, with the real agent as a process, is in the tests crate.
#[test]
fn killed_at_random_nothing_leaks_and_no_address_is_leased_twice() {
    const ROUNDS: u64 = 60;
    let mut node = Node::new(&["10.64.0.0/29"]);
    // A multiplicative generator is random enough, and the same in every run.
    let mut random = 0x2545_f491_4f6c_dd1d_u64;
    let mut next = |below: u64| {
        random = random
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        (random >> 33) % below
    };
    let mut killed = [0; 2];
    for round in 0..ROUNDS {
        let id = format!("c{}", round % 4);
        let pod = Netns::new("pod");
        let mut plugin = node.spawn(&Call::new("ADD", &id, &pod));
        std::thread::sleep(Duration::from_micros(next(8_000)));
        let victims = next(4);
        if victims & 1 == 1 {
            plugin.kill().unwrap();
            killed[0] += 1;
        }
        if victims & 2 == 2 {
            node.kill_agent();
            killed[1] += 1;
        }
        plugin.wait().unwrap();
        if next(2) == 0 {
            node.restart_agent();
        }
        // As kubelet does, whatever became of the ADD.
        node.del(&id, &pod);
        node.restart_agent();
        node.expect_clean();
    }
    println!(
        "{ROUNDS} rounds, {} plugins and {} agents killed",
        killed[0], killed[1]
    );
    assert!(killed.iter().all(|it| *it > ROUNDS / 4), "{killed:?}");
}

/// Fills the disk until no ADD is taken any more. Returns what fills it, and what the ADD heard.
fn fill(node: &Node, pod: &Netns) -> (PathBuf, String) {
    let filler = node.dir.path().join("filler");
    let full = Command::new("dd")
        .args(["if=/dev/zero", "bs=4k"])
        .arg(format!("of={}", filler.display()))
        .stderr(std::process::Stdio::null())
        .status()
        .unwrap();
    assert!(!full.success(), "the file system must be full");
    // What is allocated in the store already may take a few more leases.
    for added in 0..200 {
        let container = format!("more{added}");
        let answer = node.call(&Call::new("ADD", &container, pod));
        if !answer.ok {
            return (filler, answer.expect_error(5));
        }
        answer.expect_ok();
        node.del(&container, pod);
    }
    panic!("the disk is never full");
}

/// Runs itself again in a mount namespace, where it mounts a small file system.
#[test]
fn a_full_disk_fails_add_and_nothing_else() {
    const INSIDE: &str = "WEIR_TEST_IN_MOUNT_NAMESPACE";
    if std::env::var_os(INSIDE).is_none() {
        let me = std::env::current_exe().unwrap();
        let output = Command::new("unshare")
            .args(["--mount", "--propagation", "private"])
            .arg(me)
            .args([
                "--exact",
                "failures::a_full_disk_fails_add_and_nothing_else",
            ])
            .arg("--nocapture")
            .env(INSIDE, "1")
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{text}{errors}");
        assert!(text.contains("1 passed"), "{text}");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mounted = Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=4m", "weir-test"])
        .arg(dir.path())
        .status()
        .unwrap();
    assert!(mounted.success());
    let mut node = Node::in_dir(&["10.64.0.0/29"], dir);
    let (one, two) = (Netns::new("one"), Netns::new("two"));
    node.add("c1", &one);

    let (filler, refused) = fill(&node, &two);
    assert!(refused.contains("No space left on device"), "{refused}");
    // What was never leased needs no note, however often it is tried.
    let noted = weir_cni::released::list(&node.released_dir()).unwrap();
    for again in 0..20 {
        let container = format!("again{again}");
        node.call(&Call::new("ADD", &container, &two))
            .expect_error(5);
        node.del(&container, &two);
    }
    assert_eq!(
        weir_cni::released::list(&node.released_dir()).unwrap(),
        noted
    );
    assert!(refused.contains("leases.redb"), "{refused}");
    assert!(!two.has_link("eth0"));
    assert!(node.netns.reaches(&one, "10.64.0.2"));
    node.call(&Call::new("STATUS", "", &one)).expect_error(50);
    node.del("c1", &one);
    assert!(node.leases().all().is_empty());

    std::fs::remove_file(&filler).unwrap();
    node.call(&Call::new("STATUS", "", &one)).expect_ok();
    node.add("c2", &two);
    let before = node.leases().all();
    node.kill_agent();
    node.start_agent();
    assert_eq!(node.leases().all(), before);

    // What the disk does not take of a DEL the next agent hears of all the same, although the device is still there.
    let other = Netns::new("other");
    let (filler, _) = fill(&node, &other);
    node.fake.deletes.send_replace(false);
    node.del("c2", &two);
    let noted = weir_cni::released::list(&node.released_dir()).unwrap();
    assert!(noted.iter().any(|it| it.container_id() == "c2"));
    node.kill_agent();
    node.fake.deletes.send_replace(true);
    node.start_agent();
    assert!(node.leases().all().is_empty());
    std::fs::remove_file(&filler).unwrap();
    node.call(&Call::new("STATUS", "", &one)).expect_ok();
    assert_eq!(weir_cni::released::list(&node.released_dir()).unwrap(), []);

    // What neither a note nor the disk nor the kernel takes is refused, however often it is asked.
    node.add("c3", &two);
    let (filler, _) = fill(&node, &other);
    let released = node.released_dir();
    let aside = released.with_extension("aside");
    std::fs::rename(&released, &aside).unwrap();
    std::fs::write(&released, "").unwrap();
    node.fake.keeps_devices.store(true, Ordering::Relaxed);
    let attachment = Attachment::new("c3", "eth0").unwrap();
    let del = || {
        let attachment = attachment.clone();
        let mut plugin = ByHand::connect(&node);
        plugin.say(&Request::Del { attachment }).unwrap();
        plugin.hear()
    };
    for _ in 0..2 {
        let Reply::Refused(refused) = del() else {
            panic!("a DEL that nobody remembers was taken");
        };
        assert_eq!(refused.reason, Refusal::Storage, "{refused:?}");
    }
    node.fake.keeps_devices.store(false, Ordering::Relaxed);
    assert_eq!(del(), Reply::Ok);
    assert!(!node.netns.has_link(&node.device("c3")));
    node.kill_agent();
    std::fs::remove_file(&released).unwrap();
    std::fs::rename(&aside, &released).unwrap();
    node.start_agent();
    assert!(node.leases().all().is_empty());
    std::fs::remove_file(&filler).unwrap();
    node.call(&Call::new("STATUS", "", &one)).expect_ok();
    node.expect_clean();
}
