//! One process gives its sockets to the next on the same host, so that an update loses no question.
//! Here are the two ends of the unix socket between them; who reads when is in `turn`.
//!
//! The next process gets the *same* sockets, not others beside them: what waits in the queue of a UDP
//! socket or of a TCP listener is closed with the last process that has it, so whoever ends takes
//! nothing along. (Why not steer with SO_REUSEPORT: decision 13.)
//!
//! They meet in a folder of the host that the agent makes and only root and weir-dns's group may enter. A process
//! on the host's network that happens to have weir-dns's uid does not see it: being in there is what counts.

mod earlier;

use std::fs;
use std::io::{self, ErrorKind, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use rustix::process::geteuid;
use socket2::{Socket, Type};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tracing::{debug, warn};

/// Where the agent makes the folder, beside the zone's socket, unless it is told of another place.
pub const FOLDER: &str = "/run/weir-dns/handover";
/// The name of the folder, in that of the zone's socket.
pub const FOLDER_NAME: &str = "handover";
/// What its owner, root, and its group, weir-dns's, may do there: everything. Nobody else anything.
pub const FOLDER_MODE: u32 = 0o770;

/// How long a process that offers its sockets may take to say so. One that is stopped never does.
const PATIENCE: Duration = Duration::from_secs(1);
/// Beside the sockets: who gives them. Another meaning needs another byte.
const FROM_READER: u8 = 1;
const FROM_HOLDER: u8 = 2;
/// What the next process says when it reads the sockets.
const READING: u8 = b'r';

/// Sockets that another process has too.
#[derive(Debug)]
pub struct Inherited {
    pub udp: UdpSocket,
    pub tcp: TcpListener,
    pub giver: Giver,
    /// Open until that process ends.
    pub link: UnixStream,
}

/// What a process that gives sockets away does with them.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Giver {
    /// It answers.
    Reads,
    /// It only keeps them open: `hold`.
    Holds,
}

/// Where processes of weir-dns on one host find each other.
#[derive(Clone, Debug)]
pub struct Folder(PathBuf);

/// Sockets are to be had here, until it is dropped.
#[derive(Debug)]
pub struct Offer {
    listener: UnixListener,
    path: PathBuf,
}

impl Offer {
    /// Where the next process asks.
    pub fn listener(&self) -> &UnixListener {
        &self.listener
    }
}

impl Drop for Offer {
    fn drop(&mut self) {
        // Of one that is killed somebody else does it.
        if let Err(error) = fs::remove_file(&self.path) {
            debug!(path = %self.path.display(), %error, "a name in the hand-over folder stays");
        }
    }
}

impl Folder {
    /// The folder at this path, which may not be there yet.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self(path.into())
    }

    /// The sockets on `address` of a process that answers there, or else of one that holds them; `None` if
    /// nobody offers any.
    pub fn take(&self, address: SocketAddr) -> Option<Inherited> {
        self.take_except(address, None)
    }

    /// As [`Folder::take`], from everybody but the one of this offer: ourselves.
    pub fn take_except(&self, address: SocketAddr, own: Option<&Offer>) -> Option<Inherited> {
        if cfg!(feature = "broken-close-first") || address.port() == 0 {
            return None;
        }
        let offers = match self.offers(address) {
            Ok(offers) => offers,
            Err(error) if error.kind() == ErrorKind::NotFound => return None,
            Err(error) => {
                warn!(folder = %self.0.display(), %error, "nobody's sockets can be taken over");
                return None;
            }
        };
        let mut holder = None;
        for path in offers {
            if own.is_some_and(|own| own.path == path) {
                continue;
            }
            match UnixStream::connect(&path).and_then(|link| accept_from(link, address)) {
                Ok(inherited) if inherited.giver == Giver::Reads => return Some(inherited),
                Ok(inherited) => holder = holder.or(Some(inherited)),
                // Its process was killed. Nobody listens at a name before it has it.
                Err(error) if error.kind() == ErrorKind::ConnectionRefused => forget(&path),
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                Err(error) => warn!(%address, path = %path.display(), %error, "sockets not taken"),
            }
        }
        holder
    }

    /// As [`Folder::take`], and else from a version that had no folder: it must run as one of these users.
    pub fn take_from_any(&self, address: SocketAddr, users: &[u32]) -> Option<Inherited> {
        self.take(address).or_else(|| earlier::take(address, users))
    }

    /// Opens a place where the next process finds us.
    ///
    /// # Errors
    /// The folder is not there, not ours, or open to others.
    pub fn offer(&self, address: SocketAddr) -> io::Result<Offer> {
        self.check()?;
        let unique = format!("{}.{:016x}", prefix(address), fastrand::u64(..));
        let (hidden, path) = (self.0.join(format!(".{unique}")), self.0.join(unique));
        // So that a name without a listener is always that of a process that is gone.
        let listener = UnixListener::bind(&hidden)?;
        // The folder decides who may come: also a weir-dns that has another uid from now on.
        fs::set_permissions(&hidden, fs::Permissions::from_mode(0o666))?;
        fs::rename(&hidden, &path)?;
        Ok(Offer { listener, path })
    }

    fn offers(&self, address: SocketAddr) -> io::Result<Vec<PathBuf>> {
        self.check()?;
        let prefix = format!("{}.", prefix(address));
        let mut offers = Vec::new();
        for entry in fs::read_dir(&self.0)? {
            let entry = entry?;
            if entry.file_name().to_string_lossy().starts_with(&prefix) {
                offers.push(entry.path());
            }
        }
        Ok(offers)
    }

    /// Who may enter the folder may have the sockets, so it must not be open to everybody.
    fn check(&self) -> io::Result<()> {
        let folder = fs::symlink_metadata(&self.0)?;
        let is_ours = folder.uid() == 0 || folder.uid() == geteuid().as_raw();
        match folder.is_dir() && is_ours && folder.mode() & 0o007 == 0 {
            true => Ok(()),
            false => Err(refused(format!(
                "it must be a folder of root's that others may not enter (mode {:o})",
                FOLDER_MODE
            ))),
        }
    }
}

