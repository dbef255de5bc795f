//! The rules that `docs/architecture.md` states in its tables, checked against the source. What the
//! rules are is there; here is only how each kind is read and checked, and that each can fail.

#![allow(
    clippy::unwrap_used,
    reason = "a test, and clippy.toml excuses only its test functions"
)]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A file of Rust: its path from the root of the repository, and its text.
struct Source {
    path: String,
    text: String,
}

/// What one crate asks for: `(name, normal or build or dev)`.
type Dependencies = BTreeMap<String, Vec<(String, Kind)>>;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Shipped,
    Test,
}

#[test]
fn the_source_names_nothing_it_must_not() {
    let violations = absences(&document(), &sources());
    assert!(violations.is_empty(), "\n{}", violations.join("\n"));
}

#[test]
fn crates_depend_on_nothing_they_must_not() {
    let violations = dependencies(&document(), &workspace_dependencies());
    assert!(violations.is_empty(), "\n{}", violations.join("\n"));
}

#[test]
fn every_source_file_has_the_shape() {
    let violations = shapes(&document(), &sources());
    assert!(violations.is_empty(), "\n{}", violations.join("\n"));
}

#[test]
fn the_code_map_names_folders_that_exist() {
    let violations = folders(&document(), |folder| root().join(folder).is_dir());
    assert!(violations.is_empty(), "\n{}", violations.join("\n"));
}

/// Text, where a rule about it is broken, and where not.
#[test]
fn each_absence_can_fail() {
    let cases = [
        (
            "cli/src/main.rs",
            "use aya_ebpf::maps::Array;",
            "ebpf/src/maps.rs",
        ),
        (
            "agent/src/apply/table.rs",
            "let map = aya::maps::Array::new();",
            "agent/src/kernel/a.rs",
        ),
        (
            "agent/src/pods/lease.rs",
            "use rtnetlink::Handle;",
            "cni/src/link.rs",
        ),
        (
            "agent/src/kernel/second_lock.rs",
            "let listed = Command::new(\"nft\").output();",
            "agent/src/keep/mod.rs",
        ),
        (
            "agent/src/compile/service.rs",
            "fn a(b: k8s_openapi::B) {}",
            "agent/src/watch/kube.rs",
        ),
        (
            "agent/src/app.rs",
            "use kube::Client;",
            "agent/src/model/convert.rs",
        ),
        (
            "dns/src/main.rs",
            "use kube::Client;",
            "tests/src/control.rs",
        ),
        (
            "agent/src/compile/policy/a.rs",
            "let t = std::time::Instant::now();",
            "agent/src/app.rs",
        ),
        (
            "agent/src/compile/name.rs",
            "tokio::spawn(async {});",
            "agent/src/apply/mod.rs",
        ),
        (
            "agent/src/compile/name.rs",
            "use std::{fs, net::IpAddr};",
            "agent/src/pods/lease.rs",
        ),
        (
            "agent/src/apply/delta.rs",
            "let now = SystemTime::UNIX_EPOCH;",
            "agent/src/apply/table.rs",
        ),
        (
            "cni/src/netns.rs",
            "unsafe { libc::setns(fd, 0) };",
            "agent/src/kernel/netns.rs",
        ),
        (
            "agent/src/app.rs",
            "static COUNT: AtomicU32 = AtomicU32::new(0);",
            "ebpf/src/maps.rs",
        ),
        (
            "agent/src/app.rs",
            "thread_local! { static A: u8 = 1; }",
            "tests/src/run.rs",
        ),
    ];
    for (wrong, text, right) in cases {
        let found = |path: &str| {
            let source = Source {
                path: path.to_owned(),
                text: text.to_owned(),
            };
            absences(&document(), &[source]).len()
        };
        assert_eq!(found(wrong), 1, "{wrong}: {text}");
        assert_eq!(found(right), 0, "{right}: {text}");
    }
}

#[test]
fn comments_strings_and_longer_words_are_not_violations() {
    let texts = [
        "// unsafe, static, tokio\n/// unsafe\n/* static /* unsafe */ static */ fn a() {}",
        r##"const A: &str = "unsafe \" static"; const B: &str = r#"tokio " unsafe"#;"##,
        "fn a(b: &'static str, c: char) -> bool { c == '\"' || c == '\\'' }",
        "#![deny(unsafe_op_in_unsafe_fn)] fn ecstatic() {}",
        "use crate::watch::kube::Cluster; fn f() { crate::kernel::aya::x() }",
    ];
    for text in texts {
        let source = Source {
            path: "agent/src/compile/a.rs".to_owned(),
            text: text.to_owned(),
        };
        assert_eq!(absences(&document(), &[source]), [] as [&str; 0], "{text}");
    }
    // What follows a string or a quote character is code again.
    for text in [
        "f(\"a\\\\\"); unsafe {}",
        "f('\"'); unsafe {}",
        "f(r\"\\\"); unsafe {}",
    ] {
        let source = Source {
            path: "dns/src/a.rs".to_owned(),
            text: text.to_owned(),
        };
        assert_eq!(absences(&document(), &[source]).len(), 1, "{text}");
    }
}

