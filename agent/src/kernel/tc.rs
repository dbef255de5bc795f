//! Classifying queues and their filters, as verbs: join a device to our blocks, put a program on a side, look what is
//! there. What for, `block` and `uplinks` know.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use rtnetlink::packet_core::Nla;
use rtnetlink::packet_core::{DefaultNla, NLM_F_CREATE, NLM_F_ECHO, NLM_F_EXCL, NLM_F_REPLACE};
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::link::{LinkAttribute, LinkMessage};
use rtnetlink::packet_route::tc::{
    TcAttribute, TcBpfFlags, TcFilterBpf, TcFilterBpfOption, TcHandle, TcHeader, TcMessage,
    TcOption, TcU32OptionFlags,
};
use rtnetlink::sys::protocols::NETLINK_ROUTE;

use super::netlink::request::Requests;

/// The blocks that all pods' devices share, by side. Numbers of ours: a block's number is the namespace's.
const BLOCKS: [(Side, u32); 2] = [(Side::In, 0x5745_4901), (Side::Out, 0x5745_4902)];
/// `TCA_INGRESS_BLOCK` and `TCA_EGRESS_BLOCK`, which the crate passes on as they are.
const INGRESS_BLOCK: u16 = 13;
const EGRESS_BLOCK: u16 = 14;
/// Where our filter is among others: what others put without choosing a preference comes after it.
const PREFERENCE: u16 = 7;
/// Which it is at this preference.
const HANDLE: u32 = 0x57;
/// `ETH_P_ALL`.
const EVERY_PROTOCOL: u16 = 3;
/// The queue with a side for either direction.
const CLSACT: &str = "clsact";

/// A side of a device.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(super) enum Side {
    /// What the device has received.
    In,
    /// What it is about to send.
    Out,
}

impl Side {
    pub(super) const BOTH: [Self; 2] = [Self::In, Self::Out];

    /// How the names of its hooks end.
    pub(super) fn suffix(self) -> &'static str {
        match self {
            Self::In => "-in",
            Self::Out => "-out",
        }
    }
}

/// Where a filter can be.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum At {
    /// In the block of all pods, for this side of their devices.
    Pods(Side),
    /// On a device of its own, by interface index.
    Device(u32, Side),
}

/// A filter that runs a program.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) struct Filter {
    /// The kernel's number of the program.
    pub(super) program: u32,
    pub(super) name: String,
    preference: u16,
    protocol: u16,
    handle: u32,
    /// Is what the program says the verdict?
    is_direct: bool,
}

impl Filter {
    /// Is it where ours is?
    pub(super) fn is_in_our_place(&self) -> bool {
        self.preference == PREFERENCE && self.handle == HANDLE && self.is_direct
    }
}

/// The classifying queue of a device.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Queue {
    /// Ours: both sides are in the blocks of all pods.
    InBlocks,
    /// One with both sides, outside of our blocks.
    Own,
    /// One without a side for what is sent, or in other blocks.
    Foreign,
}

/// The kernel's traffic control, in the namespace where it was opened.
#[derive(Debug)]
pub(super) struct Tc {
    requests: Requests,
}

impl Tc {
    pub(super) fn open() -> io::Result<Self> {
        Ok(Self {
            requests: Requests::open(NETLINK_ROUTE)?,
        })
    }

    /// Gives a device a queue whose sides are the blocks of all pods.
    ///
    /// # Errors
    /// `AlreadyExists` when it has one, of whatever kind.
    pub(super) fn join(&self, ifindex: u32) -> io::Result<()> {
        let mut message = queue(ifindex);
        let blocks = BLOCKS.map(|(side, block)| {
            let kind = match side {
                Side::In => INGRESS_BLOCK,
                Side::Out => EGRESS_BLOCK,
            };
            TcAttribute::Other(DefaultNla::new(kind, block.to_ne_bytes().to_vec()))
        });
        message.attributes.extend(blocks);
        self.add_queue(message)
    }

    /// Gives a device a queue of its own.
    ///
    /// # Errors
    /// As [`Self::join`].
    pub(super) fn give_queue(&self, ifindex: u32) -> io::Result<()> {
        self.add_queue(queue(ifindex))
    }

    fn add_queue(&self, message: TcMessage) -> io::Result<()> {
        let message = RouteNetlinkMessage::NewQueueDiscipline(message);
        let added = self.requests.ask(message, NLM_F_CREATE | NLM_F_EXCL);
        added.map(drop)
    }

