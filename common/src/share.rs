//! What one pod of this node holds of the tables that all of its pods share.

use zerocopy::{FromBytes, IntoBytes, KnownLayout};

use crate::limits;
use crate::shared::AtomicU64;

/// Value of `SHARES`, in the row that [`row`] says. Each of the two times is a bucket that leaks (the generic cell rate
/// algorithm of ITU-T I.371): when it will be empty, in monotonic nanoseconds.
#[derive(Debug, Default, FromBytes, IntoBytes, KnownLayout)]
#[repr(C)]
pub struct Share {
    /// Conversations that the pod has opened, less those of TCP that were answered: they then have rows.
    pub openings: AtomicU64,
    /// Conversations other than TCP that were given ways.
    pub streams: AtomicU64,
    /// Rows of `TCP_WAYS` that stand for connections that the pod has opened.
    pub rows: AtomicU64,
    /// Packets dropped since the pod had used up its share.
    pub refused: AtomicU64,
}

/// The row of the pod behind an interface index. Two pods whose numbers are a multiple of [`limits::SHARES`] apart have
/// one share together; a kernel counts interface indexes up, so it takes as many pods between the two.
#[inline(always)]
pub const fn row(ifindex: u32) -> u32 {
    ifindex % limits::SHARES
}

const _: () = assert!(size_of::<Share>() == 32);
