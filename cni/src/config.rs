//! What the runtime passes, checked once: our fields of the network configuration, the attachment,
//! the pod.

use std::path::PathBuf;

use rscni_plugin::error::Error;
use rscni_plugin::types::{Args, NetConf};
use serde::Deserialize;
use serde_json::Value;
use weir_cni::attachment::Attachment;
use weir_cni::wire::Pod;

use crate::failure;

/// Our fields of the network configuration.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Config {
    /// The agent's socket for the plugin.
    #[serde(default = "agent_socket")]
    pub(crate) agent_socket: PathBuf,
    /// Where DEL leaves a release when the agent does not answer.
    #[serde(default = "released_dir")]
    pub(crate) released_dir: PathBuf,
    /// Of both devices, in bytes; 0 leaves it to the agent.
    #[serde(default)]
    pub(crate) mtu: u32,
}

fn agent_socket() -> PathBuf {
    "/run/weir/cni.sock".into()
}

fn released_dir() -> PathBuf {
    "/var/lib/weir/released".into()
}

impl Config {
    /// Error 7 when a field of ours has a wrong type.
    pub(crate) fn of(conf: &NetConf) -> Result<Self, Error> {
        let fields = Value::Object(conf.custom.clone().into_iter().collect());
        serde_json::from_value(fields)
            .map_err(|error| Error::InvalidNetworkConfig(error.to_string()))
    }
}

/// Error 4 when the names are not safe to use.
pub(crate) fn attachment(args: &Args) -> Result<Attachment, Error> {
    let container_id = args.container_id().map_or("", |id| id.as_ref());
    let ifname = args.ifname().map_or("", |name| name.as_ref());
    Attachment::new(container_id, ifname).map_err(failure::env)
}

/// The pod that `CNI_ARGS` names; `None` when it names none. Error 4 when it names half of one, or
/// in a way no Kubernetes object is named.
pub(crate) fn pod(args: &Args) -> Result<Option<Pod>, Error> {
    pod_of(args.args().unwrap_or_default())
}

fn pod_of(args: &str) -> Result<Option<Pod>, Error> {
    let value = |key: &str| {
        let found = args.split(';').find_map(|pair| {
            let (found, value) = pair.split_once('=')?;
            (found.trim() == key && !value.is_empty()).then_some(value)
        });
        match found {
            Some(value) if !is_object_name(value) => {
                Err(failure::env(format!("CNI_ARGS: {key} is not a valid name")))
            }
            found => Ok(found.map(String::from)),
        }
    };
    let uid = value("K8S_POD_UID")?;
    match (value("K8S_POD_NAMESPACE")?, value("K8S_POD_NAME")?) {
        (Some(namespace), Some(name)) => Ok(Some(Pod {
            namespace,
            name,
            uid,
        })),
        (None, None) => Ok(None),
        _ => Err(failure::env(
            "CNI_ARGS must have both K8S_POD_NAMESPACE and K8S_POD_NAME, or neither",
        )),
    }
}

/// The characters and the length of a DNS subdomain (RFC 1123), which holds for a uid as well.
fn is_object_name(text: &str) -> bool {
    text.len() <= 253
        && text
            .bytes()
            .all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pod_is_read_from_cni_args() {
        let web = |uid: Option<&str>| {
            Some(Pod {
                namespace: "shop".into(),
                name: "web-0".into(),
                uid: uid.map(String::from),
            })
        };
        let cases = [
            ("", Ok(None)),
            ("IgnoreUnknown=1", Ok(None)),
            ("K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web-0", Ok(web(None))),
            (
                "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web-0;K8S_POD_INFRA_CONTAINER_ID=X;K8S_POD_UID=1-2",
                Ok(web(Some("1-2"))),
            ),
            ("K8S_POD_NAME=web-0", Err(4)),
            ("K8S_POD_NAMESPACE=../x;K8S_POD_NAME=web-0", Err(4)),
            ("K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web\n0", Err(4)),
        ];
        for (args, expected) in cases {
            assert_eq!(pod_of(args).map_err(|e| u32::from(&e)), expected, "{args}");
        }
    }

    #[test]
    fn our_fields_have_defaults_and_types() {
        let conf = |text: &str| serde_json::from_str::<NetConf>(text).unwrap();
        let config = Config::of(&conf(r#"{"name":"n","type":"weir-cni"}"#)).unwrap();
        assert_eq!(config.agent_socket, PathBuf::from("/run/weir/cni.sock"));
        assert_eq!(config.mtu, 0);
        let wrong = Config::of(&conf(r#"{"name":"n","type":"weir-cni","mtu":"big"}"#));
        assert_eq!(u32::from(&wrong.unwrap_err()), 7);
    }
}
