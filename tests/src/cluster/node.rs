//! A node: its namespaces, cgroup and files, and containerd and kubelet on it. Who does networking
//! there is not here.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use super::images::PAUSE;
use super::options::{Family, Options};
use super::place::{CLUSTER_DNS, Node, OUTSIDE, Place};
use super::plane::Authority;
use super::programs::Programs;
use super::start::{Inside, Starter};
use super::{fabric, hierarchy};
use crate::node::binary;

const START: Duration = Duration::from_secs(60);

/// The process that is a node, by its name in the record: when it ends, the node ends.
#[must_use]
pub(super) fn init_process(node: Node) -> String {
    format!("{}-init", node.name())
}

/// Makes the node's namespaces and its files, and starts its first process.
///
/// # Errors
/// Not root, or something of that name is there already.
pub(super) fn create(starter: &Starter, place: &Place, node: Node) -> Result<()> {
    fabric::attach(place, node)?;
    let dir = place.node_dir(node);
    write_files(&dir, node)?;
    // Not whoever runs this: that may be a test.
    let own = binary("cluster");
    let cgroup = place.cgroup_of(&node.name());
    hierarchy::create(&format!("{cgroup}/init"))?;
    let name = init_process(node);
    let args = [
        "--mount",
        "--uts",
        "--ipc",
        "--pid",
        "--cgroup",
        "--fork",
        "--kill-child=KILL",
        "--",
    ];
    let args = args.into_iter().map(str::to_owned).chain([
        own.display().to_string(),
        "init".to_owned(),
        node.name(),
        dir.display().to_string(),
    ]);
    let unshare = Path::new("unshare");
    starter.start(&name, Inside::NetworkOf(node), &node.name(), unshare, args)?;
    starter.wait(&name, "ready", START, || starter.init_of(node).is_ok())?;
    hierarchy::delegate(&cgroup, &format!("{cgroup}/init"))
}

/// Starts containerd and gives it the images of the archives.
///
/// # Errors
/// It does not start, or cannot read an archive.
pub(super) fn start_containerd(
    starter: &Starter,
    programs: &Programs,
    place: &Place,
    node: Node,
    archives: &[&Path],
) -> Result<()> {
    let config = place.node_dir(node).join("containerd.toml");
    fs::write(&config, containerd_config(&programs.runc))?;
    let name = format!("{}-containerd", node.name());
    let cgroup = format!("{}/containerd", node.name());
    let args = [Path::new("--config"), &config];
    starter.start(
        &name,
        Inside::Node(node),
        &cgroup,
        &programs.containerd,
        args,
    )?;
    starter.wait(&name, "listening", START, || {
        starter.run(node, &programs.ctr, ["version"]).is_ok()
    })?;
    archives
        .iter()
        .try_for_each(|archive| import(starter, programs, node, archive))
}

/// Gives a node's containerd the images of an archive.
///
/// # Errors
/// It is no archive of images, or there is no space.
pub(super) fn import(
    starter: &Starter,
    programs: &Programs,
    node: Node,
    archive: &Path,
) -> Result<()> {
    let words = ["--namespace", "k8s.io", "images", "import"].map(Path::new);
    let args = words.into_iter().chain([archive]);
    let imported = starter.run(node, &programs.ctr, args);
    imported
        .map(drop)
        .with_context(|| format!("import {}", archive.display()))
}

/// Starts the kubelet. It registers the node, which is Ready once it has a network.
///
/// # Errors
/// It cannot be started.
pub(super) fn start_kubelet(
    starter: &Starter,
    programs: &Programs,
    place: &Place,
    authority: &Authority,
    node: Node,
    options: &Options,
) -> Result<()> {
    let kubeconfig = authority.node(node)?;
    let config = place.node_dir(node).join("kubelet.json");
    fs::write(
        &config,
        format!("{:#}", kubelet_config(place, authority, node)),
    )?;
    let addresses = node.addresses().map(|address| address.to_string());
    let addresses = match options.family {
        Family::Ipv4 => addresses[0].clone(),
        Family::Dual => addresses.join(","),
    };
    let args = [
        format!("--config={}", config.display()),
        format!("--kubeconfig={}", kubeconfig.display()),
        format!("--hostname-override={}", node.name()),
        format!("--node-ip={addresses}"),
        // Each node is a zone: specs about topology want several.
        format!("--node-labels=topology.kubernetes.io/zone=zone-{}", node.0),
    ];
    let name = format!("{}-kubelet", node.name());
    let cgroup = format!("{}/kubelet", node.name());
    starter.start(&name, Inside::Node(node), &cgroup, &programs.kubelet, args)
}

