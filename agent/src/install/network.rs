//! The network configuration. It is what makes a node Ready and the runtime start pods, so it is written
//! last: by the agent, when it first is ready. It stays when the agent ends.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use backon::{BackoffBuilder, ExponentialBuilder};
use serde_json::json;
use tracing::{info, warn};

use super::file;
use super::plugin::{self, PLUGIN};
use crate::beat::{LOOK, beat};

/// The file's name. The runtime takes the first by name.
pub const FILE: &str = "05-weir.conflist";
const MODE: u32 = 0o644;

/// How long the first pause is.
const FIRST_PAUSE: Duration = Duration::from_millis(5);

/// How often something is looked at.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    /// Whether the node is ready for pods: so often in the end, and more often at first, since a start takes less.
    pub before: Duration,
    /// Whether the file is still there.
    pub after: Duration,
}

impl Default for Pace {
    fn default() -> Self {
        Self {
            before: Duration::from_millis(100),
            after: LOOK,
        }
    }
}

/// What the plugin has to be told, as paths of the node.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Network {
    /// Where the agent answers the plugin.
    pub agent_socket: PathBuf,
    /// Where the plugin leaves releases for an agent that does not answer.
    pub released_dir: PathBuf,
}

impl Network {
    /// The network configuration list (CNI specification 1.0.0, section 1).
    ///
    /// Not 1.1.0: with that a runtime asks the plugin for its STATUS, and reports the node NotReady for
    /// the time that an agent takes to restart, although the network of every pod goes on.
    pub fn conflist(&self) -> String {
        let list = json!({
            "cniVersion": "1.0.0",
            "name": "weir",
            "plugins": [{
                "type": PLUGIN,
                "agentSocket": self.agent_socket,
                "releasedDir": self.released_dir,
            }],
        });
        format!("{list:#}\n")
    }
}

/// Writes the configuration, unless it is there. True if it was written.
///
/// # Errors
/// The folder cannot be read or written.
pub fn announce(folder: &Path, network: &Network) -> io::Result<bool> {
    let path = folder.join(FILE);
    let text = network.conflist();
    if file::is(&path, text.as_bytes(), MODE)? {
        return Ok(false);
    }
    fs::create_dir_all(folder)?;
    file::put(&path, text.as_bytes(), MODE)?;
    Ok(true)
}

/// A plugin, and the folder where somebody else installs it.
#[derive(Clone, Debug)]
pub struct Expected {
    pub plugin: PathBuf,
    pub folder: PathBuf,
}

/// Announces the network as soon as `withheld` gives no reason against it and the plugin is there, and again whenever the file has gone
/// or changed. For ever; dropping this leaves the file.
pub async fn keep_announced<Answer: Future<Output = Option<String>>>(
    folder: PathBuf,
    network: Network,
    expected: Option<Expected>,
    pace: Pace,
    mut withheld: impl FnMut() -> Answer,
) {
    let (mut said, mut pauses) = (None, pauses(pace.before));
    while let Some(why) = withheld().await {
        if said.as_ref() != Some(&why) {
            info!(
                why,
                file = FILE,
                "the network configuration is withheld: no pod starts on this node yet"
            );
        }
        said = Some(why);
        tokio::time::sleep(pauses.next().unwrap_or(pace.before)).await;
    }
    if let Some(expected) = &expected {
        wait_for(expected, pace.before).await;
    }
    for other in before_ours(&folder) {
        warn!(
            other,
            ours = FILE,
            "the runtime takes the first network configuration by name, and that is not ours: \
             pods get another network until it is removed"
        );
    }
    let mut trouble = None;
    loop {
        match announce(&folder, &network) {
            Ok(written) => {
                if written {
                    info!(file = %folder.join(FILE).display(), "network configuration written");
                }
                trouble = None;
            }
            Err(error) => {
                let error = error.to_string();
                if trouble.as_ref() != Some(&error) {
                    let folder = folder.display();
                    warn!(%folder, error, "the network configuration cannot be written");
                }
                trouble = Some(error);
            }
        }
        beat(pace.after).await;
    }
}

