//! The ring buffer of events, as a stream of raw records.

use std::io;

use aya::maps::{Map, MapData, RingBuf};
use tokio::io::unix::AsyncFd;
use tokio::sync::mpsc;

/// The reading end of `EVENTS`. There is one: records go to whoever reads first.
pub struct Ring(AsyncFd<RingBuf<MapData>>);

impl Ring {
    pub(super) fn new(map: Map) -> io::Result<Self> {
        let ring = RingBuf::try_from(map).map_err(io::Error::other)?;
        // SAFETY: the descriptor is the map's, which the ring owns and keeps open until it is dropped.
        let ring = unsafe { AsyncFd::register(ring) };
        Ok(Self(ring?))
    }

    /// Sends every record on, until the other end is gone. When that is full the record is lost and
    /// counted: counters in the kernel are exact, records are samples.
    ///
    /// # Errors
    /// The ring cannot be polled.
    pub async fn run(
        mut self,
        to: mpsc::Sender<Vec<u8>>,
        mut lost: impl FnMut(),
    ) -> io::Result<()> {
        loop {
            let mut ready = self.0.readable_mut().await?;
            let ring = ready.get_inner_mut();
            while let Some(record) = ring.next() {
                match to.try_send(record.to_vec()) {
                    Ok(()) => {}
                    Err(mpsc::error::TrySendError::Full(_)) => lost(),
                    Err(mpsc::error::TrySendError::Closed(_)) => return Ok(()),
                }
            }
            ready.clear_ready();
        }
    }
}
