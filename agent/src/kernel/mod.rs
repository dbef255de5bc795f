//! Everything privileged: the one BPF object, its programs on their hooks, its tables, netlink. Nothing
//! outside of this folder calls aya or opens netlink.

mod adopt;
mod block;
pub mod census;
mod cleanup;
pub mod clock;
pub mod connected;
mod counters;
pub mod features;
mod flows;
mod former;
mod heaviest;
mod hostnet_ports;
mod links;
mod load;
pub mod lock;
mod map;
mod mapped;
pub mod netlink;
pub mod network;
pub mod object;
mod ring;
pub mod second_lock;
mod shares;
mod sys;
pub mod sysctl;
mod tally;
mod tc;
mod unused_ports;
mod uplinks;

use std::collections::BTreeMap;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};
use weir_common::device::{Device, LocalPod};
use weir_common::nat::{InCluster, Uplink};
use weir_common::node::{Features, NodeConfig};
use weir_common::policy::{Class, PortKey, PortRow, VerdictKey, VerdictRow};
use weir_common::service::{
    Backend, BackendId, Frontend, FrontendKey, Generation, NodeAddress, NodeFlags,
};
use weir_common::{Addr, Prefix};

use crate::apply::{KernelTable as _, Origin};

use self::former::Former;
use self::links::Links;
use self::sys::{AttachType, Seat};
use self::tc::Tc;
use self::unused_ports::Ports;

pub use self::block::{DeviceFault, DeviceProblem};
pub use self::cleanup::{Cleaned, cleanup};
pub use self::connected::Connected;
pub use self::counters::Counters;
pub use self::flows::{Conversation, Flows};
pub use self::links::{LinkError, Placed};
pub use self::load::{Capacities, LoadError, Loaded, pin_path};
pub use self::map::{MapTable, Shape};
pub use self::ring::Ring;
pub use self::shares::Shares;
pub use self::tally::Tally;

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
/// How the names of our programs begin.
const PROGRAM_PREFIX: &str = "weir_";

/// The node's kernel, with our programs loaded.
#[derive(Debug)]
pub struct Kernel {
    loaded: Loaded,
    links: Links,
    former: Former,
    tc: Tc,
    cgroup: PathBuf,
    /// Are our programs on every hook, and do they know what those of an earlier agent knew? Until then what that one has
    /// left is in use.
    has_taken_over: AtomicBool,
    /// Does what pods send out of the cluster leave with the node's address?
    masquerades: bool,
    unused_ports: Ports,
}

/// Every hook that should hold a program.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Hooks {
    /// Those that the whole node depends on.
    pub node: Vec<Hook>,
    /// Pods' devices that our programs do not see, each the fault of one pod.
    pub devices: Vec<DeviceProblem>,
}

/// A hook of the node and what is on it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Hook {
    pub name: String,
    pub of: HookOf,
    /// The program that should be there.
    pub program: &'static str,
    /// What is wrong, in words.
    pub problem: Option<String>,
}

/// What a hook of the node is for.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum HookOf {
    /// Processes of the node, by its cgroup.
    Sockets,
    /// All pods.
    Pods,
    Uplink,
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
    pub cidrs: MapTable<Prefix, Class>,
    pub verdicts: MapTable<VerdictKey, VerdictRow>,
    pub ports: MapTable<PortKey, PortRow>,
    pub epoch: MapTable<u32, u32>,
    pub origin: Origin,
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
    pub cluster: MapTable<Prefix, InCluster>,
}

impl Hooks {
    /// All in one list, in which a device without our programs is two hooks, one for each side.
    pub fn into_list(self) -> Vec<Hook> {
        let mut list = self.node;
        for it in self.devices {
            list.extend(block::POD_HOOKS.map(|(program, side)| Hook {
                name: format!("{}{}", it.device, side.suffix()),
                of: HookOf::Pods,
                program,
                problem: Some(it.problem.to_string()),
            }));
        }
        list
    }
}

