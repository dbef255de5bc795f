//! What a folder of policies opens and closes: against a cluster as an agent knows it, or against another folder.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::path::Path;
use std::sync::Arc;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use super::folder::{self, Folder};
use super::{compile, expect, numbered, warning};
use crate::compile::policy::{Change, Members, NodeView, Packets, changes};
use crate::events;
use crate::model::{Family, Namespace, Object, ObjectName, Pod, PodNetwork, PodPhase, Snapshot};

/// The node that is taken to have every pod; nodes cannot be called so.
const EVERYWHERE: &str = "(every node)";
/// So many of a row are named in a table.
const NAMED: usize = 6;

/// An item of what an agent tells of its cluster, `GET /v1/policy/objects`.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub enum Told {
    /// Where its node answers DNS.
    Dns(IpAddr),
    Object(Object),
}

/// What of a folder counts, when it is held against a cluster.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Scope {
    /// Its policies and namespaces come or change; the others stay.
    Added,
    /// The same, and it has all policies that there are.
    Whole,
}

/// The answer.
#[derive(Clone, Debug, Serialize)]
pub struct Diff {
    pub changes: Vec<Row>,
    /// Pods that are in both, and so were looked at.
    pub pods: usize,
    /// Pods that only one has.
    pub only_before: Vec<String>,
    pub only_after: Vec<String>,
    /// What is no part of it, though its author may think so.
    pub warnings: Vec<String>,
}

/// From each of some to each of some others.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// Between their addresses of `IPv4`, `IPv6` or both.
    pub families: Vec<String>,
    pub from: Vec<String>,
    pub to: Vec<String>,
    /// Such as `TCP 80-81`, `ICMP and others` or `everything`.
    pub opened: Vec<String>,
    pub closed: Vec<String>,
}

/// Against a cluster.
///
/// # Errors
/// All that is wrong with the folder, one line each.
pub fn against_cluster(folder: &Path, told: Vec<Told>, scope: Scope) -> Result<Diff, Vec<String>> {
    let folder = Folder::read(folder)?;
    let mut warnings = folder.warnings.clone();
    let (mut before, mut dns) = (Snapshot::default(), Vec::new());
    for item in told {
        match item {
            Told::Dns(address) => dns.push(address),
            Told::Object(object) => {
                before.apply(object);
            }
        }
    }
    let mut after = before.clone();
    if scope == Scope::Whole {
        after.policies.clear();
        after.cluster_policies.clear();
    }
    let mut counts = 0;
    for object in folder.objects() {
        match object {
            Object::Policy(_) | Object::ClusterPolicy(_) => {
                after.apply(object.clone());
            }
            Object::Namespace(namespace) => {
                let applied = applied(before.namespaces.get(&namespace.name), namespace);
                after.apply(Object::Namespace(Arc::new(applied)));
            }
            _ => continue,
        }
        counts += 1;
    }
    if counts == 0 && scope == Scope::Added {
        return Err(vec!["the folder has no policy and no Namespace".to_owned()]);
    }
    let together = warning::together(&after, &dns);
    warnings.extend(warning::of_policies(folder.objects(), &together));
    Ok(Diff {
        warnings,
        ..Diff::of(&before, &after, &dns)
    })
}

/// A namespace after `kubectl apply`: what somebody else has set of it stays.
fn applied(is: Option<&Arc<Namespace>>, applied: &Namespace) -> Namespace {
    let Some(is) = is else {
        return applied.clone();
    };
    let mut all = Namespace::clone(is);
    all.labels.extend(applied.labels.clone());
    all.keeps_established |= applied.keeps_established;
    all
}

/// Between two folders.
///
/// # Errors
/// As [`against_cluster`].
pub fn of_folders(before: &Path, after: &Path) -> Result<Diff, Vec<String>> {
    let paths = [before, after];
    let of = |path: &Path, wrong: Vec<String>| -> Vec<String> {
        let all = wrong.iter();
        all.map(|it| format!("{}: {it}", path.display())).collect()
    };
    let read = |path: &Path| -> Result<(Folder, Vec<IpNet>), Vec<String>> {
        let folder = Folder::read(path)?;
        let ranges = expect::pod_cidrs(&expect::tests(&folder)?)?;
        Ok((folder, ranges))
    };
    let [old, new] = paths.map(|path| read(path).map_err(|it| of(path, it)));
    let ((old, old_ranges), (new, new_ranges)) = (old?, new?);
    let mut warnings = Vec::new();
    if !old_ranges.is_empty() && !new_ranges.is_empty() && old_ranges != new_ranges {
        let words = "its podCIDRs are not those of the other folder, and are taken for both";
        warnings.extend(of(after, vec![words.to_owned()]));
    }
    let ranges = if new_ranges.is_empty() {
        old_ranges
    } else {
        new_ranges
    };
    let cluster = |folder: &Folder, path: &Path| -> Result<(Snapshot, Vec<String>), Vec<String>> {
        let (snapshot, said) = folder.cluster(&ranges).map_err(|it| of(path, vec![it]))?;
        Ok((snapshot, of(path, said)))
    };
    let (old, said_of_old) = cluster(&old, before)?;
    let (mut new, said_of_new) = cluster(&new, after)?;
    warnings.extend(said_of_old.into_iter().chain(said_of_new));
    // A pod that the one or the other gave an address has the same in both.
    for pod in old.pods.values() {
        if let Some(other) = new.pods.get(&pod.id).cloned() {
            new.apply(Object::Pod(Arc::new(Pod {
                addresses: pod.addresses.clone(),
                ..Pod::clone(&other)
            })));
        }
    }
    Ok(Diff {
        warnings,
        ..Diff::of(&old, &new, &folder::node().dns)
    })
}

