//! A kind that a cluster may be without: its CustomResourceDefinition may be absent, come and go.

use kube::core::Status;
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout};
use tracing::info;

use super::calls::{Stop, answered, say_all, send};
use super::trouble::{Failure, Verb};
use super::{Course, KubeSource};
use crate::watch::saving::Said;
use crate::watch::wire::WireKind;

/// The list and the API server's word on what it has differ for a moment while a definition comes or goes. So
/// often that is no news.
const AT_ODDS: usize = 5;

/// What a kind's place is asked of is more than the list that was refused, and thousands of nodes ask: with the first absence in a row,
/// and with every so many after it.
const PROOFS: u32 = 10;

/// Where the API server has the kind.
pub(super) enum Place {
    Nowhere,
    /// Where it is asked for.
    Here,
    /// In these other versions of the API group alone.
    Elsewhere(Vec<String>),
}

/// What follows from a call that found nothing.
pub(super) enum Sought {
    /// There is none of it, and the source has said so.
    Absent,
    /// Something else is wrong.
    Failed(Failure),
    /// It may be there in a moment.
    AtOdds,
    NobodyListens,
}

impl KubeSource {
    /// Makes sure that the kind is absent. A 404 alone is no proof, since something before the API server may have
    /// answered, and what follows from absence is that every object is gone.
    pub(super) async fn seek<K: WireKind>(
        &self,
        failure: Failure,
        course: &mut Course,
        say: &mpsc::Sender<Said>,
    ) -> Sought {
        // Where it was absent before, a 404 is no change; now and then it is seen whether another version has come.
        let place = if course.absences.is_multiple_of(PROOFS) {
            self.place::<K>().await
        } else {
            Ok(Place::Nowhere)
        };
        match place {
            Err(other) => Sought::Failed(other),
            Ok(Place::Elsewhere(versions)) => Sought::Failed(Failure::OtherVersions(versions)),
            Ok(Place::Here) if course.failed < AT_ODDS => Sought::AtOdds,
            Ok(Place::Here) => Sought::Failed(failure),
            Ok(Place::Nowhere) => match self.absent::<K>(course, say).await {
                Ok(()) => Sought::Absent,
                Err(_) => Sought::NobodyListens,
            },
        }
    }

    /// Says that there is none of it, once.
    async fn absent<K: WireKind>(
        &self,
        course: &mut Course,
        say: &mpsc::Sender<Said>,
    ) -> Result<(), Stop> {
        if course.absences == 0 {
            info!(
                kind = %K::KIND, again = ?self.timing.optional,
                "the API server has no such kind; it is looked for again and again"
            );
            let mut changes = Vec::new();
            course.ledger.begin_list();
            course.ledger.finish_list(&mut changes);
            course.spare = None;
            say_all(say, &mut changes).await?;
            send(say, Said::Listed(K::KIND)).await?;
        }
        course.absences = course.absences.saturating_add(1);
        course.version = None;
        course.is_doubtful = false;
        course.failed = 0;
        course.retry = self.timing.retry();
        course.listed = Some(Instant::now());
        self.reporter.synced(K::KIND);
        Ok(())
    }

    /// Asks what any account may ask (the ClusterRole system:discovery).
    async fn place<K: WireKind>(&self) -> Result<Place, Failure> {
        let client = self.servers.client();
        let within = self.timing.answer;
        let groups = timeout(within, client.list_api_groups()).await;
        let groups = answered(groups, Verb::Find, within)?.groups;
        let group = groups.into_iter().find(|group| group.name == K::GROUP);
        let mut elsewhere = Vec::new();
        for version in group.into_iter().flat_map(|group| group.versions) {
            let of_version = client.list_api_group_resources(&version.group_version);
            let of_version = match timeout(within, of_version).await {
                // The version has gone in between.
                Ok(Err(kube::Error::Api(status))) if is_not_found(&status) => continue,
                answer => answered(answer, Verb::Find, within)?,
            };
            if of_version.resources.iter().any(|it| it.name == K::PLURAL) {
                if version.version == K::VERSION {
                    return Ok(Place::Here);
                }
                elsewhere.push(version.version);
            }
        }
        if elsewhere.is_empty() {
            Ok(Place::Nowhere)
        } else {
            Ok(Place::Elsewhere(elsewhere))
        }
    }
}

pub(super) fn is_not_found(status: &Status) -> bool {
    status.code == 404
}
