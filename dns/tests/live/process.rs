//! The program itself: its privilege, its exit codes, its pages. Needs root, as its user does when it
//! is started with a port below 1024.

use std::net::{SocketAddr, UdpSocket};
use std::os::unix::fs::PermissionsExt;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use hickory_proto::rr::RecordType;
use nix::libc;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use weir_dns::feed::{Peer, Server, ZoneChange};

use crate::support::{PATIENCE, ask, cluster_ip, free_address, shown, until};

pub(crate) struct Process(pub(crate) Child);

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended already.
        if self.0.kill().is_ok() {
            self.0.wait().unwrap();
        }
    }
}

fn program() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_weir-dns"));
    command.stdout(Stdio::null()).stderr(Stdio::piped());
    command
}

async fn page(address: SocketAddr, path: &str) -> Option<String> {
    let mut stream = TcpStream::connect(address).await.ok()?;
    let request = format!("GET {path} HTTP/1.0\r\nHost: localhost\r\n\r\n");
    stream.write_all(request.as_bytes()).await.ok()?;
    let mut text = String::new();
    stream.read_to_string(&mut text).await.ok()?;
    Some(text)
}

#[tokio::test(flavor = "multi_thread")]
async fn it_gives_up_its_privilege_and_serves_what_the_agent_says() {
    const USER: u32 = 47_811;
    let folder = tempfile::tempdir().unwrap();
    std::fs::set_permissions(folder.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    let path = folder.path().join("zone.sock");
    let (dns, pages) = (free_address(), free_address());
    let feed = Server::new("cluster.local");
    feed.publish(ZoneChange::Upsert(cluster_ip("web", "10.96.0.20")));
    feed.publish(ZoneChange::Synced);
    // Somebody else's uid, but a group that may open the socket: the peer's uid decides.
    let stranger = Peer {
        uid: USER + 1,
        gid: USER,
    };
    let listener = Server::bind(&path, stranger).unwrap();
    let refusing = tokio::spawn(feed.clone().serve(listener, stranger));

    let mut command = program();
    command
        .arg("--listen")
        .arg(dns.to_string())
        .arg("--metrics")
        .arg(pages.to_string())
        .arg("--feed")
        .arg(&path)
        .args([
            "--upstream",
            "127.0.0.1:9",
            "--user",
            &format!("{USER}:{USER}"),
        ]);
    let child = Process(command.stderr(Stdio::null()).spawn().unwrap());
    until("it is up", async || {
        page(pages, "/health")
            .await
            .is_some_and(|t| t.contains("200 OK"))
    })
    .await;
    let status = std::fs::read_to_string(format!("/proc/{}/status", child.0.id())).unwrap();
    for (field, expected) in [
        ("Uid:", format!("{USER}\t{USER}\t{USER}\t{USER}")),
        ("Gid:", format!("{USER}\t{USER}\t{USER}\t{USER}")),
        ("Groups:", String::new()),
        ("CapInh:", "0000000000000000".into()),
        ("CapPrm:", "0000000000000000".into()),
        ("CapEff:", "0000000000000000".into()),
        ("CapAmb:", "0000000000000000".into()),
        ("NoNewPrivs:", "1".into()),
    ] {
        let line = status.lines().find(|line| line.starts_with(field)).unwrap();
        assert_eq!(
            line[field.len()..].trim(),
            expected,
            "{field} (the test needs root)"
        );
    }
    let answer = ask(dns, "web.default.svc.cluster.local", RecordType::A).await;
    assert_eq!(
        shown(&answer),
        "SERVFAIL",
        "the stranger's feed was refused"
    );
    assert!(page(pages, "/ready").await.unwrap().contains("503"));

    refusing.abort();
    assert!(refusing.await.unwrap_err().is_cancelled());
    let peer = Peer {
        uid: USER,
        gid: USER,
    };
    let listener = Server::bind(&path, peer).unwrap();
    let accepting = tokio::spawn(feed.serve(listener, peer));
    until("it is ready", async || {
        page(pages, "/ready")
            .await
            .is_some_and(|t| t.contains("200 OK"))
    })
    .await;
    let answer = ask(dns, "web.default.svc.cluster.local", RecordType::A).await;
    assert_eq!(shown(&answer), "NOERROR A=10.96.0.20");
    let metrics = page(pages, "/metrics").await.unwrap();
    for expected in [
        "coredns_dns_requests_total{server=\"dns://",
        "rcode=\"SERVFAIL\",plugin=\"kubernetes\"} 1",
        "rcode=\"NOERROR\",plugin=\"kubernetes\"} 1",
        "coredns_dns_request_duration_seconds_bucket",
        "coredns_panics_total 0",
        "weir_dns_services 1",
        "weir_dns_synced 1",
    ] {
        assert!(metrics.contains(expected), "{expected} in\n{metrics}");
    }
    accepting.abort();
    drop(child);
}

#[tokio::test(flavor = "multi_thread")]
async fn it_ends_well_when_told_to() {
    let address = free_address();
    for signal in ["TERM", "INT"] {
        let mut command = program();
        command
            .args([
                "--listen",
                &address.to_string(),
                "--upstream",
                "127.0.0.1:9",
            ])
            .args(["--feed", "/nonexistent/zone.sock"]);
        let mut child = Process(command.stderr(Stdio::null()).spawn().unwrap());
        until("it answers", async || {
            let message = crate::support::question("x.cluster.local", RecordType::A);
            let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
            socket
                .set_read_timeout(Some(Duration::from_millis(100)))
                .unwrap();
            socket.connect(address).unwrap();
            socket.send(&message.to_vec().unwrap()).is_ok() && socket.recv(&mut [0; 512]).is_ok()
        })
        .await;
        let pid = child.0.id().to_string();
        let sent = Command::new("kill")
            .args([&format!("-{signal}"), &pid])
            .status();
        assert!(sent.unwrap().success());
        let ended = tokio::task::spawn_blocking(move || child.0.wait().unwrap());
        let ended = tokio::time::timeout(PATIENCE, ended)
            .await
            .expect("it ends")
            .unwrap();
        assert!(ended.success(), "{signal}: {ended}");
    }
}

/// Runs a command where sockets of IPv6 cannot be had, as after a boot with `ipv6.disable=1`.
fn without_ipv6(mut command: Command) -> Child {
    let spawn = move || {
        let family = u64::try_from(libc::AF_INET6).unwrap();
        let of_ipv6 = SeccompCondition::new(0, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, family);
        let rule = SeccompRule::new(vec![of_ipv6.unwrap()]).unwrap();
        let refused = SeccompAction::Errno(libc::EAFNOSUPPORT.cast_unsigned());
        let machine = std::env::consts::ARCH.try_into().unwrap();
        let rules = [(libc::SYS_socket, vec![rule])].into();
        let filter = SeccompFilter::new(rules, SeccompAction::Allow, refused, machine).unwrap();
        let filter: BpfProgram = filter.try_into().unwrap();
        // Of this thread, and of what it starts.
        seccompiler::apply_filter(&filter).unwrap();
        command.spawn().unwrap()
    };
    std::thread::spawn(spawn).join().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_without_ipv6_is_answered_over_ipv4() {
    let address = free_address();
    let other = format!("[::1]:{}", address.port());
    let start = |listen: &[&str]| {
        let mut command = program();
        for address in listen {
            command.args(["--listen", address]);
        }
        command.args(["--upstream", "127.0.0.1:9"]);
        command.args(["--feed", "/nonexistent/zone.sock"]);
        command
    };
    let mut child = without_ipv6(start(&[&other]));
    assert_eq!(child.wait().unwrap().code(), Some(3), "no address is left");
    let mut command = start(&[&other, &address.to_string()]);
    command.stderr(Stdio::null());
    let child = Process(without_ipv6(command));
    until("it answers", async || {
        let message = crate::support::question("version.bind", RecordType::TXT);
        let asked = crate::support::exchange(address, &message);
        let answer = tokio::time::timeout(Duration::from_millis(200), asked).await;
        answer.is_ok_and(|it| it.is_some())
    })
    .await;
    drop(child);
}

#[test]
fn wrong_arguments_give_one_message_each() {
    let taken = UdpSocket::bind("127.0.0.1:0").unwrap();
    let taken = taken.local_addr().map(|address| (taken, address)).unwrap();
    let port = taken.1.port();
    let busy = taken.1.to_string();
    for (arguments, code, words) in [
        (
            vec!["--listen", &busy, "--upstream", "127.0.0.1:9"],
            3,
            vec![
                format!("cannot listen on UDP {busy}"),
                "another program has it".into(),
                format!("sport = :{port}"),
                "--listen".into(),
            ],
        ),
        (
            vec![
                "--listen",
                "127.0.0.1:0",
                "--resolv-conf",
                "/nonexistent/resolv.conf",
            ],
            1,
            vec!["/nonexistent/resolv.conf".into()],
        ),
        (
            vec!["--listen", "127.0.0.1:0", "--user", "0:0"],
            2,
            vec!["UID:GID".into()],
        ),
        (
            vec!["--listen", "127.0.0.1:0", "--domain", "."],
            2,
            vec!["root".into()],
        ),
        (vec![], 2, vec!["--listen".into()]),
    ] {
        let output = program().args(&arguments).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {said}");
        for word in words {
            assert!(said.contains(&word), "{word:?} in {said}");
        }
        if code != 2 {
            assert_eq!(said.trim().lines().count(), 1, "{said}");
        }
    }
}
