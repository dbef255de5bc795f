//! What a node is made of, as far as anything could be left on it: taken before something is installed and
//! after it is removed, the two must be equal. Only looks.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};
use aya::programs::SchedClassifier;
use aya::programs::tc::TcAttachType;

use super::Cluster;
use super::init::OVERLAID;
use super::place::Node;
use crate::cgroup;
use crate::node::binary;

/// Commands whose every line is a thing, with what such a thing is called.
const LISTS: [(&str, &str); 11] = [
    ("device", "ip -o link show"),
    ("address", "ip -o address show"),
    ("route", "ip -4 -o route show table all"),
    ("route", "ip -6 -o route show table all"),
    ("rule", "ip -4 rule show"),
    ("rule", "ip -6 rule show"),
    ("permanent neighbour", "ip neigh show nud permanent"),
    ("netfilter", "nft -s list ruleset"),
    ("queue", "tc qdisc show"),
    ("legacy netfilter", "iptables-legacy-save"),
    ("legacy netfilter", "ip6tables-legacy-save"),
];
/// Settings that change by themselves.
const MOVING: [&str; 1] = ["net/netfilter/nf_conntrack_count"];
/// What the container runtime and the kubelet keep for themselves.
const OF_OTHERS: [&str; 3] = ["/run/containerd", "/var/lib/containerd", "/var/lib/kubelet"];

/// Things, each in words.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Census(BTreeSet<String>);

impl Census {
    /// Of a node of a cluster, by its name.
    ///
    /// # Errors
    /// There is no such node, or something cannot be listed.
    pub fn of(cluster: &Cluster, node: &str) -> Result<Self> {
        let found = Node::all(cluster.options.nodes).find(|it| it.name() == node);
        let node = found.with_context(|| format!("no node {node}"))?;
        let inside = cluster.starter.run(node, &binary("cluster"), ["census"])?;
        let mut things: BTreeSet<String> = inside.lines().map(str::to_owned).collect();
        // What differs from the machine: the node's own layer of these folders.
        for folder in OVERLAID {
            let layer = cluster.place.node_dir(node);
            files(&layer.join(folder), &layer, &mut things)?;
        }
        Ok(Self(things))
    }

    /// What is in one and not in the other: `-` for what is only here, `+` for what is only there.
    #[must_use]
    pub fn difference(&self, after: &Self) -> Vec<String> {
        let gone = self.0.difference(&after.0).map(|it| format!("- {it}"));
        let new = after.0.difference(&self.0).map(|it| format!("+ {it}"));
        gone.chain(new).collect()
    }

    /// How many things there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// A node has at least a loopback device.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// Of the node that this process is in; one thing a line.
///
/// # Errors
/// Something cannot be listed.
pub fn of_this_node() -> Result<String> {
    let mut things = BTreeSet::new();
    for (noun, command) in LISTS {
        let Some(text) = output_of(command)? else {
            continue;
        };
        let lines = text.lines().filter(|line| !line.starts_with('#'));
        things.extend(lines.map(|line| format!("{noun} {}", line.trim())));
    }
    programs_of_devices(&mut things)?;
    filters(&mut things)?;
    programs_of_cgroups(&mut things)?;
    settings(Path::new("/proc/sys/net"), &mut things)?;
    files(Path::new("/sys/fs/bpf"), Path::new("/"), &mut things)?;
    files(Path::new("/run"), Path::new("/"), &mut things)?;
    let mounts = fs::read_to_string("/proc/self/mounts").context("read the mounts")?;
    let mounts = mounts.lines().filter_map(|line| {
        let mut fields = line.split(' ').skip(1);
        let (point, kind) = (fields.next()?, fields.next()?);
        // The machine's own, under what the node has mounted over them, come and go with the machine.
        let is_reached = fs::symlink_metadata(point).is_ok();
        is_reached.then(|| format!("mount {point} of {kind}"))
    });
    things.extend(mounts);
    Ok(things.into_iter().map(|it| it + "\n").collect())
}

/// What a command prints; `None` if there is no such program.
fn output_of(command: &str) -> Result<Option<String>> {
    let mut words = command.split_whitespace();
    let program = words.next().unwrap_or_default();
    let output = match Command::new(program).args(words).output() {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        output => output.with_context(|| format!("run {command}"))?,
    };
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        bail!("{command}: {}: {}", output.status, said.trim());
    }
    Ok(Some(String::from_utf8_lossy(&output.stdout).into_owned()))
}

/// Filters of the blocks that devices share, and of devices that share none.
fn filters(things: &mut BTreeSet<String>) -> Result<()> {
    let queues = output_of("tc qdisc show")?.unwrap_or_default();
    for place in places_of_filters(&queues) {
        // A device that went meanwhile had none.
        let Ok(Some(text)) = output_of(&format!("tc filter show {place}")) else {
            continue;
        };
        let filters = text.lines().filter(|line| line.contains(" handle "));
        things.extend(filters.map(|it| format!("{} at {place}", it.trim())));
    }
    Ok(())
}

/// Where `tc qdisc show` says that there can be filters, in the words of `tc filter show`.
fn places_of_filters(queues: &str) -> BTreeSet<String> {
    let mut places = BTreeSet::new();
    for line in queues.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        let after = |key: &str| {
            let at = words.iter().position(|word| *word == key)?;
            words.get(at + 1)
        };
        if !words.contains(&"clsact") && !words.contains(&"ingress") {
            continue;
        }
        for (key, side) in [("ingress_block", "ingress"), ("egress_block", "egress")] {
            match (after(key), after("dev")) {
                (Some(block), _) => places.insert(format!("block {block}")),
                (None, Some(device)) => places.insert(format!("dev {device} {side}")),
                (None, None) => false,
            };
        }
    }
    places
}

