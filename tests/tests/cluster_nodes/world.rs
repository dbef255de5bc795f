//! How a test asks the cluster, its nodes and its pods. What it asks is in `main.rs`.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde_json::Value;
use weir_tests::cluster::Cluster;
use weir_tests::cluster::programs::Programs;
use weir_tests::load::Load;
use weir_tests::node::binary;

/// For what takes kubelets, controllers and a busy machine.
const PATIENCE: Duration = Duration::from_secs(180);
/// As long as a load may last; its test ends it.
const MINUTES: &str = "600";

pub(crate) struct World {
    pub(crate) cluster: Cluster,
}

impl World {
    pub(crate) fn kubectl(&self, words: &str) -> String {
        let words: Vec<&str> = words.split_whitespace().collect();
        self.cluster.kubectl().run(&words).unwrap()
    }

    pub(crate) fn json(&self, words: &str) -> Value {
        serde_json::from_str(&self.kubectl(&format!("{words} -o json"))).unwrap()
    }

    /// `weir-load` in a pod; ends with [`Load::finish`].
    pub(crate) fn load(&self, node: &str, pod: &str, rate: &str, targets: &[String]) -> Load {
        let mut words = vec!["/weir/weir-load", "--kind", "http", "--seconds", MINUTES];
        words.extend(["--until-eof", "--rate", rate]);
        for (i, target) in targets.iter().enumerate() {
            words.extend([if i == 0 { "--target" } else { "--also" }, target]);
        }
        Load::run(self.cluster.in_pod(node, pod, &words).unwrap()).unwrap()
    }

    pub(crate) fn reaches(&self, node: &str, pod: &str, target: &str) -> bool {
        let url = format!("http://{target}/");
        let words = ["curl", "-sf", "-o", "/dev/null", "--max-time", "1", &url];
        let Ok(mut command) = self.cluster.in_pod(node, pod, &words) else {
            return false;
        };
        command.output().unwrap().status.success()
    }

    pub(crate) fn service(&self, name: &str) -> String {
        let service = self.json(&format!("-n nodes get service {name}"));
        service["spec"]["clusterIP"].as_str().unwrap().to_owned()
    }

    /// The first address of a pod on its node.
    pub(crate) fn lease(&self, node: &str, pod: &str) -> Option<String> {
        let rows = self.cluster.weir(node, "endpoints")?;
        let name = format!("nodes/{pod}");
        let row = rows.as_array()?.iter().find(|row| row["pod"] == *name)?;
        Some(row["addresses"][0].as_str()?.to_owned())
    }

    pub(crate) fn agent_pod(&self, node: &str) -> String {
        let words = format!(
            "-n kube-system get pods -l app.kubernetes.io/name=weir --field-selector=spec.nodeName={node}"
        );
        let pods = self.json(&words);
        pods["items"][0]["metadata"]["name"]
            .as_str()
            .unwrap()
            .to_owned()
    }

    /// The lines of an agent's log, each with its time.
    pub(crate) fn agent_log(&self, node: &str) -> Vec<(f64, String)> {
        let pod = self.agent_pod(node);
        let log = self.kubectl(&format!("-n kube-system logs {pod} -c agent --timestamps"));
        let parse = |line: &str| {
            let (time, text) = line.split_once(' ')?;
            Some((seconds_of_day(time.split_once('T')?.1)?, text.to_owned()))
        };
        let midnight = seconds_now() - seconds_now() % 86_400.0;
        let lines = log.lines().filter_map(parse);
        lines.map(|(time, text)| (midnight + time, text)).collect()
    }

    /// What there is on a node of another: its range of pod addresses, and its own address.
    pub(crate) fn traces(
        &self,
        node: &str,
        range: &str,
        address: &str,
    ) -> BTreeMap<String, String> {
        let mut found = BTreeMap::new();
        let ip = self
            .cluster
            .run_on(node, "ip".as_ref(), &["route"])
            .unwrap();
        let lines: Vec<_> = ip
            .lines()
            .filter(|l| l.contains(range) || l.contains(address))
            .collect();
        if !lines.is_empty() {
            found.insert("routes".to_owned(), lines.join("; "));
        }
        let services = self.cluster.weir(node, "services").unwrap().to_string();
        if services.contains(range) {
            found.insert("backends".to_owned(), services);
        }
        let status = self.cluster.weir(node, "status").unwrap()["nodes"].to_string();
        if status.contains("\"n3\"") {
            found.insert("status".to_owned(), status);
        }
        let octets = |text: &str| -> Vec<u8> {
            text.split('.')
                .filter_map(|part| part.parse().ok())
                .collect()
        };
        for table in ["CLASSES", "NODES", "CLUSTER"] {
            let keys = self.keys(node, table);
            let is_trace = |key: &&Vec<u8>| {
                [octets(range), octets(address)]
                    .iter()
                    .any(|bytes| key.windows(bytes.len()).any(|window| window == bytes))
            };
            let rows: Vec<_> = keys.iter().filter(is_trace).collect();
            if !rows.is_empty() {
                found.insert(table.to_owned(), format!("{rows:?}"));
            }
        }
        found
    }

