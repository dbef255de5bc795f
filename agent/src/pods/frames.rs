//! The agent's end of one connection with the plugin: frames in and out, of bounded size.

use std::io;
use std::net::Shutdown;

use socket2::SockRef;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tracing::debug;
use weir_cni::wire::{MAX_FRAME, Reply, Request};

pub(super) struct Frames {
    stream: BufReader<UnixStream>,
    /// What has come of the next request.
    begun: Vec<u8>,
}

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
        Self {
            stream: BufReader::new(stream),
            begun: Vec::new(),
        }
    }

    /// The next request. Cancel safe.
    pub(super) async fn read(&mut self) -> Result<Request, NoRequest> {
        let room = MAX_FRAME - self.begun.len();
        let mut bounded = (&mut self.stream).take(room as u64);
        bounded.read_until(b'\n', &mut self.begun).await?;
        let line = std::mem::take(&mut self.begun);
        if line.is_empty() {
            return Err(NoRequest::Ended);
        }
        if !line.ends_with(b"\n") {
            return Err(NoRequest::Invalid("it is cut off or too long".into()));
        }
        serde_json::from_slice(&line).map_err(|error| NoRequest::Invalid(error.to_string()))
    }

    /// Refuses what the plugin has not said yet, and tells it so; what it has said can still be read, and after it the end.
    pub(super) fn hear_no_more(&self) {
        if let Err(error) = SockRef::from(self.stream.get_ref()).shutdown(Shutdown::Read) {
            debug!(%error, "the CNI plugin has gone");
        }
    }

    /// Returns when the plugin has ended the connection, or its half of it. Cancel safe; reads
    /// nothing.
    pub(super) async fn ended(&mut self) {
        match self.stream.fill_buf().await {
            Ok([]) | Err(_) => {}
            // It says something early. That is for the next `read`.
            Ok(_) => std::future::pending().await,
        }
    }

    pub(super) async fn write(&mut self, reply: &Reply) -> io::Result<()> {
        let mut line = serde_json::to_vec(reply)?;
        line.push(b'\n');
        self.stream.write_all(&line).await
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::time::timeout;

    use super::*;

    #[tokio::test]
    async fn what_was_said_before_the_last_moment_counts_and_later_the_plugin_hears_that_it_is_late()
     {
        let (agent, mut plugin) = UnixStream::pair().unwrap();
        let mut frames = Frames::new(agent);
        plugin.write_all(b"{\"request\":\"done\"}\n").await.unwrap();
        frames.hear_no_more();
        let late = plugin.write_all(b"{\"request\":\"done\"}\n").await;
        assert_eq!(late.unwrap_err().kind(), io::ErrorKind::BrokenPipe);
        assert_eq!(frames.read().await.unwrap(), Request::Done);
        let ended = frames.read().await;
        assert!(matches!(ended, Err(NoRequest::Ended)), "{ended:?}");
    }

    #[tokio::test]
    async fn a_reader_that_is_called_off_loses_nothing_of_a_request() {
        let (agent, mut plugin) = UnixStream::pair().unwrap();
        let mut frames = Frames::new(agent);
        plugin.write_all(b"{\"request\":").await.unwrap();
        let read = timeout(Duration::from_millis(20), frames.read()).await;
        assert!(read.is_err(), "{read:?}");
        plugin.write_all(b"\"done\"}\n").await.unwrap();
        assert_eq!(frames.read().await.unwrap(), Request::Done);
    }
}
