//! Manifests of an application whose images cannot be pulled, made to run all the same: every program is
//! replaced by one that answers on the ports that were declared. What the network sees stays: names,
//! labels, ports, Services, accounts, policies.

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

/// The objects with `image`, which is agnhost, in every container.
///
/// # Errors
/// A container cannot be stood in for: it serves two ports of one protocol, or it is one that
/// prepares the pod and does not say how.
pub(super) fn cast(mut objects: Vec<Value>, image: &str) -> Result<Vec<Value>> {
    for object in &mut objects {
        let spec = match object["kind"].as_str() {
            Some("Pod") => &mut object["spec"],
            Some("Deployment" | "StatefulSet") => &mut object["spec"]["template"]["spec"],
            _ => continue,
        };
        for container in spec["containers"].as_array_mut().into_iter().flatten() {
            let name = container["name"].to_string();
            serve(container, image).with_context(|| format!("container {name}"))?;
        }
        for container in spec["initContainers"].as_array_mut().into_iter().flatten() {
            if container["command"].is_null() {
                bail!("init container {} has no command", container["name"]);
            }
            container["image"] = json!(image);
        }
        // It has nothing to finish.
        spec["terminationGracePeriodSeconds"] = json!(1);
    }
    Ok(objects)
}

fn serve(container: &mut Value, image: &str) -> Result<()> {
    let (tcp, udp) = (declared(container, "TCP")?, declared(container, "UDP")?);
    let args = match (tcp, udp) {
        (None, None) => json!(["pause"]),
        (Some(tcp), udp) => {
            let udp = udp.map_or("-1".to_owned(), |port| port.to_string());
            json!([
                "netexec",
                format!("--http-port={tcp}"),
                format!("--udp-port={udp}")
            ])
        }
        // It cannot do without HTTP, and then on a port that nobody asks.
        (None, Some(udp)) => json!(["netexec", format!("--udp-port={udp}")]),
    };
    let container = container.as_object_mut().context("it is no object")?;
    container.insert("image".to_owned(), json!(image));
    container.insert("args".to_owned(), args);
    container.remove("command");
    // They are for the program that it is not.
    if let Some(resources) = container.get_mut("resources") {
        resources.as_object_mut().map(|r| r.remove("limits"));
    }
    for probe in ["readinessProbe", "livenessProbe", "startupProbe"] {
        container.remove(probe);
    }
    if let Some(port) = tcp {
        // Ready as soon as it listens.
        let probe = json!({ "tcpSocket": { "port": port }, "periodSeconds": 1 });
        container.insert("readinessProbe".to_owned(), probe);
        let probe = json!({ "tcpSocket": { "port": port } });
        container.insert("livenessProbe".to_owned(), probe);
    }
    Ok(())
}

/// The port of this protocol that a container declares.
fn declared(container: &Value, protocol: &str) -> Result<Option<u64>> {
    let ports = container["ports"].as_array().into_iter().flatten();
    let mut of_it = ports.filter(|p| p["protocol"].as_str().unwrap_or("TCP") == protocol);
    let Some(first) = of_it.next() else {
        return Ok(None);
    };
    if of_it.next().is_some() {
        bail!("no stand-in serves two {protocol} ports");
    }
    let number = first["containerPort"].as_u64();
    number.map(Some).context("a port without containerPort")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(ports: Value) -> Option<Value> {
        let container = json!({"name": "main", "image": "x", "command": ["y"], "ports": ports});
        let pod = json!({"kind": "Pod", "spec": {"containers": [container]}});
        let cast = cast(vec![pod], "agnhost:1").ok()?;
        let container = &cast[0]["spec"]["containers"][0];
        assert_eq!(container["image"], "agnhost:1");
        assert!(container["command"].is_null());
        Some(container["args"].clone())
    }

    #[test]
    fn a_stand_in_serves_what_was_declared() {
        let port = |port: u16, protocol| json!({"containerPort": port, "protocol": protocol});
        for (ports, expected) in [
            (json!(null), Some(json!(["pause"]))),
            (
                json!([{"containerPort": 80}]),
                Some(json!(["netexec", "--http-port=80", "--udp-port=-1"])),
            ),
            (
                json!([port(80, "TCP"), port(90, "UDP")]),
                Some(json!(["netexec", "--http-port=80", "--udp-port=90"])),
            ),
            (json!([port(80, "TCP"), port(81, "TCP")]), None),
        ] {
            assert_eq!(args(ports.clone()), expected, "{ports}");
        }
    }

    #[test]
    fn what_has_no_containers_stays_as_it_is() {
        let service = json!({"kind": "Service", "spec": {"selector": {"app": "web"}}});
        assert_eq!(cast(vec![service.clone()], "i").unwrap(), [service]);
    }
}
