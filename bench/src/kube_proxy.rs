//! The real kube-proxy in nftables mode, built from its Go module, with what it is measured by: two pods behind plain
//! routing and a client outside. It hears of Services and endpoints from the API server of the bench. Everything of it is
//! in namespaces of its own.

use std::collections::HashMap;
use std::fs;
use std::net::{Ipv4Addr, SocketAddrV4, TcpListener};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use tokio::runtime::Builder;
use tokio::sync::oneshot;
use weir_tests::binaries::Unavailable;
use weir_tests::go::KUBERNETES;
use weir_tests::machine::Machine;
use weir_tests::netns::Netns;
use weir_tests::process::Process;

use crate::api_server::{self, ApiServer};
use crate::cluster::{Objects, Resource};
use crate::exchange::Destination;
use crate::paths::{PORT, Place, PlainPod, behind, give_ports, serve};
use crate::services::Service;

/// What the server here answers with.
const ANSWER: u8 = 3;
const API_SERVER: &str = "127.0.0.1:6443";
const NODE_NAME: &str = "peer";
/// The networks of the two pods, and the range that both are in.
const PODS: [&str; 2] = ["10.200.1", "10.200.2"];
const POD_RANGE: &str = "10.200.0.0/21";
const SERVER: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(10, 200, 2, 2), PORT);
/// Of thousands of Services it takes minutes.
const START: Duration = Duration::from_secs(300);

/// kube-proxy's program, built if it is not there yet, which takes minutes.
///
/// # Errors
/// There is no Go here, no way to its module, or it does not compile.
pub(crate) fn program() -> Result<PathBuf, Unavailable> {
    KUBERNETES.open()?.command("kube-proxy")
}

/// A node with kube-proxy in the place of a router.
pub(crate) struct KubeProxyPlace {
    // Processes go before what they are in.
    _server: Process,
    _kube_proxy: Process,
    _api_server: Serving,
    client: PlainPod,
    _server_pod: PlainPod,
    outside: Netns,
    router: Machine,
    before: String,
}

impl KubeProxyPlace {
    /// Starts everything, and returns when every Service is in the ruleset. The node's own address is the first host of the
    /// network of the client outside.
    pub(crate) fn make(
        program: &Path,
        services: &[Service],
        outside: &str,
        node: Ipv4Addr,
    ) -> Result<Self> {
        let before = machines_own()?;
        let router = Machine::new(NODE_NAME)?;
        let netns = router.netns();
        netns.set_sysctl("net.ipv4.ip_forward", "1")?;
        let client = PlainPod::new(&router, "client", PODS[0])?;
        let server_pod = PlainPod::new(&router, "server", PODS[1])?;
        let outside_netns = Netns::new("outside")?;
        behind(netns, &outside_netns, outside)?;
        for it in [&client.netns, &outside_netns] {
            give_ports(it)?;
        }
        let socket = netns.run(|| TcpListener::bind(API_SERVER))??;
        let api_server = Serving::start(Fixed::of(services, node), socket)?;
        let mut kube_proxy = router
            .launch("kube-proxy", program)
            .arg(format!("--config={}", configure(&router)?.display()))
            .spawn()?;
        kube_proxy.wait_until("programming every Service", START, || {
            chains(netns).is_ok_and(|chains| {
                services
                    .iter()
                    .all(|service| chains.contains_key(&service.address))
            })
        })?;
        // A closed connection is remembered for two minutes otherwise, and their number is limited: to the peer's good.
        netns.set_sysctl("net.netfilter.nf_conntrack_tcp_timeout_time_wait", "10")?;
        let server = serve(server_pod.client("serve"), router.dir(), ANSWER)?;
        Ok(Self {
            _server: server,
            _kube_proxy: kube_proxy,
            _api_server: api_server,
            client,
            _server_pod: server_pod,
            outside: outside_netns,
            router,
            before,
        })
    }

    /// An address that leads to the server.
    pub(crate) fn at(address: SocketAddrV4) -> Destination {
        Destination {
            address: address.into(),
            answer: ANSWER,
        }
    }

