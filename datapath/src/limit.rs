//! The rate limits of events and refusals: a token bucket for each reason, and one for all refusals, on each CPU.

use weir_common::event::EventLimit;
use weir_common::limits::{EVENT_BURST, EVENTS_PER_SECOND, REFUSAL_BURST, REFUSALS_PER_SECOND};

/// May an event be sent now? If so, how many were left out since the last one. A zeroed bucket is full.
#[inline(always)]
pub fn admit(bucket: &mut EventLimit, now: u64) -> Option<u32> {
    take::<EVENT_BURST, EVENTS_PER_SECOND>(bucket, now)
}

/// May a packet be refused with an answer now? A zeroed bucket is full.
#[inline(always)]
pub fn may_refuse(bucket: &mut EventLimit, now: u64) -> bool {
    take::<REFUSAL_BURST, REFUSALS_PER_SECOND>(bucket, now).is_some()
}

#[inline(always)]
fn take<const BURST: u32, const PER_SECOND: u32>(bucket: &mut EventLimit, now: u64) -> Option<u32> {
    let nanos_per_token = 1_000_000_000 / u64::from(PER_SECOND);
    let gained = now.saturating_sub(bucket.filled) / nanos_per_token;
    if gained >= u64::from(BURST) {
        bucket.tokens = BURST;
        bucket.filled = now;
    } else if gained > 0 {
        bucket.tokens = (bucket.tokens + gained as u32).min(BURST);
        bucket.filled += gained * nanos_per_token;
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
    fn refusals_have_a_rate_of_their_own() {
        let mut bucket = EventLimit::default();
        for (now, allowed) in [
            (3_600 * SECOND, REFUSAL_BURST),
            (3_600 * SECOND + SECOND / 10, REFUSALS_PER_SECOND / 10),
            (3_601 * SECOND, REFUSAL_BURST),
        ] {
            let passed = (0..1_000).filter(|_| may_refuse(&mut bucket, now)).count();
            assert_eq!(passed, allowed as usize);
        }
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
