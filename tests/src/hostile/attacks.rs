//! What an attack is, and an attempt at one.

#![allow(clippy::unwrap_used, reason = "a test stops at the first surprise")]

use super::scene::{Attacker, EVERYBODY, Friend, Near, Scene, Shut, Site, Who};
use super::{around, inside, spoofed};
use crate::admin::dropped;
use crate::node::Family;
use crate::traffic::{PATIENCE, eventually};

/// How many times an attack is made.
pub const TIMES: u64 = 20;

/// What becomes of an attack: every frame of it is dropped for this reason.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Dropped(pub &'static str);
pub type Fate = Dropped;

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum In {
    Both,
    V4,
    V6,
}
pub use In::{Both, V4, V6};

pub type Frame = fn(&Scene<'_>) -> Vec<u8>;
/// Who sends it, the frame, and who hears it.
pub type Control = (Who, Frame, Who);
pub type Row = (&'static str, In, Fate, Who, Frame, Control);

/// What the attacker may send.
pub const HONEST: Control = (Attacker, |it| it.udp(Attacker, Near), Near);
/// What a friend may send, and the attacker would like to.
pub const FRIENDLY: Control = (Friend, |it| it.udp(Friend, Shut), Shut);

pub const PADDING: [u8; 7] = [0, 1, 4, 0, 0, 0, 0];

/// All of them.
#[must_use]
pub fn all() -> Vec<Row> {
    [spoofed::all(), around::all(), inside::all()].concat()
}

/// What went wrong with an attack, made by its own speaker or by another one, if anything did.
pub fn attempt(site: &Site, family: Family, row: &Row, by: Option<Who>) -> Option<String> {
    let (name, _, Dropped(reason), speaker, frame, (honest, control, hears)) = *row;
    let speaker = by.unwrap_or(speaker);
    let before = dropped(&site.pair.nodes[0]).unwrap();
    let attack = site.scene(family, speaker);
    let bytes = frame(&attack);
    for _ in 0..TIMES {
        attack.send(&bytes);
    }
    let scene = site.scene(family, honest);
    scene.send(&control(&scene));
    let is_heard = site.is_heard(hears, &scene.says);
    let mut wrong = Vec::new();
    if !is_heard {
        wrong.push("its control did not arrive".to_owned());
    }
    // The kernel of a pod sends a few of its own that are dropped too; what leaked instead would be heard.
    let more = || dropped(&site.pair.nodes[0]).unwrap()[reason] - before[reason];
    if eventually("dropped", PATIENCE, more, |it| *it >= TIMES).is_err() {
        let now = dropped(&site.pair.nodes[0]).unwrap().into_iter();
        let more = now.map(|(reason, many)| (many - before[&reason], reason));
        let more: Vec<_> = more.filter(|it| it.0 > 0).collect();
        wrong.push(format!("expected {TIMES} as {reason}: {more:?}"));
    }
    for ear in EVERYBODY {
        if ear != speaker && site.ears[ear as usize].has_heard(&attack.says) {
            wrong.push(format!("{ear:?} heard it"));
        }
    }
    (!wrong.is_empty()).then(|| format!("{family:?} {name}, by {speaker:?}: {}", wrong.join("; ")))
}
