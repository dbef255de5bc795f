//! What was measured, as a table for people and JSON for programs. It never judges without saying what
//! the control did.

use std::path::Path;

use anyhow::{Context, Result};
use comfy_table::Table;
use comfy_table::presets::NOTHING;
use serde::Serialize;

use crate::rounds::Ratio;

/// How far the control may be from 1 before a run says nothing (p01, median).
const CONTROL: f64 = 0.01;
/// As above, for the CPU of two processes that do the same.
const FIGURE_CONTROL: f64 = 0.1;

/// One claim, measured.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Row {
    /// The number in the list of targets.
    pub(crate) number: u32,
    pub(crate) claim: String,
    pub(crate) peer: String,
    pub(crate) ours_p01_ns: u64,
    pub(crate) peer_p01_ns: u64,
    pub(crate) ours_p50_ns: u64,
    pub(crate) peer_p50_ns: u64,
    pub(crate) ours_p99_ns: u64,
    pub(crate) peer_p99_ns: u64,
    pub(crate) ratio_p01: Ratio,
    pub(crate) ratio_p50: Ratio,
    /// The peer against itself, in the same rounds.
    pub(crate) control_p01: Option<Ratio>,
    /// Without one it is only told.
    pub(crate) target: Option<Target>,
    pub(crate) note: String,
}

/// What the claim must stay at or below.
#[derive(Clone, Copy, Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Target {
    /// Of the p01 ratio's median.
    Ratio(f64),
    /// Of p01, ours less the peer's.
    ExtraNanos(u64),
    /// Of our own p50 and p99.
    Nanos { p50: u64, p99: u64 },
}

/// Whether the target was reached.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Outcome {
    Reached,
    Missed,
    /// The control moved too far: the run says nothing.
    Void,
}

/// One number that has no peer, measured.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Figure {
    pub(crate) number: u32,
    pub(crate) claim: String,
    pub(crate) value: Unit,
    /// The least and the most of the rounds.
    pub(crate) spread: Option<Ratio>,
    /// The same of two that are alike.
    pub(crate) control: Option<Ratio>,
    /// What it must stay at or below; without one it is only told.
    pub(crate) most: Option<f64>,
    pub(crate) note: String,
}

/// A number and what it counts.
#[derive(Clone, Copy, Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Unit {
    Micros(f64),
    Millis(f64),
    /// Millions of bytes.
    Megabytes(f64),
    /// Thousandths of a CPU.
    MilliCpu(f64),
    Ratio(f64),
}

impl Unit {
    fn value(self) -> f64 {
        match self {
            Self::Micros(v)
            | Self::Millis(v)
            | Self::Megabytes(v)
            | Self::MilliCpu(v)
            | Self::Ratio(v) => v,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Micros(_) => "µs",
            Self::Millis(_) => "ms",
            Self::Megabytes(_) => "MB",
            Self::MilliCpu(_) => "mCPU",
            Self::Ratio(_) => "",
        }
    }
}

impl Figure {
    /// One that was measured once.
    pub(crate) fn new(number: u32, claim: String, value: Unit, most: Option<f64>) -> Self {
        Self {
            number,
            claim,
            value,
            spread: None,
            control: None,
            most,
            note: String::new(),
        }
    }

    /// `None` if there is no target.
    pub(crate) fn outcome(&self) -> Option<Outcome> {
        let most = self.most?;
        let moved = |control: Ratio| (control.median - 1.0).abs() > FIGURE_CONTROL;
        Some(if self.control.is_some_and(moved) {
            Outcome::Void
        } else if self.value.value() <= most {
            Outcome::Reached
        } else {
            Outcome::Missed
        })
    }
}

impl Row {
    /// `None` if there is no target, and nothing against the run.
    pub(crate) fn outcome(&self) -> Option<Outcome> {
        if self
            .control_p01
            .is_some_and(|c| (c.median - 1.0).abs() > CONTROL)
        {
            return Some(Outcome::Void);
        }
        let reached = match self.target? {
            Target::Ratio(most) => self.ratio_p01.median <= most,
            Target::ExtraNanos(most) => self.ours_p01_ns.saturating_sub(self.peer_p01_ns) <= most,
            Target::Nanos { p50, p99 } => self.ours_p50_ns <= p50 && self.ours_p99_ns <= p99,
        };
        Some(if reached {
            Outcome::Reached
        } else {
            Outcome::Missed
        })
    }
}