    /// The keys of a table in the kernel, as bytes.
    pub(crate) fn keys(&self, node: &str, table: &str) -> Vec<Vec<u8>> {
        let folder = "/sys/fs/bpf/weir";
        let pins = self.cluster.run_on(node, "ls".as_ref(), &[folder]).unwrap();
        let is_it =
            |pin: &&str| pin.trim_end_matches(|c: char| c.is_ascii_digit()) == format!("{table}_v");
        let pin = pins.lines().find(|pin| is_it(pin) || *pin == table);
        let pin = format!(
            "{folder}/{}",
            pin.unwrap_or_else(|| panic!("no {table} in {pins}"))
        );
        let dump = ["-j", "map", "dump", "pinned", &pin];
        let rows = self
            .cluster
            .run_on(node, "bpftool".as_ref(), &dump)
            .unwrap();
        let rows: Value = serde_json::from_str(&rows).unwrap();
        let byte = |text: &Value| {
            let text = text.as_str()?.trim_start_matches("0x");
            u8::from_str_radix(text, 16).ok()
        };
        let key = |row: &Value| {
            let bytes = row["key"].as_array().into_iter().flatten();
            bytes.filter_map(byte).collect()
        };
        rows.as_array().unwrap().iter().map(key).collect()
    }

    pub(crate) fn assert_verified(&self, node: &str) {
        eventually("the kernel holds what it should and no more", || {
            self.cluster
                .run_on(node, &binary("weir"), &["verify"])
                .is_ok()
        });
    }

    /// Pods by address, of all that have one of their own, as the cluster says. No address is there twice.
    pub(crate) fn addresses(&self) -> BTreeMap<IpAddr, String> {
        let pods = self.json("get pods --all-namespaces");
        let mut found = BTreeMap::new();
        for pod in pods["items"].as_array().unwrap() {
            if pod["spec"]["hostNetwork"] == true
                || pod["metadata"]["deletionTimestamp"].is_string()
            {
                continue;
            }
            let meta = &pod["metadata"];
            let name = format!(
                "{}/{}",
                meta["namespace"].as_str().unwrap(),
                meta["name"].as_str().unwrap()
            );
            for ip in pod["status"]["podIPs"].as_array().into_iter().flatten() {
                let ip = ip["ip"].as_str().unwrap().parse().unwrap();
                if let Some(other) = found.insert(ip, name.clone()) {
                    panic!("{ip} is {other}'s and {name}'s");
                }
            }
        }
        found
    }

    /// As [`Self::addresses`], once the cluster says what the nodes do: what is leased, and to whom.
    pub(crate) fn settled_addresses(&self) -> BTreeMap<IpAddr, String> {
        let leased = || {
            let mut found = BTreeMap::new();
            for node in ["n1", "n2"] {
                for row in self
                    .cluster
                    .weir(node, "endpoints")
                    .unwrap()
                    .as_array()
                    .unwrap()
                {
                    for ip in row["addresses"].as_array().unwrap() {
                        let ip: IpAddr = ip.as_str().unwrap().parse().unwrap();
                        let name = row["pod"].as_str().unwrap().to_owned();
                        if let Some(other) = found.insert(ip, name.clone()) {
                            panic!("{ip} is leased to {other} and to {name}");
                        }
                    }
                }
            }
            found
        };
        eventually("the cluster knows the addresses that are leased", || {
            let (said, leased) = (self.addresses(), leased());
            said == leased
        });
        self.addresses()
    }
}

pub(crate) fn broken() -> String {
    std::env::var("WEIR_BROKEN").unwrap_or_default()
}

pub(crate) fn ctr() -> PathBuf {
    Programs::ready().unwrap().ctr
}

pub(crate) fn eventually(what: &str, is_so: impl Fn() -> bool) {
    until(what, Instant::now() + PATIENCE, || match is_so() {
        true => Ok(()),
        false => Err(String::new()),
    });
}

pub(crate) fn until(what: &str, deadline: Instant, mut ask: impl FnMut() -> Result<(), String>) {
    loop {
        let Err(why) = ask() else { return };
        assert!(Instant::now() < deadline, "not in time: {what} {why}");
        std::thread::sleep(Duration::from_millis(100));
    }
}

pub(crate) fn seconds_now() -> f64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap()
        .as_secs_f64()
}

/// Of `hh:mm:ss.fraction`, with whatever comes after.
pub(crate) fn seconds_of_day(text: &str) -> Option<f64> {
    let mut parts = text.trim_end_matches('Z').splitn(3, ':');
    let mut next = || parts.next()?.parse::<f64>().ok();
    Some(next()? * 3600.0 + next()? * 60.0 + next()?)
}

/// When the first line was logged that says so, in seconds since 1970.
pub(crate) fn klog(log: &str, what: &str, after: f64) -> f64 {
    let line = log.lines().find(|line| line.contains(what));
    let line = line.unwrap_or_else(|| panic!("the kubelet does not say {what:?}"));
    let time = line
        .split_whitespace()
        .nth(1)
        .and_then(seconds_of_day)
        .unwrap();
    after - after % 86_400.0 + time
}

pub(crate) fn time_of(lines: &[(f64, String)], what: &str) -> f64 {
    let line = lines.iter().find(|(_, line)| line.contains(what));
    line.unwrap_or_else(|| panic!("no {what:?} in {lines:?}")).0
}

/// A line of the agent's log without its time, and not all of it.
pub(crate) fn told(line: &str) -> String {
    let text = line.split_once(" INFO ").map_or(line, |(_, text)| text);
    text.trim().chars().take(110).collect()
}
