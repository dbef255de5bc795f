//! The services' side of the line: what is dirty is planned again. What a plan's rows are is `apply`'s.

use std::time::Instant;

use weir_common::service::{Backend, BackendId, Frontend, FrontendKey, Generation};

use super::machine::Machine;
use super::{DNS_PORT, Dirty, Line};
use crate::apply::{ServiceChange, Services, Status};
use crate::compile::service::{self, DnsRedirect};
use crate::compile::{Owner, host_port};
use crate::conditions::{Condition, ObjectFault, PodFault};

/// The tables of services.
pub(super) type ServiceTables<M> = Services<
    <M as Machine>::Table<FrontendKey, Frontend>,
    <M as Machine>::Table<u32, Backend>,
    <M as Machine>::Table<BackendId, Generation>,
>;

impl<M: Machine> Line<M> {
    /// Plans and writes every service, and the host ports of every pod, that something changed about.
    pub(super) fn pass_services(&mut self, dirty: &Dirty, now: Instant) {
        for namespace in &dirty.namespaces {
            self.zone
                .namespace_changed(self.inputs.snapshot(), namespace);
        }
        let snapshot = self.inputs.snapshot();
        let host_ports = dirty.pods.iter().map(|id| {
            let pod = snapshot
                .pods
                .get(id)
                .filter(|pod| pod.node.as_deref() == Some(&*self.settings.node));
            match pod.and_then(|pod| host_port::compile(pod)) {
                None => ServiceChange::Deleted(Owner::HostPorts(id.clone())),
                Some(plan) => ServiceChange::Planned(plan),
            }
        });
        let host_ports: Vec<_> = host_ports.collect();
        if dirty.services.is_empty() && host_ports.is_empty() {
            return;
        }
        let node = service::NodeView {
            name: &self.settings.node,
            zone: None,
        };
        let dns = DnsRedirect {
            service: self.settings.dns.service.clone(),
            addresses: self.settings.dns.addresses.clone(),
            port: DNS_PORT,
        };
        let services = dirty
            .services
            .iter()
            .map(|id| match snapshot.services.get(id) {
                None => ServiceChange::Deleted(Owner::Service(id.clone())),
                Some(service) => {
                    let slices = snapshot.slices_of(id).map(|slice| &**slice);
                    ServiceChange::Planned(service::compile(service, slices, &node, Some(&dns)))
                }
            });
        let changes: Vec<_> = services.chain(host_ports).collect();
        for id in &dirty.services {
            self.zone.service_changed(snapshot, id);
        }
        self.services.apply(changes, now);
    }

    /// Services and host ports that are understood and could not be written.
    pub(super) fn report_services(&self) {
        let failed = self
            .services
            .statuses()
            .iter()
            .filter_map(|(owner, status)| {
                let Status::Failed(why) = status else {
                    return None;
                };
                Some(match owner {
                    Owner::Service(name) => Condition::object(
                        format!("Service {name}"),
                        ObjectFault::NotWritten,
                        why.as_str(),
                    ),
                    Owner::HostPorts(pod) => {
                        Condition::pod(pod.clone(), PodFault::HostPort, why.as_str())
                    }
                })
            });
        self.said.services.replace(failed);
    }
}
