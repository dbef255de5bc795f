//! Every pod of an application as a client: of every Service by name, and of every other pod by address,
//! each compared with a naive reading of the policies. What tries is a process in the client's container.

use std::fmt;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::{Context, Result};
use weir_agent::model::{self, ObjectName};
use weir_common::Protocol;

use super::application::Application;
use crate::targets;

/// How long an attempt may take. A denial is silent, so this is what it costs.
const PATIENCE_SECONDS: &str = "3";
/// Clients that try at a time; each tries everything at once.
const CLIENTS: usize = 4;

/// Arguments: how long, then one target each. Prints, in the order in which they come, the number of the
/// target, how the attempt ended (as curl and timeout number it) and what came of it. It looks the name
/// up beforehand, so that no answer from DNS and no answer from the server are told apart.
const TRY: &str = r#"seconds=$1
shift
n=0
for target; do
  (
    set -- $target
    if ! getent ahosts "$2" >/dev/null; then
      code=6 said="no such name"
    elif [ "$1" = tcp ]; then
      said=$(curl -sS --max-time "$seconds" "http://$2:$3/hostname" 2>&1)
      code=$?
    else
      said=$(timeout "$seconds" bash -c '
        exec 3<>"/dev/udp/$0/$1" && printf hostname >&3 && dd bs=2048 count=1 <&3 2>/dev/null
      ' "$2" "$3" 2>&1)
      code=$?
    fi
    printf '%s %s %s\n' "$n" "$code" "${said//$'\n'/ }"
  ) &
  n=$((n + 1))
done
wait"#;
/// What curl and timeout end with when the time is over.
const TIME_IS_OVER: [&str; 2] = ["28", "124"];

/// One pair of a client and what it asked.
#[derive(Clone, Debug, PartialEq)]
pub struct Cell {
    pub client: String,
    pub target: String,
    pub by: By,
    pub way: Way,
    /// By the oracle.
    pub is_allowed: bool,
    pub heard: Heard,
    /// The pods that may answer.
    servers: Vec<String>,
}

/// How the client names what it asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum By {
    Name,
    Address,
}

/// Between which nodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    WithinNode,
    AcrossNodes,
    /// A Service has backends here and there.
    Either,
}

/// What came of an attempt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Heard {
    /// From a pod of that name.
    Answer(String),
    Nothing,
    /// No name, a refusal, anything else that neither an open nor a closed way explains.
    Trouble(String),
}

impl Cell {
    /// An answer from a pod that may give it, or silence, as the policies say.
    #[must_use]
    pub fn is_right(&self) -> bool {
        match &self.heard {
            Heard::Answer(server) => self.is_allowed && self.servers.contains(server),
            Heard::Nothing => !self.is_allowed,
            Heard::Trouble(_) => false,
        }
    }
}

impl fmt::Display for Cell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { client, target, .. } = self;
        let expected = if self.is_allowed { "allowed" } else { "denied" };
        write!(f, "{client} -> {target} ({:?}): {expected}, ", self.way)?;
        match &self.heard {
            Heard::Answer(server) => write!(f, "answered by {server}"),
            Heard::Nothing => f.write_str("no answer"),
            Heard::Trouble(what) => f.write_str(what),
        }
    }
}

/// Something to try, as [`TRY`] takes it, and the cell it will be.
struct Attempt {
    words: String,
    cell: Cell,
}

impl Application {
    /// Tries every pair; `folder` is where the policies are read from, not the cluster.
    ///
    /// # Errors
    /// A client's container runs nothing.
    pub fn matrix(&self, folder: &Path) -> Result<Vec<Cell>> {
        let cluster = targets::cluster(folder, self.pods.clone())?;
        let mut tries = Vec::new();
        for client in &self.pods {
            let mut attempts = self.by_name(&cluster, client)?;
            attempts.extend(self.by_address(&cluster, client)?);
            tries.push((client, attempts));
        }
        let next = AtomicUsize::new(0);
        let work = || -> Result<Vec<Cell>> {
            let mut cells = Vec::new();
            while let Some((client, attempts)) = tries.get(next.fetch_add(1, Ordering::Relaxed)) {
                cells.extend(self.attempt(&client.id, attempts)?);
            }
            Ok(cells)
        };
        std::thread::scope(|scope| {
            let workers: Vec<_> = (0..CLIENTS).map(|_| scope.spawn(work)).collect();
            let mut cells = Vec::new();
            for worker in workers {
                match worker.join() {
                    Ok(some) => cells.extend(some?),
                    Err(panic) => std::panic::resume_unwind(panic),
                }
            }
            Ok(cells)
        })
    }

