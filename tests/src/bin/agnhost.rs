//! Kubernetes' agnhost, with SCTP where the kernel has none: of SCTP as much as a policy sees, an INIT and its answer, by
//! raw sockets. Where the kernel has SCTP, and for everything else, it is agnhost itself that runs.

use std::env;
use std::io::{self, ErrorKind};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV4, UdpSocket};
use std::os::fd::AsRawFd as _;
use std::os::unix::process::CommandExt as _;
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::Parser;
use nix::sys::socket::{AddressFamily, SockFlag, SockProtocol, SockType, SockaddrIn, bind, socket};
use weir_tests::cluster::network_policy_api::AGNHOST;
use weir_tests::sctp::Said;

/// What the port of a server follows in the name of a variable, as agnhost has it.
const SERVE: &str = "SERVE_SCTP_PORT_";
/// How long an INIT waits for its answer before it is sent again (RFC 9260, 16: RTO.Initial).
const AGAIN: Duration = Duration::from_secs(1);

/// The words of `agnhost connect`.
#[derive(Debug, Parser)]
struct Connect {
    #[arg(long, value_parser = patience)]
    timeout: Duration,
    #[arg(long)]
    protocol: String,
    target: SocketAddr,
}

fn main() -> Result<ExitCode> {
    let mut words = env::args().skip(1);
    let has_sctp = socket(
        AddressFamily::Inet,
        SockType::Stream,
        SockFlag::SOCK_CLOEXEC,
        SockProtocol::Sctp,
    );
    if has_sctp.is_err() {
        match words.next().as_deref() {
            Some("connect") if env::args().any(|word| word == "--protocol=sctp") => {
                let words = Connect::parse_from(env::args().skip(1));
                return Ok(connect(&words));
            }
            Some("porter") => {
                let ports = ports(env::vars().map(|(name, _)| name))?;
                if !ports.is_empty() {
                    serve(&ports)?;
                }
            }
            _ => {}
        }
    }
    let why = Command::new(AGNHOST).args(env::args().skip(1)).exec();
    Err(why).context("start agnhost")
}

/// Says what agnhost says: nothing if there was an answer, `TIMEOUT` if there was none.
fn connect(words: &Connect) -> ExitCode {
    match is_answered(words.target, words.timeout) {
        Ok(true) => return ExitCode::SUCCESS,
        Ok(false) => eprintln!("TIMEOUT"),
        Err(why) => eprintln!("OTHER: {why}"),
    }
    ExitCode::FAILURE
}

/// # Errors
/// No socket, or a refusal by ICMP.
fn is_answered(target: SocketAddr, timeout: Duration) -> io::Result<bool> {
    let socket = raw(target.ip())?;
    // One that is connected hears of ICMP errors.
    socket.connect((target.ip(), 0))?;
    let tag = fastrand::u32(1..);
    let ports = (fastrand::u16(32_768..61_000), target.port());
    let init = Said::Opens { ports, tag }.packet();
    let expected = Said::Answers {
        ports: (ports.1, ports.0),
        tag,
    };
    let deadline = Instant::now() + timeout;
    let mut again = Instant::now();
    loop {
        let now = Instant::now();
        if now >= deadline {
            return Ok(false);
        }
        if now >= again {
            socket.send(&init)?;
            again = now + AGAIN;
        }
        // Zero would be for ever.
        let patience = deadline.min(again).saturating_duration_since(now);
        socket.set_read_timeout(Some(patience.max(Duration::from_millis(1))))?;
        let mut bytes = [0; 256];
        match socket.recv(&mut bytes) {
            Ok(length) if read(target.ip(), &bytes[..length]) == Some(expected) => {
                return Ok(true);
            }
            Ok(_) => {}
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
            Err(e) => return Err(e),
        }
    }
}

