//! A route netlink socket for one request at a time, blocking: for what is done on a thread that may wait for the
//! kernel. What is asked is not here.

use std::io;
use std::sync::{Mutex, PoisonError};

use rtnetlink::packet_core::{
    NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NetlinkBuffer, NetlinkHeader, NetlinkMessage,
    NetlinkPayload,
};
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};

/// Large enough for any datagram of a dump; the kernel makes them no larger than 32 KiB.
const DATAGRAM: usize = 64 * 1024;

/// Speaks to the namespace in which it was opened, from whichever thread.
#[derive(Debug)]
pub(in crate::kernel) struct Requests {
    conversation: Mutex<Conversation>,
}

#[derive(Debug)]
struct Conversation {
    socket: Socket,
    sequence: u32,
}

/// What the kernel says to a request.
#[derive(Debug, Default)]
struct Answers {
    answers: Vec<RouteNetlinkMessage>,
    /// How many more, which nobody here can read.
    unreadable: usize,
}

impl Requests {
    /// Opens it in the network namespace of the calling thread.
    pub(in crate::kernel) fn open() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        let conversation = Mutex::new(Conversation {
            socket,
            sequence: 0,
        });
        Ok(Self { conversation })
    }

    /// Asks for one thing, or changes it; what the kernel says to it, when it is done.
    pub(in crate::kernel) fn ask(
        &self,
        message: RouteNetlinkMessage,
        flags: u16,
    ) -> io::Result<Vec<RouteNetlinkMessage>> {
        Ok(self.exchange(message, NLM_F_ACK | flags)?.answers)
    }

    /// Asks for all things of a kind. Those that nobody here can read are left out.
    pub(in crate::kernel) fn dump(
        &self,
        message: RouteNetlinkMessage,
    ) -> io::Result<Vec<RouteNetlinkMessage>> {
        Ok(self.exchange(message, NLM_F_DUMP)?.answers)
    }

    /// Is there anything of a kind, whether it can be read here or not?
    pub(in crate::kernel) fn is_any(&self, message: RouteNetlinkMessage) -> io::Result<bool> {
        let Answers {
            answers,
            unreadable,
        } = self.exchange(message, NLM_F_DUMP)?;
        Ok(!answers.is_empty() || unreadable > 0)
    }

    fn exchange(&self, message: RouteNetlinkMessage, flags: u16) -> io::Result<Answers> {
        let mut guard = self
            .conversation
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let conversation = &mut *guard;
        conversation.sequence = conversation.sequence.wrapping_add(1);
        let mut header = NetlinkHeader::default();
        header.flags = NLM_F_REQUEST | flags;
        header.sequence_number = conversation.sequence;
        let mut request = NetlinkMessage::new(header, NetlinkPayload::from(message));
        request.finalize();
        let mut bytes = vec![0; request.buffer_len()];
        request.serialize(&mut bytes);
        conversation.socket.send(&bytes, 0)?;

        let mut found = Answers::default();
        loop {
            let mut datagram = Vec::with_capacity(DATAGRAM);
            conversation.socket.recv(&mut datagram, 0)?;
            let mut rest = datagram.as_slice();
            while !rest.is_empty() {
                let length = NetlinkBuffer::new_checked(rest)
                    .map_err(io::Error::other)?
                    .length() as usize;
                let answer = NetlinkMessage::<RouteNetlinkMessage>::deserialize(rest);
                // Messages are aligned to four bytes; the last one of a datagram need not be.
                rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
                let Ok(answer) = answer else {
                    found.unreadable += 1;
                    continue;
                };
                if answer.header.sequence_number != conversation.sequence {
                    continue;
                }
                match answer.payload {
                    NetlinkPayload::InnerMessage(message) => found.answers.push(message),
                    NetlinkPayload::Done(_) => return Ok(found),
                    NetlinkPayload::Error(error) => match error.code {
                        None => return Ok(found),
                        Some(_) => return Err(error.to_io()),
                    },
                    NetlinkPayload::Overrun(_) => {
                        return Err(io::Error::other("netlink lost an answer"));
                    }
                    _ => {}
                }
            }
        }
    }
}
