//! What the line needs of the node: its tables, its hooks, and forgetting flows. In production that is the
//! kernel; in tests memory, so that whole histories run without it.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::fmt::Debug;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Result;
use tokio::sync::oneshot::{self, error::TryRecvError};
use tracing::{info, warn};
use weir_common::device::{Device, LocalPod};
use weir_common::nat::{InCluster, Uplink};
use weir_common::policy::{Class, PortKey, PortRow, VerdictKey, VerdictRow};
use weir_common::service::{Backend, BackendId, Frontend, FrontendKey, Generation, NodeAddress};
use weir_common::way::{Way, WayKey};
use weir_common::{Addr, Prefix, Protocol};
use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::apply::{Departed, KernelTable, Origin};
use crate::kernel::{Connected, Flows, Hooks, Kernel, MapTable, clock};

/// What keys and rows of a table are: plain bytes that can be compared.
pub trait Plain: FromBytes + IntoBytes + Immutable + Copy + Debug + Send + 'static {}
impl<T: FromBytes + IntoBytes + Immutable + Copy + Debug + Send + 'static> Plain for T {}

/// The node, as the line writes to it.
pub trait Machine: Debug + Send + Sized + 'static {
    /// A table of the kernel.
    type Table<K: Plain + Ord, V: Plain + PartialEq>: KernelTable<K, V> + Debug + Send;

    /// Every table that the line fills. Asked once.
    ///
    /// # Errors
    /// One cannot be opened.
    fn tables(&mut self) -> io::Result<Tables<Self>>;

    /// Puts the socket hooks on the node's cgroup, in place of older ones.
    ///
    /// # Errors
    /// The kernel refuses one; each works by itself.
    fn place_socket_hooks(&self) -> Result<()>;

    /// Puts the programs on these uplinks, and takes them off every other device.
    ///
    /// # Errors
    /// The kernel refuses one; the other devices are done.
    fn place_net_hooks(&self, uplinks: &BTreeMap<u32, String>) -> Result<()>;

    /// Puts the programs into the filters of all pods, in place of older ones.
    ///
    /// # Errors
    /// The kernel refuses; a side that was done stays done.
    fn place_pod_hooks(&self) -> Result<()>;

    /// Takes over the conversations that an earlier agent's programs know, if those had other tables, and that were used
    /// since a monotonic time. Returns how many it found.
    ///
    /// # Errors
    /// The kernel refuses to read or to write.
    fn adopt_conversations(&self, since: Duration) -> Result<usize>;

    /// Says that our programs meet every packet of pods and uplinks, and know what those of an earlier agent knew: what that one left is of
    /// no use any more.
    fn end_take_over(&self);

    /// Gives the links by which an earlier agent holds its programs on a pod's device ours. Quick: programs of two versions
    /// do not know each other's conversations.
    ///
    /// # Errors
    /// The kernel refuses; then a link still holds the earlier agent's program.
    fn replace_programs(&self, device: &str, ifindex: u32) -> Result<()>;

    /// Puts a pod's device under the filters of all pods, in place of what an earlier agent has put on it.
    ///
    /// # Errors
    /// The kernel refuses; then its programs are as they were.
    fn adopt(&self, device: &str, ifindex: u32) -> Result<()>;

    /// Puts a pod's device under the filters of all pods again.
    ///
    /// # Errors
    /// The kernel refuses, or the device is gone.
    fn join(&self, device: &str, ifindex: u32) -> Result<()>;

    /// Puts the settings of these pods' devices back, where somebody has changed them. Says of which devices that cannot
    /// be done, and why.
    fn keep_settings<'a>(&self, pods: &'a [(String, u32)]) -> Vec<(&'a str, String)>;

    /// Every hook that should hold a program, and every device of these that our programs do not see.
    ///
    /// # Errors
    /// The kernel cannot be asked.
    fn hooks(&self, pods: Vec<(String, u32)>, uplinks: &BTreeMap<u32, String>)
    -> io::Result<Hooks>;

    /// Programs by name: their numbers, and what the verifier visited of them.
    fn programs(&self) -> BTreeMap<String, (u32, Option<u32>)>;

    /// Forgets the flows of these addresses and those that have expired. Says what it found the last time, if it has not
    /// said that before; gives the addresses back if it is busy with earlier ones.
    fn sweep(&mut self, gone: BTreeSet<Addr>) -> Result<Option<Swept>, BTreeSet<Addr>>;

    /// What has become of the sockets that were to be ended.
    fn disconnecting(&mut self) -> Disconnecting;

    /// Ends the UDP sockets of the node's own processes that programs have connected to such a backend, and to which no
    /// datagrams may go any more. Their processes hear of it, and connect anew.
    fn disconnect(&mut self, departed: Departed);
}

