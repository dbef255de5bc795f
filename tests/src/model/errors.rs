//! ICMP errors: what becomes of them on the way, and of the packets that they quote.

use std::net::IpAddr;

use weir_common::DropReason;
use weir_common::event::Hook;
use weir_common::way::Mark;

use super::cluster::Cluster;
use super::conversation::{BACK, Stage};
use super::oracle::{Arrival, Fate, Oracle, is_at_pod, onward};
use super::wire::{Packet, Says, Talk, Tuple, quoted};
use crate::frames::checksum;

impl Oracle {
    /// An error goes the way of an answer to the packet that it quotes, and is about nobody else's (RFC 5508
    /// REQ-3 and 4). `None` if it passes as it is.
    pub(super) fn error(&mut self, cluster: &Cluster, at: &Arrival, about: &[u8]) -> Option<Fate> {
        let (hook, outer) = (at.hook, at.packet.tuple);
        let is_uplinks = hook == Hook::FROM_NET;
        // The node may say what it likes to whom it likes.
        let is_nodes = hook == Hook::TO_NET && at.mark == Mark::NONE;
        let nobodys = if is_uplinks || is_nodes {
            None
        } else {
            Some(Fate::Drop(DropReason::NoFlow))
        };
        let Some(inner) = quoted(about).filter(|inner| inner.from.ip() == outer.to.ip()) else {
            return nobodys;
        };
        let travels = inner.back();
        let found = self.known(hook, &travels).or_else(|| {
            let found = self.conversations.iter().position(|it| {
                it.stage == Stage::Asked && it.hooks[BACK] == hook && it.arrives(BACK) == travels
            });
            found.map(|index| (index, BACK))
        });
        let is_from_end = outer.from.ip() == inner.to.ip();
        let Some((index, direction)) = found else {
            return match hook {
                Hook::FROM_POD if is_from_end && cluster.is_own(outer.to.ip()) => {
                    Some(Fate::Goes {
                        packet: at.packet.clone(),
                        mark: Mark::PASSED,
                        device: 0,
                    })
                }
                Hook::FROM_POD => Some(Fate::Drop(DropReason::NoFlow)),
                Hook::TO_POD if at.received_by == 0 => None,
                Hook::TO_POD => Some(Fate::Drop(DropReason::NoFlow)),
                Hook::TO_NET if is_from_end && !is_nodes => Some(Fate::Drop(DropReason::NoFlow)),
                _ => None,
            };
        };
        let it = &self.conversations[index];
        if is_at_pod(hook) {
            // Nothing is said about what policy denies today.
            let question = if it.claims[direction] {
                it.goes_on(direction)
            } else {
                it.arrives(direction).back()
            };
            if let Err(reason) = it.allowed(cluster, question) {
                return Some(Fate::Drop(reason));
            }
        }
        if hook == Hook::FROM_POD && !is_from_end {
            return Some(Fate::Drop(DropReason::NoFlow));
        }
        let goes_on = it.goes_on(direction);
        let mut tuple = outer;
        if is_from_end {
            tuple.from.set_ip(goes_on.from.ip());
        }
        tuple.to.set_ip(goes_on.to.ip());
        let quotation = requote(about, goes_on.back());
        let packet = Packet {
            tuple,
            says: Says::Error(quotation),
        };
        let (mark, device) = onward(cluster, at, it, direction);
        Some(Fate::Goes {
            packet,
            mark,
            device,
        })
    }
}

/// A quotation of another packet; its transport's own checksum stays as it is, since nobody compares it.
fn requote(about: &[u8], of: Tuple) -> Vec<u8> {
    let mut bytes = about.to_vec();
    let is_v4 = of.from.is_ipv4();
    let header = if is_v4 { 20 } else { 40 };
    match (of.from.ip(), of.to.ip()) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            bytes[12..16].copy_from_slice(&from.octets());
            bytes[16..20].copy_from_slice(&to.octets());
            bytes[10..12].fill(0);
            let sum = checksum(&[&bytes[..20]]);
            bytes[10..12].copy_from_slice(&sum.to_be_bytes());
        }
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            bytes[8..24].copy_from_slice(&from.octets());
            bytes[24..40].copy_from_slice(&to.octets());
        }
        _ => {}
    }
    if of.talk == Talk::Echo {
        let identifier = of.from.port().max(of.to.port());
        bytes[header + 4..header + 6].copy_from_slice(&identifier.to_be_bytes());
    } else {
        bytes[header..header + 2].copy_from_slice(&of.from.port().to_be_bytes());
        bytes[header + 2..header + 4].copy_from_slice(&of.to.port().to_be_bytes());
    }
    bytes
}
