//! The manifests source: a folder in, changes out.

use std::fs;
use std::net::IpAddr;
use std::path::Path;
use std::time::Duration;

use tempfile::TempDir;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use super::Reader;
use crate::model::{Kind, ObjectName, PodPhase, ServiceKind};
use crate::watch::controllers::Surroundings;
use crate::watch::manifests::{ManifestsOptions, ManifestsSource, PodAddresses};
use crate::watch::status::{Cause, WatchStatus};

struct Running {
    dir: TempDir,
    reader: Reader,
    addresses: PodAddresses,
    health: tokio::sync::watch::Receiver<crate::watch::status::Health>,
    task: JoinHandle<()>,
}

impl Running {
    /// With these files, watched, and read every so often.
    fn start(files: &[(&str, &str)], rescan: Duration) -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("manifests")).unwrap();
        for (path, text) in files {
            write(dir.path(), path, text);
        }
        Self::in_dir(dir, rescan)
    }

    fn in_dir(dir: TempDir, rescan: Duration) -> Self {
        let source = ManifestsSource::new(ManifestsOptions {
            folder: dir.path().join("manifests"),
            assigned: dir.path().join("service-addresses.json"),
            surroundings: Surroundings {
                node: "here".into(),
                service_cidrs: vec![
                    "10.96.0.0/16".parse().unwrap(),
                    "fd00:96::/112".parse().unwrap(),
                ],
            },
            rescan,
        });
        let addresses = source.addresses();
        let health = source.health();
        let (sender, receiver) = mpsc::channel(4);
        Self {
            dir,
            reader: Reader::new(receiver),
            addresses,
            health,
            task: tokio::spawn(source.run(sender)),
        }
    }

    /// Ends it and starts another one on the same files.
    async fn restart(self) -> Self {
        self.task.abort();
        assert!(self.task.await.is_err());
        Self::in_dir(self.dir, HOURS)
    }

    fn write(&self, path: &str, text: &str) {
        write(self.dir.path(), path, text);
    }

    fn remove(&self, path: &str) {
        fs::remove_file(self.dir.path().join("manifests").join(path)).unwrap();
    }
}

/// Long enough that only the watched folder can have told.
const HOURS: Duration = Duration::from_secs(3600);

fn write(dir: &Path, path: &str, text: &str) {
    let path = dir.join("manifests").join(path);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, text).unwrap();
}

fn service(name: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}}}\nspec:\n  selector: {{app: {name}}}\n  ports: [{{port: 80}}]\n"
    )
}

fn cluster_ips(reader: &Reader, name: &str) -> Vec<IpAddr> {
    match &reader.snapshot.services[&ObjectName::new("default", name)].kind {
        ServiceKind::ClusterIp(ips) => ips.clone(),
        other => panic!("{other:?}"),
    }
}

const POD: &str =
    "apiVersion: v1\nkind: Pod\nmetadata: {name: web-1, namespace: shop, labels: {app: web}}\n";

#[tokio::test]
async fn a_folder_is_read_with_all_its_documents() {
    let list = "apiVersion: v1\nkind: List\nitems:\n- {apiVersion: v1, kind: Namespace, metadata: {name: listed}}\n\
                - {apiVersion: v1, kind: Service, metadata: {name: in-list}, spec: {ports: [{port: 1}]}}\n";
    let several = format!(
        "# comment\n---\n{}---\n\n---\n{POD}---\napiVersion: apps/v1\nkind: Deployment\nmetadata: {{name: d}}\n\
         ---\napiVersion: example.com/v1\nkind: Service\nmetadata: {{name: not-ours}}\n",
        service("web")
    );
    let mut running = Running::start(
        &[
            ("several.yaml", &several),
            ("deep/er/list.yml", list),
            (
                "one.json",
                r#"{"apiVersion":"v1","kind":"Service","metadata":{"name":"json"},"spec":{"ports":[{"port":1}]}}"#,
            ),
            ("notes.txt", "not: [yaml"),
            (".hidden.yaml", "not: [yaml"),
        ],
        HOURS,
    );
    let reader = &mut running.reader;
    reader.until_complete().await;
    assert!(reader.quarantined.is_empty(), "{:?}", reader.quarantined);
    let mut services: Vec<_> = reader
        .snapshot
        .services
        .keys()
        .map(ToString::to_string)
        .collect();
    services.sort();
    assert_eq!(services, ["default/in-list", "default/json", "default/web"]);
    let mut namespaces: Vec<_> = reader.snapshot.namespaces.keys().map(|n| &**n).collect();
    namespaces.sort_unstable();
    assert_eq!(namespaces, ["default", "listed", "shop"]);
    for (name, namespace) in &reader.snapshot.namespaces {
        assert_eq!(namespace.labels["kubernetes.io/metadata.name"], *name);
    }
    assert_eq!(running.health.borrow()[&Kind::Pod], WatchStatus::Synced);
}