impl Hook {
    /// For a kernel that cannot be asked.
    pub fn unknown(error: &io::Error) -> Self {
        Self {
            name: "pods".to_owned(),
            of: HookOf::Pods,
            program: block::POD_HOOKS[0].0,
            problem: Some(format!("the devices cannot be asked for: {error}")),
        }
    }
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
        let tc = Tc::open().context("open a netlink socket")?;
        #[cfg(feature = "broken-detach-first")]
        block::detach_all(&tc, bpffs)?;
        let loaded = load::load(object, bpffs, config, capacities)?;
        let links = Links::open(bpffs)
            .with_context(|| format!("make the folder of links in {}", bpffs.display()))?;
        hostnet_ports::begin(&loaded).context("begin HOSTNET_PORTS")?;
        let unused_ports = Ports::begin(&loaded, &links).context("begin UNUSED_PORTS")?;
        Ok(Self {
            unused_ports,
            loaded,
            links,
            former: Former::new(bpffs),
            tc,
            cgroup: cgroup.to_owned(),
            has_taken_over: AtomicBool::new(false),
            masquerades: config.features & Features::MASQUERADE != 0,
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
        let noted = self.unused_ports.note_keepers(&self.loaded);
        noted.context("note which programs keep UNUSED_PORTS")
    }

    /// What of ours is in the kernel beside and before these programs, given our devices by name and
    /// interface index.
    ///
    /// # Errors
    /// The kernel or the pin folder cannot be read.
    pub fn census(&self, devices: &[(String, u32)]) -> Result<Vec<census::Found>> {
        let former = match self.has_taken_over.load(Ordering::Relaxed) {
            true => census::FormerLinks::Left,
            false => census::FormerLinks::InUse,
        };
        census::take(&self.tc, self.loaded.bpffs(), &self.cgroup, devices, former)
    }

    /// Every hook that should hold a program, given the devices of pods with their interface indexes, and the
    /// uplinks.
    ///
    /// # Errors
    /// The kernel cannot be asked for the devices.
    pub fn hooks(
        &self,
        devices: impl IntoIterator<Item = (String, u32)>,
        uplinks: &BTreeMap<u32, String>,
    ) -> io::Result<Hooks> {
        let devices: Vec<_> = devices.into_iter().collect();
        let mut node: Vec<_> = SOCKET_HOOKS
            .iter()
            .map(|(program, attach_type)| self.socket_hook(program, *attach_type))
            .collect();
        let pods = devices.len();
        let devices = self.device_problems(devices)?;
        // Without a device in them there are no blocks.
        if devices.len() < pods {
            node.extend(self.pod_hooks());
        }
        node.extend(self.net_hooks(uplinks));
        Ok(Hooks { node, devices })
    }

    fn socket_hook(&self, program: &'static str, attach_type: AttachType) -> Hook {
        let cgroup = std::fs::metadata(&self.cgroup).map(|found| found.ino());
        let info = self.links.info(&self.links.pin(program));
        let problem = match (info, self.loaded.program_id(program), cgroup) {
            (Err(error), ..) if error.kind() == io::ErrorKind::NotFound => {
                Some("no link is pinned: the program is not attached".to_owned())
            }
            (Err(error), ..) | (_, Err(error), _) | (.., Err(error)) => Some(error.to_string()),
            (Ok(info), _, Ok(id)) if info.seat() != Seat::Cgroup(id, attach_type) => {
                Some("its link is not on the node's cgroup any more".to_owned())
            }
            (Ok(info), Ok(id), _) if info.program != id => {
                Some(format!("holds program {} instead of {id}", info.program))
            }
            (Ok(_), Ok(_), Ok(_)) => None,
        };
        Hook {
            name: program.to_owned(),
            of: HookOf::Sockets,
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
            cidrs: self.table("CIDRS", Shape::Keyed)?,
            verdicts: self.table("VERDICTS", Shape::Keyed)?,
            ports: self.table("PORTS", Shape::Keyed)?,
            epoch: self.table("EPOCH", Shape::Array)?,
            origin: self.origin("VERDICTS"),
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
        let pair = |tcp, other| {
            Ok::<_, io::Error>(flows::Pair {
                tcp: self.loaded.table(tcp)?,
                other: self.loaded.table(other)?,
            })
        };
        Ok(Flows::new(
            pair("TCP_WAYS", "OTHER_WAYS")?,
            pair("TCP_PLANS", "OTHER_PLANS")?,
            Shares::new(&self.loaded.table("SHARES")?)?,
        ))
    }

    /// Connected UDP sockets of the node's own processes, in the network namespace of the calling thread.
    ///
    /// # Errors
    /// As [`Self::service_tables`]; `Unsupported` when the kernel cannot end such a socket.
    pub fn connected(&self) -> io::Result<Connected> {
        Connected::open(self.loaded.table("CONNECTED")?, self.loaded.table("LIVE")?)
    }

    /// Takes over the conversations that an earlier agent's programs know, if those had other tables, and that were used
    /// since a monotonic time. Returns how many it found.
    ///
    /// # Errors
    /// The kernel refuses to read or to write.
    pub fn adopt_conversations(&self, since: Duration) -> Result<usize> {
        let bpffs = self.loaded.bpffs();
        if !adopt::is_needed(bpffs) {
            return Ok(0);
        }
        let mut services = self.service_tables()?;
        let live: BTreeMap<_, _> = services.live.load()?.into_iter().collect();
        let generation = |id| live.get(&id).copied().unwrap_or_default();
        let (frontends, rows) = (services.frontends.load()?, services.backends.load()?);
        let nodes = services.nodes.load()?;
        let own = nodes
            .iter()
            .filter(|(_, row)| row.flags & NodeFlags::OWN != 0);
        let cluster = match self.masquerades {
            true => Some(self.uplink_tables()?.cluster.load()?),
            false => None,
        };
        let today = adopt::Today {
            backends: adopt::Backends::new(frontends, rows, generation),
            own: own.map(|(addr, _)| *addr).collect(),
            nodes: nodes.iter().map(|(addr, _)| *addr).collect(),
            cluster: cluster.map(|rows| rows.into_iter().map(|(range, _)| range).collect()),
            since: u64::try_from(since.as_nanos()).unwrap_or(u64::MAX),
        };
        Ok(adopt::adopt(bpffs, &self.flows()?, &today)?)
    }

    /// Says that our programs meet every packet of pods and uplinks, and know what those of an earlier agent knew.
    pub fn end_take_over(&self) {
        self.has_taken_over.store(true, Ordering::Relaxed);
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
