//! Ring 2: packets through the node's uplink, on the host.

#![allow(clippy::unwrap_used, reason = "a test that fails should say where")]

use weir_common::event::Hook;
use weir_common::node::{Features, PASSED_MARK};
use weir_datapath::{Scratch, Verdict};
use weir_tests::bytes::{Bytes, passed};
use weir_tests::edges::{sent, udp};
use weir_tests::frames::checksums_are_right;
use weir_tests::stories::{Story, decide, stories};
use weir_tests::world::{FAMILIES, Host, UPLINK, world};

#[test]
fn every_story_ends_as_it_should() {
    let stories = stories();
    assert!(stories.len() > 15, "{}", stories.len());
    for Story { name, steps } in stories {
        let memory = world();
        for (number, step) in steps.into_iter().enumerate() {
            let mut packet = step.packet.clone();
            let mut scratch = Scratch::default();
            let verdict = decide(step.hook, &mut packet, &memory, &mut scratch);
            let at = format!("{name}, step {number} ({})", step.hook.label());
            assert_eq!(verdict, step.verdict, "{at}");
            if let Some(after) = &step.after {
                assert!(checksums_are_right(after), "{at}: the test's own frame");
                assert_eq!(&packet.frame, after, "{at}");
            } else if matches!(verdict, Verdict::Pass) {
                assert_eq!(packet.frame, step.packet.frame, "{at}");
            }
        }
    }
}

#[test]
fn without_masquerading_pods_keep_their_addresses() {
    for family in FAMILIES {
        let mut memory = world();
        memory.config.features &= !Features::MASQUERADE;
        let frame = sent(Host::B, Host::World, family, &udp(4000, 53))
            .packet
            .frame;
        let ifindex = Host::B.ifindex().unwrap();
        for (hook, packet) in [
            (Hook::FROM_POD, Bytes::new(ifindex, frame.clone())),
            (Hook::TO_NET, passed(UPLINK, frame.clone())),
        ] {
            let mut packet = packet;
            let verdict = decide(hook, &mut packet, &memory, &mut Scratch::default());
            assert_eq!((verdict, &packet.frame), (Verdict::Pass, &frame));
            assert_eq!(packet.mark, PASSED_MARK);
        }
        assert!(memory.nat_ports.borrow().is_empty());
    }
}
