//! The services' side of the line: what is dirty is planned again. What a plan's rows are is `apply`'s.

use std::time::Instant;

use super::{DNS_PORT, Dirty, Line};
use crate::apply::ServiceChange;
use crate::compile::service::{self, DnsRedirect};
use crate::compile::{Owner, host_port};

impl Line {
    /// Plans and writes every service, and the host ports of every pod, that something changed about.
    pub(super) fn pass_services(&mut self, dirty: &Dirty, now: Instant) {
        let snapshot = self.inputs.snapshot();
        if dirty.namespaces {
            self.zone.everything_changed(snapshot);
        }
        if dirty.nodes {
            self.pass_node_addresses();
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
}
