//! Ring 4 of the datapath alone: real sockets in pods made of network namespaces, through the programs
//! of the packet path, with checksums left to the device and computed by the stack. What only this ring
//! sees: the flag for the pseudo-header, delivery by `bpf_redirect_peer`, and the device it names.

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::process::Command;
use std::sync::mpsc::{Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, ensure};
use aya::Ebpf;
use aya::programs::tc::TcAttachOptions;
use aya::programs::{LinkOrder, SchedClassifier, TcAttachType};
use weir_tests::programs::{in_own_namespace, load, map, write_all};
use weir_tests::world::{
    BACKEND_PORT, FAMILIES, Family, Host, NEAR, PODS, REMOTE, SERVICE_PORT, world,
};

const PATIENCE: Duration = Duration::from_secs(3);

type Job = Box<dyn FnOnce() + Send>;

/// A network namespace that lives as long as its thread.
struct Pod {
    jobs: Option<Sender<Job>>,
    thread: Option<JoinHandle<()>>,
    task: i32,
}

impl Pod {
    fn new() -> Result<Self> {
        let (jobs, work) = channel::<Job>();
        let (tell, told) = channel();
        let thread = std::thread::spawn(move || {
            let unshared = nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET);
            if tell.send(unshared.map(|()| nix::unistd::gettid())).is_ok() {
                work.into_iter().for_each(|job| job());
            }
        });
        let task = told.recv().context("the pod's thread")??;
        Ok(Self {
            jobs: Some(jobs),
            thread: Some(thread),
            task: task.as_raw(),
        })
    }

    /// Does something in the pod.
    fn run<T: Send + 'static>(
        &self,
        job: impl FnOnce() -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let (tell, told) = channel();
        let job: Job = Box::new(move || {
            // Whoever asked waits for the answer.
            tell.send(job()).ok();
        });
        let jobs = self.jobs.as_ref().context("the pod has ended")?;
        jobs.send(job).map_err(|_| anyhow!("the pod has ended"))?;
        told.recv().context("the pod's job panicked")?
    }
}

impl Drop for Pod {
    fn drop(&mut self) {
        self.jobs = None;
        if let Some(thread) = self.thread.take() {
            thread.join().ok();
        }
    }
}

fn run(command: &str) -> Result<()> {
    let mut words = command.split_whitespace();
    let program = words.next().context("empty command")?;
    let output = Command::new(program).args(words).output()?;
    ensure!(
        output.status.success(),
        "{command}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(())
}

const GATEWAY_MAC: &str = "ee:ee:ee:ee:ee:ee";

fn gateway(family: Family) -> &'static str {
    match family {
        Family::V4 => "169.254.1.1",
        Family::V6 => "fe80::1",
    }
}

fn width(family: Family) -> u8 {
    match family {
        Family::V4 => 32,
        Family::V6 => 128,
    }
}

/// A namespace with a veth pair to this one, addressed as pods are.
fn plug(host: Host, ifindex: u32) -> Result<Pod> {
    let pod = Pod::new()?;
    let device = format!("pod{ifindex}");
    let mac = host.mac().map(|byte| format!("{byte:02x}")).join(":");
    run(&format!(
        "ip link add {device} index {ifindex} address {GATEWAY_MAC} type veth \
         peer name eth0 address {mac} netns {}",
        pod.task
    ))?;
    run(&format!("ip link set {device} up"))?;
    pod.run(|| run("ip link set lo up").and_then(|()| run("ip link set eth0 up")))?;
    for family in FAMILIES {
        let (addr, gateway, width) = (host.ip(family), gateway(family), width(family));
        run(&format!("ip route add {addr}/{width} dev {device}"))?;
        run(&format!(
            "ip neigh add {addr} lladdr {mac} dev {device} nud permanent"
        ))?;
        pod.run(move || {
            let nodad = if family == Family::V6 { "nodad" } else { "" };
            run(&format!("ip addr add {addr}/{width} dev eth0 {nodad}"))?;
            run(&format!(
                "ip neigh add {gateway} lladdr {GATEWAY_MAC} dev eth0 nud permanent"
            ))?;
            run(&format!(
                "ip route add default via {gateway} dev eth0 onlink"
            ))
        })?;
    }
    Ok(pod)
}

fn attach(ebpf: &mut Ebpf) -> Result<()> {
    for (name, side) in [
        ("weir_from_pod", TcAttachType::Ingress),
        ("weir_to_pod", TcAttachType::Egress),
    ] {
        let program: &mut SchedClassifier = ebpf.program_mut(name).context(name)?.try_into()?;
        program.load()?;
        for (_, ifindex) in PODS {
            let options = TcAttachOptions::TcxOrder(LinkOrder::default());
            program
                .attach_with_options(&format!("pod{ifindex}"), side, options)
                .with_context(|| format!("attach {name} to pod{ifindex}"))?;
        }
    }
    Ok(())
}

/// Bytes of datagrams: one packet, and ones in fragments.
const DATAGRAMS: [usize; 4] = [14, 1473, 8000, 60_000];

