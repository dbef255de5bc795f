//! Whatever comments and documents refer to is there: paths, files, decisions, targets, links, titles of
//! sections, labels. What the source itself must not name is `tidy.rs`.

#![allow(
    clippy::unwrap_used,
    reason = "a test, and clippy.toml excuses only its test functions"
)]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use weir_agent::conditions::{NodeFault, ObjectFault, PeerFault, PodFault};
use weir_common::reason::DropReason;

/// What somebody reads: a document, or comments that stand together.
struct Passage {
    path: String,
    line: usize,
    /// Comments lie on one line here, without their marks.
    text: String,
}

/// What there is to refer to.
#[derive(Default)]
struct Repository {
    /// Paths of files and folders from the root.
    paths: BTreeSet<String>,
    /// The titles of each document.
    titles: BTreeMap<String, Vec<String>>,
    /// The numbers of decisions.
    decisions: BTreeSet<u32>,
    /// The numbers of targets.
    targets: BTreeSet<u32>,
}

/// Folders of the repository that paths begin with.
const FOLDERS: &str =
    "agent bench cli cni common datapath deploy dns docs ebpf examples tests xtask";
/// Endings of files that are named without their folder.
const ENDINGS: [&str; 5] = [".rs", ".md", ".yaml", ".tpl", ".toml"];
/// Documents of others.
const ELSEWHERE: [&str; 1] = ["image-layout.md"];
/// What stands for a name that somebody gives.
const PLACEHOLDERS: [&str; 2] = ["NAME", "NNNN"];

#[test]
fn every_reference_leads_somewhere() {
    let repository = repository();
    let passages = passages();
    assert!(passages.len() > 1000, "the comments were not found");
    let mut wrong: Vec<String> = passages
        .iter()
        .flat_map(|it| dangling(it, &repository))
        .collect();
    wrong.sort();
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
}

#[test]
fn each_kind_of_reference_can_fail() {
    let repository = Repository {
        paths: [
            "docs",
            "docs/a.md",
            "docs/decisions",
            "docs/decisions/0007-b.md",
            "agent/src/line/takeover.rs",
            "agent/src/line",
            "agent/src",
            "agent",
        ]
        .map(str::to_owned)
        .into(),
        titles: [("docs/a.md".to_owned(), vec!["A pod's network".to_owned()])].into(),
        decisions: [7].into(),
        targets: [14].into(),
    };
    let cases = [
        ("See docs/a.md, or docs.", 0),
        ("See docs/b.md.", 1),
        ("(`agent/src/line/takeover.rs`)", 0),
        ("agent/src/line/takeover does it", 0),
        ("agent/src/line/, agent/src/{line,pods}", 0),
        ("agent/src/line/gone.rs", 1),
        ("agent/src/gone/", 1),
        (
            "line/takeover.rs and takeover.rs and /etc/gone.yaml and x.gone.yaml",
            1,
        ),
        ("line/over.rs", 1),
        ("docs/decisions/0007", 0),
        ("docs/decisions/0008", 1),
        ("decision 7, decision 8", 1),
        ("Decisions 7 and 9", 1),
        ("row 14 of the targets, row 15", 1),
        ("docs/a.md, \"A pod's network\"", 0),
        ("`docs/a.md` (\"A pod's network\")", 0),
        ("docs/a.md, \"A node's network\"", 1),
        ("\"A node's network\" in docs/a.md", 1),
        (
            "[a](a.md#a-pods-network) [b](https://example.org/b.md#c)",
            0,
        ),
        ("[a](a.md#a-nodes-network)", 1),
        ("[a](b.md)", 2),
    ];
    for (text, expected) in cases {
        let passage = Passage {
            path: "docs/c.md".to_owned(),
            line: 1,
            text: text.to_owned(),
        };
        let found = dangling(&passage, &repository);
        assert_eq!(found.len(), expected, "{text}: {found:?}");
    }
}

#[test]
fn the_index_of_decisions_is_whole() {
    let index = fs::read_to_string(root().join("docs/decisions/README.md")).unwrap();
    for path in paths() {
        let Some(name) = path.strip_prefix("docs/decisions/0") else {
            continue;
        };
        let text = fs::read_to_string(root().join(&path)).unwrap();
        let title = text.lines().next().unwrap().trim_start_matches("# ");
        let (number, title) = title.split_once(". ").unwrap();
        let row = format!("{number}. [{title}](0{name})\n");
        assert!(index.contains(&row), "lacks: {row}");
    }
}

