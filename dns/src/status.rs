//! /metrics, /health and /ready over HTTP.

use std::sync::Arc;

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use prometheus_client::encoding::text::encode;
use prometheus_client::registry::Registry;

use crate::feed::SharedZone;
use crate::metrics::Metrics;

/// What the pages show.
#[derive(Clone, Debug)]
pub struct Status {
    pub metrics: Metrics,
    pub registry: Arc<Registry>,
    pub zone: SharedZone,
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
            "the agent has not sent the zone yet\n",
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
