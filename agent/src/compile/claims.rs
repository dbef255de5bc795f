//! Who has an address that several ask for. What each of them asks for is `service`'s and `host_port`'s business;
//! writing it is not here.
//!
//! The better way has it, see [`Way`]. Of equal ways who has it keeps it, whatever his name, until he withdraws it;
//! then it goes to the oldest of the others, in the same step. Who goes without is told, and keeps all his other
//! addresses.

mod seat;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use weir_common::Protocol;
use weir_common::service::{FrontendKey, Scope};

use self::seat::{Claim, Seat};
use super::{FrontendPlan, Owner, Report, ServicePlan, Way};

/// Everybody's plan, and who has each address.
#[derive(Debug, Default)]
pub struct Claims {
    asked: BTreeMap<Owner, Arc<ServicePlan>>,
    seats: HashMap<Address, Seat>,
    /// Those about whom something is to be said.
    reported: BTreeSet<Owner>,
    start: Start,
}

/// Has everything been said since the start?
#[derive(Debug)]
enum Start {
    /// No: nobody has an address for coming first. By address, the numbers of those who had it in the kernel.
    Listening(HashMap<Address, Vec<u32>>),
    Over,
}

/// An address and port that clients send to, wherever they are: it is had for those inside and outside together.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct Address(FrontendKey);

/// What follows from a change: of its owner, and of others who gained or lost an address by it.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Delta {
    /// What each of these should have in the kernel from now on; `None` for nothing at all.
    pub plans: BTreeMap<Owner, Option<Arc<ServicePlan>>>,
    /// All that is to be said about each of these from now on; empty for nothing.
    pub reports: BTreeMap<Owner, Vec<Report>>,
}

impl Claims {
    /// Nobody asks for anything yet. `held` is what the kernel holds from before: frontends, and the number of whom
    /// each belongs to. He is known by it when he asks again.
    pub fn resume(held: impl IntoIterator<Item = (FrontendKey, u32)>) -> Self {
        let mut numbers: HashMap<Address, Vec<u32>> = HashMap::new();
        for (key, number) in held {
            let numbers = numbers.entry(Address::of(&key)).or_default();
            if !numbers.contains(&number) {
                numbers.push(number);
            }
        }
        Self {
            start: Start::Listening(numbers),
            ..Self::default()
        }
    }

    /// `owner` asks for this from now on; for nothing when it is gone.
    pub fn update(&mut self, owner: &Owner, plan: Option<ServicePlan>) -> Delta {
        if self.asked.get(owner).map(Arc::as_ref) == plan.as_ref() {
            return Delta::default();
        }
        let plan = plan.map(Arc::new);
        let old = match &plan {
            Some(plan) => self.asked.insert(owner.clone(), plan.clone()),
            None => self.asked.remove(owner),
        };
        let created = |plan: &Option<Arc<ServicePlan>>| plan.as_ref().and_then(|p| p.created);
        let (born, reborn) = (created(&old), created(&plan));
        // Another object of the same name has not had anything yet.
        let is_another = born.is_some() && reborn.is_some() && born != reborn;
        let (before, after) = (ways(old.as_deref()), ways(plan.as_deref()));
        let numbers = self.numbers(owner, plan.as_deref());
        let mut touched = Touched {
            gained_or_lost: BTreeSet::from([owner.clone()]),
            told: BTreeSet::new(),
        };
        for (address, way) in &before {
            let claim = Claim::new(*way, born, owner);
            match after.get(address) {
                Some(now) if !is_another => {
                    let now = Claim::new(*now, reborn, owner);
                    if now != claim {
                        self.change(*address, &mut touched, |seat| seat.replace(&claim, now));
                    }
                }
                _ => {
                    self.change(*address, &mut touched, |seat| seat.remove(&claim));
                    if self.seats.get(address).is_some_and(Seat::is_empty) {
                        self.seats.remove(address);
                    }
                }
            }
        }
        for (address, way) in &after {
            if !before.contains_key(address) || is_another {
                let claim = Claim::new(*way, reborn, owner);
                let is_known = self.is_known(&numbers, address);
                self.change(*address, &mut touched, |seat| seat.add(claim, is_known));
            }
        }
        self.delta(touched)
    }

    /// Everything has been said: what the kernel held for somebody who did not ask again is free, and from now on who
    /// has an address keeps it.
    pub fn everything_said(&mut self) -> Delta {
        if matches!(std::mem::replace(&mut self.start, Start::Over), Start::Over) {
            return Delta::default();
        }
        let mut touched = Touched::default();
        for seat in self.seats.values_mut() {
            let is_awaited = seat.holder().is_none();
            seat.settle();
            if is_awaited {
                touched.gained_or_lost.extend(seat.holder().cloned());
                touched.told.extend(seat.owners().cloned());
            }
        }
        self.delta(touched)
    }

    /// What everybody asks for, whether he has it or not.
    pub fn asked(&self) -> impl Iterator<Item = &ServicePlan> {
        self.asked.values().map(Arc::as_ref)
    }

    /// Who has this frontend's address.
    pub fn holder(&self, key: &FrontendKey) -> Option<&Owner> {
        self.seats.get(&Address::of(key))?.holder()
    }

    /// Everybody about whom something is to be said, with all of it.
    pub fn reported(&self) -> impl Iterator<Item = (&Owner, Vec<Report>)> {
        self.reported
            .iter()
            .map(|owner| (owner, self.reports(owner)))
    }

