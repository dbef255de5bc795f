//! Connections: one question after the other, each in a time, and only so many at once.

use std::collections::HashMap;
use std::io;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{debug, warn};

use crate::metrics::{Text, Transport};
use crate::resolve::{Origin, Resolve};
use crate::turn::Turn;

/// Of one client, and of all (CVE-2025-68151).
const MAX_PER_CLIENT: usize = 20;
const MAX_ALL: usize = 1024;
/// Without a question.
const IDLE: Duration = Duration::from_secs(10);
/// From a question's first byte to its last, and the same for the answer: a client that sends a byte
/// now and then holds nothing for long (CVE-2026-32934).
const EXCHANGE: Duration = Duration::from_secs(3);
/// A question is far smaller.
const MAX_QUESTION: usize = 4096;

/// The open connections, counted by client.
#[derive(Clone, Debug, Default)]
pub(super) struct Connections(Arc<Mutex<HashMap<IpAddr, usize>>>);

/// A place among the connections, given back when it is dropped.
struct Place {
    connections: Connections,
    client: IpAddr,
}

impl Connections {
    fn admit(&self, client: IpAddr) -> Option<Place> {
        let mut open = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if open.values().sum::<usize>() >= MAX_ALL {
            return None;
        }
        let count = open.entry(client).or_default();
        if *count >= MAX_PER_CLIENT {
            return None;
        }
        *count += 1;
        Some(Place {
            connections: self.clone(),
            client,
        })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let connections = &self.connections.0;
        let mut open = connections.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = open.get_mut(&self.client) {
            *count -= 1;
            if *count == 0 {
                open.remove(&self.client);
            }
        }
    }
}

pub(super) async fn serve(
    listener: TcpListener,
    server: Text,
    resolve: Arc<Resolve>,
    connections: Connections,
    tasks: TaskTracker,
    turn: Turn,
    shutdown: CancellationToken,
) {
    let mut watch = turn.watch();
    loop {
        tokio::select! {
            biased;
            () = watch.ours() => {}
            () = shutdown.cancelled() => return,
        }
        let accepted = tokio::select! {
            // Connections that are already waiting are taken before we end: they are closed with the
            // listener, if nobody else has it.
            biased;
            () = watch.theirs() => continue,
            accepted = listener.accept() => accepted,
            () = shutdown.cancelled() => return,
        };
        let (stream, client) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                warn!(%error, "connection not accepted");
                // Out of descriptors, most likely: asking again at once would spin.
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let Some(place) = connections.admit(client.ip()) else {
            resolve.metrics.connections_refused.inc();
            continue;
        };
        let origin = Origin {
            server: server.clone(),
            transport: Transport::Tcp,
            client,
        };
        let (resolve, shutdown) = (resolve.clone(), shutdown.clone());
        tasks.spawn(async move {
            if let Err(error) = converse(stream, &origin, &resolve, &shutdown).await {
                debug!(%client, %error, "connection ended");
            }
            drop(place);
        });
    }
}

async fn converse(
    mut stream: TcpStream,
    origin: &Origin,
    resolve: &Resolve,
    shutdown: &CancellationToken,
) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut ending = false;
    while !ending {
        let mut first = [0];
        let read = tokio::select! {
            biased;
            read = in_time(IDLE, stream.read(&mut first)) => read?,
            () = shutdown.cancelled() => {
                // One more look: a question may be on its way on a connection just taken.
                ending = true;
                in_time(Duration::from_millis(50), stream.read(&mut first)).await?
            }
        };
        if read == 0 {
            return Ok(());
        }
        let Some(question) = in_time(EXCHANGE, read_question(&mut stream, first[0])).await? else {
            return Ok(());
        };
        let fate = resolve.receive(&question, origin);
        let Some(response) = resolve.settle(fate).await else {
            return Ok(());
        };
        let Ok(length) = u16::try_from(response.len()) else {
            return Ok(());
        };
        let mut message = Vec::with_capacity(response.len() + 2);
        message.extend(length.to_be_bytes());
        message.extend(response);
        in_time(EXCHANGE, stream.write_all(&message)).await?;
    }
    Ok(())
}

/// The rest of a question whose length's first byte is here; `None` if it is too long.
async fn read_question(stream: &mut TcpStream, first: u8) -> io::Result<Option<Vec<u8>>> {
    let second = stream.read_u8().await?;
    let length = usize::from(u16::from_be_bytes([first, second]));
    if length > MAX_QUESTION {
        return Ok(None);
    }
    let mut question = vec![0; length];
    stream.read_exact(&mut question).await?;
    Ok(Some(question))
}

async fn in_time<T>(limit: Duration, work: impl Future<Output = io::Result<T>>) -> io::Result<T> {
    tokio::time::timeout(limit, work)
        .await
        .map_err(|_| io::Error::from(io::ErrorKind::TimedOut))?
}
