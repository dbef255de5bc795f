//! The policy compiler against the text of Kubernetes. Each file: `cases` by hand, `property` with
//! random clusters, `transition` between two of them; `nouns`, `random` and `walk` serve those.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod cases;
mod nouns;
mod property;
mod random;
mod scale;
mod transition;
mod walk;