fn prefix(address: SocketAddr) -> String {
    format!("{address}")
}

fn forget(path: &Path) {
    if let Err(error) = fs::remove_file(path) {
        debug!(path = %path.display(), %error, "a stale name in the hand-over folder stays");
    }
}

/// Takes the sockets that somebody gives over a connection.
fn accept_from(link: UnixStream, address: SocketAddr) -> io::Result<Inherited> {
    link.set_read_timeout(Some(PATIENCE))?;
    let (giver, udp, tcp) = receive(&link)?;
    let (udp, tcp) = (Socket::from(udp), Socket::from(tcp));
    let is_on = |socket: &Socket| {
        let local = socket.local_addr().ok().and_then(|it| it.as_socket());
        local == Some(address)
    };
    if !is_on(&udp) || udp.r#type()? != Type::DGRAM || udp.peer_addr().is_ok() {
        return Err(refused("the first is no UDP socket of that address"));
    }
    if !is_on(&tcp) || tcp.r#type()? != Type::STREAM || !tcp.is_listener()? {
        return Err(refused("the second is no TCP listener of that address"));
    }
    link.set_read_timeout(None)?;
    Ok(Inherited {
        udp: udp.into(),
        tcp: tcp.into(),
        giver,
        link,
    })
}

/// Gives sockets to a process that asked.
pub fn give(
    next: impl AsFd,
    giver: Giver,
    udp: BorrowedFd<'_>,
    tcp: BorrowedFd<'_>,
) -> io::Result<()> {
    let giver = match giver {
        Giver::Reads => FROM_READER,
        Giver::Holds => FROM_HOLDER,
    };
    let sockets = [udp, tcp];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
    let mut message = SendAncillaryBuffer::new(&mut space);
    if !message.push(SendAncillaryMessage::ScmRights(&sockets)) {
        return Err(io::Error::from(ErrorKind::OutOfMemory));
    }
    // One byte into an empty socket: it never waits.
    sendmsg(
        next,
        &[IoSlice::new(&[giver])],
        &mut message,
        SendFlags::NOSIGNAL,
    )?;
    Ok(())
}

/// Tells the process before us that we read.
pub async fn say_reading(before: &mut tokio::net::UnixStream) -> io::Result<()> {
    before.write_all(&[READING]).await
}

/// Waits until the next process reads; an error if it ended without.
pub async fn hear_reading(next: &mut tokio::net::UnixStream) -> io::Result<()> {
    match next.read_u8().await? {
        READING => Ok(()),
        _ => Err(io::Error::from(ErrorKind::InvalidData)),
    }
}

/// Waits until the process at the other end is gone.
pub async fn gone(other: &mut tokio::net::UnixStream) {
    let mut byte = [0];
    while matches!(other.read(&mut byte).await, Ok(1..)) {}
}

fn receive(link: &UnixStream) -> io::Result<(Giver, OwnedFd, OwnedFd)> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
    let mut message = RecvAncillaryBuffer::new(&mut space);
    let mut giver = [0];
    let received = recvmsg(
        link,
        &mut [IoSliceMut::new(&mut giver)],
        &mut message,
        RecvFlags::CMSG_CLOEXEC,
    )?;
    if received.bytes == 0 {
        return Err(io::Error::from(ErrorKind::UnexpectedEof));
    }
    let giver = match giver {
        [FROM_READER] => Giver::Reads,
        [FROM_HOLDER] => Giver::Holds,
        other => return Err(refused(format!("a giver of an unknown kind, {other:?}"))),
    };
    let mut sockets = message.drain().filter_map(|part| match part {
        RecvAncillaryMessage::ScmRights(sockets) => Some(sockets),
        _ => None,
    });
    let mut sockets = sockets.next().into_iter().flatten();
    match (sockets.next(), sockets.next()) {
        (Some(udp), Some(tcp)) => Ok((giver, udp, tcp)),
        _ => Err(refused("without sockets")),
    }
}

fn refused(why: impl Into<String>) -> io::Error {
    io::Error::new(ErrorKind::PermissionDenied, why.into())
}
