//! The calls that write to the API server: one for each thing that is told. When, and by whom, is not here.

use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::{Node, ObjectReference};
use k8s_openapi::api::events::v1::Event;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta};
use k8s_openapi::jiff::Timestamp;
use kube::api::{ApiResource, DynamicObject, ListParams, Patch, PatchParams, PostParams};
use kube::core::GroupVersionKind;
use kube::{Api, Client};
use serde_json::json;
use thiserror::Error;

use super::absence::Notice;
use super::events::{Note, POD, Regarding, resource};
use super::roster::selector;
use crate::model::{AGENT_AWAY, AGENT_READY, NETWORK_UNAVAILABLE};
use crate::watch::kube::Servers;

/// How long a call may take.
const PATIENCE: Duration = Duration::from_secs(10);
/// Who writes, for `kubectl get events`.
const CONTROLLER: &str = "weir.local/agent";
/// The longest name of who writes that the API takes, in bytes.
const INSTANCE: usize = 128;
/// Where Events about objects go that are in no namespace.
const DEFAULT_NAMESPACE: &str = "default";

/// Writes to the API server that is asked at the moment.
#[derive(Debug)]
pub struct Scribe(Arc<Servers>);

/// Why the API server has not taken something.
#[derive(Debug, Error)]
pub(super) enum Error {
    /// It is not there, or does not know us: nothing else would be taken now either.
    #[error("{0}")]
    Unreachable(String),
    /// It has too much to do, or somebody before it says that it is not there: this one was tried, and nothing else is
    /// now.
    #[error("{0}")]
    Overloaded(String),
    /// This one, for a moment or for a reason that lasts (a permission, a quota, a webhook that does not answer, a
    /// namespace that is being deleted): another may be taken.
    #[error("{0}")]
    NotTaken(String),
}

impl Error {
    /// Would nothing else be taken now either?
    pub(super) fn is_away(&self) -> bool {
        matches!(self, Self::Unreachable(_) | Self::Overloaded(_))
    }
}

impl From<kube::Error> for Error {
    fn from(error: kube::Error) -> Self {
        let status = match error {
            kube::Error::Api(status) => status,
            // Of one answer, or one question.
            error @ (kube::Error::SerdeError(_)
            | kube::Error::FromUtf8(_)
            | kube::Error::LinesCodecMaxLineLengthExceeded
            | kube::Error::BuildRequest(_)
            | kube::Error::HttpError(_)) => return Self::NotTaken(error.to_string()),
            error => return Self::Unreachable(error.to_string()),
        };
        match status.code {
            401 => Self::Unreachable(status.message),
            429 | 502..=504 => Self::Overloaded(status.message),
            _ => Self::NotTaken(status.message),
        }
    }
}

impl Scribe {
    /// Asks the servers that the source of objects asks.
    pub fn new(servers: Arc<Servers>) -> Self {
        Self(servers)
    }

    /// Writes the condition of a Node.
    pub(super) async fn notify(&self, notice: &Notice) -> Result<(), Error> {
        let (node, status, reason, message) = match notice {
            Notice::Away(node) => (
                node,
                "True",
                AGENT_AWAY,
                "weir-agent has not been ready here for a minute: pods that run go on, new ones may not start, and \
                 changes may not reach them",
            ),
            Notice::Back(node) => (node, "False", AGENT_READY, "weir-agent is ready"),
        };
        let now = Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string();
        let patch = json!({ "status": { "conditions": [{
            "type": NETWORK_UNAVAILABLE,
            "status": status,
            "reason": reason,
            "message": message,
            "lastTransitionTime": now,
            "lastHeartbeatTime": now,
        }] } });
        let nodes: Api<Node> = Api::all(self.client());
        let (params, patch) = (PatchParams::default(), Patch::Strategic(patch));
        within(nodes.patch_status(node, &params, &patch)).await?;
        Ok(())
    }

    /// Is an agent's pod of this node ready, now?
    pub(super) async fn has_agent(&self, namespace: &str, node: &str) -> Result<bool, Error> {
        let (kind, group, version, plural) = POD;
        let pods = kind_of(kind, group, version, plural);
        let pods: Api<DynamicObject> = Api::namespaced_with(self.client(), namespace, &pods);
        let here = ListParams::default()
            .labels(&selector())
            .fields(&format!("spec.nodeName={node}"));
        let found = within(pods.list(&here)).await?;
        let is_ready = |pod: &DynamicObject| {
            let conditions = pod.data["status"]["conditions"].as_array();
            let mut conditions = conditions.into_iter().flatten();
            conditions.any(|it| it["type"] == "Ready" && it["status"] == "True")
        };
        Ok(found.items.iter().any(is_ready))
    }

