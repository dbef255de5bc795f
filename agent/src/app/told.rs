//! What the agent answers to probes and to the CLI.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::sync::{mpsc, oneshot};
use weir_cli::explained::Explained;
use weir_cli::views::{self, DropTotal};
use weir_common::counter::Drops;

use super::room;
use crate::admin::{JsonList, Local, Pieces, Probes, Refusal};
use crate::conditions::Board;
use crate::events::{Names, Recent};
use crate::export::{self, Page};
use crate::kernel::{Counters, Flows, second_lock};
use crate::line::{self, Handle, Input, Published, Question};

/// Pieces of an answer that wait for who asked.
const PIECES: usize = 4;

/// Answers of the agent to whoever asks.
pub(super) struct Told {
    pub(super) line: Handle,
    pub(super) board: Arc<Board>,
    pub(super) names: Names,
    pub(super) published: Arc<Published>,
    pub(super) recent: Arc<Recent>,
    pub(super) counters: Counters,
    pub(super) flows: Arc<Flows>,
    /// How many ports of a node's address may stand for others towards one peer.
    pub(super) nat_ports: usize,
    /// Packets that the second lock has dropped, when it was last looked at.
    pub(super) lock_drops: AtomicU64,
}

impl Told {
    async fn ask<T>(&self, question: fn(oneshot::Sender<T>) -> Question) -> Result<T, Refusal> {
        let answer = self.line.ask(|to| Input::Question(question(to)));
        answer.await.map_err(|ended| ended.to_string())
    }
}

impl Probes for Told {
    async fn alive(&self) -> Result<(), Refusal> {
        self.ask(Question::Alive).await
    }

    fn not_ready(&self) -> Vec<String> {
        let state = self.board.node();
        state.unready.iter().map(ToString::to_string).collect()
    }

    async fn metrics(&self) -> Result<String, Refusal> {
        // The rule counts by itself; it is read when somebody asks.
        let drops = tokio::task::spawn_blocking(second_lock::drops).await;
        if let Ok(Ok(Some(drops))) = drops {
            self.lock_drops.store(drops, Ordering::Relaxed);
        }
        let mut sample = self.ask(Question::Sample).await?;
        let tally = self.flows.tally();
        sample
            .fills
            .extend(tally.iter().flat_map(|it| room::fills(it)));
        let shares = self.flows.shares();
        let limited = sample
            .devices
            .iter()
            .map(|(pod, ifindex)| (pod.clone(), shares.refused(*ifindex)));
        let page = Page {
            limited: limited.filter(|(_, packets)| *packets > 0).collect(),
            sample,
            counters: self.counters.all().map_err(|e| e.to_string())?,
            drops: self.counters.drops().map_err(|e| e.to_string())?,
            conditions: self.board.counts(),
            not_ready: self.board.node().unready.len(),
            second_lock_drops: self.lock_drops.load(Ordering::Relaxed),
            sweep_age: self.flows.sweep_age(),
            tally,
            nat_ports: self.nat_ports,
        };
        export::encode(page).map_err(|e| e.to_string())
    }
}

impl Local for Told {
    async fn status(&self) -> Result<views::Status, Refusal> {
        let mut status = self.ask(Question::Status).await?;
        if let Some(tally) = self.flows.tally() {
            status.tables.extend(room::fills(&tally));
            status.nat = Some(room::nat(&tally, self.nat_ports, &self.names));
        }
        Ok(status)
    }

    async fn services(&self) -> Result<Vec<views::ServiceView>, Refusal> {
        self.ask(Question::Services).await
    }

    async fn endpoints(&self) -> Result<Vec<views::EndpointView>, Refusal> {
        self.ask(Question::Endpoints).await
    }

    async fn policy(&self) -> Result<Vec<views::PolicyView>, Refusal> {
        self.ask(Question::Policy).await
    }

    async fn objects(&self) -> Result<Pieces, Refusal> {
        let told = self.ask(Question::Objects).await?;
        let (to, pieces) = mpsc::channel(PIECES);
        tokio::task::spawn_blocking(move || {
            let mut list = JsonList::new(to.clone());
            told.iter().for_each(|row| list.push(row));
            // Who asked may have stopped waiting.
            to.blocking_send(list.finish()).unwrap_or_default();
        });
        Ok(pieces)
    }

    async fn explain(
        &self,
        from: String,
        to: String,
    ) -> Result<Result<Explained, String>, Refusal> {
        let question = match weir_cli::question::Question::read(&from, &to) {
            Ok(question) => question,
            Err(wrong) => return Ok(Err(wrong)),
        };
        let matter = self
            .line
            .ask(|to| Input::Question(Question::Explain { question, to }));
        let matter = match matter.await.map_err(|ended| ended.to_string())? {
            Ok(matter) => matter,
            Err(wrong) => return Ok(Err(wrong)),
        };
        // Policies of other nodes' pods are compiled for it.
        let explained = tokio::task::spawn_blocking(move || matter.explain(&from, &to)).await;
        explained.map(Ok).map_err(|e| e.to_string())
    }

    async fn flows(&self) -> Result<Pieces, Refusal> {
        let (tables, names) = (self.flows.clone(), self.names.clone());
        let rules = self.published.rules.load_full();
        let (to, pieces) = mpsc::channel(PIECES);
        // All rows at once would be many times what the tables are.
        tokio::task::spawn_blocking(move || {
            let mut list = JsonList::new(to.clone());
            let read = line::flows(&tables, &rules, &names, |row| list.push(&row));
            let last = read.and_then(|()| list.finish());
            // Who asked may have stopped waiting.
            to.blocking_send(last).unwrap_or_default();
        });
        Ok(pieces)
    }

    async fn drops(&self) -> Result<views::Drops, Refusal> {
        let totals = self.counters.drops().map_err(|e| e.to_string())?;
        let totals = totals
            .into_iter()
            .map(|(reason, Drops { packets, bytes })| DropTotal {
                reason: reason.label().to_owned(),
                help: reason.help().to_owned(),
                packets,
                bytes,
            });
        Ok(views::Drops {
            totals: totals.collect(),
            recent: self.recent.drops.all(),
            audited: self.recent.audits.all(),
        })
    }

    async fn verify(&self) -> Result<views::Verify, Refusal> {
        self.ask(Question::Verify).await?
    }
}
