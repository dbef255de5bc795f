//! What Weir is compared with: the bridge plugin with static routes, kube-proxy, CoreDNS. And the
//! resolver of the world outside, which every cluster has.

use std::fs;
use std::net::IpAddr;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use super::images::COREDNS;
use super::node::until;
use super::options::{Family, Options, Proxy};
use super::place::{CLUSTER_DNS, Node, OUTSIDE, POD_RANGES, Place};
use super::plane::Authority;
use super::programs::Programs;
use super::start::{Inside, Starter};
use crate::kubectl::Kubectl;
use crate::netns::Netns;

/// Where Debian puts the plugins.
const PLUGINS: &str = "/usr/lib/cni";
const WAIT: Duration = Duration::from_secs(60);

/// Starts the resolver outside. It knows the one public name that Kubernetes' specs look up by
/// address, and that there is no other.
///
/// # Errors
/// It cannot be started.
pub(super) fn start_outside(starter: &Starter, programs: &Programs, place: &Place) -> Result<()> {
    let config = place.dir().join("outside.Corefile");
    let bind = OUTSIDE[0];
    let text = format!(
        "dns.google 8.8.8.8/32 2001:4860:4860::8888/128 {{\n  bind {bind}\n  hosts {{\n    \
         8.8.8.8 dns.google\n    2001:4860:4860::8888 dns.google\n  }}\n}}\n\
         . {{\n  bind {bind}\n  template ANY ANY {{\n    rcode NXDOMAIN\n  }}\n}}\n"
    );
    fs::write(&config, text)?;
    let args = [Path::new("-conf"), &config];
    starter.start(
        "outside-dns",
        Inside::Outside,
        "outside",
        &programs.coredns,
        args,
    )
}

/// Starts kube-proxy on a node.
///
/// # Errors
/// It cannot be started, or `options` name none.
pub(super) fn start_proxy(
    starter: &Starter,
    programs: &Programs,
    place: &Place,
    authority: &Authority,
    node: Node,
    options: &Options,
) -> Result<()> {
    let mode = match options.proxy {
        Proxy::Nftables => "nftables",
        Proxy::Iptables => "iptables",
        Proxy::Weir | Proxy::None => bail!("no kube-proxy was asked for"),
    };
    let ranges = match options.family {
        Family::Ipv4 => POD_RANGES[0].to_owned(),
        Family::Dual => POD_RANGES.join(","),
    };
    let config = json!({
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "mode": mode,
        "hostnameOverride": node.name(),
        "clientConnection": { "kubeconfig": authority.proxy() },
        "clusterCIDR": ranges,
        // The limit is the whole machine's, and read-only here.
        "conntrack": { "maxPerCore": 0, "min": 0 },
    });
    let file = place.node_dir(node).join("kube-proxy.json");
    fs::write(&file, format!("{config:#}"))?;
    let name = format!("{}-kube-proxy", node.name());
    let cgroup = format!("{}/kube-proxy", node.name());
    let args = [format!("--config={}", file.display())];
    starter.start(
        &name,
        Inside::Node(node),
        &cgroup,
        &programs.kube_proxy,
        args,
    )
}

/// Installs the bridge plugin on a node, and routes to its pods on the others.
///
/// # Errors
/// The node gets no pod range, or Debian's containernetworking-plugins is not installed.
pub(super) fn install_bridge(
    place: &Place,
    kubectl: &Kubectl,
    node: Node,
    nodes: u8,
) -> Result<()> {
    let ranges = until("a pod range", WAIT, || pod_ranges(kubectl, node))?;
    let is_v6 = |range: &str| range.contains(':');
    for range in &ranges {
        let [v4, v6] = node.addresses();
        let via: IpAddr = if is_v6(range) { v6 } else { v4 };
        for other in Node::all(nodes).filter(|other| *other != node) {
            Netns::existing(place.netns(other)).add_route(range, via)?;
        }
    }
    let dir = place.node_dir(node);
    // The node's overlay is mounted: its files are written from inside, through /proc.
    let root = root_of(&dir)?;
    for plugin in ["bridge", "host-local", "portmap", "loopback"] {
        let from = Path::new(PLUGINS).join(plugin);
        fs::copy(&from, root.join("opt/cni/bin").join(plugin))
            .with_context(|| format!("copy {}", from.display()))?;
    }
    let subnets: Vec<Value> = ranges.iter().map(|r| json!([{ "subnet": r }])).collect();
    let routes: Vec<Value> = ranges
        .iter()
        .map(|r| json!({ "dst": if is_v6(r) { "::/0" } else { "0.0.0.0/0" } }))
        .collect();
    let list = json!({
        "cniVersion": "1.0.0",
        "name": "peer",
        "plugins": [
            {
                "type": "bridge",
                "bridge": "cni0",
                "isGateway": true,
                "hairpinMode": true,
                // Pods keep their addresses on the way to other nodes.
                "ipMasq": false,
                "ipam": {
                    "type": "host-local",
                    "dataDir": "/run/cni-ipam",
                    "ranges": subnets,
                    "routes": routes,
                },
            },
            { "type": "portmap", "capabilities": { "portMappings": true }, "snat": true },
        ],
    });
    let config = root.join("etc/cni/net.d");
    fs::write(config.join(".peer"), format!("{list:#}\n"))?;
    fs::rename(config.join(".peer"), config.join("10-peer.conflist")).map_err(Into::into)
}

