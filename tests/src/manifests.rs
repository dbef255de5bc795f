//! Where the manifests of the applications are that tests run.

use std::path::{Path, PathBuf};

use crate::not_run::not_here;

/// The project's own.
#[must_use]
pub fn shop() -> PathBuf {
    root().join("examples/shop")
}

/// The microservices demo, which is not in this repository: below `WEIR_SHARED`, or below the folder
/// `shared` in the checkout's parent or above it. Where there is none, reports the test of this name as
/// not run.
#[must_use]
pub fn online_boutique(test: &str) -> Option<PathBuf> {
    let folder = shared().map(|shared| shared.join("data/online-boutique"));
    let found = folder.filter(|folder| folder.is_dir());
    if found.is_none() {
        let why = "no ../shared/data/online-boutique, and WEIR_SHARED names no other";
        not_here(test, &why);
    }
    found
}

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

fn root() -> PathBuf {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR"));
    tests.parent().unwrap_or(tests).to_owned()
}
