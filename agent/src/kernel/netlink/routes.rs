//! The node's main routing tables, and news of their changes. Which routes there should be is not here.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use anyhow::{Context, Result};
use futures::{StreamExt, TryStreamExt};
use ipnet::IpNet;
use rtnetlink::packet_core::NetlinkPayload;
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::link::{LinkAttribute, LinkMessage};
use rtnetlink::packet_route::route::{
    RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteProtocol, RouteScope, RouteType,
};
use rtnetlink::{
    Handle, MulticastGroup, RouteMessageBuilder, new_connection_with_strict_check,
    new_multicast_connection,
};
use tokio::sync::mpsc;
use weir_cni::attachment::DEVICE_PREFIX;

use super::Netlink;
use super::deaf::deafen;
use crate::apply::routes::{Hop, Installed, Owner, RouteTable};

/// Who has put a route there (`rtm_protocol`): we. No number of `/etc/iproute2/rt_protos`.
const OUR_PROTOCOL: u8 = 0x57;

/// The routes of the network namespace that it was opened in.
pub struct KernelRoutes {
    netlink: Netlink,
}

impl KernelRoutes {
    /// # Errors
    /// No netlink socket can be had.
    pub fn open() -> Result<Self> {
        // Only strict requests are answered with one table instead of all.
        let (connection, handle, _) =
            new_connection_with_strict_check().context("open a netlink socket")?;
        Ok(Self {
            netlink: Netlink {
                handle,
                driver: tokio::spawn(connection),
            },
        })
    }

    fn handle(&self) -> &Handle {
        &self.netlink.handle
    }
}

impl RouteTable for KernelRoutes {
    async fn all(&self) -> io::Result<Vec<Installed>> {
        let mut found = Vec::new();
        for mut filter in [
            RouteMessageBuilder::<Ipv4Addr>::new().build(),
            RouteMessageBuilder::<Ipv6Addr>::new().build(),
        ] {
            filter.header.protocol = RouteProtocol::Unspec;
            filter.header.kind = RouteType::Unspec;
            let mut routes = self.handle().route().get(filter).execute();
            while let Some(route) = routes.try_next().await.map_err(to_io)? {
                found.extend(installed(&route));
            }
        }
        Ok(found)
    }

    async fn add(&self, route: &Installed) -> io::Result<()> {
        let request = self.handle().route().add(message(route));
        request.execute().await.map_err(to_io)
    }

    async fn replace(&self, route: &Installed) -> io::Result<()> {
        let request = self.handle().route().add(message(route)).replace();
        request.execute().await.map_err(to_io)
    }

    async fn remove(&self, route: &Installed) -> io::Result<()> {
        let request = self.handle().route().del(message(route));
        match request.execute().await.map_err(to_io) {
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => Ok(()),
            other => other,
        }
    }
}

/// Removes every route that an agent has put there. Returns where they led, and what is left.
///
/// # Errors
/// The kernel does not say what there is.
pub async fn remove_ours() -> Result<Vec<(IpNet, io::Result<()>)>> {
    let table = KernelRoutes::open()?;
    let mut removed = Vec::new();
    for route in table.all().await.context("list the routes")? {
        if route.owner == Owner::Us {
            removed.push((route.to, table.remove(&route).await));
        }
    }
    Ok(removed)
}

/// Says whenever routes may have changed that matter to ours, until the other end is gone. One word stands
/// for any number of changes: the reader looks at everything.
///
/// # Errors
/// The kernel ends the conversation.
pub async fn watch(to: mpsc::Sender<()>) -> Result<()> {
    // A device that goes down takes its IPv4 routes along without a word about them.
    let groups = [
        MulticastGroup::Link,
        MulticastGroup::Ipv4Route,
        MulticastGroup::Ipv6Route,
    ];
    let (mut connection, handle, mut news) =
        new_multicast_connection(&groups).context("listen for changes of routes")?;
    deafen(connection.socket_mut()).context("leave out devices of pods")?;
    let _open = Netlink {
        handle,
        driver: tokio::spawn(connection),
    };
    // What changed before this began.
    to.try_send(()).unwrap_or_default();
    loop {
        let said = tokio::select! {
            said = news.next() => said,
            () = to.closed() => return Ok(()),
        };
        let (message, _) = said.context("the kernel says nothing of routes any more")?;
        let matters = match &message.payload {
            NetlinkPayload::InnerMessage(message) => matters(message),
            // Messages were lost (ENOBUFS), or it is none of those that we know.
            _ => true,
        };
        if matters {
            // If it is full, a word is waiting already.
            to.try_send(()).unwrap_or_default();
        }
    }
}

