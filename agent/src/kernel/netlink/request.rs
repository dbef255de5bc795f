//! A netlink socket for one request at a time, blocking: for what is done on a thread that may wait for the
//! kernel. What is asked is not here.

use std::io;
use std::sync::{Mutex, PoisonError};

use rtnetlink::packet_core::{
    NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NetlinkBuffer, NetlinkDeserializable, NetlinkHeader,
    NetlinkMessage, NetlinkPayload, NetlinkSerializable,
};
use rtnetlink::sys::{Socket, SocketAddr};

/// Large enough for any datagram of a dump; the kernel makes them no larger than 32 KiB.
const DATAGRAM: usize = 64 * 1024;

/// What is asked, and what the kernel answers.
pub(in crate::kernel) trait Message:
    NetlinkSerializable + NetlinkDeserializable
{
}
impl<M: NetlinkSerializable + NetlinkDeserializable> Message for M {}

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
    /// Opens it in the network namespace of the calling thread, to the part of the kernel that speaks this protocol
    /// ([`rtnetlink::sys::protocols`]).
    pub(in crate::kernel) fn open(protocol: isize) -> io::Result<Self> {
        let mut socket = Socket::new(protocol)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        let conversation = Mutex::new(Conversation {
            socket,
            sequence: 0,
        });
        Ok(Self { conversation })
    }

    /// Asks for one thing, or changes it; what the kernel says to it, when it is done.
    pub(in crate::kernel) fn ask<M: Message>(&self, message: M, flags: u16) -> io::Result<Vec<M>> {
        let mut answers = Vec::new();
        self.exchange(message, NLM_F_ACK | flags, |it| answers.push(it))?;
        Ok(answers)
    }

    /// Asks for all things of a kind. Those that nobody here can read are left out.
    pub(in crate::kernel) fn dump<M: Message>(&self, message: M) -> io::Result<Vec<M>> {
        let mut answers = Vec::new();
        self.each(message, |it| answers.push(it))?;
        Ok(answers)
    }

    /// Hands over all things of a kind, one after the other, but those that nobody here can read: says how many these
    /// were. `take` must not ask here for something else.
    pub(in crate::kernel) fn each<M: Message>(
        &self,
        message: M,
        take: impl FnMut(M),
    ) -> io::Result<usize> {
        self.exchange(message, NLM_F_DUMP, take)
    }

    /// Is there anything of a kind, whether it can be read here or not?
    pub(in crate::kernel) fn is_any<M: Message>(&self, message: M) -> io::Result<bool> {
        let mut readable = 0;
        let unreadable = self.exchange(message, NLM_F_DUMP, |_| readable += 1)?;
        Ok(readable + unreadable > 0)
    }

    /// Returns how many answers were such that nobody here can read them.
    fn exchange<M: Message>(
        &self,
        message: M,
        flags: u16,
        mut take: impl FnMut(M),
    ) -> io::Result<usize> {
        let mut guard = self
            .conversation
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let conversation = &mut *guard;
        conversation.sequence = conversation.sequence.wrapping_add(1);
        let mut header = NetlinkHeader::default();
        header.flags = NLM_F_REQUEST | flags;
        header.sequence_number = conversation.sequence;
        let mut request = NetlinkMessage::new(header, NetlinkPayload::InnerMessage(message));
        request.finalize();
        let mut bytes = vec![0; request.buffer_len()];
        request.serialize(&mut bytes);
        conversation.socket.send(&bytes, 0)?;

        let mut unreadable = 0;
        loop {
            let mut datagram = Vec::with_capacity(DATAGRAM);
            conversation.socket.recv(&mut datagram, 0)?;
            let mut rest = datagram.as_slice();
            while !rest.is_empty() {
                let length = NetlinkBuffer::new_checked(rest)
                    .map_err(io::Error::other)?
                    .length() as usize;
                let answer = NetlinkMessage::<M>::deserialize(rest);
                // Messages are aligned to four bytes; the last one of a datagram need not be.
                rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
                let Ok(answer) = answer else {
                    unreadable += 1;
                    continue;
                };
                if answer.header.sequence_number != conversation.sequence {
                    continue;
                }
                match answer.payload {
                    NetlinkPayload::InnerMessage(message) => take(message),
                    NetlinkPayload::Done(done) => match done.code {
                        0.. => return Ok(unreadable),
                        code => return Err(io::Error::from_raw_os_error(-code)),
                    },
                    NetlinkPayload::Error(error) => match error.code {
                        None => return Ok(unreadable),
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
