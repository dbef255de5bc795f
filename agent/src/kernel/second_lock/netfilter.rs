//! A conversation with the kernel's nf_tables over netlink: requests out, what it says to them in. What is
//! said is not here.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use libc::{NLM_F_DUMP_INTR, NLMSG_DONE, NLMSG_ERROR};
use netlink_bindings::builtin::Nlmsghdr;
use netlink_bindings::nftables::{Chained, Nfgenmsg, OpGetgenDo};
use netlink_bindings::traits::NetlinkRequest;
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, sendto,
    socket,
};

/// More than the kernel puts into one answer (`NLMSG_GOODSIZE`).
const ANSWER: usize = 32 * 1024;
/// The number of the first request; the others count on.
const FIRST: u32 = 1;

/// Requests that go out together.
pub(super) fn requests() -> Chained<'static> {
    Chained::new(FIRST)
}

/// What stands before the attributes of a request that is about tables of this family.
pub(super) fn about(family: i32) -> Nfgenmsg {
    Nfgenmsg {
        // Families are numbers below 256.
        nfgen_family: family as u8,
        ..Nfgenmsg::default()
    }
}

/// An open socket.
#[derive(Debug)]
pub(super) struct Netfilter {
    socket: OwnedFd,
}

impl Netfilter {
    /// # Errors
    /// The kernel has no netfilter.
    pub(super) fn open() -> io::Result<Self> {
        let socket = socket(
            AddressFamily::Netlink,
            SockType::Raw,
            SockFlag::SOCK_CLOEXEC,
            SockProtocol::NetlinkNetFilter,
        )?;
        bind(socket.as_raw_fd(), &NetlinkAddr::new(0, 0))?;
        Ok(Self { socket })
    }