#[test]
fn each_dependency_rule_can_fail() {
    let cases = [
        ("weir-datapath", "weir-agent", Kind::Shipped, 1),
        ("weir-datapath", "serde", Kind::Shipped, 1),
        ("weir-datapath", "proptest", Kind::Test, 0),
        ("weir-datapath", "weir-common", Kind::Shipped, 0),
        ("weir-common", "tokio", Kind::Shipped, 1),
        ("weir-dns", "weir-agent", Kind::Test, 1),
        ("weir-cli", "weir-agent", Kind::Shipped, 1),
        ("weir-tests", "weir-agent", Kind::Shipped, 0),
        ("xtask", "serde", Kind::Shipped, 1),
        ("weir-unheard-of", "serde", Kind::Shipped, 1),
    ];
    for (krate, name, kind, expected) in cases {
        let planted = BTreeMap::from([(krate.to_owned(), vec![(name.to_owned(), kind)])]);
        let found = dependencies(&document(), &planted).len();
        assert_eq!(found, expected, "{krate} on {name}");
    }
}

#[test]
fn each_shape_can_fail() {
    let cases = [
        ("//! What is here.\n".to_owned(), 0),
        ("// What is here.\n".to_owned(), 1),
        ("\n//! What is here.\n".to_owned(), 1),
        (format!("//! Long.\n{}", "\n".repeat(599)), 0),
        (format!("//! Long.\n{}", "\n".repeat(600)), 1),
    ];
    for (text, expected) in cases {
        let source = Source {
            path: "dns/src/a.rs".to_owned(),
            text,
        };
        assert_eq!(shapes(&document(), &[source]).len(), expected);
    }
    let of = |lines: usize| {
        let text = format!("//! A.\n\n{}", "// b\nfn c() {}\n".repeat(lines));
        let text = text + "#[cfg(test)]\n" + &"mod d {}\n".repeat(20);
        let path = "ebpf/src/a.rs".to_owned();
        let found = shapes(&document(), &[Source { path, text }]);
        found.iter().any(|it| it.starts_with("lines of code"))
    };
    assert_eq!([of(7000), of(7001)], [false, true]);
}

#[test]
fn the_code_map_can_fail() {
    let map =
        "| folder | what is there |\n|---|---|\n| `dns/` | the zone |\n| `a/` | planned: b |\n";
    assert_eq!(folders(map, |folder| folder == "dns/"), [] as [&str; 0]);
    assert_eq!(folders(map, |_| false).len(), 1);
    assert_eq!(folders(map, |_| true).len(), 1);
}

#[test]
#[should_panic(expected = "no table that begins with | shape |")]
fn a_document_without_its_tables_fails() {
    shapes("# Architecture", &[]);
}

/// Where a pattern that must be absent is there.
fn absences(document: &str, sources: &[Source]) -> Vec<String> {
    let mut violations = Vec::new();
    for source in sources {
        let code = code_only(&source.text);
        for row in table(document, "invariant") {
            let [rule, places, patterns, excepted] = &row[..] else {
                panic!("four columns, not {row:?}")
            };
            let inside = |places: &str| {
                quoted(places)
                    .iter()
                    .any(|place| is_inside(&source.path, place))
            };
            if !inside(places) || inside(excepted) {
                continue;
            }
            for pattern in quoted(patterns) {
                if let Some(line) = line_naming(&code, &pattern) {
                    let path = &source.path;
                    violations.push(format!("{path}:{line}: names `{pattern}`, but {rule}"));
                }
            }
        }
    }
    violations
}

