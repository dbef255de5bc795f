//! What the plugin asks of the kernel, as verbs on devices: create, find, address, route, delete.
//! In which order, `add` and `del` know.

use std::io;
use std::net::IpAddr;
use std::os::fd::{AsRawFd, BorrowedFd};

use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE};
use netlink_packet_route::address::{
    AddressAttribute, AddressFlags, AddressHeaderFlags, AddressMessage, AddressScope,
};
use netlink_packet_route::link::{
    AfSpecInet6, AfSpecUnspec, In6AddrGenMode, InfoData, InfoKind, InfoVeth, LinkAttribute,
    LinkExtentMask, LinkFlags, LinkInfo, LinkMessage,
};
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState,
};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteProtocol, RouteScope, RouteType,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use weir_cni::wire::Mac;

use crate::netlink::Netlink;

/// What the kernel says about a device.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Link {
    pub(crate) index: u32,
    /// The index of the other end of its pair, in that one's namespace.
    pub(crate) peer: Option<u32>,
    pub(crate) mac: Option<Mac>,
    pub(crate) mtu: u32,
    pub(crate) up: bool,
}

/// One end of a pair to be made.
pub(crate) struct End<'a> {
    pub(crate) name: &'a str,
    pub(crate) mac: Mac,
}

/// What becomes of an earlier route to the same place.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Earlier {
    /// It leads to a device that is about to go.
    Replaced,
    /// It is somebody else's: adding ours is an error.
    Kept,
}

