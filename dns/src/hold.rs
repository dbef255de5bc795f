//! Keeps the sockets of weir-dns open while it is dead, for a parent that starts it again: what is asked
//! meanwhile waits in them, and nobody is refused. The parent reads nothing.

use std::io::{self, Read};
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use tracing::warn;

use crate::hand_over::{Folder, Giver, Inherited, Offer, give};

/// Between two looks for a process that has sockets.
const PAUSE: Duration = Duration::from_millis(50);
/// The same, as the kernel wants it.
const PAUSE_SPEC: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 50_000_000,
};

/// Holds the sockets of these addresses from a thread for each, until this process ends.
///
/// # Errors
/// There can be no more threads.
pub fn hold(addresses: &[SocketAddr], folder: &Folder) -> io::Result<()> {
    for address in addresses.iter().copied() {
        let folder = folder.clone();
        thread::Builder::new()
            .name(format!("hold {address}"))
            .spawn(move || hold_one(address, &folder))?;
    }
    Ok(())
}

fn hold_one(address: SocketAddr, folder: &Folder) -> ! {
    let mut held: Option<Inherited> = None;
    let mut offered: Option<Offer> = None;
    loop {
        // Whoever reads has the sockets that count: others, if we held any, are closed here, since the
        // kernel would still give them a part of the questions.
        if let Some(inherited) = folder.take_except(address, offered.as_ref())
            && inherited.giver == Giver::Reads
        {
            offered = None;
            ended(&mut held.insert(inherited).link);
        }
        let turn = match (&held, &offered) {
            (None, _) => {
                thread::sleep(PAUSE);
                Ok(())
            }
            // At once: the next process may look already.
            (Some(_), None) => folder.offer(address).map(|it| offered = Some(it)),
            (Some(inherited), Some(offer)) => pass_on(offer, inherited),
        };
        if let Err(error) = turn {
            warn!(%address, %error, "sockets not passed on");
            thread::sleep(PAUSE);
        }
    }
}

/// Gives the sockets to the next process, if it comes before it is time to look around again.
fn pass_on(offer: &Offer, inherited: &Inherited) -> io::Result<()> {
    let listener = offer.listener();
    let mut waiting = [PollFd::new(listener, PollFlags::IN)];
    match poll(&mut waiting, Some(&PAUSE_SPEC)) {
        Ok(0) | Err(Errno::INTR) => return Ok(()),
        Ok(_) => {}
        Err(error) => return Err(error.into()),
    }
    let (next, _) = listener.accept()?;
    let (udp, tcp) = (inherited.udp.as_fd(), inherited.tcp.as_fd());
    give(&next, Giver::Holds, udp, tcp)
}

/// Waits until the process at the other end is gone. It says nothing to a holder.
fn ended(link: &mut UnixStream) {
    let mut byte = [0];
    loop {
        match link.read(&mut byte) {
            Ok(1..) => {}
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Ok(0) | Err(_) => return,
        }
    }
}
