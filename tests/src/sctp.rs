//! SCTP as far as a policy sees it: an INIT and its answer (RFC 9260, 3.3.2), by raw sockets, where the kernel has no SCTP.

/// Of `INIT` and `INIT ACK`, without options: common header and chunk.
const LENGTH: usize = 12 + 20;
const INIT: u8 = 1;
const INIT_ACK: u8 = 2;
/// Castagnoli's polynomial, bits reversed.
const POLYNOMIAL: u32 = 0x82f6_3b78;

/// What a packet says, ports in host order.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Said {
    /// Somebody opens, and wants to be answered with this tag.
    Opens { ports: (u16, u16), tag: u32 },
    /// Who opened with this tag is answered.
    Answers { ports: (u16, u16), tag: u32 },
}

impl Said {
    /// The packet behind its IP header, with its checksum.
    #[must_use]
    pub fn packet(self) -> Vec<u8> {
        // An INIT is sent under no tag, its answer under that of the INIT.
        let (kind, (source, destination), verification, own) = match self {
            Self::Opens { ports, tag } => (INIT, ports, 0, tag),
            Self::Answers { ports, tag } => (INIT_ACK, ports, tag, 1),
        };
        let mut packet = Vec::with_capacity(LENGTH);
        packet.extend(source.to_be_bytes());
        packet.extend(destination.to_be_bytes());
        packet.extend(verification.to_be_bytes());
        packet.extend([0; 4]);
        packet.extend([kind, 0, 0, 20]);
        packet.extend(own.to_be_bytes());
        // A window of 64 KiB, a stream each way, and the first number of what would follow.
        packet.extend([0, 1, 0, 0, 0, 1, 0, 1, 0, 0, 0, 1]);
        let sum = crc32c(&packet);
        packet[8..12].copy_from_slice(&sum.to_le_bytes());
        packet
    }

    /// Reads a packet behind its IP header; `None` if it is neither of the two, or its checksum is wrong.
    #[must_use]
    pub fn read(packet: &[u8]) -> Option<Self> {
        if packet.len() != LENGTH {
            return None;
        }
        let mut unsummed = packet.to_vec();
        unsummed[8..12].fill(0);
        if crc32c(&unsummed).to_le_bytes() != packet[8..12] {
            return None;
        }
        let short = |at: usize| u16::from_be_bytes([packet[at], packet[at + 1]]);
        let long = |at: usize| u32::from(short(at)) << 16 | u32::from(short(at + 2));
        let ports = (short(0), short(2));
        match packet[12] {
            INIT if long(4) == 0 => Some(Self::Opens {
                ports,
                tag: long(16),
            }),
            INIT_ACK => Some(Self::Answers {
                ports,
                tag: long(4),
            }),
            _ => None,
        }
    }
}

fn crc32c(bytes: &[u8]) -> u32 {
    let step = |sum: u32, byte: &u8| {
        (0..8).fold(sum ^ u32::from(*byte), |sum, _| {
            let carry = if sum & 1 == 1 { POLYNOMIAL } else { 0 };
            sum >> 1 ^ carry
        })
    };
    !bytes.iter().fold(u32::MAX, step)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checksum_is_that_of_the_rfc() {
        // The check value of CRC-32C, and RFC 3720, B.4.
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
        assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa);
    }

    #[test]
    fn what_is_said_is_read_and_what_was_spoiled_is_not() {
        let ports = (40_000, 80);
        for said in [
            Said::Opens { ports, tag: 7 },
            Said::Answers { ports, tag: 7 },
        ] {
            let mut packet = said.packet();
            assert_eq!(Said::read(&packet), Some(said));
            packet[0] ^= 1;
            assert_eq!(Said::read(&packet), None);
        }
    }
}
