//! Which code of the CNI specification stands for which failure of ours.

use std::fmt::Display;

use rscni_plugin::error::Error;
use weir_cni::wire::{Refusal, Refused};

/// Our own codes, from 100. ADD: the attachment is there already.
const ATTACHED: u32 = 100;
/// ADD: the container has an interface of this name that is not this attachment's.
const INTERFACE_EXISTS: u32 = 101;
/// CHECK: the network is not as ADD left it.
const BROKEN: u32 = 102;

pub(crate) fn interface_exists(ifname: &str) -> Error {
    Error::Custom(
        INTERFACE_EXISTS,
        "Interface exists".into(),
        format!("the container has an interface {ifname} already; it is left as it is"),
    )
}

pub(crate) fn broken(what: impl Display) -> Error {
    Error::Custom(
        BROKEN,
        "Network not as it should be".into(),
        what.to_string(),
    )
}

pub(crate) fn env(what: impl Display) -> Error {
    Error::InvalidEnvValue(what.to_string())
}

/// A step with the kernel or the disk failed.
pub(crate) fn step<E: Display>(doing: &str) -> impl FnOnce(E) -> Error {
    move |error| Error::IOFailure(format!("{doing}: {error}"))
}

/// What the runtime hears when the agent refuses. Another try may succeed, except where it says that
/// nothing needs doing or that the request is wrong.
pub(crate) fn refused(refused: Refused) -> Error {
    let message = refused.message;
    match refused.reason {
        Refusal::NotReady | Refusal::Exhausted => Error::TryAgainLater(message),
        Refusal::Exists => Error::Custom(ATTACHED, "Already attached".into(), message),
        Refusal::NotFound => Error::NotExist(message),
        Refusal::Storage => Error::IOFailure(message),
        Refusal::Invalid => Error::InvalidNetworkConfig(message),
    }
}
