//! Sends datagrams from one socket, and tells who answers: a line for each answer,
//! `<milliseconds since the start> <name> <address it came from>`. Of a socket that is connected the address is that of its peer, as
//! it knows it; what ends the connection is a line with `error`, and it is connected anew.

use std::io::ErrorKind;
use std::net::{SocketAddr, UdpSocket};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::Parser;

#[derive(Debug, Parser)]
struct Args {
    /// The address and port to send from.
    #[arg(long)]
    from: SocketAddr,
    /// Whom to send to.
    #[arg(long)]
    target: SocketAddr,
    /// How many to send.
    #[arg(long)]
    count: u32,
    /// How long to wait for each answer, in milliseconds.
    #[arg(long, default_value_t = 50)]
    patience: u64,
    /// Connect the socket.
    #[arg(long)]
    connect: bool,
}

fn main() -> Result<()> {
    let args = Args::parse();
    let socket = UdpSocket::bind(args.from).with_context(|| format!("bind {}", args.from))?;
    let patience = Duration::from_millis(args.patience);
    socket.set_read_timeout(Some(patience))?;
    let start = Instant::now();
    println!("ready");
    let mut is_connected = false;
    for _ in 0..args.count {
        let sent = Instant::now();
        if args.connect && !is_connected {
            socket.connect(args.target).context("connect")?;
            is_connected = true;
        }
        let said = match is_connected {
            true => socket.send(b"ping"),
            false => socket.send_to(b"ping", args.target),
        };
        if let Err(error) = said {
            println!("{} error {error}", start.elapsed().as_millis());
            is_connected = false;
            std::thread::sleep(patience);
            continue;
        }
        let mut buffer = [0; 512];
        let heard = match is_connected {
            true => socket
                .recv(&mut buffer)
                .and_then(|n| Ok((n, socket.peer_addr()?))),
            false => socket.recv_from(&mut buffer),
        };
        match heard {
            Ok((length, peer)) => {
                let said = String::from_utf8_lossy(&buffer[..length]);
                let name = said.split(' ').next().unwrap_or_default();
                println!("{} {name} {peer}", start.elapsed().as_millis());
            }
            Err(e) if e.kind() == ErrorKind::WouldBlock => {}
            Err(error) => {
                println!("{} error {error}", start.elapsed().as_millis());
                is_connected = false;
            }
        }
        // A steady pace, however fast the answers are.
        std::thread::sleep(Duration::from_millis(2).saturating_sub(sent.elapsed()));
    }
    Ok(())
}
