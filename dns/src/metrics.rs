//! Counters under the names of CoreDNS where it has them, so its dashboards and alerts keep working.

use std::fmt::{self, Write};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use hickory_proto::op::ResponseCode;
use hickory_proto::rr::RecordType;
use prometheus_client::encoding::{EncodeLabelSet, EncodeLabelValue, LabelValueEncoder};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::{Family, MetricConstructor};
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::{Registry, Unit};

use crate::zone::Domain;

/// All counters of the process.
#[derive(Clone, Debug)]
pub struct Metrics {
    requests: Family<RequestLabels, Counter>,
    durations: Family<DurationLabels, Histogram, Durations>,
    request_sizes: Family<SizeLabels, Histogram, Sizes>,
    response_sizes: Family<SizeLabels, Histogram, Sizes>,
    responses: Family<ResponseLabels, Counter>,
    /// Lookups that brought their task down. It must stay 0.
    pub panics: Counter,
    /// Questions refused because too many were under way.
    pub rejects: Counter,
    /// How often the process was killed and its parent started it again.
    pub restarts: Counter,
    /// TCP connections closed at once because there were too many.
    pub connections_refused: Counter,
    /// Services in the zone, set when somebody reads.
    pub services: Gauge,
    /// 1 once a zone is whole, set when somebody reads.
    pub synced: Gauge<u64, AtomicU64>,
    cluster: Text,
    root: Text,
}

/// A label that is known when the process starts.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub struct Text(Arc<str>);

impl Text {
    /// From any text.
    pub fn new(text: &str) -> Self {
        Self(text.into())
    }
}

impl EncodeLabelValue for Text {
    fn encode(&self, encoder: &mut LabelValueEncoder) -> Result<(), fmt::Error> {
        encoder.write_str(&self.0)
    }
}

/// What carries a question.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum Transport {
    Udp,
    Tcp,
}

impl EncodeLabelValue for Transport {
    fn encode(&self, encoder: &mut LabelValueEncoder) -> Result<(), fmt::Error> {
        encoder.write_str(match self {
            Self::Udp => "udp",
            Self::Tcp => "tcp",
        })
    }
}

/// Who answered, by the name of the plugin that does it in CoreDNS.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum Source {
    /// The request filter.
    Filter,
    Zone,
    Upstream,
}

impl EncodeLabelValue for Source {
    fn encode(&self, encoder: &mut LabelValueEncoder) -> Result<(), fmt::Error> {
        encoder.write_str(match self {
            Self::Filter => "",
            Self::Zone => "kubernetes",
            Self::Upstream => "forward",
        })
    }
}

#[derive(Clone, Debug, EncodeLabelSet, Eq, Hash, PartialEq)]
struct RequestLabels {
    server: Text,
    zone: Text,
    view: &'static str,
    proto: Transport,
    /// IANA's number of the address family: 1 or 2.
    family: &'static str,
    r#type: &'static str,
}

#[derive(Clone, Debug, EncodeLabelSet, Eq, Hash, PartialEq)]
struct DurationLabels {
    server: Text,
    zone: Text,
    view: &'static str,
    r#type: &'static str,
}

#[derive(Clone, Debug, EncodeLabelSet, Eq, Hash, PartialEq)]
struct SizeLabels {
    server: Text,
    zone: Text,
    view: &'static str,
    proto: Transport,
}

#[derive(Clone, Debug, EncodeLabelSet, Eq, Hash, PartialEq)]
struct ResponseLabels {
    server: Text,
    zone: Text,
    view: &'static str,
    rcode: &'static str,
    plugin: Source,
}

/// Seconds, the buckets of CoreDNS.
#[derive(Clone, Copy, Debug)]
struct Durations;

impl MetricConstructor<Histogram> for Durations {
    fn new_metric(&self) -> Histogram {
        Histogram::new(exponential_buckets(0.00025, 2.0, 16))
    }
}

/// Bytes, the buckets of CoreDNS.
#[derive(Clone, Copy, Debug)]
struct Sizes;

impl MetricConstructor<Histogram> for Sizes {
    fn new_metric(&self) -> Histogram {
        Histogram::new([
            0.0, 100.0, 200.0, 300.0, 400.0, 511.0, 1023.0, 2047.0, 4095.0, 8291.0, 16e3, 32e3,
            48e3, 64e3,
        ])
    }
}

/// One question and what became of it.
#[derive(Clone, Debug)]
pub struct Exchange<'a> {
    pub server: &'a Text,
    pub transport: Transport,
    pub family: &'static str,
    pub kind: Option<RecordType>,
    pub source: Source,
    pub code: ResponseCode,
    /// Bytes.
    pub request: usize,
    /// Bytes.
    pub response: usize,
    pub took: Duration,
}

