//! Whose turn it is to read an address's sockets when several processes have them. The newest that
//! knows the zone reads; the others keep the sockets and wait, and read again should it end.

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream as StdUnixStream;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::{UnixListener, UnixStream};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use crate::feed::SharedZone;
use crate::hand_over::{self, Folder, Giver, Offer, gone, hear_reading, say_reading};
use crate::listen::Origin;

/// Processes that have our sockets at once.
const MAX_OTHERS: usize = 8;
/// Between two tries to offer them.
const OFFER_PAUSE: Duration = Duration::from_millis(500);

/// Who reads the sockets, as far as this process knows.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
struct Reader {
    before: Before,
    /// Newer processes that read.
    newer: usize,
    /// Newer processes that have the sockets, read or not. Our parent, which ends when we do, is none of them.
    others: usize,
    /// They are set aside: nobody else gets them any more.
    aside: bool,
}

/// The process that the sockets come from.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Before {
    /// It reads, until we can.
    Reads,
    /// We have told it that we read, and it has the sockets still.
    Waits,
    /// There is none, or it is gone.
    Past,
}

/// Whether another process may have the sockets too.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Sockets {
    /// Nobody has them but the parent that starts us again when we are killed: when we end, it does.
    Own,
    Shared,
}

impl Reader {
    fn is_us(&self) -> bool {
        self.before != Before::Reads && self.newer == 0
    }

    fn sockets(&self) -> Sockets {
        match (self.before, self.others) {
            (Before::Past, 0) => Sockets::Own,
            _ => Sockets::Shared,
        }
    }
}

/// The turn of one address. Clones share it.
#[derive(Clone, Debug)]
pub struct Turn(Arc<watch::Sender<Reader>>);

impl Turn {
    /// Ours at once, unless another process reads.
    pub fn new(origin: &Origin) -> Self {
        let before = match origin {
            // Who only holds them is a parent: ours, most often. It may be another's, which starts its program again:
            // that one reads the same sockets, and looks itself whether we have set them aside (`server::udp`).
            Origin::Opened | Origin::Holder => Before::Past,
            Origin::Reader(_) => Before::Reads,
        };
        let reader = Reader {
            before,
            newer: 0,
            others: 0,
            aside: false,
        };
        Self(Arc::new(watch::Sender::new(reader)))
    }

    /// To wait for changes with.
    pub fn watch(&self) -> Watch {
        Watch(self.0.subscribe())
    }

    /// Whether another process may have the sockets. If none has, none gets them from here on.
    pub fn end(&self) -> Sockets {
        let mut sockets = Sockets::Shared;
        self.0.send_modify(|reader| {
            sockets = reader.sockets();
            reader.aside = sockets == Sockets::Own;
        });
        sockets
    }

    /// One more has the sockets; false if they are set aside.
    fn lend(&self) -> bool {
        self.0.send_if_modified(|reader| {
            reader.others += usize::from(!reader.aside);
            !reader.aside
        })
    }

    fn take_back(&self) {
        self.change(|reader| reader.others -= 1);
    }

    fn change(&self, change: impl FnOnce(&mut Reader)) {
        self.0.send_modify(change);
    }
}

/// Waits for the turn to change.
#[derive(Debug)]
pub struct Watch(watch::Receiver<Reader>);

impl Watch {
    /// Waits until we are to read.
    pub async fn ours(&mut self) {
        self.until(Reader::is_us).await;
    }

    /// Waits until another process reads.
    pub async fn theirs(&mut self) {
        self.until(|reader| !reader.is_us()).await;
    }

    /// Whether we are to read.
    pub fn is_ours(&self) -> bool {
        self.0.borrow().is_us()
    }

    async fn until(&mut self, is_so: impl Fn(&Reader) -> bool) {
        let closed = self.0.wait_for(is_so).await.is_err();
        if closed {
            // Nobody is left to change it.
            std::future::pending::<()>().await;
        }
    }
}

/// What it takes to follow the turns of one address.
#[derive(Debug)]
pub struct Turns {
    pub address: SocketAddr,
    /// Copies to give away.
    pub udp: OwnedFd,
    pub tcp: OwnedFd,
    pub folder: Folder,
    /// The pid of the parent that keeps us running.
    pub keeper: Option<i32>,
    pub zone: SharedZone,
    pub turn: Turn,
}