/// Can it change what becomes of our routes? Pods come and go with devices of ours and routes to single
/// addresses.
fn matters(message: &RouteNetlinkMessage) -> bool {
    match message {
        RouteNetlinkMessage::NewLink(link) | RouteNetlinkMessage::DelLink(link) => !is_of_pod(link),
        RouteNetlinkMessage::NewRoute(route) | RouteNetlinkMessage::DelRoute(route) => {
            route.header.table == RouteHeader::RT_TABLE_MAIN
                && (!is_host(route) || route.header.protocol == OUR_PROTOCOL.into())
        }
        _ => false,
    }
}

pub(super) fn is_of_pod(link: &LinkMessage) -> bool {
    link.attributes.iter().any(|attribute| {
        matches!(attribute, LinkAttribute::IfName(name) if name.starts_with(DEVICE_PREFIX))
    })
}

fn is_host(route: &RouteMessage) -> bool {
    let is_v4 = route.header.address_family == rtnetlink::packet_route::AddressFamily::Inet;
    route.header.destination_prefix_length == if is_v4 { 32 } else { 128 }
}

/// A route of the main table in our words; `None` for one of another table or sort.
fn installed(route: &RouteMessage) -> Option<Installed> {
    let is_v4 = route.header.address_family == rtnetlink::packet_route::AddressFamily::Inet;
    let any = if is_v4 {
        IpAddr::from(Ipv4Addr::UNSPECIFIED)
    } else {
        IpAddr::from(Ipv6Addr::UNSPECIFIED)
    };
    let (mut to, mut gateway, mut over, mut metric) = (any, None, None, 0);
    let mut is_plain = true;
    for attribute in &route.attributes {
        match attribute {
            RouteAttribute::Destination(address) => to = ip(address)?,
            RouteAttribute::Gateway(address) => gateway = Some(ip(address)?),
            RouteAttribute::Oif(ifindex) => over = Some(*ifindex),
            RouteAttribute::Priority(number) => metric = *number,
            RouteAttribute::Table(table) if *table != u32::from(RouteHeader::RT_TABLE_MAIN) => {
                return None;
            }
            RouteAttribute::MultiPath(_)
            | RouteAttribute::Via(_)
            | RouteAttribute::Encap(_)
            | RouteAttribute::NhId(_) => is_plain = false,
            _ => {}
        }
    }
    let hop = match (route.header.kind, gateway, over) {
        (RouteType::Unreachable, _, _) => Hop::Unreachable,
        (RouteType::Unicast, Some(gateway), Some(ifindex)) if is_plain => {
            Hop::Via { gateway, ifindex }
        }
        (RouteType::Unicast, None, Some(ifindex)) if is_plain => Hop::Link { ifindex },
        _ => Hop::Other,
    };
    let protocol = u8::from(route.header.protocol);
    Some(Installed {
        to: IpNet::new(to, route.header.destination_prefix_length).ok()?,
        hop,
        owner: if protocol == OUR_PROTOCOL {
            Owner::Us
        } else {
            Owner::Protocol(protocol)
        },
        metric,
    })
}

fn message(route: &Installed) -> RouteMessage {
    let mut builder = RouteMessageBuilder::<IpAddr>::new()
        .protocol(OUR_PROTOCOL.into())
        .priority(route.metric);
    match route.hop {
        Hop::Via { ifindex, .. } | Hop::Link { ifindex } => {
            builder = builder.output_interface(ifindex);
        }
        Hop::Unreachable => builder = builder.kind(RouteType::Unreachable),
        Hop::Other => {}
    }
    let mut message = builder.scope(RouteScope::Universe).build();
    let is_v4 = route.to.addr().is_ipv4();
    message.header.address_family = if is_v4 {
        rtnetlink::packet_route::AddressFamily::Inet
    } else {
        rtnetlink::packet_route::AddressFamily::Inet6
    };
    message.header.destination_prefix_length = route.to.prefix_len();
    let to = RouteAddress::from(route.to.addr());
    message.attributes.push(RouteAttribute::Destination(to));
    if let Hop::Via { gateway, .. } = route.hop {
        let gateway = RouteAddress::from(gateway);
        message.attributes.push(RouteAttribute::Gateway(gateway));
    }
    message
}

fn ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(v4) => Some((*v4).into()),
        RouteAddress::Inet6(v6) => Some((*v6).into()),
        _ => None,
    }
}

fn to_io(error: rtnetlink::Error) -> io::Error {
    match error {
        rtnetlink::Error::NetlinkError(error) => error.to_io(),
        other => io::Error::other(other),
    }
}
