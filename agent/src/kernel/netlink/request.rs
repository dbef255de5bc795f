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
        self.exchange(message, NLM_F_ACK | flags)
    }

    /// Asks for all things of a kind. Those that nobody here can read are left out.
    pub(in crate::kernel) fn dump(
        &self,
        message: RouteNetlinkMessage,
    ) -> io::Result<Vec<RouteNetlinkMessage>> {
        self.exchange(message, NLM_F_DUMP)
    }

    fn exchange(
        &self,
        message: RouteNetlinkMessage,
        flags: u16,
    ) -> io::Result<Vec<RouteNetlinkMessage>> {
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

        let mut answers = Vec::new();
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
                let Ok(answer) = answer else { continue };
                if answer.header.sequence_number != conversation.sequence {
                    continue;
                }
                match answer.payload {
                    NetlinkPayload::InnerMessage(message) => answers.push(message),
                    NetlinkPayload::Done(_) => return Ok(answers),
                    NetlinkPayload::Error(error) => match error.code {
                        None => return Ok(answers),
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
