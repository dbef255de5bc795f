//! The addresses at which weir-dns answers, on the loopback device: put there, kept there, taken away. What policy
//! thinks of them is in `compile`.

use std::collections::BTreeSet;
use std::fs;
use std::io::ErrorKind;
use std::net::IpAddr;
use std::time::Duration;

use anyhow::{Context, Result};
use futures::{FutureExt, StreamExt, TryStreamExt};
use rtnetlink::packet_core::NetlinkPayload;
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::address::{
    AddressAttribute, AddressHeaderFlags, AddressMessage, AddressProtocol, AddressScope, CacheInfo,
};
use rtnetlink::{MulticastGroup, new_multicast_connection};
use tracing::{info, warn};

use super::{BURST, Netlink};
use crate::beat::{LOOK, beat};
use crate::conditions::{About, Condition, NodeFault, Reporter};

/// Who has put an address on a device (`IFA_PROTO`): we. The kernel's own are 1 to 3.
const OUR_PROTOCOL: AddressProtocol = AddressProtocol::Other(0x57);
/// After how long the kernel is asked again when it did not answer.
const RETRY: Duration = Duration::from_secs(1);

/// What became of an address.
#[derive(Clone, Debug, Eq, PartialEq)]
enum Found {
    /// It was there, as it must be.
    There,
    /// It was not, or otherwise, and is now.
    Put,
    /// The node has no such family: nobody asks there.
    FamilyLacking,
    /// The kernel refuses it.
    Refused(String),
}

/// Puts these addresses on the loopback device, before anything is decided by where traffic comes from. One that
/// cannot be put there is no error: who keeps them will say so.
///
/// # Errors
/// The kernel does not answer.
pub async fn put_dns_addresses(addresses: &[IpAddr]) -> Result<()> {
    let netlink = Netlink::open()?;
    let lo = netlink.loopback().await?;
    netlink.look_after(lo, addresses).await?;
    Ok(())
}

/// Keeps these addresses on the loopback device: looks whenever an address of that device changes, and every
/// `audit`. Says which are missing, for as long as they are.
pub async fn keep_dns_addresses(addresses: Vec<IpAddr>, audit: Duration, reporter: Reporter) {
    let mut without_family = BTreeSet::new();
    loop {
        let Err(error) = keep(&addresses, audit, &reporter, &mut without_family).await;
        let text = format!("whether it is on the loopback device is not known: {error:#}");
        let unknown = addresses.iter().filter(|ip| !without_family.contains(*ip));
        reporter.replace(unknown.map(|ip| missing(ip, &text)));
        tokio::time::sleep(RETRY).await;
    }
}

async fn keep(
    addresses: &[IpAddr],
    audit: Duration,
    reporter: &Reporter,
    without_family: &mut BTreeSet<IpAddr>,
) -> Result<std::convert::Infallible> {
    let groups = [MulticastGroup::Ipv4Ifaddr, MulticastGroup::Ipv6Ifaddr];
    let (connection, handle, mut news) =
        new_multicast_connection(&groups).context("listen for changes of addresses")?;
    let netlink = Netlink {
        handle,
        driver: tokio::spawn(connection),
    };
    let lo = netlink.loopback().await?;
    let is_of_lo = |payload: &NetlinkPayload<RouteNetlinkMessage>| match payload {
        NetlinkPayload::InnerMessage(
            RouteNetlinkMessage::NewAddress(address) | RouteNetlinkMessage::DelAddress(address),
        ) => address.header.index == lo,
        // Some were lost, perhaps.
        _ => true,
    };
    loop {
        let mut is_refused = false;
        for (ip, found) in netlink.look_after(lo, addresses).await? {
            if found == Found::FamilyLacking {
                if without_family.insert(ip) {
                    warn!(address = %ip, "the node lacks the family: weir-dns is not asked there");
                }
            } else if without_family.remove(&ip) {
                info!(address = %ip, "the node has the family now");
            }
            match found {
                Found::Refused(ref why) => {
                    is_refused = true;
                    let text = format!("it is not on the loopback device: {why}");
                    reporter.raise(missing(&ip, &text));
                }
                Found::There | Found::Put | Found::FamilyLacking => {
                    reporter.clear(&About::Node(NodeFault::DnsAddress, ip.to_string()));
                }
            }
            if found == Found::Put {
                info!(address = %ip, "put on the loopback device");
            }
        }
        // Who takes addresses off in a loop is not followed faster than this.
        tokio::time::sleep(BURST).await;
        let news = async {
            while let Some((message, _)) = news.next().await {
                if is_of_lo(&message.payload) {
                    while let Some(Some(_)) = news.next().now_or_never() {}
                    return Ok(());
                }
            }
            anyhow::bail!("the kernel says nothing of addresses any more")
        };
        tokio::select! {
            heard = news => heard?,
            () = beat(if is_refused { audit.min(LOOK) } else { audit }) => {}
        }
    }
}

fn missing(ip: &IpAddr, text: &str) -> Condition {
    Condition::part(NodeFault::DnsAddress, ip.to_string(), text)
}

