//! What `deploy/` holds, against what the programs understand: arguments, versions, capabilities. That
//! an API server takes it is `control_install.rs`; that it suffices is `netns_install.rs`.

#![allow(clippy::unwrap_used, reason = "a test that fails should say where")]

use std::path::Path;
use std::process::Command;

use serde_json::Value;
use weir_agent::config::Args;
use weir_dns::privilege::USER;
use weir_tests::documents;
use weir_tests::helm::Helm;
use weir_tests::node::binary;
use weir_tests::not_run::not_run;

const MANIFEST: &str = include_str!("../../deploy/weir.yaml");
const CLEANUP: &str = include_str!("../../deploy/cleanup.yaml");
const CHART: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../deploy/helm/weir");
/// What stands for the API server's address in the plain manifest, to be replaced by who applies it.
const PLACE: &str = "k8sServiceHost=API_SERVER_HOST";
const NAMESPACE: &str = "kube-system";
/// Labels that say that Helm manages an object.
const OF_HELM: [&str; 2] = ["app.kubernetes.io/managed-by:", "helm.sh/chart:"];
/// Before the rendering.
const HEADER: &str = "\
# Weir, to be applied once API_SERVER_HOST is replaced by an address or a name of the API server that a
# node can reach without cluster DNS. docs/install.md has the steps. Rendered from deploy/helm/weir:
#   WEIR_BLESS=1 cargo test -p weir-tests --test install
";
const VERSION: &str = env!("CARGO_PKG_VERSION");

#[test]
fn the_plain_manifest_is_the_chart_rendered() {
    let test = "the_plain_manifest_is_the_chart_rendered";
    let Some(helm) = helm(test) else { return };
    let rendered = helm
        .template(Path::new(CHART), NAMESPACE, &[PLACE])
        .unwrap();
    // Who applies the manifest has no release that Helm manages.
    let plain = rendered
        .split_inclusive('\n')
        .filter(|line| !OF_HELM.iter().any(|it| line.trim_start().starts_with(it)));
    let expected: String = [HEADER].into_iter().chain(plain).collect();
    if std::env::var_os("WEIR_BLESS").is_some_and(|it| it == "1") {
        let path = Path::new(CHART).join("../../weir.yaml");
        std::fs::write(path, &expected).unwrap();
        return;
    }
    assert!(
        MANIFEST == expected,
        "deploy/weir.yaml is not what the chart says: render it again with WEIR_BLESS=1"
    );
}

#[test]
fn values_change_what_they_name() {
    let test = "values_change_what_they_name";
    let Some(helm) = helm(test) else { return };
    let cases: [(&[&str], &str, &[&str]); 11] = [
        (
            &["k8sServiceHost=fd00::1", "k8sServicePort=443"],
            "weir",
            &["--kube-api-server=https://[fd00::1]:443"],
        ),
        (
            &["kubeApiServers={https://192.0.2.1:6443,https://[fd00::2]:6443}"],
            "weir",
            &[
                "--kube-api-server=https://192.0.2.1:6443",
                "--kube-api-server=https://[fd00::2]:6443",
            ],
        ),
        (&["masquerade=false"], "weir", &["--masquerade=false"]),
        (
            &["externalIPRanges={203.0.113.0/24,2001:db8::/64}"],
            "weir",
            &[
                "--external-ip-range=203.0.113.0/24",
                "--external-ip-range=2001:db8::/64",
            ],
        ),
        (
            &["dns.service.name=rke2-coredns-rke2-coredns"],
            "weir",
            &["--dns-service=kube-system/rke2-coredns-rke2-coredns"],
        ),
        (
            &["extraArgs={--pod-cidr=10.1.0.0/24}"],
            "weir",
            &["--pod-cidr=10.1.0.0/24"],
        ),
        (&["dns.ttl=30"], "weir-dns", &["--ttl=30"]),
        (
            &["dns.extraArgs={--resolv-conf=/etc/other}"],
            "weir-dns",
            &["--resolv-conf=/etc/other"],
        ),
        (
            &["dns.addresses={fd00::53}"],
            "weir-dns",
            &["--listen=[fd00::53]:53"],
        ),
        (
            &["dns.upstreams={192.0.2.1:53}"],
            "weir-dns",
            &["--upstream=192.0.2.1:53"],
        ),
        (
            &["clusterDomain=weir.test"],
            "weir-dns",
            &["--domain=weir.test"],
        ),
    ];
    for (values, daemon_set, expected) in cases {
        let objects = render(&helm, NAMESPACE, values);
        let object = object(&objects, "DaemonSet", daemon_set);
        let args = strings(&pod(object)["containers"][0]["args"]);
        for argument in expected {
            assert!(args.iter().any(|it| it == argument), "{values:?}: {args:?}");
        }
    }
    let objects = render(&helm, NAMESPACE, &["dns.service.create=false"]);
    assert!(objects.iter().all(|it| it["kind"] != "Service"));
}

