//! A socket that the kernel tells nothing of pods' devices: they come and go all the time, each with half a dozen
//! messages that take long to parse, and nobody who listens here wants to know.

use std::io;

use libc::{
    BPF_ABS, BPF_H, BPF_JEQ, BPF_JMP, BPF_K, BPF_LD, BPF_RET, BPF_W, IFLA_IFNAME, RTM_DELLINK,
    RTM_NEWLINK,
};
use rtnetlink::sys::AsyncSocket;
use socket2::{SockFilter, SockRef};
use weir_cni::attachment::DEVICE_PREFIX;

/// Where things are in a message, in bytes (include/uapi/linux/netlink.h, rtnetlink.h): its type; then, behind the header
/// and what is said of a link, the first attribute, which is its name.
const MESSAGE_TYPE: u32 = 4;
const ATTRIBUTE_TYPE: u32 = 34;
const NAME: u32 = 36;

/// What a filter answers: how many bytes of the message are told.
const NOTHING: u32 = 0;
const EVERYTHING: u32 = u32::MAX;

/// Makes the socket so.
///
/// # Errors
/// The kernel refuses.
pub(super) fn deafen(socket: &impl AsyncSocket) -> io::Result<()> {
    SockRef::from(socket.socket_ref()).attach_filter(&filter())
}

/// Of a message about a link whose name begins as those of pods' devices: nothing. Of everything else, and of a link
/// whose first attribute is another: everything.
fn filter() -> [SockFilter; 9] {
    let load = |size: u32, at: u32| step(BPF_LD | size | BPF_ABS, at, 0, 0);
    // How many steps are passed over if it is that, and if it is not.
    let is = |that: u32, yes: u8, no: u8| step(BPF_JMP | BPF_JEQ | BPF_K, that, yes, no);
    let tell = |bytes: u32| step(BPF_RET | BPF_K, bytes, 0, 0);
    [
        load(BPF_H, MESSAGE_TYPE),
        is(as_loaded(RTM_NEWLINK), 1, 0),
        is(as_loaded(RTM_DELLINK), 0, 4),
        load(BPF_H, ATTRIBUTE_TYPE),
        is(as_loaded(IFLA_IFNAME), 0, 2),
        load(BPF_W, NAME),
        is(prefix(), 1, 0),
        tell(EVERYTHING),
        tell(NOTHING),
    ]
}

fn step(code: u32, k: u32, yes: u8, no: u8) -> SockFilter {
    SockFilter::new(code as u16, yes, no, k)
}

/// A filter loads in network order what netlink writes in that of the machine.
fn as_loaded(number: u16) -> u32 {
    u16::from_be_bytes(number.to_ne_bytes()).into()
}

fn prefix() -> u32 {
    const _: () = assert!(DEVICE_PREFIX.len() == 4);
    DEVICE_PREFIX
        .bytes()
        .fold(0, |all, byte| all << 8 | u32::from(byte))
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixDatagram;

    use rtnetlink::packet_core::{NetlinkHeader, NetlinkMessage, NetlinkPayload};
    use rtnetlink::packet_route::RouteNetlinkMessage;
    use rtnetlink::packet_route::link::{LinkAttribute, LinkMessage};
    use rtnetlink::packet_route::route::RouteMessage;

    use super::*;

    fn bytes(message: RouteNetlinkMessage) -> Vec<u8> {
        let mut message =
            NetlinkMessage::new(NetlinkHeader::default(), NetlinkPayload::from(message));
        message.finalize();
        let mut bytes = vec![0; message.buffer_len()];
        message.serialize(&mut bytes);
        bytes
    }

    fn link(attributes: Vec<LinkAttribute>) -> LinkMessage {
        let mut link = LinkMessage::default();
        link.attributes = attributes;
        link
    }

    #[test]
    fn nothing_is_heard_of_the_devices_of_pods_and_all_of_others() {
        // The kernel runs a filter on what comes into any socket.
        let (from, to) = UnixDatagram::pair().unwrap();
        to.set_nonblocking(true).unwrap();
        SockRef::from(&to).attach_filter(&filter()).unwrap();
        let name = |name: &str| LinkAttribute::IfName(name.into());
        let (pod, mtu) = (|| name("weir0123456789"), || LinkAttribute::Mtu(1500));
        let new = |attributes| RouteNetlinkMessage::NewLink(link(attributes));
        let del = |attributes| RouteNetlinkMessage::DelLink(link(attributes));
        let mut buffer = [0; 512];
        for (message, is_heard) in [
            (new(vec![pod(), mtu()]), false),
            (del(vec![pod(), mtu()]), false),
            (new(vec![name("eth0"), mtu()]), true),
            (del(vec![name("wei"), mtu()]), true),
            (new(vec![mtu(), pod()]), true),
            (RouteNetlinkMessage::NewRoute(RouteMessage::default()), true),
        ] {
            let bytes = bytes(message.clone());
            from.send(&bytes).unwrap();
            let heard = to.recv(&mut buffer).is_ok_and(|n| buffer[..n] == bytes);
            assert_eq!(heard, is_heard, "{message:?}");
        }
    }
}
