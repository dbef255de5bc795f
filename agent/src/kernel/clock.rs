//! The clock that programs read, `CLOCK_MONOTONIC`, and where it stands against the wall clock.

use std::time::{Duration, SystemTime};

use nix::time::{ClockId, clock_gettime};

/// The time since an arbitrary start, as flows and events carry it.
pub fn monotonic() -> Duration {
    // The kernel refuses this clock to nobody.
    clock_gettime(ClockId::CLOCK_MONOTONIC)
        .map(Duration::from)
        .unwrap_or_default()
}

/// The wall clock's time at which the monotonic clock read zero, as of now.
pub fn monotonic_start() -> SystemTime {
    SystemTime::now()
        .checked_sub(monotonic())
        .unwrap_or(SystemTime::UNIX_EPOCH)
}
