//! From the text of one object to our nouns, never failing as a whole: one object that cannot be decoded
//! must not take a list of thousands with it.

use std::borrow::Cow;
use std::marker::PhantomData;

use kube::api::ObjectMeta;
use kube::core::DynamicResourceScope;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Deserializer};
use serde_json::value::RawValue;

use super::{
    ClusterNetworkPolicy, EndpointSlice, Meta, Namespace, NetworkPolicy, Node, Pod, PolicyOutline,
    Service,
};
use crate::model::convert::{self, Converted, Invalid};
use crate::model::{Kind, Object, ObjectName};

/// A kind of object on the wire.
pub trait WireKind: DeserializeOwned + std::fmt::Debug + Send + Sync + 'static {
    const KIND: Kind;
    /// API group; empty for core.
    const GROUP: &'static str;
    /// Of the group, as [`convert`](Self::convert) reads them all; the first is preferred.
    const VERSIONS: &'static [&'static str] = &["v1"];
    /// The name of the resource in a URL and in a ClusterRole.
    const PLURAL: &'static str;
    /// May a cluster be without the kind? Then there is none of it, and it is looked for again and again.
    const IS_OPTIONAL: bool = false;

    fn meta(&self) -> &Meta;

    fn convert(self) -> Result<Converted, Invalid>;

    /// What to hold of an object that cannot be decoded, if nothing better was ever known of it.
    fn close(_text: &RawValue, _reason: &str) -> Option<Object> {
        None
    }
}

/// An object of kind `K` as `kube` takes it from the API: decoded and converted at once, so that what is
/// not in use is never stored.
#[derive(Debug)]
pub struct Decoded<K> {
    pub name: ObjectName,
    pub outcome: Result<Converted, Invalid>,
    meta: ObjectMeta,
    kind: PhantomData<fn() -> K>,
}

/// Decodes and converts one object, and says what identifies it.
pub fn decode<K: WireKind>(text: &RawValue) -> (Meta, Result<Converted, Invalid>) {
    match K::deserialize(text) {
        Ok(wire) => {
            let meta = wire.meta().identity();
            (meta, wire.convert())
        }
        Err(plain) => {
            // The slow way, to say where in the object it went wrong.
            let reason = match serde_path_to_error::deserialize::<_, K>(text) {
                Err(e) => {
                    let path = e.path().to_string();
                    let cause = strip_position(&e.inner().to_string());
                    if path == "." {
                        cause
                    } else {
                        format!("{path}: {cause}")
                    }
                }
                Ok(_) => plain.to_string(),
            };
            let meta = OnlyMeta::deserialize(text).unwrap_or_default().metadata;
            let closed = K::close(text, &reason);
            (meta, Err(Invalid { reason, closed }))
        }
    }
}

/// Without "at line 1 column 77": the API's text has no lines that a person has seen.
fn strip_position(message: &str) -> String {
    match message.rfind(" at line ") {
        Some(at) => message[..at].to_owned(),
        None => message.to_owned(),
    }
}

impl Meta {
    /// Only what identifies the object.
    fn identity(&self) -> Self {
        Self {
            name: self.name.clone(),
            namespace: self.namespace.clone(),
            resource_version: self.resource_version.clone(),
            ..Self::default()
        }
    }
}

#[derive(Default, Deserialize)]
struct OnlyMeta {
    #[serde(default)]
    metadata: Meta,
}

impl<K> Clone for Decoded<K> {
    fn clone(&self) -> Self {
        Self {
            name: self.name.clone(),
            outcome: self.outcome.clone(),
            meta: self.meta.clone(),
            kind: PhantomData,
        }
    }
}

impl<'de, K: WireKind> Deserialize<'de> for Decoded<K> {
    fn deserialize<D: Deserializer<'de>>(source: D) -> Result<Self, D::Error> {
        let raw = Box::<RawValue>::deserialize(source)?;
        let (meta, outcome) = decode::<K>(&raw);
        Ok(Self {
            name: ObjectName::new(meta.namespace.as_str(), meta.name.as_str()),
            outcome,
            meta: ObjectMeta {
                name: Some(meta.name),
                namespace: Some(meta.namespace).filter(|n| !n.is_empty()),
                resource_version: Some(meta.resource_version),
                ..ObjectMeta::default()
            },
            kind: PhantomData,
        })
    }
}

