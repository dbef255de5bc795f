//! Everything privileged: the one BPF object, its programs on their hooks, its tables, netlink. Nothing
//! outside of this folder calls aya or opens netlink.

pub mod census;
mod cleanup;
pub mod clock;
mod counters;
pub mod features;
mod flows;
mod links;
mod load;
pub mod lock;
mod map;
mod mapped;
pub mod netlink;
pub mod network;
pub mod object;
mod ports;
mod ring;
pub mod second_lock;
mod sys;
pub mod sysctl;
mod uplinks;

use std::collections::BTreeMap;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use weir_common::Addr;
use weir_common::device::{Device, LocalPod};
use weir_common::nat::{ClusterKey, InCluster, Uplink};
use weir_common::node::NodeConfig;
use weir_common::policy::{Class, PortKey, PortRow, VerdictKey, VerdictRow};
use weir_common::service::{Backend, BackendId, Frontend, FrontendKey, Generation, NodeAddress};

use crate::apply::Origin;

use self::links::Links;
use self::sys::{AttachType, Seat};

pub use self::cleanup::{Cleaned, cleanup};
pub use self::counters::Counters;
pub use self::flows::{Flows, is_expired};
pub use self::links::{LinkError, Placed};
pub use self::load::{Capacities, LoadError, Loaded, pin_path};
pub use self::map::{MapTable, Shape};
pub use self::ring::Ring;

/// The socket hooks: program, and where it sits.
const SOCKET_HOOKS: [(&str, AttachType); 8] = [
    ("weir_connect4", AttachType::CgroupInet4Connect),
    ("weir_connect6", AttachType::CgroupInet6Connect),
    ("weir_sendmsg4", AttachType::CgroupUdp4Sendmsg),
    ("weir_sendmsg6", AttachType::CgroupUdp6Sendmsg),
    ("weir_recvmsg4", AttachType::CgroupUdp4Recvmsg),
    ("weir_recvmsg6", AttachType::CgroupUdp6Recvmsg),
    ("weir_getpeer4", AttachType::CgroupInet4Getpeername),
    ("weir_getpeer6", AttachType::CgroupInet6Getpeername),
];
/// What a pod's packets meet at the node's end of its pair: program, side. What comes in there is what
/// the pod has sent.
const POD_HOOKS: [(&str, AttachType); 2] = [
    ("weir_from_pod", AttachType::TcxIngress),
    ("weir_to_pod", AttachType::TcxEgress),
];
/// What stands there while the pod is set up or taken down.
const PROTECT: &str = "weir_protect";

/// The node's kernel, with our programs loaded.
#[derive(Debug)]
pub struct Kernel {
    loaded: Loaded,
    links: Links,
    cgroup: PathBuf,
}

/// A hook and what is on it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Hook {
    pub name: String,
    /// The program that should be there.
    pub program: &'static str,
    /// What is wrong, in words.
    pub problem: Option<String>,
}

/// Tables of services.
#[derive(Debug)]
pub struct ServiceTables {
    pub frontends: MapTable<FrontendKey, Frontend>,
    pub backends: MapTable<u32, Backend>,
    pub live: MapTable<BackendId, Generation>,
    pub nodes: MapTable<Addr, NodeAddress>,
    pub frontends_are: Origin,
    pub live_is: Origin,
}

/// Tables of policy.
#[derive(Debug)]
pub struct PolicyTables {
    pub classes: MapTable<Addr, Class>,
    pub verdicts: MapTable<VerdictKey, VerdictRow>,
    pub ports: MapTable<PortKey, PortRow>,
    pub epoch: MapTable<u32, u32>,
}

/// Tables of this node's pods.
#[derive(Debug)]
pub struct DeviceTables {
    pub devices: MapTable<u32, Device>,
    pub pods: MapTable<Addr, LocalPod>,
}

/// Tables of the node's uplinks.
#[derive(Debug)]
pub struct UplinkTables {
    pub uplinks: MapTable<u32, Uplink>,
    pub cluster: MapTable<ClusterKey, InCluster>,
}

