//! When this agent looks at what nobody tells it of. Who looks for as long as the agent runs does so at the same
//! moments as others, so that an idle agent wakes up once for all of them: on a virtual machine that costs more than
//! most looks (0.2 ms of a CPU, measured).

use std::time::Duration;

use tokio::time::sleep;

use crate::kernel::clock::monotonic;

/// How often the agent looks at what should stay as it is, and hardly ever changes.
pub const LOOK: Duration = Duration::from_secs(5);

/// Waits for the next moment of those that are `every` apart, which are the same for all who wait: between nothing and
/// `every` from now.
pub async fn beat(every: Duration) {
    sleep(until(monotonic(), every)).await;
}

/// How long it is until then. The moments are counted from the time when the machine began.
pub fn until(now: Duration, every: Duration) -> Duration {
    let passed = now.as_nanos() % every.as_nanos().max(1);
    every.saturating_sub(Duration::from_nanos(
        u64::try_from(passed).unwrap_or(u64::MAX),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_looks_half_as_often_looks_when_the_other_does() {
        let (five, ten) = (Duration::from_secs(5), Duration::from_secs(10));
        for (now, until_five, until_ten) in [
            (0, 5_000, 10_000),
            (4_999, 1, 5_001),
            (5_000, 5_000, 5_000),
            (7_000, 3_000, 3_000),
        ] {
            let now = Duration::from_millis(now);
            assert_eq!(until(now, five), Duration::from_millis(until_five));
            assert_eq!(until(now, ten), Duration::from_millis(until_ten));
        }
    }
}
