//! An association of SCTP (RFC 9260) by the kernel's own sockets: serves one after the other, or opens one, says a word and hears it
//! again. For kernels that have SCTP.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::Parser;
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockProtocol, SockType, SockaddrStorage, bind, connect,
    listen, setsockopt, socket, sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike as _};

const WORD: &[u8] = b"associated";

#[derive(Debug, Parser)]
enum Task {
    /// Echoes what is said at an address and port, until it is ended.
    Serve { at: SocketAddr },
    /// Fails if there is no association, or no echo, within this many milliseconds each.
    Ask { target: SocketAddr, patience: u32 },
}

fn main() -> Result<()> {
    match Task::parse() {
        Task::Serve { at } => {
            let socket = open(&at)?;
            bind(socket.as_raw_fd(), &SockaddrStorage::from(at)).context("bind")?;
            listen(&socket, Backlog::new(8)?).context("listen")?;
            // Whatever the protocol, a stream is accepted in the same way.
            let listener = TcpListener::from(socket);
            loop {
                let (mut stream, _) = listener.accept()?;
                let mut word = [0; WORD.len()];
                // Whoever goes away half way is no reason to end.
                if stream.read_exact(&mut word).is_ok() {
                    stream.write_all(&word).ok();
                }
            }
        }
        Task::Ask { target, patience } => {
            let socket = open(&target)?;
            let patience = Duration::from_millis(patience.into());
            let patience = TimeVal::milliseconds(patience.as_millis().try_into()?);
            setsockopt(&socket, sockopt::SendTimeout, &patience)?;
            setsockopt(&socket, sockopt::ReceiveTimeout, &patience)?;
            connect(socket.as_raw_fd(), &SockaddrStorage::from(target))
                .context("no association")?;
            let mut stream = TcpStream::from(socket);
            stream.write_all(WORD).context("say")?;
            let mut word = [0; WORD.len()];
            stream.read_exact(&mut word).context("no echo")?;
            ensure!(word == WORD, "another echo");
            println!("associated");
            Ok(())
        }
    }
}

fn open(of: &SocketAddr) -> Result<OwnedFd> {
    let family = match of {
        SocketAddr::V4(_) => AddressFamily::Inet,
        SocketAddr::V6(_) => AddressFamily::Inet6,
    };
    let flags = SockFlag::SOCK_CLOEXEC;
    socket(family, SockType::Stream, flags, SockProtocol::Sctp).context("this kernel has no SCTP")
}