impl Kernel {
    /// Loads the programs of an object, [`object::OBJECT`] but for tests. Hooks stay as they are until they
    /// are asked for.
    ///
    /// # Errors
    /// See [`LoadError`]; and when the pin folder cannot be made.
    pub fn load(
        object: &[u8],
        bpffs: &Path,
        cgroup: &Path,
        config: NodeConfig,
        capacities: Capacities<'_>,
    ) -> Result<Self> {
        #[cfg(feature = "broken-detach-first")]
        links::detach_all(bpffs)?;
        let loaded = load::load(object, bpffs, config, capacities)?;
        let links = Links::open(bpffs)
            .with_context(|| format!("make the folder of links in {}", bpffs.display()))?;
        Ok(Self {
            loaded,
            links,
            cgroup: cgroup.to_owned(),
        })
    }

    /// Puts the socket hooks on the node's cgroup, in place of older ones.
    ///
    /// # Errors
    /// The kernel refuses one; those before it are new already, and each works by itself.
    pub fn place_socket_hooks(&self) -> Result<()> {
        for (program, attach_type) in SOCKET_HOOKS {
            let fd = self.loaded.program(program)?;
            self.links
                .place_on_cgroup(fd, &self.cgroup, program, attach_type)?;
        }
        Ok(())
    }

