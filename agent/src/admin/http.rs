//! The two HTTP servers' routes. Who computes the answers is behind the traits.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::{Query, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use serde::{Deserialize, Serialize};
use tokio::time::timeout;
use weir_cli::explained::Explained;
use weir_cli::views::{Drops, EndpointView, PolicyView, ServiceView, Status, Verify};

use super::Pieces;
use crate::export::text_of;

/// How long an answer may take before the agent counts as stuck.
const PATIENCE: Duration = Duration::from_secs(5);

/// Why there is no answer, in words.
pub type Refusal = String;

/// What probes and Prometheus ask.
pub trait Probes: Send + Sync + 'static {
    /// Does the one thread that writes to the kernel still answer?
    fn alive(&self) -> impl Future<Output = Result<(), Refusal>> + Send;
    /// Every reason why the node is not ready; none when it is.
    fn not_ready(&self) -> Vec<String>;
    /// The page of metrics (OpenMetrics text).
    fn metrics(&self) -> impl Future<Output = Result<String, Refusal>> + Send;
}

/// What the `weir` command asks.
pub trait Local: Send + Sync + 'static {
    fn status(&self) -> impl Future<Output = Result<Status, Refusal>> + Send;
    fn services(&self) -> impl Future<Output = Result<Vec<ServiceView>, Refusal>> + Send;
    fn endpoints(&self) -> impl Future<Output = Result<Vec<EndpointView>, Refusal>> + Send;
    fn policy(&self) -> impl Future<Output = Result<Vec<PolicyView>, Refusal>> + Send;
    /// Rows of [`crate::explain::diff::Told`].
    fn objects(&self) -> impl Future<Output = Result<Pieces, Refusal>> + Send;
    /// As it was typed: from whom, to whom. What cannot be meant is refused in the answer.
    fn explain(
        &self,
        from: String,
        to: String,
    ) -> impl Future<Output = Result<Result<Explained, String>, Refusal>> + Send;
    /// Rows of [`weir_cli::views::FlowView`]; there may be hundreds of thousands.
    fn flows(&self) -> impl Future<Output = Result<Pieces, Refusal>> + Send;
    fn drops(&self) -> impl Future<Output = Result<Drops, Refusal>> + Send;
    fn verify(&self) -> impl Future<Output = Result<Verify, Refusal>> + Send;
}

/// Of whom something is asked.
#[derive(Debug, Deserialize)]
struct Asked {
    from: String,
    to: String,
}

/// `/metrics`, `/healthz`, `/readyz`.
pub fn probes<P: Probes>(of: Arc<P>) -> Router {
    Router::new()
        .route(
            "/healthz",
            get(|State(of): State<Arc<P>>| async move {
                match in_time(of.alive()).await {
                    Ok(()) => (StatusCode::OK, "ok\n".to_owned()),
                    Err(stuck) => (StatusCode::SERVICE_UNAVAILABLE, format!("{stuck}\n")),
                }
            }),
        )
        .route(
            "/readyz",
            get(|State(of): State<Arc<P>>| async move {
                if let Err(stuck) = in_time(of.alive()).await {
                    return (StatusCode::SERVICE_UNAVAILABLE, format!("{stuck}\n"));
                }
                match of.not_ready() {
                    reasons if reasons.is_empty() => (StatusCode::OK, "ok\n".to_owned()),
                    reasons => (
                        StatusCode::SERVICE_UNAVAILABLE,
                        format!("{}\n", reasons.join("\n")),
                    ),
                }
            }),
        )
        .route(
            "/metrics",
            get(|State(of): State<Arc<P>>, headers: HeaderMap| async move {
                const OPEN_METRICS: &str =
                    "application/openmetrics-text; version=1.0.0; charset=utf-8";
                const TEXT: &str = "text/plain; version=0.0.4; charset=utf-8";
                let accepted = headers.get(header::ACCEPT).and_then(|a| a.to_str().ok());
                let reads_open_metrics =
                    accepted.is_some_and(|a| a.contains("application/openmetrics-text"));
                match in_time(of.metrics()).await {
                    Ok(page) if reads_open_metrics => {
                        ([(header::CONTENT_TYPE, OPEN_METRICS)], page).into_response()
                    }
                    Ok(page) => ([(header::CONTENT_TYPE, TEXT)], text_of(&page)).into_response(),
                    Err(stuck) => (StatusCode::SERVICE_UNAVAILABLE, stuck).into_response(),
                }
            }),
        )
        .with_state(of)
}

