//! Ring 3: what time does in the kernel's tables. Nobody waits: a row's last packet is set back. Needs root.

use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use aya::Ebpf;
use aya::maps::HashMap;
use weir_common::DropReason;
use weir_common::counter::Counter;
use weir_common::event::Hook;
use weir_common::service::Affinity;
use weir_common::way::{Plan, Way, WayKey};
use weir_tests::bytes::{Bytes, leaving};
use weir_tests::frames::{Ip, L3, SYN, Transport};
use weir_tests::programs::{
    clock, counted, dropped, in_own_namespace, load_hooks, make_devices, map, rows, run, write_all,
};
use weir_tests::world::{FAMILIES, Family, Host, NAT_PORT, SERVICE_PORT, STICKY, UPLINK, world};
use zerocopy::transmute;

const SECOND: Duration = Duration::from_secs(1);
/// Who speaks to whom outside, where the node has one port.
const DNS: (Host, u16) = (Host::World, 53);

/// The clock of the programs as it was, in nanoseconds.
fn ago(by: Duration) -> Result<u64> {
    let then = clock().checked_sub(by.as_nanos() as u64);
    then.with_context(|| format!("this machine is not up for {by:?} yet"))
}

/// The programs with the tables of the world, in which one port stands for whoever leaves.
struct Kernel {
    ebpf: Ebpf,
    family: Family,
}

impl Kernel {
    /// Runs a test in each family, with fresh tables.
    fn each(test: impl Fn(Self) -> Result<()> + Copy + Send + 'static) -> Result<()> {
        for family in FAMILIES {
            in_own_namespace(move || {
                make_devices()?;
                let memory = world();
                let mut ebpf = load_hooks(memory.config)?;
                write_all(&mut ebpf, &memory)?;
                test(Self { ebpf, family })
            })
            .with_context(|| format!("{family:?}"))?;
        }
        Ok(())
    }

    fn udp(&self, from: (Host, u16), to: (Host, u16)) -> Vec<u8> {
        let (ports, payload) = ((from.1, to.1), b"?".to_vec());
        self.frame(from.0, to.0, &Transport::Udp { ports, payload })
    }

    fn syn(&self, from: (Host, u16), to: (Host, u16)) -> Vec<u8> {
        let (ports, flags, payload) = ((from.1, to.1), SYN, Vec::new());
        let segment = Transport::Tcp {
            ports,
            flags,
            payload,
        };
        self.frame(from.0, to.0, &segment)
    }

    fn frame(&self, from: Host, to: Host, transport: &Transport) -> Vec<u8> {
        let mut ip = Ip::between(from.ip(self.family), to.ip(self.family));
        ip.source_mac = from.mac();
        ip.frame(transport)
    }

    /// Does a packet leave through the uplink?
    fn leaves(&self, frame: Vec<u8>) -> Result<bool> {
        let (answer, ..) = run(&self.ebpf, Hook::TO_NET, &leaving(UPLINK, frame))?;
        Ok(answer != 2)
    }

    /// Sends what a pod says, and returns the frame as it goes on.
    fn says(&self, from: Host, frame: Vec<u8>) -> Result<Vec<u8>> {
        let device = from.ifindex().context("it is of a pod")?;
        let (answer, frame, _) = run(&self.ebpf, Hook::FROM_POD, &Bytes::new(device, frame))?;
        ensure!(answer != 2, "it is dropped");
        Ok(frame)
    }

    /// Sets back when a packet was seen last on the ways of a table that are as asked for; says how many that were.
    fn age_ways(&mut self, by: Duration, is_meant: impl Fn(&WayKey) -> bool) -> Result<usize> {
        let seen = ago(by)?;
        let mut changed = 0;
        for (key, way) in self.ways()?.into_iter().filter(|(key, _)| is_meant(key)) {
            way.seen.store(seen, Relaxed);
            let row: [u8; size_of::<Way>()] = transmute!(way);
            self.put("OTHER_WAYS", &key, row)?;
            changed += 1;
        }
        Ok(changed)
    }