/// What has become of sockets that were to be ended.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Disconnecting {
    /// It is still under way: more have to wait.
    Busy,
    Done,
    /// Not all may have been ended. Said once.
    Failed,
}

/// What is known of flows after they were all looked at.
#[derive(Debug)]
pub struct Swept {
    /// When that began.
    pub began: Instant,
    /// The backends that connections lead to, as they were when those were opened. Datagrams ask again.
    pub led_to: HashSet<(BackendId, Generation)>,
}

/// The tables that the line fills.
#[derive(Debug)]
pub struct Tables<M: Machine> {
    pub frontends: M::Table<FrontendKey, Frontend>,
    pub backends: M::Table<u32, Backend>,
    pub live: M::Table<BackendId, Generation>,
    pub nodes: M::Table<Addr, NodeAddress>,
    pub classes: M::Table<Addr, Class>,
    pub cidrs: M::Table<Prefix, Class>,
    pub verdicts: M::Table<VerdictKey, VerdictRow>,
    pub ports: M::Table<PortKey, PortRow>,
    pub epoch: M::Table<u32, u32>,
    pub devices: M::Table<u32, Device>,
    pub pods: M::Table<Addr, LocalPod>,
    pub uplinks: M::Table<u32, Uplink>,
    pub cluster: M::Table<Prefix, InCluster>,
    pub frontends_are: Origin,
    pub live_is: Origin,
    /// Of the tables of policy.
    pub policy_is: Origin,
}

/// The kernel. Others may use it beside the line; the line alone writes to its tables.
#[derive(Debug)]
pub struct KernelMachine {
    kernel: Arc<Kernel>,
    flows: Arc<Flows>,
    sweep: Option<oneshot::Receiver<Option<Swept>>>,
    /// None where the kernel cannot end sockets.
    connected: Option<Arc<Connected>>,
    disconnecting: Option<oneshot::Receiver<bool>>,
}

impl KernelMachine {
    pub fn new(kernel: Arc<Kernel>, flows: Arc<Flows>) -> Self {
        let connected = match kernel.connected() {
            Ok(connected) => Some(Arc::new(connected)),
            Err(error) => {
                warn!(
                    %error,
                    "connected UDP sockets of the node's own processes stay with backends that are gone"
                );
                None
            }
        };
        Self {
            kernel,
            flows,
            sweep: None,
            connected,
            disconnecting: None,
        }
    }
}

impl Machine for KernelMachine {
    type Table<K: Plain + Ord, V: Plain + PartialEq> = MapTable<K, V>;

    fn tables(&mut self) -> io::Result<Tables<Self>> {
        let services = self.kernel.service_tables()?;
        let policy = self.kernel.policy_tables()?;
        let devices = self.kernel.device_tables()?;
        let uplinks = self.kernel.uplink_tables()?;
        Ok(Tables {
            frontends: services.frontends,
            backends: services.backends,
            live: services.live,
            nodes: services.nodes,
            classes: policy.classes,
            cidrs: policy.cidrs,
            verdicts: policy.verdicts,
            ports: policy.ports,
            epoch: policy.epoch,
            devices: devices.devices,
            pods: devices.pods,
            uplinks: uplinks.uplinks,
            cluster: uplinks.cluster,
            frontends_are: services.frontends_are,
            live_is: services.live_is,
            policy_is: policy.origin,
        })
    }

    fn place_socket_hooks(&self) -> Result<()> {
        self.kernel.place_socket_hooks()
    }

