//! Leases against a model, across kills, full disks and damaged files.

use std::collections::{BTreeMap, VecDeque};
use std::fs;
use std::net::IpAddr;

use proptest::prelude::*;
use tempfile::TempDir;
use weir_cni::wire::Mac;

use super::*;

const MACS: Macs = Macs {
    host: Mac([2, 0, 0, 0, 0, 1]),
    pod: Mac([2, 0, 0, 0, 0, 2]),
};

fn places(dir: &Path) -> Places {
    Places {
        store: dir.join("leases.redb"),
        released: dir.join("released"),
    }
}

fn open_with(dir: &Path, cidrs: &[&str]) -> Result<Leases, LeaseError> {
    let cidrs: Vec<IpNet> = cidrs.iter().map(|it| it.parse().unwrap()).collect();
    Leases::open(places(dir), Ranges::Given(&cidrs), "boot-1".into())
}

fn open(dir: &Path) -> Leases {
    open_with(dir, &["10.0.0.0/28"]).unwrap()
}

fn attachment(number: usize) -> Attachment {
    Attachment::new(format!("c{number}"), "eth0").unwrap()
}

fn add(number: usize) -> Add {
    Add {
        attachment: attachment(number),
        network: "pods".into(),
        netns: number as u64,
        pod: None,
    }
}

/// Durably.
fn lease(leases: &Leases, number: usize) -> Result<IpAddr, LeaseError> {
    let lease = leases.lease(add(number), MACS, 1)?;
    leases.make_durable()?;
    Ok(lease.addresses[0])
}

/// What a killed process leaves: the file as it is, while its owner still has it open.
fn kill(leases: Leases, dir: TempDir) -> TempDir {
    let after = tempfile::tempdir().unwrap();
    let from = places(dir.path()).store;
    fs::copy(from, places(after.path()).store).unwrap();
    drop(leases);
    after
}

#[derive(Clone, Debug)]
enum Step {
    Lease(usize),
    Attach(usize),
    Release(usize),
    Restart,
    Kill,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (0..20usize).prop_map(Step::Lease),
        2 => (0..20usize).prop_map(Step::Attach),
        3 => (0..20usize).prop_map(Step::Release),
        1 => Just(Step::Restart),
        1 => Just(Step::Kill),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn no_address_is_leased_twice_and_the_longest_freed_goes_first(
        steps in prop::collection::vec(step(), 1..60),
    ) {
        let mut dir = tempfile::tempdir().unwrap();
        let mut leases = open(dir.path());
        let mut free: VecDeque<IpAddr> = (2..15).map(|it| IpAddr::from([10, 0, 0, it])).collect();
        let mut used: BTreeMap<usize, (IpAddr, LeaseState)> = BTreeMap::new();
        for step in steps {
            match step {
                Step::Lease(number) => match lease(&leases, number) {
                    Ok(address) => {
                        prop_assert!(!used.contains_key(&number));
                        prop_assert_eq!(Some(address), free.pop_front());
                        used.insert(number, (address, LeaseState::Leased));
                    }
                    Err(LeaseError::Exists(_)) => prop_assert!(used.contains_key(&number)),
                    Err(LeaseError::Exhausted(_)) => prop_assert!(free.is_empty()),
                    Err(other) => prop_assert!(false, "{}", other),
                },
                Step::Attach(number) => {
                    if let Some(lease) = leases.find(&attachment(number)) {
                        let host_ifindex = number as u32;
                        leases.attach(&lease, host_ifindex).unwrap();
                        used.get_mut(&number).unwrap().1 = LeaseState::Attached { host_ifindex };
                    }
                }
                Step::Release(number) => {
                    leases.release([&attachment(number)]);
                    leases.make_durable().unwrap();
                    free.extend(used.remove(&number).map(|(address, _)| address));
                }
                Step::Restart => {
                    drop(leases);
                    leases = open(dir.path());
                    used.values_mut().for_each(|it| it.1 = LeaseState::Leased);
                }
                Step::Kill => {
                    dir = kill(leases, dir);
                    leases = open(dir.path());
                    used.values_mut().for_each(|it| it.1 = LeaseState::Leased);
                }
            }
            let all: BTreeMap<usize, (IpAddr, LeaseState)> = leases
                .all()
                .values()
                .map(|it| (it.netns as usize, (it.addresses[0], it.state)))
                .collect();
            prop_assert_eq!(&all, &used);
        }
    }
}