#[test]
fn the_programs_understand_their_arguments() {
    let objects = documents::parse(&[MANIFEST, "---\n", CLEANUP].concat());
    let mut seen = 0;
    for object in objects.iter().filter(|it| it["kind"] == "DaemonSet") {
        for container in containers(object) {
            let of_dns = ["--hold=169.254.53.53:53", "--hold=[fd57:6569:7200::53]:53"];
            let expected: &[&str] = if container["name"] == "dns" {
                &of_dns
            } else {
                &[]
            };
            let (held, program) = program(&container);
            assert_eq!(held, expected, "{}", container["name"]);
            understood(&program);
            seen += 1;
        }
    }
    assert_eq!(seen, 5, "install, agent, dns, cleanup, done");
}

/// Kubelet puts the address in, of the family that the node's first one has, and no brackets.
#[test]
fn metrics_are_served_at_an_address_of_either_family() {
    let test = "metrics_are_served_at_an_address_of_either_family";
    let Some(helm) = helm(test) else { return };
    let objects = render(&helm, NAMESPACE, &["prometheus.enabled=true"]);
    let mut seen = 0;
    for name in ["weir", "weir-dns"] {
        let container = &pod(object(&objects, "DaemonSet", name))["containers"][0];
        let (_, program) = program(container);
        for address in ["192.0.2.1", "fd00::1"] {
            let replaced = |word: &String| word.replace("$(HOST_IP)", address);
            let replaced: Vec<String> = program.iter().map(replaced).collect();
            assert_ne!(replaced, program, "{name}");
            understood(&replaced);
            seen += 1;
        }
    }
    assert_eq!(seen, 4);
}

#[test]
fn metrics_have_services_and_monitors_where_asked_for() {
    let test = "metrics_have_services_and_monitors_where_asked_for";
    let Some(helm) = helm(test) else { return };
    let of = |objects: &[Value], kind: &str| -> Vec<String> {
        let of_kind = objects.iter().filter(|it| it["kind"] == kind);
        of_kind
            .map(|it| it["metadata"]["name"].as_str().unwrap().to_owned())
            .collect()
    };
    let both = [
        "prometheus.enabled=true",
        "prometheus.serviceMonitor.enabled=true",
    ];
    let cases: [(&[&str], &[&str], &[&str]); 4] = [
        (&[], &["kube-dns"], &[]),
        (
            &both[..1],
            &["kube-dns", "weir-dns-metrics", "weir-metrics"],
            &[],
        ),
        (&both[1..], &["kube-dns"], &[]),
        (
            &both,
            &["kube-dns", "weir-dns-metrics", "weir-metrics"],
            &["weir", "weir-dns"],
        ),
    ];
    for (values, services, monitors) in cases {
        let objects = render(&helm, NAMESPACE, values);
        let mut found = of(&objects, "Service");
        found.sort();
        assert_eq!(found, services, "{values:?}");
        assert_eq!(of(&objects, "ServiceMonitor"), monitors, "{values:?}");
        // A Service finds the pods that it is for.
        for service in services.iter().filter(|it| it.ends_with("-metrics")) {
            let service = &object(&objects, "Service", service)["spec"];
            let chosen = |it: &&Value| {
                let labels = &it["spec"]["template"]["metadata"]["labels"];
                let wanted = service["selector"].as_object().unwrap();
                it["kind"] == "DaemonSet" && wanted.iter().all(|(key, value)| labels[key] == *value)
            };
            assert_eq!(objects.iter().filter(chosen).count(), 1);
        }
    }
    // Of a DaemonSet that starts the new pod beside the old one, a port would keep the new one from starting.
    let objects = render(&helm, NAMESPACE, &both);
    for (name, expected) in [("weir", true), ("weir-dns", false)] {
        let spec = pod(object(&objects, "DaemonSet", name));
        assert_eq!(
            spec["containers"][0]["ports"].is_array(),
            expected,
            "{name}"
        );
    }
}

