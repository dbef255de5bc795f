//! ADD: lease, devices, policy and addresses, up, in the order that never lets an unprotected packet
//! through (docs/architecture.md, "A pod's network"). Whatever fails, nothing is left behind.

use std::io;
use std::path::Path;
use std::time::{Duration, Instant};

use ipnet::IpNet;
use rscni_plugin::error::Error;
use rscni_plugin::types::{Args, CNIResult, Interface, IpConfig, NetConf, Route};
use rscni_plugin::version::SpecVersion;
use weir_cni::attachment::Attachment;
use weir_cni::released;
use weir_cni::wire::{self, ADD_DEADLINE_MS, Add, Leased, Mac, Reply, Request, gateway};

use crate::agent::{Agent, NoAnswer, Withdrawn};
use crate::config::{self, Config};
use crate::failure;
use crate::link::{Earlier, End};
use crate::netlink::Netlink;
use crate::netns::{self, Netns};

/// How long a failed ADD waits for the agent to confirm that it took everything back.
const WITHDRAW_PATIENCE: Duration = Duration::from_millis(500);

/// The index of `lo`, in every network namespace.
const LOOPBACK: u32 = 1;

pub(crate) fn add(args: &Args) -> Result<CNIResult, Error> {
    let deadline = Instant::now() + Duration::from_millis(ADD_DEADLINE_MS);
    let conf = args.config();
    let config = Config::of(conf)?;
    let attachment = config::attachment(args)?;
    let pod = config::pod(args)?;
    let netns_path = args.netns().map_or(Path::new(""), |path| path.as_path());
    let netns = open_netns(netns_path)?;

    let mut adding = Adding {
        agent: Agent::connect(&config.agent_socket, deadline)?,
        node: Netlink::open().map_err(failure::step("open a netlink socket"))?,
        netns,
        attachment,
        deadline,
        device: Device::Absent,
    };
    let request = Request::Add(Add {
        attachment: adding.attachment.clone(),
        network: conf.name.clone(),
        netns: adding.netns.inode,
        pod,
    });
    match adding.attach(request, config.mtu) {
        Ok(attached) => result(conf, netns_path, &adding.attachment, attached),
        Err(stopped) => Err(adding.undo(stopped, &config.released_dir)),
    }
}

/// Opens the namespace of a container, with the codes that fit each failure.
pub(crate) fn open_netns(path: &Path) -> Result<Netns, Error> {
    if !path.is_absolute() {
        return Err(failure::env("CNI_NETNS must be an absolute path"));
    }
    Netns::open(path).map_err(|error| {
        let message = format!("CNI_NETNS {}: {error}", path.display());
        match error.kind() {
            io::ErrorKind::NotFound => Error::NotExist(message),
            _ => Error::InvalidEnvValue(message),
        }
    })
}

/// An ADD that is under way.
struct Adding {
    agent: Agent,
    node: Netlink,
    netns: Netns,
    attachment: Attachment,
    deadline: Instant,
    device: Device,
}

/// Whether there is a device to take back.
enum Device {
    Absent,
    Created(String),
}

/// Why an ADD stopped, and who knows about the lease.
enum Stopped {
    /// The agent refused, so it holds nothing.
    Refused(Error),
    /// The agent may hold a lease.
    Undecided(Error),
}

impl From<NoAnswer> for Stopped {
    fn from(no_answer: NoAnswer) -> Self {
        match no_answer {
            NoAnswer::Refused(_) => Self::Refused(no_answer.into()),
            NoAnswer::Silent(_) => Self::Undecided(no_answer.into()),
        }
    }
}

impl From<Error> for Stopped {
    fn from(error: Error) -> Self {
        Self::Undecided(error)
    }
}

/// What the result tells.
struct Attached {
    leased: Leased,
    mtu: u32,
}

