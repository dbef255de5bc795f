//! From the text of a manifest file to objects. A document that is wrong does not touch its neighbours:
//! the text is cut at the document markers before anything is parsed.
//!
//! YAML is read by serde-saphyr: maintained, without unsafe code, bounded against alias bombs, and in the
//! tree already through kube.

use std::fmt;
use std::sync::Arc;

use serde::Deserialize;
use serde_json::Value;
use serde_json::value::to_raw_value;

use super::wire::{self, decode};
use crate::model::convert::{self, Converted, FamilyRequest, Invalid};
use crate::model::{Kind, ObjectId, ObjectName};

/// Kinds that belong to a usual manifest and that others act on: not worth a word in the log.
const OTHERS: &[&str] = &[
    "ClusterRole",
    "ClusterRoleBinding",
    "ConfigMap",
    "CronJob",
    "DaemonSet",
    "Deployment",
    "HorizontalPodAutoscaler",
    "Ingress",
    "Job",
    "LimitRange",
    "PersistentVolume",
    "PersistentVolumeClaim",
    "PodDisruptionBudget",
    "ReplicaSet",
    "ResourceQuota",
    "Role",
    "RoleBinding",
    "Secret",
    "ServiceAccount",
    "StatefulSet",
    "StorageClass",
];

/// Where a document stands.
#[derive(Clone, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct Origin {
    /// Path within the folder.
    pub path: Arc<str>,
    /// Counted from 1; with a second number for an item of a `List`.
    pub document: usize,
    pub item: Option<usize>,
}

/// What a document turned out to be.
#[derive(Clone, Debug)]
pub enum Parsed {
    Ours(Document),
    /// An object of a kind that the agent does not read.
    Foreign(ForeignKind),
}

/// A kind that the agent does not read.
#[derive(Clone, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct ForeignKind {
    pub api_version: String,
    pub kind: String,
}

impl ForeignKind {
    /// Is it one that a usual manifest has?
    pub fn is_usual(&self) -> bool {
        OTHERS.contains(&self.kind.as_str())
    }
}

/// One object of one of our kinds, or the attempt at one.
#[derive(Clone, Debug)]
pub struct Document {
    pub origin: Origin,
    /// `None` when not even kind and name can be read.
    pub id: Option<ObjectId>,
    pub outcome: Result<Converted, Invalid>,
    /// Of a Service: the families it wants cluster IPs of.
    pub families: Option<FamilyRequest>,
    pub status: Status,
}

/// Does the manifest itself say how the object is?
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Status {
    Given,
    Absent,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} document {}", self.path, self.document)?;
        match self.item {
            Some(item) => write!(f, " item {item}"),
            None => Ok(()),
        }
    }
}

impl Document {
    /// How reports name it.
    pub fn label(&self) -> String {
        match &self.id {
            Some(id) => format!("{} ({id})", self.origin),
            None => self.origin.to_string(),
        }
    }
}

/// All documents of a file.
pub fn parse(path: &str, text: &str) -> Vec<Parsed> {
    let path: Arc<str> = path.into();
    let mut parsed = Vec::new();
    for (i, part) in split(text).into_iter().enumerate() {
        let origin = Origin {
            path: path.clone(),
            document: i + 1,
            item: None,
        };
        match serde_saphyr::from_str::<Value>(part.text) {
            Ok(Value::Null) => {}
            Ok(value) => objects(origin, value, &mut parsed),
            Err(e) => parsed.push(Parsed::Ours(refused(origin, yaml_error(&e, part.line)))),
        }
    }
    parsed
}

/// The objects of a file as they are written, those in lists among them. What is no YAML is left to [`parse`] to report.
pub(crate) fn written(path: &str, text: &str) -> Vec<(Origin, Value)> {
    let path: Arc<str> = path.into();
    let mut all = Vec::new();
    for (i, part) in split(text).into_iter().enumerate() {
        let origin = Origin {
            path: path.clone(),
            document: i + 1,
            item: None,
        };
        let Ok(mut value) = serde_saphyr::from_str::<Value>(part.text) else {
            continue;
        };
        let kind = value.get("kind").and_then(Value::as_str);
        let is_list = kind.is_some_and(|kind| kind.ends_with("List"));
        match value.get_mut("items").map(Value::take) {
            Some(Value::Array(items)) if is_list => {
                let numbered = items.into_iter().enumerate();
                all.extend(numbered.map(|(item, value)| {
                    let item = Some(item + 1);
                    (
                        Origin {
                            item,
                            ..origin.clone()
                        },
                        value,
                    )
                }));
            }
            _ => all.push((origin, value)),
        }
    }
    all
}

/// A piece of a file that is one YAML document.
struct Part<'a> {
    text: &'a str,
    /// The lines of the file before it.
    line: usize,
}

/// Cuts at `---`. Only a document marker can stand there at the start of a line (YAML 1.2, 9.1.2). Pieces
/// without content are left out, so that a leading marker does not count as a document.
fn split(text: &str) -> Vec<Part<'_>> {
    let mut parts = Vec::new();
    let (mut start, mut start_line, mut at) = (0, 0, 0);
    for (number, line) in text.split_inclusive('\n').enumerate() {
        let is_marker = line
            .strip_prefix("---")
            .is_some_and(|rest| rest.is_empty() || rest.starts_with(char::is_whitespace));
        if is_marker {
            parts.push(Part {
                text: &text[start..at],
                line: start_line,
            });
            (start, start_line) = (at, number);
        }
        at += line.len();
    }
    parts.push(Part {
        text: &text[start..],
        line: start_line,
    });
    parts.retain(|part| {
        part.text.lines().any(|l| {
            let l = l.trim();
            !l.is_empty() && !l.starts_with('#') && l != "---" && l != "..."
        })
    });
    parts
}

