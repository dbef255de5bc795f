//! Ring 4: what NetworkPolicy means, between nine pods of three namespaces, two nodes and a machine outside: two ports of three
//! protocols in both families, in every situation of `weir_tests::truth::situations`.
//!
//! Seen failing, with an agent that ignored `endPort` (10 situations of the 179 that there were), `except` (10), the selector of namespaces (35), or
//! the policy's own namespace where there is none (31), that took a named port of egress for the sender's (11), read empty
//! `ports` as none, which the oracle then did too (88, by what a person says), and with a datapath that did not judge open
//! flows again (109).

#![allow(clippy::unwrap_used, reason = "a test that fails should say where")]

use std::time::Instant;

use weir_tests::truth::site::{Layout, Site};
use weir_tests::truth::situations::{Situation, all};

/// Of how many situations the first look may be spoiled by a machine that is too busy to answer within a second.
const SPOILED: usize = 3;

fn play(name: &str, layout: Layout, situations: &[Situation]) {
    let start = Instant::now();
    let mut site = Site::start(name, layout).unwrap();
    let is_up = start.elapsed();
    let mut wrong = Vec::new();
    for situation in situations {
        let found = site.play(situation);
        let found = found.unwrap_or_else(|error| vec![format!("{error:#}")]);
        if !found.is_empty() {
            let (many, first) = (found.len(), &found[..found.len().min(6)]);
            wrong.push(format!("{}: {many}: {}", situation.name, first.join("; ")));
        }
    }
    println!(
        "{layout:?}: {} situations, {} questions, {} denied; up after {is_up:.1?}, done after {:.1?}; a second look at {:#?}",
        situations.len(),
        site.asked,
        site.denied,
        start.elapsed(),
        site.again,
    );
    let many = wrong.len();
    assert!(wrong.is_empty(), "{many} situations:\n{}", wrong.join("\n"));
    assert!(site.again.len() <= SPOILED, "{:#?}", site.again);
}

#[test]
fn policy_means_what_the_api_says_on_one_node() {
    play("truth", Layout::OneNode, &all());
}

/// In the other order, so that every situation also follows another one.
#[test]
fn policy_means_what_the_api_says_on_two_nodes() {
    let situations: Vec<Situation> = all().into_iter().rev().collect();
    play("truths", Layout::TwoNodes, &situations);
}