#[test]
fn helm_finds_nothing_wrong_with_the_chart() {
    let test = "helm_finds_nothing_wrong_with_the_chart";
    let Some(helm) = helm(test) else { return };
    let said = helm.lint(Path::new(CHART), &[PLACE]).unwrap();
    assert!(!said.contains("[WARNING]"), "{said}");
    let monitored = [
        "prometheus.enabled=true",
        "prometheus.serviceMonitor.enabled=true",
        PLACE,
    ];
    helm.lint(Path::new(CHART), &monitored).unwrap();
}

#[test]
fn a_value_that_is_missing_or_wrong_is_refused_with_the_reason() {
    let test = "a_value_that_is_missing_or_wrong_is_refused_with_the_reason";
    let Some(helm) = helm(test) else { return };
    let cases: [(&[&str], &str); 8] = [
        (
            &[],
            "k8sServiceHost is not set: say where a node reaches the API server",
        ),
        (&["k8sServiceHost="], "k8sServiceHost is not set"),
        (
            &[PLACE, "k8sServiceHos=a"],
            "additional properties 'k8sServiceHos' not allowed",
        ),
        (
            &[PLACE, "dns.tll=5"],
            "additional properties 'tll' not allowed",
        ),
        (&[PLACE, "masquerade=maybe"], "got string, want boolean"),
        (&[PLACE, "k8sServicePort=0"], "minimum: got 0, want 1"),
        (&[PLACE, "mtu=9"], "mtu"),
        (
            &["kubeApiServers={192.0.2.1:6443}"],
            "does not match pattern",
        ),
    ];
    for (values, reason) in cases {
        let said = helm.template(Path::new(CHART), NAMESPACE, values);
        let said = format!("{:#}", said.expect_err(reason));
        assert!(said.contains(reason), "{values:?}: {said}");
    }
}

#[test]
fn the_schema_explains_every_value() {
    let read = |name: &str| std::fs::read_to_string(Path::new(CHART).join(name)).unwrap();
    let values = documents::parse(&read("values.yaml")).remove(0);
    let schema: Value = serde_json::from_str(&read("values.schema.json")).unwrap();
    let mut wrong = Vec::new();
    explained("", &values, &schema, &mut wrong);
    assert_eq!(wrong, [] as [&str; 0]);
    let unknown = |key: &&String| values[key.as_str()].is_null() && *key != "global";
    let properties = schema["properties"].as_object().unwrap();
    assert_eq!(properties.keys().find(unknown), None);
    // It can fail.
    let mut planted = values;
    planted["dns"]["planted"] = 1.into();
    explained("", &planted, &schema, &mut wrong);
    assert_eq!(wrong, [".dns.planted: not in the schema"]);
}

