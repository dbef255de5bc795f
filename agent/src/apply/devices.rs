//! The pods of this node: from leases and rule lists to rows of `DEVICES` and `PODS`. Where leases come
//! from, and programs on devices, are not here.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{Ipv4Addr, Ipv6Addr};

use weir_common::device::{Device, DeviceFlags, LocalPod};
use weir_common::{Addr, Mac};

use super::status::{Fill, Status};
use super::table::{Comparison, KernelTable, Table, TableError};
use crate::compile::PodRules;
use crate::model::ObjectName;

/// What a pod of this node has been given.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct PodLease {
    pub pod: ObjectName,
    /// Of the host's end of its veth pair.
    pub ifindex: u32,
    pub ipv4: Option<Ipv4Addr>,
    pub ipv6: Option<Ipv6Addr>,
    /// The pod's own.
    pub mac: Mac,
}

/// All pods of the node. A pod gets its row in `DEVICES`, and so passes its first packet, once its rule
/// lists are known.
#[derive(Debug)]
pub struct Devices<D, P> {
    devices: Table<u32, Device, D>,
    pods: Table<Addr, LocalPod, P>,
    leases: BTreeMap<u32, PodLease>,
    rules: BTreeMap<ObjectName, PodRules>,
    /// Those whose established connections go on.
    keeping: BTreeSet<ObjectName>,
    statuses: BTreeMap<u32, Status>,
}

/// What a pass over both tables did.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct DevicePass {
    /// Rows written or removed.
    pub rows: usize,
    pub outcome: Outcome,
}

/// Does the kernel hold every row as it should?
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Outcome {
    Complete,
    Unfinished,
}

