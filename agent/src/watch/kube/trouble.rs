//! What can go wrong with a call to the API server: in words that say what to change, and what follows for
//! the watch.

use std::error::Error as _;
use std::time::Duration;

use kube::core::Status;

use super::super::status::Cause;
use super::super::wire::WireKind;
use super::optional::is_not_found;

/// What was asked for.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Verb {
    List,
    Watch,
    /// To ask which kinds there are.
    Find,
}

impl Verb {
    const fn as_str(self) -> &'static str {
        match self {
            Self::List => "list",
            Self::Watch => "watch",
            Self::Find => "look for",
        }
    }
}

/// A call, or what came of it, failed.
#[derive(Debug)]
pub(super) enum Failure {
    Call(Verb, kube::Error),
    NoAnswer(Verb, Duration),
    /// What stands in a watch instead of an object.
    Said(Box<Status>),
    /// A kind that is there in these versions, and not in ours.
    OtherVersions(Vec<String>),
    /// Objects without a version: where we are cannot be said.
    NoVersion,
}

impl Failure {
    /// The server has forgotten where we were: nothing is wrong, and a list will tell.
    pub(super) fn is_expired(&self) -> bool {
        self.status().is_some_and(|status| status.code == 410)
    }

    /// Does the server not know what was asked for?
    pub(super) fn is_not_found(&self) -> bool {
        self.status().is_some_and(is_not_found)
    }

    /// Has the place in the watch been lost, so that only a list can tell what is?
    pub(super) fn loses_the_place(&self) -> bool {
        // A line that cannot be read may have been any event.
        matches!(
            self,
            Self::NoVersion | Self::Call(Verb::Watch, kube::Error::SerdeError(_))
        ) || self.is_expired()
    }

    /// May another server of the same cluster do better?
    pub(super) fn is_of_the_server(&self) -> bool {
        match self.status() {
            Some(status) => status.code >= 500,
            None => matches!(self, Self::Call(..) | Self::NoAnswer(..)),
        }
    }

    fn status(&self) -> Option<&Status> {
        match self {
            Self::Said(status) | Self::Call(_, kube::Error::Api(status)) => Some(status),
            _ => None,
        }
    }

    /// What is wrong, and what to do about it.
    pub(super) fn explain<K: WireKind>(&self) -> (Cause, String) {
        let plural = K::PLURAL;
        let unreachable = |verb: &Verb, why: &str| {
            let message = format!(
                "cannot {} {plural}: {why}; is the address of the API server (--kube-api-server) right, and \
                 reachable without the Service kubernetes?",
                verb.as_str(),
            );
            (Cause::Unreachable, message)
        };
        match self {
            Self::Call(verb, kube::Error::Api(status)) => answer::<K>(*verb, status),
            Self::Said(status) => answer::<K>(Verb::Watch, status),
            Self::Call(verb, error) => unreachable(verb, &chain(error)),
            Self::NoAnswer(verb, time) => {
                let time = humantime::format_duration(*time);
                unreachable(verb, &format!("no answer within {time}"))
            }
            Self::OtherVersions(versions) => (
                Cause::Refused,
                format!(
                    "the API server has {plural} of {} as {}, and not as {}, which is what this agent reads",
                    K::GROUP,
                    versions.join(", "),
                    K::VERSIONS.join(" or "),
                ),
            ),
            Self::NoVersion => (
                Cause::Refused,
                format!("the API server sent {plural} without resourceVersion"),
            ),
        }
    }
}

fn answer<K: WireKind>(asked: Verb, status: &Status) -> (Cause, String) {
    let (plural, group, said) = (K::PLURAL, K::GROUP, &status.message);
    let verb = asked.as_str();
    match status.code {
        403 if asked != Verb::Find => (
            Cause::Forbidden,
            format!(
                "not allowed to {verb} {plural}: add apiGroups [\"{group}\"], resources [\"{plural}\"], \
                 verbs [\"list\", \"watch\"] to the ClusterRole weir-agent (the API server says: {said})"
            ),
        ),
        401 => (
            Cause::Unauthorized,
            format!(
                "the API server does not know who asks to {verb} {plural}: check the kubeconfig, or the \
                 token of the service account (the API server says: {said})"
            ),
        ),
        code => (
            Cause::Refused,
            format!("cannot {verb} {plural}: the API server answers {code}: {said}"),
        ),
    }
}

/// An error and what caused it, each said once.
fn chain(error: &kube::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let said = cause.to_string();
        if !text.contains(&said) {
            text.push_str(": ");
            text.push_str(&said);
        }
        source = cause.source();
    }
    text
}
