//! The services' side of the line: what is dirty is planned again. What a plan's rows are is `apply`'s.

use std::time::Instant;

use tracing::warn;

use super::{DNS_PORT, Dirty, Line};
use crate::compile::claims::Delta;
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
        let node = service::NodeView {
            name: &self.settings.node,
            zone: None,
            external_ips: &self.settings.external_ip_ranges,
        };
        let dns = DnsRedirect {
            service: self.settings.dns.service.clone(),
            addresses: self.settings.dns.addresses.clone(),
            port: DNS_PORT,
        };
        let services = dirty.services.iter().map(|id| {
            let plan = snapshot.services.get(id).map(|service| {
                let slices = snapshot.slices_of(id).map(|slice| &**slice);
                service::compile(service, slices, &node, Some(&dns))
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
        let mut delta = Delta::default();
        for (owner, plan) in services.chain(host_ports) {
            delta.extend(self.claims.update(&owner, plan));
        }
        if snapshot.is_complete() {
            delta.extend(self.claims.everything_said());
        }
        for id in &dirty.services {
            self.zone.service_changed(snapshot, id);
        }
        for (owner, reports) in &delta.reports {
            for report in reports {
                warn!(%owner, %report, "a part of it is left out");
            }
        }
        if !delta.plans.is_empty() {
            self.services.apply(delta.plans, now);
        }
    }
}