    /// Every port of every Service, but those that have two answers.
    fn by_name(
        &self,
        cluster: &crate::oracle::Cluster,
        client: &model::Pod,
    ) -> Result<Vec<Attempt>> {
        let mut attempts = Vec::new();
        for port in &self.ports {
            let Some(is_allowed) = targets::is_allowed(cluster, &client.id, port)? else {
                continue;
            };
            let servers = || port.backends.iter().map(|(id, _)| id);
            let nodes: Vec<_> = servers()
                .filter_map(|id| self.pods.iter().find(|pod| pod.id == *id))
                .map(|pod| pod.node == client.node)
                .collect();
            let way = match (nodes.contains(&true), nodes.contains(&false)) {
                (true, true) => Way::Either,
                (true, false) => Way::WithinNode,
                _ => Way::AcrossNodes,
            };
            let name = port.name_in(&client.id.namespace);
            attempts.push(Attempt {
                words: words(port.protocol, &name, port.port),
                cell: Cell {
                    client: client.id.to_string(),
                    target: port.to_string(),
                    by: By::Name,
                    way,
                    is_allowed,
                    heard: Heard::Nothing,
                    servers: servers().map(|id| id.name.to_string()).collect(),
                },
            });
        }
        Ok(attempts)
    }

    /// Every port that any other pod declares.
    fn by_address(
        &self,
        cluster: &crate::oracle::Cluster,
        client: &model::Pod,
    ) -> Result<Vec<Attempt>> {
        let mut attempts = Vec::new();
        for server in self.pods.iter().filter(|pod| pod.id != client.id) {
            let address = server.addresses.first();
            let address = address.with_context(|| format!("{} has no address", server.id))?;
            for port in &server.ports {
                let is_allowed =
                    targets::may_reach(cluster, &client.id, &server.id, port.protocol, port.port)?;
                let way = if server.node == client.node {
                    Way::WithinNode
                } else {
                    Way::AcrossNodes
                };
                attempts.push(Attempt {
                    words: words(port.protocol, &address.to_string(), port.port),
                    cell: Cell {
                        client: client.id.to_string(),
                        target: format!("{} at {address}:{}", server.id, port.port),
                        by: By::Address,
                        way,
                        is_allowed,
                        heard: Heard::Nothing,
                        servers: vec![server.id.name.to_string()],
                    },
                });
            }
        }
        Ok(attempts)
    }

    fn attempt(&self, client: &ObjectName, attempts: &[Attempt]) -> Result<Vec<Cell>> {
        let namespace = format!("--namespace={}", client.namespace);
        let mut args = vec![
            &*namespace,
            "exec",
            &client.name,
            "--",
            "bash",
            "-c",
            TRY,
            "try",
        ];
        args.push(PATIENCE_SECONDS);
        args.extend(attempts.iter().map(|attempt| attempt.words.as_str()));
        let said = self.kubectl().run(&args);
        let said = said.with_context(|| format!("try from {client}"))?;
        let mut cells: Vec<Cell> = attempts.iter().map(|a| a.cell.clone()).collect();
        for cell in &mut cells {
            cell.heard = Heard::Trouble("it was not tried".to_owned());
        }
        for (number, heard) in said.lines().filter_map(heard) {
            let cell = cells.get_mut(number).context("a number of no attempt")?;
            cell.heard = heard;
        }
        Ok(cells)
    }
}

fn words(protocol: Protocol, host: &str, port: u16) -> String {
    let protocol = match protocol {
        Protocol::TCP => "tcp",
        _ => "udp",
    };
    format!("{protocol} {host} {port}")
}

/// A line that [`TRY`] prints.
fn heard(line: &str) -> Option<(usize, Heard)> {
    let (number, rest) = line.split_once(' ')?;
    let (code, said) = rest.split_once(' ')?;
    let heard = match code {
        "0" => Heard::Answer(said.to_owned()),
        code if TIME_IS_OVER.contains(&code) => Heard::Nothing,
        code => Heard::Trouble(format!("{said} ({code})")),
    };
    Some((number.parse().ok()?, heard))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_attempt_ends_in_an_answer_in_silence_or_in_trouble() {
        let trouble = |what: &str| Heard::Trouble(what.to_owned());
        for (line, expected) in [
            ("3 0 web-1", Some((3, Heard::Answer("web-1".to_owned())))),
            ("0 28 curl: (28) timed out", Some((0, Heard::Nothing))),
            ("0 124 ", Some((0, Heard::Nothing))),
            ("1 7 refused", Some((1, trouble("refused (7)")))),
            ("1 6 no such name", Some((1, trouble("no such name (6)")))),
            ("nonsense", None),
        ] {
            assert_eq!(heard(line), expected, "{line}");
        }
    }

    #[test]
    fn an_answer_is_right_if_it_is_allowed_and_from_a_backend() {
        let answer = |from: &str| Heard::Answer(from.to_owned());
        for (is_allowed, heard, is_right) in [
            (true, answer("web-1"), true),
            (true, answer("other"), false),
            (true, Heard::Nothing, false),
            (false, answer("web-1"), false),
            (false, Heard::Nothing, true),
            (false, Heard::Trouble("no such name".to_owned()), false),
        ] {
            let cell = Cell {
                client: "shop/a".to_owned(),
                target: "shop/web:80".to_owned(),
                by: By::Name,
                way: Way::Either,
                is_allowed,
                heard,
                servers: vec!["web-1".to_owned()],
            };
            assert_eq!(cell.is_right(), is_right, "{cell}");
        }
    }
}
