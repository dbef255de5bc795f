//! What protects and serves pods beside our programs: the second lock, and the settings of the node's
//! namespace. Needs root.

#![allow(clippy::unwrap_used, reason = "a test stops at the first surprise")]

use std::io::ErrorKind;
use std::net::UdpSocket;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use weir_agent::kernel::second_lock::{self, Lock};
use weir_tests::netns::{End, Netns, link};

/// The node's end of a pair, by a name that is ours.
const DEVICE: &str = "weir0000000001";
const PATIENCE: Duration = Duration::from_secs(20);

fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !is_so() {
        assert!(Instant::now() < deadline, "{what}: not within {PATIENCE:?}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Gives nft rules to read.
fn nft(netns: &Netns, rules: &str) {
    let mut command = netns.command("nft");
    let said = command.args(["--", rules]).output().unwrap();
    let why = String::from_utf8_lossy(&said.stderr);
    assert!(said.status.success(), "{rules}: {why}");
}

#[test]
fn the_second_lock_drops_and_counts_what_no_program_has_passed() {
    let (node, pod) = (Netns::new("lock").unwrap(), Netns::new("pod").unwrap());
    // Or the drops that are counted here would be of what IPv6 says of its own accord.
    pod.set_sysctl("net.ipv6.conf.default.disable_ipv6", "1")
        .unwrap();
    let (near, far) = (["192.0.2.1/24"], ["192.0.2.2/24"]);
    link(
        End {
            netns: &node,
            device: DEVICE,
            addresses: &near,
        },
        End {
            netns: &pod,
            device: "eth0",
            addresses: &far,
        },
    )
    .unwrap();
    let heard = node
        .run(|| UdpSocket::bind("192.0.2.1:53").unwrap())
        .unwrap();
    heard.set_nonblocking(true).unwrap();
    let mouth = pod.run(|| UdpSocket::bind("192.0.2.2:0").unwrap()).unwrap();
    let speak = || mouth.send_to(b"hello", "192.0.2.1:53").unwrap();
    let hears = || match heard.recv(&mut [0; 16]) {
        Ok(_) => true,
        Err(error) => {
            assert_eq!(error.kind(), ErrorKind::WouldBlock);
            false
        }
    };
    let state = || node.run(second_lock::state).unwrap().unwrap();
    let close = || node.run(second_lock::close).unwrap().unwrap();
    let drops = || match state() {
        Lock::Closed { drops } => drops,
        Lock::Open => panic!("the lock is open"),
    };
    until("an open lock lets packets pass", || {
        speak();
        hears()
    });
    while hears() {}

    assert_eq!(close(), Lock::Open);
    assert_eq!(drops(), 0);
    speak();
    until("the packet is counted", || drops() == 1);
    assert!(!hears());
    assert_eq!(
        close(),
        Lock::Closed { drops: 1 },
        "a lock that is right counts on"
    );
    assert_eq!(drops(), 1, "it was not written again");

    for wrong in [
        "flush chain inet weir prerouting",
        "insert rule inet weir prerouting accept",
        "add rule inet weir prerouting accept",
        "delete table inet weir",
        // The kernel takes a sleeping table off its hooks.
        "add table inet weir { flags dormant; }",
        "add chain inet weir prerouting { policy drop; }",
        "add chain inet weir another",
    ] {
        let generation = node.run(second_lock::generation).unwrap().unwrap();
        nft(&node, wrong);
        let now = node.run(second_lock::generation).unwrap().unwrap();
        assert_ne!(generation, now, "{wrong}");
        assert_eq!(close(), Lock::Open, "{wrong}");
        assert_eq!(drops(), 0, "{wrong}");
        assert!(node.run(second_lock::open).unwrap().unwrap(), "{wrong}");
        assert_eq!(close(), Lock::Open, "{wrong}");
    }
    let quiet = || node.run(second_lock::generation).unwrap().unwrap();
    assert_eq!(quiet(), quiet());
    assert!(node.run(second_lock::open).unwrap().unwrap());
    assert!(!node.run(second_lock::open).unwrap().unwrap());
    assert_eq!(state(), Lock::Open);
}

/// The lock as an operator would write it.
const TEXT: &str = r#"table inet weir {
	chain prerouting {
		type filter hook prerouting priority raw; policy accept;
		iifname "weir*" meta mark & 0x00000f00 != 0x00000e00 counter packets 0 bytes 0 drop comment "no weir program has passed it"
		meta mark & 0x00000f00 == 0x00000e00 iifname != "weir*" meta mark & 0x00003f00 != 0x00002e00 counter packets 0 bytes 0 drop comment "it was inside of what a pod has sent"
	}
}
"#;

#[test]
fn an_operator_reads_the_lock_with_nft() {
    let node = Netns::new("lock-text").unwrap();
    assert_eq!(node.run(second_lock::close).unwrap().unwrap(), Lock::Open);
    let listed = node
        .command("nft")
        .args(["list", "ruleset"])
        .output()
        .unwrap();
    assert_eq!(String::from_utf8(listed.stdout).unwrap(), TEXT);
}

#[test]
fn a_rule_made_with_nft_is_the_lock_if_it_is_the_same() {
    let node = Netns::new("lock-nft").unwrap();
    let found = || node.run(second_lock::state).unwrap().unwrap();
    // With the counter of an earlier agent.
    let counted = TEXT.replace("packets 0", "packets 7");
    nft(&node, &counted);
    assert_eq!(found(), Lock::Closed { drops: 14 });
    let count = || node.run(second_lock::drops).unwrap().unwrap();
    assert_eq!(count(), Some(14));
    for (part, other) in [
        ("hook prerouting", "hook input"),
        ("priority raw", "priority 0"),
        ("policy accept", "policy drop"),
        ("\"weir*\"", "\"wei*\""),
        ("\"weir*\"", "\"weir0\""),
        ("iifname \"", "iifname != \""),
        ("iifname", "oifname"),
        ("0x00000f00", "0x00000fff"),
        ("!= 0x00000e00", "!= 0x00000d00"),
        ("!= 0x00000e00", "== 0x00000e00"),
        ("meta mark", "ct mark"),
        ("counter packets 7 bytes 0 ", ""),
        ("counter packets 7 bytes 0 drop", "drop"),
        (" drop ", " accept "),
        (" drop ", " continue "),
        ("counter", "limit rate 1/second counter"),
        ("counter", "notrack counter"),
        ("chain prerouting", "chain other"),
        ("table inet", "table ip"),
    ] {
        nft(&node, "flush ruleset");
        nft(&node, &counted.replacen(part, other, 1));
        assert_eq!(found(), Lock::Open, "{part}: {other}");
    }
}

#[test]
fn changes_by_others_do_not_disturb_a_look() {
    let node = Netns::new("lock-churn").unwrap();
    node.run(second_lock::close).unwrap().unwrap();
    let is_over = AtomicBool::new(false);
    let (looks, changes) = std::thread::scope(|scope| {
        let others = scope.spawn(|| {
            let mut changes = 0;
            while !is_over.load(Ordering::Relaxed) {
                nft(&node, "add table inet other");
                nft(&node, "delete table inet other");
                changes += 2;
            }
            changes
        });
        let looked = node.run(|| {
            let deadline = Instant::now() + Duration::from_secs(3);
            let mut looks = 0;
            while Instant::now() < deadline {
                match second_lock::state() {
                    Ok(Lock::Closed { drops: 0 }) => looks += 1,
                    other => return Err(format!("look {looks}: {other:?}")),
                }
            }
            Ok(looks)
        });
        is_over.store(true, Ordering::Relaxed);
        (looked.unwrap(), others.join().unwrap())
    });
    let looks = looks.unwrap();
    println!("{looks} looks during {changes} changes");
    assert!(
        looks > 100 && changes > 10,
        "{looks} looks, {changes} changes"
    );
}
