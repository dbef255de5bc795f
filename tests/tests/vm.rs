//! A node on other kernels than this machine's: its programs load, are attached and carry traffic.

use std::fmt::Write;
use std::path::Path;
use std::time::Duration;

use weir_tests::node::{CLUSTER, binary};
use weir_tests::not_run::{not_here, not_run};
use weir_tests::vm::{Contents, Kernel, NoVm, Series};
use weir_tests::workloads::{Transport, Workload};

/// Emulated, a boot takes some five seconds of an idle core; this machine may not be idle.
const PATIENCE: Duration = Duration::from_secs(300);
/// What a kernel must have, if it has not got it built in. The first is what others need without saying so.
const MODULES: [&str; 8] = [
    "crc32c_generic",
    "nf_tables",
    "nft_counter",
    "veth",
    "sch_ingress",
    "cls_bpf",
    "ipv6",
    "sctp",
];

const OBJECTS: &str = "\
kind: Namespace
apiVersion: v1
metadata: {name: shop}
---
kind: Service
apiVersion: v1
metadata: {name: web, namespace: shop}
spec:
  clusterIP: 10.96.0.20
  clusterIPs: [10.96.0.20, 'fd00:10:96::20']
  ipFamilies: [IPv4, IPv6]
  ipFamilyPolicy: RequireDualStack
  selector: {app: web}
  ports: [{port: 80}]
---
kind: NetworkPolicy
apiVersion: networking.k8s.io/v1
metadata: {name: web, namespace: shop}
spec:
  podSelector: {matchLabels: {app: web}}
  ingress: [{from: [{podSelector: {matchLabels: {app: client}}}]}]
";

/// A node with its agent and its DNS, and three pods: one that serves, one that may ask it and one that may not.
const SCRIPT: &str = r#"
uname -r
fail() { echo "FAILED: $*"; tail -n 30 /agent.log; tail -n 10 /dns.log; exit 1; }
until_true() { for i in $(seq 100); do "$@" >/dev/null 2>&1 && return 0; sleep 0.3; done; fail "$@"; }
ip link set lo up
ip addr add 192.0.2.1/32 dev lo
ip -6 addr add 2001:db8::1/128 dev lo
ip route add default dev lo src 192.0.2.1
ip -6 route add default dev lo src 2001:db8::1
mkdir -p /run/weir /run/zone /state /manifests/pods
touch /empty /agent.log /dns.log
weir-agent run --node-name vm --manifests /manifests --http 127.0.0.1:9660 \
  --pod-cidr 10.244.1.0/24 --pod-cidr fd00:10:244:1::/64 \
  --service-cidr 10.96.0.0/16 --service-cidr fd00:10:96::/112 \
  --bpffs /sys/fs/bpf/weir --cgroup /sys/fs/cgroup --run-dir /run/weir --state-dir /state \
  --zone-socket /run/zone/zone.sock >/agent.log 2>&1 &
until_true wget -q -O - http://127.0.0.1:9660/readyz
weir-dns --listen 169.254.53.53:53 --listen [fd57:6569:7200::53]:53 --feed /run/zone/zone.sock \
  --status-socket /run/dns.status --resolv-conf /empty >/dns.log 2>&1 &

CONFIG='{"cniVersion":"1.1.0","name":"weir","type":"weir-cni","agentSocket":"/run/weir/cni.sock","releasedDir":"/state/released"}'
is_apart() { [ "$(readlink /proc/$1/ns/net)" != "$(readlink /proc/self/ns/net)" ]; }
start() {
  unshare -n sleep 1000 &
  eval "$1=$!"
  until_true is_apart $!
  echo "$CONFIG" | CNI_COMMAND=ADD CNI_CONTAINERID=$1 CNI_NETNS=/proc/$!/ns/net CNI_IFNAME=eth0 CNI_PATH=/bin \
    CNI_ARGS="IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=$1;K8S_POD_UID=uid-$1;K8S_POD_INFRA_CONTAINER_ID=$1" \
    weir-cni >/add.$1 || { cat /add.$1; fail "ADD of $1"; }
}
in_pod() { local pid=$1; shift; nsenter --net=/proc/$pid/ns/net "$@"; }
start web
start client
start stranger
in_pod $web weir-echo --name web --tcp 80 &
load() { in_pod $1 weir-load --kind $2 --target $3 --rate 5 --seconds 1 --name web.shop.svc.cluster.local.; }
asks() { load $* | grep '"outcomes":{"ok":5}'; }
for target in 10.96.0.20:80 [fd00:10:96::20]:80; do
  until_true asks $client http $target
  echo "a pod reaches a Service: $(asks $client http $target)"
  load $stranger http $target | grep '"outcomes":{"timeout":5}' || fail "policy lets the stranger reach $target"
