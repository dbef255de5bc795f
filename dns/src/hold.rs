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
    // Whether the process that they are from is there.
    let mut is_read = false;
    let mut offered: Option<Offer> = None;
    loop {
        // Whoever reads has the sockets that count: others, if we held any, are closed here, since the
        // kernel would still give them a part of the questions.
        if !is_read
            && let Some(inherited) = folder.take_except(address, offered.as_ref())
            && inherited.giver == Giver::Reads
        {
            held = Some(inherited);
            is_read = true;
        }
        let turn = match (&mut held, &offered) {
            (None, _) => {
                thread::sleep(PAUSE);
                Ok(())
            }
            // While that process still reads: the next one may look as soon as it is dead, and before we are told.
            (Some(_), None) => folder.offer(address).map(|it| offered = Some(it)),
            (Some(inherited), Some(offer)) => wait(offer, inherited, &mut is_read),
        };
        if let Err(error) = turn {
            warn!(%address, %error, "sockets not passed on");
            thread::sleep(PAUSE);
        }
    }
}

/// Waits for the next process, to which it gives the sockets (it prefers those of one that reads), for the end of the one that reads,
/// and if none does, only until it is time to look around again.
fn wait(offer: &Offer, inherited: &mut Inherited, is_read: &mut bool) -> io::Result<()> {
    let listener = offer.listener();
    let mut waiting = [
        PollFd::new(listener, PollFlags::IN),
        PollFd::new(&inherited.link, PollFlags::IN),
    ];
    // The end of a link that has ended would be told again and again.
    let (waiting, patience) = match is_read {
        true => (&mut waiting[..], None),
        false => (&mut waiting[..1], Some(&PAUSE_SPEC)),
    };
    match poll(waiting, patience) {
        Ok(0) | Err(Errno::INTR) => return Ok(()),
        Ok(_) => {}
        Err(error) => return Err(error.into()),
    }
    let is_ready = |at: usize| waiting.get(at).is_some_and(|it| !it.revents().is_empty());
    let (is_asked, is_told) = (is_ready(0), is_ready(1));
    if is_told {
        *is_read = !has_ended(&mut inherited.link);
    }
    if is_asked {
        let (next, _) = listener.accept()?;
        let (udp, tcp) = (inherited.udp.as_fd(), inherited.tcp.as_fd());
        give(&next, Giver::Holds, udp, tcp)?;
    }
    Ok(())
}

/// Whether the process at the other end is gone; to be asked when there is something to read. It says nothing to a holder.
fn has_ended(link: &mut UnixStream) -> bool {
    match link.read(&mut [0]) {
        Ok(1..) => false,
        Err(error) => error.kind() != io::ErrorKind::Interrupted,
        Ok(0) => true,
    }
}