#[tokio::test]
async fn a_change_of_the_folder_is_noticed() {
    let mut running = Running::start(&[("a.yaml", &service("a"))], HOURS);
    running.reader.until_complete().await;
    running.write("b.yaml", &service("b"));
    running
        .reader
        .until("b is there", |r| r.has_service("default", "b"))
        .await;
    running.write("new/c.yaml", &service("c"));
    running
        .reader
        .until("c is there", |r| r.has_service("default", "c"))
        .await;
    running.remove("a.yaml");
    running
        .reader
        .until("a is gone", |r| !r.has_service("default", "a"))
        .await;
    assert_eq!(running.reader.synced[&Kind::Service], 1);
}

#[tokio::test]
async fn a_change_that_nobody_tells_is_found_by_reading_again() {
    let mut running = Running::start(&[], Duration::from_millis(50));
    running.reader.until_complete().await;
    let manifests = running.dir.path().join("manifests");
    // The watch is on the folder that goes away.
    fs::rename(&manifests, running.dir.path().join("elsewhere")).unwrap();
    fs::create_dir(&manifests).unwrap();
    running.write("a.yaml", &service("a"));
    running
        .reader
        .until("a is there", |r| r.has_service("default", "a"))
        .await;
}

#[tokio::test]
async fn a_bad_document_keeps_its_last_good_state_and_disturbs_nobody() {
    let two = |second: &str| format!("{}---\n{second}", service("first"));
    let mut running = Running::start(&[("a.yaml", &two(&service("second")))], HOURS);
    let reader = &mut running.reader;
    reader.until_complete().await;
    let before = cluster_ips(reader, "second");

    write(running.dir.path(), "a.yaml", &two("kind: [Service\n"));
    reader
        .until("it is quarantined", |r| !r.quarantined.is_empty())
        .await;
    let reason = &reader.quarantined["a.yaml document 2"];
    assert!(reason.starts_with("line 8: not YAML: "), "{reason}");
    assert!(reader.has_service("default", "first"));
    assert_eq!(cluster_ips(reader, "second"), before);

    let wrong = service("second").replace("port: 80", "port: 0");
    write(running.dir.path(), "a.yaml", &two(&wrong));
    let label = "a.yaml document 2 (Service default/second)";
    reader
        .until("it is quarantined by name", |r| {
            r.quarantined.contains_key(label)
        })
        .await;
    assert_eq!(
        reader.quarantined[label],
        "spec.ports[0]: port 0 is not within 1 to 65535"
    );
    assert_eq!(reader.quarantined.len(), 1);
    assert_eq!(cluster_ips(reader, "second"), before);

    write(running.dir.path(), "a.yaml", &two(&service("other")));
    reader
        .until("second is gone", |r| !r.has_service("default", "second"))
        .await;
    reader
        .until("nothing is quarantined", |r| r.quarantined.is_empty())
        .await;
}

