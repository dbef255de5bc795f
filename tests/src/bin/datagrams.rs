//! Sends datagrams from one socket that is never connected, and tells who answers: a line for each
//! answer, `<milliseconds since the start> <name> <address it came from>`.

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
}

fn main() -> Result<()> {
    let args = Args::parse();
    let socket = UdpSocket::bind(args.from).with_context(|| format!("bind {}", args.from))?;
    let patience = Duration::from_millis(args.patience);
    socket.set_read_timeout(Some(patience))?;
    let start = Instant::now();
    println!("ready");
    for _ in 0..args.count {
        let sent = Instant::now();
        if let Err(error) = socket.send_to(b"ping", args.target) {
            println!("{} error {error}", start.elapsed().as_millis());
            std::thread::sleep(patience);
            continue;
        }
        let mut buffer = [0; 512];
        match socket.recv_from(&mut buffer) {
            Ok((length, peer)) => {
                let said = String::from_utf8_lossy(&buffer[..length]);
                let name = said.split(' ').next().unwrap_or_default();
                println!("{} {name} {peer}", start.elapsed().as_millis());
            }
            Err(e) if e.kind() == ErrorKind::WouldBlock => {}
            Err(error) => println!("{} error {error}", start.elapsed().as_millis()),
        }
        // A steady pace, however fast the answers are.
        std::thread::sleep(Duration::from_millis(2).saturating_sub(sent.elapsed()));
    }
    Ok(())
}