fn dependencies(document: &str, workspace: &Dependencies) -> Vec<String> {
    let rules = table(document, "crate");
    let mut violations = Vec::new();
    for (krate, asked) in workspace {
        let Some(rule) = rules.iter().find(|row| quoted(&row[0]) == [krate.as_str()]) else {
            violations.push(format!("{krate}: has no row in docs/architecture.md"));
            continue;
        };
        let (ours, outside) = (quoted(&rule[1]), quoted(&rule[2]));
        for (name, kind) in asked {
            let allowed = if name.starts_with("weir-") {
                ours.contains(name)
            } else {
                *kind == Kind::Test || rule[2] == "any" || outside.contains(name)
            };
            if !allowed {
                violations.push(format!("{krate}: must not depend on {name}"));
            }
        }
    }
    violations
}

fn shapes(document: &str, sources: &[Source]) -> Vec<String> {
    let rules = table(document, "shape");
    let value = |shape: &str| {
        let row = rules.iter().find(|row| row[0] == shape);
        row.unwrap_or_else(|| panic!("no shape {shape}"))[1]
            .trim_matches('`')
            .to_owned()
    };
    let (beginning, most) = (
        value("begins with"),
        value("lines at most").parse::<usize>().unwrap(),
    );
    let mut violations = Vec::new();
    for Source { path, text } in sources {
        if !text.starts_with(&beginning) {
            violations.push(format!("{path}:1: begins without `{beginning}`"));
        }
        let lines = text.lines().count();
        if lines > most {
            violations.push(format!(
                "{path}: {lines} lines, at most {most}: what is its second reason to change?"
            ));
        }
    }
    const KERNEL: &str = "lines of code in `common`, `datapath` and `ebpf` together at most, without comments, blank lines and tests";
    let most = value(KERNEL).parse::<usize>().unwrap();
    let in_kernel = |source: &&Source| {
        let folders = ["common/", "datapath/", "ebpf/"];
        folders.iter().any(|it| source.path.starts_with(it))
    };
    let sizes = sources.iter().filter(in_kernel).map(size);
    let all: usize = sizes.sum();
    if all > most {
        violations.push(format!("{KERNEL}: {all}, at most {most}"));
    }
    violations
}

/// Lines of code of a file, up to its tests.
fn size(source: &Source) -> usize {
    let lines = source.text.lines().map(str::trim);
    let code = lines.take_while(|line| *line != "#[cfg(test)]");
    code.filter(|line| !line.is_empty() && !line.starts_with("//"))
        .count()
}

fn folders(document: &str, exists: impl Fn(&str) -> bool) -> Vec<String> {
    let mut violations = Vec::new();
    for row in table(document, "folder") {
        let planned = row[1].starts_with("planned: ");
        for folder in quoted(&row[0]) {
            match (planned, exists(&folder)) {
                (false, false) => violations.push(format!("{folder}: in the code map, not there")),
                (true, true) => violations.push(format!("{folder}: is there, so not `planned: `")),
                (true, false) | (false, true) => {}
            }
        }
    }
    violations
}

/// The rows of the table whose first heading is `heading`.
fn table(document: &str, heading: &str) -> Vec<Vec<String>> {
    let start = format!("| {heading} |");
    let mut lines = document
        .lines()
        .skip_while(|line| !line.starts_with(&start));
    assert!(lines.next().is_some(), "no table that begins with {start}");
    let rows: Vec<Vec<String>> = lines
        .skip(1)
        .take_while(|line| line.starts_with('|'))
        .map(|line| {
            line.trim_matches('|')
                .split('|')
                .map(|cell| cell.trim().to_owned())
                .collect()
        })
        .collect();
    assert!(!rows.is_empty(), "no rows under {start}");
    rows
}

/// What stands between backticks in a cell.
fn quoted(cell: &str) -> Vec<String> {
    cell.split('`')
        .skip(1)
        .step_by(2)
        .map(str::to_owned)
        .collect()
}

/// Whether a path begins with a place; `.` is everywhere. `agent/src/app` holds `agent/src/app.rs` and what is
/// in the folder of that name, and not `agent/src/apply`; `*/a/` is every folder `a`, however deep.
fn is_inside(path: &str, place: &str) -> bool {
    if let Some(folder) = place.strip_prefix("*/") {
        return path.starts_with(folder) || path.contains(&format!("/{folder}"));
    }
    place == "."
        || path.strip_prefix(place).is_some_and(|rest| {
            place.ends_with('/') || rest.is_empty() || rest.starts_with('/') || rest == ".rs"
        })
}