#[tokio::test]
async fn of_two_documents_for_one_object_the_first_by_path_counts() {
    let other = service("web").replace("80", "81");
    let mut running = Running::start(&[("b.yaml", &other), ("a.yaml", &service("web"))], HOURS);
    let reader = &mut running.reader;
    reader.until_complete().await;
    let name = ObjectName::new("default", "web");
    assert_eq!(reader.snapshot.services[&name].ports[0].port, 80);
    reader
        .until("the second is quarantined", |r| !r.quarantined.is_empty())
        .await;
    assert_eq!(
        reader.quarantined["b.yaml document 1 (Service default/web)"],
        "Service default/web stands in a.yaml document 1 already"
    );
    fs::remove_file(running.dir.path().join("manifests/a.yaml")).unwrap();
    reader
        .until("the second counts", |r| {
            r.snapshot.services[&name].ports[0].port == 81 && r.quarantined.is_empty()
        })
        .await;
}

#[tokio::test]
async fn a_policy_with_an_unknown_field_closes_the_pods_it_selects() {
    let policy = "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: p}\nspec:\n  \
                  podSelector: {}\n  policyTypes: [Egress]\n  egres: []\n";
    let mut running = Running::start(&[("p.yaml", policy)], HOURS);
    let reader = &mut running.reader;
    reader.until_complete().await;
    let policy = &reader.snapshot.policies[&ObjectName::new("default", "p")];
    assert_eq!(policy.ingress, None);
    assert_eq!(policy.egress.as_ref().map(Vec::len), Some(1));
    reader
        .until("it is quarantined", |r| !r.quarantined.is_empty())
        .await;
    let reason = &reader.quarantined["p.yaml document 1 (NetworkPolicy default/p)"];
    assert!(reason.contains("unknown field `egres`"), "{reason}");
}

#[tokio::test]
async fn a_cluster_policy_is_in_no_namespace_and_of_either_version() {
    let policy = |version: &str, name: &str, priority: u16| {
        format!(
            "apiVersion: policy.networking.k8s.io/{version}\nkind: ClusterNetworkPolicy\nmetadata: {{name: {name}, namespace: a}}\n\
             spec: {{tier: Admin, priority: {priority}, subject: {{namespaces: {{}}}}}}\n"
        )
    };
    let wide = policy("v1alpha2", "wide", 2000).replace(
        "}}}",
        "}}, ingress: [{action: Pass, from: [{namespaces: {}}]}]}",
    );
    let files = [
        ("a.yaml", &*policy("v1alpha2", "one", 1)),
        ("b.yaml", &*policy("v1beta1", "two", 2)),
        ("c.yaml", &*wide),
    ];
    let mut running = Running::start(&files, HOURS);
    let reader = &mut running.reader;
    reader.until_complete().await;
    let mut found: Vec<_> = reader.snapshot.cluster_policies.values().collect();
    found.sort_by_key(|it| it.priority);
    let names: Vec<_> = found.iter().map(|it| (&*it.name, it.priority)).collect();
    assert_eq!(names, [("one", 1), ("two", 2), ("wide", 1000)]);
    assert_eq!(found[2].ingress.len(), 1);
    reader
        .until("it is quarantined", |r| !r.quarantined.is_empty())
        .await;
    let reason = &reader.quarantined["c.yaml document 1 (ClusterNetworkPolicy wide)"];
    assert_eq!(reason, "spec.priority: 2000 is not within 0 to 1000");
}

#[tokio::test]
async fn cluster_ips_outlive_a_restart() {
    let dual = service("dual").replace("spec:", "spec:\n  ipFamilyPolicy: PreferDualStack");
    let mut running = Running::start(&[("a.yaml", &service("a")), ("d.yaml", &dual)], HOURS);
    running.reader.until_complete().await;
    let (a, dual) = (
        cluster_ips(&running.reader, "a"),
        cluster_ips(&running.reader, "dual"),
    );
    assert_eq!((a.len(), dual.len()), (1, 2));
    // An address that the name alone would not lead to.
    let kept: IpAddr = "10.96.77.77".parse().unwrap();
    let path = running.dir.path().join("service-addresses.json");
    let text = fs::read_to_string(&path).unwrap();
    fs::write(&path, text.replace(&a[0].to_string(), &kept.to_string())).unwrap();
    let mut again = running.restart().await;
    again.reader.until_complete().await;
    assert_eq!(cluster_ips(&again.reader, "a"), [kept]);
    assert_eq!(cluster_ips(&again.reader, "dual"), dual);
    // And even a node that has forgotten everything finds most of them again.
    fs::write(&path, "{").unwrap();
    let mut forgetful = again.restart().await;
    forgetful.reader.until_complete().await;
    assert_eq!(cluster_ips(&forgetful.reader, "a"), a);
}

