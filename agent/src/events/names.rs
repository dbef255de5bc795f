//! Who has an address: what events and flows are named by. Made anew when pods or services change, and
//! read without a lock.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};

use weir_cli::views::FlowEnd;

use crate::model::{PodNetwork, PodPhase, ServiceKind, Snapshot};

/// Names by address, and devices by interface index.
#[derive(Clone, Debug, Default)]
pub struct Names {
    addresses: HashMap<IpAddr, String>,
    devices: HashMap<u32, String>,
}

impl Names {
    /// Everything that has an address in the snapshot: pods first, then services, then nodes.
    pub fn of(snapshot: &Snapshot, devices: impl IntoIterator<Item = (u32, String)>) -> Self {
        let mut addresses = HashMap::new();
        for node in snapshot.nodes.values() {
            for address in &node.addresses {
                addresses.insert(*address, format!("node {}", node.name));
            }
        }
        for service in snapshot.services.values() {
            if let ServiceKind::ClusterIp(ips) = &service.kind {
                addresses.extend(
                    ips.iter()
                        .map(|ip| (*ip, format!("service {}", service.id))),
                );
            }
        }
        for pod in snapshot.pods.values() {
            if pod.network == PodNetwork::Own && pod.phase != PodPhase::Finished {
                addresses.extend(pod.addresses.iter().map(|ip| (*ip, pod.id.to_string())));
            }
        }
        Self {
            addresses,
            devices: devices.into_iter().collect(),
        }
    }

    /// Who has the address, if anybody known does.
    pub fn of_address(&self, address: IpAddr) -> Option<&str> {
        self.addresses.get(&address).map(String::as_str)
    }

    /// The name of the device with this index on this node.
    pub fn device(&self, ifindex: u32) -> String {
        self.devices
            .get(&ifindex)
            .cloned()
            .unwrap_or_else(|| format!("ifindex {ifindex}"))
    }

    /// One end of a flow or a drop.
    pub fn end(&self, end: SocketAddr) -> FlowEnd {
        FlowEnd {
            address: end.ip(),
            port: end.port(),
            name: self.of_address(end.ip()).map(ToOwned::to_owned),
        }
    }
}