#[test]
fn objects_belong_to_the_release() {
    let test = "objects_belong_to_the_release";
    let Some(helm) = helm(test) else { return };
    let values = [
        "prometheus.enabled=true",
        "prometheus.serviceMonitor.enabled=true",
    ];
    let objects = render(&helm, "network", &values);
    assert_eq!(objects.len(), 10);
    for object in objects {
        let metadata = &object["metadata"];
        let name = format!("{} {}", object["kind"], metadata["name"]);
        let expected = match (object["kind"].as_str().unwrap(), metadata["name"].as_str()) {
            ("ClusterRole" | "ClusterRoleBinding", _) => Value::Null,
            (_, Some("kube-dns")) => "kube-system".into(),
            _ => "network".into(),
        };
        assert_eq!(metadata["namespace"], expected, "{name}");
        if object["kind"] == "ClusterRoleBinding" {
            assert_eq!(object["subjects"][0]["namespace"], "network");
        }
        let labels = &metadata["labels"];
        for (label, expected) in [
            ("helm.sh/chart", "weir-0.1.0"),
            ("app.kubernetes.io/instance", "weir"),
            ("app.kubernetes.io/version", VERSION),
            ("app.kubernetes.io/managed-by", "Helm"),
            ("app.kubernetes.io/part-of", "weir"),
        ] {
            assert_eq!(labels[label], expected, "{name}: {label}");
        }
        let component = labels["app.kubernetes.io/component"].as_str();
        let expected = match labels["app.kubernetes.io/name"].as_str() {
            Some("weir") => "agent",
            Some("weir-dns") => "dns",
            other => panic!("{name}: {other:?}"),
        };
        assert_eq!(component, Some(expected), "{name}");
    }
}

/// `weir doctor` in the pod is told by the environment, as the agent is.
#[test]
fn doctor_looks_where_the_agent_does() {
    let objects = documents::parse(MANIFEST);
    let container = &pod(object(&objects, "DaemonSet", "weir"))["containers"][0];
    let environment = container["env"].as_array().unwrap();
    for (name, path) in [
        ("WEIR_BPFFS", "/sys/fs/bpf/weir"),
        ("WEIR_CGROUP", "/host/cgroup"),
    ] {
        let set = serde_json::json!({"name": name, "value": path});
        assert!(environment.contains(&set), "{environment:?}");
        let mounts = container["volumeMounts"].as_array().unwrap();
        let holds = |mount: &Value| path.starts_with(mount["mountPath"].as_str().unwrap());
        assert!(mounts.iter().any(holds), "{path}");
    }
}

#[test]
fn one_version_is_named_everywhere() {
    let image = format!("weir.local/weir:{VERSION}");
    for object in documents::parse(&[MANIFEST, "---\n", CLEANUP].concat()) {
        for container in containers(&object) {
            assert_eq!(container["image"], image, "{}", container["name"]);
        }
    }
    let chart = std::fs::read_to_string(Path::new(CHART).join("Chart.yaml")).unwrap();
    let chart = &documents::parse(&chart)[0];
    assert_eq!(chart["version"], VERSION);
    assert_eq!(chart["appVersion"], VERSION);
}

/// A list to be changed on purpose: what runs with which power.
#[test]
fn no_container_has_more_power_than_this() {
    let power = |object: &Value| -> Vec<String> {
        containers(object)
            .iter()
            .map(|container| {
                let context = &container["securityContext"];
                assert_eq!(context["capabilities"]["drop"], serde_json::json!(["ALL"]));
                assert_eq!(context["readOnlyRootFilesystem"], true);
                assert!(context["privileged"].is_null());
                let name = container["name"].as_str().unwrap();
                let added = strings(&context["capabilities"]["add"]).join(" ");
                format!("{name}: {added}")
            })
            .collect()
    };
    let objects = documents::parse(&[MANIFEST, "---\n", CLEANUP].concat());
    let of = |name: &str| power(object(&objects, "DaemonSet", name));
    assert_eq!(of("weir"), ["agent: BPF NET_ADMIN PERFMON", "install: "]);
    assert_eq!(of("weir-dns"), ["dns: NET_BIND_SERVICE"]);
    assert_eq!(
        of("weir-cleanup"),
        ["cleanup: BPF NET_ADMIN PERFMON SYS_ADMIN", "done: "]
    );

    let dns = pod(object(&objects, "DaemonSet", "weir-dns"));
    assert_eq!(dns["automountServiceAccountToken"], false);
    assert_eq!(dns["securityContext"]["runAsNonRoot"], true);
    // Its own, and not the number that images use; confined, where SELinux is on, as the agent is not.
    assert_eq!(dns["securityContext"]["runAsUser"], USER.uid);
    assert_eq!(dns["securityContext"]["runAsGroup"], USER.gid);
    assert_eq!(
        dns["securityContext"]["seLinuxOptions"]["type"],
        "container_t"
    );
    // Who takes over the agent cannot take over what the runtime starts as root.
    let agent = pod(object(&objects, "DaemonSet", "weir"));
    let writes_plugins = |container: &Value| {
        let mounts = container["volumeMounts"].as_array().unwrap();
        let mut of_plugins = mounts.iter().filter(|mount| mount["name"] == "cni-bin");
        of_plugins.any(|mount| mount["readOnly"] != true)
    };
    assert!(!writes_plugins(&agent["containers"][0]));
    assert!(writes_plugins(&agent["containers"][1]));
}