/// The folder whose pods a node's kubelet runs without being told to by anybody.
pub(super) fn static_pods(place: &Place, node: Node) -> PathBuf {
    place.node_dir(node).join("static-pods")
}

/// The files that a node sees instead of the machine's.
fn write_files(dir: &Path, node: Node) -> Result<()> {
    for folder in [
        "etc/cni/net.d",
        "opt/cni/bin",
        "var/log/pods",
        "var/log/containers",
        "static-pods",
    ] {
        fs::create_dir_all(dir.join(folder))?;
    }
    let resolver = OUTSIDE[0];
    fs::write(
        dir.join("etc/resolv.conf"),
        format!("nameserver {resolver}\n"),
    )?;
    let name = node.name();
    let [address, _] = node.addresses();
    let hosts = format!("127.0.0.1 localhost\n::1 localhost\n{address} {name}\n");
    fs::write(dir.join("etc/hosts"), hosts)?;
    fs::write(dir.join("etc/hostname"), format!("{name}\n"))?;
    Ok(())
}

fn containerd_config(runc: &Path) -> String {
    let runc = runc.display();
    // A process without CAP_SYS_RESOURCE may not make itself less likely to be killed for memory,
    // which every sandbox asks for: the restriction makes that a wish.
    format!(
        r#"version = 3
root = "/var/lib/containerd"
state = "/run/containerd"

[grpc]
address = "/run/containerd/containerd.sock"

[plugins.'io.containerd.cri.v1.images'.pinned_images]
sandbox = "{PAUSE}"

[plugins.'io.containerd.cri.v1.runtime']
disable_apparmor = true
restrict_oom_score_adj = true

[plugins.'io.containerd.cri.v1.runtime'.cni]
bin_dirs = ["/opt/cni/bin"]
conf_dir = "/etc/cni/net.d"
use_internal_loopback = true

[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"

[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc.options]
BinaryName = "{runc}"
SystemdCgroup = false
"#
    )
}

fn kubelet_config(place: &Place, authority: &Authority, node: Node) -> Value {
    let name = node.name();
    // Nothing can be pulled again, and the disk is the machine's: neither images nor pods go for
    // want of space until there is next to none.
    let eviction: Value = ["nodefs.available", "imagefs.available", "nodefs.inodesFree"]
        .into_iter()
        .map(|signal| (signal.to_owned(), json!("1%")))
        .chain([("memory.available".to_owned(), json!("100Mi"))])
        .collect::<serde_json::Map<_, _>>()
        .into();
    json!({
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "failCgroupV1": false,
        "cgroupDriver": "cgroupfs",
        "failSwapOn": false,
        "containerRuntimeEndpoint": "unix:///run/containerd/containerd.sock",
        "clusterDNS": [CLUSTER_DNS],
        "clusterDomain": "cluster.local",
        "resolvConf": "/etc/resolv.conf",
        "staticPodPath": static_pods(place, node),
        "authentication": {
            "anonymous": { "enabled": false },
            "webhook": { "enabled": true },
            "x509": { "clientCAFile": authority.file("ca.crt") },
        },
        "authorization": { "mode": "Webhook" },
        "tlsCertFile": authority.file(&format!("{name}.crt")),
        "tlsPrivateKeyFile": authority.file(&format!("{name}.key")),
        "imageGCHighThresholdPercent": 100,
        "imageGCLowThresholdPercent": 99,
        "evictionHard": eviction,
        "serializeImagePulls": false,
    })
}

/// Asks until there is an answer.
///
/// # Errors
/// There was none in time; the error holds the last reason.
pub(super) fn until<T>(
    what: &str,
    within: Duration,
    mut ask: impl FnMut() -> Result<T>,
) -> Result<T> {
    let deadline = Instant::now() + within;
    loop {
        match ask() {
            Ok(answer) => return Ok(answer),
            Err(why) if Instant::now() > deadline => {
                bail!("{what}: not in {within:?}: {why:#}");
            }
            Err(_) => std::thread::sleep(Duration::from_millis(100)),
        }
    }
}
