//! From a request's bytes to a response's bytes: the filter, the zone, and what must be asked
//! upstream. Knows no socket.

use std::net::SocketAddr;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use hickory_proto::op::ResponseCode;
use hickory_proto::rr::{Name, Record, RecordType};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tracing::{debug, error};

use crate::feed::SharedZone;
use crate::metrics::{Exchange, Metrics, Source, Text, Transport};
use crate::reply::{Authority, Reply, reject, servfail};
use crate::request::{Rejection, Request};
use crate::upstream::{Heard, Upstream};
use crate::zone::{Answer, Domain, is_reverse};

/// How long questions about cluster names are held for the first zone. Less than the five seconds
/// after which most resolvers stop listening.
pub const PATIENCE: Duration = Duration::from_secs(4);
/// Questions held at once; more get SERVFAIL.
const MAX_HELD: usize = 1000;

/// Answers questions. Shared by every transport.
#[derive(Debug)]
pub struct Resolve {
    domain: Domain,
    pub zone: SharedZone,
    upstream: Upstream,
    /// When questions are held for the zone no more; set by the first that would need it.
    patience: OnceLock<Instant>,
    held: Arc<Semaphore>,
    pub metrics: Metrics,
}

/// Where a question came from.
#[derive(Clone, Debug)]
pub struct Origin {
    /// The label of the listener.
    pub server: Text,
    pub transport: Transport,
    pub client: SocketAddr,
}

/// What becomes of a request.
#[derive(Debug)]
pub enum Fate {
    Nothing,
    Reply(Vec<u8>),
    /// Upstream must be asked.
    Ask(Box<Pending>),
    /// The zone must come first.
    Hold(Box<Held>),
}

/// A question that waits for the zone.
#[derive(Debug)]
pub struct Held {
    bytes: Vec<u8>,
    origin: Origin,
    started: Instant,
    until: Instant,
    /// Held while it waits: the bound on such questions.
    _place: OwnedSemaphorePermit,
}

/// A question that waits for upstream.
#[derive(Debug)]
pub struct Pending {
    request: Request,
    origin: Origin,
    /// The CNAMEs that lead from the question to `name`.
    chain: Vec<Record>,
    name: Name,
    bytes: usize,
    started: Instant,
    /// Held until the answer is there: the bound on questions under way.
    _place: OwnedSemaphorePermit,
}

impl Resolve {
    /// Puts the parts together.
    pub fn new(domain: Domain, zone: SharedZone, upstream: Upstream, metrics: Metrics) -> Self {
        Self {
            domain,
            zone,
            upstream,
            patience: OnceLock::new(),
            held: Arc::new(Semaphore::new(MAX_HELD)),
            metrics,
        }
    }

    /// Answers what needs no one else. Nothing that the bytes contain ends the process.
    pub fn receive(&self, bytes: &[u8], origin: &Origin) -> Fate {
        self.begin(bytes, origin, Instant::now())
    }

    /// Sees to it until the response is there; `None` if there should not be one.
    pub async fn settle(&self, mut fate: Fate) -> Option<Vec<u8>> {
        loop {
            fate = match fate {
                Fate::Nothing => return None,
                Fate::Reply(response) => return Some(response),
                Fate::Ask(pending) => return Some(self.ask(*pending).await),
                Fate::Hold(held) => {
                    let until = tokio::time::Instant::from_std(held.until);
                    // Without a zone it is answered too, as one that comes too late.
                    if tokio::time::timeout_at(until, self.zone.known())
                        .await
                        .is_err()
                    {
                        debug!(client = %held.origin.client, "held in vain");
                    }
                    self.begin(&held.bytes, &held.origin, held.started)
                }
            }
        }
    }

    fn begin(&self, bytes: &[u8], origin: &Origin, started: Instant) -> Fate {
        match catch_unwind(AssertUnwindSafe(|| self.decide(bytes, origin, started))) {
            Ok(fate) => fate,
            Err(_) => {
                self.metrics.panics.inc();
                error!(client = %origin.client, length = bytes.len(), "request caused a panic");
                servfail(bytes).map_or(Fate::Nothing, Fate::Reply)
            }
        }
    }

    /// Answers what upstream knows.
    async fn ask(&self, pending: Pending) -> Vec<u8> {
        let kind = pending.request.kind();
        let heard = self.upstream.ask(&pending.name, kind).await;
        let Pending {
            request,
            origin,
            mut chain,
            bytes,
            started,
            ..
        } = pending;
        let mut reply = match heard {
            Heard::Records {
                mut answers,
                authorities,
                additionals,
            } => {
                shuffle(&mut answers, kind);
                chain.append(&mut answers);
                Reply {
                    authorities,
                    additionals,
                    ..Reply::default()
                }
            }
            Heard::Nothing { code, soa } => Reply {
                code: Some(code),
                authorities: soa.into_iter().map(|soa| *soa).collect(),
                ..Reply::default()
            },
            Heard::Failed(code) => Reply::error(code),
        };
        reply.answers = chain;
        self.finish(reply, &request, &origin, Source::Upstream, bytes, started)
    }