done
# A pod that has forgotten its gateway asks for it.
in_pod $client ip neigh flush dev eth0 nud permanent
for target in 10.96.0.20:80 [fd00:10:96::20]:80; do
  until_true asks $client http $target
done
in_pod $client ip neigh show dev eth0 >/neighbours
for gateway in 169.254.1.1 fe80::1; do
  grep "$gateway .*REACHABLE" /neighbours || { cat /neighbours; fail "the pod does not know $gateway"; }
done
# What the kernel's own SCTP says: who may, and by a rule about a port of it.
of() { in_pod $1 ip -o $2 addr show dev eth0 | grep -v fe80 | awk '{print $4}' | cut -d/ -f1; }
V4=$(of $web -4) V6=$(of $web -6)
for at in $V4 [$V6]; do
  for port in 9003 9004; do in_pod $web weir-sctp serve $at:$port & done
done
sctp() { in_pod $1 weir-sctp ask $2 2000; }
for at in $V4 [$V6]; do
  until_true sctp $client $at:9003
  sctp $stranger $at:9003 && fail "policy lets the stranger associate with $at"
done
cat >/manifests/sctp.yaml <<EOF
kind: NetworkPolicy
apiVersion: networking.k8s.io/v1
metadata: {name: sctp, namespace: shop}
spec:
  podSelector: {matchLabels: {app: web}}
  ingress: [{ports: [{protocol: SCTP, port: 9003}]}]
EOF
for at in $V4 [$V6]; do
  until_true sctp $stranger $at:9003
  sctp $stranger $at:9004 && fail "policy lets the stranger associate with another port of $at"
  sctp $client $at:9004 || fail "the client does not associate with $at any more"
  echo "real SCTP: $at is associated with by whom the policies say"
done
load $stranger http 10.96.0.20:80 | grep '"outcomes":{"timeout":5}' || fail "a rule about SCTP lets TCP through"
until_true asks $client dns 10.96.0.10:53
echo "DNS answers: $(asks $client dns 10.96.0.10:53)"
weir-agent doctor --bpffs /sys/fs/bpf/weir --cgroup /sys/fs/cgroup || fail doctor
"#;

#[test]
fn a_node_carries_traffic_on_linux_5_15() {
    carry_traffic("a_node_carries_traffic_on_linux_5_15", Series::V5_15);
}

#[test]
fn a_node_carries_traffic_on_linux_6_1() {
    carry_traffic("a_node_carries_traffic_on_linux_6_1", Series::V6_1);
}

#[test]
fn a_node_carries_traffic_on_linux_6_12() {
    carry_traffic("a_node_carries_traffic_on_linux_6_12", Series::V6_12);
}

#[test]
fn a_script_that_fails_fails_the_machine() {
    let test = "a_script_that_fails_fails_the_machine";
    let Some(kernel) = kernel(test, Series::V6_1) else {
        return;
    };
    let contents = Contents::default().file("/etc/greeting", "hello from the test");
    let ended = kernel.run(&contents, "cat /etc/greeting\ncat /nowhere\n", PATIENCE);
    let said = format!("{:#}", ended.unwrap_err());
    assert!(
        said.contains("hello from the test") && said.contains("/nowhere"),
        "{said}"
    );
}

fn carry_traffic(test: &str, series: Series) {
    let Some(kernel) = kernel(test, series) else {
        return;
    };
    let mut objects = format!("{CLUSTER}\n---\n{OBJECTS}");
    for name in ["web", "client", "stranger"] {
        let mut pod = Workload::named("shop", name).label("app", name);
        if name == "web" {
            pod = pod.port(Transport::Tcp, 80);
        }
        let manifest = pod.manifest(&format!("uid-{name}"), "vm");
        write!(objects, "\n---\n{manifest}\n").unwrap_or_default();
    }
    let mut contents = Contents::default()
        .modules(&MODULES)
        .program(Path::new("/usr/sbin/nft"))
        .file("/manifests/objects.yaml", objects);
    for program in [
        "weir-agent",
        "weir-dns",
        "weir-cni",
        "weir-echo",
        "weir-load",
        "weir-sctp",
    ] {
        contents = contents.program(&binary(program));
    }
    let shown = kernel
        .run(&contents, SCRIPT, PATIENCE)
        .unwrap_or_else(|e| panic!("{e:#}"));
    let expected = format!("{}.", series.version());
    assert!(
        shown.lines().any(|line| line.starts_with(&expected)),
        "{shown}"
    );
    println!("{shown}");
}

fn kernel(test: &str, series: Series) -> Option<Kernel> {
    let kernel = Contents::check_tools().and_then(|()| Kernel::ready(series));
    kernel
        .map_err(|e| match series {
            // Another distribution's archive need not be reached from everywhere.
            Series::V5_15 if matches!(e, NoVm::NoKernel { .. }) => not_here(test, &e),
            _ => not_run(test, &e),
        })
        .ok()
}
