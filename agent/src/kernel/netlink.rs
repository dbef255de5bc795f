//! The node's devices and addresses, through rtnetlink in the network namespace of the agent.

mod deaf;
pub mod dns_addresses;
pub(super) mod request;
pub mod routes;

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use anyhow::{Context, Result};
use futures::{FutureExt, StreamExt, TryStreamExt};
use nix::errno::Errno;
use rtnetlink::packet_core::NetlinkPayload;
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::address::AddressAttribute;
use rtnetlink::packet_route::link::{LinkAttribute, LinkLayerType};
use rtnetlink::packet_route::route::{RouteAddress, RouteAttribute, RouteMessage};
use rtnetlink::{
    Handle, MulticastGroup, RouteMessageBuilder, new_connection, new_multicast_connection,
};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use weir_cni::attachment::DEVICE_PREFIX;

use self::deaf::deafen;
use super::tc;
use crate::compile::masquerade::{Outlet, Routes};
use crate::pods::Device;

/// Addresses change in bursts, when a device comes or goes: they are read once it is over.
const BURST: Duration = Duration::from_millis(50);

/// A connection that ends with the value.
struct Netlink {
    handle: Handle,
    driver: JoinHandle<()>,
}

impl Netlink {
    fn open() -> Result<Self> {
        let (connection, handle, _) = new_connection().context("open a netlink socket")?;
        Ok(Self {
            handle,
            driver: tokio::spawn(connection),
        })
    }

    /// Name and MTU of every device, by index.
    async fn links(&self) -> Result<BTreeMap<u32, (String, u32)>> {
        let mut links = self.handle.link().get().execute();
        let mut found = BTreeMap::new();
        while let Some(link) = links.try_next().await.context("list the devices")? {
            let mut name = String::new();
            let mut mtu = 0;
            for attribute in link.attributes {
                match attribute {
                    LinkAttribute::IfName(is) => name = is,
                    LinkAttribute::Mtu(is) => mtu = is,
                    _ => {}
                }
            }
            found.insert(link.header.index, (name, mtu));
        }
        Ok(found)
    }

    async fn loopback(&self) -> Result<u32> {
        let links = self.links().await?;
        let lo = links.iter().find(|(_, (name, _))| name == "lo");
        lo.map(|(index, _)| *index)
            .context("the node has no loopback device")
    }

    async fn routes(&self) -> Result<Vec<RouteMessage>> {
        let mut found = Vec::new();
        for filter in [
            RouteMessageBuilder::<Ipv4Addr>::new().build(),
            RouteMessageBuilder::<Ipv6Addr>::new().build(),
        ] {
            let mut routes = self.handle.route().get(filter).execute();
            while let Some(route) = routes.try_next().await.context("list the routes")? {
                found.push(route);
            }
        }
        Ok(found)
    }
}

impl Drop for Netlink {
    fn drop(&mut self) {
        self.driver.abort();
    }
}

/// Deletes a device; its peer in the pod goes with it. One that is not there is no error.
///
/// # Errors
/// The kernel refuses.
pub async fn delete_device(name: &str) -> Result<()> {
    let device = name.to_owned();
    let deleted = tokio::task::spawn_blocking(move || tc::delete_device(&device)).await;
    deleted
        .context("the agent is going down")?
        .with_context(|| format!("delete the device {name}"))
}