    fn decide(&self, bytes: &[u8], origin: &Origin, started: Instant) -> Fate {
        let request = match Request::read(bytes) {
            Ok(request) => request,
            Err(rejection) => return self.reject(rejection, bytes, origin, started),
        };
        let name = request.query.name().clone();
        let ours = self.domain.contains(&name);
        let answer = match &*self.zone.load() {
            Some(zone) => zone.answer(&name, request.kind()),
            // Not synced is not empty: nobody may conclude that a name does not exist. A reverse
            // name may be ours or not, and nobody can tell yet.
            None if ours || is_reverse(&name) => {
                if let Some(held) = self.hold(bytes, origin, started) {
                    return Fate::Hold(held);
                }
                let reply = Reply::error(ResponseCode::ServFail);
                return self.reply(reply, &request, origin, bytes, started);
            }
            None => Answer::NotMine,
        };
        let mut reply = Reply {
            authority: Authority::Own,
            ..Reply::default()
        };
        match answer {
            Answer::Records {
                mut chain,
                mut records,
                additionals,
            } => {
                fastrand::shuffle(&mut records);
                chain.append(&mut records);
                reply.answers = chain;
                reply.additionals = additionals;
            }
            Answer::NoData { chain, soa } => {
                reply.answers = chain;
                reply.authorities = vec![*soa];
            }
            Answer::NxDomain { chain, soa } => {
                reply.code = Some(ResponseCode::NXDomain);
                reply.answers = chain;
                reply.authorities = vec![*soa];
            }
            Answer::Circle => reply = Reply::error(ResponseCode::ServFail),
            Answer::Refuse => reply = Reply::error(ResponseCode::Refused),
            Answer::Cname { chain, target } => {
                return self.defer(request, chain, target, bytes, origin, started);
            }
            Answer::NotMine => {
                return self.defer(request, Vec::new(), name, bytes, origin, started);
            }
        }
        self.reply(reply, &request, origin, bytes, started)
    }

    /// A process that has just started knows the zone in a moment. Resolvers of glibc and Go take a
    /// SERVFAIL for one of two tries and make the other at once, so a quick one is a failed lookup;
    /// a slow answer is none.
    fn hold(&self, bytes: &[u8], origin: &Origin, started: Instant) -> Option<Box<Held>> {
        let now = Instant::now();
        let until = *self.patience.get_or_init(|| now + PATIENCE);
        if now >= until {
            return None;
        }
        Some(Box::new(Held {
            bytes: bytes.to_vec(),
            origin: origin.clone(),
            started,
            until,
            _place: self.held.clone().try_acquire_owned().ok()?,
        }))
    }

    fn defer(
        &self,
        request: Request,
        chain: Vec<Record>,
        name: Name,
        bytes: &[u8],
        origin: &Origin,
        started: Instant,
    ) -> Fate {
        let Some(place) = self.upstream.admit() else {
            self.metrics.rejects.inc();
            let reply = Reply::error(ResponseCode::ServFail);
            let response = self.finish(
                reply,
                &request,
                origin,
                Source::Upstream,
                bytes.len(),
                started,
            );
            return Fate::Reply(response);
        };
        Fate::Ask(Box::new(Pending {
            request,
            origin: origin.clone(),
            chain,
            name,
            bytes: bytes.len(),
            started,
            _place: place,
        }))
    }

    fn reply(
        &self,
        reply: Reply,
        request: &Request,
        origin: &Origin,
        bytes: &[u8],
        started: Instant,
    ) -> Fate {
        Fate::Reply(self.finish(reply, request, origin, Source::Zone, bytes.len(), started))
    }

    fn reject(
        &self,
        rejection: Rejection,
        bytes: &[u8],
        origin: &Origin,
        started: Instant,
    ) -> Fate {
        let code = match &rejection {
            Rejection::Silent => return Fate::Nothing,
            Rejection::Header(_, code) | Rejection::Question(_, code) => *code,
            Rejection::Any(_) => ResponseCode::NoError,
        };
        let Some(response) = reject(rejection, |request| limit(request, origin)) else {
            return Fate::Nothing;
        };
        self.count(
            origin,
            None,
            Source::Filter,
            code,
            bytes.len(),
            response.len(),
            started,
        );
        Fate::Reply(response)
    }

    fn finish(
        &self,
        reply: Reply,
        request: &Request,
        origin: &Origin,
        source: Source,
        bytes: usize,
        started: Instant,
    ) -> Vec<u8> {
        let code = reply.code();
        let response = reply.encode(request, limit(request, origin));
        let kind = Some(request.kind());
        self.count(origin, kind, source, code, bytes, response.len(), started);
        response
    }

    #[expect(
        clippy::too_many_arguments,
        reason = "the columns of one row of metrics"
    )]
    fn count(
        &self,
        origin: &Origin,
        kind: Option<RecordType>,
        source: Source,
        code: ResponseCode,
        request: usize,
        response: usize,
        started: Instant,
    ) {
        self.metrics.count(&Exchange {
            server: &origin.server,
            transport: origin.transport,
            family: if origin.client.is_ipv4() { "1" } else { "2" },
            kind,
            source,
            code,
            request,
            response,
            took: started.elapsed(),
        });
    }
}

fn limit(request: &Request, origin: &Origin) -> u16 {
    match origin.transport {
        Transport::Udp => request.udp_limit(),
        Transport::Tcp => u16::MAX,
    }
}

/// Changes the order of the records of the type asked for; CNAMEs stay in front, in order.
fn shuffle(answers: &mut [Record], kind: RecordType) {
    if !matches!(kind, RecordType::A | RecordType::AAAA) {
        return;
    }
    let chain = answers
        .iter()
        .take_while(|record| record.record_type() != kind)
        .count();
    if let Some(records) = answers.get_mut(chain..)
        && records.iter().all(|record| record.record_type() == kind)
    {
        fastrand::shuffle(records);
    }
}