/// Takes off the loopback device what an agent has put there. Returns it.
///
/// # Errors
/// The kernel refuses.
pub async fn remove_dns_addresses() -> Result<Vec<IpAddr>> {
    let netlink = Netlink::open()?;
    let lo = netlink.loopback().await?;
    let mut removed = BTreeSet::new();
    for address in netlink.addresses_of(lo).await? {
        if is_ours(&address) {
            removed.extend(ip_of(&address));
            netlink.remove(address).await?;
        }
    }
    Ok(removed.into_iter().collect())
}

impl Netlink {
    /// Looks at each address, and puts it there as it must be if it is not.
    async fn look_after(&self, lo: u32, addresses: &[IpAddr]) -> Result<Vec<(IpAddr, Found)>> {
        let there = self.addresses_of(lo).await?;
        let mut all = Vec::new();
        for ip in addresses {
            let of_ip: Vec<_> = there.iter().filter(|it| ip_of(it) == Some(*ip)).collect();
            let found = match lacks_family(ip) {
                true => Found::FamilyLacking,
                false => match self.settle(lo, *ip, &of_ip).await {
                    Ok(found) => found,
                    Err(error) => Found::Refused(format!("{error:#}")),
                },
            };
            all.push((*ip, found));
        }
        Ok(all)
    }

    /// The kernel prefers an address of the loopback device as the source of what the node sends to its pods, which
    /// have no address on the node's end. As such it would be judged as DNS, which may reach nobody. So these are
    /// none to choose: of host scope, or deprecated (RFC 6724 section 5, rule 3).
    async fn settle(&self, lo: u32, ip: IpAddr, there: &[&AddressMessage]) -> Result<Found> {
        let (full, wider) = if ip.is_ipv4() { (32, 31) } else { (128, 127) };
        let at = |length: u8| {
            let mut all = there.iter();
            all.find(move |it| it.header.prefix_len == length).copied()
        };
        match at(full) {
            None => self.add(lo, ip, full).await?,
            Some(address) if is_no_source(address) => match at(wider) {
                // An agent ended in between, below.
                Some(spare) if is_ours(spare) => self.remove(spare.clone()).await?,
                _ => return Ok(Found::There),
            },
            Some(address) if ip.is_ipv4() => {
                // A scope cannot be changed. With another length beside it the address never goes.
                if at(wider).is_none() {
                    self.add(lo, ip, wider).await?;
                }
                self.remove(address.clone()).await?;
                self.add(lo, ip, full).await?;
                for spare in self.addresses_of(lo).await? {
                    if ip_of(&spare) == Some(ip) && spare.header.prefix_len == wider {
                        self.remove(spare).await?;
                    }
                }
            }
            Some(_) => self.add(lo, ip, full).await?,
        }
        Ok(Found::Put)
    }

    async fn addresses_of(&self, device: u32) -> Result<Vec<AddressMessage>> {
        let request = self.handle.address().get();
        let request = request.set_link_index_filter(device).execute();
        request.try_collect().await.context("list the addresses")
    }

    /// Adds an address, or makes one of IPv6 like this.
    async fn add(&self, lo: u32, ip: IpAddr, length: u8) -> Result<()> {
        let mut request = self.handle.address().add(lo, ip, length);
        let message = request.message_mut();
        message
            .attributes
            .push(AddressAttribute::Protocol(OUR_PROTOCOL));
        if ip.is_ipv4() {
            message.header.scope = AddressScope::Host;
        } else {
            let mut deprecated = CacheInfo::default();
            deprecated.ifa_valid = u32::MAX;
            let lifetime = AddressAttribute::CacheInfo(deprecated);
            message.attributes.push(lifetime);
            request = request.replace();
        }
        match request.execute().await {
            // Somebody else was faster.
            Err(rtnetlink::Error::NetlinkError(error))
                if error.to_io().raw_os_error() == Some(libc::EEXIST) =>
            {
                Ok(())
            }
            other => other.with_context(|| format!("put {ip}/{length} on the loopback device")),
        }
    }

    async fn remove(&self, address: AddressMessage) -> Result<()> {
        let removed = self.handle.address().del(address).execute().await;
        removed.context("take an address off the loopback device")
    }
}

fn is_ours(address: &AddressMessage) -> bool {
    let protocol = AddressAttribute::Protocol(OUR_PROTOCOL);
    address.attributes.contains(&protocol)
}

fn is_no_source(address: &AddressMessage) -> bool {
    let is_deprecated = address
        .header
        .flags
        .contains(AddressHeaderFlags::Deprecated);
    address.header.scope == AddressScope::Host || is_deprecated
}

fn ip_of(address: &AddressMessage) -> Option<IpAddr> {
    let mut attributes = address.attributes.iter();
    attributes.find_map(|attribute| match attribute {
        AddressAttribute::Address(ip) => Some(*ip),
        _ => None,
    })
}

/// `ipv6.disable=1` of the kernel's command line, or `net.ipv6.conf.lo.disable_ipv6`.
fn lacks_family(ip: &IpAddr) -> bool {
    if ip.is_ipv4() {
        return false;
    }
    match fs::read_to_string("/proc/sys/net/ipv6/conf/lo/disable_ipv6") {
        Ok(disabled) => disabled.trim() != "0",
        Err(error) => error.kind() == ErrorKind::NotFound,
    }
}