/// Who reads a label in metrics or an Event finds it in the document, and nothing that does not exist.
#[test]
fn operations_explains_every_label() {
    let document = fs::read_to_string(root().join("docs/operations.md")).unwrap();
    let faults = [
        NodeFault::ALL
            .iter()
            .map(|it| it.label())
            .collect::<Vec<_>>(),
        ObjectFault::ALL.iter().map(|it| it.label()).collect(),
        PodFault::ALL.iter().map(|it| it.label()).collect(),
        PeerFault::ALL.iter().map(|it| it.label()).collect(),
    ];
    let headings = ["of the node", "of an object", "of a pod", "of another node"];
    for (heading, labels) in headings.iter().zip(&faults) {
        assert_eq!(unexplained(&document, heading, labels), [] as [&str; 0]);
    }
    let reasons: Vec<_> = DropReason::ALL.iter().map(|it| it.label()).collect();
    assert_eq!(unexplained(&document, "reason", &reasons), [] as [&str; 0]);
}

#[test]
fn a_label_that_is_not_explained_is_found() {
    let document = "| of a pod | what it means |\n|---|---|\n| `HostPort` | x |\n| `Old` | x |\n";
    let found = unexplained(document, "of a pod", &["HostPort", "DeviceGone"]);
    assert_eq!(found, ["DeviceGone: not explained", "Old: does not exist"]);
}

/// Labels without a row in the table with this first heading, and rows without a label.
fn unexplained(document: &str, heading: &str, labels: &[&str]) -> Vec<String> {
    let start = format!("| {heading} |");
    let rows: BTreeSet<&str> = document
        .lines()
        .skip_while(|line| !line.starts_with(&start))
        .skip(2)
        .take_while(|line| line.starts_with('|'))
        .filter_map(|row| row.strip_prefix("| `")?.split('`').next())
        .collect();
    let labels: BTreeSet<&str> = labels.iter().copied().collect();
    let lacking = labels.difference(&rows);
    let old = rows.difference(&labels);
    lacking
        .map(|it| format!("{it}: not explained"))
        .chain(old.map(|it| format!("{it}: does not exist")))
        .collect()
}

/// What a passage refers to and is not there.
fn dangling(passage: &Passage, repository: &Repository) -> Vec<String> {
    let text = &passage.text;
    let mut wrong = Vec::new();
    let mut report = |at: usize, what: String| {
        let line = passage.line + text[..at].matches('\n').count();
        wrong.push(format!("{}:{line}: {what}", passage.path));
    };
    for (at, word) in words(text) {
        let is_path = FOLDERS.split(' ').any(|it| {
            word.strip_prefix(it)
                .is_some_and(|rest| rest.starts_with('/'))
        });
        let is_file = ENDINGS.iter().any(|it| word.ends_with(it));
        if is_path && !repository.has(word) {
            report(at, format!("{word} is not there"));
        } else if !is_path && is_file && !repository.has_file(word) {
            report(at, format!("no file is called {word}"));
        }
        if let Some(title) = cited(text, at, word)
            && let Some((document, titles)) = repository.document(word)
            && !titles.iter().any(|it| it == title)
        {
            report(at, format!("{document} has no section \"{title}\""));
        }
    }
    for (at, number) in numbered(text, "ecision") {
        if !repository.decisions.contains(&number) {
            report(at, format!("there is no decision {number}"));
        }
    }
    for (at, number) in numbered(text, "row") {
        if !repository.targets.contains(&number) {
            report(at, format!("docs/targets.md has no row {number}"));
        }
    }
    if passage.path.ends_with(".md") {
        for (at, link) in links(text) {
            if let Some(what) = repository.broken(&passage.path, link) {
                report(at, what);
            }
        }
    }
    wrong
}

impl Repository {
    /// Whether a path leads to a file or folder; the ending of a module and what follows the number of a
    /// decision may lack.
    fn has(&self, path: &str) -> bool {
        let path = path.trim_end_matches('/');
        let is_number = path.strip_prefix("docs/decisions/").is_some_and(|it| {
            let number = it.parse();
            number.is_ok_and(|number| self.decisions.contains(&number))
        });
        let is_there = |ending: &&str| self.paths.contains(&format!("{path}{ending}"));
        is_number || ["", ".rs", ".md"].iter().any(is_there)
    }

