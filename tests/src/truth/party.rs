//! Somebody who asks and answers: a thread in a network namespace, with real sockets of TCP and UDP and raw ones of SCTP.

use std::collections::BTreeSet;
use std::io::{self, ErrorKind};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsRawFd as _;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use anyhow::{Context as _, Result, anyhow};
use nix::libc::linger;
use nix::sys::socket::{
    AddressFamily, SockFlag, SockProtocol, SockType, SockaddrStorage, bind, setsockopt, socket,
    sockopt,
};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpSocket, TcpStream, UdpSocket};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;
use weir_common::Protocol;

use crate::netns::enter;
use crate::sctp::Said;

/// What everybody serves, in every protocol. Host order.
pub(super) const PORTS: [u16; 2] = [80, 81];
/// The first port from which SCTP is sent, host order; it changes with [`Party::renew`].
const FIRST_SCTP_PORT: u16 = 30_000;

/// One look at everything: whose questions came back.
#[derive(Debug)]
pub(super) struct Look {
    number: u16,
    hits: Mutex<BTreeSet<u16>>,
}

/// What servers have been asked, by look and place: also what they answered and nobody heard.
pub(super) type Arrived = Arc<Mutex<BTreeSet<u32>>>;

/// A question, by its place among those of its look.
#[derive(Clone, Copy, Debug)]
pub(super) struct Question {
    pub(super) place: u16,
    pub(super) protocol: Protocol,
    pub(super) target: SocketAddr,
}

/// Lives in a namespace until it is dropped.
#[derive(Debug)]
pub(super) struct Party {
    orders: Option<mpsc::UnboundedSender<Order>>,
    thread: Option<JoinHandle<Result<()>>>,
}

#[derive(Debug)]
enum Order {
    Ask(Arc<Look>, Vec<Question>),
    Leave(oneshot::Sender<()>),
    Renew(oneshot::Sender<()>),
}

impl Look {
    pub(super) fn new(number: u16) -> Self {
        Self {
            number,
            hits: Mutex::default(),
        }
    }

    /// The places of the questions that were answered.
    pub(super) fn hits(&self) -> MutexGuard<'_, BTreeSet<u16>> {
        self.hits.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn tag(&self, place: u16) -> u32 {
        u32::from(self.number) << 16 | u32::from(place)
    }

    /// Takes an answer; those of an earlier look are none of this one's.
    fn hit(&self, tag: u32) {
        if tag >> 16 == u32::from(self.number) {
            self.hits().insert(tag as u16);
        }
    }
}

impl Party {
    /// Returns when everything is served.
    ///
    /// # Errors
    /// The namespace cannot be entered, or a port is taken.
    pub(super) fn start(
        name: &str,
        netns: PathBuf,
        addresses: [IpAddr; 2],
        arrived: &Arrived,
    ) -> Result<Self> {
        let arrived = arrived.clone();
        let (orders, inbox) = mpsc::unbounded_channel();
        let (ready, is_ready) = oneshot::channel();
        let thread = std::thread::Builder::new().name(name.to_owned());
        let thread = thread.spawn(move || -> Result<()> {
            enter(&netns)?;
            let runtime = tokio::runtime::Builder::new_current_thread();
            let runtime = { runtime }.enable_all().build()?;
            runtime.block_on(live(addresses, inbox, ready, arrived))
        })?;
        let mut party = Self {
            orders: Some(orders),
            thread: Some(thread),
        };
        match is_ready.blocking_recv() {
            Ok(()) => Ok(party),
            Err(_) => {
                let ended = party.thread.take().map(JoinHandle::join);
                let why = match ended {
                    Some(Ok(Err(why))) => why,
                    other => anyhow!("ended: {other:?}"),
                };
                Err(why.context(format!("start {name}")))
            }
        }
    }

    /// Asks all of these at once.
    ///
    /// # Errors
    /// It has ended.
    pub(super) fn ask(&self, look: &Arc<Look>, questions: Vec<Question>) -> Result<()> {
        self.order(Order::Ask(look.clone(), questions))
    }

    /// Waits for no more answers. Connections end; ports of UDP and SCTP are kept, and so what they have open.
    ///
    /// # Errors
    /// It has ended.
    pub(super) fn leave(&self) -> Result<()> {
        let (done, is_done) = oneshot::channel();
        self.order(Order::Leave(done))?;
        is_done.blocking_recv().context("a party has ended")
    }