#[tokio::test]
async fn a_pod_runs_and_is_an_endpoint_once_it_has_an_address() {
    let service = service("web").replace("{name: web}", "{name: web, namespace: shop}");
    let mut running = Running::start(&[("s.yaml", &service), ("p.yaml", POD)], HOURS);
    let pod = ObjectName::new("shop", "web-1");
    let web = ObjectName::new("shop", "web");
    running.reader.until_complete().await;
    assert_eq!(running.reader.snapshot.pods[&pod].phase, PodPhase::Pending);
    assert_eq!(running.reader.snapshot.slices_of(&web).count(), 0);

    let address: IpAddr = "10.0.0.7".parse().unwrap();
    running.addresses.report(pod.clone(), vec![address]);
    let reader = &mut running.reader;
    reader
        .until("the pod is an endpoint", |r| {
            r.snapshot.slices_of(&web).any(|s| {
                s.endpoints[0].address == address
                    && s.endpoints[0].conditions.ready
                    && s.endpoints[0].node.as_deref() == Some("here")
            })
        })
        .await;
    reader
        .until("the pod runs", |r| {
            r.snapshot.pods[&pod].phase == PodPhase::Running && r.snapshot.pods[&pod].ready
        })
        .await;

    running.addresses.remove(&pod);
    reader
        .until("the pod is none any more", |r| {
            r.snapshot.slices_of(&web).count() == 0 && r.snapshot.pods[&pod].addresses.is_empty()
        })
        .await;
}

#[tokio::test]
async fn a_folder_that_is_not_there_is_not_an_empty_one() {
    let dir = tempfile::tempdir().unwrap();
    let manifests = dir.path().join("manifests");
    let mut running = Running::in_dir(dir, Duration::from_millis(20));
    let waiting = running.health.wait_for(|h| {
        matches!(
            &h[&Kind::Service],
            WatchStatus::Retrying { cause: Cause::Folder, error, .. }
                if error.starts_with("cannot read the folder /")
        )
    });
    tokio::time::timeout(Duration::from_secs(5), waiting)
        .await
        .unwrap()
        .unwrap();
    assert_eq!(running.reader.snapshot.missing().count(), Kind::ALL.len());
    fs::create_dir(&manifests).unwrap();
    running.write("a.yaml", &service("a"));
    running
        .reader
        .until("a is there", |r| r.has_service("default", "a"))
        .await;
    running.reader.until_complete().await;
    fs::rename(&manifests, running.dir.path().join("elsewhere")).unwrap();
    running.reader.silence(Duration::from_millis(200)).await;
    assert!(running.reader.has_service("default", "a"));
}

#[tokio::test]
async fn an_unreadable_file_keeps_its_text() {
    let mut running = Running::start(&[("a.yaml", &service("a"))], Duration::from_millis(20));
    running.reader.until_complete().await;
    let path = running.dir.path().join("manifests/a.yaml");
    fs::write(&path, [0xff, 0xfe, 0x00]).unwrap();
    let reader = &mut running.reader;
    reader
        .until("it is reported", |r| {
            r.quarantined.get("a.yaml").map(String::as_str) == Some("it is not UTF-8")
        })
        .await;
    assert!(reader.has_service("default", "a"));
}

#[tokio::test]
async fn a_quiet_folder_says_nothing() {
    let mut running = Running::start(&[("a.yaml", &service("a"))], Duration::from_millis(10));
    running.reader.until_complete().await;
    running.reader.silence(Duration::from_millis(200)).await;
}
