//! A packet as bytes, with the checksum arithmetic that the kernel does on an skb without offload.

use weir_common::DropReason;
use weir_common::way::Mark;
use weir_datapath::Packet;
use weir_datapath::packet::{Changed, Delta, Zero};

/// A frame on a device.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Bytes {
    pub frame: Vec<u8>,
    pub ifindex: u32,
    pub mark: u32,
    pub vlan: Vlan,
    /// The device that the node has received it by, 0 if the node has made it.
    pub received_by: u32,
    /// The kernel's test runs always are (`bpf_prog_test_run_skb`).
    pub is_of_socket: bool,
}

/// Whether the kernel has taken a VLAN tag out of the frame.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Vlan {
    None,
    Stripped,
}

impl Bytes {
    pub fn new(ifindex: u32, frame: Vec<u8>) -> Self {
        Self {
            frame,
            ifindex,
            mark: 0,
            vlan: Vlan::None,
            received_by: ifindex,
            is_of_socket: true,
        }
    }
}

/// A packet that an earlier program has said something about.
pub fn marked(ifindex: u32, frame: Vec<u8>, mark: Mark) -> Bytes {
    Bytes {
        mark: mark.bits(),
        ..Bytes::new(ifindex, frame)
    }
}

/// A packet that a pod sends out of the cluster, on its way out.
pub fn leaving(ifindex: u32, frame: Vec<u8>) -> Bytes {
    marked(ifindex, frame, Mark::LEAVING)
}

/// A packet whose destination has been translated, on its way out again.
pub fn translated(ifindex: u32, frame: Vec<u8>) -> Bytes {
    marked(ifindex, frame, Mark::TRANSLATED)
}

impl Packet for Bytes {
    fn ifindex(&self) -> u32 {
        self.ifindex
    }

    fn len(&self) -> u32 {
        u32::try_from(self.frame.len()).unwrap_or(u32::MAX)
    }

    fn has_stripped_vlan(&self) -> bool {
        self.vlan == Vlan::Stripped
    }

    fn received_by(&self) -> u32 {
        self.received_by
    }

    fn is_of_socket(&self) -> bool {
        self.is_of_socket
    }

    fn load<const N: usize>(&self, offset: usize) -> Result<[u8; N], DropReason> {
        self.frame
            .get(offset..)
            .and_then(<[u8]>::first_chunk)
            .copied()
            .ok_or(DropReason::Malformed)
    }

    fn store<const N: usize>(&mut self, offset: usize, bytes: &[u8; N]) -> Result<(), DropReason> {
        self.frame
            .get_mut(offset..offset + N)
            .ok_or(DropReason::WriteFailed)?
            .copy_from_slice(bytes);
        Ok(())
    }

    fn fix_checksum(
        &mut self,
        offset: usize,
        changed: Changed,
        delta: Delta,
    ) -> Result<(), DropReason> {
        if changed == Changed::Uncovered {
            return Ok(());
        }
        let field = self
            .frame
            .get_mut(offset..offset + 2)
            .ok_or(DropReason::WriteFailed)?;
        let zero = match changed {
            Changed::Header | Changed::Uncovered => Zero::IsSum,
            Changed::V4Addresses(zero) | Changed::V6Addresses(zero) | Changed::Ports(zero) => zero,
        };
        let old = u16::from_ne_bytes([field[0], field[1]]);
        if old == 0 && zero == Zero::IsAbsent {
            return Ok(());
        }
        let mut sum = u64::from(delta.0) + u64::from(!u32::from(old));
        while sum >> 16 != 0 {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        let mut new = !(sum as u16);
        if new == 0 && zero == Zero::IsAbsent {
            new = 0xffff;
        }
        field.copy_from_slice(&new.to_ne_bytes());
        Ok(())
    }

    fn resize(&mut self, len: u32) -> Result<(), DropReason> {
        self.frame.resize(len as usize, 0);
        Ok(())
    }

    fn set_mark(&mut self, mark: Mark) {
        self.mark = (self.mark & !Mark::MASK) | mark.bits();
    }

    fn mark(&self) -> Mark {
        Mark::of(self.mark)
    }
}