    /// Asks from other ports from now on.
    ///
    /// # Errors
    /// It has ended.
    pub(super) fn renew(&self) -> Result<()> {
        let (done, is_done) = oneshot::channel();
        self.order(Order::Renew(done))?;
        is_done.blocking_recv().context("a party has ended")
    }

    fn order(&self, order: Order) -> Result<()> {
        let orders = self.orders.as_ref().context("a party has ended")?;
        let sent = orders.send(order);
        sent.map_err(|_| anyhow!("a party has ended"))
    }
}

impl Drop for Party {
    fn drop(&mut self) {
        self.orders = None;
        match self.thread.take().map(JoinHandle::join) {
            None | Some(Ok(Ok(()))) => {}
            Some(ended) => eprintln!("a party ended: {ended:?}"),
        }
    }
}

type Current = Arc<Mutex<Option<Arc<Look>>>>;

fn arrive(arrived: &Arrived, tag: u32) {
    let mut arrived = arrived.lock().unwrap_or_else(PoisonError::into_inner);
    arrived.insert(tag);
}

fn hit(current: &Current, tag: u32) {
    let current = current.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(look) = &*current {
        look.hit(tag);
    }
}

/// What datagrams are sent from.
struct Mouth {
    sockets: [Arc<UdpSocket>; 2],
    sctp_port: u16,
    _hears: JoinSet<io::Result<()>>,
}

impl Mouth {
    async fn open(addresses: [IpAddr; 2], sctp_port: u16, current: &Current) -> Result<Self> {
        let [v4, v6] = addresses.map(|it| UdpSocket::bind((it, 0)));
        let sockets = [Arc::new(v4.await?), Arc::new(v6.await?)];
        let mut hears = JoinSet::new();
        for socket in &sockets {
            let (socket, current) = (socket.clone(), current.clone());
            hears.spawn(async move {
                let mut answer = [0; 16];
                loop {
                    if let Ok((4, _)) = socket.recv_from(&mut answer).await {
                        let [a, b, c, d, ..] = answer;
                        hit(&current, u32::from_be_bytes([a, b, c, d]));
                    }
                }
            });
        }
        Ok(Self {
            sockets,
            sctp_port,
            _hears: hears,
        })
    }
}

async fn live(
    addresses: [IpAddr; 2],
    mut orders: mpsc::UnboundedReceiver<Order>,
    ready: oneshot::Sender<()>,
    arrived: Arrived,
) -> Result<()> {
    let current = Current::default();
    let mut servers = JoinSet::new();
    let mut raw = Vec::new();
    for address in addresses {
        for port in PORTS {
            let listener = TcpListener::bind((address, port)).await;
            let listener = listener.with_context(|| format!("listen on {address} {port}"))?;
            servers.spawn(serve_streams(listener, arrived.clone()));
            let socket = UdpSocket::bind((address, port)).await?;
            servers.spawn(serve_datagrams(socket, arrived.clone()));
        }
        let socket = Arc::new(raw_socket(address)?);
        servers.spawn(speak_sctp(socket.clone(), current.clone(), arrived.clone()));
        raw.push(socket);
    }
    let mut sctp_port = FIRST_SCTP_PORT;
    let mut mouth = Mouth::open(addresses, sctp_port, &current).await?;
    let mut streams = JoinSet::new();
    ready.send(()).map_err(|()| anyhow!("nobody waits"))?;
    while let Some(order) = orders.recv().await {
        match order {
            Order::Ask(look, questions) => {
                *current.lock().unwrap_or_else(PoisonError::into_inner) = Some(look.clone());
                for question in questions {
                    let side = usize::from(question.target.is_ipv6());
                    let tag = look.tag(question.place);
                    if question.protocol == Protocol::TCP {
                        let (from, look) = (addresses[side], look.clone());
                        streams.spawn(async move {
                            let stream = connect(from, question.target, tag).await?;
                            look.hit(tag);
                            // It stays open as long as the look.
                            std::future::pending::<()>().await;
                            drop(stream);
                            io::Result::Ok(())
                        });
                    } else if question.protocol == Protocol::UDP {
                        let bytes = tag.to_be_bytes();
                        let sent = mouth.sockets[side].send_to(&bytes, question.target).await;
                        // What a node's own hook drops may be told to the sender: that is an answer too.
                        sent.ok();
                    } else {
                        let ports = (mouth.sctp_port, question.target.port());
                        let packet = Said::Opens { ports, tag }.packet();
                        raw[side]
                            .send_to(&packet, (question.target.ip(), 0))
                            .await
                            .ok();
                    }
                    // What comes back is read meanwhile.
                    tokio::task::yield_now().await;
                }
            }
            Order::Leave(done) => {
                streams.shutdown().await;
                *current.lock().unwrap_or_else(PoisonError::into_inner) = None;
                done.send(()).map_err(|()| anyhow!("nobody waits"))?;
            }
            Order::Renew(done) => {
                sctp_port += 1;
                mouth = Mouth::open(addresses, sctp_port, &current).await?;
                done.send(()).map_err(|()| anyhow!("nobody waits"))?;
            }
        }
    }
    Ok(())
}

