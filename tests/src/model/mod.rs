//! A naive model of conversations, and random histories in which the datapath has to agree with it, packet by packet: on the
//! verdict, the bytes, the mark, the counters, and the rows that it keeps. It is written from the texts (RFC 768, 792,
//! 793 and 9293, 4443, 4787, 5508; the Kubernetes API's words on Services, EndpointSlices and NetworkPolicies; what Linux's
//! connection tracking grants) and shares no code with `weir-datapath`: a conversation is an element of a list
//! ([`conversation`]), what is allowed is asked of the words and not of the tables ([`cluster`]), and a packet is looked up by
//! walking that list ([`oracle`], [`open`], [`errors`]). A packet walks through the node ([`walk`]): what a pod may send
//! goes on to the uplink, what comes in goes on to a pod, and answers are sent as their senders saw what they
//! answer. Whatever the model says, from end to end a client sees the address that it spoke to, and outside of the cluster
//! nobody sees a pod's.
//!
//! Rows may be pushed out of every table but that of TCP's ways. What is promised then:
//!
//! | lost | next comes | it |
//! |---|---|---|
//! | the plan | a packet of the opener | is planned anew: to the same backend while the service has as many and the search meets the same, with the same port of the node while that is free |
//! | the plan | SYN with ACK, RST, an echo reply | is dropped (`no_flow`); at the uplink it passes to the node as it is |
//! | the plan | any other answer | is taken for its sender's own conversation, and judged so; at the uplink it passes to the node as it is |
//! | the way there | a packet of the opener | is judged, and goes as before; the counts of that way begin anew, and nothing counts as opened |
//! | the way there | an answer | goes on, translated; an answer that is not translated may be taken for its sender's own |
//! | the way back | a packet of the opener, in the same second and epoch | goes on, translated |
//! | the way back | a packet of the opener, later | is planned anew, as without both |
//! | the way back, or both | an answer to the opener itself | is taken for its sender's own conversation, and judged so: its receiver sees the backend |
//! | the way back, or both | an answer marked as one (`Mark::REPLY`) | is dropped (`no_flow`) |
//! | any | anything | never leaves the cluster with a pod's address |
//!
//! Whatever is taken for its sender's own may show its receiver an address that it never spoke to. The model counts these
//! by what had happened before ([`oracle::Why`]), and tolerates none without a cause.
//!
//! What the model follows although the texts say otherwise, by name, so that each is easily found and taken away:
//!
//! | exception | what |
//! |---|---|
//! | `Finished` | the same section: who acknowledged last waits, since that may be lost. The datapath has forgotten the connection, and a goodbye that is sent again comes untranslated |
//! | `STRANGER` | whose row of the answers is lost may find another conversation's at its place: that is forgotten with its own, and a plan there is taken out |
//! | `OneRow` | ICMP errors about answers find nothing as long as a conversation has one row: a pod's are dropped, and at the uplink they are not translated |

pub mod cluster;
pub mod conversation;
mod errors;
pub mod history;
mod open;
pub mod oracle;
mod place;
mod ports;
pub mod walk;
pub mod wire;

use std::collections::BTreeMap;

use cluster::Cluster;
use history::{Event, Setting};
use oracle::Why;
use walk::Node;

use crate::world::Family;

/// What a run has seen.
#[derive(Debug, Default)]
pub struct Report {
    pub histories: u64,
    pub packets: u64,
    /// Packets that their receivers could make no sense of, by what had happened before.
    pub strange: BTreeMap<Why, u64>,
    /// Rows that were lost, and conversations.
    pub lost: BTreeMap<Why, u64>,
    /// Packets that were dropped, by the reason's label.
    pub dropped: BTreeMap<&'static str, u64>,
}

/// Events of a history.
const LENGTH: usize = 400;

/// Runs histories of a seed until so many packets have met a program.
///
/// # Errors
/// The shortest history that was found in which the datapath and the model do not agree, for people.
pub fn run(seed: u64, packets: u64) -> Result<Report, String> {
    let mut report = Report::default();
    while report.packets < packets {
        let (setting, events) = draw(seed, report.histories);
        match play(&setting, &events, Pace::Quick) {
            Ok(node) => {
                report.packets += node.packets;
                for (why, count) in node.strange {
                    *report.strange.entry(why).or_default() += count;
                }
                for (why, count) in node.oracle.lost {
                    *report.lost.entry(why).or_default() += count;
                }
                for (reason, count) in node.dropped {
                    *report.dropped.entry(reason).or_default() += count;
                }
            }
            Err(_) => return Err(explain(seed, report.histories, &setting, events)),
        }
        report.histories += 1;
    }
    Ok(report)
}

/// Draws a history.
fn draw(seed: u64, number: u64) -> (Setting, Vec<Event>) {
    let mut rng = fastrand::Rng::with_seed(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ number);
    let setting = Setting {
        family: if rng.bool() { Family::V4 } else { Family::V6 },
        ports: [1, 3, 5, 16, 40][rng.usize(..5)],
        is_masquerading: rng.u8(..8) != 0,
        pushes_out: rng.bool(),
    };
    let events = (0..LENGTH).map(|_| Event {
        what: rng.u32(..),
        dice: std::array::from_fn(|_| rng.u32(..)),
    });
    (setting, events.collect())
}

/// How much is looked at.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Pace {
    Quick,
    /// Every row after every packet.
    Strict,
    /// The same, and all is told.
    Told,
}

/// Lets a history happen.
fn play(
    setting: &Setting,
    events: &[Event],
    pace: Pace,
) -> Result<Node, (usize, Box<Node>, String)> {
    let cluster = Cluster::new(setting.family, setting.ports, setting.is_masquerading);
    let mut node = Node::new(cluster);
    node.is_tracing = pace == Pace::Told;
    node.is_strict = pace != Pace::Quick;
    for (number, event) in events.iter().enumerate() {
        if let Err(error) = node.happen(event, setting) {
            return Err((number, Box::new(node), error));
        }
    }
    if let Err(error) = node.oracle.are_spread() {
        return Err((events.len(), Box::new(node), error));
    }
    Ok(node)
}

/// Takes away from a failing history what it fails without, and tells what is left.
fn explain(seed: u64, number: u64, setting: &Setting, mut events: Vec<Event>) -> String {
    let mut size = events.len();
    while size > 0 {
        let before = events.len();
        let mut at = 0;
        while at < events.len() {
            let mut fewer = events.clone();
            fewer.drain(at..(at + size).min(events.len()));
            match play(setting, &fewer, Pace::Strict) {
                Err((last, ..)) => {
                    fewer.truncate(last + 1);
                    events = fewer;
                }
                Ok(_) => at += size,
            }
        }
        if size > 1 || events.len() == before {
            size /= 2;
        }
    }
    let Err((_, node, error)) = play(setting, &events, Pace::Told) else {
        return "a history that fails once".to_owned();
    };
    let trace = node.trace.join("\n");
    format!("seed {seed}, history {number}, {setting:?}\n{trace}\n{error}")
}