    /// The pod that asks.
    pub(crate) fn client(&self) -> &dyn Place {
        &self.client
    }

    /// The client outside.
    pub(crate) fn outside(&self) -> &dyn Place {
        &self.outside
    }

    /// That the rules of a Service end in a translation to the server.
    ///
    /// # Errors
    /// They do not, or nft fails.
    pub(crate) fn leads_to_server(&self, service: SocketAddrV4) -> Result<()> {
        let netns = self.router.netns();
        let chains = chains(netns)?;
        let chain = chains
            .get(&service)
            .with_context(|| format!("kube-proxy has no rules for {service}"))?;
        let rules = nft(netns, &["list", "chain", "ip", "kube-proxy", chain])?;
        if !leads_to(&rules, SERVER) {
            bail!("{service} does not lead to {SERVER}: {rules}");
        }
        Ok(())
    }

    /// How many connections to an address the kernel remembers as translated to the server.
    ///
    /// # Errors
    /// The kernel does not say.
    pub(crate) fn translated(&self, to: SocketAddrV4) -> Result<usize> {
        let lines = conntrack(self.router.netns())?;
        let is_one = |line: &&String| is_translated(line, to, SERVER);
        Ok(lines.iter().filter(is_one).count())
    }

    /// Ends it.
    ///
    /// # Errors
    /// Something of the machine itself is not as it was before.
    pub(crate) fn end(self) -> Result<()> {
        let before = self.before.clone();
        drop(self);
        let after = machines_own()?;
        if after != before {
            bail!("the machine's own settings were changed\nbefore: {before}\nafter: {after}");
        }
        Ok(())
    }
}

/// The configuration of kube-proxy, written where its node has its files.
fn configure(router: &Machine) -> Result<PathBuf> {
    let kubeconfig = router.dir().join("kubeconfig");
    let url = format!("http://{API_SERVER}");
    fs::write(&kubeconfig, api_server::kubeconfig(&url))?;
    let config = json!({
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "mode": "nftables",
        "hostnameOverride": NODE_NAME,
        "clientConnection": {
            "kubeconfig": kubeconfig,
            "contentType": "application/json",
            "acceptContentTypes": "application/json",
        },
        // Lists first and then watches.
        "featureGates": {"WatchListClient": false},
        "clusterCIDR": POD_RANGE,
        // The limits are the whole machine's.
        "conntrack": {"maxPerCore": 0, "min": 0},
    });
    let path = router.dir().join("kube-proxy.json");
    fs::write(&path, config.to_string())?;
    Ok(path)
}

/// An API server on a thread of its own.
struct Serving {
    end: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Serving {
    fn start(objects: Fixed, socket: TcpListener) -> Result<Self> {
        let runtime = Builder::new_current_thread().enable_all().build()?;
        let (end, ended) = oneshot::channel();
        let server = {
            let _inside = runtime.enter();
            ApiServer::start(objects, socket)?
        };
        let thread = std::thread::spawn(move || {
            // Who asks for the end has gone: that is the end, too.
            runtime.block_on(ended).unwrap_or_default();
            drop(server);
        });
        Ok(Self {
            end: Some(end),
            thread: Some(thread),
        })
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        drop(self.end.take());
        if self.thread.take().is_some_and(|it| it.join().is_err()) {
            eprintln!("the API server of kube-proxy panicked");
        }
    }
}

/// Objects that stay as they are.
struct Fixed(HashMap<Resource, Vec<String>>);

impl Objects for Fixed {
    fn count(&self, resource: Resource) -> usize {
        self.0.get(&resource).map_or(0, Vec::len)
    }

