//! Routes against a kernel in memory.

use std::sync::Mutex;

use super::*;
use crate::compile::route::NodeProblem;

/// A main table in memory. Refuses to write to prefixes that it was told to.
#[derive(Default)]
struct Fake {
    routes: Mutex<Vec<Installed>>,
    refuses: Vec<IpNet>,
}

impl Fake {
    fn with(routes: &[Installed]) -> Self {
        Self {
            routes: Mutex::new(routes.to_vec()),
            refuses: Vec::new(),
        }
    }

    fn has(&self) -> Vec<Installed> {
        let mut routes = self.routes.lock().unwrap().clone();
        routes.sort_by_key(|it| (it.to, it.metric));
        routes
    }

    fn change(&self, to: IpNet, change: impl FnOnce(&mut Vec<Installed>)) -> io::Result<()> {
        if self.refuses.contains(&to) {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        change(&mut self.routes.lock().unwrap());
        Ok(())
    }
}

impl RouteTable for Fake {
    async fn all(&self) -> io::Result<Vec<Installed>> {
        Ok(self.routes.lock().unwrap().clone())
    }

    async fn add(&self, route: &Installed) -> io::Result<()> {
        self.change(route.to, |routes| {
            assert!(
                routes
                    .iter()
                    .all(|it| it.to != route.to || it.metric != route.metric)
            );
            routes.push(route.clone());
        })
    }

    async fn replace(&self, route: &Installed) -> io::Result<()> {
        self.change(route.to, |routes| {
            let same = |it: &Installed| it.to == route.to && it.metric == route.metric;
            let place = routes.iter_mut().find(|it| same(it)).unwrap();
            assert_eq!(place.owner, Owner::Us);
            *place = route.clone();
        })
    }

