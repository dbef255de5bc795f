//! The rate limit of events: a token bucket for each reason and CPU.

use weir_common::event::EventLimit;
use weir_common::limits::{EVENT_BURST, EVENTS_PER_SECOND};

const NANOS_PER_TOKEN: u64 = 1_000_000_000 / EVENTS_PER_SECOND as u64;

/// May an event be sent now? If so, how many were left out since the last one. A zeroed bucket is full.
#[inline(always)]
pub fn admit(bucket: &mut EventLimit, now: u64) -> Option<u32> {
    let gained = now.saturating_sub(bucket.filled) / NANOS_PER_TOKEN;
    if gained >= u64::from(EVENT_BURST) {
        bucket.tokens = EVENT_BURST;
        bucket.filled = now;
    } else if gained > 0 {
        bucket.tokens = (bucket.tokens + gained as u32).min(EVENT_BURST);
        bucket.filled += gained * NANOS_PER_TOKEN;
    }
    if bucket.tokens == 0 {
        bucket.limited = bucket.limited.wrapping_add(1);
        return None;
    }
    bucket.tokens -= 1;
    let limited = bucket.limited;
    bucket.limited = 0;
    Some(limited)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = 1_000_000_000;

    #[test]
    fn a_burst_passes_then_the_rate() {
        let mut bucket = EventLimit::default();
        let start = 3_600 * SECOND;
        let burst = (0..1_000)
            .filter(|_| admit(&mut bucket, start).is_some())
            .count();
        assert_eq!(burst, EVENT_BURST as usize);
        assert_eq!(bucket.limited, 1_000 - EVENT_BURST);
        assert_eq!(
            admit(&mut bucket, start + SECOND),
            Some(1_000 - EVENT_BURST)
        );
        let second = (0..1_000)
            .filter(|_| admit(&mut bucket, start + SECOND).is_some())
            .count();
        assert_eq!(second, EVENTS_PER_SECOND as usize - 1);
    }

    #[test]
    fn a_clock_that_steps_back_gives_nothing() {
        let mut bucket = EventLimit {
            filled: 10 * SECOND,
            ..EventLimit::default()
        };
        assert_eq!(admit(&mut bucket, SECOND), None);
    }
}
