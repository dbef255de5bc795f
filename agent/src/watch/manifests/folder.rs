//! Reading a folder of manifests, and noticing that it changed. What the texts mean is `documents`'.

use std::collections::BTreeMap;
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use notify::event::{AccessKind, AccessMode};
use notify::{EventKind, RecommendedWatcher, RecursiveMode, Watcher};
use tokio::sync::Notify;
use tracing::warn;

/// The files of a folder.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub(super) struct Listing {
    /// Texts by path within the folder; the last one that could be read.
    pub files: BTreeMap<String, Arc<str>>,
    /// Files that are there and cannot be read, and why.
    pub unreadable: BTreeMap<String, String>,
}

/// Wakes `touched` when something in the folder was written. `None` when the folder cannot be watched;
/// reading it from time to time has to do.
pub(super) fn watch(folder: &Path, touched: &Arc<Notify>) -> Option<RecommendedWatcher> {
    let wake = touched.clone();
    let watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
        // Our own reading is an event too.
        let is_write = !matches!(
            event,
            Ok(notify::Event {
                kind: EventKind::Access(access),
                ..
            }) if access != AccessKind::Close(AccessMode::Write)
        );
        if is_write {
            wake.notify_one();
        }
    });
    let started = watcher.and_then(|mut w| {
        w.watch(folder, RecursiveMode::Recursive)?;
        Ok(w)
    });
    match started {
        Ok(watcher) => Some(watcher),
        // A folder that is not there is reported by who reads it.
        Err(_) if !folder.exists() => None,
        Err(e) => {
            warn!(folder = %folder.display(), error = %e, "cannot watch the folder; reading it from time to time");
            None
        }
    }
}

/// Reads every manifest. A file that cannot be read keeps its text in `before`.
pub(super) async fn read(folder: PathBuf, before: Listing) -> Result<Listing, String> {
    let task = tokio::task::spawn_blocking(move || {
        let mut listing = Listing::default();
        walk(&folder, "", &before, &mut listing)
            .map_err(|e| format!("cannot read the folder {}: {e}", folder.display()))?;
        Ok(listing)
    });
    task.await
        .unwrap_or_else(|e| Err(format!("reading the folder was cut short: {e}")))
}

/// The text of every manifest of a folder, or of one file, read once: by path within the folder.
///
/// # Errors
/// What cannot be read, and why; one line each.
pub(crate) fn texts(path: &Path) -> Result<BTreeMap<String, Arc<str>>, Vec<String>> {
    let failed = |e: std::io::Error| vec![format!("{}: {e}", path.display())];
    if path.is_file() {
        let text = fs::read_to_string(path).map_err(failed)?;
        return Ok([(path.display().to_string(), text.into())].into());
    }
    let mut listing = Listing::default();
    walk(path, "", &Listing::default(), &mut listing).map_err(failed)?;
    if listing.unreadable.is_empty() {
        return Ok(listing.files);
    }
    let unreadable = listing.unreadable.into_iter();
    Err(unreadable
        .map(|(path, why)| format!("{path}: {why}"))
        .collect())
}

fn walk(folder: &Path, prefix: &str, before: &Listing, into: &mut Listing) -> std::io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let name = entry.file_name();
        let Some(name) = name.to_str() else {
            into.unreadable.insert(
                format!("{prefix}{}", name.to_string_lossy()),
                "its name is not UTF-8".to_owned(),
            );
            continue;
        };
        // Editors' leftovers, and the bookkeeping of mounted ConfigMaps.
        if name.starts_with('.') {
            continue;
        }
        let path = format!("{prefix}{name}");
        // A link to a folder is not followed: it could lead back.
        if entry.file_type()?.is_dir() {
            match walk(&entry.path(), &format!("{path}/"), before, into) {
                Ok(()) => {}
                Err(e) if e.kind() == ErrorKind::NotFound => {}
                Err(e) => keep_folder(&path, &e.to_string(), before, into),
            }
        } else if is_manifest(name) {
            match fs::read(entry.path()).map(String::from_utf8) {
                Ok(Ok(text)) => {
                    into.files.insert(path, text.into());
                }
                Ok(Err(_)) => keep(path, "it is not UTF-8".to_owned(), before, into),
                // It went away between listing and reading.
                Err(e) if e.kind() == ErrorKind::NotFound => {}
                Err(e) => keep(path, format!("it cannot be read: {e}"), before, into),
            }
        }
    }
    Ok(())
}

fn is_manifest(name: &str) -> bool {
    Path::new(name)
        .extension()
        .is_some_and(|e| e == "yaml" || e == "yml" || e == "json")
}

fn keep(path: String, reason: String, before: &Listing, into: &mut Listing) {
    if let Some(text) = before.files.get(&path) {
        into.files.insert(path.clone(), text.clone());
    }
    into.unreadable.insert(path, reason);
}

fn keep_folder(path: &str, reason: &str, before: &Listing, into: &mut Listing) {
    let inside = format!("{path}/");
    for (file, text) in &before.files {
        if file.starts_with(&inside) {
            into.files.insert(file.clone(), text.clone());
        }
    }
    into.unreadable
        .insert(inside, format!("it cannot be read: {reason}"));
}
