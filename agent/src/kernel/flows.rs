//! The kernel's flows: read, and swept of those that have ended.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::Ordering;
use std::time::Duration;

use weir_common::flow::{Flow, FlowBits, FlowKey};
use weir_common::nat::{NatKey, NatRow};
use weir_common::{Addr, Protocol};
use zerocopy::{FromBytes, IntoBytes};

use super::map::for_each;
use super::ports::orphans;
use super::sys;

/// `FLOWS` and `HALF_OPEN`, and the ports that are reserved for them.
#[derive(Debug)]
pub struct Flows {
    tables: [OwnedFd; 2],
    ports: OwnedFd,
}

/// After how long without a packet a flow is forgotten. Established TCP may be silent for two hours
/// before its keepalive (RFC 9293 section 3.8.4), so it gets more; a connection that one side has closed may be silent while
/// the other works, and gets the hour that kube-proxy grants it (`--conntrack-tcp-timeout-close-wait`), or, where the other
/// has not heard of it, what Linux does (`nf_conntrack_tcp_timeout_fin_wait`).
fn patience(key: &FlowKey, bits: u32) -> Duration {
    let is_answered = bits & FlowBits::ANSWERED != 0;
    let seconds = match (key.protocol, is_answered) {
        (Protocol::TCP, _) if FlowBits::is_closed(bits) => 30,
        (Protocol::TCP, false) => 60,
        (Protocol::TCP, true) if FlowBits::is_half_closed(bits) => {
            if bits & FlowBits::FIN_HEARD != 0 {
                3600
            } else {
                120
            }
        }
        (Protocol::TCP, true) => 3 * 3600,
        (_, true) => 120,
        (_, false) => 30,
    };
    Duration::from_secs(seconds)
}

/// Has a flow that was last seen then been forgotten by now? Entries that only lead to another one
/// (to a backend) live as long as an answered flow of their protocol.
pub fn is_expired(key: &FlowKey, flow: &Flow, now: Duration) -> bool {
    let mut bits = flow.bits.load(Ordering::Relaxed);
    if bits & FlowBits::TO_BACKEND != 0 {
        bits |= FlowBits::ANSWERED;
    }
    let seen = Duration::from_nanos(flow.seen.load(Ordering::Relaxed));
    now.saturating_sub(seen) > patience(key, bits)
}

impl Flows {
    pub(super) fn new(flows: OwnedFd, half_open: OwnedFd, ports: OwnedFd) -> Self {
        Self {
            tables: [flows, half_open],
            ports,
        }
    }

    /// Every flow.
    ///
    /// # Errors
    /// The kernel refuses to read.
    pub fn all(&self) -> io::Result<Vec<(FlowKey, Flow)>> {
        let mut all = Vec::new();
        self.each(|key, flow| all.push((key, flow)))?;
        Ok(all)
    }

    /// Removes flows that have ended, and those of addresses that are no longer anybody's. Returns how
    /// many entries. It reads both tables as a whole, so ask for it rarely, and not where
    /// somebody waits.
    ///
    /// # Errors
    /// The kernel refuses to read or to remove.
    pub fn sweep(&self, now: Duration, is_gone: impl Fn(&Addr) -> bool) -> io::Result<usize> {
        let removed = sweep(self, now, is_gone)?;
        self.free_ports(now)?;
        Ok(removed)
    }

    /// Frees the ports of flows that are gone, whoever removed them.
    fn free_ports(&self, now: Duration) -> io::Result<()> {
        let mut rows = Vec::new();
        let (key_size, row_size) = (size_of::<NatKey>(), size_of::<NatRow>());
        for_each(self.ports.as_fd(), key_size, row_size, |key, row| {
            if let (Ok(key), Ok(row)) = (NatKey::read_from_bytes(key), NatRow::read_from_bytes(row))
            {
                rows.push((key, row));
            }
        })?;
        for key in orphans(rows, now, |key| self.find(key))? {
            match sys::delete(self.ports.as_fd(), key.as_bytes()) {
                Err(error) if error.raw_os_error() != Some(libc::ENOENT) => return Err(error),
                _ => {}
            }
        }
        Ok(())
    }

    fn rows(table: &OwnedFd, mut row: impl FnMut(FlowKey, Flow)) -> io::Result<()> {
        for_each(
            table.as_fd(),
            size_of::<FlowKey>(),
            size_of::<Flow>(),
            |key, value| {
                if let (Ok(key), Ok(flow)) =
                    (FlowKey::read_from_bytes(key), Flow::read_from_bytes(value))
                {
                    row(key, flow);
                }
            },
        )
    }
}

