//! What protects and serves pods beside our programs: the second lock, and the settings of the node's
//! namespace. Needs root.

#![allow(clippy::unwrap_used, reason = "a test stops at the first surprise")]

use std::io::ErrorKind;
use std::net::UdpSocket;
use std::process::Command;
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

fn succeed(command: &mut Command) {
    let status = command.status().unwrap();
    assert!(status.success(), "{command:?}: {status}");
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
        "delete table inet weir",
    ] {
        let generation = node.run(second_lock::generation).unwrap().unwrap();
        let mut nft = node.command("nft");
        succeed(nft.args(wrong.split(' ')));
        let now = node.run(second_lock::generation).unwrap().unwrap();
        assert_ne!(generation, now, "{wrong}");
        assert_eq!(close(), Lock::Open, "{wrong}");
        assert_eq!(drops(), 0, "{wrong}");
        assert!(node.run(second_lock::open).unwrap().unwrap(), "{wrong}");
        assert_eq!(close(), Lock::Open, "{wrong}");
    }
    let quiet = || node.run(second_lock::generation).unwrap().unwrap();
    assert_eq!(quiet(), quiet());
}
