//! Ring 2: the datapath agrees with a naive model of conversations, over random histories of all four programs on the host.
//! `WEIR_MODEL_PACKETS` says how many packets, `WEIR_MODEL_SEED` which histories.

use weir_common::DropReason;
use weir_tests::model::oracle::Why;
use weir_tests::model::{Report, run};

/// A number from the environment.
fn number(name: &str) -> Option<u64> {
    let value = std::env::var(name).ok()?;
    Some(value.parse().expect("a number"))
}

fn histories(seed: u64) -> Report {
    let packets = number("WEIR_MODEL_PACKETS").unwrap_or(50_000);
    match run(seed, packets) {
        Ok(report) => {
            println!("seed {seed}: {report:?}");
            report
        }
        Err(history) => panic!("{history}\nagain with WEIR_MODEL_SEED={seed}"),
    }
}

/// And they are worth something: each cause of a lost row, and each reason for which the model drops, was met.
#[test]
fn the_same_histories_as_always() {
    let report = histories(1);
    let causes = [
        Why::PushedOut,
        Why::Swept,
        Why::Finished,
        Why::Denied,
        Why::Moved,
        Why::Misled,
        Why::Renumbered,
        Why::Replaced,
        Why::AskedOtherwise,
        Why::Superseded,
        Why::NoRoom,
    ];
    for why in causes {
        assert!(report.lost.contains_key(&why), "{why:?}: {report:?}");
    }
    let reasons = [
        DropReason::NoLease,
        DropReason::SpoofedAddress,
        DropReason::SpoofedMac,
        DropReason::EgressDenied,
        DropReason::IngressDenied,
        DropReason::NoVerdict,
        DropReason::NoBackend,
        DropReason::NoService,
        DropReason::BackendGone,
        DropReason::NoFlow,
        DropReason::TableFull,
        DropReason::NatCollision,
        DropReason::NotForPod,
        DropReason::NoNatPort,
    ];
    for reason in reasons {
        let label = reason.label();
        assert!(report.dropped.contains_key(label), "{label}: {report:?}");
    }
}

#[test]
fn histories_that_nobody_has_seen() {
    let seed = number("WEIR_MODEL_SEED").unwrap_or_else(|| fastrand::u64(..1 << 48));
    println!("WEIR_MODEL_SEED={seed}");
    let report = histories(seed);
    assert!(report.histories > 0);
}