/// The first line that names `pattern` as whole words. A crate (`kube::`) is not meant when a path
/// leads to it (`watch::kube::`), and `'static` is not `static`.
fn line_naming(code: &str, pattern: &str) -> Option<usize> {
    let is_word = |c: char| c.is_alphanumeric() || c == '_';
    let is_crate = pattern.ends_with("::");
    code.match_indices(pattern).find_map(|(at, _)| {
        let before = code[..at].chars().next_back();
        let after = code[at + pattern.len()..].chars().next();
        let begins = before.is_none_or(|c| !is_word(c) && c != '\'' && !(is_crate && c == ':'));
        let ends = is_crate || after.is_none_or(|c| !is_word(c));
        (begins && ends).then(|| code[..at].matches('\n').count() + 1)
    })
}

/// The text with comments and the insides of literals replaced by nothing but their line breaks.
fn code_only(text: &str) -> String {
    let mut code = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        let (skipped, length) = match literal_or_comment(rest, code.chars().next_back()) {
            Some(length) => (true, length),
            None => (false, first.len_utf8()),
        };
        let (piece, after) = rest.split_at(length);
        if skipped {
            code.push(' ');
            code.extend(piece.chars().filter(|c| *c == '\n'));
        } else {
            code.push_str(piece);
        }
        rest = after;
    }
    code
}

/// How long the comment or literal at the beginning of `text` is, if one begins there.
fn literal_or_comment(text: &str, before: Option<char>) -> Option<usize> {
    let all = text.len();
    if text.starts_with("//") {
        return Some(text.find('\n').unwrap_or(all));
    }
    if text.starts_with("/*") {
        let mut depth = 0_usize;
        for (at, pair) in text.as_bytes().windows(2).enumerate() {
            match pair {
                b"/*" => depth += 1,
                b"*/" => depth -= 1,
                _ => continue,
            }
            if depth == 0 {
                return Some(at + 2);
            }
        }
        return Some(all);
    }
    if text.starts_with('"') {
        return Some(closing_quote(text, '"'));
    }
    let starts_word = before.is_none_or(|c| !c.is_alphanumeric() && c != '_');
    if starts_word && let Some(raw) = text.strip_prefix('r').or_else(|| text.strip_prefix("br")) {
        let hashes = raw.len() - raw.trim_start_matches('#').len();
        if let Some(inside) = raw[hashes..].strip_prefix('"') {
            let end = format!("\"{}", "#".repeat(hashes));
            let after = inside
                .find(&end)
                .map_or(0, |at| inside.len() - at - end.len());
            return Some(all - after);
        }
    }
    // A character, unless it is a lifetime: `'a'` and `'\n'`, not `'a`.
    let mut characters = text.strip_prefix('\'')?.chars();
    let inside = characters.next()?;
    (inside == '\\' || characters.next() == Some('\'')).then(|| closing_quote(text, '\''))
}

/// Where the quote ends that begins `text`.
fn closing_quote(text: &str, quote: char) -> usize {
    let mut escaped = false;
    for (at, c) in text.char_indices().skip(1) {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            c if c == quote => return at + c.len_utf8(),
            _ => {}
        }
    }
    text.len()
}

fn root() -> PathBuf {
    Path::new(&std::env::var("CARGO_MANIFEST_DIR").unwrap())
        .parent()
        .unwrap()
        .to_path_buf()
}

fn document() -> String {
    fs::read_to_string(root().join("docs/architecture.md")).unwrap()
}

fn sources() -> Vec<Source> {
    let mut found = Vec::new();
    let mut folders = vec![root()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            if path.is_dir() {
                if name != "target" && !name.starts_with('.') {
                    folders.push(path);
                }
            } else if name.ends_with(".rs") {
                let text = fs::read_to_string(&path).unwrap();
                let path = path
                    .strip_prefix(root())
                    .unwrap()
                    .to_string_lossy()
                    .into_owned();
                found.push(Source { path, text });
            }
        }
    }
    assert!(found.len() > 10, "the source was not found");
    found
}

fn workspace_dependencies() -> Dependencies {
    let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".to_owned());
    let output = Command::new(cargo)
        .args([
            "metadata",
            "--no-deps",
            "--offline",
            "--format-version",
            "1",
        ])
        .current_dir(root())
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let metadata: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let name = |value: &serde_json::Value| value["name"].as_str().unwrap().to_owned();
    let packages = metadata["packages"].as_array().unwrap().iter();
    let asked = |package: &serde_json::Value| {
        let all = package["dependencies"].as_array().unwrap().iter();
        all.map(|dependency| {
            let is_test = dependency["kind"].as_str() == Some("dev");
            (
                name(dependency),
                if is_test { Kind::Test } else { Kind::Shipped },
            )
        })
        .collect()
    };
    packages
        .map(|package| (name(package), asked(package)))
        .collect()
}