    /// Sends the requests and returns the answers, without their headers. The kernel answers within the
    /// call that asks, so this never waits.
    ///
    /// # Errors
    /// One of the requests was refused (then a transaction has changed nothing), or not answered; `EINTR` if
    /// what is listed was changed meanwhile.
    pub(super) fn ask(&self, requests: Chained<'_>) -> io::Result<Vec<Vec<u8>>> {
        let requests = requests.finalize();
        let last = last_number(requests.buf());
        let fd = self.socket.as_raw_fd();
        sendto(
            fd,
            requests.buf(),
            &NetlinkAddr::new(0, 0),
            MsgFlags::empty(),
        )?;
        let mut answers = Vec::new();
        let (mut ended, mut failed) = (false, None);
        let mut datagram = vec![0; ANSWER];
        loop {
            match recv(fd, &mut datagram, MsgFlags::MSG_DONTWAIT) {
                Ok(length) => {
                    let said = datagram.get(..length).unwrap_or_default();
                    match read(said, last, &mut answers) {
                        Ok(is_end) => ended |= is_end,
                        // What else it says is heard out, or the next question would get it.
                        Err(error) => failed = failed.or(Some(error)),
                    }
                }
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => {
                    return match failed {
                        Some(error) => Err(error),
                        None if ended => Ok(answers),
                        None => Err(cut_off()),
                    };
                }
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    /// The number of the namespace's rules.
    ///
    /// # Errors
    /// The kernel has no nf_tables.
    pub(super) fn generation(&self) -> io::Result<u32> {
        let mut ask = requests();
        ask.request().op_getgen_do(&about(libc::AF_UNSPEC));
        let answers = self.ask(ask)?;
        let answer = answers.first().ok_or_else(cut_off)?;
        let (_, attributes) = OpGetgenDo::decode_reply(answer);
        attributes.get_id().map_err(io::Error::other)
    }
}

/// The number of the last message that is answered whatever the kernel: older ones (6.1 for one) say nothing to the
/// messages that begin and end a transaction.
fn last_number(requests: &[u8]) -> u32 {
    let is_frame = |kind: u16| {
        [libc::NFNL_MSG_BATCH_BEGIN, libc::NFNL_MSG_BATCH_END].contains(&i32::from(kind))
    };
    let sent = messages(requests).unwrap_or_default().into_iter();
    let mut asked = sent
        .filter(|(it, _)| !is_frame(it.r#type))
        .map(|(it, _)| it.seq);
    asked.next_back().unwrap_or(FIRST)
}

/// Adds to the answers. True if the request of this number has come to its end.
fn read(datagram: &[u8], last: u32, answers: &mut Vec<Vec<u8>>) -> io::Result<bool> {
    let mut ended = false;
    for (header, content) in messages(datagram)? {
        if header.flags & NLM_F_DUMP_INTR as u16 != 0 {
            return Err(io::Error::from(Errno::EINTR));
        }
        match i32::from(header.r#type) {
            NLMSG_ERROR | NLMSG_DONE => {
                let code = content.first_chunk().ok_or_else(cut_off)?;
                match i32::from_ne_bytes(*code) {
                    0 => ended |= header.seq == last,
                    code => return Err(io::Error::from_raw_os_error(code.wrapping_neg())),
                }
            }
            _ => answers.push(content.to_vec()),
        }
    }
    Ok(ended)
}

/// Takes a datagram apart.
fn messages(mut datagram: &[u8]) -> io::Result<Vec<(Nlmsghdr, &[u8])>> {
    let mut found = Vec::new();
    while !datagram.is_empty() {
        let header = datagram.get(..Nlmsghdr::len());
        let header = header
            .and_then(Nlmsghdr::new_from_slice)
            .ok_or_else(cut_off)?;
        let length = header.len as usize;
        let content = datagram.get(Nlmsghdr::len()..length).ok_or_else(cut_off)?;
        found.push((header, content));
        // Netlink aligns messages to four bytes.
        datagram = datagram
            .get(length.next_multiple_of(4)..)
            .unwrap_or_default();
    }
    Ok(found)
}

fn cut_off() -> io::Error {
    io::Error::other("netfilter's answer is cut off")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A message of netlink: length, type, flags, number, port, content.
    fn message(kind: i32, flags: i32, number: u32, content: &[u8]) -> Vec<u8> {
        let length = u32::try_from(16 + content.len()).unwrap();
        let mut bytes = length.to_ne_bytes().to_vec();
        bytes.extend((kind as u16).to_ne_bytes());
        bytes.extend((flags as u16).to_ne_bytes());
        bytes.extend(number.to_ne_bytes());
        bytes.extend([0; 4]);
        bytes.extend(content);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    #[test]
    fn an_answer_ends_with_the_last_request() {
        let data = message(0xa06, 2, 2, b"rule!");
        let first = message(NLMSG_ERROR, 0, 1, &[0; 4]);
        let done = message(NLMSG_DONE, 2, 2, &[0; 4]);
        let mut answers = Vec::new();
        assert!(!read(&[first, data].concat(), 2, &mut answers).unwrap());
        assert!(read(&done, 2, &mut answers).unwrap());
        assert_eq!(answers, [b"rule!"]);
    }

    #[test]
    fn what_is_refused_interrupted_or_cut_off_is_an_error() {
        let refused = message(NLMSG_ERROR, 0, 1, &(-libc::EPERM).to_ne_bytes());
        let interrupted = message(0xa06, NLM_F_DUMP_INTR, 1, b"rule");
        let whole = message(0xa06, 0, 1, b"rule");
        let cases = [
            (refused, Some(libc::EPERM)),
            (interrupted, Some(libc::EINTR)),
            (whole[..18].to_vec(), None),
            (whole[..7].to_vec(), None),
            (message(NLMSG_ERROR, 0, 1, &[]), None),
            // A length that leads nowhere must not lead round and round.
            (vec![0; 16], None),
        ];
        for (datagram, errno) in cases {
            let error = read(&datagram, 1, &mut Vec::new()).unwrap_err();
            assert_eq!(error.raw_os_error(), errno, "{datagram:?}");
        }
    }
}
