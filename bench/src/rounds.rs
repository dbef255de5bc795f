//! Interleaved rounds and their ratios. Absolute times move with the machine; the ratio of two arms that
//! were measured in turn does not.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use serde::Serialize;

use crate::exchange::Latency;

/// One arm of a comparison.
pub(crate) struct Arm<'a> {
    pub(crate) name: &'static str,
    pub(crate) run: Box<dyn FnMut() -> Result<Latency> + 'a>,
}

/// The measured rounds of every arm, by name.
pub(crate) type Rounds = BTreeMap<&'static str, Vec<Latency>>;

/// Runs the arms in turn, A B C A B C …, one round not counted first.
pub(crate) fn interleave(rounds: usize, arms: &mut [Arm<'_>]) -> Result<Rounds> {
    let mut measured = Rounds::new();
    for round in 0..=rounds {
        for arm in &mut *arms {
            let latency = (arm.run)().with_context(|| format!("round {round} of {}", arm.name))?;
            if round > 0 {
                measured.entry(arm.name).or_default().push(latency);
            }
        }
    }
    Ok(measured)
}

/// A ratio of two arms, round by round.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct Ratio {
    pub(crate) min: f64,
    pub(crate) median: f64,
    pub(crate) max: f64,
}

/// `arm / base` of a statistic, for each round.
///
/// # Errors
/// An arm was not measured.
pub(crate) fn ratio(
    rounds: &Rounds,
    arm: &str,
    base: &str,
    statistic: impl Fn(&Latency) -> u64,
) -> Result<Ratio> {
    let of = |name: &str| {
        rounds
            .get(name)
            .with_context(|| format!("{name} was not measured"))
    };
    let pairs = of(arm)?.iter().zip(of(base)?);
    spread(pairs.map(|(a, b)| statistic(a) as f64 / statistic(b) as f64)).context("no rounds")
}

/// The least, the middle and the most of some values, unless there are none.
pub(crate) fn spread(values: impl IntoIterator<Item = f64>) -> Option<Ratio> {
    let mut values: Vec<f64> = values.into_iter().collect();
    values.sort_by(f64::total_cmp);
    Some(Ratio {
        min: *values.first()?,
        median: *values.get(values.len() / 2)?,
        max: *values.last()?,
    })
}

/// The median of a statistic over the rounds of an arm.
///
/// # Errors
/// The arm was not measured.
pub(crate) fn median(
    rounds: &Rounds,
    arm: &str,
    statistic: impl Fn(&Latency) -> u64,
) -> Result<u64> {
    let mut values: Vec<u64> = rounds
        .get(arm)
        .with_context(|| format!("{arm} was not measured"))?
        .iter()
        .map(statistic)
        .collect();
    values.sort_unstable();
    values.get(values.len() / 2).copied().context("no rounds")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn latency(p50: u64) -> Latency {
        Latency {
            p01: p50,
            p50,
            p99: p50,
            count: 1,
        }
    }

    #[test]
    fn a_ratio_is_taken_round_by_round() {
        let rounds = Rounds::from([
            ("a", vec![latency(10), latency(30), latency(20)]),
            ("b", vec![latency(10), latency(10), latency(10)]),
        ]);
        let ratio = ratio(&rounds, "a", "b", |l| l.p50).unwrap();
        assert_eq!((ratio.min, ratio.median, ratio.max), (1.0, 2.0, 3.0));
    }

    #[test]
    fn the_first_round_of_each_arm_is_not_counted() {
        let mut calls = 0;
        let mut arms = [Arm {
            name: "a",
            run: Box::new(|| {
                calls += 1;
                Ok(latency(calls))
            }),
        }];
        let rounds = interleave(2, &mut arms).unwrap();
        assert_eq!(
            rounds["a"].iter().map(|l| l.p50).collect::<Vec<_>>(),
            [2, 3]
        );
    }
}
