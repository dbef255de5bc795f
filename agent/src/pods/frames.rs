//! The agent's end of one connection with the plugin: frames in and out, of bounded size.

use std::io;

use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use weir_cni::wire::{MAX_FRAME, Reply, Request};

pub(super) struct Frames(BufReader<UnixStream>);

/// What came instead of a request.
#[derive(Debug, thiserror::Error)]
pub(super) enum NoRequest {
    /// The plugin has nothing more to say.
    #[error("the connection ended")]
    Ended,
    #[error("not a request: {0}")]
    Invalid(String),
    #[error(transparent)]
    Io(#[from] io::Error),
}

impl Frames {
    pub(super) fn new(stream: UnixStream) -> Self {
        Self(BufReader::new(stream))
    }

    pub(super) async fn read(&mut self) -> Result<Request, NoRequest> {
        let mut line = Vec::new();
        let mut bounded = (&mut self.0).take(MAX_FRAME as u64);
        bounded.read_until(b'\n', &mut line).await?;
        if line.is_empty() {
            return Err(NoRequest::Ended);
        }
        if !line.ends_with(b"\n") {
            return Err(NoRequest::Invalid("it is cut off or too long".into()));
        }
        serde_json::from_slice(&line).map_err(|error| NoRequest::Invalid(error.to_string()))
    }

    /// Returns when the plugin has ended the connection, or its half of it. Cancel safe; reads
    /// nothing.
    pub(super) async fn ended(&mut self) {
        match self.0.fill_buf().await {
            Ok([]) | Err(_) => {}
            // It says something early. That is for the next `read`.
            Ok(_) => std::future::pending().await,
        }
    }

    pub(super) async fn write(&mut self, reply: &Reply) -> io::Result<()> {
        let mut line = serde_json::to_vec(reply)?;
        line.push(b'\n');
        self.0.write_all(&line).await
    }
}
