//! What a packet that is refused must become, from the RFCs and not from the datapath.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::frames::{ACK, FIN, Ip, L3, RST, SYN, Transport, checksum};

/// The frame that answers one without options: a RST, or an ICMP port unreachable.
///
/// # Panics
/// The frame is not long enough.
#[must_use]
pub fn refusal(frame: &[u8]) -> Vec<u8> {
    let packet = &frame[L3..];
    let (header, protocol, source, destination) = if packet[0] >> 4 == 4 {
        let addr = |at: usize| -> IpAddr {
            let octets: [u8; 4] = packet[at..at + 4].try_into().unwrap_or_default();
            Ipv4Addr::from(octets).into()
        };
        (20, packet[9], addr(12), addr(16))
    } else {
        let addr = |at: usize| -> IpAddr {
            let octets: [u8; 16] = packet[at..at + 16].try_into().unwrap_or_default();
            Ipv6Addr::from(octets).into()
        };
        (40, packet[6], addr(8), addr(24))
    };
    let mac = |at: usize| frame[at..at + 6].try_into().unwrap_or_default();
    let ip = Ip {
        source_mac: mac(0),
        destination_mac: mac(6),
        ..Ip::between(destination, source)
    };
    let transport = if protocol == 6 {
        let end = if header == 20 {
            usize::from(u16::from_be_bytes([packet[2], packet[3]]))
        } else {
            40 + usize::from(u16::from_be_bytes([packet[4], packet[5]]))
        };
        Transport::Other {
            protocol,
            payload: reset(&packet[header..end]),
        }
    } else {
        let quoted = packet[..header + 8].to_vec();
        Transport::Unreachable { quoted }
    };
    let mut answer = ip.frame(&transport);
    if protocol == 6 {
        let addresses = if header == 20 { 12..20 } else { 8..40 };
        let body = &answer[L3 + header..];
        let pseudo = [&answer[L3..][addresses], &[0, 0, 0, 20, 0, 0, 0, 6]].concat();
        let sum = checksum(&[&pseudo, body]).to_be_bytes();
        answer[L3 + header + 16..][..2].copy_from_slice(&sum);
    }
    if header == 20 {
        // Atomic, so that it needs no identification (RFC 6864).
        answer[L3 + 4..L3 + 6].fill(0);
        answer[L3 + 10..L3 + 12].fill(0);
        let sum = checksum(&[&answer[L3..L3 + 20]]).to_be_bytes();
        answer[L3 + 10..L3 + 12].copy_from_slice(&sum);
    }
    answer
}

/// "If the ACK bit is off, sequence number zero is used, <SEQ=0><ACK=SEG.SEQ+SEG.LEN><CTL=RST,ACK>. If the ACK bit is on,
/// <SEQ=SEG.ACK><CTL=RST>" (RFC 9293 section 3.10.7.1). Without its checksum.
fn reset(segment: &[u8]) -> Vec<u8> {
    let number = |at: usize| -> u32 {
        let bytes: [u8; 4] = segment[at..at + 4].try_into().unwrap_or_default();
        u32::from_be_bytes(bytes)
    };
    let flags = segment[13];
    let controls = u32::from(flags & SYN != 0) + u32::from(flags & FIN != 0);
    let length = (segment.len() - usize::from(segment[12] >> 4) * 4) as u32 + controls;
    let (sequence, acknowledges, says) = if flags & ACK != 0 {
        (number(8), 0, RST)
    } else {
        (0, number(4).wrapping_add(length), RST | ACK)
    };
    let mut reset = [&segment[2..4], &segment[..2]].concat();
    reset.extend(sequence.to_be_bytes());
    reset.extend(acknowledges.to_be_bytes());
    reset.extend([0x50, says, 0, 0, 0, 0, 0, 0]);
    reset
}
