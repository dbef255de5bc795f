//! A kind that a cluster may be without: its CustomResourceDefinition may be absent, come and go.

use kube::api::GetParams;
use kube::core::{Request, Status};
use serde::Deserialize;
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

/// What a kind's place is asked of is more than its group, and thousands of nodes ask: with the first absence in a row, with every
/// so many after it, and where the versions of the group are a reason.
const PROOFS: u32 = 10;

/// Where the API server has the kind.
enum Place {
    Nowhere,
    /// In this version of those that are read: where it is asked for if it is there, else the first.
    In(&'static str),
    /// In these other versions of the API group alone.
    Elsewhere(Vec<String>),
}

/// An API group, as the API server describes it.
#[derive(Debug, Default, Deserialize)]
struct Group {
    versions: Vec<GroupVersion>,
}

#[derive(Debug, Deserialize)]
struct GroupVersion {
    version: String,
}

/// What follows from a call that found nothing.
pub(super) enum Sought {
    /// There is none of it, and the source has said so.
    Absent,
    /// Something else is wrong.
    Failed(Failure),
    /// It is there in another version, and is asked for in that from now on.
    Moved,
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
        match self.place_again::<K>(course).await {
            Err(other) => Sought::Failed(other),
            Ok(Place::Elsewhere(versions)) => Sought::Failed(Failure::OtherVersions(versions)),
            Ok(Place::In(version)) if version != course.served => {
                info!(kind = %K::KIND, version, "the API server has the kind in this version");
                course.served = version;
                course.version = None;
                Sought::Moved
            }
            Ok(Place::In(_)) if course.failed < AT_ODDS => Sought::AtOdds,
            Ok(Place::In(_)) => Sought::Failed(failure),
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

    /// Where it was absent before, a 404 is no change, and whether another version has come the group nearly always tells.
    async fn place_again<K: WireKind>(&self, course: &mut Course) -> Result<Place, Failure> {
        if course.absences > 0 {
            let group = self.group::<K>().await?;
            let is_as_before = group == course.group;
            let others = K::VERSIONS.iter().filter(|it| **it != course.served);
            let has_another = others
                .into_iter()
                .any(|it| group.iter().any(|has| has == it));
            course.group = group;
            if is_as_before && !has_another && !course.absences.is_multiple_of(PROOFS) {
                return Ok(Place::Nowhere);
            }
        }
        self.place::<K>(course).await
    }

    /// The versions of the kind's group; none if there is no such group.
    async fn group<K: WireKind>(&self) -> Result<Vec<String>, Failure> {
        let asked = Request::new("/apis").get(K::GROUP, &GetParams::default());
        let asked = asked.map_err(|e| Failure::Call(Verb::Find, kube::Error::BuildRequest(e)))?;
        let client = self.servers.client();
        let group = timeout(self.timing.answer, client.request::<Group>(asked)).await;
        let group = match group {
            Ok(Err(kube::Error::Api(status))) if is_not_found(&status) => Group::default(),
            answer => answered(answer, Verb::Find, self.timing.answer)?,
        };
        let versions = group.versions.into_iter();
        Ok(versions.map(|it| it.version).collect())
    }

    /// Asks what any account may ask (the ClusterRole system:discovery).
    async fn place<K: WireKind>(&self, course: &mut Course) -> Result<Place, Failure> {
        let client = self.servers.client();
        let within = self.timing.answer;
        let groups = timeout(within, client.list_api_groups()).await;
        let groups = answered(groups, Verb::Find, within)?.groups;
        let group = groups.into_iter().find(|group| group.name == K::GROUP);
        let versions = group.map_or_else(Vec::new, |group| group.versions);
        course.group = versions.iter().map(|it| it.version.clone()).collect();
        let (mut here, mut elsewhere) = (Vec::new(), Vec::new());
        for version in versions {
            let of_version = client.list_api_group_resources(&version.group_version);
            let of_version = match timeout(within, of_version).await {
                // The version has gone in between.
                Ok(Err(kube::Error::Api(status))) if is_not_found(&status) => continue,
                answer => answered(answer, Verb::Find, within)?,
            };
            if of_version.resources.iter().any(|it| it.name == K::PLURAL) {
                match K::VERSIONS.iter().find(|it| **it == version.version) {
                    Some(read) => here.push(*read),
                    None => elsewhere.push(version.version),
                }
            }
        }
        let asked = here.iter().find(|it| **it == course.served);
        let preferred = K::VERSIONS.iter().find(|it| here.contains(it));
        Ok(match (asked.or(preferred), elsewhere.is_empty()) {
            (Some(version), _) => Place::In(version),
            (None, true) => Place::Nowhere,
            (None, false) => Place::Elsewhere(elsewhere),
        })
    }
}

pub(super) fn is_not_found(status: &Status) -> bool {
    status.code == 404
}
