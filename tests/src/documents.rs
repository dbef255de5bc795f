//! Files of YAML documents as values, for tests that read manifests.

use serde_json::Value;

/// Every document that is not empty.
///
/// # Panics
/// One is not YAML.
#[must_use]
pub fn parse(text: &str) -> Vec<Value> {
    let documents = text.split("\n---").map(|document| {
        // Behind the marker a comment may follow on its line.
        let document = document.trim_start_matches("---");
        serde_saphyr::from_str::<Value>(document).unwrap_or_else(|e| panic!("{e}:\n{document}"))
    });
    documents.filter(|it| !it.is_null()).collect()
}
