//! A pod's share of the tables that all pods of a node have together: what it opens too much is dropped, before it costs
//! anybody else a row.

use core::sync::atomic::Ordering::Relaxed;

use weir_common::Protocol;
use weir_common::limits::{
    POD_OPENINGS, POD_OPENINGS_PER_SECOND, POD_STREAMS, POD_TCP_WAYS, STREAM_SECONDS,
};
use weir_common::share::Share;
use weir_common::shared::AtomicU64;

use crate::tables::Tables;

const SECOND: u64 = 1_000_000_000;

/// What one of them costs, in nanoseconds, and how many nanoseconds a full bucket holds.
const OPENING: u64 = SECOND / POD_OPENINGS_PER_SECOND as u64;
const OPENINGS: u64 = OPENING * POD_OPENINGS as u64;
const STREAM: u64 = STREAM_SECONDS as u64 * SECOND / POD_STREAMS as u64;
const STREAMS: u64 = STREAM * POD_STREAMS as u64;

/// How much more than full a bucket can be said to be, before what it says is taken for nothing: what was counted off and
/// never on is far beyond.
const AT_MOST: u64 = 2;

/// May a pod open another conversation?
#[inline(always)]
pub fn may_open(share: &Share, protocol: Protocol, now: u64) -> bool {
    // A moment below zero is possible, since a row may be counted off before it was counted.
    let rows = share.rows.load(Relaxed) as i64;
    has_room(&share.openings, OPENINGS, now)
        && (protocol != Protocol::TCP || rows < POD_TCP_WAYS as i64)
}

/// Notes that it has.
#[inline(always)]
pub fn open(share: &Share, now: u64) {
    pour(&share.openings, OPENING, OPENINGS, now);
}

/// Notes that a connection was answered: who answers is not flooded.
#[inline(always)]
pub fn close(share: &Share) {
    share.openings.fetch_add(OPENING.wrapping_neg(), Relaxed);
}

/// Takes room for the ways of a conversation other than TCP. False if there is none left.
#[inline(always)]
pub fn stream(share: &Share, now: u64) -> bool {
    let has_room = has_room(&share.streams, STREAMS, now);
    if has_room {
        pour(&share.streams, STREAM, STREAMS, now);
    }
    has_room
}

/// Counts a row of a pod's connections, or, backwards, that it is gone.
#[inline(always)]
pub(crate) fn count<T: Tables + ?Sized>(tables: &T, owner: u32, rows: i64) {
    if owner != 0
        && let Some(share) = tables.share(owner)
    {
        share.rows.fetch_add(rows as u64, Relaxed);
    }
}

#[inline(always)]
fn has_room(bucket: &AtomicU64, size: u64, now: u64) -> bool {
    let level = bucket.load(Relaxed).saturating_sub(now);
    level < size || level > AT_MOST * size
}

/// Two CPUs that find a bucket empty in the same moment may count one for both.
#[inline(always)]
fn pour(bucket: &AtomicU64, cost: u64, size: u64, now: u64) {
    let until = bucket.load(Relaxed);
    if until < now || until - now > AT_MOST * size {
        bucket.store(now, Relaxed);
    }
    bucket.fetch_add(cost, Relaxed);
}