/// Whoever has waited may use what it was given, also if the agent is killed in the next moment and whoever else
/// was writing.
#[test]
fn what_was_waited_for_outlives_a_kill_however_many_wait() {
    let dir = tempfile::tempdir().unwrap();
    let leases = open_with(dir.path(), &["10.0.0.0/24"]).unwrap();
    let store = places(dir.path()).store;
    std::thread::scope(|scope| {
        for number in 0..30 {
            let (leases, store) = (&leases, &store);
            scope.spawn(move || {
                let leased = lease(leases, number).unwrap();
                let killed = tempfile::tempdir().unwrap();
                // Nobody writes while this is copied: a kill leaves no page half written, and a copy may.
                let copied = {
                    let _disk = leases.disk();
                    fs::copy(store, places(killed.path()).store)
                };
                copied.unwrap();
                let after = open_with(killed.path(), &["10.0.0.0/24"]).unwrap();
                let found = after.find(&attachment(number)).unwrap();
                assert_eq!(found.addresses[0], leased);
            });
        }
    });
    let all = leases.all();
    let addresses: HashSet<IpAddr> = all.values().map(|it| it.addresses[0]).collect();
    assert_eq!((all.len(), addresses.len()), (30, 30));
}

#[test]
fn a_changed_range_leaves_existing_leases() {
    let dir = tempfile::tempdir().unwrap();
    let leases = open(dir.path());
    assert_eq!(lease(&leases, 1).unwrap().to_string(), "10.0.0.2");
    drop(leases);

    let leases = open_with(dir.path(), &["10.9.0.0/28", "fd00::/64"]).unwrap();
    let new = leases.lease(add(2), MACS, 1).unwrap();
    assert_eq!(
        new.addresses,
        ["10.9.0.2", "fd00::2"].map(|it| it.parse::<IpAddr>().unwrap())
    );
    assert_eq!(leases.all().len(), 2);
    leases.release([&attachment(1)]);
    drop(leases);

    let leases = open(dir.path());
    assert_eq!(leases.all().len(), 1);
    assert_eq!(lease(&leases, 3).unwrap().to_string(), "10.0.0.3");
}

#[test]
fn ranges_come_late_one_by_one_and_outlive_a_kill() {
    let open = |dir: &Path| Leases::open(places(dir), Ranges::LastServed, "boot-1".into()).unwrap();
    let texts = |lease: &Lease| -> Vec<String> {
        lease.addresses.iter().map(ToString::to_string).collect()
    };
    let range = |text: &str| text.parse::<IpNet>().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let leases = open(dir.path());
    assert!(matches!(leases.check(), Err(LeaseError::NoRange)));
    assert!(matches!(lease(&leases, 1), Err(LeaseError::NoRange)));

    let v4 = range("10.0.0.0/29");
    leases.serve(&[v4]).unwrap();
    let first = leases.lease(add(1), MACS, 1).unwrap();
    assert_eq!(texts(&first), ["10.0.0.2"]);
    let freed = leases.lease(add(2), MACS, 1).unwrap();
    assert_eq!(texts(&freed), ["10.0.0.3"]);
    leases.release([&attachment(2)]);

    // A second family joins; what was free stays behind what never was used.
    let v6 = range("fd00::/64");
    leases.serve(&[v6, v4]).unwrap();
    let both = leases.lease(add(3), MACS, 1).unwrap();
    assert_eq!(texts(&both), ["10.0.0.4", "fd00::2"]);
    assert!(leases.serve(&[v4, range("10.1.0.0/24")]).is_err());
    assert_eq!(*leases.ranges().borrow(), [v4, v6], "as before");
    leases.make_durable().unwrap();

    let dir = kill(leases, dir);
    let leases = open(dir.path());
    assert_eq!(*leases.ranges().borrow(), [v4, v6]);
    assert_eq!(leases.all().len(), 2);
    let next = leases.lease(add(4), MACS, 1).unwrap();
    assert_eq!(texts(&next), ["10.0.0.5", "fd00::3"]);

    // The node got another range: leases stay, and new ones are of the new.
    leases.serve(&[range("10.9.0.0/29")]).unwrap();
    let moved = leases.lease(add(5), MACS, 1).unwrap();
    assert_eq!(texts(&moved), ["10.9.0.2"]);
    assert_eq!(leases.all().len(), 4);
}

#[test]
fn a_lost_devices_address_is_held_until_it_is_gone() {
    let dir = tempfile::tempdir().unwrap();
    let leases = open_with(dir.path(), &["10.0.0.0/29"]).unwrap();
    let device = Device {
        name: attachment(9).device(),
        ifindex: 7,
        addresses: vec!["10.0.0.2".parse().unwrap()],
    };
    leases.hold(&device);
    assert!(leases.holds(&device.name));
    for (number, address) in [(1, 3), (2, 4), (3, 5), (4, 6)] {
        assert_eq!(
            lease(&leases, number).unwrap(),
            IpAddr::from([10, 0, 0, address])
        );
    }
    assert!(matches!(leases.check(), Err(LeaseError::Exhausted(_))));
    leases.let_go(&device.name);
    assert_eq!(lease(&leases, 5).unwrap().to_string(), "10.0.0.2");
}