    /// Whether a file somewhere ends in this name or path.
    fn has_file(&self, name: &str) -> bool {
        let ends = |path: &String| {
            let rest = path.strip_suffix(name);
            rest.is_some_and(|rest| rest.is_empty() || rest.ends_with('/'))
        };
        let is_open = PLACEHOLDERS.iter().any(|it| name.contains(it));
        is_open || ELSEWHERE.contains(&name) || self.paths.iter().any(ends)
    }

    fn document(&self, word: &str) -> Option<(&String, &Vec<String>)> {
        let named = |(path, _): &(&String, _)| *path == word || path.ends_with(&format!("/{word}"));
        self.titles.iter().find(named)
    }

    /// What is wrong with the target of a link in this document.
    fn broken(&self, document: &str, link: &str) -> Option<String> {
        if link.contains("://") || link.starts_with("mailto:") {
            return None;
        }
        let (path, anchor) = match link.split_once('#') {
            Some((path, anchor)) => (path, Some(anchor)),
            None => (link, None),
        };
        let target = match path {
            "" => document.to_owned(),
            _ => resolved(document, path),
        };
        if !self.paths.contains(&target) {
            return Some(format!(
                "the link {link} leads to {target}, which is not there"
            ));
        }
        let anchor = anchor?;
        let titles = self.titles.get(&target);
        let found = titles.is_some_and(|it| it.iter().any(|title| anchor_of(title) == anchor));
        (!found).then(|| format!("{target} has no section for #{anchor}"))
    }
}

/// A path relative to the folder of a document, from the root.
fn resolved(document: &str, path: &str) -> String {
    let mut parts: Vec<&str> = document.split('/').collect();
    parts.pop();
    for part in path.split('/') {
        match part {
            ".." => drop(parts.pop()),
            "." | "" => {}
            part => parts.push(part),
        }
    }
    parts.join("/")
}

/// The anchor that GitHub gives a title.
fn anchor_of(title: &str) -> String {
    let kept = |c: &char| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_');
    let lower = title.to_lowercase();
    lower
        .chars()
        .filter(kept)
        .collect::<String>()
        .replace(' ', "-")
}

/// Words that may be paths, with where they begin. One that begins with a slash is not of the repository; one
/// with a pattern in it, as `{a,b}` or `*`, is known up to there.
fn words(text: &str) -> impl Iterator<Item = (usize, &str)> {
    let is_inside = |c: char| c.is_alphanumeric() || matches!(c, '/' | '.' | '_' | '-');
    let mut rest = 0;
    std::iter::from_fn(move || {
        let start = rest + text[rest..].find(is_inside)?;
        let length = text[start..].find(|c| !is_inside(c));
        let end = length.map_or(text.len(), |it| start + it);
        rest = end;
        Some((start, end))
    })
    .filter_map(move |(start, end)| {
        let before = text[..start].chars().next_back();
        let is_of_another =
            before.is_some_and(|c| matches!(c, '$' | '~' | '}' | '@' | ':' | '<' | '>' | '*'));
        let word = text[start..end].trim_end_matches(['.', '-']);
        let is_pattern = text[end..].starts_with(['{', '*', '<', '$']);
        let word = match is_pattern {
            true => word.rsplit_once('/').map_or("", |(folder, _)| folder),
            false => word,
        };
        let is_ours = !word.is_empty() && !word.starts_with(['/', '.']) && !word.contains("//");
        (is_ours && !is_of_another).then_some((start, word))
    })
}

/// The titles that are cited beside the document named at `at`: `document, "Title"`, `document ("Title")` or
/// `"Title" in document`.
fn cited<'a>(text: &'a str, at: usize, word: &str) -> Option<&'a str> {
    let after = text[at + word.len()..].trim_start_matches('`');
    let after = [", \"", " (\"", ",\n\""]
        .iter()
        .find_map(|it| after.strip_prefix(it));
    if let Some(after) = after {
        return after.split('"').next();
    }
    let before = text[..at].trim_end_matches('`').strip_suffix(" in ")?;
    before.strip_suffix('"')?.rsplit('"').next()
}

