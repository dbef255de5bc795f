//! Datagrams: cluster names are answered where they are read; questions for upstream get a task.

use std::sync::Arc;
use std::time::Duration;

use rustix::net::connect_unspec;
use tokio::net::UdpSocket;
use tokio::time::{Instant, MissedTickBehavior};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{debug, warn};

use crate::metrics::{Text, Transport};
use crate::resolve::{Fate, Origin, Resolve};
use crate::turn::{Sockets, Turn};
use crate::upstream::BUDGET;

/// A question is far smaller; what is cut off here is malformed.
const MAX_QUESTION: usize = 4096;
/// Answers between two chances for other tasks.
const BURST: usize = 64;
/// A socket set aside is empty when nothing came for so long: what the kernel was delivering while
/// we set it aside takes microseconds, and tokio hears of it at its next turn.
const QUIET: Duration = Duration::from_millis(50);
/// How often a reader looks whether somebody who had the same socket has set it aside when he ended.
const LOOK: Duration = Duration::from_secs(2);
/// How long a socket that was set aside is emptied at the most. Questions read at its end still have their time.
const EMPTYING: Duration = Duration::from_secs(1);
const _: () = assert!(EMPTYING.as_millis() + BUDGET.as_millis() < super::DRAIN.as_millis());

pub(super) async fn serve(
    socket: Arc<UdpSocket>,
    server: Text,
    resolve: Arc<Resolve>,
    tasks: TaskTracker,
    turn: Turn,
    shutdown: CancellationToken,
) {
    let mut buffer = [0; MAX_QUESTION];
    let mut watch = turn.watch();
    let mut look = tokio::time::interval(LOOK);
    look.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            biased;
            () = shutdown.cancelled() => break,
            () = watch.ours() => {}
        }
        tokio::select! {
            biased;
            () = shutdown.cancelled() => break,
            () = watch.theirs() => continue,
            _ = look.tick() => {
                take_up_again(&socket);
                continue;
            }
            ready = socket.readable() => if let Err(error) = ready {
                warn!(%error, "UDP socket cannot be watched");
                tokio::time::sleep(Duration::from_millis(100)).await;
            },
        }
        for _ in 0..BURST {
            if !receive(&socket, &mut buffer, &server, &resolve, &tasks).await {
                break;
            }
        }
    }
    if cfg!(feature = "broken-close-first") || !watch.is_ours() {
        return;
    }
    if turn.end() == Sockets::Shared {
        // Others go on with the socket, and with what comes after this.
        for _ in 0..BURST {
            if !receive(&socket, &mut buffer, &server, &resolve, &tasks).await {
                return;
            }
        }
        return;
    }
    // Nobody took it over, but somebody may listen beside us (an older version, say).
    // A connected socket gets nothing from others: from here on the kernel gives every new question
    // to whoever else listens. What it gave us already is still answered.
    let aside = socket.local_addr();
    if let Ok(aside) = aside
        && !aside.ip().is_unspecified()
        && let Err(error) = socket.connect(aside).await
    {
        debug!(%error, "UDP socket not set aside");
    }
    // Somebody who had the socket too may take it up again meanwhile: then it is never quiet.
    let end = Instant::now() + EMPTYING;
    while Instant::now() < end
        && let Ok(Ok(())) = tokio::time::timeout(QUIET, socket.readable()).await
    {
        for _ in 0..BURST {
            if !receive(&socket, &mut buffer, &server, &resolve, &tasks).await {
                break;
            }
        }
    }
}

/// Undoes what another process has done that did not know of us: both had the socket from a parent that only held it.
fn take_up_again(socket: &UdpSocket) {
    if socket.peer_addr().is_err() {
        return;
    }
    match connect_unspec(socket) {
        Ok(()) => warn!("the UDP socket had been set aside by another process"),
        Err(error) => warn!(%error, "the UDP socket is set aside, and stays so"),
    }
}

/// Reads a question and answers it. False if none is there.
async fn receive(
    socket: &Arc<UdpSocket>,
    buffer: &mut [u8],
    server: &Text,
    resolve: &Arc<Resolve>,
    tasks: &TaskTracker,
) -> bool {
    let (length, client) = match socket.try_recv_from(buffer) {
        Ok(received) => received,
        Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => return false,
        Err(error) => {
            // An ICMP error about an earlier answer: it says nothing about the next question.
            debug!(%error, "UDP receive");
            return true;
        }
    };
    if client.port() == 0 {
        return true;
    }
    let origin = Origin {
        server: server.clone(),
        transport: Transport::Udp,
        client,
    };
    let question = buffer.get(..length).unwrap_or_default();
    match resolve.receive(question, &origin) {
        Fate::Nothing => {}
        Fate::Reply(response) => send(socket, &response, client).await,
        later => {
            let (socket, resolve) = (socket.clone(), resolve.clone());
            tasks.spawn(async move {
                if let Some(response) = resolve.settle(later).await {
                    send(&socket, &response, client).await;
                }
            });
        }
    }
    true
}

async fn send(socket: &UdpSocket, response: &[u8], client: std::net::SocketAddr) {
    if let Err(error) = socket.send_to(response, client).await {
        debug!(%client, %error, "answer not sent");
    }
}