    async fn remove(&self, route: &Installed) -> io::Result<()> {
        self.change(route.to, |routes| {
            assert_eq!(route.owner, Owner::Us);
            routes.retain(|it| it != route);
        })
    }
}

fn net(text: &str) -> IpNet {
    text.parse().unwrap()
}

fn via(to: &str, gateway: &str, ifindex: u32, owner: Owner) -> Installed {
    let gateway = gateway.parse().unwrap();
    Installed {
        to: net(to),
        hop: Hop::Via { gateway, ifindex },
        owner,
        metric: METRIC,
    }
}

fn link(to: &str, ifindex: u32) -> Installed {
    Installed {
        to: net(to),
        hop: Hop::Link { ifindex },
        owner: Owner::Protocol(2),
        metric: 0,
    }
}

fn nowhere(to: &str) -> Installed {
    Installed {
        to: net(to),
        hop: Hop::Unreachable,
        owner: Owner::Us,
        metric: LAST_METRIC,
    }
}

/// The node's own links: one network of each family, and a default route.
fn links() -> Vec<Installed> {
    let default = Installed {
        metric: 0,
        ..via("0.0.0.0/0", "10.0.0.254", 2, Owner::Protocol(3))
    };
    vec![link("10.0.0.0/24", 2), link("fd01::/64", 2), default]
}

fn wanted(routes: &[(&str, &str, &str)], own: &[&str], deletes: Deletes) -> Wanted {
    let to_nodes = routes.iter().map(|(to, node, via)| {
        let (node, via) = ((*node).into(), via.parse().unwrap());
        (net(to), Route::ToNode { node, via })
    });
    let own = own.iter().map(|to| (net(to), Route::Nowhere));
    Wanted {
        plan: RoutePlan {
            routes: to_nodes.chain(own).collect(),
            problems: Vec::<NodeProblem>::new(),
        },
        deletes,
    }
}

/// What the kernel holds beside its own links, and what was said.
async fn after(found: &[Installed], wanted: &Wanted) -> (Vec<Installed>, Vec<String>) {
    let links = links();
    let fake = Fake::with(&[&links, found].concat());
    let report = reconcile(&fake, wanted).await;
    // Another pass finds nothing to do.
    let again = reconcile(&fake, wanted).await;
    assert_eq!((again.written, again.removed), (0, 0));
    assert_eq!(again.unreachable, report.unreachable);
    let rest = fake.has().into_iter().filter(|it| !links.contains(it));
    (rest.collect(), report.lines().cloned().collect())
}

#[tokio::test]
async fn the_kernel_gets_what_is_wanted_and_keeps_what_is_of_others() {
    const B: (&str, &str, &str) = ("10.244.2.0/24", "b", "10.0.0.2");
    const B6: (&str, &str, &str) = ("fd00:2::/64", "b", "fd01::2");
    const FAR: (&str, &str, &str) = ("10.244.3.0/24", "far", "10.9.0.3");
    let b = || via("10.244.2.0/24", "10.0.0.2", 2, Owner::Us);
    let b6 = || via("fd00:2::/64", "fd01::2", 2, Owner::Us);
    let theirs = || via("10.244.2.0/24", "10.0.0.9", 2, Owner::Protocol(4));
    let their_late = || Installed {
        metric: 2000,
        ..theirs()
    };
    use Deletes::{Allowed, Held};
    let all = wanted(&[B, B6], &["10.244.1.0/24"], Allowed);
    let in_the_way = "a route to 10.244.2.0/24 that is not ours is in the way (protocol 4); it stays until \
                      somebody removes it";
    let cases = [
        (
            "from nothing",
            vec![],
            all.clone(),
            vec![nowhere("10.244.1.0/24"), b(), b6()],
            vec![],
        ),
        (
            "all is there",
            vec![b(), b6(), nowhere("10.244.1.0/24")],
            all.clone(),
            vec![nowhere("10.244.1.0/24"), b(), b6()],
            vec![],
        ),
        (
            "a node moved, and its device is another",
            vec![
                via("10.244.2.0/24", "10.0.0.7", 2, Owner::Us),
                via("fd00:2::/64", "fd01::2", 9, Owner::Us),
            ],
            wanted(&[B, B6], &[], Allowed),
            vec![b(), b6()],
            vec![],
        ),
        (
            "a node went",
            vec![b(), b6()],
            wanted(&[B], &[], Allowed),
            vec![b()],
            vec![],
        ),
        (
            "not every Node was said yet",
            vec![b(), b6()],
            wanted(&[B], &[], Held),
            vec![b(), b6()],
            vec![],
        ),
        (
            "a range that was another node's is this one's now",
            vec![b()],
            wanted(&[], &["10.244.2.0/24"], Allowed),
            vec![nowhere("10.244.2.0/24")],
            vec![],
        ),
        (
            "somebody else's is in the way",
            vec![theirs()],
            wanted(&[B], &[], Allowed),
            vec![theirs()],
            vec![in_the_way],
        ),
        (
            "somebody else's came beside ours",
            vec![b(), their_late()],
            wanted(&[B], &[], Allowed),
            vec![b(), their_late()],
            vec![in_the_way],
        ),
        (
            "others' routes are nothing to us",
            vec![via("10.8.0.0/16", "10.0.0.9", 2, Owner::Protocol(186))],
            wanted(&[], &[], Allowed),
            vec![via("10.8.0.0/16", "10.0.0.9", 2, Owner::Protocol(186))],
            vec![],
        ),
        (
            "behind a gateway",
            vec![],
            wanted(&[B, FAR], &[], Allowed),
            vec![b()],
            vec!["node far at 10.9.0.3 is not on this node's link: native routes need one layer 2"],
        ),
        (
            "what leads to loopback is no link",
            vec![link("10.9.0.0/16", LOOPBACK)],
            wanted(&[FAR], &[], Allowed),
            vec![link("10.9.0.0/16", LOOPBACK)],
            vec!["node far at 10.9.0.3 is not on this node's link: native routes need one layer 2"],
        ),
        (
            "a longer prefix that leads elsewhere",
            vec![via("10.0.0.2/32", "10.0.0.254", 2, Owner::Protocol(4))],
            wanted(&[B], &[], Allowed),
            vec![via("10.0.0.2/32", "10.0.0.254", 2, Owner::Protocol(4))],
            vec!["node b at 10.0.0.2 is not on this node's link: native routes need one layer 2"],
        ),
    ];
    for (what, found, wanted, expected, problems) in cases {
        let (has, said) = after(&found, &wanted).await;
        assert_eq!(has, expected, "{what}");
        assert_eq!(said, problems, "{what}");
    }
}

#[tokio::test]
async fn one_route_that_is_refused_does_not_keep_the_others() {
    let mut fake = Fake::with(&links());
    fake.refuses = vec![net("10.244.2.0/24")];
    let wanted = wanted(
        &[
            ("10.244.2.0/24", "b", "10.0.0.2"),
            ("10.244.3.0/24", "c", "10.0.0.3"),
        ],
        &[],
        Deletes::Allowed,
    );
    let report = reconcile(&fake, &wanted).await;
    assert_eq!(report.written, 1);
    let nodes: Vec<_> = report.unreachable.keys().map(|it| &**it).collect();
    assert_eq!(nodes, ["b"]);
    fake.refuses.clear();
    let report = reconcile(&fake, &wanted).await;
    assert_eq!((report.written, report.unreachable.len()), (1, 0));
}

/// A fake with its keeper, which has written its one route; how many are written at every further pass.
async fn kept(audit: Duration) -> (Arc<Fake>, Keeper, mpsc::UnboundedReceiver<usize>) {
    let fake = Arc::new(Fake::with(&links()));
    let (say, mut said) = mpsc::unbounded_channel();
    let first = wanted(&[("10.244.2.0/24", "b", "10.0.0.2")], &[], Deletes::Allowed);
    let wants = watch::Sender::new(first);
    let (news, heard) = mpsc::channel(1);
    let kept = keep(
        fake.clone(),
        wants.subscribe(),
        heard,
        audit,
        move |report| {
            say.send(report.written).unwrap();
        },
    );
    let task = tokio::spawn(kept);
    assert_eq!(said.recv().await, Some(1), "at the start");
    (fake, Keeper { wants, news, task }, said)
}

struct Keeper {
    wants: watch::Sender<Wanted>,
    news: mpsc::Sender<()>,
    task: tokio::task::JoinHandle<()>,
}

fn lose(fake: &Fake) {
    let mut routes = fake.routes.lock().unwrap();
    routes.retain(|it| it.owner != Owner::Us);
}

#[tokio::test]
async fn a_lost_route_is_put_back_at_news_and_a_new_plan_at_once() {
    let (fake, keeper, mut said) = kept(Duration::from_secs(3600)).await;
    lose(&fake);
    keeper.news.send(()).await.unwrap();
    assert_eq!(said.recv().await, Some(1));
    let more = [
        ("10.244.2.0/24", "b", "10.0.0.2"),
        ("fd00:2::/64", "b", "fd01::2"),
    ];
    keeper
        .wants
        .send_replace(wanted(&more, &[], Deletes::Allowed));
    assert_eq!(said.recv().await, Some(1));
    drop(keeper.wants);
    keeper.task.await.unwrap();
    assert_eq!(
        fake.has().len(),
        links().len() + 2,
        "nothing goes with the keeper"
    );
}

#[tokio::test]
async fn without_news_the_audit_puts_a_lost_route_back() {
    let audit = Duration::from_millis(20);
    let (fake, keeper, mut said) = kept(audit).await;
    drop(keeper.news);
    let begun = tokio::time::Instant::now();
    lose(&fake);
    while said.recv().await != Some(1) {}
    let mut passes = 0;
    while begun.elapsed() < 5 * audit {
        said.recv().await.unwrap();
        passes += 1;
    }
    assert!(passes <= 6, "{passes} passes in five audits: it spins");
}

impl RouteTable for Arc<Fake> {
    async fn all(&self) -> io::Result<Vec<Installed>> {
        (**self).all().await
    }

    async fn add(&self, route: &Installed) -> io::Result<()> {
        (**self).add(route).await
    }

    async fn replace(&self, route: &Installed) -> io::Result<()> {
        (**self).replace(route).await
    }

    async fn remove(&self, route: &Installed) -> io::Result<()> {
        (**self).remove(route).await
    }
}