impl<K: WireKind> kube::Resource for Decoded<K> {
    /// The version that is asked for.
    type DynamicType = &'static str;
    type Scope = DynamicResourceScope;

    fn kind<'a>(_: &'a &'static str) -> Cow<'a, str> {
        K::KIND.as_str().into()
    }

    fn group<'a>(_: &'a &'static str) -> Cow<'a, str> {
        K::GROUP.into()
    }

    fn version<'a>(version: &'a &'static str) -> Cow<'a, str> {
        (*version).into()
    }

    fn plural<'a>(_: &'a &'static str) -> Cow<'a, str> {
        K::PLURAL.into()
    }

    fn meta(&self) -> &ObjectMeta {
        &self.meta
    }

    fn meta_mut(&mut self) -> &mut ObjectMeta {
        &mut self.meta
    }
}

impl WireKind for Service {
    const KIND: Kind = Kind::Service;
    const GROUP: &'static str = "";
    const PLURAL: &'static str = "services";

    fn meta(&self) -> &Meta {
        &self.metadata
    }

    fn convert(self) -> Result<Converted, Invalid> {
        convert::service(self)
    }
}

impl WireKind for EndpointSlice {
    const KIND: Kind = Kind::EndpointSlice;
    const GROUP: &'static str = "discovery.k8s.io";
    const PLURAL: &'static str = "endpointslices";

    fn meta(&self) -> &Meta {
        &self.metadata
    }

    fn convert(self) -> Result<Converted, Invalid> {
        convert::slice(self)
    }
}

impl WireKind for Pod {
    const KIND: Kind = Kind::Pod;
    const GROUP: &'static str = "";
    const PLURAL: &'static str = "pods";

    fn meta(&self) -> &Meta {
        &self.metadata
    }

    fn convert(self) -> Result<Converted, Invalid> {
        convert::pod(self)
    }
}

impl WireKind for Namespace {
    const KIND: Kind = Kind::Namespace;
    const GROUP: &'static str = "";
    const PLURAL: &'static str = "namespaces";

    fn meta(&self) -> &Meta {
        &self.metadata
    }

    fn convert(self) -> Result<Converted, Invalid> {
        convert::namespace(self)
    }
}

impl WireKind for Node {
    const KIND: Kind = Kind::Node;
    const GROUP: &'static str = "";
    const PLURAL: &'static str = "nodes";

    fn meta(&self) -> &Meta {
        &self.metadata
    }

    fn convert(self) -> Result<Converted, Invalid> {
        convert::node(self)
    }
}

impl WireKind for NetworkPolicy {
    const KIND: Kind = Kind::NetworkPolicy;
    const GROUP: &'static str = "networking.k8s.io";
    const PLURAL: &'static str = "networkpolicies";

    fn meta(&self) -> &Meta {
        &self.metadata
    }

    fn convert(self) -> Result<Converted, Invalid> {
        convert::policy(self)
    }

    fn close(text: &RawValue, reason: &str) -> Option<Object> {
        convert::closed_policy(PolicyOutline::deserialize(text).ok()?, reason)
    }
}

impl WireKind for ClusterNetworkPolicy {
    const KIND: Kind = Kind::ClusterNetworkPolicy;
    const GROUP: &'static str = "policy.networking.k8s.io";
    /// The types of both are equal (network-policy-api 0.3.0, its Go types and the schemas of its definitions).
    const VERSIONS: &'static [&'static str] = &["v1alpha2", "v1beta1"];
    const PLURAL: &'static str = "clusternetworkpolicies";
    const IS_OPTIONAL: bool = true;

    fn meta(&self) -> &Meta {
        &self.metadata
    }

    fn convert(self) -> Result<Converted, Invalid> {
        convert::cluster_policy(self)
    }
}