impl Netlink {
    /// Makes a veth pair, both ends down, the peer directly in `netns`: moving it there afterwards
    /// costs about 19 ms.
    pub(crate) fn create_veth(
        &mut self,
        host: &End<'_>,
        peer: &End<'_>,
        netns: BorrowedFd<'_>,
        mtu: u32,
    ) -> io::Result<()> {
        let end = |end: &End<'_>| {
            let mut message = LinkMessage::default();
            message.attributes = vec![
                LinkAttribute::IfName(end.name.into()),
                LinkAttribute::Address(end.mac.0.to_vec()),
                LinkAttribute::Mtu(mtu),
                // One of each is all that the kernel uses unless told otherwise. Without being told here it makes one
                // for each processor, takes them back, and waits for an RCU grace period at either end.
                LinkAttribute::NumTxQueues(1),
                LinkAttribute::NumRxQueues(1),
            ];
            message
        };
        let mut inside = end(peer);
        inside
            .attributes
            .push(LinkAttribute::NetNsFd(netns.as_raw_fd()));
        let mut message = end(host);
        message.attributes.push(LinkAttribute::LinkInfo(vec![
            LinkInfo::Kind(InfoKind::Veth),
            LinkInfo::Data(InfoData::Veth(InfoVeth::Peer(inside))),
        ]));
        self.change(
            RouteNetlinkMessage::NewLink(message),
            NLM_F_CREATE | NLM_F_EXCL,
        )
    }

    /// Keeps the kernel from giving the device a link-local IPv6 address when it comes up: neither
    /// end needs one, and without it there is no duplicate address detection to wait for.
    pub(crate) fn forgo_link_local(&mut self, index: u32) -> io::Result<()> {
        let mut message = LinkMessage::default();
        message.header.index = index;
        message.attributes = vec![LinkAttribute::AfSpecUnspec(vec![AfSpecUnspec::Inet6(
            vec![AfSpecInet6::AddrGenMode(In6AddrGenMode::None)],
        )])];
        match self.change(RouteNetlinkMessage::SetLink(message), 0) {
            // No IPv6 in this kernel, or not on a device of this MTU.
            Err(error) if error.raw_os_error() == Some(nix::Error::EAFNOSUPPORT as i32) => Ok(()),
            result => result,
        }
    }

    /// The device of this name; `None` when there is none.
    pub(crate) fn link(&mut self, name: &str) -> io::Result<Option<Link>> {
        let mut message = LinkMessage::default();
        message.attributes = vec![
            LinkAttribute::IfName(name.into()),
            // Counters are the most of what is said otherwise.
            LinkAttribute::ExtMask(vec![LinkExtentMask::SkipStats]),
        ];
        let message = match self.read(RouteNetlinkMessage::GetLink(message)) {
            Ok(RouteNetlinkMessage::NewLink(message)) => message,
            Ok(_) => return Err(io::Error::other("not a link")),
            Err(error) if is_no_device(&error) => return Ok(None),
            Err(error) => return Err(error),
        };
        let mut link = Link {
            index: message.header.index,
            peer: None,
            mac: None,
            mtu: 0,
            up: message.header.flags.contains(LinkFlags::Up),
        };
        for attribute in message.attributes {
            match attribute {
                LinkAttribute::Address(bytes) => link.mac = bytes.try_into().ok().map(Mac),
                LinkAttribute::Mtu(mtu) => link.mtu = mtu,
                LinkAttribute::Link(peer) => link.peer = Some(peer),
                _ => {}
            }
        }
        Ok(Some(link))
    }

    pub(crate) fn up(&mut self, index: u32) -> io::Result<()> {
        let mut message = LinkMessage::default();
        message.header.index = index;
        message.header.flags = LinkFlags::Up;
        message.header.change_mask = LinkFlags::Up;
        self.change(RouteNetlinkMessage::SetLink(message), 0)
    }

    /// Deletes a device, and with it its peer. Says whether it was there.
    pub(crate) fn delete(&mut self, name: &str) -> io::Result<bool> {
        let mut message = LinkMessage::default();
        message.attributes = vec![LinkAttribute::IfName(name.into())];
        match self.change(RouteNetlinkMessage::DelLink(message), 0) {
            Ok(()) => Ok(true),
            Err(error) if is_no_device(&error) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Gives a device a host address that is usable at once.
    pub(crate) fn add_address(&mut self, index: u32, address: IpAddr) -> io::Result<()> {
        let mut message = AddressMessage::default();
        message.header.family = family(address);
        message.header.prefix_len = prefix_len(address);
        message.header.index = index;
        message.header.scope = AddressScope::Universe;
        message.attributes = vec![AddressAttribute::Address(address)];
        match address {
            IpAddr::V4(_) => message.attributes.push(AddressAttribute::Local(address)),
            IpAddr::V6(_) => {
                message.header.flags = AddressHeaderFlags::Nodad;
                message
                    .attributes
                    .push(AddressAttribute::Flags(AddressFlags::Nodad));
            }
        }
        self.change(
            RouteNetlinkMessage::NewAddress(message),
            NLM_F_CREATE | NLM_F_EXCL,
        )
    }

    /// The addresses of a device.
    pub(crate) fn addresses(&mut self, index: u32) -> io::Result<Vec<IpAddr>> {
        let mut request = AddressMessage::default();
        request.header.index = index;
        let mut found = Vec::new();
        for message in self.dump(RouteNetlinkMessage::GetAddress(request))? {
            let RouteNetlinkMessage::NewAddress(message) = message else {
                continue;
            };
            if message.header.index != index {
                continue;
            }
            found.extend(
                message
                    .attributes
                    .iter()
                    .find_map(|attribute| match attribute {
                        AddressAttribute::Address(address) => Some(*address),
                        _ => None,
                    }),
            );
        }
        Ok(found)
    }

    /// Adds or replaces a neighbour entry that never has to be asked for and never expires.
    pub(crate) fn fix_neighbour(
        &mut self,
        index: u32,
        address: IpAddr,
        mac: Mac,
    ) -> io::Result<()> {
        let mut message = NeighbourMessage::default();
        message.header.family = family(address);
        message.header.ifindex = index;
        message.header.state = NeighbourState::Permanent;
        message.header.kind = RouteType::Unicast;
        message.attributes = vec![
            NeighbourAttribute::Destination(match address {
                IpAddr::V4(address) => NeighbourAddress::Inet(address),
                IpAddr::V6(address) => NeighbourAddress::Inet6(address),
            }),
            NeighbourAttribute::LinkLayerAddress(mac.0.to_vec()),
        ];
        self.change(
            RouteNetlinkMessage::NewNeighbour(message),
            NLM_F_CREATE | NLM_F_REPLACE,
        )
    }

    /// Where the fixed neighbour entry of an address points.
    pub(crate) fn fixed_neighbour(
        &mut self,
        index: u32,
        address: IpAddr,
    ) -> io::Result<Option<Mac>> {
        let mut request = NeighbourMessage::default();
        request.header.family = family(address);
        for message in self.dump(RouteNetlinkMessage::GetNeighbour(request))? {
            let RouteNetlinkMessage::NewNeighbour(message) = message else {
                continue;
            };
            if message.header.ifindex != index || message.header.state != NeighbourState::Permanent
            {
                continue;
            }
            let mut of_address = false;
            let mut mac = None;
            for attribute in &message.attributes {
                match attribute {
                    NeighbourAttribute::Destination(NeighbourAddress::Inet(found)) => {
                        of_address = address == *found;
                    }
                    NeighbourAttribute::Destination(NeighbourAddress::Inet6(found)) => {
                        of_address = address == *found;
                    }
                    NeighbourAttribute::LinkLayerAddress(bytes) => {
                        mac = bytes.as_slice().try_into().ok().map(Mac);
                    }
                    _ => {}
                }
            }
            if of_address {
                return Ok(mac);
            }
        }
        Ok(None)
    }

    /// Adds the route to one address on a device's link.
    pub(crate) fn route_to(
        &mut self,
        index: u32,
        address: IpAddr,
        earlier: Earlier,
    ) -> io::Result<()> {
        let mut message = route(address);
        message.header.destination_prefix_length = prefix_len(address);
        if address.is_ipv4() {
            message.header.scope = RouteScope::Link;
        }
        message.attributes = vec![
            RouteAttribute::Destination(route_address(address)),
            RouteAttribute::Oif(index),
        ];
        let flags = match earlier {
            Earlier::Replaced => NLM_F_REPLACE,
            Earlier::Kept => NLM_F_EXCL,
        };
        self.change(RouteNetlinkMessage::NewRoute(message), NLM_F_CREATE | flags)
    }

    /// Adds the default route of the gateway's family; an earlier one stays, and is an error.
    pub(crate) fn route_default(&mut self, index: u32, gateway: IpAddr) -> io::Result<()> {
        let mut message = route(gateway);
        message.attributes = vec![
            RouteAttribute::Gateway(route_address(gateway)),
            RouteAttribute::Oif(index),
        ];
        self.change(
            RouteNetlinkMessage::NewRoute(message),
            NLM_F_CREATE | NLM_F_EXCL,
        )
    }

    /// Whether there is a route to exactly `destination` (the default when `None`) over a device,
    /// through `gateway` when one is given. Both in the family of `of`.
    pub(crate) fn is_routed(
        &mut self,
        index: u32,
        of: IpAddr,
        destination: Option<IpAddr>,
        gateway: Option<IpAddr>,
    ) -> io::Result<bool> {
        let mut request = RouteMessage::default();
        request.header.address_family = family(of);
        let wanted_len = destination.map_or(0, prefix_len);
        for message in self.dump(RouteNetlinkMessage::GetRoute(request))? {
            let RouteNetlinkMessage::NewRoute(message) = message else {
                continue;
            };
            if message.header.destination_prefix_length != wanted_len
                || message.header.table != RouteHeader::RT_TABLE_MAIN
            {
                continue;
            }
            let has = |wanted: &RouteAttribute| message.attributes.contains(wanted);
            if has(&RouteAttribute::Oif(index))
                && destination.is_none_or(|it| has(&RouteAttribute::Destination(route_address(it))))
                && gateway.is_none_or(|it| has(&RouteAttribute::Gateway(route_address(it))))
            {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

fn route(of: IpAddr) -> RouteMessage {
    let mut message = RouteMessage::default();
    message.header.address_family = family(of);
    message.header.table = RouteHeader::RT_TABLE_MAIN;
    message.header.protocol = RouteProtocol::Boot;
    message.header.scope = RouteScope::Universe;
    message.header.kind = RouteType::Unicast;
    message
}

fn route_address(address: IpAddr) -> RouteAddress {
    match address {
        IpAddr::V4(address) => RouteAddress::Inet(address),
        IpAddr::V6(address) => RouteAddress::Inet6(address),
    }
}

fn family(address: IpAddr) -> AddressFamily {
    match address {
        IpAddr::V4(_) => AddressFamily::Inet,
        IpAddr::V6(_) => AddressFamily::Inet6,
    }
}

fn prefix_len(address: IpAddr) -> u8 {
    match address {
        IpAddr::V4(_) => 32,
        IpAddr::V6(_) => 128,
    }
}

fn is_no_device(error: &io::Error) -> bool {
    error.raw_os_error() == Some(nix::Error::ENODEV as i32)
}
