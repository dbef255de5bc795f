//! `deploy/` against a real API server: it takes every object as it is written. What is in them is
//! `install.rs`.

#![allow(clippy::unwrap_used, reason = "a test that fails should say where")]

use weir_tests::binaries::ready_or_not_run;
use weir_tests::control_plane::ControlPlane;

const MANIFEST: &str = include_str!("../../deploy/weir.yaml");
const CLEANUP: &str = include_str!("../../deploy/cleanup.yaml");

#[test]
fn the_api_server_takes_every_object() {
    let Some(binaries) = ready_or_not_run("the_api_server_takes_every_object") else {
        return;
    };
    let plane = ControlPlane::start(&binaries).expect("a control plane");
    let kubectl = plane.kubectl();
    let dry = ["apply", "--dry-run=server", "--validate=strict", "-f", "-"];
    let said = kubectl.run_with_input(&dry, CLEANUP).unwrap();
    assert_eq!(
        said,
        "daemonset.apps/weir-cleanup created (server dry run)\n"
    );
    // A mistake in a name is not passed over.
    let wrong = MANIFEST.replace("readOnlyRootFilesystem", "readOnlyRoot");
    kubectl.run_with_input(&dry, &wrong).unwrap_err();
    let expected = [
        "serviceaccount/weir-agent",
        "clusterrole.rbac.authorization.k8s.io/weir-agent",
        "clusterrolebinding.rbac.authorization.k8s.io/weir-agent",
        "service/kube-dns",
        "daemonset.apps/weir",
        "daemonset.apps/weir-dns",
    ];
    let lines = |ending: &str| -> String {
        let line = |object: &&str| format!("{object} {ending}\n");
        expected.iter().map(line).collect()
    };
    let said = kubectl.run_with_input(&dry, MANIFEST).unwrap();
    assert_eq!(said, lines("created (server dry run)"));
    assert_eq!(kubectl.apply(MANIFEST).unwrap(), lines("created"));
    // What the server filled in is what was meant: nothing is left to change.
    assert_eq!(kubectl.apply(MANIFEST).unwrap(), lines("unchanged"));
    let clusterip = "jsonpath={.spec.clusterIP}";
    let get = ["-n", "kube-system", "get", "service", "kube-dns", "-o"];
    let said = kubectl.run(&[&get[..], &[clusterip]].concat()).unwrap();
    assert_eq!(said, "10.96.0.10");
}