impl Turns {
    /// Takes the turn from the process before, if there is one, and gives it to later ones, until
    /// `shutdown`. Then others hear that we read no more.
    pub async fn follow(self, origin: Origin, shutdown: CancellationToken) {
        let follow = async {
            let before = match origin {
                Origin::Opened | Origin::Holder => None,
                Origin::Reader(before) => self.succeed(before).await,
            };
            let offered = async {
                let (_offer, listener) = self.offer().await;
                self.give_away(listener).await;
            };
            tokio::join!(self.outlive(before), offered);
        };
        tokio::select! {
            () = shutdown.cancelled() => {}
            () = follow => {}
        }
    }

    /// As soon as there is a folder: an agent that starts after us makes it.
    async fn offer(&self) -> (Offer, UnixListener) {
        let open = || -> io::Result<_> {
            let offer = self.folder.offer(self.address)?;
            let listener = offer.listener().try_clone()?;
            listener.set_nonblocking(true)?;
            Ok((offer, UnixListener::from_std(listener)?))
        };
        let mut is_told = false;
        loop {
            match open() {
                Ok(open) => return open,
                Err(error) if !is_told => {
                    let (address, folder) = (self.address, &self.folder);
                    warn!(%address, ?folder, %error, "sockets cannot be handed over yet: an update may lose questions");
                    is_told = true;
                }
                Err(_) => {}
            }
            tokio::time::sleep(OFFER_PAUSE).await;
        }
    }

    async fn succeed(&self, before: StdUnixStream) -> Option<UnixStream> {
        let address = self.address;
        info!(%address, "another process answers and shares its sockets");
        let watched = before.set_nonblocking(true);
        let mut is_watched = true;
        let mut before = match watched.and_then(|()| UnixStream::from_std(before)) {
            Ok(before) => Some(before),
            Err(error) => {
                warn!(%address, %error, "the process before cannot be watched");
                is_watched = false;
                None
            }
        };
        if let Some(stream) = &mut before {
            tokio::select! {
                biased;
                () = self.zone.known() => {}
                () = gone(stream) => {
                    warn!(%address, "the process before is gone, the zone is not here yet");
                    before = None;
                }
            }
        }
        let state = match before {
            None if is_watched => Before::Past,
            _ => Before::Waits,
        };
        self.turn.change(|reader| reader.before = state);
        if let Some(stream) = &mut before
            && let Err(error) = say_reading(stream).await
        {
            debug!(%address, %error, "the process before is gone");
        }
        info!(%address, "answering");
        before
    }

    /// Waits for the end of the process before. The connection is open as long as we live, so that it goes on if we
    /// die.
    async fn outlive(&self, before: Option<UnixStream>) {
        if let Some(mut before) = before {
            gone(&mut before).await;
            self.turn.change(|reader| reader.before = Before::Past);
        }
    }

    /// A process of another container has no pid here, and zero is nobody's.
    fn is_keeper(&self, next: &UnixStream) -> bool {
        let pid = next.peer_cred().ok().and_then(|it| it.pid());
        pid.is_some_and(|pid| pid > 0 && self.keeper == Some(pid))
    }

    async fn give_away(&self, listener: UnixListener) {
        let mut others = JoinSet::new();
        loop {
            let next = match listener.accept().await {
                Ok((next, _)) => next,
                Err(error) => {
                    warn!(%error, "hand-over not accepted");
                    // Out of descriptors, most likely: asking again at once would spin.
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            };
            while others.try_join_next().is_some() {}
            if others.len() >= MAX_OTHERS {
                warn!("hand-over refused: too many processes");
                continue;
            }
            let is_other = !self.is_keeper(&next);
            // First, since nothing may be done to them any more that others would feel.
            if is_other && !self.turn.lend() {
                continue;
            }
            let (udp, tcp) = (self.udp.as_fd(), self.tcp.as_fd());
            if let Err(error) = hand_over::give(&next, Giver::Reads, udp, tcp) {
                if is_other {
                    self.turn.take_back();
                }
                warn!(address = %self.address, %error, "sockets not handed over");
                continue;
            }
            let (address, turn) = (self.address, self.turn.clone());
            others.spawn(async move {
                watch_next(next, address, turn.clone()).await;
                if is_other {
                    turn.take_back();
                }
            });
        }
    }
}

/// Follows one newer process until it is gone.
async fn watch_next(mut next: UnixStream, address: SocketAddr, turn: Turn) {
    info!(%address, "another process has our sockets");
    if hear_reading(&mut next).await.is_err() {
        info!(%address, "it is gone and never answered");
        return;
    }
    info!(%address, "it answers from here on");
    turn.change(|reader| reader.newer += 1);
    gone(&mut next).await;
    turn.change(|reader| reader.newer -= 1);
    info!(%address, "it is gone");
}
