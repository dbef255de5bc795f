//! Ports that the node keeps from its own connections (`net.ipv4.ip_local_reserved_ports`, of both families). Where those
//! may have ports that stand for pods, ours are among them.

use std::fmt;
use std::fs::File;
use std::io::Read as _;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use weir_common::nat::PortRange;

use super::record::{Record, Setting};
use super::{at, ephemeral_ports, write};

/// The setting.
pub(super) const PATH: &str = "/proc/sys/net/ipv4/ip_local_reserved_ports";
/// The kernel gives the list in one read, and nothing to the next: what has no room is cut off. The longest has every
/// other port in it.
const LONGEST: usize = 256 * 1024;

/// Keeps the ports that stand for pods from the node's own connections, as long as those are given such ports; otherwise takes
/// back what any agent has kept for that. What others keep so stays so. Says whether it had to change something.
///
/// # Errors
/// The setting cannot be read, written or remembered.
pub fn reserve_ports(run_dir: &Path, ports: PortRange) -> Result<bool> {
    let own = ephemeral_ports()?;
    let is_needed = own.first <= ports.last && ports.first <= own.last;
    let wanted = match is_needed {
        true => Ports::of(ports.first, ports.last),
        false => Ports::none(),
    };
    let mut record = Record::open(run_dir)?;
    let path = Path::new(PATH);
    let known = record.settings().iter().find(|it| it.path == path);
    let known = known.cloned();
    if !is_needed && known.is_none() {
        return Ok(false);
    }
    let now = read()?;
    let others = match &known {
        Some(known) => others(&now, known)?,
        None => now.clone(),
    };
    let next = others.with(&wanted);
    if is_needed
        && known
            .as_ref()
            .is_none_or(|it| it.ours != wanted.to_string())
    {
        record.note(path, &now.to_string(), &wanted.to_string());
        record.save()?;
    }
    if next != now {
        write(path, &next.text())?;
    }
    if !is_needed && known.is_some() {
        record.forget(path)?;
    }
    Ok(next != now)
}

/// What is to be written so that the setting is without what agents have added, and what it then says; none if it is so
/// already.
///
/// # Errors
/// The setting, or what is remembered of it, cannot be read.
pub(super) fn without_ours(known: &Setting) -> Result<Option<(String, String)>> {
    let now = read()?;
    let others = others(&now, known)?;
    Ok((others != now).then(|| (others.text(), others.to_string())))
}

/// The list without what agents have added to it.
fn others(now: &Ports, known: &Setting) -> Result<Ports> {
    let added = Ports::parse(&known.ours)?.without(&Ports::parse(&known.before)?);
    Ok(now.without(&added))
}

fn read() -> Result<Ports> {
    let path: PathBuf = at(Path::new(PATH));
    let mut list = vec![0; LONGEST];
    let length = File::open(&path)
        .and_then(|mut file| file.read(&mut list))
        .with_context(|| format!("read {}", path.display()))?;
    ensure!(length < LONGEST, "{} is too long", path.display());
    let list = String::from_utf8_lossy(&list[..length]);
    Ports::parse(list.trim()).with_context(|| format!("read {}", path.display()))
}

/// Ports as the kernel writes them: `8080,9000-9100`, in order, none twice.
#[derive(Clone, Eq, PartialEq)]
struct Ports(Vec<bool>);

impl Ports {
    fn none() -> Self {
        Self(vec![false; usize::from(u16::MAX) + 1])
    }

    fn of(first: u16, last: u16) -> Self {
        let mut ports = Self::none();
        ports.0[first.into()..=last.into()].fill(true);
        ports
    }

    fn parse(list: &str) -> Result<Self> {
        let mut ports = Self::none();
        for range in list.split(',').filter(|range| !range.is_empty()) {
            let (first, last) = range.split_once('-').unwrap_or((range, range));
            match (first.parse::<u16>(), last.parse::<u16>()) {
                (Ok(first), Ok(last)) if first <= last => {
                    ports.0[first.into()..=last.into()].fill(true);
                }
                _ => bail!("{range:?} is no range of ports"),
            }
        }
        Ok(ports)
    }

    fn with(&self, others: &Self) -> Self {
        let both = self.0.iter().zip(&others.0);
        Self(both.map(|(one, other)| *one || *other).collect())
    }

    fn without(&self, others: &Self) -> Self {
        let both = self.0.iter().zip(&others.0);
        Self(both.map(|(one, other)| *one && !*other).collect())
    }

    /// As it is written: nothing at all would change nothing.
    fn text(&self) -> String {
        format!("{self}\n")
    }
}

impl fmt::Display for Ports {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut separator = "";
        let mut at = 0;
        for run in self.0.chunk_by(|one, next| one == next) {
            let (first, last) = (at, at + run.len() - 1);
            at += run.len();
            if !run[0] {
                continue;
            }
            write!(f, "{separator}{first}")?;
            if first != last {
                write!(f, "-{last}")?;
            }
            separator = ",";
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_are_as_the_kernel_writes_them() {
        let ours = Ports::of(20_000, 20_009);
        for (list, with, without) in [
            ("", "20000-20009", ""),
            ("8080", "8080,20000-20009", "8080"),
            (
                "30000-30001,80",
                "80,20000-20009,30000-30001",
                "80,30000-30001",
            ),
            ("19990-19999", "19990-20009", "19990-19999"),
            (
                "20003-20030,65535",
                "20000-20030,65535",
                "20010-20030,65535",
            ),
            ("0-65535", "0-65535", "0-19999,20010-65535"),
        ] {
            let ports = Ports::parse(list).unwrap();
            assert_eq!(ports.with(&ours).to_string(), with);
            assert_eq!(ports.without(&ours).to_string(), without);
            assert!(Ports::parse(with).unwrap() == ports.with(&ours), "{with}");
        }
        for list in ["x", "1-", "-", "70000", "20-10"] {
            assert!(Ports::parse(list).is_err(), "{list}");
        }
    }
}
