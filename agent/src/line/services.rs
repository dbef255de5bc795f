//! The services' side of the line: what is dirty is planned again. Who has an address is `compile`'s, and what a
//! plan's rows are `apply`'s.

use std::time::Instant;

use weir_common::service::{Backend, BackendId, Frontend, FrontendKey, Generation};

use super::machine::Machine;
use super::{DNS_PORT, Dirty, Line};
use crate::apply;
use crate::compile::claims::{Claims, Delta};
use crate::compile::dns_service::{DnsService, DnsServices};
use crate::compile::service::{self, DnsRedirect};
use crate::compile::{Owner, host_port};
use crate::conditions::services::{say_failure, say_reports};
use crate::conditions::{Condition, NodeFault};
use crate::model::ObjectName;

/// The tables of services.
pub(super) type ServiceTables<M> = apply::Services<
    <M as Machine>::Table<FrontendKey, Frontend>,
    <M as Machine>::Table<u32, Backend>,
    <M as Machine>::Table<BackendId, Generation>,
>;

/// The state of services.
#[derive(Debug)]
pub(super) struct Services<M: Machine> {
    /// Which one is the cluster's DNS.
    dns: DnsServices,
    pub(super) claims: Claims,
    pub(super) tables: ServiceTables<M>,
}

impl<M: Machine> Services<M> {
    /// `dns` is the Service that is meant to be the cluster's DNS.
    pub(super) fn resume(tables: ServiceTables<M>, dns: ObjectName) -> Self {
        Self {
            dns: DnsServices::new(dns),
            claims: Claims::resume(tables.held()),
            tables,
        }
    }
}

impl<M: Machine> Line<M> {
    /// Plans and writes every service, and the host ports of every pod, that something changed about.
    pub(super) fn pass_services(&mut self, dirty: &Dirty, now: Instant) {
        let snapshot = self.inputs.snapshot();
        for namespace in &dirty.namespaces {
            self.zone.namespace_changed(snapshot, namespace);
        }
        let node = service::NodeView {
            name: &self.settings.node,
            zone: None,
            external_ips: &self.settings.external_ip_ranges,
        };
        let dns = &mut self.services.dns;
        let mut changed = dirty.services.clone();
        for id in &dirty.services {
            let service = snapshot.services.get(id).map(|service| &**service);
            changed.extend(dns.take(id, service));
        }
        let dns = dns.service().map(|service| DnsRedirect {
            service: service.clone(),
            addresses: self.settings.dns.addresses.clone(),
            port: DNS_PORT,
        });
        let services = changed.iter().map(|id| {
            let plan = snapshot.services.get(id).map(|service| {
                let slices = snapshot.slices_of(id).map(|slice| &**slice);
                service::compile(service, slices, &node, dns.as_ref())
            });
            (Owner::Service(id.clone()), plan)
        });
        let host_ports = dirty.pods.iter().map(|id| {
            let pod = snapshot
                .pods
                .get(id)
                .filter(|pod| pod.node.as_deref() == Some(&*self.settings.node));
            let plan = pod.and_then(|pod| host_port::compile(pod));
            (Owner::HostPorts(id.clone()), plan)
        });
        let claims = &mut self.services.claims;
        let mut delta = Delta::default();
        for (owner, plan) in services.chain(host_ports) {
            delta.extend(claims.update(&owner, plan));
        }
        if snapshot.is_complete() {
            delta.extend(claims.everything_said());
        }
        for id in &dirty.services {
            self.zone.service_changed(snapshot, id);
        }
        for (owner, reports) in &delta.reports {
            say_reports(&self.said.claims, owner, reports);
        }
        if !delta.plans.is_empty() {
            self.services.tables.apply(delta.plans, now);
        }
    }

    /// Services and host ports that are understood and could not be written.
    pub(super) fn report_services(&mut self) {
        for (owner, failure) in self.services.tables.take_news() {
            say_failure(&self.said.services, &owner, failure);
        }
        let missing = match self.services.dns.answer() {
            DnsService::Missing(missing) if self.is_complete => Some(missing.to_string()),
            _ => None,
        };
        let condition = missing.map(|why| Condition::node(NodeFault::DnsServiceMissing, why));
        self.said.dns.replace(condition);
    }
}