fn yaml_error(error: &serde_saphyr::Error, lines_before: usize) -> String {
    let error = error.without_snippet();
    let text = error.to_string();
    let text = text.lines().next().unwrap_or_default();
    match error.location() {
        Some(location) => {
            let line = usize::try_from(location.line()).unwrap_or(0) + lines_before;
            let cause = text
                .split_once(" at line ")
                .map_or(text, |(cause, _)| cause);
            format!("line {line}: not YAML: {cause}")
        }
        None => format!("not YAML: {text}"),
    }
}

fn refused(origin: Origin, reason: String) -> Document {
    Document {
        origin,
        id: None,
        outcome: Err(Invalid::from(reason)),
        families: None,
        status: Status::Absent,
    }
}

/// The object in a document, or the objects in its list.
fn objects(origin: Origin, mut value: Value, parsed: &mut Vec<Parsed>) {
    let text = |field: &str| value.get(field).and_then(Value::as_str).map(str::to_owned);
    let (Some(api_version), Some(kind)) = (text("apiVersion"), text("kind")) else {
        parsed.push(Parsed::Ours(refused(
            origin,
            "it has no apiVersion and kind".to_owned(),
        )));
        return;
    };
    if kind.ends_with("List")
        && let Some(Value::Array(items)) = value.get_mut("items").map(Value::take)
    {
        for (i, item) in items.into_iter().enumerate() {
            let origin = Origin {
                item: Some(i + 1),
                ..origin.clone()
            };
            objects(origin, item, parsed);
        }
        return;
    }
    let kind = match (api_version.as_str(), kind.as_str()) {
        ("v1", "Service") => Kind::Service,
        ("v1", "Pod") => Kind::Pod,
        ("v1", "Namespace") => Kind::Namespace,
        ("v1", "Node") => Kind::Node,
        ("discovery.k8s.io/v1", "EndpointSlice") => Kind::EndpointSlice,
        ("networking.k8s.io/v1", "NetworkPolicy") => Kind::NetworkPolicy,
        // The types of the two are the same.
        (
            "policy.networking.k8s.io/v1alpha2" | "policy.networking.k8s.io/v1beta1",
            "ClusterNetworkPolicy",
        ) => Kind::ClusterNetworkPolicy,
        _ => {
            parsed.push(Parsed::Foreign(ForeignKind { api_version, kind }));
            return;
        }
    };
    parsed.push(Parsed::Ours(object(origin, kind, value)));
}

/// An object of one of our kinds.
pub(crate) fn object(origin: Origin, kind: Kind, mut value: Value) -> Document {
    settle_namespace(kind, &mut value);
    // Read as what the API server sends is: one way from text to objects.
    let text = to_raw_value(&value).expect("keys are strings, so it is JSON");
    let (meta, mut outcome) = match kind {
        Kind::Service => decode::<wire::Service>(&text),
        Kind::EndpointSlice => decode::<wire::EndpointSlice>(&text),
        Kind::Pod => decode::<wire::Pod>(&text),
        Kind::Namespace => decode::<wire::Namespace>(&text),
        Kind::Node => decode::<wire::Node>(&text),
        Kind::NetworkPolicy => decode::<wire::NetworkPolicy>(&text),
        Kind::ClusterNetworkPolicy => decode::<wire::ClusterNetworkPolicy>(&text),
    };
    let families = match kind {
        Kind::Service => {
            let wanted = value
                .get("spec")
                .map(wire::Families::deserialize)
                .and_then(Result::ok)
                .unwrap_or_default();
            match convert::family_request(&wanted) {
                Ok(request) => Some(request),
                Err(reason) => {
                    outcome = outcome.and(Err(Invalid::from(reason)));
                    None
                }
            }
        }
        _ => None,
    };
    let has_status = value
        .get("status")
        .and_then(Value::as_object)
        .is_some_and(|s| !s.is_empty());
    Document {
        origin,
        id: (!meta.name.is_empty()).then(|| ObjectId {
            kind,
            name: ObjectName::new(meta.namespace, meta.name),
        }),
        outcome,
        families,
        status: if has_status {
            Status::Given
        } else {
            Status::Absent
        },
    }
}

/// Where no namespace is given, `kubectl` would put `default`; and a namespace on what has none is an
/// error that nobody makes on purpose.
fn settle_namespace(kind: Kind, value: &mut Value) {
    let Some(meta) = value.get_mut("metadata").and_then(Value::as_object_mut) else {
        return;
    };
    let is_absent = match meta.get("namespace") {
        None | Some(Value::Null) => true,
        Some(Value::String(text)) => text.is_empty(),
        Some(_) => false,
    };
    match kind {
        Kind::Namespace | Kind::Node | Kind::ClusterNetworkPolicy => {
            meta.remove("namespace");
        }
        _ if is_absent => {
            meta.insert("namespace".to_owned(), "default".into());
        }
        _ => {}
    }
}
