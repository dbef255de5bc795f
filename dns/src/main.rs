//! The `weir-dns` process, in order: arguments, sockets, no privilege any more, then service until
//! SIGTERM. With `--probe` it only asks another.

use std::io::IsTerminal;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context, Result};
use clap::Parser;
use rustix::process::getuid;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};
use tracing_subscriber::EnvFilter;
use weir_dns::feed::{Client, SharedZone};
use weir_dns::hand_over::{FOLDER, Folder};
use weir_dns::host_port::host_port;
use weir_dns::kept::Kept;
use weir_dns::listen::{self, ListenError, Listener};
use weir_dns::metrics::Metrics;
use weir_dns::privilege::{self, USER, User};
use weir_dns::probe;
use weir_dns::resolve::Resolve;
use weir_dns::server::Server;
use weir_dns::status::{self, Pages, Port, Status};
use weir_dns::upstream::{Upstream, from_resolv_conf, without_ourselves};
use weir_dns::zone::Domain;

/// The exit code when an address cannot be listened on, for who starts us.
const EXIT_LISTEN: u8 = 3;

/// Weir's DNS: answers for the cluster's names, and asks upstream servers for all others.
#[derive(Debug, Parser)]
#[command(version)]
struct Args {
    /// Where to answer, over UDP and TCP. May be repeated.
    #[arg(long, required_unless_present = "probe")]
    listen: Vec<SocketAddr>,
    /// The agent's socket that the zone comes from.
    #[arg(long, default_value = "/run/weir-dns/zone.sock")]
    feed: PathBuf,
    /// The domain of cluster names; the agent must have the same.
    #[arg(long, default_value = "cluster.local")]
    domain: Domain,
    /// Seconds that clients may keep an answer about a cluster name.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(0..=3600))]
    ttl: u32,
    /// A server for all other names. May be repeated; without any, --resolv-conf names them.
    #[arg(long)]
    upstream: Vec<SocketAddr>,
    /// The file that names the upstream servers.
    #[arg(long, default_value = "/etc/resolv.conf")]
    resolv_conf: PathBuf,
    /// Where /metrics, /health and /ready are served, if at all. Of several processes on a host the
    /// oldest has the port, and the next gets it from there. An IPv6 address may lack its brackets.
    #[arg(long, value_parser = host_port)]
    metrics: Option<SocketAddr>,
    /// The same pages at a unix socket, which is this process's alone.
    #[arg(long)]
    status_socket: Option<PathBuf>,
    /// Ask the process with this --status-socket whether it is ready, say what it says, and end: with 0
    /// if it is.
    #[arg(long, value_name = "STATUS_SOCKET")]
    probe: Option<PathBuf>,
    /// The folder where the process before us and the next one are met, which the agent makes. Who may enter
    /// it may have our sockets.
    #[arg(long, default_value = FOLDER)]
    hand_over: PathBuf,
    /// Whom to become, as UID:GID, when started as root. Nobody else should have this uid.
    #[arg(long, default_value_t = USER)]
    user: User,
    #[command(flatten)]
    kept: Kept,
    /// Lines for people, or JSON.
    #[arg(long, value_enum, default_value = "text")]
    log_format: LogFormat,
    /// As of tracing's EnvFilter: `info`, `weir_dns=debug`, …
    #[arg(long, env = "WEIR_LOG", default_value = "info")]
    log: String,
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum LogFormat {
    Text,
    Json,
}

fn main() -> ExitCode {
    let args = Args::parse();
    if let Some(socket) = &args.probe {
        return probe::ready(socket);
    }
    let filter = EnvFilter::new(&args.log);
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr);
    match args.log_format {
        LogFormat::Text => log.init(),
        LogFormat::Json => log.json().init(),
    }
    match run(args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            error!("{failure:#}");
            match failure.is::<ListenError>() {
                true => ExitCode::from(EXIT_LISTEN),
                false => ExitCode::FAILURE,
            }
        }
    }
}

fn run(args: Args) -> Result<()> {
    let folder = Folder::new(&args.hand_over);
    let users = [args.user.uid, getuid().as_raw()];
    let listeners = listen::everywhere(&args.listen, |address| {
        Listener::take_or_open(address, &folder, &users)
    })?;
    let port = args.metrics.map(Port::open).transpose()?;
    let socket = args
        .status_socket
        .as_deref()
        .map(status::open_socket)
        .transpose()?;
    let servers = match args.upstream.is_empty() {
        true => from_resolv_conf(&args.resolv_conf)?,
        false => args.upstream.clone(),
    };
    let local = local_addresses();
    for listener in &listeners {
        let ip = listener.address.ip();
        if !ip.is_unspecified() && !ip.is_loopback() && !local.contains(&ip) {
            warn!(address = %ip, "this host does not have the address yet");
        }
    }
    let listening: Vec<_> = listeners.iter().map(|l| l.address).collect();
    let servers = without_ourselves(servers, &listening, &local);
    privilege::drop(args.user).context("cannot give up privilege")?;
    args.kept
        .end_with_keeper()
        .context("cannot follow the parent in its end")?;

    tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .thread_name("weir-dns")
        .build()
        .context("cannot start the runtime")?
        .block_on(answer(args, listeners, Pages { port, socket }, servers))
}

async fn answer(
    args: Args,
    listeners: Vec<Listener>,
    pages: Pages,
    servers: Vec<SocketAddr>,
) -> Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let shutdown = CancellationToken::new();
    let zone = SharedZone::default();
    let (metrics, registry) = Metrics::new(&args.domain);
    metrics.restarts.inc_by(args.kept.restarts);
    if servers.is_empty() {
        warn!("no upstream server: names outside the cluster get SERVFAIL (see --upstream)");
    }
    info!(domain = %args.domain.name(), upstream = ?servers, user = %args.user, "starting");

    let client = Client::new(args.feed, args.domain.clone(), args.ttl, zone.clone());
    let feed = tokio::spawn(client.run());
    let router = status::router(Status {
        metrics: metrics.clone(),
        registry: Arc::new(registry),
        zone: zone.clone(),
    });
    let upstream = Upstream::new(&servers)?;
    let folder = Folder::new(args.hand_over);
    let resolve = Arc::new(Resolve::new(args.domain, zone, upstream, metrics));
    let server = Server::start(
        listeners,
        &folder,
        args.kept.keeper,
        &resolve,
        shutdown.clone(),
    )
    .context("cannot answer on what is open")?;
    // Only now, so that who knows the zone and is asked whether it is ready answers questions too.
    let pages = tokio::spawn(pages.serve(router));
    tokio::select! {
        _ = terminate.recv() => info!("told to end"),
        _ = interrupt.recv() => info!("interrupted"),
    }
    shutdown.cancel();
    server.finish().await;
    feed.abort();
    pages.abort();
    Ok(())
}

fn local_addresses() -> Vec<IpAddr> {
    let devices = match nix::ifaddrs::getifaddrs() {
        Ok(devices) => devices,
        Err(failure) => {
            warn!(%failure, "cannot list this host's addresses");
            return Vec::new();
        }
    };
    devices
        .filter_map(|device| {
            let address = device.address?;
            address
                .as_sockaddr_in()
                .map(|v4| IpAddr::V4(v4.ip()))
                .or_else(|| address.as_sockaddr_in6().map(|v6| IpAddr::V6(v6.ip())))
        })
        .collect()
}
