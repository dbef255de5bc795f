//! Kubernetes' own networking conformance, on a cluster of two real nodes with Weir as CNI, proxy and
//! DNS.

#![allow(clippy::unwrap_used, reason = "a test that fails should say where")]

use clap::Parser;
use weir_tests::cluster::e2e::{self, Selection};
use weir_tests::cluster::options::Options;
use weir_tests::cluster::programs::Programs;
use weir_tests::cluster::{Cluster, End};
use weir_tests::not_run::not_run;

/// How many specs of v1.36 carry `[sig-network]` and `[Conformance]`.
const SPECS: usize = 47;

#[derive(Parser)]
struct Defaults {
    #[command(flatten)]
    options: Options,
    #[command(flatten)]
    selection: Selection,
}

#[test]
fn networking_conformance_passes_whole() {
    let programs = match Programs::ready() {
        Ok(programs) => programs,
        Err(why) => {
            let why = format!("{why:#}");
            return not_run("networking_conformance_passes_whole", &why);
        }
    };
    // Paths in the options are from the root of the repository.
    std::env::set_current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/..")).unwrap();
    let Defaults {
        mut options,
        selection,
    } = Defaults::parse_from(["cluster"]);
    options.name = "test".to_owned();
    let cluster = Cluster::up(options, programs, End::TakenDown).unwrap();
    let outcome = e2e::run(&cluster, &selection).unwrap();
    assert!(outcome.is_good(), "{outcome}");
    assert_eq!(
        (outcome.passed, outcome.skipped.len()),
        (SPECS, 0),
        "{outcome}"
    );
}
