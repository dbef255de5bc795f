//! What a question about the zone is answered with. Pure: the zone and the question in, records out,
//! in a fixed order (who serves them shuffles).

use std::collections::HashSet;
use std::net::IpAddr;
use std::sync::Arc;

use hickory_proto::rr::rdata::{CNAME, NS, PTR, SOA, SRV, TXT};
use hickory_proto::rr::{Name, RData, Record, RecordType};

use super::name::{Label, Place};
use super::{
    EndpointSet, PortProtocol, ServiceKind, Zone, ZoneEndpoint, ZoneService, address_label,
    is_reverse, label_address, reverse_address,
};

/// The version of the specification that the zone follows.
const SPECIFICATION: &str = "1.1.0";
/// Seconds. The version changes with the binary only.
const VERSION_TTL: u32 = 28_800;
/// How many ExternalNames in a row may lead to each other.
const MAX_CHAIN: usize = 8;
/// How many targets of an SRV answer get their addresses in the additional section.
const MAX_ADDITIONAL_TARGETS: usize = 32;
/// What CoreDNS gives a lone SRV target; several share it.
const SRV_WEIGHT: u16 = 100;

/// What to answer. `chain` is the CNAME records that led here, and usually empty.
#[derive(Clone, Debug, PartialEq)]
pub enum Answer {
    Records {
        chain: Vec<Record>,
        records: Vec<Record>,
        additionals: Vec<Record>,
    },
    /// The name exists, nothing of this type does.
    NoData {
        chain: Vec<Record>,
        soa: Box<Record>,
    },
    /// The name does not exist.
    NxDomain {
        chain: Vec<Record>,
        soa: Box<Record>,
    },
    /// The name leads to one that is not ours.
    Cname { chain: Vec<Record>, target: Name },
    /// The name leads in circles.
    Circle,
    /// Zone transfers.
    Refuse,
    /// The name is not in the zone: somebody else knows.
    NotMine,
}

/// What is at one name, before a CNAME is followed.
enum Found {
    Records(Vec<Record>),
    WithAdditionals(Vec<Record>, Vec<Record>),
    NoData,
    NxDomain,
    Alias(Arc<str>),
}

impl Zone {
    /// Answers a question of class IN.
    pub fn answer(&self, name: &Name, kind: RecordType) -> Answer {
        if matches!(kind, RecordType::AXFR | RecordType::IXFR) {
            return Answer::Refuse;
        }
        if is_reverse(name) {
            return self.answer_reverse(name, kind);
        }
        let mut chain = Vec::new();
        let mut name = name.clone();
        while chain.len() < MAX_CHAIN {
            let Some(place) = self.domain.place(&name) else {
                return match chain.is_empty() {
                    true => Answer::NotMine,
                    false => Answer::Cname {
                        chain,
                        target: name,
                    },
                };
            };
            let soa = || Box::new(self.soa(self.domain.name().clone()));
            match self.look_up(&name, place, kind) {
                Found::Records(records) => return Answer::records(chain, records, Vec::new()),
                Found::WithAdditionals(records, additionals) => {
                    return Answer::records(chain, records, additionals);
                }
                Found::NoData => return Answer::NoData { chain, soa: soa() },
                Found::NxDomain => return Answer::NxDomain { chain, soa: soa() },
                Found::Alias(target) => {
                    let Some(target) = target_name(&target) else {
                        return Answer::NoData { chain, soa: soa() };
                    };
                    let record = self.record(&name, RData::CNAME(CNAME(target.clone())));
                    if kind == RecordType::CNAME {
                        return Answer::records(chain, vec![record], Vec::new());
                    }
                    chain.push(record);
                    name = target;
                }
            }
        }
        Answer::Circle
    }

    /// The start of authority for a zone of this name. Negative answers are kept no longer than
    /// positive ones.
    pub fn soa(&self, zone: Name) -> Record {
        let soa = SOA::new(
            self.below(&["ns", "dns"]),
            self.below(&["hostmaster"]),
            self.serial,
            7200,
            1800,
            86_400,
            self.ttl,
        );
        Record::from_rdata(zone, self.ttl, RData::SOA(soa))
    }

