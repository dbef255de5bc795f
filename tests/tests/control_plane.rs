//! The real control plane, driven by kubectl and a played kubelet with no network behind it.

#![allow(clippy::unwrap_used, reason = "a test that fails should say where")]

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr};
use std::time::{Duration, Instant};

use anyhow::Result;
use k8s_openapi::api::core::v1::Pod;
use weir_tests::binaries::ready_or_not_run;
use weir_tests::control_plane::ControlPlane;
use weir_tests::kubelet::{Kubelet, PodRuntime, RegisteredNode, client};
use weir_tests::netns::Netns;

/// How long the controllers may take for anything.
const SETTLE: Duration = Duration::from_secs(30);

const ECHO: &str = include_str!("manifests/echo.yaml");

/// Gives pods addresses that lead nowhere.
struct Nowhere {
    next: u8,
}

impl PodRuntime for Nowhere {
    fn start(&mut self, _: &Pod) -> Result<Vec<IpAddr>> {
        self.next += 1;
        Ok(vec![IpAddr::V4(Ipv4Addr::new(10, 244, 0, self.next))])
    }

    fn stop(&mut self, _: &Pod) -> Result<()> {
        Ok(())
    }
}

#[test]
fn real_controllers_make_endpoint_slices_of_played_pods() {
    let Some(plane) = control_plane("real_controllers_make_endpoint_slices_of_played_pods") else {
        return;
    };
    let _kubelet = kubelet(&plane);
    plane.kubectl().apply(ECHO).unwrap();
    let expected = BTreeSet::from(["10.244.0.1=true".into(), "10.244.0.2=true".into()]);
    eventually("two ready endpoints", || endpoints(&plane) == expected);

    plane
        .kubectl()
        .run(&["delete", "deployment", "echo", "--wait=false"])
        .unwrap();
    eventually("no endpoint", || endpoints(&plane).is_empty());
    let pods = || plane.kubectl().run(&["get", "pods", "-o", "name"]).unwrap();
    eventually("no pod", || pods().is_empty());
}

#[test]
fn objects_survive_an_outage_and_old_watches_are_gone() {
    let Some(mut plane) = control_plane("objects_survive_an_outage_and_old_watches_are_gone")
    else {
        return;
    };
    let _kubelet = kubelet(&plane);
    plane.kubectl().apply(ECHO).unwrap();
    eventually("two endpoints", || endpoints(&plane).len() == 2);
    let version = plane
        .kubectl()
        .run(&["get", "service", "echo", "-o", VERSION])
        .unwrap();

    plane
        .kubectl()
        .run(&["annotate", "service", "echo", "later=1"])
        .unwrap();
    plane.compact().unwrap();
    plane.stop_api_server().unwrap();
    assert!(
        plane.kubectl().run(&["get", "services"]).is_err(),
        "it was stopped"
    );
    plane.start_api_server().unwrap();
    assert_eq!(endpoints(&plane).len(), 2, "etcd kept them");

    let path = format!("/api/v1/services?watch=1&resourceVersion={version}&timeoutSeconds=5");
    let watched = plane.kubectl().run(&["get", "--raw", &path]);
    let said = watched.unwrap_or_else(|e| format!("{e:#}"));
    assert!(
        said.contains("\"code\":410") || said.contains("Expired"),
        "{said}"
    );

    // The kubelet is back, too.
    plane
        .kubectl()
        .run(&["scale", "deployment", "echo", "--replicas=3"])
        .unwrap();
    eventually("three endpoints", || endpoints(&plane).len() == 3);
}

#[test]
fn a_service_account_may_do_what_is_bound_to_it() {
    let Some(plane) = control_plane("a_service_account_may_do_what_is_bound_to_it") else {
        return;
    };
    let node = Netns::new("node").unwrap();
    plane.attach(&node, "eth0", "10.210.0.11/24").unwrap();
    let kubectl = plane.kubectl();
    for words in [
        "create serviceaccount reader",
        "create clusterrole reader --verb=get,list,watch --resource=services",
        "create clusterrolebinding reader --clusterrole=reader --serviceaccount=default:reader",
    ] {
        kubectl.run(&words.split(' ').collect::<Vec<_>>()).unwrap();
    }
    let kubeconfig = plane.kubeconfig_of("default", "reader").unwrap();
    // From a node, as the agent does it.
    let answers = node.block_on(|| async {
        let client = client(&kubeconfig).await?;
        let services: kube::Api<k8s_openapi::api::core::v1::Service> =
            kube::Api::all(client.clone());
        let pods: kube::Api<Pod> = kube::Api::all(client);
        let parameters = kube::api::ListParams::default();
        anyhow::Ok((
            services.list(&parameters).await,
            pods.list(&parameters).await,
        ))
    });
    let (services, pods) = answers.unwrap().unwrap();
    assert_eq!(services.unwrap().items.len(), 1, "the kubernetes Service");
    let refused = pods.unwrap_err().to_string();
    assert!(
        refused.contains("cannot list resource \"pods\""),
        "{refused}"
    );
}

const VERSION: &str = "jsonpath={.metadata.resourceVersion}";

fn control_plane(test: &str) -> Option<ControlPlane> {
    let binaries = ready_or_not_run(test)?;
    Some(ControlPlane::start(&binaries).expect("a control plane"))
}

fn kubelet(plane: &ControlPlane) -> Kubelet {
    let address = IpAddr::V4(Ipv4Addr::new(10, 210, 0, 11));
    let node = RegisteredNode::register(plane, "n1", &[address]).expect("a node");
    assert_eq!(node.pod_cidrs, ["10.244.0.0/24"]);
    Kubelet::start(node, Nowhere { next: 0 }).expect("a kubelet")
}

/// Address and readiness of every endpoint of `echo`.
fn endpoints(plane: &ControlPlane) -> BTreeSet<String> {
    let each = "{range .items[*].endpoints[*]}{.addresses[0]}={.conditions.ready} {end}";
    let template = format!("jsonpath={each}");
    let slices = [
        "get",
        "endpointslices",
        "-l",
        "kubernetes.io/service-name=echo",
        "-o",
        &template,
    ];
    let said = plane.kubectl().run(&slices).expect("endpoint slices");
    said.split_whitespace().map(str::to_owned).collect()
}

fn eventually(what: &str, is_so: impl Fn() -> bool) {
    let deadline = Instant::now() + SETTLE;
    while !is_so() {
        assert!(Instant::now() < deadline, "not in {SETTLE:?}: {what}");
        std::thread::sleep(Duration::from_millis(50));
    }
}
