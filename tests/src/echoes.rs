//! Conversations of which every byte is looked at: servers that send back what they get, and clients that check it.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};

use crate::netns::Netns;
use crate::traffic::{any, udp_socket};

/// How long a server waits for more before it ends.
const IDLE: Duration = Duration::from_secs(20);

/// A stream of bytes in which no two kilobytes are alike.
#[must_use]
pub fn bytes(length: usize) -> Vec<u8> {
    (0..length)
        .map(|at| (at % 251) as u8 ^ (at >> 10) as u8)
        .collect()
}

/// Sends everything that comes to a port back to where it came from, TCP and UDP, in both families, until nothing comes for
/// a while. What a client of TCP sends is sent back when it has sent all of it.
///
/// # Errors
/// The port is taken.
pub fn serve(netns: &Netns, port: u16) -> Result<()> {
    // One family beside the other.
    netns.set_sysctl("net.ipv6.bindv6only", "1")?;
    for any in ["0.0.0.0", "::"] {
        let at = SocketAddr::new(any.parse()?, port);
        let socket = udp_socket(netns, at, IDLE)?;
        std::thread::spawn(move || {
            let mut bytes = vec![0; 1 << 16];
            while let Ok((length, from)) = socket.recv_from(&mut bytes) {
                socket.send_to(&bytes[..length], from).ok();
            }
        });
        let listener = netns.run(|| TcpListener::bind(at))??;
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                std::thread::spawn(move || answer(stream));
            }
        });
    }
    Ok(())
}

fn answer(mut stream: TcpStream) -> std::io::Result<()> {
    stream.set_read_timeout(Some(IDLE))?;
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes)?;
    stream.write_all(&bytes)
}

/// Sends so many bytes on a new connection, and expects them back.
///
/// # Errors
/// They did not come in time, or not as they were sent.
pub fn stream_comes_back(
    netns: &Netns,
    target: SocketAddr,
    length: usize,
    patience: Duration,
) -> Result<()> {
    let ask = || -> Result<()> {
        let mut stream = TcpStream::connect_timeout(&target, patience).context("connect")?;
        stream.set_read_timeout(Some(patience))?;
        stream.set_write_timeout(Some(patience))?;
        let sent = bytes(length);
        stream.write_all(&sent).context("send")?;
        stream.shutdown(Shutdown::Write)?;
        let mut received = Vec::new();
        let read = stream.read_to_end(&mut received);
        read.with_context(|| format!("after {} bytes", received.len()))?;
        ensure!(sent == received, "{} bytes came back wrong", received.len());
        Ok(())
    };
    let asked = netns.run(ask)?;
    asked.with_context(|| format!("{length} bytes of TCP to {target}"))
}

/// Sends a datagram of each size from one socket, and expects each back from where it was sent to.
///
/// # Errors
/// One did not come in time, or not as it was sent.
pub fn datagrams_come_back(
    netns: &Netns,
    target: SocketAddr,
    sizes: &[usize],
    patience: Duration,
) -> Result<()> {
    let socket = udp_socket(netns, any(target), patience)?;
    let mut received = vec![0; 1 << 16];
    for size in sizes {
        let sent = bytes(*size);
        socket.send_to(&sent, target)?;
        let answer = socket.recv_from(&mut received);
        let (length, from) = answer.with_context(|| format!("{size} bytes of UDP to {target}"))?;
        ensure!(
            received[..length] == sent[..] && from == target,
            "{length} of {size} bytes came back from {from}, sent to {target}"
        );
    }
    Ok(())
}