    fn place_net_hooks(&self, uplinks: &BTreeMap<u32, String>) -> Result<()> {
        self.kernel.settle_net_hooks(uplinks)
    }

    fn place_pod_hooks(&self) -> Result<()> {
        self.kernel.place_pod_hooks()
    }

    fn replace_programs(&self, device: &str, ifindex: u32) -> Result<()> {
        self.kernel.replace_programs(device, ifindex)
    }

    fn adopt_conversations(&self, since: Duration) -> Result<usize> {
        self.kernel.adopt_conversations(since)
    }

    fn end_take_over(&self) {
        self.kernel.end_take_over();
    }

    fn adopt(&self, device: &str, ifindex: u32) -> Result<()> {
        self.kernel.adopt(device, ifindex)
    }

    fn join(&self, device: &str, ifindex: u32) -> Result<()> {
        self.kernel.join(device, ifindex)
    }

    fn keep_settings<'a>(&self, pods: &'a [(String, u32)]) -> Vec<(&'a str, String)> {
        let devices = pods.iter().map(|(device, _)| device.as_str());
        self.kernel.keep_settings(devices)
    }

    fn hooks(
        &self,
        pods: Vec<(String, u32)>,
        uplinks: &BTreeMap<u32, String>,
    ) -> io::Result<Hooks> {
        self.kernel.hooks(pods, uplinks)
    }

    fn programs(&self) -> BTreeMap<String, (u32, Option<u32>)> {
        self.kernel.programs()
    }

    fn sweep(&mut self, gone: BTreeSet<Addr>) -> Result<Option<Swept>, BTreeSet<Addr>> {
        let last = match self.sweep.as_mut().map(oneshot::Receiver::try_recv) {
            Some(Err(TryRecvError::Empty)) => return Err(gone),
            Some(Ok(swept)) => swept,
            Some(Err(TryRecvError::Closed)) | None => None,
        };
        let flows = self.flows.clone();
        let (tell, told) = oneshot::channel();
        self.sweep = Some(told);
        // It takes a while, and nothing waits for it.
        tokio::task::spawn_blocking(move || {
            let began = Instant::now();
            let mut led_to = HashSet::new();
            let mut look = |key: &WayKey, way: &Way| {
                if key.protocol == Protocol::TCP && way.backend != 0 {
                    led_to.insert((way.backend, way.generation.usable()));
                }
            };
            // An address that could not be swept now is swept with its flows' patience.
            let is_gone = |addr: &Addr| gone.contains(addr);
            let swept = match flows.sweep(clock::monotonic(), &is_gone, &mut look) {
                Ok(_) => Some(Swept { began, led_to }),
                Err(error) => {
                    warn!(%error, "ended flows cannot be swept");
                    None
                }
            };
            // Who has stopped waiting does not want to know.
            tell.send(swept).unwrap_or_default();
        });
        Ok(last)
    }

    fn disconnecting(&mut self) -> Disconnecting {
        let ended = self.disconnecting.as_mut().map(oneshot::Receiver::try_recv);
        match ended {
            Some(Err(TryRecvError::Empty)) => return Disconnecting::Busy,
            None | Some(Ok(true)) => {}
            Some(Ok(false) | Err(TryRecvError::Closed)) => {
                self.disconnecting = None;
                return Disconnecting::Failed;
            }
        }
        self.disconnecting = None;
        Disconnecting::Done
    }

    fn disconnect(&mut self, departed: Departed) {
        let Some(connected) = self.connected.clone() else {
            return;
        };
        let (tell, told) = oneshot::channel();
        self.disconnecting = Some(told);
        tokio::task::spawn_blocking(move || {
            let ended = connected.end(&departed);
            let is_done = ended.is_ok();
            match ended {
                Ok(0) => {}
                Ok(sockets) => info!(
                    sockets,
                    "connected UDP sockets were ended, as their backends are gone"
                ),
                Err(error) => {
                    warn!(%error, "connected UDP sockets cannot be ended, though their backends are gone");
                }
            }
            tell.send(is_done).unwrap_or_default();
        });
    }
}