impl Adding {
    fn attach(&mut self, request: Request, mtu: u32) -> Result<Attached, Stopped> {
        let leased = match self.agent.ask(&request)? {
            Reply::Leased(leased) => leased,
            other => return Err(unexpected(&other).into()),
        };
        let mtu = if mtu == 0 { leased.mtu } else { mtu };
        let (host_ifindex, pod_ifindex) = self.create(&leased, mtu)?;
        self.in_time()?;
        self.agent.tell(&Request::Attach { host_ifindex })?;
        // Meanwhile what can be done while both ends are down: pods of this node deliver to an end inside that is up.
        self.prepare_node(&leased, host_ifindex)
            .map_err(failure::step("prepare the node's device"))?;
        let mut pod = self
            .netns
            .enter()
            .map_err(failure::step("enter the pod's network namespace"))?;
        prepare_pod(&mut pod, pod_ifindex, self.attachment.ifname(), &leased)
            .map_err(failure::step("prepare the pod's interface"))?;
        match self.agent.answer()? {
            Reply::Ok => {}
            other => return Err(unexpected(&other).into()),
        }
        self.in_time()?;
        start_pod(&mut pod, pod_ifindex, &leased.addresses)
            .map_err(failure::step("start the pod's interface"))?;
        self.start_node(&leased, host_ifindex)
            .map_err(failure::step("start the node's device"))?;
        self.in_time()?;
        // An agent that has heard it keeps the attachment; so does the next one, if this one ends before it is read.
        self.agent.tell(&Request::Done)?;
        Ok(Attached { leased, mtu })
    }

    /// Makes the pair, both ends down. Returns the indexes of the node's and the pod's.
    fn create(&mut self, leased: &Leased, mtu: u32) -> Result<(u32, u32), Error> {
        let ifname = self.attachment.ifname();
        let host = End {
            name: &leased.device,
            mac: leased.macs.host,
        };
        let peer = End {
            name: ifname,
            mac: leased.macs.pod,
        };
        let netns = self.netns.as_fd();
        let mut created = self.node.create_veth(&host, &peer, netns, mtu);
        if let Err(error) = &created
            && error.raw_os_error() == Some(nix::Error::EEXIST as i32)
        {
            let step = || failure::step("look at the pod's interfaces");
            let mut pod = self.netns.enter().map_err(step())?;
            if pod.link(ifname).map_err(step())?.is_some() {
                return Err(failure::interface_exists(ifname));
            }
            // The lease is new, so a device of its name is what a killed ADD left.
            let step = failure::step("delete a device left from an earlier ADD");
            self.node.delete(host.name).map_err(step)?;
            created = self.node.create_veth(&host, &peer, netns, mtu);
        }
        created.map_err(failure::step("create the veth pair"))?;
        self.device = Device::Created(leased.device.clone());

        let link = self.node.link(host.name);
        let link = link.map_err(failure::step("look at the new devices"))?;
        let indexes = link.and_then(|it| Some((it.index, it.peer?)));
        indexes.ok_or_else(|| {
            Error::IOFailure("the veth pair vanished while it was being set up".into())
        })
    }

    fn prepare_node(&mut self, leased: &Leased, index: u32) -> io::Result<()> {
        self.node.forgo_link_local(index)?;
        for address in &leased.addresses {
            self.node
                .fix_neighbour(index, address.addr(), leased.macs.pod)?;
        }
        Ok(())
    }

    /// The kernel takes no route over a device that is down, so the device is up before its routes are there; the pod's
    /// programs have been attached since `Attach`.
    fn start_node(&mut self, leased: &Leased, index: u32) -> io::Result<()> {
        self.node.up(index)?;
        for address in &leased.addresses {
            self.node
                .route_to(index, address.addr(), Earlier::Replaced)?;
        }
        Ok(())
    }

    fn in_time(&self) -> Result<(), Error> {
        if Instant::now() < self.deadline {
            Ok(())
        } else {
            Err(Error::TryAgainLater(late()))
        }
    }

    /// Takes back everything, and returns the error to report.
    fn undo(mut self, stopped: Stopped, released_dir: &Path) -> Error {
        let mut left = Vec::new();
        if let Device::Created(name) = &self.device
            && let Err(error) = self.node.delete(name)
        {
            left.push(format!("device {name}: {error}"));
        }
        let error = match stopped {
            Stopped::Refused(error) => error,
            Stopped::Undecided(error) => {
                // An agent that let the deadline pass would let this one pass, too.
                let hangs = Instant::now() >= self.deadline;
                let (error, withdrawn) = match hangs {
                    // Whatever failed, the agent may have taken it from under us by now.
                    true if error.details() != late() => {
                        let late = format!("{}: {}: {}", late(), error.msg(), error.details());
                        (Error::TryAgainLater(late), None)
                    }
                    true => (error, None),
                    false => (error, self.agent.withdraw(WITHDRAW_PATIENCE)),
                };
                match withdrawn {
                    Some(Withdrawn::Refused(refused)) => both(error, failure::refused(refused)),
                    Some(Withdrawn::Released) => error,
                    None => {
                        if let Err(error) = released::write(released_dir, &self.attachment) {
                            left.push(format!("lease of {}: {error}", self.attachment));
                        }
                        error
                    }
                }
            }
        };
        if left.is_empty() {
            error
        } else {
            let details = format!(
                "{}; could not take back: {}",
                error.details(),
                left.join(", ")
            );
            Error::Custom(u32::from(&error), error.msg().into(), details)
        }
    }
}

