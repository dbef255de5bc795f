//! Sockets of a weir-dns up to 0.1.0, which offered them in the abstract namespace to whoever had its uid. We take
//! them there, so that an update from such a version loses nothing, and offer none.

use std::io::{self, ErrorKind};
use std::net::SocketAddr;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr as UnixAddr, UnixStream};

use nix::sys::socket::getsockopt;
use nix::sys::socket::sockopt::PeerCredentials;
use tracing::warn;

use super::{Giver, Inherited, accept_from, refused};

/// The names that such a version tried.
const PLACES: u32 = 8;

/// The sockets of one that runs as root or as one of these users.
pub(super) fn take(address: SocketAddr, users: &[u32]) -> Option<Inherited> {
    if cfg!(feature = "broken-close-first") || address.port() == 0 {
        return None;
    }
    let mut holder = None;
    for place in 0..PLACES {
        match take_from(address, place, users) {
            Ok(inherited) if inherited.giver == Giver::Reads => return Some(inherited),
            Ok(inherited) => holder = holder.or(Some(inherited)),
            // Nobody is at this place.
            Err(error) if error.kind() == ErrorKind::ConnectionRefused => {}
            Err(error) => warn!(%address, place, %error, "an earlier version's sockets not taken"),
        }
    }
    holder
}

fn take_from(address: SocketAddr, place: u32, users: &[u32]) -> io::Result<Inherited> {
    let name = UnixAddr::from_abstract_name(format!("weir-dns/{address}/{place}"))?;
    let link = UnixStream::connect_addr(&name)?;
    // Not by rustix: a process of another PID namespace has the pid 0 here, which its type cannot say, and what
    // comes out is an error (1.1.6).
    let owner = getsockopt(&link, PeerCredentials)?.uid();
    match owner == 0 || users.contains(&owner) {
        true => accept_from(link, address),
        false => Err(refused(format!("they are offered by user {owner}"))),
    }
}
