//! The policy compiler against the text of Kubernetes. `cases`, `addresses` and `owners` by hand,
//! `exact`, `property`, `explained` and `changed` with random clusters, `transition` between two of them, `history` through many; `retained` is about
//! policies that go before their pods; `scale` measures; `nouns`, `random`, `tiers` and `walk` serve those.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod addresses;
mod cases;
mod changed;
mod exact;
mod explained;
mod history;
mod nouns;
mod owners;
mod property;
mod random;
mod retained;
mod scale;
mod tiers;
mod transition;
mod walk;