/// Applies CoreDNS, two of it, behind the kube-dns Service.
///
/// # Errors
/// The API server refuses it.
pub(super) fn apply_coredns(kubectl: &Kubectl) -> Result<()> {
    kubectl.apply(&coredns().to_string()).map(drop)
}

/// Waits until CoreDNS answers.
///
/// # Errors
/// It does not in time.
pub(super) fn wait_for_coredns(kubectl: &Kubectl) -> Result<()> {
    let wait = [
        "-n",
        "kube-system",
        "rollout",
        "status",
        "deployment/coredns",
    ];
    let wait: Vec<&str> = wait.into_iter().chain(["--timeout=120s"]).collect();
    kubectl.run(&wait).map(drop)
}

fn pod_ranges(kubectl: &Kubectl, node: Node) -> Result<Vec<String>> {
    let said = kubectl.run(&[
        "get",
        "node",
        &node.name(),
        "-o",
        "jsonpath={.spec.podCIDRs[*]}",
    ])?;
    let ranges: Vec<String> = said.split_whitespace().map(str::to_owned).collect();
    if ranges.is_empty() {
        bail!("{} has none", node.name());
    }
    Ok(ranges)
}

/// The root of a node's files as its own processes see it.
fn root_of(dir: &Path) -> Result<std::path::PathBuf> {
    let started: super::record::Started = serde_json::from_slice(&fs::read(dir.join("init"))?)?;
    Ok(Path::new("/proc")
        .join(started.pid.to_string())
        .join("root"))
}

fn coredns() -> Value {
    let metadata = json!({ "name": "coredns", "namespace": "kube-system" });
    let labels = json!({ "k8s-app": "kube-dns" });
    let role = "system:coredns";
    let corefile = "\
.:53 {
    errors
    health
    ready
    kubernetes cluster.local in-addr.arpa ip6.arpa {
        pods insecure
        fallthrough in-addr.arpa ip6.arpa
    }
    prometheus :9153
    forward . /etc/resolv.conf
    cache 30
    loadbalance
}
";
    let container = json!({
        "name": "coredns",
        "image": COREDNS,
        "imagePullPolicy": "Never",
        "args": ["-conf", "/etc/coredns/Corefile"],
        // As kubeadm installs it.
        "resources": {
            "requests": { "cpu": "100m", "memory": "70Mi" },
            "limits": { "memory": "170Mi" },
        },
        "ports": [
            { "name": "dns", "containerPort": 53, "protocol": "UDP" },
            { "name": "dns-tcp", "containerPort": 53, "protocol": "TCP" },
        ],
        "readinessProbe": { "httpGet": { "path": "/ready", "port": 8181 }, "periodSeconds": 2 },
        "volumeMounts": [{ "name": "config", "mountPath": "/etc/coredns", "readOnly": true }],
    });
    let apart = json!({
        "maxSkew": 1,
        "topologyKey": "kubernetes.io/hostname",
        "whenUnsatisfiable": "ScheduleAnyway",
        "labelSelector": { "matchLabels": labels },
    });
    let pod = json!({
        "serviceAccountName": "coredns",
        "priorityClassName": "system-cluster-critical",
        // Its upstream is the node's.
        "dnsPolicy": "Default",
        "topologySpreadConstraints": [apart],
        "containers": [container],
        "volumes": [{ "name": "config", "configMap": { "name": "coredns" } }],
    });
    let verbs = ["list", "watch"];
    let core = ["endpoints", "services", "pods", "namespaces"];
    json!({ "apiVersion": "v1", "kind": "List", "items": [
        { "apiVersion": "v1", "kind": "ServiceAccount", "metadata": metadata },
        {
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "ClusterRole",
            "metadata": { "name": role },
            "rules": [
                { "apiGroups": [""], "resources": core, "verbs": verbs },
                { "apiGroups": ["discovery.k8s.io"], "resources": ["endpointslices"], "verbs": verbs },
            ],
        },
        {
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "ClusterRoleBinding",
            "metadata": { "name": role },
            "roleRef": { "apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": role },
            "subjects": [
                { "kind": "ServiceAccount", "name": "coredns", "namespace": "kube-system" },
            ],
        },
        {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": metadata,
            "data": { "Corefile": corefile },
        },
        {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": metadata,
            "spec": {
                "replicas": 2,
                "selector": { "matchLabels": labels },
                "template": { "metadata": { "labels": labels }, "spec": pod },
            },
        },
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": { "name": "kube-dns", "namespace": "kube-system", "labels": labels },
            "spec": {
                "selector": labels,
                "clusterIP": CLUSTER_DNS,
                "ports": [
                    { "name": "dns", "port": 53, "protocol": "UDP" },
                    { "name": "dns-tcp", "port": 53, "protocol": "TCP" },
                ],
            },
        },
    ]})
}
