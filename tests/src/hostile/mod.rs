//! What a hostile pod can do with a packet socket: a mouth that puts any frame on the pod's wire, and an ear that hears what
//! arrives there. Frames are told apart by marks in their payload.

mod around;
pub mod attacks;
mod inside;
pub mod scene;
mod spoofed;

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::os::fd::{AsRawFd as _, OwnedFd};

use anyhow::{Context as _, Result, ensure};
use nix::ifaddrs::getifaddrs;
use nix::libc::PACKET_OUTGOING;
use nix::sys::socket::{
    AddressFamily, LinkAddr, MsgFlags, SockFlag, SockProtocol, SockType, recvfrom, sendto,
    setsockopt, socket, sockopt,
};

use crate::netns::Netns;

/// How a mark begins, and how long it is.
const MARK: &[u8] = b"hostile-";
const LENGTH: usize = MARK.len() + 6;
/// Bytes that an ear may leave unread.
const ROOM: usize = 16 << 20;

/// The mark of this number.
#[must_use]
pub fn mark(number: u32) -> Vec<u8> {
    format!("{}{number:06}", String::from_utf8_lossy(MARK)).into_bytes()
}

/// Sends frames as they are.
#[derive(Debug)]
pub struct Mouth {
    socket: OwnedFd,
    device: LinkAddr,
    /// The pod's Ethernet address, and its gateway's.
    pub own: [u8; 6],
    pub gateway: [u8; 6],
}

impl Mouth {
    /// Of the pod whose namespace this is.
    ///
    /// # Errors
    /// It has no device, or no gateway.
    pub fn open(netns: &Netns) -> Result<Self> {
        let found = netns.run(|| -> Result<_> {
            let flags = SockFlag::SOCK_CLOEXEC;
            let socket = socket(AddressFamily::Packet, SockType::Raw, flags, None)?;
            let device = getifaddrs()?.find_map(|it| match &*it.interface_name {
                "eth0" => it.address?.as_link_addr().copied(),
                _ => None,
            });
            Ok((socket, device.context("no eth0")?))
        });
        let (socket, device) = found??;
        let neighbours = netns.ip("-4 neigh show dev eth0")?;
        let mut words = neighbours.split_whitespace();
        words.find(|word| *word == "lladdr").context("no gateway")?;
        let bytes = words.next().unwrap_or_default().split(':');
        let bytes: Result<Vec<u8>, _> = bytes.map(|it| u8::from_str_radix(it, 16)).collect();
        Ok(Self {
            own: device.addr().context("eth0 has no address")?,
            gateway: bytes?.try_into().ok().context("six bytes")?,
            socket,
            device,
        })
    }

    /// # Errors
    /// The kernel did not take it.
    pub fn send(&self, frame: &[u8]) -> Result<()> {
        let sent = sendto(
            self.socket.as_raw_fd(),
            frame,
            &self.device,
            MsgFlags::empty(),
        )?;
        ensure!(sent == frame.len(), "{sent} of {} bytes", frame.len());
        Ok(())
    }
}

/// Hears every frame that arrives in a namespace, on whatever device, also on one that comes later.
#[derive(Debug)]
pub struct Ear {
    socket: OwnedFd,
    heard: RefCell<BTreeSet<Vec<u8>>>,
}

impl Ear {
    /// # Errors
    /// No permission.
    pub fn open(netns: &Netns) -> Result<Self> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let all = SockProtocol::EthAll;
        let socket = netns.run(|| socket(AddressFamily::Packet, SockType::Raw, flags, all))??;
        setsockopt(&socket, sockopt::RcvBufForce, &ROOM)?;
        Ok(Self {
            socket,
            heard: RefCell::default(),
        })
    }

    /// Has it heard this mark?
    #[must_use]
    pub fn has_heard(&self, mark: &[u8]) -> bool {
        let mut heard = self.heard.borrow_mut();
        let mut bytes = vec![0; 1 << 16];
        while let Ok((length, from)) = recvfrom::<LinkAddr>(self.socket.as_raw_fd(), &mut bytes) {
            // What the pod itself sends is heard too.
            let is_own = from.is_some_and(|it| {
                let address: &nix::libc::sockaddr_ll = it.as_ref();
                address.sll_pkttype == PACKET_OUTGOING
            });
            if !is_own {
                let windows = bytes[..length].windows(LENGTH);
                heard.extend(
                    windows
                        .filter(|it| it.starts_with(MARK))
                        .map(<[u8]>::to_vec),
                );
            }
        }
        heard.contains(mark)
    }
}
