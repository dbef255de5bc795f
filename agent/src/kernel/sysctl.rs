//! Settings of the node's own network namespace, through /proc/sys. Written only where they differ.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use weir_cni::attachment::is_device;
use weir_common::nat::PortRange;

const IPV4_DEVICES: &str = "/proc/sys/net/ipv4/conf";

/// Settings without which pods have no network.
///
/// # Errors
/// One cannot be written; the error names it.
pub fn set_node() -> Result<()> {
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

/// The kernel takes the larger of a device's value and that of `all`. So that pods' devices can be
/// without, the value of `all` moves to every other device and to those that are still to come.
fn move_reverse_path_filter() -> Result<()> {
    let all = read(&reverse_path_filter("all"))?;
    if all == 0 {
        return Ok(());
    }
    let devices = fs::read_dir(IPV4_DEVICES).with_context(|| format!("list {IPV4_DEVICES}"))?;
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
    let text = fs::read_to_string(path).with_context(|| format!("read {}", path.display()))?;
    let number = text.trim().parse();
    number.with_context(|| format!("{} holds no number", path.display()))
}

fn set(path: &Path, value: &str) -> Result<()> {
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