/// Where flows are.
trait Entries {
    fn each(&self, entry: impl FnMut(FlowKey, Flow)) -> io::Result<()>;

    /// As it is now, in either table.
    fn find(&self, key: &FlowKey) -> io::Result<Option<Flow>>;

    /// Removes it from both tables; the number of entries that were there.
    fn remove(&self, key: &FlowKey) -> io::Result<usize>;
}

impl Entries for Flows {
    fn each(&self, mut entry: impl FnMut(FlowKey, Flow)) -> io::Result<()> {
        self.tables
            .iter()
            .try_for_each(|table| Self::rows(table, &mut entry))
    }

    fn find(&self, key: &FlowKey) -> io::Result<Option<Flow>> {
        let mut value = [0; size_of::<Flow>()];
        for table in &self.tables {
            match sys::lookup(table.as_fd(), key.as_bytes(), &mut value) {
                Ok(()) => return Ok(Flow::read_from_bytes(&value).ok()),
                Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(None)
    }

    fn remove(&self, key: &FlowKey) -> io::Result<usize> {
        let mut removed = 0;
        for table in &self.tables {
            match sys::delete(table.as_fd(), key.as_bytes()) {
                Ok(()) => removed += 1,
                Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(removed)
    }
}

/// A conversation through a service is two entries: the lead (client, service), which says to which
/// backend, and the flow (client, backend), which says that it came from the service. They go together:
/// a flow without its lead would be led to another backend in the middle of a connection.
fn sweep(
    entries: &impl Entries,
    now: Duration,
    is_gone: impl Fn(&Addr) -> bool,
) -> io::Result<usize> {
    let is_over = |key: &FlowKey, flow: &Flow| {
        is_expired(key, flow, now) || is_gone(&key.low.addr) || is_gone(&key.high.addr)
    };
    let mut over = Vec::new();
    entries.each(|key, flow| {
        if is_over(&key, &flow) {
            over.push(key);
        }
    })?;
    let mut removed = 0;
    for key in over {
        // A packet may have come since.
        let Some(flow) = entries.find(&key)?.filter(|flow| is_over(&key, flow)) else {
            continue;
        };
        let Some(other) = other_half(&key, &flow) else {
            removed += entries.remove(&key)?;
            continue;
        };
        let partner = entries
            .find(&other)?
            .filter(|found| other_half(&other, found) == Some(key));
        let is_needed = flow.bits.load(Ordering::Relaxed) & FlowBits::TO_BACKEND != 0
            && partner
                .as_ref()
                .is_some_and(|found| !is_over(&other, found));
        if is_needed {
            continue;
        }
        removed += entries.remove(&key)?;
        if partner.is_some() {
            removed += entries.remove(&other)?;
        }
    }
    Ok(removed)
}

/// Of a lead the flow that it leads to; of a flow through a service its lead.
fn other_half(key: &FlowKey, flow: &Flow) -> Option<FlowKey> {
    let bits = flow.bits.load(Ordering::Relaxed);
    if bits & (FlowBits::TO_BACKEND | FlowBits::FROM_SERVICE) == 0 {
        return None;
    }
    let opener = if bits & FlowBits::OPENER_IS_HIGH != 0 {
        key.high
    } else {
        key.low
    };
    let peer = flow.nat.peer;
    Some(FlowKey {
        low: opener.min(peer),
        high: opener.max(peer),
        protocol: key.protocol,
        pad: [0; 3],
    })
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, AtomicU64};

    use super::*;
    use weir_common::flow::Peer;

    fn expired(protocol: Protocol, bits: u32, idle: u64) -> bool {
        let key = FlowKey {
            protocol,
            ..Default::default()
        };
        let flow = Flow {
            seen: AtomicU64::new(1_000_000_000),
            bits: AtomicU32::new(bits),
            ..Default::default()
        };
        is_expired(&key, &flow, Duration::from_secs(1 + idle))
    }

    #[test]
    fn an_established_connection_outlives_its_keepalive() {
        assert!(!expired(
            Protocol::TCP,
            FlowBits::ANSWERED,
            2 * 3600 + 75 * 9
        ));
        assert!(expired(Protocol::TCP, FlowBits::ANSWERED, 3 * 3600 + 1));
    }

    #[test]
    fn what_was_never_answered_goes_soon() {
        assert!(expired(Protocol::TCP, 0, 61));
        assert!(expired(Protocol::UDP, 0, 31));
        assert!(!expired(Protocol::UDP, FlowBits::ANSWERED, 31));
    }

    #[test]
    fn a_closed_connection_goes_after_its_last_packets() {
        let closed = FlowBits::ANSWERED | FlowBits::OPENER_FIN | FlowBits::RESPONDER_FIN;
        assert!(!expired(Protocol::TCP, closed, 29));
        assert!(expired(Protocol::TCP, closed, 31));
    }

    #[test]
    fn a_connection_that_one_side_has_closed_may_be_silent_for_an_hour() {
        for fin in [FlowBits::OPENER_FIN, FlowBits::RESPONDER_FIN] {
            let bits = FlowBits::ANSWERED | fin;
            assert!(!expired(Protocol::TCP, bits, 119));
            assert!(expired(Protocol::TCP, bits, 121));
            let bits = bits | FlowBits::FIN_HEARD;
            assert!(!expired(Protocol::TCP, bits, 3599));
            assert!(expired(Protocol::TCP, bits, 3601));
            assert!(expired(Protocol::TCP, bits | FlowBits::RESET, 31));
            // Nobody has answered it.
            assert!(expired(Protocol::TCP, fin, 61));
        }
    }

    /// A table in memory.
    #[derive(Default)]
    struct Fake(std::cell::RefCell<std::collections::BTreeMap<FlowKey, (u32, u64, Peer)>>);

    impl Fake {
        fn with(self, key: FlowKey, bits: u32, seen: u64, peer: Peer) -> Self {
            self.0.borrow_mut().insert(key, (bits, seen, peer));
            self
        }

        fn flow((bits, seen, peer): (u32, u64, Peer)) -> Flow {
            Flow {
                bits: AtomicU32::new(bits),
                seen: AtomicU64::new(seen * 1_000_000_000),
                nat: weir_common::flow::Nat {
                    peer,
                    ..Default::default()
                },
                ..Default::default()
            }
        }
    }

    impl Entries for Fake {
        fn each(&self, mut entry: impl FnMut(FlowKey, Flow)) -> io::Result<()> {
            for (key, row) in &*self.0.borrow() {
                entry(*key, Self::flow(*row));
            }
            Ok(())
        }

        fn find(&self, key: &FlowKey) -> io::Result<Option<Flow>> {
            Ok(self.0.borrow().get(key).copied().map(Self::flow))
        }

        fn remove(&self, key: &FlowKey) -> io::Result<usize> {
            Ok(usize::from(self.0.borrow_mut().remove(key).is_some()))
        }
    }

    fn end(last: u8) -> Peer {
        Peer {
            addr: Addr::from(std::net::IpAddr::from([10, 0, 0, last])),
            port: 80.into(),
        }
    }

    /// A conversation of a client (1) through a service (9) with a backend (2): the seconds at which its
    /// lead and its flow were last used, and the address that is gone; the entries left at second 1000.
    fn left(lead: u64, flow: u64, gone: Option<u8>) -> usize {
        let (client, service, backend) = (end(1), end(9), end(2));
        let key = |high| FlowKey {
            low: client,
            high,
            protocol: Protocol::UDP,
            pad: [0; 3],
        };
        let bits = FlowBits::FROM_SERVICE | FlowBits::ANSWERED;
        let entries = Fake::default()
            .with(key(service), FlowBits::TO_BACKEND, lead, backend)
            .with(key(backend), bits, flow, service);
        let is_gone = |addr: &Addr| gone.is_some_and(|last| *addr == end(last).addr);
        let removed = sweep(&entries, Duration::from_secs(1000), is_gone).unwrap();
        let left = entries.0.borrow().len();
        assert_eq!(removed + left, 2);
        left
    }

    #[test]
    fn both_halves_of_a_conversation_go_together() {
        for (case, lead, flow, gone, expected) in [
            ("both are used", 1000, 1000, None, 2),
            ("only the server speaks", 1, 1000, None, 2),
            ("neither is used", 1, 1, None, 0),
            ("the flow has ended before its lead", 900, 1, None, 0),
            ("the backend is gone", 1000, 1000, Some(2), 0),
            ("the client is gone", 1000, 1000, Some(1), 0),
            ("somebody else is gone", 1000, 1000, Some(3), 2),
        ] {
            assert_eq!(left(lead, flow, gone), expected, "{case}");
        }
    }

    #[test]
    fn a_lead_to_nowhere_goes() {
        let key = FlowKey {
            low: end(1),
            high: end(9),
            protocol: Protocol::UDP,
            pad: [0; 3],
        };
        let entries = Fake::default().with(key, FlowBits::TO_BACKEND, 1, end(2));
        assert_eq!(
            sweep(&entries, Duration::from_secs(1000), |_| false).unwrap(),
            1
        );
    }
}
