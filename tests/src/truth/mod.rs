//! Truth tables of NetworkPolicy: nine pods in three namespaces, two nodes and a machine outside, a table of situations,
//! and what real packets between all of them did. What should have passed is computed by `crate::oracle`.

pub mod objects;
mod party;
pub mod site;
pub mod situations;
mod who;