/// The file remembers it as free and as leased: the lease counts, whatever ranges come.
#[test]
fn what_was_held_and_leased_again_is_free_for_nobody_after_a_restart() {
    let open = |dir: &Path| Leases::open(places(dir), Ranges::LastServed, "boot-1".into()).unwrap();
    let range = |text: &str| text.parse::<IpNet>().unwrap();
    let v4 = range("10.0.0.0/29");
    let dir = tempfile::tempdir().unwrap();
    let leases = open(dir.path());
    leases.serve(&[v4]).unwrap();
    let address = lease(&leases, 1).unwrap();
    leases.release([&attachment(1)]);
    leases.make_durable().unwrap();
    // Killed before it deleted the device, which the next one finds without a lease.
    let dir = kill(leases, dir);
    let leases = open(dir.path());
    let device = Device {
        name: attachment(1).device(),
        ifindex: 7,
        addresses: vec![address],
    };
    leases.hold(&device);
    leases.let_go(&device.name);
    let mut all: Vec<IpAddr> = (2..7).map(|it| lease(&leases, it).unwrap()).collect();
    assert!(all.contains(&address));
    let dir = kill(leases, dir);
    let leases = open(dir.path());
    leases.serve(&[v4, range("fd00::/64")]).unwrap();
    assert!(matches!(lease(&leases, 9), Err(LeaseError::Exhausted(_))));
    all.sort_unstable();
    all.dedup();
    assert_eq!(all.len(), 5);
}

#[test]
fn two_agents_do_not_share_a_store() {
    let dir = tempfile::tempdir().unwrap();
    let _first = open(dir.path());
    let second = open_with(dir.path(), &["10.0.0.0/28"]).unwrap_err();
    assert!(
        matches!(second, LeaseError::Store(StoreError::Busy { .. })),
        "{second}"
    );
}

/// A store with leases and freed addresses, and what a reader must find in it.
fn filled() -> (TempDir, Vec<u8>, Arc<LeaseTable>) {
    let dir = tempfile::tempdir().unwrap();
    let leases = open(dir.path());
    for number in 0..10 {
        lease(&leases, number).unwrap();
    }
    leases.release([&attachment(3), &attachment(1)]);
    leases.make_durable().unwrap();
    let all = leases.all();
    let dir = kill(leases, dir);
    let bytes = fs::read(places(dir.path()).store).unwrap();
    (dir, bytes, all)
}

/// Either every lease is there, or nothing is leased and the message says what to do.
fn assert_whole_or_refused(dir: &Path, expected: &LeaseTable, what: &str) {
    match open_with(dir, &["10.0.0.0/28"]) {
        Ok(leases) => {
            assert_eq!(*leases.all(), *expected, "{what}");
            let next = lease(&leases, 99).unwrap();
            assert!(
                expected.values().all(|it| !it.addresses.contains(&next)),
                "{what}"
            );
        }
        Err(error) => {
            let message = error.to_string();
            assert!(message.contains("leases.redb"), "{what}: {message}");
            assert!(message.contains("Drain this node"), "{what}: {message}");
        }
    }
}

#[test]
fn a_truncated_store_is_refused_at_every_length() {
    let (dir, bytes, _) = filled();
    let store = places(dir.path()).store;
    // Every length around what redb may look at first, then around every page.
    let lengths = (0..512).chain((512..bytes.len()).filter(|it| {
        let in_page = it % 4096;
        in_page <= 1 || in_page == 4095
    }));
    let mut tried = 0;
    for length in lengths {
        fs::write(&store, &bytes[..length]).unwrap();
        let error = open_with(dir.path(), &["10.0.0.0/28"]).expect_err(&format!("{length} bytes"));
        let message = error.to_string();
        assert!(message.contains("Drain this node"), "{length}: {message}");
        tried += 1;
    }
    assert!(tried > 512);
}

#[test]
fn a_flipped_bit_loses_no_lease() {
    let (dir, bytes, expected) = filled();
    let store = places(dir.path()).store;
    // The file is mostly pages that were never written; the others are where something can go wrong.
    let used: Vec<usize> = (0..bytes.len()).filter(|it| bytes[*it] != 0).collect();
    let step = (used.len() / 400).max(1);
    for at in used.into_iter().step_by(step) {
        let mut damaged = bytes.clone();
        damaged[at] ^= 0x10;
        fs::write(&store, &damaged).unwrap();
        assert_whole_or_refused(dir.path(), &expected, &format!("byte {at}"));
    }
}
