//! One request to the agent's local API: HTTP over its unix socket.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use http_body_util::{BodyExt, Empty};
use hyper::body::Bytes;
use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;

/// How long an answer may take.
const PATIENCE: Duration = Duration::from_secs(10);

/// Asks for a path and returns the body.
pub(crate) async fn fetch(socket: &Path, path: &str) -> Result<Bytes> {
    tokio::time::timeout(PATIENCE, request(socket, path))
        .await
        .with_context(|| format!("the agent did not answer {path} within {PATIENCE:?}"))?
}

/// Text as it stands in a query (RFC 3986, 2.1).
pub(crate) fn escape(text: &str) -> String {
    let escaped = text.bytes().map(|byte| match byte {
        b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => {
            char::from(byte).to_string()
        }
        _ => format!("%{byte:02X}"),
    });
    escaped.collect()
}

async fn request(socket: &Path, path: &str) -> Result<Bytes> {
    let stream = UnixStream::connect(socket).await.with_context(|| {
        format!(
            "connect to the agent at {}: is weir-agent running on this node?",
            socket.display()
        )
    })?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
        .await
        .context("HTTP handshake")?;
    let driver = tokio::spawn(connection);
    let request = hyper::Request::get(path)
        .header(hyper::header::HOST, "weir")
        .body(Empty::<Bytes>::new())
        .context("build the request")?;
    let response = sender
        .send_request(request)
        .await
        .context("send the request")?;
    let status = response.status();
    let body = response
        .into_body()
        .collect()
        .await
        .context("read the answer")?
        .to_bytes();
    drop(sender);
    driver
        .await
        .context("the connection's task")?
        .context("the connection")?;
    if status == hyper::StatusCode::BAD_REQUEST {
        bail!("{}", String::from_utf8_lossy(&body));
    }
    if !status.is_success() {
        bail!(
            "the agent answered {status} to {path}: {}",
            String::from_utf8_lossy(&body)
        );
    }
    Ok(body)
}