/// Programs at the hooks of devices (tcx).
fn programs_of_devices(things: &mut BTreeSet<String>) -> Result<()> {
    for device in fs::read_dir("/sys/class/net").context("list the devices")? {
        let device = device?.file_name().to_string_lossy().into_owned();
        for side in [TcAttachType::Ingress, TcAttachType::Egress] {
            let queried = SchedClassifier::query_tcx(&device, side);
            let (_, programs) = queried.with_context(|| format!("ask for programs of {device}"))?;
            for program in programs {
                let name = program.name_as_str().unwrap_or("?");
                things.insert(format!("program {name} at {side:?} of {device}"));
            }
        }
    }
    Ok(())
}

/// Programs that are attached to a cgroup of the node; those of the machine are not seen from here.
fn programs_of_cgroups(things: &mut BTreeSet<String>) -> Result<()> {
    let top = cgroup::mount_point()?;
    let mut bpftool = Command::new("bpftool");
    let output = bpftool.args(["cgroup", "tree"]).arg(&top).output();
    let output = output.context("run bpftool")?;
    if !output.status.success() {
        bail!(
            "bpftool: {}",
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    let mut cgroup = String::new();
    for line in String::from_utf8_lossy(&output.stdout).lines().skip(2) {
        // A cgroup's own line begins with its path, those of its programs with a number, further right.
        match line.split_whitespace().collect::<Vec<_>>().as_slice() {
            [path] if path.starts_with('/') => cgroup = (*path).to_owned(),
            [_id, words @ ..] => {
                things.insert(format!("program {} of {cgroup}", words.join(" ")));
            }
            [] => {}
        }
    }
    Ok(())
}

fn settings(folder: &Path, things: &mut BTreeSet<String>) -> Result<()> {
    for entry in fs::read_dir(folder).with_context(|| format!("list {}", folder.display()))? {
        let path = entry?.path();
        let name = path.strip_prefix("/proc/sys").unwrap_or(&path);
        if path.is_dir() {
            settings(&path, things)?;
        } else if !MOVING.iter().any(|moving| name == Path::new(moving))
            // Some can only be written.
            && let Ok(value) = fs::read_to_string(&path)
        {
            let value: Vec<&str> = value.split_whitespace().collect();
            things.insert(format!("sysctl {} = {}", name.display(), value.join(" ")));
        }
    }
    Ok(())
}

/// Everything in a folder, by its path on the node, whose root is `root` here.
fn files(folder: &Path, root: &Path, things: &mut BTreeSet<String>) -> Result<()> {
    let entries = match fs::read_dir(folder) {
        // It went meanwhile.
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        entries => entries.with_context(|| format!("list {}", folder.display()))?,
    };
    for entry in entries {
        let entry = entry?;
        let path = entry.path();
        let shown = Path::new("/").join(path.strip_prefix(root).unwrap_or(&path));
        if OF_OTHERS.iter().any(|other| shown == Path::new(other)) {
            continue;
        }
        let kind = entry.file_type()?;
        let noun = match kind {
            kind if kind.is_dir() => "folder".to_owned(),
            kind if kind.is_socket() => "socket".to_owned(),
            kind if kind.is_symlink() => "link".to_owned(),
            kind if kind.is_file() => match entry.metadata() {
                Ok(found) => format!("file of {} bytes", found.len()),
                Err(_) => continue,
            },
            _ => "special file".to_owned(),
        };
        things.insert(format!("{noun} {}", shown.display()));
        if kind.is_dir() {
            files(&path, root, things)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_difference_names_both_sides() {
        let of = |things: &[&str]| Census(things.iter().map(|it| (*it).to_owned()).collect());
        let before = of(&["device lo", "sysctl net/a = 0"]);
        let after = of(&["device lo", "sysctl net/a = 1", "file /run/weir/x"]);
        assert_eq!(
            before.difference(&after),
            [
                "- sysctl net/a = 0",
                "+ file /run/weir/x",
                "+ sysctl net/a = 1"
            ]
        );
        assert!(before.difference(&before).is_empty());
    }

    #[test]
    fn filters_are_looked_for_in_blocks_and_at_devices() {
        let queues = "qdisc noqueue 0: dev lo root refcnt 2 \n\
                      qdisc clsact ffff: dev weir2a parent ffff:fff1 ingress_block 31 egress_block 32 \n\
                      qdisc clsact ffff: dev weir3b parent ffff:fff1 ingress_block 31 egress_block 32 \n\
                      qdisc clsact ffff: dev eth0 parent ffff:fff1 \n";
        let expected = [
            "block 31",
            "block 32",
            "dev eth0 egress",
            "dev eth0 ingress",
        ];
        assert!(places_of_filters(queues).iter().eq(expected));
    }

    #[test]
    fn files_are_shown_as_the_node_has_them() {
        let root = tempfile::tempdir().unwrap();
        for folder in ["opt/cni/bin", "var/lib/kubelet/pods"] {
            fs::create_dir_all(root.path().join(folder)).unwrap();
        }
        fs::write(root.path().join("opt/cni/bin/it"), "four").unwrap();
        let mut things = BTreeSet::new();
        for folder in ["opt", "var", "etc"] {
            files(&root.path().join(folder), root.path(), &mut things).unwrap();
        }
        let expected = [
            "file of 4 bytes /opt/cni/bin/it",
            "folder /opt/cni",
            "folder /opt/cni/bin",
            "folder /var/lib",
        ];
        assert_eq!(things.iter().collect::<Vec<_>>(), expected);
    }
}
