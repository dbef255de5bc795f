//! Ports of the node that stand for others: which of them an end gets. In which order an end tries them is unknown, but
//! it is always the same (RFC 4787 REQ-1: one end has one port towards everybody, where that is free), and a pod has one of
//! each two ports. What was seen tells more and more of that order, and no later choice may contradict it.

use std::collections::{HashMap, HashSet};
use std::net::{IpAddr, SocketAddr};

use super::oracle::Place;
use super::wire::Talk;

/// How many ports are tried before there counts as being none.
const TRIES: i32 = 24;

type End = (Talk, SocketAddr);

#[derive(Debug, Default)]
pub(super) struct Ports {
    /// What an end tries before what, by the ports' numbers.
    before: HashSet<(End, u16, u16)>,
    /// All that an end has had, and what it had when every port was free.
    had: HashMap<End, HashSet<u16>>,
    first: HashMap<End, u16>,
    /// Which one of two ports a pod has.
    halves: HashMap<(Talk, IpAddr, u16), u16>,
    /// When there was none: how often, and how often was to be expected.
    none: u32,
    expected: f64,
    /// What was counted already.
    counted: HashSet<(End, Vec<bool>)>,
    many: usize,
}

fn is_free(place: Place) -> bool {
    !matches!(place, Place::Taken | Place::Full)
}

impl Ports {
    /// An end gets a port.
    ///
    /// # Errors
    /// It is somebody else's, or not the one that this end gets.
    pub(super) fn choose(
        &mut self,
        end: End,
        is_pods: bool,
        places: &[Place],
        number: u16,
    ) -> Result<(), String> {
        let place = places.get(usize::from(number)).copied();
        if !place.is_some_and(is_free) {
            return Err(format!("port {number} of {places:?}"));
        }
        for (other, place) in (0..).zip(places) {
            if other == number || *place == Place::Taken {
                continue;
            }
            if self.before.contains(&(end, other, number)) {
                return Err(format!("{number} although {other} is free: {places:?}"));
            }
            self.before.insert((end, number, other));
        }
        if is_pods && places.len() > 1 {
            let half = (end.0, end.1.ip(), number / 2);
            let has = *self.halves.entry(half).or_insert(number);
            if has != number || usize::from(number) >= places.len() / 2 * 2 {
                return Err(format!("{number} of a pod that has {has}"));
            }
        }
        self.many = places.len();
        self.had.entry(end).or_default().insert(number);
        if places.iter().all(|place| is_free(*place)) {
            self.first.entry(end).or_insert(number);
        }
        self.chance(end, is_pods, places);
        Ok(())
    }

    /// There is none for an end.
    ///
    /// # Errors
    /// One is free that it tries.
    pub(super) fn none(&mut self, end: End, is_pods: bool, places: &[Place]) -> Result<(), String> {
        let had = self.had.get(&end).into_iter().flatten();
        for number in had {
            if places[usize::from(*number)] != Place::Taken {
                return Err(format!("no port for {end:?}, but {number} is free"));
            }
        }
        let Some(chance) = self.chance(end, is_pods, places) else {
            return Ok(());
        };
        if chance < 1e-9 {
            return Err(format!("no port for {end:?} of {places:?}"));
        }
        if chance < 1.0 {
            self.none += 1;
        }
        Ok(())
    }

    /// There is no room for a port for an end.
    ///
    /// # Errors
    /// One that needs no room is tried before.
    pub(super) fn full(&self, end: End, places: &[Place]) -> Result<(), String> {
        let of = |place: fn(Place) -> bool| {
            let all = (0..).zip(places);
            all.filter(move |it| place(*it.1)).map(|it: (u16, _)| it.0)
        };
        let is_first =
            |full: u16| of(is_free).all(|free| !self.before.contains(&(end, free, full)));
        if of(|place| place == Place::Full).any(is_first) {
            return Ok(());
        }
        Err(format!("no room for a port for {end:?} of {places:?}"))
    }

    /// How likely is it that no port is found among these? Counts it, but each once.
    fn chance(&mut self, end: End, is_pods: bool, places: &[Place]) -> Option<f64> {
        let taken: Vec<bool> = places.iter().map(|place| *place == Place::Taken).collect();
        let is_half = is_pods && places.len() > 1;
        let (all, free) = if is_half {
            let pairs = places.len() / 2;
            let is_free = |pair: &usize| match self.halves.get(&(end.0, end.1.ip(), *pair as u16)) {
                Some(has) => !taken[usize::from(*has)],
                None => !taken[2 * pair] && !taken[2 * pair + 1],
            };
            (pairs, (0..pairs).filter(is_free).count())
        } else {
            (places.len(), taken.iter().filter(|taken| !**taken).count())
        };
        let chance = (1.0 - free as f64 / all as f64).powi(TRIES);
        if !self.counted.insert((end, taken)) {
            return None;
        }
        if chance < 1.0 {
            self.expected += chance;
        }
        Some(chance)
    }

    /// Ends are spread over the ports, and find those that are free.
    ///
    /// # Errors
    /// They are not.
    pub(super) fn are_spread(&self) -> Result<(), String> {
        let first: Vec<u16> = self.first.values().copied().collect();
        let is_one = first.windows(2).all(|two| two[0] == two[1]);
        if self.many >= 16 && first.len() > 9 && is_one {
            return Err(format!("all begin at one port: {first:?}"));
        }
        if f64::from(self.none) > 6.0 + 4.0 * self.expected {
            let Self { none, expected, .. } = self;
            return Err(format!("{none} ends have no port instead of {expected}"));
        }
        Ok(())
    }
}