    /// Lets nothing pass a pod's device, in either direction. Pinned when it returns.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn protect(&self, device: &str, ifindex: u32) -> Result<()> {
        let program = self.loaded.program(PROTECT)?;
        for (_, side) in POD_HOOKS {
            self.links.place_on_device(program, device, ifindex, side)?;
        }
        Ok(())
    }

    /// Puts the real programs on a pod's device, in place of whatever is there.
    ///
    /// # Errors
    /// The kernel refuses; then a side may still be protected, which is closed.
    pub fn open(&self, device: &str, ifindex: u32) -> Result<()> {
        sysctl::set_pod_device(device)?;
        for (program, side) in POD_HOOKS {
            self.links
                .place_on_device(self.loaded.program(program)?, device, ifindex, side)?;
        }
        Ok(())
    }

    /// Takes the programs off a device that is going. One without programs is no error.
    ///
    /// # Errors
    /// A pin cannot be removed.
    pub fn forget_device(&self, device: &str) -> Result<()> {
        for (_, side) in POD_HOOKS {
            self.links.remove(&self.links.device_pin(device, side))?;
        }
        Ok(())
    }

    /// What of ours is in the kernel beside and before these programs, given our devices by name and
    /// interface index.
    ///
    /// # Errors
    /// The kernel or the pin folder cannot be read.
    pub fn census(&self, devices: &[(String, u32)]) -> Result<Vec<census::Found>> {
        census::take(self.loaded.bpffs(), &self.cgroup, devices)
    }

    /// Every hook that should hold a program, given the open devices with their interface indexes, and the
    /// uplinks.
    pub fn hooks(
        &self,
        devices: impl IntoIterator<Item = (String, u32)>,
        uplinks: &BTreeMap<u32, String>,
    ) -> Vec<Hook> {
        let cgroup = std::fs::metadata(&self.cgroup)
            .map(|found| found.ino())
            .ok();
        let sockets = SOCKET_HOOKS.map(|(program, attach_type)| {
            let pin = self.links.pin(program);
            let is_current = |info: &sys::LinkInfo| {
                cgroup.is_some_and(|id| info.seat() == Seat::Cgroup(id, attach_type))
            };
            self.hook(program.to_owned(), program, &pin, is_current)
        });
        let pods = devices.into_iter().flat_map(|(device, ifindex)| {
            POD_HOOKS.map(|(program, side)| {
                let pin = self.links.device_pin(&device, side);
                let name = pin
                    .file_name()
                    .unwrap_or_default()
                    .to_string_lossy()
                    .into_owned();
                self.hook(name, program, &pin, |info| {
                    info.seat() == Seat::Device(ifindex, side)
                })
            })
        });
        let sockets = sockets.into_iter();
        sockets.chain(pods).chain(self.net_hooks(uplinks)).collect()
    }

    fn hook(
        &self,
        name: String,
        program: &'static str,
        pin: &Path,
        is_current: impl Fn(&sys::LinkInfo) -> bool,
    ) -> Hook {
        let problem = match (self.links.info(pin), self.loaded.program_id(program)) {
            (Err(error), _) if error.kind() == io::ErrorKind::NotFound => {
                Some("no link is pinned: the program is not attached".to_owned())
            }
            (Err(error), _) | (_, Err(error)) => Some(error.to_string()),
            (Ok(info), _) if !is_current(&info) => {
                Some("its link is not on the device or cgroup any more".to_owned())
            }
            (Ok(info), Ok(id)) if info.program != id => {
                Some(format!("holds program {} instead of {id}", info.program))
            }
            (Ok(_), Ok(_)) => None,
        };
        Hook {
            name,
            program,
            problem,
        }
    }

    /// What the verifier visited of each program, and the program's number.
    pub fn programs(&self) -> BTreeMap<String, (u32, Option<u32>)> {
        let known = self.loaded.programs().filter_map(|name| {
            let id = self.loaded.program_id(name).ok()?;
            Some((
                name.to_owned(),
                (id, self.loaded.verified.get(name).copied().flatten()),
            ))
        });
        known.collect()
    }

    /// # Errors
    /// A table is not pinned any more, or is of another layout.
    pub fn service_tables(&self) -> io::Result<ServiceTables> {
        Ok(ServiceTables {
            frontends: self.table("FRONTENDS", Shape::Keyed)?,
            backends: self.table("BACKENDS", Shape::Array)?,
            live: self.table("LIVE", Shape::Array)?,
            nodes: self.table("NODES", Shape::Keyed)?,
            frontends_are: self.origin("FRONTENDS"),
            live_is: self.origin("LIVE"),
        })
    }

    /// # Errors
    /// As [`Self::service_tables`].
    pub fn policy_tables(&self) -> io::Result<PolicyTables> {
        Ok(PolicyTables {
            classes: self.table("CLASSES", Shape::Keyed)?,
            verdicts: self.table("VERDICTS", Shape::Keyed)?,
            ports: self.table("PORTS", Shape::Keyed)?,
            epoch: self.table("EPOCH", Shape::Array)?,
        })
    }

    /// # Errors
    /// As [`Self::service_tables`].
    pub fn device_tables(&self) -> io::Result<DeviceTables> {
        Ok(DeviceTables {
            devices: self.table("DEVICES", Shape::Keyed)?,
            pods: self.table("PODS", Shape::Keyed)?,
        })
    }

    /// # Errors
    /// As [`Self::service_tables`].
    pub fn uplink_tables(&self) -> io::Result<UplinkTables> {
        Ok(UplinkTables {
            uplinks: self.table("UPLINKS", Shape::Keyed)?,
            cluster: self.table("CLUSTER", Shape::Keyed)?,
        })
    }

    /// # Errors
    /// As [`Self::service_tables`].
    pub fn counters(&self) -> io::Result<Counters> {
        Counters::new(self.loaded.table("COUNTERS")?, self.loaded.table("DROPS")?)
    }

    /// # Errors
    /// As [`Self::service_tables`].
    pub fn flows(&self) -> io::Result<Flows> {
        Ok(Flows::new(
            self.loaded.table("FLOWS")?,
            self.loaded.table("HALF_OPEN")?,
            self.loaded.table("NAT_PORTS")?,
        ))
    }

    /// The ring of events; there is one reader.
    ///
    /// # Errors
    /// It was taken already, or cannot be polled.
    pub fn ring(&mut self) -> io::Result<Ring> {
        let map = self.loaded.take_map("EVENTS");
        Ring::new(map.ok_or_else(|| io::Error::other("the ring of events has a reader already"))?)
    }

    fn origin(&self, table: &str) -> Origin {
        match self.loaded.is_created(table) {
            true => Origin::Made,
            false => Origin::Kept,
        }
    }

    fn table<K: map::Plain, V: map::Plain>(
        &self,
        name: &str,
        shape: Shape,
    ) -> io::Result<MapTable<K, V>> {
        MapTable::new(self.loaded.table(name)?, shape)
    }
}
