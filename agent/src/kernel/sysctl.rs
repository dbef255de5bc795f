//! Settings of the node's own network namespace, through /proc/sys. Written only where they differ, and
//! put back by a cleanup.

mod ports;
mod record;

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use weir_cni::attachment::is_device;
use weir_common::nat::PortRange;

pub use self::ports::reserve_ports;
use self::record::{Record, Setting};

const IPV4_DEVICES: &str = "/proc/sys/net/ipv4/conf";
const IPV6_DEVICES: &str = "/proc/sys/net/ipv6/conf";
/// Where a container has its node's /proc/sys/net: the one at the usual place a runtime makes read-only,
/// whoever runs there. Either shows the namespace of who reads it.
const OF_THE_NODE: &str = "/host";

/// The file to use for a setting, by its usual path.
fn at(path: &Path) -> PathBuf {
    let of_the_node = Path::new(OF_THE_NODE).join(path.strip_prefix("/").unwrap_or(path));
    match of_the_node.exists() {
        true => of_the_node,
        false => path.to_owned(),
    }
}

/// Settings without which pods have no network: the node forwards, between its pods and to other nodes.
/// What they were before is remembered in the run folder, for [`restore`].
///
/// # Errors
/// One cannot be written, or not be remembered; the error names it.
pub fn set_node(run_dir: &Path) -> Result<()> {
    let mut record = Record::open(run_dir)?;
    keep_listening_to_routers(&mut record)?;
    let mut forwarding = devices_and_default(IPV4_DEVICES, "forwarding", "1")?;
    // A router takes no advice of another: the kernel changes this too (Linux, inet_forward_change).
    let redirects = Path::new(IPV4_DEVICES).join("all/accept_redirects");
    forwarding.push((redirects, "0"));
    let path = Path::new("/proc/sys/net/ipv4/ip_forward");
    change(&mut record, path, "1", &forwarding)?;
    // A kernel without IPv6 has none of its settings.
    if Path::new(IPV6_DEVICES).exists() {
        let forwarding = devices_and_default(IPV6_DEVICES, "forwarding", "1")?;
        let path = Path::new(IPV6_DEVICES).join("all/forwarding");
        change(&mut record, &path, "1", &forwarding)?;
        let path = Path::new(IPV6_DEVICES).join("default/accept_ra");
        change(&mut record, &path, "0", &[])?;
    }
    Ok(())
}

/// Puts back what agents have changed since the last boot ([`set_node`], [`reserve_ports`]), except what somebody else has
/// changed since. Returns what is as it was before, in words, and what is not, with the reason.
pub fn restore(run_dir: &Path) -> (Vec<String>, Vec<String>) {
    let (mut restored, mut left) = (Vec::new(), Vec::new());
    let record = match Record::open(run_dir) {
        Ok(record) => record,
        Err(error) => return (restored, vec![format!("sysctls: {error:#}")]),
    };
    let holds = |path: &Path, value: &str| text(path).is_ok_and(|now| now == value);
    let put = |path: &Path, text: &str, said: &str| {
        let name = path.strip_prefix("/proc/sys").unwrap_or(path).display();
        match write(path, text) {
            Ok(()) => Ok(format!("our value of {name}, which is {said} again")),
            Err(error) => Err(format!("our value of {name}: {error:#}")),
        }
    };
    // To this one others add, too.
    let (ports, settings): (Vec<_>, Vec<_>) = record
        .settings()
        .iter()
        .partition(|it| it.path == Path::new(ports::PATH));
    // Judged before the first is written: one setting changes others.
    let ours: Vec<_> = settings
        .into_iter()
        .filter(|it| holds(&it.path, &it.ours))
        .collect();
    let ours = ours.into_iter().map(|Setting { path, before, .. }| {
        (!holds(path, before)).then(|| put(path, before, before))
    });
    let ports = ports.into_iter().map(|it| match ports::without_ours(it) {
        Ok(wanted) => wanted.map(|(text, said)| put(&it.path, &text, &said)),
        Err(error) => Some(Err(format!("our part of {}: {error:#}", ports::PATH))),
    });
    for outcome in ours.chain(ports).flatten() {
        match outcome {
            Ok(done) => restored.push(done),
            Err(problem) => left.push(problem),
        }
    }
    // While something is left, this can be tried again.
    if left.is_empty()
        && let Err(error) = record.remove()
    {
        left.push(format!("sysctls: {error:#}"));
    }
    (restored, left)
}

