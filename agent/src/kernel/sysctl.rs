//! Settings of the node's own network namespace, through /proc/sys. Written only where they differ.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use weir_cni::attachment::is_device;
use weir_common::nat::PortRange;

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
///
/// # Errors
/// One cannot be written; the error names it.
pub fn set_node() -> Result<()> {
    keep_listening_to_routers()?;
    for (key, value) in [
        ("net/ipv4/ip_forward", "1"),
        ("net/ipv6/conf/all/forwarding", "1"),
        ("net/ipv6/conf/default/accept_ra", "0"),
    ] {
        let path = Path::new("/proc/sys").join(key);
        // A kernel without IPv6 has none of its settings.
        if path.exists() || !key.contains("ipv6") {
            set(&path, value)?;
        }
    }
    move_reverse_path_filter()
}

/// Settings of the node's end of a pod's pair. The filter of reverse paths is off there: the reply of a
/// backend carries the Service's address already when the filter sees it, and no route to that leads
/// back to the pod, so that a strict filter drops it; and if the Service was asked at a node port, that address is the node's
/// own, which no packet may come in with unless the device accepts it. What a pod may send from is compared with its lease
/// before, by `weir_from_pod`.
///
/// # Errors
/// The device is not there, or the setting cannot be written.
pub fn set_pod_device(device: &str) -> Result<()> {
    set(&reverse_path_filter(device), "0")?;
    set(
        &Path::new(IPV4_DEVICES).join(device).join("accept_local"),
        "1",
    )
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
fn keep_listening_to_routers() -> Result<()> {
    let setting = |device: &str, key: &str| Path::new(IPV6_DEVICES).join(device).join(key);
    let devices = match fs::read_dir(IPV6_DEVICES) {
        // A kernel without IPv6.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        devices => devices.with_context(|| format!("list {IPV6_DEVICES}"))?,
    };
    for device in devices {
        let name = device?.file_name();
        let name = name.to_string_lossy();
        if name == "all" || name == "default" || is_device(&name) {
            continue;
        }
        let accepts = setting(&name, "accept_ra");
        let forwards = read(&setting(&name, "forwarding"));
        // A device that went meanwhile listens to nobody.
        if let (Ok(1), Ok(0)) = (read(&accepts), forwards) {
            set(&accepts, "2")?;
        }
    }
    Ok(())
}

/// The kernel takes the larger of a device's value and that of `all`. So that pods' devices can be
/// without, the value of `all` moves to every other device and to those that are still to come.
fn move_reverse_path_filter() -> Result<()> {
    let all = read(&reverse_path_filter("all"))?;
    if all == 0 {
        return Ok(());
    }
    let devices = at(Path::new(IPV4_DEVICES));
    let devices = fs::read_dir(devices).with_context(|| format!("list {IPV4_DEVICES}"))?;
    for device in devices {
        let name = device?.file_name();
        let name = name.to_string_lossy();
        if name == "all" || is_device(&name) {
            continue;
        }
        let path = reverse_path_filter(&name);
        match read(&path) {
            Ok(own) if own < all => set(&path, &all.to_string())?,
            // A device that went meanwhile needs no filter.
            _ => {}
        }
    }
    set(&reverse_path_filter("all"), "0")
}

fn reverse_path_filter(device: &str) -> PathBuf {
    Path::new(IPV4_DEVICES).join(device).join("rp_filter")
}

fn read(path: &Path) -> Result<u32> {
    let path = &at(path);
    let text = fs::read_to_string(path).with_context(|| format!("read {}", path.display()))?;
    let number = text.trim().parse();
    number.with_context(|| format!("{} holds no number", path.display()))
}

fn set(path: &Path, value: &str) -> Result<()> {
    let path = &at(path);
    if fs::read_to_string(path).is_ok_and(|current| current.trim() == value) {
        return Ok(());
    }
    fs::write(path, value).with_context(|| {
        format!(
            "set {} to {value}: allow it, or set it yourself before weir-agent starts",
            path.display()
        )
    })
}