    fn look_up(&self, name: &Name, place: Place, kind: RecordType) -> Found {
        match place {
            Place::Apex => match kind {
                RecordType::SOA => Found::Records(vec![self.soa(name.clone())]),
                RecordType::NS => {
                    let host = NS(self.below(&["ns", "dns"]));
                    Found::Records(vec![self.record(name, RData::NS(host))])
                }
                _ => Found::NoData,
            },
            Place::Version if kind == RecordType::TXT => {
                let text = RData::TXT(TXT::new(vec![SPECIFICATION.to_owned()]));
                Found::Records(vec![Record::from_rdata(name.clone(), VERSION_TTL, text)])
            }
            Place::Version | Place::Branch => Found::NoData,
            Place::NameServer => self.look_up_name_server(name, kind),
            Place::Namespace(namespace) => match self.namespaces.get(namespace.as_str()) {
                Some(_) => Found::NoData,
                None => Found::NxDomain,
            },
            Place::Pod { namespace, address } => self.look_up_pod(name, namespace, address, kind),
            Place::Service { namespace, service } => {
                match self.service(namespace.as_str(), service.as_str()) {
                    Some(service) => self.look_up_service(name, service, kind),
                    None => Found::NxDomain,
                }
            }
            Place::BelowService {
                namespace,
                service,
                label,
            } => match self.service(namespace.as_str(), service.as_str()) {
                Some(service) => self.look_up_below(name, service, label.as_str(), kind),
                None => Found::NxDomain,
            },
            Place::Port {
                namespace,
                service,
                protocol,
                port,
            } => match self.service(namespace.as_str(), service.as_str()) {
                Some(service) => self.look_up_port(name, service, protocol, port, kind),
                None => Found::NxDomain,
            },
            Place::Nowhere => Found::NxDomain,
        }
    }

    /// The zone's name server is the cluster DNS service, under the name every cluster gives it.
    fn look_up_name_server(&self, name: &Name, kind: RecordType) -> Found {
        match self.service("kube-system", "kube-dns").map(|s| &s.kind) {
            Some(ServiceKind::ClusterIp { addresses, .. }) => {
                self.addresses(name, addresses.iter().copied(), kind)
            }
            _ => Found::NoData,
        }
    }

    /// Pod names by address, the mode that CoreDNS calls insecure: the address is taken at its word.
    fn look_up_pod(
        &self,
        name: &Name,
        namespace: Label,
        address: Label,
        kind: RecordType,
    ) -> Found {
        if !self.namespaces.contains_key(namespace.as_str()) {
            return Found::NxDomain;
        }
        match label_address(address.as_str()) {
            Some(address) => self.addresses(name, [address], kind),
            None => Found::NxDomain,
        }
    }

    fn look_up_service(&self, name: &Name, service: &ZoneService, kind: RecordType) -> Found {
        match &service.kind {
            ServiceKind::ClusterIp { addresses, .. } => {
                self.addresses(name, addresses.iter().copied(), kind)
            }
            ServiceKind::Headless { sets } if !has_endpoints(sets) => Found::NxDomain,
            ServiceKind::Headless { sets } => {
                self.addresses(name, endpoints(sets).map(|e| e.address), kind)
            }
            ServiceKind::ExternalName { target } => Found::Alias(target.clone()),
        }
    }

    fn look_up_below(
        &self,
        name: &Name,
        service: &ZoneService,
        label: &str,
        kind: RecordType,
    ) -> Found {
        if label.starts_with('_') {
            let above_a_port = match &service.kind {
                ServiceKind::ClusterIp { ports, .. } => {
                    ports.iter().any(|port| port.protocol.label() == label)
                }
                ServiceKind::Headless { sets } => sets
                    .iter()
                    .filter(|set| !set.endpoints.is_empty())
                    .flat_map(|set| &set.ports)
                    .any(|port| port.protocol.label() == label),
                ServiceKind::ExternalName { .. } => false,
            };
            return match above_a_port {
                true => Found::NoData,
                false => Found::NxDomain,
            };
        }
        let ServiceKind::Headless { sets } = &service.kind else {
            return Found::NxDomain;
        };
        let spelled = label_address(label);
        let named: Vec<IpAddr> = endpoints(sets)
            .filter(|endpoint| match &endpoint.hostname {
                Some(hostname) => **hostname == *label,
                None => Some(endpoint.address) == spelled,
            })
            .map(|endpoint| endpoint.address)
            .collect();
        match named.is_empty() {
            true => Found::NxDomain,
            false => self.addresses(name, named, kind),
        }
    }

