//! Configuration: what was typed, then what it means. Nothing here does anything.

mod args;
mod settings;

pub use args::{
    Args, CleanupArgs, Command, DNS_ADDRESSES, DoctorArgs, InstallArgs, KeepArgs, LogFormat,
    PolicyArgs, PolicyCommand, PolicyOutput, RunArgs,
};
pub use settings::{ConfigError, DnsSettings, PodCidrs, Settings, Source};
