//! What the agent answers to probes and to the CLI.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use weir_cli::views;

use crate::admin::{Local, Probes, Refusal};
use crate::events::Recent;
use crate::export;
use crate::kernel::second_lock;
use crate::line::{self, Handle, Line, Published};

/// Answers of the agent to whoever asks.
pub(super) struct Told {
    pub(super) line: Handle,
    pub(super) published: Arc<Published>,
    pub(super) recent: Arc<Recent>,
}

impl Told {
    async fn ask<T: Send + 'static>(
        &self,
        question: impl FnOnce(&mut Line) -> T + Send + 'static,
    ) -> Result<T, Refusal> {
        self.line
            .ask(question)
            .await
            .map_err(|ended| ended.to_string())
    }
}

impl Probes for Told {
    async fn not_ready(&self) -> Result<Vec<String>, Refusal> {
        self.ask(|line| line.not_ready()).await
    }

    async fn metrics(&self) -> Result<String, Refusal> {
        // The rule counts by itself; it is read when somebody asks.
        let drops = tokio::task::spawn_blocking(second_lock::drops).await;
        if let Ok(Ok(Some(drops))) = drops {
            self.published.lock_drops.store(drops, Ordering::Relaxed);
        }
        let sample = self
            .ask(|line| line.sample())
            .await?
            .map_err(|e| e.to_string())?;
        export::encode(sample).map_err(|e| e.to_string())
    }
}

impl Local for Told {
    async fn status(&self) -> Result<views::Status, Refusal> {
        self.ask(|line| line.status()).await
    }

    async fn services(&self) -> Result<Vec<views::ServiceView>, Refusal> {
        self.ask(|line| line.services()).await
    }

    async fn endpoints(&self) -> Result<Vec<views::EndpointView>, Refusal> {
        self.ask(|line| line.endpoints()).await
    }

    async fn policy(&self) -> Result<Vec<views::PolicyView>, Refusal> {
        self.ask(|line| line.policy()).await
    }

    async fn flows(&self) -> Result<Vec<views::FlowView>, Refusal> {
        let tables = self.ask(|line| line.flow_tables()).await?;
        let names = self.published.names.load_full();
        let rules = self.published.rules.load_full();
        let read = tokio::task::spawn_blocking(move || line::flows(&tables, &rules, &names));
        read.await
            .map_err(|e| e.to_string())?
            .map_err(|e| e.to_string())
    }

    async fn drops(&self) -> Result<views::Drops, Refusal> {
        let totals = self
            .ask(|line| line.drop_totals())
            .await?
            .map_err(|e| e.to_string())?;
        Ok(views::Drops {
            totals,
            recent: self.recent.all(),
        })
    }

    async fn verify(&self) -> Result<views::Verify, Refusal> {
        self.ask(|line| line.verify())
            .await?
            .map_err(|e| e.to_string())
    }
}