    /// All that is to be said about an owner.
    pub fn reports(&self, owner: &Owner) -> Vec<Report> {
        let Some(plan) = self.asked.get(owner) else {
            return Vec::new();
        };
        let taken = ways(Some(plan)).into_keys().filter_map(|address| {
            let holder = self.seats.get(&address)?.holder()?;
            (holder != owner).then(|| Report::AddressTaken {
                address,
                holder: holder.clone(),
            })
        });
        plan.reports.iter().cloned().chain(taken).collect()
    }

    /// Changes a seat. Another holder is news for both of them, and for everybody else who asks.
    fn change(&mut self, address: Address, touched: &mut Touched, change: impl FnOnce(&mut Seat)) {
        let (is_over, is_awaited) = match &self.start {
            Start::Listening(held) => (false, held.contains_key(&address)),
            Start::Over => (true, false),
        };
        let seat = self
            .seats
            .entry(address)
            .or_insert_with(|| Seat::new(is_awaited));
        let before = seat.holder().cloned();
        change(seat);
        if is_over {
            seat.settle();
        }
        if seat.holder() != before.as_ref() {
            touched.gained_or_lost.extend(before);
            touched.gained_or_lost.extend(seat.holder().cloned());
            touched.told.extend(seat.owners().cloned());
        }
    }

    /// The numbers that an owner may have had in the kernel.
    fn numbers(&self, owner: &Owner, plan: Option<&ServicePlan>) -> Vec<u32> {
        let Start::Listening(held) = &self.start else {
            return Vec::new();
        };
        // An agent of before may have numbered otherwise; a cluster IP is its Service's alone.
        let frontends = plan.into_iter().flat_map(|plan| &plan.frontends);
        let own = frontends
            .filter(|frontend| frontend.way == Way::ClusterIp)
            .filter_map(|frontend| held.get(&Address::of(&frontend.key)));
        let own = own.flatten().copied();
        owner.first_numbers().chain(own).collect()
    }

    fn is_known(&self, numbers: &[u32], address: &Address) -> bool {
        match &self.start {
            Start::Listening(held) => held
                .get(address)
                .is_some_and(|held| held.iter().any(|number| numbers.contains(number))),
            Start::Over => false,
        }
    }

    fn delta(&mut self, touched: Touched) -> Delta {
        let mut delta = Delta::default();
        for owner in touched.gained_or_lost.union(&touched.told) {
            let reports = self.reports(owner);
            let was_reported = if reports.is_empty() {
                self.reported.remove(owner)
            } else {
                !self.reported.insert(owner.clone())
            };
            if was_reported || !reports.is_empty() {
                delta.reports.insert(owner.clone(), reports);
            }
        }
        for owner in touched.gained_or_lost {
            let granted = self.granted(&owner);
            delta.plans.insert(owner, granted);
        }
        delta
    }

    /// What an owner asks for, without what he does not get.
    fn granted(&self, owner: &Owner) -> Option<Arc<ServicePlan>> {
        let plan = self.asked.get(owner)?;
        let has = |key| self.holder(key) == Some(owner);
        if plan.frontends.iter().all(|frontend| has(&frontend.key)) {
            return Some(plan.clone());
        }
        let (frontends, lost): (Vec<_>, Vec<_>) = plan
            .frontends
            .iter()
            .partition(|frontend| has(&frontend.key));
        let mut granted = ServicePlan {
            frontends: frontends.into_iter().cloned().collect(),
            ..ServicePlan::clone(plan)
        };
        // Who loses an address loses no connection that came by it.
        granted.drain(lost.into_iter().flat_map(FrontendPlan::endpoints));
        Some(Arc::new(granted))
    }
}

/// Whom a change concerns.
#[derive(Debug, Default)]
struct Touched {
    gained_or_lost: BTreeSet<Owner>,
    /// An address that they ask for has another holder.
    told: BTreeSet<Owner>,
}

impl Default for Start {
    fn default() -> Self {
        Self::Listening(HashMap::new())
    }
}

impl Delta {
    /// What follows from both, one after the other.
    pub fn extend(&mut self, later: Self) {
        self.plans.extend(later.plans);
        self.reports.extend(later.reports);
    }
}

impl Address {
    /// That of a frontend.
    pub fn of(key: &FrontendKey) -> Self {
        let inside = FrontendKey {
            scope: Scope::INTERNAL,
            ..*key
        };
        Self(if key.scope.is_of_nodes() {
            inside.of_nodes()
        } else {
            inside
        })
    }
}

/// `10.96.0.1:443 TCP`, `port 80 of the nodes (IPv4, TCP)`, or `10.96.0.1` for what a cluster IP has no port for.
impl std::fmt::Display for Address {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let key = &self.0;
        let (ip, port) = (std::net::IpAddr::from(key.addr), u16::from(key.port));
        let protocol = match key.protocol {
            Protocol::TCP => "TCP",
            Protocol::UDP => "UDP",
            Protocol::SCTP => "SCTP",
            _ => return write!(f, "{ip}"),
        };
        match (key.scope.is_of_nodes(), ip.is_ipv4()) {
            (false, _) => write!(f, "{} {protocol}", std::net::SocketAddr::new(ip, port)),
            (true, true) => write!(f, "port {port} of the nodes (IPv4, {protocol})"),
            (true, false) => write!(f, "port {port} of the nodes (IPv6, {protocol})"),
        }
    }
}

/// The best way by which a plan asks for each address.
fn ways(plan: Option<&ServicePlan>) -> BTreeMap<Address, Way> {
    let mut ways = BTreeMap::new();
    for frontend in plan.into_iter().flat_map(|plan| &plan.frontends) {
        let way = ways
            .entry(Address::of(&frontend.key))
            .or_insert(frontend.way);
        *way = (*way).min(frontend.way);
    }
    ways
}