/// The interface index of the device of this name, if there is one.
///
/// # Errors
/// The kernel cannot be asked.
pub fn device_index(name: &str) -> io::Result<Option<u32>> {
    match nix::net::if_::if_nametoindex(name) {
        Ok(index) => Ok(Some(index)),
        Err(Errno::ENODEV) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Every device of the node with a name of ours, and the host addresses that are routed over it.
///
/// # Errors
/// The kernel does not answer.
pub async fn pod_devices() -> Result<Vec<Device>> {
    let netlink = Netlink::open()?;
    let mut devices: BTreeMap<u32, Device> = netlink
        .links()
        .await?
        .into_iter()
        .filter(|(_, (name, _))| weir_cni::attachment::is_device(name))
        .map(|(index, (name, _))| {
            (
                index,
                Device {
                    name,
                    ifindex: index,
                    addresses: Vec::new(),
                },
            )
        })
        .collect();
    for route in netlink.routes().await? {
        let (mut over, mut to) = (None, None);
        for attribute in &route.attributes {
            match attribute {
                RouteAttribute::Oif(index) => over = Some(*index),
                RouteAttribute::Destination(RouteAddress::Inet(ip)) => to = Some(IpAddr::V4(*ip)),
                RouteAttribute::Destination(RouteAddress::Inet6(ip)) => to = Some(IpAddr::V6(*ip)),
                _ => {}
            }
        }
        let is_host = |ip: &IpAddr| {
            route.header.destination_prefix_length == if ip.is_ipv4() { 32 } else { 128 }
        };
        if let (Some(device), Some(to)) = (over.and_then(|i| devices.get_mut(&i)), to)
            && is_host(&to)
            && !is_link_local(&to)
        {
            device.addresses.push(to);
        }
    }
    Ok(devices.into_values().collect())
}

/// Every address of the node itself, sorted. Those of loopback are not the node's to others.
///
/// # Errors
/// The kernel does not answer.
pub async fn node_addresses() -> Result<Vec<IpAddr>> {
    let netlink = Netlink::open()?;
    let links = netlink.links().await?;
    let mut addresses = netlink.handle.address().get().execute();
    let mut found = Vec::new();
    while let Some(address) = addresses.try_next().await.context("list the addresses")? {
        let device = links
            .get(&address.header.index)
            .map(|(name, _)| name.as_str());
        if device.is_some_and(|name| name.starts_with(DEVICE_PREFIX)) {
            continue;
        }
        let ip = address
            .attributes
            .iter()
            .find_map(|attribute| match attribute {
                AddressAttribute::Local(ip) => Some(*ip),
                _ => None,
            });
        let ip = ip.or_else(|| {
            address
                .attributes
                .iter()
                .find_map(|attribute| match attribute {
                    AddressAttribute::Address(ip) => Some(*ip),
                    _ => None,
                })
        });
        found.extend(ip.filter(|ip| !ip.is_loopback()));
    }
    found.sort();
    found.dedup();
    Ok(found)
}

/// Sends the node's addresses now and whenever they may have changed, until the other end is gone. What
/// the kernel says is only the occasion to read them all: a message that was lost (ENOBUFS) loses
/// nothing.
///
/// # Errors
/// The kernel does not answer, or ends the conversation.
pub async fn watch_node_addresses(to: mpsc::Sender<Vec<IpAddr>>) -> Result<()> {
    let groups = [MulticastGroup::Ipv4Ifaddr, MulticastGroup::Ipv6Ifaddr];
    watch(&groups, |_| true, node_addresses, to).await
}

async fn watch<T: Clone + PartialEq, F: Future<Output = Result<T>>>(
    groups: &[MulticastGroup],
    is_news: impl Fn(&RouteNetlinkMessage) -> bool,
    read: impl Fn() -> F,
    to: mpsc::Sender<T>,
) -> Result<()> {
    let (mut connection, handle, mut news) =
        new_multicast_connection(groups).context("listen for changes of the node's network")?;
    deafen(connection.socket_mut()).context("leave out devices of pods")?;
    let _open = Netlink {
        handle,
        driver: tokio::spawn(connection),
    };
    let mut said = None;
    loop {
        // After listening began, so that no change falls between.
        let now = read().await?;
        if said.as_ref() != Some(&now) {
            if to.send(now.clone()).await.is_err() {
                return Ok(());
            }
            said = Some(now);
        }
        loop {
            let (message, _) = news
                .next()
                .await
                .context("the kernel says nothing of its network any more")?;
            match &message.payload {
                NetlinkPayload::InnerMessage(message) if !is_news(message) => {}
                // And what says that something was lost.
                _ => break,
            }
        }
        tokio::time::sleep(BURST).await;
        while let Some(Some(_)) = news.next().now_or_never() {}
    }
}

/// Every Ethernet device that could lead out of the node.
///
/// # Errors
/// The kernel does not answer.
pub async fn outlets() -> Result<Vec<Outlet>> {
    /// `IFA_F_SECONDARY` (of IPv6: temporary), `_DADFAILED`, `_DEPRECATED`, `_TENTATIVE`.
    const WORSE: u32 = 0x01 | 0x08 | 0x20 | 0x40;
    let netlink = Netlink::open()?;
    let mut found = BTreeMap::new();
    let mut links = netlink.handle.link().get().execute();
    while let Some(link) = links.try_next().await.context("list the devices")? {
        let name = link.attributes.into_iter().find_map(|it| match it {
            LinkAttribute::IfName(name) => Some(name),
            _ => None,
        });
        // Loopback is of a type of its own.
        if let Some(name) = name.filter(|name| !name.starts_with(DEVICE_PREFIX))
            && link.header.link_layer_type == LinkLayerType::Ether
        {
            let outlet = Outlet {
                name,
                ifindex: link.header.index,
                addresses: Vec::new(),
                routes: Routes::Some,
            };
            found.insert(link.header.index, outlet);
        }
    }
    let mut addresses = netlink.handle.address().get().execute();
    let mut all = Vec::new();
    while let Some(address) = addresses.try_next().await.context("list the addresses")? {
        let ip = |local: bool| {
            address.attributes.iter().find_map(|it| match it {
                AddressAttribute::Local(ip) if local => Some(*ip),
                AddressAttribute::Address(ip) if !local => Some(*ip),
                _ => None,
            })
        };
        if let Some(ip) = ip(true)
            .or_else(|| ip(false))
            .filter(|ip| !is_link_local(ip))
        {
            let is_worse = u32::from(address.header.flags.bits()) & WORSE != 0;
            all.push((is_worse, address.header.index, ip));
        }
    }
    all.sort_by_key(|(is_worse, _, _)| *is_worse);
    for (_, index, ip) in all {
        if let Some(outlet) = found.get_mut(&index) {
            outlet.addresses.push(ip);
        }
    }
    for route in netlink.routes().await? {
        let is_default = route.header.destination_prefix_length == 0;
        let mut over: Vec<u32> = Vec::new();
        for attribute in route.attributes.iter().filter(|_| is_default) {
            match attribute {
                RouteAttribute::Oif(index) => over.push(*index),
                RouteAttribute::MultiPath(hops) => {
                    over.extend(hops.iter().map(|hop| hop.interface_index));
                }
                _ => {}
            }
        }
        for index in over {
            if let Some(outlet) = found.get_mut(&index) {
                outlet.routes = Routes::Default;
            }
        }
    }
    Ok(found.into_values().collect())
}

/// Sends the outlets now and whenever they may have changed, until the other end is gone.
///
/// # Errors
/// The kernel does not answer, or ends the conversation.
pub async fn watch_outlets(to: mpsc::Sender<Vec<Outlet>>) -> Result<()> {
    let groups = [
        MulticastGroup::Link,
        MulticastGroup::Ipv4Ifaddr,
        MulticastGroup::Ipv6Ifaddr,
        MulticastGroup::Ipv4Route,
        MulticastGroup::Ipv6Route,
    ];
    watch(&groups, is_of_outlets, outlets, to).await
}

/// Can this change what leads out of the node? Of pods, which come and go all the time, the kernel tells the same
/// listeners: their devices, and a route to each.
fn is_of_outlets(news: &RouteNetlinkMessage) -> bool {
    match news {
        RouteNetlinkMessage::NewLink(link) | RouteNetlinkMessage::DelLink(link) => {
            !routes::is_of_pod(link)
        }
        RouteNetlinkMessage::NewRoute(route) | RouteNetlinkMessage::DelRoute(route) => {
            route.header.destination_prefix_length == 0
        }
        _ => true,
    }
}

/// The MTU of the device that the default route leaves through, in bytes; 1500 without one.
///
/// # Errors
/// The kernel does not answer.
pub async fn default_mtu() -> Result<u32> {
    const ETHERNET: u32 = 1500;
    let netlink = Netlink::open()?;
    let links = netlink.links().await?;
    let default = netlink.routes().await?.into_iter().find(|route| {
        route.header.destination_prefix_length == 0
            && route
                .attributes
                .iter()
                .any(|a| matches!(a, RouteAttribute::Oif(_)))
    });
    let over = default.and_then(|route| {
        route
            .attributes
            .iter()
            .find_map(|attribute| match attribute {
                RouteAttribute::Oif(index) => Some(*index),
                _ => None,
            })
    });
    let mtu = over
        .and_then(|index| links.get(&index))
        .map_or(ETHERNET, |(_, mtu)| *mtu);
    // Loopback's is 65536: more than a pod's device can have.
    Ok(if mtu > 65_535 { ETHERNET } else { mtu })
}

fn is_link_local(ip: &IpAddr) -> bool {
    match ip {
        IpAddr::V4(v4) => v4.is_link_local(),
        IpAddr::V6(v6) => v6.is_unicast_link_local() || v6.is_multicast(),
    }
}
