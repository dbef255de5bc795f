//! Ring 4: every pod of an application to every Service, by name, against a naive reading of its policies.

#![allow(clippy::unwrap_used, reason = "a test that fails should say where")]

use std::path::{Path, PathBuf};

use weir_tests::application::{Application, Cell, settle};
use weir_tests::node::{Node, NodeOptions};
use weir_tests::not_run::not_here;

fn check(name: &str, folder: &Path, least: usize) {
    let node = Node::start(NodeOptions::named(name)).unwrap();
    let application = Application::start(&node, folder).unwrap();
    settle(&node, &application).unwrap();
    let cells = application.matrix(folder).unwrap();
    let permitted = cells.iter().filter(|c| c.expected).count();
    let wrong: Vec<&Cell> = cells.iter().filter(|c| c.expected != c.reached).collect();
    println!(
        "{name}: {} pairs, {permitted} permitted, {} wrong",
        cells.len(),
        wrong.len()
    );
    assert!(wrong.is_empty(), "{wrong:#?}");
    assert!(cells.len() >= least, "{} pairs", cells.len());
    assert!(permitted > 0 && permitted < cells.len());
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

#[test]
fn the_shop_connects_as_its_policies_say() {
    check("shop", &root().join("examples/shop"), 30);
}

/// `WEIR_SHARED`, or the folder `shared` in the checkout's parent or above it.
fn shared() -> Option<PathBuf> {
    if let Some(folder) = std::env::var_os("WEIR_SHARED") {
        return Some(folder.into());
    }
    let root = root().canonicalize().ok()?;
    root.ancestors()
        .skip(1)
        .map(|above| above.join("shared"))
        .find(|folder| folder.join("data").is_dir())
}

#[test]
fn online_boutique_connects_as_its_policies_say() {
    let folder = shared().map(|shared| shared.join("data/online-boutique"));
    match folder.filter(|folder| folder.is_dir()) {
        Some(folder) => check("boutique", &folder, 100),
        None => not_here(
            "online_boutique_connects_as_its_policies_say",
            &"no ../shared/data/online-boutique, and WEIR_SHARED names no other",
        ),
    }
}
