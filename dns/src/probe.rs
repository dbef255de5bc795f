//! Is that process ready? For a kubelet, which asks by running this in the process's own container: a
//! port of the host would be answered by whichever process has it.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, bail};

/// Less than a kubelet waits.
const PATIENCE: Duration = Duration::from_secs(2);

/// Prints what the process at `socket` says at /ready. Success if it is.
pub fn ready(socket: &Path) -> ExitCode {
    match ask(socket) {
        Ok(said) => {
            print!("{said}");
            ExitCode::SUCCESS
        }
        Err(why) => {
            eprintln!("{why:#}");
            ExitCode::FAILURE
        }
    }
}

fn ask(socket: &Path) -> Result<String> {
    let mut stream = UnixStream::connect(socket)
        .with_context(|| format!("nobody is at {}", socket.display()))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(b"GET /ready HTTP/1.0\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let (head, body) = answer.split_once("\r\n\r\n").context("no page")?;
    if head.split(' ').nth(1) != Some("200") {
        bail!("{}", body.trim());
    }
    Ok(body.to_owned())
}
