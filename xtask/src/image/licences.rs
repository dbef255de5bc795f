//! The texts of the licences of all that an image's programs are made of: ours, those of every crate that is
//! compiled into them, of the Rust standard library and of the C library. Which licences are allowed is not
//! here: `deny.toml` has that.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, bail};
use serde_json::Value;

use super::layer::File;
use crate::build::cargo;
use crate::command::printed;
use crate::workspace::Workspace;

/// Where they are in the image.
const FOLDER: &str = "usr/share/licenses/weir";
/// How the names of files begin that a crate's authors want to be passed on.
const NAMES: [&str; 6] = [
    "licen",
    "copying",
    "copyright",
    "notice",
    "unlicense",
    "patents",
];
/// The licence whose text is the same for all who use it, which some crates therefore leave out.
const USUAL: &str = "Apache-2.0";

/// A crate that is in the image.
#[derive(Debug, Eq, Ord, PartialEq, PartialOrd)]
struct Crate {
    name: String,
    version: String,
    /// As its manifest states it.
    licence: String,
    folder: PathBuf,
}

/// The files for an image with the programs of these packages.
///
/// # Errors
/// A crate's text cannot be found: an image without it must not be given to others.
pub(crate) fn files(
    workspace: &Workspace,
    target: &str,
    packages: &[&str],
) -> anyhow::Result<Vec<File>> {
    let root = workspace.root();
    let mut files = vec![text("LICENSE", &root.join("LICENSE"))?];
    let folder = root.join("LICENSES");
    for entry in fs::read_dir(&folder).with_context(|| format!("read {}", folder.display()))? {
        let path = entry?.path();
        files.push(text(&name_of(&path), &path)?);
    }
    let sysroot = printed(Command::new("rustc").args(["--print", "sysroot"]))
        .context("ask rustc where it is installed")?;
    let library = Path::new(sysroot.trim()).join("share/doc/rust/COPYRIGHT-library.html");
    files.push(text("RUST-STANDARD-LIBRARY.html", &library)?);

    let mut metadata = cargo(workspace);
    metadata.args([
        "metadata",
        "--format-version",
        "1",
        "--filter-platform",
        target,
    ]);
    let metadata = printed(&mut metadata).context("ask cargo what is compiled")?;
    let metadata = serde_json::from_str(&metadata).context("read what cargo says")?;
    let usual = fs::read_to_string(root.join("LICENSE")).context("read our licence")?;
    let third_party = collected(&compiled(&metadata, packages)?, &usual)?;
    files.push(File::text(
        format!("{FOLDER}/THIRD-PARTY.txt"),
        third_party.into_bytes(),
    ));
    Ok(files)
}

fn text(name: &str, from: &Path) -> anyhow::Result<File> {
    let bytes = fs::read(from).with_context(|| format!("read {}", from.display()))?;
    Ok(File::text(format!("{FOLDER}/{name}"), bytes))
}

/// Crates of others that are compiled into the packages. What only runs while they are compiled is not in them.
fn compiled(metadata: &Value, packages: &[&str]) -> anyhow::Result<BTreeSet<Crate>> {
    let list = |value: &Value| value.as_array().cloned().unwrap_or_default();
    let word = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let known: BTreeMap<String, Value> = list(&metadata["packages"])
        .into_iter()
        .map(|package| (word(&package["id"]), package))
        .collect();
    let needs: BTreeMap<String, Value> = list(&metadata["resolve"]["nodes"])
        .into_iter()
        .map(|node| (word(&node["id"]), node["deps"].clone()))
        .collect();
    let is_ours = |package: &Value| package["source"].is_null();
    let mut waiting = Vec::new();
    for name in packages {
        let ours = |(_, package): &(&String, &Value)| is_ours(package) && package["name"] == *name;
        let found = known.iter().find(ours);
        waiting.push(
            found
                .with_context(|| format!("no package {name}"))?
                .0
                .clone(),
        );
    }
    let (mut seen, mut crates) = (BTreeSet::new(), BTreeSet::new());
    while let Some(id) = waiting.pop() {
        let package = known
            .get(&id)
            .context("a package that cargo does not describe")?;
        let is_macro = list(&package["targets"]).iter().any(|target| {
            list(&target["kind"])
                .iter()
                .any(|kind| kind == "proc-macro")
        });
        if is_macro || !seen.insert(id.clone()) {
            continue;
        }
        if !is_ours(package) {
            let manifest = PathBuf::from(word(&package["manifest_path"]));
            crates.insert(Crate {
                name: word(&package["name"]),
                version: word(&package["version"]),
                licence: word(&package["license"]),
                folder: manifest
                    .parent()
                    .context("a manifest is in a folder")?
                    .to_owned(),
            });
        }
        for needed in needs.get(&id).map(list).unwrap_or_default() {
            // The kind of a dependency that is neither for tests nor for the build has no name.
            if list(&needed["dep_kinds"])
                .iter()
                .any(|it| it["kind"].is_null())
            {
                waiting.push(word(&needed["pkg"]));
            }
        }
    }
    Ok(crates)
}