fn helm(test: &str) -> Option<Helm> {
    match Helm::ready() {
        Ok(helm) => Some(helm),
        Err(error) if error.is_of_the_machine() => {
            not_run(test, &error);
            None
        }
        Err(error) => panic!("{error}"),
    }
}

/// The chart's objects, with an API server if the values name none.
fn render(helm: &Helm, namespace: &str, values: &[&str]) -> Vec<Value> {
    let values = [&[PLACE], values].concat();
    let rendered = helm.template(Path::new(CHART), namespace, &values);
    documents::parse(&rendered.unwrap())
}

/// What a container's parent is to hold, and the program that it starts, with its arguments.
fn program(container: &Value) -> (Vec<String>, Vec<String>) {
    let words = [strings(&container["command"]), strings(&container["args"])].concat();
    match words.iter().position(|word| word == "--") {
        None => (Vec::new(), [vec!["weir-agent".to_owned()], words].concat()),
        Some(end) => {
            let (keep, held) = words[..end].split_at(2);
            assert_eq!(keep, ["/usr/bin/weir-agent", "keep"], "{words:?}");
            (held.to_vec(), words[end + 1..].to_vec())
        }
    }
}

/// Fails unless the program understands these words: help is only given once everything before it was.
fn understood(program: &[String]) {
    let words = [program, &["--help".to_owned()]].concat();
    if program[0] != "/usr/bin/weir-dns" {
        let said = <Args as clap::Parser>::try_parse_from(&words).unwrap_err();
        let kind = said.kind();
        assert_eq!(kind, clap::error::ErrorKind::DisplayHelp, "{said}");
        return;
    }
    // Its arguments are in its binary.
    let output = Command::new(binary("weir-dns")).args(&words[1..]).output();
    let output = output.expect("weir-dns: build it first, or set WEIR_BIN_DIR");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{words:?}: {said}");
}

/// Adds what the schema does not say about a value and those inside it.
fn explained(place: &str, value: &Value, schema: &Value, wrong: &mut Vec<String>) {
    let Some(inside) = value.as_object().filter(|it| !it.is_empty()) else {
        return;
    };
    let Some(properties) = schema["properties"].as_object() else {
        // Its keys are the user's.
        return;
    };
    if schema["additionalProperties"] != false {
        wrong.push(format!("{place}: takes what it does not know"));
    }
    for (key, value) in inside {
        let place = format!("{place}.{key}");
        let Some(property) = properties.get(key) else {
            wrong.push(format!("{place}: not in the schema"));
            continue;
        };
        if property["description"].as_str().is_none_or(str::is_empty) {
            wrong.push(format!("{place}: not described"));
        }
        explained(&place, value, property, wrong);
    }
}

fn object<'a>(objects: &'a [Value], kind: &str, name: &str) -> &'a Value {
    let found = objects
        .iter()
        .find(|it| it["kind"] == kind && it["metadata"]["name"] == name);
    found.unwrap_or_else(|| panic!("no {kind} {name}"))
}

fn pod(object: &Value) -> &Value {
    &object["spec"]["template"]["spec"]
}

/// In the order in which they run.
fn containers(object: &Value) -> Vec<Value> {
    ["initContainers", "containers"]
        .iter()
        .filter_map(|field| pod(object)[field].as_array())
        .flatten()
        .cloned()
        .collect()
}

fn strings(list: &Value) -> Vec<String> {
    let list = list.as_array().cloned().unwrap_or_default();
    list.iter()
        .map(|it| it.as_str().unwrap().to_owned())
        .collect()
}