fn prepare_pod(pod: &mut Netlink, index: u32, ifname: &str, leased: &Leased) -> io::Result<()> {
    pod.forgo_link_local(index)?;
    pod.up(LOOPBACK)?;
    for address in &leased.addresses {
        let address = address.addr();
        let mut given = pod.add_address(index, address);
        if let Err(error) = &given
            && address.is_ipv6()
            && error.raw_os_error() == Some(nix::Error::EACCES as i32)
        {
            netns::enable_ipv6(ifname)?;
            given = pod.add_address(index, address);
        }
        given?;
        pod.fix_neighbour(index, gateway(address), leased.macs.host)?;
    }
    Ok(())
}

fn start_pod(pod: &mut Netlink, index: u32, addresses: &[IpNet]) -> io::Result<()> {
    pod.up(index)?;
    for address in addresses {
        let gateway = gateway(address.addr());
        pod.route_to(index, gateway, Earlier::Kept)?;
        pod.route_default(index, gateway)?;
    }
    Ok(())
}

/// Our error, and the agent's refusal, in one. Where a device is missing the agent had most likely refused and taken it from
/// under us, so its words come first; otherwise ours do: it may refuse because of what we have taken back.
fn both(ours: Error, agents: Error) -> Error {
    let missing = format!("(os error {})", nix::Error::ENODEV as i32);
    let (cause, other) = match ours.details().ends_with(&missing) {
        true => (agents, ours),
        false => (ours, agents),
    };
    let details = format!("{}; {}", cause.details(), other.details());
    Error::Custom(u32::from(&cause), cause.msg().into(), details)
}

fn late() -> String {
    format!("not done within {ADD_DEADLINE_MS} ms")
}

fn unexpected(reply: &Reply) -> Error {
    Error::TryAgainLater(format!("the agent answered out of turn: {reply:?}"))
}

/// The result, after whatever earlier plugins of the chain reported. The library writes it in the
/// layout of the version asked for.
fn result(
    conf: &NetConf,
    netns_path: &Path,
    attachment: &Attachment,
    attached: Attached,
) -> Result<CNIResult, Error> {
    let Attached { leased, mtu } = attached;
    let mut result = conf.prev_result.clone().unwrap_or_default();
    // Version 1.1.0 introduced the field.
    let mtu = (conf.version()? >= SpecVersion::new(1, 1, 0)).then_some(mtu);
    let interface = |name: &str, mac: Mac, sandbox| Interface {
        name: name.into(),
        mac: mac.to_string(),
        mtu,
        sandbox,
        socket_path: None,
        pci_id: None,
    };
    let sandbox = Some(netns_path.to_string_lossy().into_owned());
    let first = result.interfaces.len() as u32;
    result.interfaces.extend([
        interface(&leased.device, leased.macs.host, None),
        interface(attachment.ifname(), leased.macs.pod, sandbox),
    ]);
    for address in leased.addresses {
        let gateway = wire::gateway(address.addr());
        result.ips.push(IpConfig {
            interface: Some(first + 1),
            address,
            gateway: Some(gateway),
        });
        result.routes.push(Route {
            dst: everywhere(&address),
            gw: Some(gateway),
            mtu: None,
            advmss: None,
            priority: None,
            table: None,
            scope: None,
        });
    }
    if conf.dns.is_some() {
        result.dns = conf.dns.clone();
    }
    Ok(result)
}

/// The default route's destination in the family of an address.
fn everywhere(of: &IpNet) -> IpNet {
    match of {
        IpNet::V4(_) => IpNet::V4(Default::default()),
        IpNet::V6(_) => IpNet::V6(Default::default()),
    }
}
