//! Questions over UDP and TCP. hickory-server is not used: it has no bound on connections or tasks,
//! and drops the answers under way when it is told to end.

mod tcp;
mod udp;

use std::io;
use std::sync::Arc;
use std::time::Duration;

use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{info, warn};

use crate::hand_over::Folder;
use crate::listen::Listener;
use crate::metrics::Text;
use crate::resolve::Resolve;
use crate::turn::{Turn, Turns};

/// How long questions under way may take once we are told to end: a whole upstream budget, and some.
const DRAIN: Duration = Duration::from_secs(3);

/// Who answers, on every listener.
#[derive(Debug)]
pub struct Server {
    tasks: TaskTracker,
    shutdown: CancellationToken,
}

impl Server {
    /// Begins to answer on every listener, until `shutdown`, and to offer its sockets in `folder` to the
    /// next process. `keeper` is the pid of the parent that keeps this process running, if one does. When
    /// it returns, no listener is without its task.
    pub fn start(
        listeners: Vec<Listener>,
        folder: &Folder,
        keeper: Option<i32>,
        resolve: &Arc<Resolve>,
        shutdown: CancellationToken,
    ) -> io::Result<Self> {
        let tasks = TaskTracker::new();
        let connections = tcp::Connections::default();
        for listener in listeners {
            let Listener {
                address,
                udp,
                tcp,
                origin,
            } = listener;
            let server = Text::new(&format!("dns://{address}"));
            info!(%address, "listening");
            let turn = Turn::new(&origin);
            let turns = Turns {
                address,
                udp: udp.try_clone()?.into(),
                tcp: tcp.try_clone()?.into(),
                folder: folder.clone(),
                keeper,
                zone: resolve.zone.clone(),
                turn: turn.clone(),
            };
            tasks.spawn(turns.follow(origin, shutdown.clone()));
            let udp = Arc::new(tokio::net::UdpSocket::from_std(udp)?);
            tasks.spawn(udp::serve(
                udp,
                server.clone(),
                resolve.clone(),
                tasks.clone(),
                turn.clone(),
                shutdown.clone(),
            ));
            tasks.spawn(tcp::serve(
                tokio::net::TcpListener::from_std(tcp)?,
                server,
                resolve.clone(),
                connections.clone(),
                tasks.clone(),
                turn,
                shutdown.clone(),
            ));
        }
        Ok(Self { tasks, shutdown })
    }

    /// Waits for `shutdown`, then for what has begun.
    pub async fn finish(self) {
        self.shutdown.cancelled().await;
        self.tasks.close();
        if tokio::time::timeout(DRAIN, self.tasks.wait())
            .await
            .is_err()
        {
            let tasks = self.tasks.len();
            warn!(tasks, "ending with questions unanswered");
        }
    }
}