impl Diff {
    /// What becomes another between two states of a cluster.
    pub fn of(before: &Snapshot, after: &Snapshot, dns: &[IpAddr]) -> Self {
        let names = |it: &Snapshot| -> BTreeSet<ObjectName> {
            let judged = it.pods.values().filter(|pod| is_judged(pod));
            judged.map(|pod| pod.id.clone()).collect()
        };
        let [old, new] = [names(before), names(after)];
        let pods: Vec<_> = old
            .intersection(&new)
            .filter_map(|name| Some((name.clone(), before.pods.get(name)?.addresses.clone())))
            .collect();
        let only = |it: &BTreeSet<ObjectName>, other| -> Vec<String> {
            it.difference(other).map(ToString::to_string).collect()
        };
        let node = everywhere_view(dns);
        let both: BTreeSet<&ObjectName> = old.intersection(&new).collect();
        let [was, is] = [before, after].map(|it| compile(&everywhere(it, &both), &node));
        let changes = changes(&was, &is, &pods, dns);
        Self {
            changes: changes.iter().map(row).collect(),
            pods: pods.len(),
            only_before: only(&old, &new),
            only_after: only(&new, &old),
            warnings: Vec::new(),
        }
    }

    /// A table for people.
    pub fn table(&self) -> String {
        let mut out = String::new();
        for row in &self.changes {
            let family = match &row.families[..] {
                [only] => format!("  ({only})"),
                _ => String::new(),
            };
            let (from, to) = (named(&row.from), named(&row.to));
            out.push_str(&format!("{from}\n  -> {to}{family}\n"));
            for (verb, packets) in [("opens", &row.opened), ("closes", &row.closed)] {
                if !packets.is_empty() {
                    out.push_str(&format!("     {verb} {}\n", packets.join(", ")));
                }
            }
        }
        for (when, pods) in [("before", &self.only_before), ("after", &self.only_after)] {
            if !pods.is_empty() {
                out.push_str(&format!("only {when}, not looked at: {}\n", named(pods)));
            }
        }
        let word = match self.changes.len() {
            0 => "no change".to_owned(),
            number => numbered(number, "change"),
        };
        let pods = numbered(self.pods, "pod");
        out.push_str(&format!("{word} between {pods} and the world\n"));
        for warning in &self.warnings {
            out.push_str(&format!("warning: {warning}\n"));
        }
        out
    }
}

/// Does policy select it, and has it an address?
fn is_judged(pod: &Pod) -> bool {
    pod.network == PodNetwork::Own && pod.phase != PodPhase::Finished && !pod.addresses.is_empty()
}

/// These pods on one node, and no others in a network of their own: what is not looked at may have the address of what is.
pub(super) fn everywhere(snapshot: &Snapshot, pods: &BTreeSet<&ObjectName>) -> Snapshot {
    let mut all = snapshot.clone();
    all.pods
        .retain(|name, pod| pod.network == PodNetwork::Host || pods.contains(name));
    for pod in all.pods.values().cloned().collect::<Vec<_>>() {
        all.apply(Object::Pod(Arc::new(Pod {
            node: Some(EVERYWHERE.into()),
            ..Pod::clone(&pod)
        })));
    }
    all
}

/// The node that has them.
pub(super) fn everywhere_view(dns: &[IpAddr]) -> NodeView {
    NodeView {
        name: EVERYWHERE.into(),
        addresses: dns.to_vec(),
        dns: dns.to_vec(),
    }
}

fn row(change: &Change) -> Row {
    let family = |it: &Family| match it {
        Family::V4 => "IPv4".to_owned(),
        Family::V6 => "IPv6".to_owned(),
    };
    Row {
        families: change.families.iter().map(family).collect(),
        from: members(&change.from),
        to: members(&change.to),
        opened: packets(&change.opened),
        closed: packets(&change.closed),
    }
}

fn members(members: &Members) -> Vec<String> {
    let pods = members.pods.iter().map(ToString::to_string);
    let dns = members.dns.iter().map(|it| format!("the node's DNS {it}"));
    let world = members.world.iter().map(|(net, except)| {
        let net = match (net.prefix_len(), Family::of(&net.addr())) {
            (0, Family::V4) => "the world (IPv4)".to_owned(),
            (0, Family::V6) => "the world (IPv6)".to_owned(),
            _ => net.to_string(),
        };
        match &except[..] {
            [] => net,
            except => {
                let except: Vec<_> = except.iter().map(ToString::to_string).collect();
                format!("{net} except {}", except.join(" and "))
            }
        }
    });
    pods.chain(dns).chain(world).collect()
}

fn packets(packets: &Packets) -> Vec<String> {
    if packets.is_everything() {
        return vec!["everything".to_owned()];
    }
    let ports = packets.ports.iter().map(|(protocol, ranges)| {
        let protocol = events::protocol(*protocol);
        let ranges: Vec<String> = ranges
            .iter()
            .map(|(first, last)| match first == last {
                true => first.to_string(),
                false => format!("{first}-{last}"),
            })
            .collect();
        match &ranges[..] {
            [all] if all == "0-65535" => format!("{protocol} (every port)"),
            ranges => format!("{protocol} {}", ranges.join(" ")),
        }
    });
    let others = packets.others.then(|| "ICMP and others".to_owned());
    ports.chain(others).collect()
}

fn named(all: &[String]) -> String {
    match all.len().checked_sub(NAMED) {
        None | Some(0) => all.join(", "),
        Some(more) => format!("{} and {more} more", all[..NAMED].join(", ")),
    }
}
