//! The end of `weir-dns`: keeps a zone as the agent says it is. A new connection builds a new zone
//! beside the one that is served, and takes its place when it is whole. Without an agent the last
//! zone stays.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader};
use tokio::net::UnixStream;
use tracing::{info, warn};

use super::{Frame, MAX_LINE, SharedZone, VERSION};
use crate::zone::{Domain, Zone};

/// How long a feed may be silent: four keepalives.
const SILENCE: Duration = Duration::from_secs(20);
/// The first pause before another try; it doubles up to `MAX_PAUSE`, and half of it is chance. A try costs
/// next to nothing, and a server that has just started answers no name before one succeeds.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const MAX_PAUSE: Duration = Duration::from_millis(250);
/// The first failure in a row is logged, and this one.
const REMINDER: u32 = 100;

/// Keeps a zone up to date.
#[derive(Debug)]
pub struct Client {
    path: PathBuf,
    domain: Domain,
    /// Seconds.
    ttl: u32,
    zone: SharedZone,
}

/// Why a connection ended.
#[derive(Debug, thiserror::Error)]
enum FeedEnd {
    #[error("{0}")]
    Io(#[from] io::Error),
    #[error("the agent closed it")]
    Closed,
    #[error("silent for {} s", SILENCE.as_secs())]
    Silent,
    #[error("a line is longer than {MAX_LINE} bytes")]
    TooLong,
    #[error("a frame cannot be read: {0}")]
    Frame(#[from] serde_json::Error),
    #[error("the agent speaks version {0} of the feed, and we {VERSION}")]
    Version(u32),
    #[error("the agent's cluster domain is {agent}, and ours {ours}: make --domain agree")]
    Domain { agent: String, ours: String },
    #[error("a frame came out of order")]
    Order,
}

impl Client {
    /// Will connect to the agent's socket at `path`. `ttl` in seconds.
    pub fn new(path: PathBuf, domain: Domain, ttl: u32, zone: SharedZone) -> Self {
        Self {
            path,
            domain,
            ttl,
            zone,
        }
    }

    /// Follows the feed, for ever.
    pub async fn run(self) {
        let mut failures = 0u32;
        loop {
            let mut progress = Progress::Nothing;
            let end = match UnixStream::connect(&self.path).await {
                Ok(stream) => self.follow(stream, &mut progress).await,
                Err(error) => FeedEnd::Io(error),
            };
            failures = match progress {
                Progress::Synced => 1,
                Progress::Nothing => failures.saturating_add(1),
            };
            if failures == 1 || failures == REMINDER {
                let path = self.path.display();
                warn!(%path, reason = %end, failures, "no zone feed, serving what is known");
            }
            let pause = FIRST_PAUSE * 2u32.saturating_pow(failures.min(10) - 1);
            let pause = pause.min(MAX_PAUSE);
            tokio::time::sleep(pause.mul_f64(0.5 + fastrand::f64() / 2.0)).await;
        }
    }

    async fn follow(&self, stream: UnixStream, progress: &mut Progress) -> FeedEnd {
        let mut reader = BufReader::with_capacity(256 << 10, stream);
        let mut line = Vec::new();
        let mut growing: Option<Zone> = None;
        loop {
            let frame = match next_frame(&mut reader, &mut line).await {
                Ok(frame) => frame,
                Err(end) => return end,
            };
            if let Err(end) = self.take(frame, &mut growing, progress) {
                return end;
            }
            // Readers see a burst of changes at once, when its last line is in.
            if let (Progress::Synced, Some(zone)) = (&*progress, &growing)
                && !reader.buffer().contains(&b'\n')
            {
                self.zone.store(Some(Arc::new(zone.clone())));
            }
        }
    }

    fn take(
        &self,
        frame: Frame,
        growing: &mut Option<Zone>,
        progress: &mut Progress,
    ) -> Result<(), FeedEnd> {
        match (frame, growing) {
            (Frame::Begin { version, domain }, growing) => {
                if version != VERSION {
                    return Err(FeedEnd::Version(version));
                }
                if Domain::new(&domain).ok().as_ref() != Some(&self.domain) {
                    return Err(FeedEnd::Domain {
                        agent: domain,
                        ours: self.domain.name().to_string(),
                    });
                }
                *growing = Some(Zone::new(self.domain.clone(), self.ttl, now_serial()));
                *progress = Progress::Nothing;
            }
            (Frame::Keepalive, _) => {}
            (_, None) => return Err(FeedEnd::Order),
            (Frame::Upsert(service), Some(zone)) => zone.upsert(service),
            (Frame::Remove(name), Some(zone)) => zone.remove(&name),
            (Frame::Namespace(namespace), Some(zone)) => zone.announce(&namespace),
            (Frame::NamespaceGone(namespace), Some(zone)) => zone.retire(&namespace),
            (Frame::Synced, Some(zone)) => {
                info!(services = zone.len(), "zone synced");
                *progress = Progress::Synced;
            }
        }
        Ok(())
    }
}

/// How far a connection came.
enum Progress {
    Nothing,
    Synced,
}

async fn next_frame(
    reader: &mut BufReader<UnixStream>,
    line: &mut Vec<u8>,
) -> Result<Frame, FeedEnd> {
    line.clear();
    let mut limited = reader.take(MAX_LINE);
    let read = tokio::time::timeout(SILENCE, limited.read_until(b'\n', line))
        .await
        .map_err(|_| FeedEnd::Silent)??;
    if read == 0 {
        return Err(FeedEnd::Closed);
    }
    if line.last() != Some(&b'\n') {
        return Err(match read as u64 == MAX_LINE {
            true => FeedEnd::TooLong,
            false => FeedEnd::Closed,
        });
    }
    Ok(serde_json::from_slice(line)?)
}

/// Seconds since 1970 in 32 bits, as serials of zones often are: a new process does not go back.
fn now_serial() -> u32 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(1, |elapsed| (elapsed.as_secs() & 0xffff_ffff) as u32)
}
