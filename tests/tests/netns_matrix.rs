//! Ring 4: every pod of an application to every Service, by name, against a naive reading of its policies.

#![allow(clippy::unwrap_used, reason = "a test that fails should say where")]

use std::path::Path;

use weir_tests::application::{Application, Cell, settle};
use weir_tests::manifests;
use weir_tests::node::{Node, NodeOptions};

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

#[test]
fn the_shop_connects_as_its_policies_say() {
    check("shop", &manifests::shop(), 30);
}

#[test]
fn online_boutique_connects_as_its_policies_say() {
    if let Some(folder) = manifests::online_boutique("online_boutique_connects_as_its_policies_say")
    {
        check("boutique", &folder, 100);
    }
}