    /// As [`Self::age_ways`], for the only plan of a table.
    fn age_plan(&mut self, table: &str, by: Duration) -> Result<()> {
        let seen = ago(by)?;
        let plans = rows::<Plan, { size_of::<Plan>() }>(&mut self.ebpf, table)?;
        ensure!(plans.len() == 1, "{plans:?}");
        for (key, plan) in plans {
            plan.way.seen.store(seen, Relaxed);
            plan.back.seen.store(seen, Relaxed);
            let row: [u8; size_of::<Plan>()] = transmute!(plan);
            self.put(table, &key, row)?;
        }
        Ok(())
    }

    /// Sets back when every client was given its backend.
    fn age_affinity(&mut self, by: Duration) -> Result<()> {
        let mut table: HashMap<_, [u8; 24], [u8; 40]> =
            map(&mut self.ebpf, "AFFINITY")?.try_into()?;
        let all: Vec<_> = table.iter().collect::<Result<_, _>>()?;
        for (key, row) in all {
            let row: Affinity = transmute!(row);
            let used = ago(by)?;
            let row: [u8; 40] = transmute!(Affinity { used, ..row });
            table.insert(key, row, 0)?;
        }
        Ok(())
    }

    fn ways(&mut self) -> Result<Vec<(WayKey, Way)>> {
        rows::<Way, { size_of::<Way>() }>(&mut self.ebpf, "OTHER_WAYS")
    }

    fn put<const N: usize>(&mut self, name: &str, key: &WayKey, row: [u8; N]) -> Result<()> {
        let mut table: HashMap<_, [u8; 40], [u8; N]> = map(&mut self.ebpf, name)?.try_into()?;
        let key: [u8; 40] = transmute!(*key);
        Ok(table.insert(key, row, 0)?)
    }

    /// Lets pod B and somebody outside speak until their conversation has ways, with the node's only port.
    fn converse(&mut self) -> Result<()> {
        let asks = self.udp((Host::B, 4_000), DNS);
        for _ in 0..3 {
            ensure!(self.leaves(asks.clone())?);
        }
        let ways = self.ways()?.len();
        ensure!(ways == 2, "{ways}");
        Ok(())
    }
}

#[test]
fn a_port_serves_another_when_both_ways_were_silent_for_two_minutes() -> Result<()> {
    Kernel::each(|mut kernel| {
        kernel.converse()?;
        let other = kernel.udp((Host::C, 4_000), DNS);
        let is_out = |key: &WayKey| key.hook == Hook::TO_NET;
        for (out, back, is_free) in [
            (SECOND, SECOND, false),
            (115 * SECOND, 115 * SECOND, false),
            (125 * SECOND, SECOND, false),
            (SECOND, 125 * SECOND, false),
            (121 * SECOND, 121 * SECOND, true),
        ] {
            ensure!(kernel.age_ways(out, is_out)? == 1);
            ensure!(kernel.age_ways(back, |key| !is_out(key))? == 1);
            let leaves = kernel.leaves(other.clone())?;
            ensure!(leaves == is_free, "{out:?} and {back:?} ago: {leaves}");
        }
        // The port is another's now, and what comes back is.
        ensure!(!kernel.leaves(kernel.udp((Host::B, 4_000), DNS))?);
        ensure!(dropped(&mut kernel.ebpf)? == [(DropReason::NoNatPort, 5)]);
        Ok(())
    })
}

#[test]
fn what_nobody_has_answered_keeps_its_port_for_a_time() -> Result<()> {
    Kernel::each(|mut kernel| {
        let asks = kernel.udp((Host::B, 4_000), DNS);
        let own = kernel.udp((Host::B, 4_001), DNS);
        let others = kernel.udp((Host::C, 4_000), DNS);
        ensure!(kernel.leaves(asks.clone())?);
        for (by, next, is_free) in [
            (SECOND, &own, false),
            (SECOND, &others, false),
            (29 * SECOND, &others, false),
            (3 * SECOND, &own, true),
            (3 * SECOND, &others, false),
            (31 * SECOND, &others, true),
        ] {
            kernel.age_plan("OTHER_PLANS", by)?;
            let leaves = kernel.leaves(next.clone())?;
            ensure!(leaves == is_free, "{by:?} ago: {leaves}");
        }
        let asks = kernel.syn((Host::B, 4_000), DNS);
        let own = kernel.syn((Host::B, 4_001), DNS);
        ensure!(kernel.leaves(asks)?);
        for (by, is_free) in [
            (3 * SECOND, false),
            (59 * SECOND, false),
            (61 * SECOND, true),
        ] {
            kernel.age_plan("TCP_PLANS", by)?;
            let leaves = kernel.leaves(own.clone())?;
            ensure!(leaves == is_free, "TCP, {by:?} ago: {leaves}");
        }
        ensure!(dropped(&mut kernel.ebpf)? == [(DropReason::NoNatPort, 6)]);
        Ok(())
    })
}