/// The table for people.
pub(crate) fn table(rows: &[Row]) -> String {
    let mut table = Table::new();
    table.load_style(NOTHING).set_header([
        "ROW",
        "CLAIM",
        "OURS p01/p50/p99 µs",
        "PEER p01/p50/p99 µs",
        "RATIO p01",
        "CONTROL",
        "TARGET",
        "OUTCOME",
    ]);
    for row in rows {
        let micros = |a: u64, b: u64, c: u64| {
            format!(
                "{:.2} {:.2} {:.2}",
                a as f64 / 1e3,
                b as f64 / 1e3,
                c as f64 / 1e3
            )
        };
        let spread = |r: &Ratio| format!("{:.3} ({:.3}–{:.3})", r.median, r.min, r.max);
        table.add_row([
            row.number.to_string(),
            row.claim.clone(),
            micros(row.ours_p01_ns, row.ours_p50_ns, row.ours_p99_ns),
            format!(
                "{} {}",
                row.peer,
                micros(row.peer_p01_ns, row.peer_p50_ns, row.peer_p99_ns)
            ),
            spread(&row.ratio_p01),
            row.control_p01
                .as_ref()
                .map_or_else(|| "none".into(), spread),
            match row.target {
                Some(Target::Ratio(most)) => format!("≤ {most}"),
                Some(Target::ExtraNanos(most)) => format!("≤ +{most} ns"),
                Some(Target::Nanos { p50, p99 }) => {
                    let ms = |nanos: u64| nanos as f64 / 1e6;
                    format!("p50 ≤ {} ms, p99 ≤ {} ms", ms(p50), ms(p99))
                }
                None => "-".to_owned(),
            },
            or_not(row.outcome().map(|outcome| format!("{outcome:?}"))),
        ]);
    }
    table.to_string()
}

fn or_not(text: Option<String>) -> String {
    text.unwrap_or_else(|| "-".to_owned())
}

/// The table of what has no peer.
pub(crate) fn figures(figures: &[Figure]) -> String {
    let mut table = Table::new();
    table.load_style(NOTHING).set_header([
        "ROW", "CLAIM", "VALUE", "ROUNDS", "CONTROL", "TARGET", "OUTCOME",
    ]);
    for figure in figures {
        table.add_row([
            figure.number.to_string(),
            figure.claim.clone(),
            format!("{:.2} {}", figure.value.value(), figure.value.name()),
            or_not(figure.spread.map(|s| format!("{:.2}–{:.2}", s.min, s.max))),
            or_not(figure.control.map(|c| format!("{:.3}", c.median))),
            or_not(figure.most.map(|most| format!("≤ {most}"))),
            or_not(figure.outcome().map(|outcome| format!("{outcome:?}"))),
        ]);
    }
    table.to_string()
}

/// Writes what was measured as JSON.
///
/// # Errors
/// The file cannot be written.
pub(crate) fn write_json(rows: &[Row], figures: &[Figure], path: &Path) -> Result<()> {
    #[derive(Serialize)]
    struct Judged<T> {
        #[serde(flatten)]
        what: T,
        outcome: Option<Outcome>,
    }
    #[derive(Serialize)]
    struct Report<'a> {
        rows: Vec<Judged<&'a Row>>,
        figures: Vec<Judged<&'a Figure>>,
    }
    let rows = rows.iter().map(|what| Judged {
        what,
        outcome: what.outcome(),
    });
    let figures = figures.iter().map(|what| Judged {
        what,
        outcome: what.outcome(),
    });
    let report = Report {
        rows: rows.collect(),
        figures: figures.collect(),
    };
    let text = serde_json::to_string_pretty(&report)?;
    std::fs::write(path, text).with_context(|| format!("write {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(ratio: f64, control: f64) -> Row {
        let flat = |r| Ratio {
            min: r,
            median: r,
            max: r,
        };
        Row {
            number: 1,
            claim: "a claim".into(),
            peer: "peer".into(),
            ours_p01_ns: 1,
            peer_p01_ns: 1,
            ours_p50_ns: 1,
            peer_p50_ns: 1,
            ours_p99_ns: 1,
            peer_p99_ns: 1,
            ratio_p01: flat(ratio),
            ratio_p50: flat(ratio),
            control_p01: Some(flat(control)),
            target: Some(Target::Ratio(0.97)),
            note: String::new(),
        }
    }

    #[test]
    fn a_run_whose_control_moved_says_nothing() {
        assert_eq!(row(0.9, 1.0).outcome(), Some(Outcome::Reached));
        assert_eq!(row(0.98, 1.0).outcome(), Some(Outcome::Missed));
        assert_eq!(row(0.9, 1.02).outcome(), Some(Outcome::Void));
        let told = |control| Row {
            target: None,
            ..row(0.9, control)
        };
        assert_eq!(told(1.0).outcome(), None);
        assert_eq!(told(1.02).outcome(), Some(Outcome::Void));
    }

    #[test]
    fn a_figure_without_a_target_is_not_judged() {
        let mut figure = Figure::new(11, "a claim".into(), Unit::Ratio(1.3), None);
        assert_eq!(figure.outcome(), None);
        figure.most = Some(1.2);
        assert_eq!(figure.outcome(), Some(Outcome::Missed));
        figure.most = Some(1.4);
        assert_eq!(figure.outcome(), Some(Outcome::Reached));
        figure.control = row(1.0, 1.2).control_p01;
        assert_eq!(figure.outcome(), Some(Outcome::Void));
    }
}