/// Each text once, after the crates that come with it.
fn collected(crates: &BTreeSet<Crate>, usual: &str) -> anyhow::Result<String> {
    let mut texts: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for it in crates {
        let mut found = texts_in(&it.folder)?;
        if found.is_empty() {
            if !it.licence.split(" OR ").any(|choice| choice == USUAL) {
                bail!(
                    "{} {} ({}) comes without the text of its licence",
                    it.name,
                    it.version,
                    it.licence
                );
            }
            found.insert(usual.to_owned());
        }
        for text in found {
            let by = format!("{} {} ({})", it.name, it.version, it.licence);
            texts.entry(text).or_default().push(by);
        }
    }
    let mut out =
        "The programs in this image contain these crates, under these licences.\n".to_owned();
    for (text, crates) in texts {
        let rule = "=".repeat(80);
        // Writing to a String cannot fail.
        write!(
            out,
            "\n{rule}\n{}\n\n{}\n",
            crates.join("\n"),
            text.trim_end()
        )
        .ok();
    }
    Ok(out)
}

/// The texts that are in a crate's folder.
fn texts_in(folder: &Path) -> anyhow::Result<BTreeSet<String>> {
    let mut texts = BTreeSet::new();
    for entry in fs::read_dir(folder).with_context(|| format!("read {}", folder.display()))? {
        let path = entry?.path();
        let name = name_of(&path).to_lowercase();
        if path.is_file() && NAMES.iter().any(|begins| name.starts_with(begins)) {
            let bytes = fs::read(&path).with_context(|| format!("read {}", path.display()))?;
            // The same text with other ends of lines is the same.
            let text = String::from_utf8_lossy(&bytes).replace("\r\n", "\n");
            texts.insert(text.trim().to_owned());
        }
    }
    Ok(texts)
}

fn name_of(path: &Path) -> String {
    let name = path.file_name().unwrap_or_default();
    name.to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    use serde_json::json;

    fn package(name: &str, source: Option<&str>, kind: &str) -> Value {
        json!({
            "id": name, "name": name, "version": "1.0.0", "license": "MIT", "source": source,
            "manifest_path": format!("/crates/{name}/Cargo.toml"), "targets": [{"kind": [kind]}],
        })
    }

    fn needs(name: &str, others: &[(&str, Option<&str>)]) -> Value {
        let others: Vec<Value> = others
            .iter()
            .map(|(other, kind)| json!({"pkg": other, "dep_kinds": [{"kind": kind}]}))
            .collect();
        json!({"id": name, "deps": others})
    }

    #[test]
    fn only_what_is_compiled_into_the_programs_counts() {
        let theirs = Some("registry");
        let metadata = json!({
            "packages": [
                package("ours", None, "bin"),
                package("part", None, "lib"),
                package("other", None, "lib"),
                package("used", theirs, "lib"),
                package("deeper", theirs, "lib"),
                package("derive", theirs, "proc-macro"),
                package("syntax", theirs, "lib"),
                package("builder", theirs, "lib"),
                package("tester", theirs, "lib"),
                package("elsewhere", theirs, "lib"),
            ],
            "resolve": {"nodes": [
                needs("ours", &[("part", None), ("derive", None), ("builder", Some("build"))]),
                needs("part", &[("used", None), ("tester", Some("dev"))]),
                needs("used", &[("deeper", None), ("used", None)]),
                needs("derive", &[("syntax", None)]),
                needs("other", &[("elsewhere", None)]),
            ]},
        });
        let found = compiled(&metadata, &["ours"]).unwrap();
        let names: Vec<&str> = found.iter().map(|it| it.name.as_str()).collect();
        assert_eq!(names, ["deeper", "used"]);
        compiled(&metadata, &["unknown"]).unwrap_err();
    }

    #[test]
    fn a_crate_without_a_text_is_refused_unless_all_know_it() {
        // This package brings no text.
        let bare = |licence: &str| {
            BTreeSet::from([Crate {
                name: "bare".into(),
                version: "1.0.0".into(),
                licence: licence.into(),
                folder: Path::new(env!("CARGO_MANIFEST_DIR")).join("src"),
            }])
        };
        let text = collected(&bare("MIT OR Apache-2.0"), "the usual text").unwrap();
        assert!(
            text.contains("bare 1.0.0 (MIT OR Apache-2.0)\n\nthe usual text\n"),
            "{text}"
        );
        let error = collected(&bare("MIT"), "the usual text").unwrap_err();
        assert!(error.to_string().contains("bare 1.0.0"), "{error}");
    }
}