#[test]
fn every_packet_says_that_its_way_is_in_use() -> Result<()> {
    Kernel::each(|mut kernel| {
        kernel.converse()?;
        let asks = leaving(UPLINK, kernel.udp((Host::B, 4_000), DNS));
        let answers = Bytes::new(UPLINK, kernel.udp(DNS, (Host::Node, NAT_PORT)));
        for (hook, packet) in [(Hook::TO_NET, asks), (Hook::FROM_NET, answers)] {
            kernel.age_ways(100 * SECOND, |_| true)?;
            let before = clock();
            let (answer, ..) = run(&kernel.ebpf, hook, &packet)?;
            ensure!(answer != 2);
            for (key, way) in kernel.ways()? {
                let is_fresh = way.seen.load(Relaxed) >= before;
                ensure!(is_fresh == (key.hook == hook), "{}", key.hook.label());
            }
        }
        Ok(())
    })
}

#[test]
fn a_lost_way_of_answers_is_missed_within_about_a_second() -> Result<()> {
    // The unit in which a way's last packet is compared with the clock.
    const UNIT: u64 = 1 << 30;
    Kernel::each(|mut kernel| {
        let asks = kernel.udp((Host::B, 5_000), (Host::A, 6_000));
        for _ in 0..3 {
            kernel.says(Host::B, asks.clone())?;
        }
        let is_back = |key: &WayKey| key.source_port == 6_000.into();
        let back = kernel.ways()?.into_iter().find(|(key, _)| is_back(key));
        let (key, _) = back.context("there is a way of the answers")?;
        let mut table: HashMap<_, [u8; 40], [u8; size_of::<Way>()]> =
            map(&mut kernel.ebpf, "OTHER_WAYS")?.try_into()?;
        table.remove(&transmute!(key))?;
        // Within one unit of the clock, however the packet falls, nobody looks.
        let mut has_passed = false;
        while !has_passed {
            let unit = clock() / UNIT;
            kernel.age_ways(Duration::ZERO, |_| true)?;
            if clock() / UNIT == unit {
                kernel.says(Host::B, asks.clone())?;
                has_passed = clock() / UNIT == unit;
                let lost = counted(&mut kernel.ebpf, Counter::WaysLost)?;
                ensure!(lost == 0 || !has_passed, "{lost}");
            }
        }
        kernel.age_ways(Duration::from_nanos(UNIT), |_| true)?;
        kernel.says(Host::B, asks.clone())?;
        ensure!(counted(&mut kernel.ebpf, Counter::WaysLost)? == 1);
        // What the answers come to is there again.
        let answer = kernel.udp((Host::A, 6_000), (Host::B, 5_000));
        kernel.says(Host::A, answer)?;
        ensure!(dropped(&mut kernel.ebpf)?.is_empty());
        Ok(())
    })
}

#[test]
fn a_client_keeps_its_backend_for_as_long_as_its_service_says() -> Result<()> {
    Kernel::each(|mut kernel| {
        let mut far = 0;
        for (by, port) in [(59_u32, 1), (61, 2)]
            .into_iter()
            .flat_map(|(by, block)| (0..24).map(move |number| (by, 1_000 * block + number)))
        {
            kernel.age_affinity(by * SECOND)?;
            let asks = kernel.udp((Host::A, port), (STICKY, SERVICE_PORT));
            let asked = kernel.says(Host::A, asks)?;
            let backend = match kernel.family {
                Family::V4 => asked[L3 + 19],
                Family::V6 => asked[L3 + 39],
            };
            let is_kept = backend == 2;
            ensure!(is_kept || by > 60, "{by} s ago: backend {backend}");
            far += usize::from(!is_kept);
        }
        ensure!(far > 0, "nobody has chosen anew");
        Ok(())
    })
}
