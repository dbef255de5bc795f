//! Stands in for a container: answers every request on its ports with the name it was given. HTTP on TCP,
//! so that curl can ask it; on UDP the name, a space and what was sent.

use std::net::{Ipv6Addr, SocketAddr};

use anyhow::{Context, Result};
use axum::Router;
use axum::extract::ConnectInfo;
use clap::Parser;
use nix::sys::socket::{setsockopt, sockopt};
use tokio::net::{TcpListener, TcpSocket, UdpSocket};
use tokio::task::JoinSet;

/// Of a UDP port, in bytes.
const RECEIVE_BUFFER: usize = 16 << 20;

#[derive(Debug, Parser)]
struct Args {
    /// What to answer.
    #[arg(long)]
    name: String,
    /// TCP ports to serve, host order.
    #[arg(long)]
    tcp: Vec<u16>,
    /// UDP ports to serve, host order.
    #[arg(long)]
    udp: Vec<u16>,
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<()> {
    let args = Args::parse();
    let mut servers = JoinSet::new();
    for port in args.tcp {
        let listener = listen(port).with_context(|| format!("listen on TCP port {port}"))?;
        servers.spawn(serve_http(listener, args.name.clone()));
    }
    for port in args.udp {
        let socket = UdpSocket::bind((Ipv6Addr::UNSPECIFIED, port))
            .await
            .with_context(|| format!("listen on UDP port {port}"))?;
        // Beside a flood a server is not always on a CPU. Without the right to it, the buffer stays as it is.
        let _smaller = setsockopt(&socket, sockopt::RcvBufForce, &RECEIVE_BUFFER);
        servers.spawn(serve_udp(socket, args.name.clone()));
    }
    println!("ready");
    while let Some(ended) = servers.join_next().await {
        ended.context("a server's task")??;
    }
    // A pod without ports still lives until it is ended.
    std::future::pending().await
}

/// With room for seconds of connections: a server that waits for a busy core must not lose any.
fn listen(port: u16) -> std::io::Result<TcpListener> {
    const BACKLOG: u32 = 4096;
    let socket = TcpSocket::new_v6()?;
    socket.set_reuseaddr(true)?;
    socket.bind((Ipv6Addr::UNSPECIFIED, port).into())?;
    socket.listen(BACKLOG)
}

async fn serve_http(listener: TcpListener, name: String) -> Result<()> {
    let app = Router::new().fallback(move |ConnectInfo(peer): ConnectInfo<SocketAddr>| {
        let answer = format!("{name} {}\n", peer.ip().to_canonical());
        async move { answer }
    });
    axum::serve(
        listener,
        app.into_make_service_with_connect_info::<SocketAddr>(),
    )
    .await
    .context("serve HTTP")
}

async fn serve_udp(socket: UdpSocket, name: String) -> Result<()> {
    let mut buffer = [0; 2048];
    loop {
        let (length, peer) = socket.recv_from(&mut buffer).await.context("receive")?;
        let mut answer = name.clone().into_bytes();
        answer.push(b' ');
        answer.extend_from_slice(&buffer[..length]);
        socket.send_to(&answer, peer).await.context("answer")?;
    }
}