/// Answers who opens one of these ports, host order, over IPv4, as agnhost serves SCTP.
fn serve(ports: &[u16]) -> Result<()> {
    let own = IpAddr::from(Ipv4Addr::UNSPECIFIED);
    let socket = raw(own).context("open a raw socket")?;
    let mut bytes = [0; 256];
    loop {
        let (length, from) = socket.recv_from(&mut bytes).context("receive")?;
        let Some(Said::Opens { ports: asked, tag }) = read(own, &bytes[..length]) else {
            continue;
        };
        if !ports.contains(&asked.1) {
            continue;
        }
        let ports = (asked.1, asked.0);
        let answer = Said::Answers { ports, tag }.packet();
        // From the address that was asked: a node has several.
        let asked: [u8; 4] = [bytes[16], bytes[17], bytes[18], bytes[19]];
        let sent = raw(own).and_then(|socket| {
            let asked = SockaddrIn::from(SocketAddrV4::new(asked.into(), 0));
            bind(socket.as_raw_fd(), &asked)?;
            socket.send_to(&answer, (from.ip(), 0))
        });
        if let Err(why) = sent {
            eprintln!("answer {from}: {why}");
        }
    }
}

/// What a raw socket of this family gave.
fn read(family: IpAddr, bytes: &[u8]) -> Option<Said> {
    let header = match (family, bytes.first()) {
        // One of IPv4 gives the IP header too.
        (IpAddr::V4(_), Some(first)) => usize::from(first & 0xf) * 4,
        _ => 0,
    };
    Said::read(bytes.get(header..)?)
}

/// A raw socket, which is read and written as one of datagrams is.
fn raw(family: IpAddr) -> io::Result<UdpSocket> {
    let family = match family {
        IpAddr::V4(_) => AddressFamily::Inet,
        IpAddr::V6(_) => AddressFamily::Inet6,
    };
    let flags = SockFlag::SOCK_CLOEXEC;
    Ok(socket(family, SockType::Raw, flags, SockProtocol::Sctp)?.into())
}

/// The ports of SCTP that variables of these names ask for, host order.
///
/// # Errors
/// One is none, or there are such of other protocols beside them, which nobody would serve.
fn ports(names: impl Iterator<Item = String>) -> Result<Vec<u16>> {
    let (ports, others): (Vec<String>, Vec<String>) = names
        .filter(|name| name.starts_with("SERVE_"))
        .partition(|name| name.starts_with(SERVE));
    if let (Some(_), Some(other)) = (ports.first(), others.first()) {
        bail!("{other} beside ports of SCTP");
    }
    let number = |name: &String| name.trim_start_matches(SERVE).parse();
    ports
        .iter()
        .map(|name| number(name).with_context(|| name.clone()))
        .collect()
}

/// A duration as Go writes those of whole seconds or less than one: `3s`, `500ms`.
fn patience(text: &str) -> Result<Duration, String> {
    let parsed = match (text.strip_suffix("ms"), text.strip_suffix('s')) {
        (Some(number), _) => number.parse().map(Duration::from_millis),
        (None, Some(number)) => number.parse().map(Duration::from_secs),
        (None, None) => return Err("neither s nor ms".to_owned()),
    };
    parsed.map_err(|e| e.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_are_read_from_variables() {
        let of = |names: &[&str]| ports(names.iter().map(|name| (*name).to_owned()));
        assert_eq!(of(&["HOME", "SERVE_SCTP_PORT_9003"]).unwrap(), [9003]);
        assert_eq!(of(&["SERVE_PORT_80"]).unwrap(), [0_u16; 0]);
        assert!(of(&["SERVE_PORT_80", "SERVE_SCTP_PORT_9003"]).is_err());
        assert!(of(&["SERVE_SCTP_PORT_web"]).is_err());
    }

    #[test]
    fn the_words_of_the_suite_are_understood() {
        let words = "connect --timeout=3s --protocol=sctp [fd00::1]:9003";
        let words = Connect::try_parse_from(words.split(' ')).unwrap();
        assert_eq!(words.timeout, Duration::from_secs(3));
        assert_eq!(words.target.port(), 9003);
        assert_eq!(patience("500ms"), Ok(Duration::from_millis(500)));
        assert!(patience("1m").is_err());
    }
}
