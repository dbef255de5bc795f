//! /metrics, /health and /ready over HTTP, on a port of the host and on a socket of our own.

use std::io::{self, ErrorKind};
use std::net::{SocketAddr, TcpListener};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use prometheus_client::encoding::text::encode;
use prometheus_client::registry::Registry;
use tracing::{error, info, warn};

use crate::feed::SharedZone;
use crate::metrics::Metrics;

/// What the pages show.
#[derive(Clone, Debug)]
pub struct Status {
    pub metrics: Metrics,
    pub registry: Arc<Registry>,
    pub zone: SharedZone,
}

/// Between two looks whether a port that another process has is free.
const PAUSE: Duration = Duration::from_millis(500);

/// The port of the host for the pages.
#[derive(Debug)]
pub struct Port {
    address: SocketAddr,
    /// None while another process has it.
    listener: Option<TcpListener>,
}

impl Port {
    /// Opens it, or finds that another process has it: our predecessor most likely, which will go.
    pub fn open(address: SocketAddr) -> Result<Self> {
        let listener = match TcpListener::bind(address) {
            Ok(listener) => Some(listener),
            Err(error) if error.kind() == ErrorKind::AddrInUse => {
                warn!(%address, "another process has the port for metrics: waiting for it");
                None
            }
            Err(error) => {
                return Err(error).with_context(|| format!("cannot serve metrics on {address}"));
            }
        };
        Ok(Self { address, listener })
    }

    async fn serve(self, router: Router) -> io::Result<()> {
        let listener = match self.listener {
            Some(listener) => {
                listener.set_nonblocking(true)?;
                tokio::net::TcpListener::from_std(listener)?
            }
            None => loop {
                match tokio::net::TcpListener::bind(self.address).await {
                    Ok(listener) => {
                        info!(address = %self.address, "metrics are ours to serve");
                        break listener;
                    }
                    Err(error) if error.kind() == ErrorKind::AddrInUse => {
                        tokio::time::sleep(PAUSE).await;
                    }
                    Err(error) => return Err(error),
                }
            },
        };
        axum::serve(listener, router).await
    }
}

/// Opens a socket for the pages, in place of a stale one.
pub fn open_socket(path: &Path) -> Result<UnixListener> {
    let failed = || format!("cannot serve status at {}", path.display());
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            return Err(error).with_context(failed);
        }
        _ => {}
    }
    let listener = UnixListener::bind(path).with_context(failed)?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

/// Where the pages are served.
#[derive(Debug)]
pub struct Pages {
    pub port: Option<Port>,
    pub socket: Option<UnixListener>,
}

impl Pages {
    /// Serves them, for ever.
    pub async fn serve(self, router: Router) {
        let port = async {
            let Some(port) = self.port else { return };
            if let Err(failure) = port.serve(router.clone()).await {
                error!(%failure, "metrics ended");
            }
        };
        let socket = async {
            let Some(socket) = self.socket else { return };
            let served = match tokio::net::UnixListener::from_std(socket) {
                Ok(socket) => axum::serve(socket, router.clone()).await,
                Err(failure) => Err(failure),
            };
            if let Err(failure) = served {
                error!(%failure, "status ended");
            }
        };
        tokio::join!(port, socket);
    }
}

/// The pages. /health says that the process lives, /ready that it knows the cluster's names.
pub fn router(status: Status) -> Router {
    Router::new()
        .route("/health", get(|| async { "OK" }))
        .route("/ready", get(ready))
        .route("/metrics", get(metrics))
        .with_state(status)
}

async fn ready(State(status): State<Status>) -> Response {
    match status.zone.load().is_some() {
        true => (StatusCode::OK, "OK\n").into_response(),
        false => (
            StatusCode::SERVICE_UNAVAILABLE,
            "the agent has not sent the zone yet: cluster names get SERVFAIL after a wait, if no other \
             weir-dns still answers here\n",
        )
            .into_response(),
    }
}

async fn metrics(State(status): State<Status>) -> Response {
    let zone = status.zone.load();
    status.metrics.synced.set(u64::from(zone.is_some()));
    let services = zone.as_ref().map_or(0, |zone| zone.len());
    status
        .metrics
        .services
        .set(i64::try_from(services).unwrap_or(i64::MAX));
    let mut text = String::new();
    match encode(&mut text, &status.registry) {
        Ok(()) => {
            let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
            ([(header::CONTENT_TYPE, kind)], text).into_response()
        }
        Err(_) => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
    }
}
