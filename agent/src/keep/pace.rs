//! How soon a program that was killed is started again.

use std::time::Duration;

/// A program that lived this long is not one that keeps dying.
const LONG: Duration = Duration::from_secs(5);
/// After the second death in a row; it doubles from there.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const MAX_PAUSE: Duration = Duration::from_secs(10);

/// Deaths in a row.
#[derive(Debug, Default)]
pub(super) struct Pace {
    quick: u32,
}

impl Pace {
    /// How long to wait after one that lived so long: not at all the first time.
    pub(super) fn after(&mut self, lived: Duration) -> Duration {
        if lived >= LONG {
            self.quick = 0;
            return Duration::ZERO;
        }
        self.quick = self.quick.saturating_add(1);
        match self.quick {
            1 => Duration::ZERO,
            more => FIRST_PAUSE
                .saturating_mul(2u32.saturating_pow(more - 2))
                .min(MAX_PAUSE),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_death_costs_nothing_and_those_in_a_row_more_and_more() {
        let mut pace = Pace::default();
        let short = Duration::from_millis(10);
        let pauses: Vec<_> = (0..10).map(|_| pace.after(short).as_millis()).collect();
        assert_eq!(
            pauses,
            [0, 100, 200, 400, 800, 1600, 3200, 6400, 10_000, 10_000]
        );
        assert_eq!(pace.after(LONG), Duration::ZERO);
        assert_eq!(pace.after(short), Duration::ZERO, "it begins anew");
        assert_eq!(pace.after(short), FIRST_PAUSE);
        for _ in 0..100 {
            assert!(pace.after(short) <= MAX_PAUSE);
        }
    }
}
