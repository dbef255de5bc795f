//! Sends datagrams, each from another port, as one raw socket can: a pod that has lost its mind. Prints how many it sent.

use std::net::{Ipv4Addr, SocketAddrV4};
use std::os::fd::AsRawFd as _;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::Parser;
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrIn, sendto, socket,
};

#[derive(Debug, Parser)]
struct Args {
    #[arg(long)]
    from: Ipv4Addr,
    /// Whom to send to.
    #[arg(long)]
    target: SocketAddrV4,
    /// To how many addresses, from that one on.
    #[arg(long, default_value_t = 1)]
    targets: u32,
    /// Datagrams per second, in bursts of a millisecond.
    #[arg(long)]
    rate: u32,
    #[arg(long)]
    seconds: u32,
}

fn main() -> Result<()> {
    let args = Args::parse();
    // The kernel fills in length, identification and checksum of the IPv4 header (raw(7)).
    let protocol = SockProtocol::Raw;
    let raw = socket(
        AddressFamily::Inet,
        SockType::Raw,
        SockFlag::empty(),
        protocol,
    )
    .context("open a raw socket")?;
    let mut packet = [0_u8; 32];
    (packet[0], packet[8], packet[9]) = (0x45, 64, 17);
    packet[12..16].copy_from_slice(&args.from.octets());
    packet[22..24].copy_from_slice(&args.target.port().to_be_bytes());
    packet[24..26].copy_from_slice(&12_u16.to_be_bytes());
    let start = Instant::now();
    let (mut sent, mut refused) = (0_u64, 0_u64);
    println!("ready");
    let burst = u64::from((args.rate / 1_000).max(1));
    for tick in 0..u64::from(args.seconds) * 1_000 {
        let due = Duration::from_millis(tick);
        std::thread::sleep(due.saturating_sub(start.elapsed()));
        for _ in 0..burst {
            let number = sent + refused;
            let port = 1_024 + (number % 60_000) as u16;
            packet[20..22].copy_from_slice(&port.to_be_bytes());
            let next = (number % u64::from(args.targets)) as u32;
            let target = Ipv4Addr::from(u32::from(*args.target.ip()) + next);
            packet[16..20].copy_from_slice(&target.octets());
            let to = SockaddrIn::from(SocketAddrV4::new(target, 0));
            match sendto(raw.as_raw_fd(), &packet, &to, MsgFlags::MSG_DONTWAIT) {
                Ok(_) => sent += 1,
                // What the device does not take now.
                Err(Errno::ENOBUFS | Errno::EAGAIN | Errno::EPERM) => refused += 1,
                Err(error) => return Err(error).context("send"),
            }
        }
    }
    println!("{sent} sent in {} ms", start.elapsed().as_millis());
    Ok(())
}