    fn write(&self, resource: Resource, index: usize, out: &mut String) {
        if let Some(text) = self.0.get(&resource).and_then(|all| all.get(index)) {
            out.push_str(text);
        }
    }
}

impl Fixed {
    /// The server behind every Service, and the node that both are on.
    fn of(services: &[Service], node: Ipv4Addr) -> Self {
        let metadata = |name: &str| json!({"name": name, "uid": name, "resourceVersion": "1"});
        let node = json!({
            "apiVersion": "v1",
            "kind": "Node",
            "metadata": metadata(NODE_NAME),
            "spec": {"podCIDR": POD_RANGE, "podCIDRs": [POD_RANGE]},
            "status": {"addresses": [{"type": "InternalIP", "address": node}]},
        });
        let range = json!({
            "apiVersion": "networking.k8s.io/v1",
            "kind": "ServiceCIDR",
            "metadata": metadata("kubernetes"),
            "spec": {"cidrs": ["10.96.0.0/16"]},
        });
        let texts = |of: &dyn Fn(&Service) -> Value| -> Vec<String> {
            services.iter().map(|it| of(it).to_string()).collect()
        };
        Self(HashMap::from([
            (Resource::Services, texts(&Service::object)),
            (Resource::EndpointSlices, texts(&slice)),
            (Resource::Nodes, vec![node.to_string()]),
            (Resource::ServiceCidrs, vec![range.to_string()]),
        ]))
    }
}

fn slice(service: &Service) -> Value {
    json!({
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {
            "name": service.name,
            "namespace": "bench",
            "uid": format!("slice-{}", service.name),
            "resourceVersion": "1",
            "labels": {"kubernetes.io/service-name": service.name},
        },
        "addressType": "IPv4",
        "endpoints": [{
            "addresses": [SERVER.ip()],
            "conditions": {"ready": true, "serving": true, "terminating": false},
            "nodeName": NODE_NAME,
        }],
        "ports": [{"name": "tcp", "protocol": "TCP", "port": PORT}],
    })
}

/// What kube-proxy has to do with the machine's own network if it goes astray.
fn machines_own() -> Result<String> {
    let listed = Command::new("nft").args(["-s", "list", "ruleset"]).output();
    let listed = listed.context("run nft (package nftables)")?;
    if !listed.status.success() {
        bail!("nft: {}", String::from_utf8_lossy(&listed.stderr));
    }
    let mut text = String::from_utf8_lossy(&listed.stdout).into_owned();
    for file in [
        "/proc/sys/net/netfilter/nf_conntrack_max",
        "/proc/sys/net/netfilter/nf_conntrack_tcp_timeout_established",
        "/proc/sys/net/ipv4/ip_forward",
        "/proc/sys/net/ipv4/conf/all/route_localnet",
        "/sys/module/nf_conntrack/parameters/hashsize",
    ] {
        // One that this kernel has not is the same before and after.
        let value = fs::read_to_string(file).unwrap_or_default();
        text.push_str(&format!("{file} {}\n", value.trim()));
    }
    Ok(text)
}

fn nft(netns: &Netns, words: &[&str]) -> Result<String> {
    let output = netns.command("nft").args(words).output()?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        bail!("nft {}: {}", words.join(" "), said.trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// The chain of each Service by its cluster IP and port.
fn chains(netns: &Netns) -> Result<HashMap<SocketAddrV4, String>> {
    let text = nft(
        netns,
        &["-j", "list", "map", "ip", "kube-proxy", "service-ips"],
    )?;
    chains_of(&text).with_context(|| format!("read what nft said: {text}"))
}

fn chains_of(text: &str) -> Result<HashMap<SocketAddrV4, String>> {
    let said: Value = serde_json::from_str(text)?;
    let parts = said["nftables"].as_array().context("a list")?.iter();
    let mut maps = parts.filter_map(|part| part.get("map"));
    let map = maps.next().context("a map")?;
    let elements = map["elem"].as_array().into_iter().flatten();
    let chain = |element: &Value| -> Option<(SocketAddrV4, String)> {
        let [address, protocol, port] = element[0]["concat"].as_array()?.as_slice() else {
            return None;
        };
        let port = u16::try_from(port.as_u64()?).ok()?;
        let address = SocketAddrV4::new(address.as_str()?.parse().ok()?, port);
        let target = element[1]["goto"]["target"].as_str()?;
        (protocol == "tcp").then(|| (address, target.to_owned()))
    };
    Ok(elements.filter_map(chain).collect())
}

/// Do the rules of a Service translate to one server and no other? `numgen random mod` has the number of servers, and a map
/// each of them by a number.
fn leads_to(rules: &str, server: SocketAddrV4) -> bool {
    let all = format!(
        "dnat ip to numgen random mod 1 map {{ 0 : {} . {} }}",
        server.ip(),
        server.port()
    );
    rules.contains(&all)
}

/// What the kernel tracks in a namespace, a line each.
///
/// # Errors
/// The kernel does not say (`CONFIG_NF_CONNTRACK_PROCFS`).
pub(crate) fn conntrack(netns: &Netns) -> Result<Vec<String>> {
    const FILE: &str = "/proc/thread-self/net/nf_conntrack";
    let text = netns.run(|| fs::read_to_string(FILE))?;
    let text = text.with_context(|| format!("read {FILE}"))?;
    Ok(text.lines().map(str::to_owned).collect())
}

/// Is it a connection to an address whose answers come from another one?
fn is_translated(line: &str, to: SocketAddrV4, server: SocketAddrV4) -> bool {
    // Each field is there twice: as the opener sends it, and as the answer is expected.
    let fields = |name: &str| -> Vec<&str> {
        let words = line.split_whitespace();
        words.filter_map(|word| word.strip_prefix(name)).collect()
    };
    let is = |found: Option<&&str>, wanted: String| found.is_some_and(|it| **it == wanted);
    is(fields("dst=").first(), to.ip().to_string())
        && is(fields("dport=").first(), to.port().to_string())
        && is(fields("src=").get(1), server.ip().to_string())
        && is(fields("sport=").get(1), server.port().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    const SERVICE: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(10, 96, 0, 77), PORT);

    #[test]
    fn a_tracked_connection_is_translated_if_the_server_answers() {
        let line = "ipv4     2 tcp      6 9 TIME_WAIT src=10.200.1.2 dst=10.96.0.77 sport=4000 dport=7777 \
                    src=10.200.2.2 dst=10.200.1.2 sport=7777 dport=4000 [ASSURED] mark=0 zone=0 use=2";
        assert!(is_translated(line, SERVICE, SERVER));
        let elsewhere = SocketAddrV4::new(*SERVER.ip(), 1);
        assert!(!is_translated(line, SERVICE, elsewhere));
        assert!(!is_translated(line, elsewhere, SERVER));
        let another = SocketAddrV4::new(Ipv4Addr::new(10, 200, 2, 3), PORT);
        assert!(!is_translated(line, SERVICE, another));
        let direct = line.replace("10.96.0.77", "10.200.2.2");
        assert!(!is_translated(&direct, SERVICE, SERVER));
        let unanswered = line.split(" src=10.200.2.2").next().unwrap();
        assert!(!is_translated(unanswered, SERVICE, SERVER));
    }

    #[test]
    fn rules_lead_to_a_server_if_there_is_no_other_one() {
        let rules = "table ip kube-proxy {\n\tchain service-X-bench/server/tcp/tcp {\n\t\tmeta l4proto tcp dnat ip to \
                     numgen random mod 1 map { 0 : 10.200.2.2 . 7777 }\n\t}\n}";
        assert!(leads_to(rules, SERVER));
        let two = rules.replace("mod 1", "mod 2");
        assert!(!leads_to(&two, SERVER));
        let other = rules.replace("10.200.2.2", "10.200.2.3");
        assert!(!leads_to(&other, SERVER));
    }

    #[test]
    fn chains_are_read_by_the_address_that_leads_to_them() {
        let text = r#"{"nftables": [{"metainfo": {}}, {"map": {"name": "service-ips", "elem": [
            [{"concat": ["10.96.0.77", "tcp", 7777]}, {"goto": {"target": "service-X-bench/server/tcp/tcp"}}],
            [{"concat": ["10.96.0.77", "udp", 7777]}, {"goto": {"target": "service-Y-bench/server/udp/udp"}}]
        ]}}]}"#;
        let chains = chains_of(text).unwrap();
        let expected = (SERVICE, "service-X-bench/server/tcp/tcp".to_owned());
        assert_eq!(chains, HashMap::from([expected]));
        assert!(chains_of(r#"{"nftables": []}"#).is_err());
    }
}
