//! Names that are not the cluster's: asked of the upstream servers through hickory's resolver and
//! its cache. Everything is bounded: how many questions are under way, and how long each may take.

use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use hickory_proto::op::ResponseCode;
use hickory_proto::rr::{Name, Record, RecordType};
use hickory_resolver::TokioResolver;
use hickory_resolver::config::{
    ConnectionConfig, NameServerConfig, ResolveHosts, ResolverConfig, ResolverOpts,
};
use hickory_resolver::net::runtime::TokioRuntimeProvider;
use hickory_resolver::net::{DnsError, NetError};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tracing::{debug, warn};

/// From question to answer, retries included: glibc and musl ask again after 5 s, and a SERVFAIL
/// must be there well before.
pub const BUDGET: Duration = Duration::from_millis(1900);
/// For one try. Two fit in the budget, so one lost packet is not a failure.
const TRY: Duration = Duration::from_millis(900);
/// Entries, as many as CoreDNS keeps.
const CACHE: u64 = 9984;
/// Seconds: what is kept no longer than CoreDNS keeps it.
const MAX_TTL: Duration = Duration::from_secs(3600);
const MAX_NEGATIVE_TTL: Duration = Duration::from_secs(1800);
/// Questions under way; as kubeadm configures CoreDNS.
pub const MAX_IN_FLIGHT: usize = 1000;

const DNS_PORT: u16 = 53;

/// Where systemd's resolver lists the servers behind its stub.
const STUB: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(127, 0, 0, 53));
const BEHIND_STUB: &str = "/run/systemd/resolve/resolv.conf";

/// The upstream servers. Clones share cache and bounds.
#[derive(Clone, Debug)]
pub struct Upstream {
    resolver: Option<TokioResolver>,
    in_flight: Arc<Semaphore>,
}

/// What the upstream servers know.
#[derive(Clone, Debug)]
pub enum Heard {
    Records {
        answers: Vec<Record>,
        authorities: Vec<Record>,
        additionals: Vec<Record>,
    },
    /// NXDOMAIN or NODATA, with the SOA that says for how long.
    Nothing {
        code: ResponseCode,
        soa: Option<Box<Record>>,
    },
    /// No answer in time, or an error that is theirs.
    Failed(ResponseCode),
}

/// Why upstream servers cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum UpstreamError {
    #[error("cannot read the name servers in {path}: {source}")]
    ResolvConf {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("cannot set up the resolver: {0}")]
    Resolver(#[from] NetError),
}

impl Upstream {
    /// Will ask these servers. None is possible: every answer is SERVFAIL then.
    pub fn new(servers: &[SocketAddr]) -> Result<Self, UpstreamError> {
        let resolver = match servers {
            [] => None,
            _ => Some(resolver(servers)?),
        };
        Ok(Self {
            resolver,
            in_flight: Arc::new(Semaphore::new(MAX_IN_FLIGHT)),
        })
    }

    /// A place among the questions under way; `None` when there are too many.
    pub fn admit(&self) -> Option<OwnedSemaphorePermit> {
        self.in_flight.clone().try_acquire_owned().ok()
    }

    /// Asks. Answers within `BUDGET`.
    pub async fn ask(&self, name: &Name, kind: RecordType) -> Heard {
        let Some(resolver) = &self.resolver else {
            return Heard::Failed(ResponseCode::ServFail);
        };
        // The cache compares names as they are spelled.
        let mut asked = name.to_lowercase();
        asked.set_fqdn(true);
        let result = tokio::time::timeout(BUDGET, resolver.lookup(asked, kind)).await;
        match result {
            Err(_) => Heard::Failed(ResponseCode::ServFail),
            Ok(Ok(lookup)) => {
                let message = lookup.message();
                let mut answers = message.answers.clone();
                for record in &mut answers {
                    // 0x20 leaves its random case on the owner: give the client's back.
                    if record.name == *name {
                        record.name = name.clone();
                    }
                }
                Heard::Records {
                    answers,
                    authorities: message.authorities.clone(),
                    additionals: message.additionals.clone(),
                }
            }
            Ok(Err(NetError::Dns(DnsError::NoRecordsFound(nothing)))) => Heard::Nothing {
                code: nothing.response_code,
                soa: nothing.soa.map(|soa| Box::new(soa.into_record_of_rdata())),
            },
            Ok(Err(NetError::Dns(DnsError::ResponseCode(code)))) => Heard::Failed(code),
            Ok(Err(error)) => {
                debug!(%name, %kind, %error, "upstream lookup failed");
                Heard::Failed(ResponseCode::ServFail)
            }
        }
    }
}