/// Settings of the node's end of a pod's pair: no pod may configure the node by router advertisements or redirects of IPv6.
/// Of IPv4 nothing is to be set, whatever the node says of reverse paths (`rp_filter`, `accept_local`): what the stack gets
/// of a pod has the pod's own address, which `weir_from_pod` compares with its lease and which is replaced where it leaves.
/// What an earlier agent has set, whose programs needed it (0 and 1), stays so: it may come back.
///
/// Says whether one was another: whoever applies the node's settings to every new device (udev does, with
/// `net.ipv6.conf.*` of sysctl.d) may come after us.
///
/// # Errors
/// The device is not there, or a setting cannot be read or written.
pub fn set_pod_device(device: &str) -> Result<bool> {
    let folder = Path::new(IPV6_DEVICES).join(device);
    // A kernel without IPv6, or a device too small for it, has neither the settings nor the danger.
    if !at(&folder).exists() {
        return Ok(false);
    }
    let mut was_another = false;
    for key in ["accept_ra", "accept_redirects"] {
        let path = folder.join(key);
        if text(&path)? != "0" {
            write(&path, "0")?;
            was_another = true;
        }
    }
    Ok(was_another)
}

/// The ports that the kernel gives to connections of the node itself.
///
/// # Errors
/// The setting cannot be read.
pub fn ephemeral_ports() -> Result<PortRange> {
    const PATH: &str = "/proc/sys/net/ipv4/ip_local_port_range";
    let text = fs::read_to_string(PATH).with_context(|| format!("read {PATH}"))?;
    let mut numbers = text.split_whitespace().map(str::parse);
    match (numbers.next(), numbers.next()) {
        (Some(Ok(first)), Some(Ok(last))) => Ok(PortRange { first, last }),
        _ => bail!("{PATH} holds no range: {text:?}"),
    }
}

/// A device that has its addresses and its default route from a router (`accept_ra` 1) would lose them as
/// soon as the node forwards; 2 is the same for one that forwards. Devices to come listen to nobody.
fn keep_listening_to_routers(record: &mut Record) -> Result<()> {
    let setting = |device: &str, key: &str| Path::new(IPV6_DEVICES).join(device).join(key);
    if !Path::new(IPV6_DEVICES).exists() {
        return Ok(());
    }
    for name in devices(IPV6_DEVICES)? {
        let accepts = setting(&name, "accept_ra");
        let forwards = read(&setting(&name, "forwarding"));
        // A device that went meanwhile listens to nobody.
        if let (Ok(1), Ok(0)) = (read(&accepts), forwards) {
            change(record, &accepts, "2", &[])?;
        }
    }
    Ok(())
}

/// The devices that have settings in this folder, without those of pods.
fn devices(folder: &str) -> Result<Vec<String>> {
    let entries = fs::read_dir(at(Path::new(folder))).with_context(|| format!("list {folder}"))?;
    let mut found = Vec::new();
    for entry in entries {
        let name = entry?.file_name().to_string_lossy().into_owned();
        if name != "all" && name != "default" && !is_device(&name) {
            found.push(name);
        }
    }
    Ok(found)
}

/// A setting of every device, and of those that are still to come, with the value that it will have.
fn devices_and_default<'a>(
    folder: &str,
    key: &str,
    value: &'a str,
) -> Result<Vec<(PathBuf, &'a str)>> {
    let names = devices(folder)?.into_iter().chain(["default".to_owned()]);
    let path = |name: String| (Path::new(folder).join(name).join(key), value);
    Ok(names.map(path).collect())
}

fn read(path: &Path) -> Result<u32> {
    let number = text(path)?.parse();
    number.with_context(|| format!("{} holds no number", path.display()))
}

fn text(path: &Path) -> Result<String> {
    let path = &at(path);
    let text = fs::read_to_string(path).with_context(|| format!("read {}", path.display()))?;
    Ok(text.trim().to_owned())
}

/// Gives a setting our value if it has another. `dragged` are those that the kernel changes along with it,
/// with the values that it gives them.
fn change(
    record: &mut Record,
    path: &Path,
    value: &str,
    dragged: &[(PathBuf, &str)],
) -> Result<()> {
    let now = text(path)?;
    if now == value {
        return Ok(());
    }
    record.note(path, &now, value);
    for (path, value) in dragged {
        // A device that went meanwhile has no settings.
        if let Ok(now) = text(path) {
            record.note(path, &now, value);
        }
    }
    record.save()?;
    write(path, value)
}

fn write(path: &Path, value: &str) -> Result<()> {
    let path = &at(path);
    fs::write(path, value).with_context(|| {
        format!(
            "set {} to {value}: allow it, or set it yourself before weir-agent starts",
            path.display()
        )
    })
}