/// Twice as long each time, up to `most`.
fn pauses(most: Duration) -> impl Iterator<Item = Duration> {
    let pauses = ExponentialBuilder::new().with_min_delay(FIRST_PAUSE.min(most));
    pauses.with_max_delay(most).without_max_times().build()
}

/// Without the plugin a runtime that is told of the network fails to start every pod.
async fn wait_for(expected: &Expected, pace: Duration) {
    let folder = expected.folder.display();
    let (mut said, mut pauses) = (None, pauses(pace));
    loop {
        let why = match plugin::is_installed(&expected.plugin, &expected.folder) {
            Ok(true) => return,
            Ok(false) => "it is not there".to_owned(),
            Err(error) => format!("{error:#}"),
        };
        if said.as_ref() != Some(&why) {
            info!(%folder, why, "waiting for the plugin of this version");
        }
        said = Some(why);
        tokio::time::sleep(pauses.next().unwrap_or(pace)).await;
    }
}

/// Configurations of others that a runtime prefers to ours.
pub(super) fn before_ours(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(folder)
        .into_iter()
        .flatten()
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter(|name| {
            let extension = Path::new(name).extension().and_then(|it| it.to_str());
            matches!(extension, Some("conf" | "conflist" | "json")) && name.as_str() < FILE
        })
        .collect();
    names.sort();
    names
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    fn network() -> Network {
        Network {
            agent_socket: "/run/weir/cni.sock".into(),
            released_dir: "/var/lib/weir/released".into(),
        }
    }

    #[test]
    fn the_configuration_has_what_runtime_and_plugin_read() {
        let list: serde_json::Value = serde_json::from_str(&network().conflist()).unwrap();
        assert_eq!(
            list,
            json!({
                "cniVersion": "1.0.0",
                "name": "weir",
                "plugins": [{
                    "type": "weir-cni",
                    "agentSocket": "/run/weir/cni.sock",
                    "releasedDir": "/var/lib/weir/released",
                }],
            })
        );
    }

    #[test]
    fn others_are_left_alone_and_those_that_win_are_known() {
        let folder = tempfile::tempdir().unwrap();
        for name in [
            "00-first.conflist",
            "04-x.conf",
            "01-notes.txt",
            "10-kindnet.conflist",
        ] {
            fs::write(folder.path().join(name), name).unwrap();
        }
        assert!(announce(folder.path(), &network()).unwrap());
        assert!(!announce(folder.path(), &network()).unwrap());
        let winners = before_ours(folder.path());
        assert_eq!(winners, ["00-first.conflist", "04-x.conf"]);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 5);
        let other = fs::read_to_string(folder.path().join("10-kindnet.conflist"));
        assert_eq!(other.unwrap(), "10-kindnet.conflist");
    }

    #[tokio::test]
    async fn it_comes_when_the_node_is_ready_and_comes_back_when_it_is_removed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(FILE);
        let expected = Expected {
            plugin: folder.path().join("image"),
            folder: folder.path().join("bin"),
        };
        fs::write(&expected.plugin, "plugin").unwrap();
        let asked = Cell::new(0);
        let withheld = || {
            asked.set(asked.get() + 1);
            let why = (asked.get() <= 3).then(|| "no range".to_owned());
            assert!(!path.exists(), "not before it is ready");
            async move { why }
        };
        let pace = Pace {
            before: Duration::from_millis(1),
            after: Duration::from_millis(1),
        };
        let awaited = Some(expected.clone());
        let kept = keep_announced(folder.path().to_owned(), network(), awaited, pace, withheld);
        let watched = async {
            while asked.get() < 4 {
                tokio::time::sleep(pace.before).await;
            }
            tokio::time::sleep(20 * pace.before).await;
            assert!(!path.exists(), "not before the plugin is there");
            plugin::install(&expected.plugin, &expected.folder).unwrap();
            for _ in 0..2 {
                while !path.exists() {
                    tokio::time::sleep(pace.before).await;
                }
                fs::remove_file(&path).unwrap();
            }
        };
        tokio::select! {
            () = kept => {}
            () = watched => {}
        }
        assert_eq!(asked.get(), 4);
    }
}
