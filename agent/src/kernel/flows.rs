//! The kernel's flows: read, and swept of those that have ended.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::Ordering;
use std::time::Duration;

use weir_common::flow::{Flow, FlowBits, FlowKey};
use weir_common::{Addr, Protocol};
use zerocopy::{FromBytes, IntoBytes};

use super::map::read_all;
use super::sys;

/// `FLOWS` and `HALF_OPEN`.
#[derive(Debug)]
pub struct Flows {
    tables: [OwnedFd; 2],
}

/// After how long without a packet a flow is forgotten. Established TCP may be silent for two hours
/// before its keepalive (RFC 9293 section 3.8.4), so it gets more.
fn patience(key: &FlowKey, bits: u32) -> Duration {
    let is_closing = bits & (FlowBits::OPENER_FIN | FlowBits::RESPONDER_FIN | FlowBits::RESET) != 0;
    let is_answered = bits & FlowBits::ANSWERED != 0;
    match (key.protocol, is_answered, is_closing) {
        (Protocol::TCP, _, true) => Duration::from_secs(30),
        (Protocol::TCP, true, false) => Duration::from_secs(3 * 3600),
        (Protocol::TCP, false, false) => Duration::from_secs(60),
        (_, true, _) => Duration::from_secs(120),
        (_, false, _) => Duration::from_secs(30),
    }
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
    pub(super) fn new(flows: OwnedFd, half_open: OwnedFd) -> Self {
        Self {
            tables: [flows, half_open],
        }
    }

    /// Every flow.
    ///
    /// # Errors
    /// The kernel refuses to read.
    pub fn all(&self) -> io::Result<Vec<(FlowKey, Flow)>> {
        let mut all = Vec::new();
        for table in &self.tables {
            all.extend(Self::rows(table)?);
        }
        Ok(all)
    }

    /// Removes flows that have ended, and those of addresses that are no longer anybody's. Returns how
    /// many.
    ///
    /// # Errors
    /// The kernel refuses to read or to remove.
    pub fn sweep(&self, now: Duration, is_gone: impl Fn(&Addr) -> bool) -> io::Result<usize> {
        let mut removed = 0;
        for table in &self.tables {
            for (key, flow) in Self::rows(table)? {
                let is_over = is_expired(&key, &flow, now)
                    || is_gone(&key.low.addr)
                    || is_gone(&key.high.addr);
                if !is_over {
                    continue;
                }
                match sys::delete(table.as_fd(), key.as_bytes()) {
                    Err(error) if error.raw_os_error() != Some(libc::ENOENT) => return Err(error),
                    _ => removed += 1,
                }
            }
        }
        Ok(removed)
    }

    fn rows(table: &OwnedFd) -> io::Result<impl Iterator<Item = (FlowKey, Flow)> + use<>> {
        let rows = read_all(
            table.as_fd(),
            size_of::<FlowKey>(),
            size_of::<Flow>(),
            |_| true,
        )?;
        Ok(rows.into_iter().filter_map(|(key, value)| {
            Some((
                FlowKey::read_from_bytes(&key).ok()?,
                Flow::read_from_bytes(&value).ok()?,
            ))
        }))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, AtomicU64};

    use super::*;

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
}