/// Serves one TCP connection and some datagrams, echoing what it gets.
fn serve(pod: &Pod, ip: IpAddr) -> Result<()> {
    pod.run(move || {
        let listener = TcpListener::bind((ip, BACKEND_PORT))?;
        let socket = UdpSocket::bind((ip, BACKEND_PORT))?;
        socket.set_read_timeout(Some(2 * PATIENCE))?;
        std::thread::spawn(move || -> Result<()> {
            let (mut stream, _) = listener.accept()?;
            stream.set_read_timeout(Some(PATIENCE))?;
            let mut bytes = Vec::new();
            stream.read_to_end(&mut bytes)?;
            stream.write_all(&bytes)?;
            Ok(())
        });
        std::thread::spawn(move || -> Result<()> {
            let mut bytes = [0; 65_536];
            for _ in DATAGRAMS {
                let (length, from) = socket.recv_from(&mut bytes)?;
                socket.send_to(&bytes[..length], from)?;
            }
            Ok(())
        });
        Ok(())
    })
}

/// Speaks TCP and UDP to an address from a pod, and checks that what comes back is right and comes from
/// where it was sent to.
fn ask(pod: &Pod, to: SocketAddr) -> Result<()> {
    pod.run(move || {
        let mut stream = TcpStream::connect_timeout(&to, PATIENCE).context("connect")?;
        stream.set_read_timeout(Some(PATIENCE))?;
        // More than a segment, an odd number of bytes.
        let sent: Vec<u8> = (0..200_001u32).map(|i| (i % 251) as u8).collect();
        stream.write_all(&sent)?;
        stream.shutdown(Shutdown::Write)?;
        let mut received = Vec::new();
        stream.read_to_end(&mut received).context("read the echo")?;
        ensure!(sent == received, "{} bytes came back wrong", received.len());

        let any = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
        let socket = UdpSocket::bind(any)?;
        socket.set_read_timeout(Some(PATIENCE))?;
        for size in DATAGRAMS {
            socket.send_to(&sent[..size], to)?;
            let mut bytes = [0; 65_536];
            let (length, from) = socket
                .recv_from(&mut bytes)
                .with_context(|| format!("await the datagram of {size} bytes"))?;
            ensure!(bytes[..length] == sent[..size] && from == to, "{from}");
        }
        Ok(())
    })
}

/// Who computes the checksums of what pods send.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Checksums {
    /// Nobody: they stay partial all the way.
    Nobody,
    /// The pods' own stacks: the programs see finished ones.
    Pods,
    /// The node, behind the programs: they see partial ones, and what they make of them counts.
    Node,
}

fn services_by_the_packet_path(checksums: Checksums) -> Result<()> {
    in_own_namespace(move || {
        run("ip link set lo up")?;
        std::fs::write("/proc/sys/net/ipv4/ip_forward", "1")?;
        std::fs::write("/proc/sys/net/ipv6/conf/all/forwarding", "1")?;
        let [a, b, _c] = PODS.map(|(pod, ifindex)| plug(pod, ifindex));
        let (a, b, far) = (a?, b?, plug(Host::Far, 2001)?);
        for (pod, device) in [(&a, "pod1001"), (&b, "pod1002"), (&far, "pod2001")] {
            match checksums {
                Checksums::Nobody => {}
                Checksums::Pods => pod.run(|| run("ethtool -K eth0 tx off"))?,
                Checksums::Node => run(&format!("ethtool -K {device} tx off"))?,
            }
        }
        let mut ebpf = load()?;
        write_all(&mut ebpf, &world())?;
        attach(&mut ebpf)?;
        for family in FAMILIES {
            for (what, asked, backend, pod) in [
                ("a pod of the node", Host::B, Host::B, &b),
                ("a pod elsewhere", Host::Far, Host::Far, &far),
                ("a service of the node", NEAR, Host::B, &b),
                ("a service elsewhere", REMOTE, Host::Far, &far),
            ] {
                let port = if asked == backend {
                    BACKEND_PORT
                } else {
                    SERVICE_PORT
                };
                serve(pod, backend.ip(family))?;
                ask(&a, (asked.ip(family), port).into())
                    .with_context(|| format!("{what}, {family:?}, checksums by {checksums:?}"))?;
            }
            let closed = (Host::C.ip(family), 9).into();
            let refused = a.run(move || {
                Ok(TcpStream::connect_timeout(&closed, Duration::from_millis(300)).is_err())
            })?;
            ensure!(refused, "policy does not hold");
        }
        let denied = 11;
        let drops: aya::maps::PerCpuArray<_, [u64; 2]> = map(&mut ebpf, "DROPS")?.try_into()?;
        let mut counted = 0;
        for reason in weir_common::DropReason::ALL {
            let packets: u64 = drops.get(&(*reason as u32), 0)?.iter().map(|d| d[0]).sum();
            if packets > 0 {
                println!("{checksums:?}: {packets} dropped: {}", reason.label());
            }
            if *reason as u32 == denied {
                counted = packets;
            }
        }
        ensure!(counted >= 2, "the denied connections were not counted");
        Ok(())
    })
}

#[test]
fn services_work_with_checksums_that_nobody_computes() -> Result<()> {
    services_by_the_packet_path(Checksums::Nobody)
}

#[test]
fn services_work_with_checksums_of_the_pods() -> Result<()> {
    services_by_the_packet_path(Checksums::Pods)
}

#[test]
fn services_work_with_checksums_finished_behind_the_programs() -> Result<()> {
    services_by_the_packet_path(Checksums::Node)
}