    fn look_up_port(
        &self,
        name: &Name,
        service: &ZoneService,
        protocol: Label,
        port: Label,
        kind: RecordType,
    ) -> Found {
        let Some(port) = port.as_str().strip_prefix('_') else {
            return Found::NxDomain;
        };
        let matches =
            |name: &str, of: PortProtocol| name == port && of.label() == protocol.as_str();
        let service_name = || self.service_dns_name(service);
        let mut targets: Vec<(Name, u16)> = Vec::new();
        let mut additionals = Vec::new();
        match &service.kind {
            ServiceKind::ClusterIp { addresses, ports } => {
                for port in ports.iter().filter(|p| matches(&p.name, p.protocol)) {
                    targets.push((service_name(), port.port));
                }
                if !targets.is_empty() {
                    let target = service_name();
                    additionals.extend(addresses.iter().map(|a| self.address(&target, *a)));
                }
            }
            ServiceKind::Headless { sets } => {
                let base = service_name();
                let mut seen = HashSet::new();
                for set in sets {
                    for port in set.ports.iter().filter(|p| matches(&p.name, p.protocol)) {
                        for endpoint in &set.endpoints {
                            let Some(target) = endpoint_dns_name(&base, endpoint) else {
                                continue;
                            };
                            if targets.len() < MAX_ADDITIONAL_TARGETS {
                                additionals.push(self.address(&target, endpoint.address));
                            }
                            // An endpoint of both families has one name in two slices.
                            if seen.insert((target.clone(), port.port)) {
                                targets.push((target, port.port));
                            }
                        }
                    }
                }
            }
            ServiceKind::ExternalName { .. } => {}
        }
        if targets.is_empty() {
            return Found::NxDomain;
        }
        if kind != RecordType::SRV {
            return Found::NoData;
        }
        let share = u16::try_from(targets.len()).map_or(1, |count| (SRV_WEIGHT / count).max(1));
        let records = targets
            .into_iter()
            .map(|(target, port)| self.record(name, RData::SRV(SRV::new(0, share, port, target))))
            .collect();
        Found::WithAdditionals(records, additionals)
    }

    fn answer_reverse(&self, name: &Name, kind: RecordType) -> Answer {
        let Some(address) = reverse_address(name) else {
            return Answer::NotMine;
        };
        let Some(owners) = self.owners.get(&address) else {
            return Answer::NotMine;
        };
        if kind != RecordType::PTR {
            let labels = name.num_labels();
            let zone = name.trim_to(usize::from(labels.min(2)));
            return Answer::NoData {
                chain: Vec::new(),
                soa: Box::new(self.soa(zone)),
            };
        }
        let mut targets: Vec<Name> = Vec::new();
        for owner in owners.as_slice() {
            let Some(service) = self.service(&owner.namespace, &owner.name) else {
                continue;
            };
            let base = self.service_dns_name(service);
            match &service.kind {
                ServiceKind::Headless { sets } => {
                    for endpoint in endpoints(sets).filter(|e| e.address == address) {
                        targets.extend(endpoint_dns_name(&base, endpoint));
                    }
                }
                _ => targets.push(base),
            }
        }
        let mut seen = HashSet::new();
        targets.retain(|target| seen.insert(target.clone()));
        let records = targets
            .into_iter()
            .map(|target| self.record(name, RData::PTR(PTR(target))))
            .collect();
        Answer::records(Vec::new(), records, Vec::new())
    }

    fn addresses(
        &self,
        name: &Name,
        addresses: impl IntoIterator<Item = IpAddr>,
        kind: RecordType,
    ) -> Found {
        if !matches!(kind, RecordType::A | RecordType::AAAA) {
            return Found::NoData;
        }
        let mut seen = HashSet::new();
        let records: Vec<Record> = addresses
            .into_iter()
            .filter(|address| address.is_ipv4() == (kind == RecordType::A))
            .filter(|address| seen.insert(*address))
            .map(|address| self.address(name, address))
            .collect();
        match records.is_empty() {
            true => Found::NoData,
            false => Found::Records(records),
        }
    }

    fn address(&self, name: &Name, address: IpAddr) -> Record {
        self.record(name, RData::from(address))
    }

    fn record(&self, name: &Name, content: RData) -> Record {
        Record::from_rdata(name.clone(), self.ttl, content)
    }

    /// A name below the apex, from labels that are known to fit.
    fn below(&self, labels: &[&str]) -> Name {
        labels
            .iter()
            .rev()
            .try_fold(self.domain.name().clone(), |name, label| {
                name.prepend_label(*label)
            })
            .unwrap_or_else(|_| self.domain.name().clone())
    }

    fn service_dns_name(&self, service: &ZoneService) -> Name {
        self.below(&[&service.name.name, &service.name.namespace, "svc"])
    }
}

impl Answer {
    fn records(chain: Vec<Record>, records: Vec<Record>, additionals: Vec<Record>) -> Self {
        Self::Records {
            chain,
            records,
            additionals,
        }
    }
}

fn has_endpoints(sets: &[EndpointSet]) -> bool {
    sets.iter().any(|set| !set.endpoints.is_empty())
}

fn endpoints(sets: &[EndpointSet]) -> impl Iterator<Item = &ZoneEndpoint> {
    sets.iter().flat_map(|set| &set.endpoints)
}

fn endpoint_dns_name(service: &Name, endpoint: &ZoneEndpoint) -> Option<Name> {
    match &endpoint.hostname {
        Some(hostname) => service.prepend_label(&**hostname).ok(),
        None => service.prepend_label(address_label(endpoint.address)).ok(),
    }
}

fn target_name(text: &str) -> Option<Name> {
    let mut name = Name::from_ascii(text).ok()?;
    if name.is_root() || name.num_labels() == 0 {
        return None;
    }
    name.set_fqdn(true);
    Some(name)
}