    /// Writes an Event. Of an object that is gone there is nothing to say.
    pub(super) async fn say(&self, note: &Note, node: &str) -> Result<(), Error> {
        let Some(regarding) = self.reference(&note.regarding, node).await? else {
            return Ok(());
        };
        let namespace = regarding.namespace.clone();
        let namespace = namespace.unwrap_or_else(|| DEFAULT_NAMESPACE.to_owned());
        let event = Event {
            metadata: ObjectMeta {
                generate_name: Some("weir-".to_owned()),
                namespace: Some(namespace.clone()),
                ..ObjectMeta::default()
            },
            action: Some("Reconcile".to_owned()),
            event_time: Some(MicroTime(Timestamp::now())),
            note: Some(note.text.clone()),
            reason: Some(note.reason.to_owned()),
            regarding: Some(regarding),
            reporting_controller: Some(CONTROLLER.to_owned()),
            reporting_instance: Some(node[..node.floor_char_boundary(INSTANCE)].to_owned()),
            type_: Some("Warning".to_owned()),
            ..Event::default()
        };
        let events: Api<Event> = Api::namespaced(self.client(), &namespace);
        within(events.create(&PostParams::default(), &event)).await?;
        Ok(())
    }

    /// With the uid, by which `kubectl describe` finds Events.
    async fn reference(
        &self,
        regarding: &Regarding,
        node: &str,
    ) -> Result<Option<ObjectReference>, Error> {
        let (kind, namespace, name) = match regarding {
            Regarding::ThisNode => ("Node", "", node),
            Regarding::PodHere { namespace, name } => ("Pod", namespace.as_str(), name.as_str()),
            Regarding::Object {
                kind,
                namespace,
                name,
            } => (*kind, namespace.as_str(), name.as_str()),
        };
        let Some((kind, group, version, plural)) = resource(kind) else {
            return Ok(None);
        };
        let kinds =
            ApiResource::from_gvk_with_plural(&GroupVersionKind::gvk(group, version, kind), plural);
        let objects: Api<DynamicObject> = match namespace {
            "" => Api::all_with(self.client(), &kinds),
            _ => Api::namespaced_with(self.client(), namespace, &kinds),
        };
        // The agent may list, and not get.
        let one = ListParams::default().fields(&format!("metadata.name={name}"));
        let found = within(objects.list_metadata(&one)).await?;
        let Some(found) = found.items.into_iter().next() else {
            return Ok(None);
        };
        Ok(Some(ObjectReference {
            api_version: Some(kinds.api_version),
            kind: Some(kinds.kind),
            name: Some(name.to_owned()),
            namespace: (!namespace.is_empty()).then(|| namespace.to_owned()),
            uid: found.metadata.uid,
            ..ObjectReference::default()
        }))
    }

    fn client(&self) -> Client {
        self.0.client()
    }
}

fn kind_of(kind: &str, group: &str, version: &str, plural: &str) -> ApiResource {
    ApiResource::from_gvk_with_plural(&GroupVersionKind::gvk(group, version, kind), plural)
}

async fn within<T>(call: impl Future<Output = kube::Result<T>>) -> Result<T, Error> {
    match tokio::time::timeout(PATIENCE, call).await {
        Ok(answer) => Ok(answer?),
        // A webhook may be what takes so long.
        Err(_) => Err(Error::NotTaken(format!("no answer within {PATIENCE:?}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_api_server_answers_says_what_else_it_would_take() {
        // As API servers write them.
        let forbidden = "events.events.k8s.io is forbidden: User \"system:serviceaccount:kube-system:weir-agent\" cannot \
                         create resource \"events\" in API group \"events.k8s.io\" in the namespace \"shop\"";
        let quota = "events.events.k8s.io \"weir-x\" is forbidden: exceeded quota: few, requested: count/events=1";
        let webhook =
            "admission webhook \"no.example\" denied the request: Events cannot be created here";
        for (code, message, is_away) in [
            (401, "Unauthorized", true),
            (503, "apiserver is shutting down", true),
            (403, forbidden, false),
            (403, quota, false),
            (403, webhook, false),
            (404, "namespaces \"gone\" not found", false),
            (409, "object has been modified", false),
            (422, "Event \"weir-x\" is invalid", false),
            (429, "too many requests", true),
            (500, "failed calling webhook", false),
        ] {
            let answer = kube::core::Status::failure(message, "").with_code(code);
            let error = Error::from(kube::Error::Api(Box::new(answer)));
            assert_eq!(error.is_away(), is_away, "{code} {message}");
        }
    }
}