/// A connection over which four bytes went to and fro. What ends it is a reset, so that nothing of it is sent later.
async fn connect(from: IpAddr, target: SocketAddr, tag: u32) -> io::Result<TcpStream> {
    let socket = match from {
        IpAddr::V4(_) => TcpSocket::new_v4()?,
        IpAddr::V6(_) => TcpSocket::new_v6()?,
    };
    let at_once = linger {
        l_onoff: 1,
        l_linger: 0,
    };
    setsockopt(&socket, sockopt::Linger, &at_once)?;
    socket.bind((from, 0).into())?;
    let mut stream = socket.connect(target).await?;
    stream.write_all(&tag.to_be_bytes()).await?;
    let mut answer = [0; 4];
    stream.read_exact(&mut answer).await?;
    match answer == tag.to_be_bytes() {
        true => Ok(stream),
        false => Err(ErrorKind::InvalidData.into()),
    }
}

async fn serve_streams(listener: TcpListener, arrived: Arrived) -> io::Result<()> {
    let mut clients = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => {
                let (mut stream, _) = accepted?;
                let arrived = arrived.clone();
                clients.spawn(async move {
                    let mut bytes = [0; 4];
                    // Until the client resets it.
                    while stream.read_exact(&mut bytes).await.is_ok() {
                        arrive(&arrived, u32::from_be_bytes(bytes));
                        stream.write_all(&bytes).await?;
                    }
                    io::Result::Ok(())
                });
            }
            Some(_ended) = clients.join_next() => {}
        }
    }
}

async fn serve_datagrams(socket: UdpSocket, arrived: Arrived) -> io::Result<()> {
    let mut bytes = [0; 16];
    loop {
        // An ICMP error about an earlier answer is no reason to end.
        if let Ok((length, from)) = socket.recv_from(&mut bytes).await {
            if let Some(tag) = bytes[..length].first_chunk() {
                arrive(&arrived, u32::from_be_bytes(*tag));
            }
            socket.send_to(&bytes[..length], from).await.ok();
        }
    }
}

/// Answers who opens, and hears who answers.
async fn speak_sctp(socket: Arc<UdpSocket>, current: Current, arrived: Arrived) -> io::Result<()> {
    let mut bytes = [0; 128];
    loop {
        let Ok((length, from)) = socket.recv_from(&mut bytes).await else {
            continue;
        };
        // A raw socket of IPv4 gives the IP header too.
        let header = match from {
            SocketAddr::V4(_) => usize::from(bytes[0] & 0xf) * 4,
            SocketAddr::V6(_) => 0,
        };
        match Said::read(bytes.get(header..length).unwrap_or_default()) {
            Some(Said::Opens { ports, tag }) if PORTS.contains(&ports.1) => {
                arrive(&arrived, tag);
                let ports = (ports.1, ports.0);
                let answer = Said::Answers { ports, tag }.packet();
                socket.send_to(&answer, (from.ip(), 0)).await.ok();
            }
            Some(Said::Answers { tag, .. }) => hit(&current, tag),
            _ => {}
        }
    }
}

/// A raw socket, which is read and written as one of datagrams is.
fn raw_socket(address: IpAddr) -> io::Result<UdpSocket> {
    let family = match address {
        IpAddr::V4(_) => AddressFamily::Inet,
        IpAddr::V6(_) => AddressFamily::Inet6,
    };
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket = socket(family, SockType::Raw, flags, SockProtocol::Sctp)?;
    let address = SockaddrStorage::from(SocketAddr::new(address, 0));
    bind(socket.as_raw_fd(), &address)?;
    UdpSocket::from_std(socket.into())
}