fn resolver(servers: &[SocketAddr]) -> Result<TokioResolver, NetError> {
    let servers = servers.iter().map(|server| {
        let connections = [ConnectionConfig::udp(), ConnectionConfig::tcp()]
            .into_iter()
            .map(|mut connection| {
                connection.port = server.port();
                connection
            })
            .collect();
        NameServerConfig::new(server.ip(), true, connections)
    });
    let config = ResolverConfig::from_parts(None, Vec::new(), servers.collect());
    let mut options = ResolverOpts::default();
    options.timeout = TRY;
    options.attempts = 1;
    options.cache_size = CACHE;
    options.positive_max_ttl = Some(MAX_TTL);
    options.negative_max_ttl = Some(MAX_NEGATIVE_TTL);
    options.use_hosts_file = ResolveHosts::Never;
    options.case_randomization = true;
    options.edns_payload_len = 1232;
    options.max_active_requests = MAX_IN_FLIGHT;
    TokioResolver::builder_with_config(config, TokioRuntimeProvider::default())
        .with_options(options)
        .build()
}

/// The name servers of a resolv.conf, on port 53. One that names systemd's stub alone stands for
/// the servers behind the stub.
pub fn from_resolv_conf(path: &Path) -> Result<Vec<SocketAddr>, UpstreamError> {
    let servers = read_resolv_conf(path)?;
    if !servers.is_empty()
        && servers.iter().all(|server| server.ip() == STUB)
        && let Ok(behind) = read_resolv_conf(Path::new(BEHIND_STUB))
    {
        return Ok(behind);
    }
    Ok(servers)
}

fn read_resolv_conf(path: &Path) -> Result<Vec<SocketAddr>, UpstreamError> {
    // hickory's parser takes a file without servers for an error; it is a node without upstream.
    let text = std::fs::read_to_string(path).map_err(|source| UpstreamError::ResolvConf {
        path: path.to_owned(),
        source,
    })?;
    let mut servers = Vec::new();
    for line in text.lines() {
        let mut words = line.split_whitespace();
        let (Some("nameserver"), Some(word)) = (words.next(), words.next()) else {
            continue;
        };
        match word.parse::<IpAddr>() {
            Ok(ip) => servers.push(SocketAddr::new(ip, DNS_PORT)),
            Err(_) => warn!(nameserver = word, path = %path.display(), "not an address, left out"),
        }
    }
    Ok(servers)
}

/// The servers without ourselves: a question must not come back. `local` is the addresses of this
/// host, which a socket without an address of its own listens on.
pub fn without_ourselves(
    servers: Vec<SocketAddr>,
    listen: &[SocketAddr],
    local: &[IpAddr],
) -> Vec<SocketAddr> {
    let is_us = |server: &SocketAddr| {
        listen.iter().any(|own| {
            own.port() == server.port()
                && (own.ip() == server.ip()
                    || own.ip().is_unspecified()
                        && (server.ip().is_loopback()
                            || server.ip().is_unspecified()
                            || local.contains(&server.ip())))
        })
    };
    servers
        .into_iter()
        .filter(|server| {
            let loops = is_us(server);
            if loops {
                warn!(%server, "upstream left out: it is this server");
            }
            !loops
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn addresses(text: &[&str]) -> Vec<SocketAddr> {
        text.iter().map(|a| a.parse().unwrap()).collect()
    }

    #[test]
    fn a_question_never_comes_back_to_us() {
        let local: Vec<IpAddr> = vec!["192.0.2.1".parse().unwrap()];
        for (servers, listen, expected) in [
            (
                &["10.0.0.2:53"][..],
                &["10.96.0.10:53"][..],
                &["10.0.0.2:53"][..],
            ),
            (
                &["10.96.0.10:53", "10.0.0.2:53"],
                &["10.96.0.10:53"],
                &["10.0.0.2:53"],
            ),
            (
                &["10.96.0.10:5353"],
                &["10.96.0.10:53"],
                &["10.96.0.10:5353"],
            ),
            (
                &["127.0.0.1:53", "192.0.2.1:53", "192.0.2.2:53"],
                &["0.0.0.0:53"],
                &["192.0.2.2:53"],
            ),
            (&["127.0.0.1:53"], &["0.0.0.0:5353"], &["127.0.0.1:53"]),
            (&["[::1]:53"], &["[::]:53"], &[]),
        ] {
            let got = without_ourselves(addresses(servers), &addresses(listen), &local);
            assert_eq!(got, addresses(expected), "{servers:?} for {listen:?}");
        }
    }

    #[test]
    fn name_servers_are_read_from_resolv_conf() {
        let file = tempfile::NamedTempFile::new().unwrap();
        for (text, expected) in [
            (
                "# node\nsearch corp.example\nnameserver 192.0.2.1\n nameserver\t2001:db8::1 x\n",
                &["192.0.2.1:53", "[2001:db8::1]:53"][..],
            ),
            (
                "nameserver\nnameserver fe80::1%eth0\n#nameserver 192.0.2.1\n",
                &[],
            ),
            ("", &[]),
        ] {
            std::fs::write(file.path(), text).unwrap();
            let got = from_resolv_conf(file.path()).unwrap();
            assert_eq!(got, addresses(expected), "{text:?}");
        }
        let missing = from_resolv_conf(Path::new("/nonexistent/resolv.conf")).unwrap_err();
        assert!(missing.to_string().contains("/nonexistent/resolv.conf"));
    }
}