/// `/v1/…`, for the `weir` command.
pub fn local<L: Local>(of: Arc<L>) -> Router {
    type Of<L> = State<Arc<L>>;
    Router::new()
        .route(
            "/v1/status",
            get(|State(of): Of<L>| async move { answer(of.status()).await }),
        )
        .route(
            "/v1/services",
            get(|State(of): Of<L>| async move { answer(of.services()).await }),
        )
        .route(
            "/v1/endpoints",
            get(|State(of): Of<L>| async move { answer(of.endpoints()).await }),
        )
        .route(
            "/v1/policy",
            get(|State(of): Of<L>| async move { answer(of.policy()).await }),
        )
        .route(
            "/v1/policy/objects",
            get(|State(of): Of<L>| async move { pieces(of.objects()).await }),
        )
        .route(
            "/v1/policy/explain",
            get(|State(of): Of<L>, Query(asked): Query<Asked>| async move {
                match in_time(of.explain(asked.from, asked.to)).await {
                    Ok(Ok(explained)) => Json(explained).into_response(),
                    Ok(Err(wrong)) => (StatusCode::BAD_REQUEST, wrong).into_response(),
                    Err(refusal) => (StatusCode::SERVICE_UNAVAILABLE, refusal).into_response(),
                }
            }),
        )
        .route(
            "/v1/flows",
            get(|State(of): Of<L>| async move { pieces(of.flows()).await }),
        )
        .route(
            "/v1/drops",
            get(|State(of): Of<L>| async move { answer(of.drops()).await }),
        )
        .route(
            "/v1/verify",
            get(|State(of): Of<L>| async move { answer(of.verify()).await }),
        )
        .with_state(of)
}

async fn answer<T: Serialize>(asked: impl Future<Output = Result<T, Refusal>>) -> Response {
    match in_time(asked).await {
        Ok(value) => Json(value).into_response(),
        Err(refusal) => (StatusCode::SERVICE_UNAVAILABLE, refusal).into_response(),
    }
}

async fn pieces(asked: impl Future<Output = Result<Pieces, Refusal>>) -> Response {
    match in_time(asked).await {
        Ok(pieces) => {
            let next = |mut pieces: Pieces| async move {
                let piece = pieces.recv().await?;
                Some((piece, pieces))
            };
            let body = Body::from_stream(futures::stream::unfold(pieces, next));
            ([(header::CONTENT_TYPE, "application/json")], body).into_response()
        }
        Err(refusal) => (StatusCode::SERVICE_UNAVAILABLE, refusal).into_response(),
    }
}

async fn in_time<T>(asked: impl Future<Output = Result<T, Refusal>>) -> Result<T, Refusal> {
    timeout(PATIENCE, asked)
        .await
        .unwrap_or_else(|_| Err(format!("the agent did not answer within {PATIENCE:?}")))
}

#[cfg(test)]
mod tests {
    use axum::body::Body;
    use axum::http::Request;
    use tower::ServiceExt;

    use super::*;

    struct Node(Result<Vec<String>, Refusal>);

    impl Probes for Node {
        async fn alive(&self) -> Result<(), Refusal> {
            self.0.clone().map(drop)
        }

        fn not_ready(&self) -> Vec<String> {
            self.0.clone().unwrap_or_default()
        }

        async fn metrics(&self) -> Result<String, Refusal> {
            Ok("# EOF\n".into())
        }
    }

    async fn ask(node: Node, path: &str) -> (StatusCode, String) {
        let request = Request::get(path).body(Body::empty()).unwrap();
        let response = probes(Arc::new(node)).oneshot(request).await.unwrap();
        let status = response.status();
        let body = axum::body::to_bytes(response.into_body(), 1 << 16)
            .await
            .unwrap();
        (status, String::from_utf8(body.to_vec()).unwrap())
    }

    #[tokio::test]
    async fn a_node_that_is_not_ready_is_alive_and_says_why() {
        let node = || Node(Ok(vec!["Service is not synced".into()]));
        assert_eq!(
            ask(node(), "/healthz").await,
            (StatusCode::OK, "ok\n".into())
        );
        assert_eq!(
            ask(node(), "/readyz").await,
            (
                StatusCode::SERVICE_UNAVAILABLE,
                "Service is not synced\n".into()
            )
        );
    }

    #[tokio::test]
    async fn an_agent_that_is_stuck_is_not_alive() {
        let stuck = Node(Err("the line has ended".into()));
        assert_eq!(
            ask(stuck, "/healthz").await.0,
            StatusCode::SERVICE_UNAVAILABLE
        );
    }
}
