//! How far each Service is, and of which that is news.

use std::collections::BTreeSet;

use weir_common::service::{Backend, BackendId, Frontend, FrontendKey, Generation};

use super::{KernelTable, Services, Status, Statuses};
use crate::compile::claims::Address;
use crate::compile::{Owner, ServicePlan};

impl<F, B, L> Services<F, B, L>
where
    F: KernelTable<FrontendKey, Frontend>,
    B: KernelTable<u32, Backend>,
    L: KernelTable<BackendId, Generation>,
{
    /// How far each Service is.
    pub fn statuses(&self) -> &Statuses<Owner> {
        &self.statuses
    }

    /// Those that could not be written, and why.
    pub fn failed(&self) -> impl Iterator<Item = (&Owner, &str)> {
        let failed = self.failed.iter();
        failed.filter_map(|owner| Some((owner, self.statuses.get(owner)?.failure()?)))
    }

    /// Those that have failed, failed for another reason or no longer fail since this was last asked, with why they
    /// fail now.
    pub fn take_news(&mut self) -> Vec<(Owner, Option<String>)> {
        let news = std::mem::take(&mut self.news).into_iter();
        news.map(|owner| {
            let why = self.statuses.get(&owner).and_then(Status::failure);
            let why = why.map(str::to_owned);
            (owner, why)
        })
        .collect()
    }

    /// Brings the status of every Service with one of these frontends, or with a new plan, up to date.
    pub(super) fn report(&mut self, touched: &BTreeSet<FrontendKey>) {
        let mut names = std::mem::take(&mut self.unreported);
        names.extend(
            touched
                .iter()
                .filter_map(|key| self.owners.get(key))
                .cloned(),
        );
        for name in names {
            let Some(status) = self.plans.get(&name).map(|plan| self.status(plan)) else {
                continue;
            };
            let why = status.failure();
            let before = self.statuses.get(&name).and_then(Status::failure);
            if why != before {
                self.news.insert(name.clone());
            }
            if why.is_some() {
                self.failed.insert(name.clone());
            } else {
                self.failed.remove(&name);
            }
            self.statuses.insert(name, status);
        }
    }

    fn status(&self, plan: &ServicePlan) -> Status {
        let keys = || plan.frontends.iter().map(|f| &f.key);
        if let Some((key, reason)) = keys().find_map(|key| Some((key, self.failures.get(key)?))) {
            return Status::Failed(format!("{}: {reason}", Address::of(key)));
        }
        if keys().any(|key| self.dirty.contains(key)) {
            return Status::Pending;
        }
        Status::Done
    }
}
