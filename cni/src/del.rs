//! DEL: ask the agent; when it does not answer, delete the device and leave the release on disk.
//! What is gone already is no error, and no namespace is entered: deleting our end deletes both.

use std::time::{Duration, Instant};

use rscni_plugin::error::Error;
use rscni_plugin::types::Args;
use weir_cni::attachment::Attachment;
use weir_cni::released;
use weir_cni::wire::Request;

use crate::agent::{Agent, NoAnswer};
use crate::config::{self, Config};
use crate::failure;
use crate::netlink::Netlink;

/// How long the agent may take before we do it without it.
const PATIENCE: Duration = Duration::from_secs(1);

pub(crate) fn del(args: &Args) -> Result<(), Error> {
    let config = Config::of(args.config())?;
    let attachment = config::attachment(args)?;
    match ask(&config, &attachment) {
        Ok(()) => Ok(()),
        Err(_) => del_alone(&config, &attachment),
    }
}

fn ask(config: &Config, attachment: &Attachment) -> Result<(), NoAnswer> {
    let request = Request::Del {
        attachment: attachment.clone(),
    };
    Agent::connect(&config.agent_socket, Instant::now() + PATIENCE)?
        .ask(&request)
        .map(drop)
}

/// The device goes first: an address counts as free only when nothing can send from it. If the
/// release cannot be written, the runtime has to ask again (error 5).
fn del_alone(config: &Config, attachment: &Attachment) -> Result<(), Error> {
    let device = attachment.device();
    Netlink::open()
        .and_then(|mut node| node.delete(&device))
        .map_err(failure::step(&format!("delete {device}")))?;
    released::write(&config.released_dir, attachment).map_err(failure::step(&format!(
        "the agent does not answer, and the release cannot be written to {}",
        config.released_dir.display()
    )))
}
