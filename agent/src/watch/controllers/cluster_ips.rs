//! Gives cluster IPs to Services that have none. An address follows from the name of the Service as far
//! as possible, so that even a node that has forgotten everything gives the same ones again.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use ipnet::IpNet;

use super::Assigned;
use crate::model::convert::{FamilyPolicy, FamilyRequest};
use crate::model::{Family, ObjectName, Service, ServiceKind};

/// No more addresses than this are tried of an IPv6 range.
const LARGEST_RANGE: u128 = 1 << 20;

/// The outcome for all Services.
#[derive(Debug, Default)]
pub(super) struct Assignment {
    pub services: Vec<Addressed>,
    /// Services that cannot have what they ask for.
    pub refused: BTreeMap<ObjectName, String>,
    /// What was given out, of the Services that are there.
    pub assigned: Assigned,
}

/// A Service with its addresses.
#[derive(Debug)]
pub(super) struct Addressed {
    pub service: Service,
    /// The families of its endpoints.
    pub families: Vec<Family>,
}

/// Services in the order of precedence: of two that name the same address, the first keeps it.
pub(super) fn assign(
    services: &[(Arc<Service>, FamilyRequest)],
    ranges: &[IpNet],
    before: &Assigned,
) -> Assignment {
    let mut assignment = Assignment::default();
    let mut owners: BTreeMap<IpAddr, ObjectName> = BTreeMap::new();
    let mut open = Vec::new();
    for (service, request) in services {
        match claim(service, request, ranges, &mut owners) {
            Ok(missing) => open.push((service, request, missing)),
            Err(reason) => {
                assignment.refused.insert(service.id.clone(), reason);
            }
        }
    }
    // Who has an address keeps it, before anybody new gets one.
    let mut kept: BTreeSet<IpAddr> = BTreeSet::new();
    for (service, _, missing) in &open {
        for ip in before.get(&service.id).into_iter().flatten() {
            let is_ours = missing.contains(&Family::of(ip))
                && ranges.iter().any(|r| r.contains(ip))
                && !owners.contains_key(ip);
            if is_ours {
                owners.insert(*ip, service.id.clone());
                kept.insert(*ip);
            }
        }
    }
    for (service, request, missing) in open {
        let mut given = Vec::new();
        let mut exhausted = None;
        for family in missing {
            let old = before
                .get(&service.id)
                .into_iter()
                .flatten()
                .find(|ip| Family::of(ip) == family && kept.contains(*ip));
            let ip = old.copied().or_else(|| {
                let range = ranges.iter().find(|r| family_of(r) == family)?;
                free(range, &service.id, &owners)
            });
            match ip {
                Some(ip) => {
                    owners.insert(ip, service.id.clone());
                    given.push(ip);
                }
                None => exhausted = Some(family),
            }
        }
        if let Some(family) = exhausted {
            assignment.refused.insert(
                service.id.clone(),
                format!("no {} service address is free", family_name(family)),
            );
            continue;
        }
        assignment
            .services
            .push(addressed(service, request, ranges, &given));
        if !given.is_empty() {
            assignment.assigned.insert(service.id.clone(), given);
        }
    }
    assignment
}

/// Takes the addresses that the Service names; the families of those that it still needs.
fn claim(
    service: &Service,
    request: &FamilyRequest,
    ranges: &[IpNet],
    owners: &mut BTreeMap<IpAddr, ObjectName>,
) -> Result<Vec<Family>, String> {
    let ServiceKind::ClusterIp(named) = &service.kind else {
        return Ok(Vec::new());
    };
    for ip in named {
        if let Some(owner) = owners.get(ip) {
            return Err(format!("cluster IP {ip} is that of Service {owner}"));
        }
    }
    let mut families = match (named.len(), request.policy) {
        (0, _) | (1, FamilyPolicy::RequireDual) => wanted(request, ranges)?,
        (1, FamilyPolicy::PreferDual) => wanted(request, ranges).unwrap_or_default(),
        // Who names its addresses has said what it wants.
        _ => Vec::new(),
    };
    for ip in named {
        owners.insert(*ip, service.id.clone());
    }
    families.retain(|family| !named.iter().any(|ip| Family::of(ip) == *family));
    Ok(families)
}

/// The families that a request comes to here.
fn wanted(request: &FamilyRequest, ranges: &[IpNet]) -> Result<Vec<Family>, String> {
    let here: Vec<Family> = ranges.iter().map(family_of).collect();
    let mut families = request.families.clone();
    families.extend(here.iter().filter(|f| !request.families.contains(f)));
    match request.policy {
        FamilyPolicy::Single => families.truncate(1),
        FamilyPolicy::PreferDual => families.retain(|f| here.contains(f)),
        FamilyPolicy::RequireDual => {}
    }
    match families.iter().find(|f| !here.contains(f)) {
        Some(missing) => Err(format!(
            "it asks for an {} address, and no service range of that family is configured",
            family_name(*missing)
        )),
        None if request.policy == FamilyPolicy::RequireDual && families.len() < 2 => Err(
            "it requires addresses of both families, and one service range is configured".into(),
        ),
        None if families.is_empty() => Err("no service range is configured".into()),
        None => Ok(families),
    }
}

fn addressed(
    service: &Service,
    request: &FamilyRequest,
    ranges: &[IpNet],
    given: &[IpAddr],
) -> Addressed {
    let mut service = service.clone();
    let families = match &mut service.kind {
        ServiceKind::ClusterIp(addresses) => {
            addresses.extend_from_slice(given);
            addresses.iter().map(Family::of).collect()
        }
        ServiceKind::Headless => wanted(request, ranges).unwrap_or_else(|_| vec![Family::V4]),
        ServiceKind::ExternalName(_) => Vec::new(),
    };
    Addressed { service, families }
}

/// A free address for a name: the first from where the name's hash points. The lower part of the range is
/// left to addresses that people choose (KEP-3070).
fn free(range: &IpNet, name: &ObjectName, owners: &BTreeMap<IpAddr, ObjectName>) -> Option<IpAddr> {
    let host_bits = u32::from(range.max_prefix_len() - range.prefix_len());
    let size = 1u128
        .checked_shl(host_bits)
        .map_or(LARGEST_RANGE, |s| s.min(LARGEST_RANGE));
    let chosen_by_people = (size / 16).clamp(16, 256);
    let first = if size > 2 * chosen_by_people {
        chosen_by_people
    } else {
        1
    };
    // The last address of an IPv4 range is its broadcast address.
    let count = size.checked_sub(first + 1)?;
    let start = u128::from(fnv1a(name)).checked_rem(count)?;
    (0..count)
        .map(|i| nth(range, first + (start + i) % count))
        .find(|ip| !owners.contains_key(ip))
}

fn nth(range: &IpNet, n: u128) -> IpAddr {
    match range.network() {
        IpAddr::V4(v4) => {
            let n = u32::try_from(n).unwrap_or(u32::MAX);
            Ipv4Addr::from_bits(v4.to_bits().wrapping_add(n)).into()
        }
        IpAddr::V6(v6) => Ipv6Addr::from_bits(v6.to_bits().wrapping_add(n)).into(),
    }
}

/// FNV-1a of 64 bits: the same on every machine and in every version.
fn fnv1a(name: &ObjectName) -> u64 {
    name.namespace
        .bytes()
        .chain([b'/'])
        .chain(name.name.bytes())
        .fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
        })
}

fn family_of(range: &IpNet) -> Family {
    Family::of(&range.addr())
}

fn family_name(family: Family) -> &'static str {
    match family {
        Family::V4 => "IPv4",
        Family::V6 => "IPv6",
    }
}