impl<D, P> Devices<D, P>
where
    D: KernelTable<u32, Device>,
    P: KernelTable<Addr, LocalPod>,
{
    /// Starts from what the kernel holds. Rows stay until [`Devices::desire_leases`] is called first.
    ///
    /// # Errors
    /// A table could not be read.
    pub fn resume(devices: D, pods: P) -> Result<Self, TableError> {
        Ok(Self {
            devices: Table::resume("DEVICES", devices)?,
            pods: Table::resume("PODS", pods)?,
            leases: BTreeMap::new(),
            rules: BTreeMap::new(),
            keeping: BTreeSet::new(),
            statuses: BTreeMap::new(),
        })
    }

    /// Exactly these leases exist. They are durable and local, so nothing has to be waited for.
    pub fn desire_leases(&mut self, leases: impl IntoIterator<Item = PodLease>) {
        self.leases = leases.into_iter().map(|l| (l.ifindex, l)).collect();
        let pods: BTreeMap<Addr, LocalPod> = self
            .leases
            .values()
            .flat_map(|lease| {
                let row = LocalPod {
                    ifindex: lease.ifindex,
                    flags: 0,
                };
                [v4(lease), v6(lease)].map(|addr| (addr, row))
            })
            .filter(|(addr, _)| *addr != Addr::ABSENT)
            .collect();
        self.pods.desire_exactly(pods);
        self.desire_devices();
    }

    /// Which rule lists hold for which pod. A pod that is not named has none yet and stays closed.
    pub fn desire_rules(&mut self, rules: &BTreeMap<ObjectName, PodRules>) {
        if self.rules != *rules {
            self.rules.clone_from(rules);
        }
        self.desire_devices();
    }

    /// The established connections of these go on, whatever policy says of them later.
    pub fn keep_established(&mut self, pods: BTreeSet<ObjectName>) {
        self.keeping = pods;
        self.desire_devices();
    }

    /// Will the next [`Devices::write`] change what flows were judged by, or where they lead? Only the row
    /// of a device that had none is news to no flow.
    pub fn outdates_flows(&self) -> bool {
        let replaces_device = |(ifindex, _): &(u32, Device)| self.devices.actual(ifindex).is_some();
        self.devices.to_write().iter().any(replaces_device)
            || !self.devices.to_remove().is_empty()
            || !self.pods.to_write().is_empty()
            || !self.pods.to_remove().is_empty()
    }

    /// Writes the difference: an address leads nowhere before its device loses its row, and a device
    /// has its row before an address leads to it.
    pub fn write(&mut self) -> DevicePass {
        let mut rows = 0;
        let mut failures = 0;
        let passes = [self.pods.remove_stale().counts()]
            .into_iter()
            .chain([self.devices.remove_stale().counts()])
            .chain([self.devices.write().counts()])
            .chain([self.pods.write().counts()]);
        for (written, failed) in passes {
            rows += written;
            failures += failed;
        }
        self.report();
        DevicePass {
            rows,
            outcome: if failures == 0 {
                Outcome::Complete
            } else {
                Outcome::Unfinished
            },
        }
    }

    /// Reads the tables again: how many rows were not as we believed. The next [`Devices::write`]
    /// repairs them.
    ///
    /// # Errors
    /// A table could not be read.
    pub fn audit(&mut self) -> Result<usize, TableError> {
        Ok(self.devices.audit()?.rows() + self.pods.audit()?.rows())
    }

    /// Desired against kernel, by table. Changes nothing.
    ///
    /// # Errors
    /// A table could not be read.
    pub fn compare(&mut self) -> Result<[(&'static str, Comparison); 2], TableError> {
        Ok([
            (self.devices.name(), self.devices.compare()?),
            (self.pods.name(), self.pods.compare()?),
        ])
    }

    /// How far the pod behind a device is, by its interface index; `None` for one without a lease.
    /// [`Status::Done`] once its packets are judged by its policy.
    pub fn status(&self, ifindex: u32) -> Option<&Status> {
        self.statuses.get(&ifindex)
    }

    /// Does the kernel hold nothing of a pod that has been withdrawn?
    pub fn is_gone(&self, ifindex: u32, addresses: impl IntoIterator<Item = Addr>) -> bool {
        let mut addresses = addresses.into_iter();
        let leads_there = |row: LocalPod| row.ifindex == ifindex;
        self.devices.actual(&ifindex).is_none()
            && addresses.all(|addr| !self.pods.actual(&addr).is_some_and(leads_there))
    }

    /// How full the two tables are.
    pub fn fills(&self) -> [Fill; 2] {
        [self.devices.fill(), self.pods.fill()]
    }

    fn desire_devices(&mut self) {
        let rows: Vec<(u32, Device)> = self
            .leases
            .values()
            .filter_map(|lease| Some((lease.ifindex, self.device(lease)?)))
            .collect();
        self.devices.desire_exactly(rows);
    }

    /// A pod whose rule lists nobody has said since the start keeps those that the kernel holds for
    /// the very same lease.
    fn device(&self, lease: &PodLease) -> Option<Device> {
        let held = self
            .devices
            .actual(&lease.ifindex)
            .filter(|row| row.ipv4 == v4(lease) && row.ipv6 == v6(lease) && row.mac == lease.mac);
        let rules = self.rules.get(&lease.pod).copied().or_else(|| {
            held.map(|row| PodRules {
                ingress: row.ingress,
                egress: row.egress,
            })
        })?;
        Some(Device {
            ipv4: v4(lease),
            ipv6: v6(lease),
            mac: lease.mac,
            ingress: rules.ingress,
            egress: rules.egress,
            flags: match self.keeping.contains(&lease.pod) {
                true => DeviceFlags::KEEPS_ESTABLISHED,
                false => DeviceFlags::default(),
            },
            ..Device::default()
        })
    }

    fn report(&mut self) {
        self.statuses = self
            .leases
            .values()
            .map(|lease| {
                let addrs = [v4(lease), v6(lease)];
                let reached = addrs.iter().all(|addr| self.pods.is_settled(addr));
                let status = match self.devices.desired(&lease.ifindex) {
                    None => Status::Pending,
                    Some(_) if reached && self.devices.is_settled(&lease.ifindex) => Status::Done,
                    Some(_) => Status::Failed("its rows could not be written".into()),
                };
                (lease.ifindex, status)
            })
            .collect();
    }
}

fn v4(lease: &PodLease) -> Addr {
    lease.ipv4.map_or(Addr::ABSENT, Addr::from)
}

fn v6(lease: &PodLease) -> Addr {
    lease.ipv6.map_or(Addr::ABSENT, Addr::from)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use weir_common::policy::RulesId;
    use weir_common::{Addr, Mac};

    use super::{Devices, Outcome, PodLease};
    use crate::apply::Status;
    use crate::apply::fake::{FakeTable, FaultyTable};
    use crate::compile::PodRules;
    use crate::model::ObjectName;

    fn lease(n: u8) -> PodLease {
        PodLease {
            pod: ObjectName::new("default", format!("p{n}")),
            ifindex: 100 + u32::from(n),
            ipv4: Some([10, 0, 0, n].into()),
            ipv6: None,
            mac: Mac([2, 0, 0, 0, 0, n]),
        }
    }

    fn rules(n: u8, ingress: u32) -> BTreeMap<ObjectName, PodRules> {
        let rules = PodRules {
            ingress: RulesId(ingress),
            egress: RulesId::OPEN,
        };
        BTreeMap::from([(lease(n).pod, rules)])
    }

    #[test]
    fn a_pod_passes_nothing_until_its_rules_are_known() {
        let (devices, pods) = (FakeTable::empty(8), FakeTable::empty(8));
        let mut subject = Devices::resume(devices.clone(), pods.clone()).unwrap();
        subject.desire_leases([lease(1)]);
        subject.write();
        assert!(devices.rows().is_empty());
        assert_eq!(subject.status(101), Some(&Status::Pending));
        subject.desire_rules(&rules(1, 7));
        subject.write();
        assert_eq!(devices.rows()[&101].ingress, RulesId(7));
        assert_eq!(subject.status(101), Some(&Status::Done));
        assert_eq!(pods.rows()[&Addr::v4([10, 0, 0, 1])].ifindex, 101);
    }

    #[test]
    fn a_restart_keeps_the_rules_of_the_same_lease_and_of_no_other() {
        let (devices, pods) = (FakeTable::empty(8), FakeTable::empty(8));
        let mut subject = Devices::resume(devices.clone(), pods.clone()).unwrap();
        subject.desire_leases([lease(1)]);
        subject.desire_rules(&rules(1, 7));
        subject.write();
        let writes = devices.writes() + pods.writes();

        let mut again = Devices::resume(devices.clone(), pods.clone()).unwrap();
        again.desire_leases([lease(1)]);
        again.write();
        assert_eq!(devices.writes() + pods.writes(), writes);

        let mut other = Devices::resume(devices.clone(), pods).unwrap();
        other.desire_leases([PodLease {
            mac: Mac([2, 0, 0, 0, 0, 9]),
            ..lease(1)
        }]);
        other.write();
        assert!(devices.rows().is_empty());
    }

    #[test]
    fn a_flow_is_outdated_by_every_change_but_the_row_of_a_new_device() {
        let mut subject = Devices::resume(FakeTable::empty(8), FakeTable::empty(8)).unwrap();
        let elsewhere = PodLease {
            ifindex: 150,
            ..lease(1)
        };
        let steps: [(&str, &[PodLease], u32, bool); 6] = [
            ("an address leads to a pod", &[lease(1)], 7, true),
            (
                "its rules are known: nothing passed before",
                &[lease(1)],
                7,
                false,
            ),
            ("other rules", &[lease(1)], 8, true),
            ("nothing new", &[lease(1)], 8, false),
            ("the address leads to another device", &[elsewhere], 8, true),
            ("the pod is gone", &[], 8, true),
        ];
        for (at, (what, leases, ingress, outdated)) in steps.into_iter().enumerate() {
            subject.desire_leases(leases.iter().cloned());
            if at > 0 {
                subject.desire_rules(&rules(1, ingress));
            }
            assert_eq!(subject.outdates_flows(), outdated, "{what}");
            subject.write();
        }
    }

    #[test]
    fn a_lease_that_ends_takes_its_rows_with_it_however_often_the_kernel_fails() {
        let (devices, pods) = (FakeTable::empty(8), FakeTable::empty(8));
        let mut subject = Devices::resume(
            FaultyTable::new(devices.clone(), 2),
            FaultyTable::new(pods.clone(), 3),
        )
        .unwrap();
        subject.desire_leases([lease(1), lease(2)]);
        subject.desire_rules(&rules(2, 7));
        for _ in 0..8 {
            subject.write();
        }
        assert_eq!((devices.rows().len(), pods.rows().len()), (1, 2));
        subject.desire_leases([]);
        let last = (0..8).map(|_| subject.write()).last().unwrap();
        assert_eq!(last.outcome, Outcome::Complete);
        assert!(devices.rows().is_empty() && pods.rows().is_empty());
    }
}