/// The numbers that follow a word, with where it is: `decision 7`, `decisions 7 and 9`.
fn numbered<'a>(text: &'a str, word: &'a str) -> impl Iterator<Item = (usize, u32)> {
    text.match_indices(word).flat_map(move |(at, _)| {
        let rest = &text[at + word.len()..];
        let rest = rest.strip_prefix('s').unwrap_or(rest);
        let mut numbers = Vec::new();
        let mut rest = rest.strip_prefix([' ', '\n']);
        while let Some(text) = rest {
            let end = text.find(|c: char| !c.is_ascii_digit());
            let (number, after) = text.split_at(end.unwrap_or(text.len()));
            numbers.extend(number.parse::<u32>().map(|number| (at, number)));
            let more = [" and ", ", "].iter().find_map(|it| after.strip_prefix(it));
            rest = more.filter(|_| !number.is_empty());
        }
        numbers
    })
}

/// Targets of Markdown's links.
fn links(text: &str) -> impl Iterator<Item = (usize, &str)> {
    text.match_indices("](").filter_map(|(at, _)| {
        let target = text[at + 2..].split(')').next()?;
        (!target.contains(char::is_whitespace)).then_some((at, target))
    })
}

fn root() -> PathBuf {
    Path::new(&std::env::var("CARGO_MANIFEST_DIR").unwrap())
        .parent()
        .unwrap()
        .to_path_buf()
}

/// Every file and folder below the root, but what is built or hidden.
fn paths() -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    let mut folders = vec![root()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            if name == "target" || name == ".git" {
                continue;
            }
            let relative = path.strip_prefix(root()).unwrap();
            found.insert(relative.to_string_lossy().into_owned());
            if path.is_dir() {
                folders.push(path);
            }
        }
    }
    found
}

fn repository() -> Repository {
    let paths = paths();
    let read = |path: &String| fs::read_to_string(root().join(path)).unwrap();
    let documents = paths.iter().filter(|it| it.ends_with(".md"));
    let titles = documents.map(|path| {
        let prose = without_code(&read(path));
        let titles = prose.lines().filter_map(|line| {
            let title = line.trim_start_matches('#').strip_prefix(' ')?;
            line.starts_with('#').then(|| title.trim().to_owned())
        });
        (path.clone(), titles.collect())
    });
    let titles = titles.collect();
    let decisions = paths.iter().filter_map(|path| {
        let name = path.strip_prefix("docs/decisions/")?;
        name.split('-').next()?.parse().ok()
    });
    let decisions = decisions.collect();
    let targets = paths.get("docs/targets.md").map(read).unwrap_or_default();
    let targets = targets
        .lines()
        .filter_map(|line| line.strip_prefix("| ")?.split(' ').next()?.parse().ok());
    let targets = targets.collect();
    Repository {
        paths,
        titles,
        decisions,
        targets,
    }
}

fn passages() -> Vec<Passage> {
    let mut found = Vec::new();
    for path in paths() {
        let mark = match path.rsplit('.').next() {
            Some("md") => {
                let text = without_code(&fs::read_to_string(root().join(&path)).unwrap());
                found.push(Passage {
                    path,
                    line: 1,
                    text,
                });
                continue;
            }
            Some("rs") => "//",
            Some("toml" | "yaml") => "#",
            _ => continue,
        };
        let text = fs::read_to_string(root().join(&path)).unwrap();
        found.extend(comments(&path, &text, mark));
    }
    found
}

/// Comments that are lines of their own; those that follow one another are one passage.
fn comments(path: &str, text: &str, mark: &str) -> Vec<Passage> {
    let mut found: Vec<Passage> = Vec::new();
    let mut end = 0;
    for (number, line) in (1..).zip(text.lines()) {
        let Some(comment) = line.trim_start().strip_prefix(mark) else {
            continue;
        };
        let comment = comment.trim_start_matches(['/', '!', '#']).trim();
        match found.last_mut() {
            Some(last) if end + 1 == number => {
                last.text.push(' ');
                last.text.push_str(comment);
            }
            _ => found.push(Passage {
                path: path.to_owned(),
                line: number,
                text: comment.to_owned(),
            }),
        }
        end = number;
    }
    found
}

/// A document with its blocks of code emptied: what stands there is a user's to type.
fn without_code(document: &str) -> String {
    let mut is_code = false;
    let lines = document.lines().map(|line| {
        let is_fence = line.trim_start().starts_with("```");
        is_code ^= is_fence;
        match is_fence || is_code {
            true => "\n".to_owned(),
            false => format!("{line}\n"),
        }
    });
    lines.collect()
}