    /// Takes a device's classifying queue off, with what is on it. One that is not there is no error.
    pub(super) fn remove_queue(&self, ifindex: u32) -> io::Result<()> {
        let mut message = queue(ifindex);
        // Of whatever kind.
        message.attributes.clear();
        let message = RouteNetlinkMessage::DelQueueDiscipline(message);
        absent_is_done(self.requests.ask(message, 0).map(drop))
    }

    /// The classifying queue of a device.
    ///
    /// # Errors
    /// `ENODEV` when the device is not there.
    pub(super) fn queue_of(&self, ifindex: u32) -> io::Result<Option<Queue>> {
        let mut message = TcMessage::with_index(ifindex as i32);
        message.header.parent = TcHandle::INGRESS;
        let message = RouteNetlinkMessage::GetQueueDiscipline(message);
        // Kernels before 6.7 answer as to a change: to everybody, and to who asked only if that is asked for.
        match self.requests.ask(message, NLM_F_ECHO) {
            Ok(answers) => Ok(answers.iter().find_map(read_queue).map(|(_, queue)| queue)),
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The classifying queues of all devices, by interface index.
    pub(super) fn queues(&self) -> io::Result<BTreeMap<u32, Queue>> {
        let message = RouteNetlinkMessage::GetQueueDiscipline(TcMessage::default());
        let queues = self.requests.dump(message)?;
        Ok(queues.iter().filter_map(read_queue).collect())
    }

    /// Runs a program for every packet, in place of the one that is in our place: each packet meets one of the two.
    pub(super) fn put(&self, at: At, program: BorrowedFd<'_>, name: &str) -> io::Result<()> {
        let mut message = at.message(PREFERENCE, EVERY_PROTOCOL, HANDLE);
        let options = [
            TcFilterBpfOption::ProgFd(program.as_raw_fd() as u32),
            TcFilterBpfOption::ProgName(name.to_owned()),
            TcFilterBpfOption::Flags(TcBpfFlags::DirectAction),
            TcFilterBpfOption::FlagsGeneric(TcU32OptionFlags::SkipHw),
        ];
        message.attributes = vec![
            TcAttribute::Kind(TcFilterBpf::KIND.to_owned()),
            TcAttribute::Options(options.into_iter().map(TcOption::Bpf).collect()),
        ];
        let message = RouteNetlinkMessage::NewTrafficFilter(message);
        let put = self.requests.ask(message, NLM_F_CREATE | NLM_F_REPLACE);
        put.map(drop)
    }

    /// The filter in our place. None when there is no such queue or block either.
    pub(super) fn get(&self, at: At) -> io::Result<Option<Filter>> {
        let message = at.message(PREFERENCE, EVERY_PROTOCOL, HANDLE);
        let message = RouteNetlinkMessage::GetTrafficFilter(message);
        match self.requests.ask(message, 0) {
            Ok(answers) => Ok(answers.iter().find_map(read_filter)),
            Err(error) if is_absent(&error) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Every filter that runs a program, in the order of their preferences.
    pub(super) fn filters(&self, at: At) -> io::Result<Vec<Filter>> {
        let message = RouteNetlinkMessage::GetTrafficFilter(at.message(0, 0, 0));
        match self.requests.dump(message) {
            Ok(answers) => Ok(answers.iter().filter_map(read_filter).collect()),
            Err(error) if is_absent(&error) => Ok(Vec::new()),
            Err(error) => Err(error),
        }
    }

    /// Is there any filter, of whatever kind?
    pub(super) fn is_empty(&self, at: At) -> io::Result<bool> {
        let message = RouteNetlinkMessage::GetTrafficFilter(at.message(0, 0, 0));
        match self.requests.is_any(message) {
            Ok(is_any) => Ok(!is_any),
            Err(error) if is_absent(&error) => Ok(true),
            Err(error) => Err(error),
        }
    }

    /// Takes a filter off. One that is not there is no error.
    pub(super) fn remove(&self, at: At, filter: &Filter) -> io::Result<()> {
        let mut message = at.message(filter.preference, filter.protocol, filter.handle);
        message.attributes = vec![TcAttribute::Kind(TcFilterBpf::KIND.to_owned())];
        let message = RouteNetlinkMessage::DelTrafficFilter(message);
        absent_is_done(self.requests.ask(message, 0).map(drop))
    }
}

/// Deletes a device; its peer in the pod goes with it. One that is not there is no error. Takes the kernel tens of
/// milliseconds.
///
/// # Errors
/// The kernel refuses.
pub(super) fn delete_device(name: &str) -> io::Result<()> {
    let mut message = LinkMessage::default();
    message.attributes = vec![LinkAttribute::IfName(name.to_owned())];
    let requests = Requests::open(NETLINK_ROUTE)?;
    let deleted = requests.ask(RouteNetlinkMessage::DelLink(message), 0);
    absent_is_done(deleted.map(drop))
}

impl At {
    /// A filter's message without what the filter does.
    fn message(self, preference: u16, protocol: u16, handle: u32) -> TcMessage {
        let mut header = TcHeader::default();
        match self {
            Self::Pods(side) => {
                header.index = TcHeader::TCM_IFINDEX_MAGIC_BLOCK as i32;
                header.parent = block_of(side).into();
            }
            Self::Device(ifindex, side) => {
                header.index = ifindex as i32;
                header.parent = TcHandle {
                    major: TcHandle::CLSACT.major,
                    minor: match side {
                        Side::In => TcHandle::MIN_INGRESS,
                        Side::Out => TcHandle::MIN_EGRESS,
                    },
                };
            }
        }
        header.handle = handle.into();
        header.info = u32::from(preference) << 16 | u32::from(protocol.to_be());
        TcMessage::from_parts(header, Vec::new())
    }
}

fn block_of(side: Side) -> u32 {
    let [(_, ingress), (_, egress)] = BLOCKS;
    match side {
        Side::In => ingress,
        Side::Out => egress,
    }
}

fn queue(ifindex: u32) -> TcMessage {
    let mut message = TcMessage::with_index(ifindex as i32);
    message.header.parent = TcHandle::CLSACT;
    message.header.handle = TcHandle {
        major: TcHandle::CLSACT.major,
        minor: 0,
    };
    message.attributes = vec![TcAttribute::Kind(CLSACT.to_owned())];
    message
}

/// A queue that can hold our filters, or is where one would be.
fn read_queue(message: &RouteNetlinkMessage) -> Option<(u32, Queue)> {
    let RouteNetlinkMessage::NewQueueDiscipline(message) = message else {
        return None;
    };
    if message.header.parent != TcHandle::INGRESS {
        return None;
    }
    let mut is_clsact = false;
    let mut blocks = [None; 2];
    for attribute in &message.attributes {
        match attribute {
            TcAttribute::Kind(kind) => is_clsact = kind == CLSACT,
            TcAttribute::Other(other) if other.kind() == INGRESS_BLOCK => {
                blocks[0] = number(other);
            }
            TcAttribute::Other(other) if other.kind() == EGRESS_BLOCK => {
                blocks[1] = number(other);
            }
            _ => {}
        }
    }
    let queue = match blocks {
        [None, None] if is_clsact => Queue::Own,
        blocks if is_clsact && blocks == BLOCKS.map(|(_, block)| Some(block)) => Queue::InBlocks,
        _ => Queue::Foreign,
    };
    Some((message.header.index as u32, queue))
}

fn number(attribute: &DefaultNla) -> Option<u32> {
    let mut bytes = [0; 4];
    if attribute.value_len() != bytes.len() {
        return None;
    }
    attribute.emit_value(&mut bytes);
    Some(u32::from_ne_bytes(bytes))
}

fn read_filter(message: &RouteNetlinkMessage) -> Option<Filter> {
    let RouteNetlinkMessage::NewTrafficFilter(message) = message else {
        return None;
    };
    let mut filter = Filter {
        program: 0,
        name: String::new(),
        preference: (message.header.info >> 16) as u16,
        protocol: u16::from_be(message.header.info as u16),
        handle: message.header.handle.into(),
        is_direct: false,
    };
    let options = message.attributes.iter().find_map(|it| match it {
        TcAttribute::Options(options) => Some(options),
        _ => None,
    });
    for option in options? {
        match option {
            TcOption::Bpf(TcFilterBpfOption::ProgId(id)) => filter.program = *id,
            TcOption::Bpf(TcFilterBpfOption::ProgName(name)) => filter.name.clone_from(name),
            TcOption::Bpf(TcFilterBpfOption::Flags(flags)) => {
                filter.is_direct = flags.contains(TcBpfFlags::DirectAction);
            }
            _ => {}
        }
    }
    (filter.program != 0).then_some(filter)
}

/// No such device, queue, block or filter: the kernel says each in its own way.
fn is_absent(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::ENOENT | libc::ENODEV | libc::EINVAL)
    )
}

fn absent_is_done(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if is_absent(&error) => Ok(()),
        result => result,
    }
}
