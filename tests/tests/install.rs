//! What `deploy/` holds, against what the programs understand: arguments, versions, capabilities. That
//! an API server takes it is `control_install.rs`; that it suffices is `netns_install.rs`.

#![allow(clippy::unwrap_used, reason = "a test that fails should say where")]

use std::path::Path;

use serde_json::Value;
use weir_agent::config::Args;
use weir_dns::privilege::USER;
use weir_tests::documents;
use weir_tests::helm::Helm;
use weir_tests::not_run::not_run;

const MANIFEST: &str = include_str!("../../deploy/weir.yaml");
const CLEANUP: &str = include_str!("../../deploy/cleanup.yaml");
const CHART: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../deploy/helm/weir");
/// What stands for the API server's address in the plain manifest, to be replaced by who applies it.
const PLACE: &str = "k8sServiceHost=API_SERVER_HOST";
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
    let rendered = helm.template(Path::new(CHART), &[PLACE]).unwrap();
    let expected = format!("{HEADER}{rendered}");
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
    let cases: [(&[&str], &str, &[&str]); 6] = [
        (
            &["k8sServiceHost=fd00::1", "k8sServicePort=443"],
            "weir",
            &["--kube-api-server=https://[fd00::1]:443"],
        ),
        (&["masquerade=false"], "weir", &["--masquerade=false"]),
        (
            &["prometheus.enabled=true"],
            "weir",
            &["--http=$(HOST_IP):9660"],
        ),
        (
            &["prometheus.enabled=true"],
            "weir-dns",
            &["--metrics=$(HOST_IP):9661"],
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
    ];
    for (values, daemon_set, expected) in cases {
        let objects = documents::parse(&helm.template(Path::new(CHART), values).unwrap());
        let object = object(&objects, "DaemonSet", daemon_set);
        let args = strings(&pod(object)["containers"][0]["args"]);
        for argument in expected {
            assert!(args.iter().any(|it| it == argument), "{values:?}: {args:?}");
        }
    }
    let values = ["dns.service.create=false", "k8sServiceHost="];
    let objects = documents::parse(&helm.template(Path::new(CHART), &values).unwrap());
    assert!(objects.iter().all(|it| it["kind"] != "Service"));
}

#[test]
fn the_programs_understand_their_arguments() {
    let mut seen = 0;
    for object in documents::parse(&[MANIFEST, "---\n", CLEANUP].concat()) {
        if object["kind"] != "DaemonSet" {
            continue;
        }
        for container in containers(&object) {
            let name = &container["name"];
            let words = [strings(&container["command"]), strings(&container["args"])].concat();
            let mut words = match words.iter().position(|word| word == "--") {
                None => [vec!["weir-agent".to_owned()], words].concat(),
                Some(end) => {
                    let (keep, held) = words[..end].split_at(2);
                    assert_eq!(keep, ["/usr/bin/weir-agent", "keep"], "{name}");
                    let of_dns = ["--hold=169.254.53.53:53", "--hold=[fd57:6569:7200::53]:53"];
                    let expected: &[&str] = if name == "dns" { &of_dns } else { &[] };
                    assert_eq!(held, expected, "{name}");
                    words[end + 1..].to_vec()
                }
            };
            // weir-dns has its arguments in its binary; `netns_install.rs` starts it.
            if words[0] == "/usr/bin/weir-dns" {
                continue;
            }
            seen += 1;
            // Help is only given once everything before it was understood.
            words.push("--help".into());
            let said = <Args as clap::Parser>::try_parse_from(&words).unwrap_err();
            assert_eq!(
                said.kind(),
                clap::error::ErrorKind::DisplayHelp,
                "{name}: {said}"
            );
        }
    }
    assert_eq!(seen, 4, "install, agent, cleanup, done");
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