impl Metrics {
    /// Counters for a cluster domain, at zero, and the registry that prints them.
    pub fn new(domain: &Domain) -> (Self, Registry) {
        let metrics = Self {
            requests: Family::default(),
            durations: Family::new_with_constructor(Durations),
            request_sizes: Family::new_with_constructor(Sizes),
            response_sizes: Family::new_with_constructor(Sizes),
            responses: Family::default(),
            panics: Counter::default(),
            rejects: Counter::default(),
            restarts: Counter::default(),
            connections_refused: Counter::default(),
            services: Gauge::default(),
            synced: Gauge::default(),
            cluster: Text::new(&domain.name().to_string()),
            root: Text::new("."),
        };
        let mut registry = Registry::default();
        let coredns = registry.sub_registry_with_prefix("coredns");
        coredns.register("panics", "Panics while answering", metrics.panics.clone());
        coredns.register(
            "forward_max_concurrent_rejects",
            "Questions refused because too many were under way",
            metrics.rejects.clone(),
        );
        let dns = coredns.sub_registry_with_prefix("dns");
        dns.register("requests", "Questions", metrics.requests.clone());
        dns.register("responses", "Responses", metrics.responses.clone());
        dns.register_with_unit(
            "request_duration",
            "From question to response",
            Unit::Seconds,
            metrics.durations.clone(),
        );
        dns.register_with_unit(
            "request_size",
            "Size of a question",
            Unit::Bytes,
            metrics.request_sizes.clone(),
        );
        dns.register_with_unit(
            "response_size",
            "Size of a response",
            Unit::Bytes,
            metrics.response_sizes.clone(),
        );
        let weir = registry.sub_registry_with_prefix("weir_dns");
        weir.register("services", "Services in the zone", metrics.services.clone());
        weir.register("synced", "1 once a zone is whole", metrics.synced.clone());
        weir.register(
            "restarts",
            "How often the process was killed and its parent started it again",
            metrics.restarts.clone(),
        );
        weir.register(
            "tcp_connections_refused",
            "TCP connections closed because there were too many",
            metrics.connections_refused.clone(),
        );
        (metrics, registry)
    }

    /// Counts an exchange.
    pub fn count(&self, exchange: &Exchange<'_>) {
        let server = exchange.server.clone();
        let zone = match exchange.source {
            Source::Zone => self.cluster.clone(),
            Source::Filter | Source::Upstream => self.root.clone(),
        };
        let kind = exchange.kind.map_or("other", type_label);
        self.requests
            .get_or_create(&RequestLabels {
                server: server.clone(),
                zone: zone.clone(),
                view: "",
                proto: exchange.transport,
                family: exchange.family,
                r#type: kind,
            })
            .inc();
        self.responses
            .get_or_create(&ResponseLabels {
                server: server.clone(),
                zone: zone.clone(),
                view: "",
                rcode: code_label(exchange.code),
                plugin: exchange.source,
            })
            .inc();
        self.durations
            .get_or_create(&DurationLabels {
                server: server.clone(),
                zone: zone.clone(),
                view: "",
                r#type: kind,
            })
            .observe(exchange.took.as_secs_f64());
        let sizes = SizeLabels {
            server,
            zone,
            view: "",
            proto: exchange.transport,
        };
        self.request_sizes
            .get_or_create(&sizes)
            .observe(exchange.request as f64);
        self.response_sizes
            .get_or_create(&sizes)
            .observe(exchange.response as f64);
    }
}

/// The types that CoreDNS counts apart; the rest is `other`, so a client cannot make labels.
fn type_label(kind: RecordType) -> &'static str {
    match kind {
        RecordType::A => "A",
        RecordType::AAAA => "AAAA",
        RecordType::CNAME => "CNAME",
        RecordType::DNSKEY => "DNSKEY",
        RecordType::DS => "DS",
        RecordType::HTTPS => "HTTPS",
        RecordType::MX => "MX",
        RecordType::NS => "NS",
        RecordType::NSEC => "NSEC",
        RecordType::NSEC3 => "NSEC3",
        RecordType::PTR => "PTR",
        RecordType::RRSIG => "RRSIG",
        RecordType::SOA => "SOA",
        RecordType::SRV => "SRV",
        RecordType::SVCB => "SVCB",
        RecordType::TXT => "TXT",
        _ => "other",
    }
}

fn code_label(code: ResponseCode) -> &'static str {
    match code {
        ResponseCode::NoError => "NOERROR",
        ResponseCode::FormErr => "FORMERR",
        ResponseCode::ServFail => "SERVFAIL",
        ResponseCode::NXDomain => "NXDOMAIN",
        ResponseCode::NotImp => "NOTIMP",
        ResponseCode::Refused => "REFUSED",
        ResponseCode::BADVERS => "BADVERS",
        _ => "OTHER",
    }
}
