//! What the agent puts into a kernel and takes out again, on machines made of namespaces: links, tables,
//! the census and cleanup. What programs decide is not here. Needs root.

#![allow(clippy::unwrap_used, reason = "a test stops at the first surprise")]

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use object::{Object, ObjectSection, SectionKind};
use weir_agent::apply::{KernelTable, TableError};
use weir_agent::kernel::census::State;
use weir_agent::kernel::object::OBJECT;
use weir_agent::kernel::second_lock::{self, Lock};
use weir_agent::kernel::{LoadError, lock, pin_path};
use weir_common::service::{Frontend, FrontendKey};
use weir_common::table::TABLES;
use weir_tests::kernels::{
    DEVICE, add_device, filters_of_pods, links, listing, load, output, pins, try_load,
};
use weir_tests::machine::Machine;
use weir_tests::node::{Node, NodeOptions, binary};

const PATIENCE: Duration = Duration::from_secs(20);

#[test]
fn a_table_of_another_layout_is_refused_by_name_and_left_alone() {
    let machine = Machine::new("layout").unwrap();
    let pins = pins(&machine);
    std::fs::create_dir(&pins).unwrap();
    let table = TABLES.iter().find(|t| t.name == "FRONTENDS").unwrap();
    let path = pin_path(&pins, table);
    let create = "type hash key 20 value 256 entries 65536 name FRONTENDS";
    output(
        Command::new("bpftool")
            .args(["map", "create"])
            .arg(&path)
            .args(create.split(' ')),
    );
    let error = try_load(&machine, &pins, OBJECT, &[]).unwrap_err();
    let error: LoadError = error.downcast().unwrap();
    let said = error.to_string();
    assert!(
        matches!(
            error,
            LoadError::Layout {
                table: "FRONTENDS",
                ..
            }
        ) && said.contains("value 256 B"),
        "{said}"
    );
    assert_eq!(listing(&pins).len(), 2, "{:?}", listing(&pins));
}

#[test]
fn a_pin_that_is_no_table_is_refused() {
    let machine = Machine::new("kind").unwrap();
    let pins = pins(&machine);
    let kernel = load(&machine, &pins);
    let (program, _) = kernel.programs()["weir_from_pod"];
    let table = TABLES.iter().find(|t| t.name == "LIVE").unwrap();
    let path = pin_path(&pins, table);
    std::fs::remove_file(&path).unwrap();
    let id = program.to_string();
    output(
        Command::new("bpftool")
            .args(["prog", "pin", "id", &id])
            .arg(&path),
    );
    let error = try_load(&machine, &pins, OBJECT, &[]).unwrap_err();
    assert!(
        matches!(
            error.downcast_ref(),
            Some(LoadError::NoTable { table: "LIVE", .. })
        ),
        "{error:#}"
    );
}

/// This object, with every `exit` a jump to itself.
fn endless(object: &[u8]) -> Vec<u8> {
    let exit: [u8; 8] = [0x95, 0, 0, 0, 0, 0, 0, 0];
    let endless: [u8; 8] = [0x05, 0, 0xff, 0xff, 0, 0, 0, 0];
    let sections: Vec<(u64, u64)> = object::File::parse(object)
        .unwrap()
        .sections()
        .filter(|section| section.kind() == SectionKind::Text)
        .filter_map(|section| section.file_range())
        .collect();
    let mut object = object.to_vec();
    for (start, size) in sections {
        let section = &mut object[start as usize..][..size as usize];
        for instruction in section.chunks_exact_mut(8) {
            if *instruction == exit {
                instruction.copy_from_slice(&endless);
            }
        }
    }
    object
}

#[test]
fn a_refused_program_leaves_no_new_pins_and_the_old_ones_running() {
    let machine = Machine::new("refused").unwrap();
    let pins = pins(&machine);
    let first = load(&machine, &pins);
    first.place_socket_hooks().unwrap();
    drop(first);
    // A table that the next version adds.
    std::fs::remove_file(pins.join("EVENT_LIMITS_v1")).unwrap();
    let (files, before) = (listing(&pins), links(&pins));
    let error = try_load(&machine, &pins, &endless(OBJECT), &[]).unwrap_err();
    let error: LoadError = error.downcast().unwrap();
    let said = error.to_string();
    assert!(matches!(error, LoadError::Verifier { .. }), "{said}");
    assert!(said.contains("processed"), "the verifier is quoted: {said}");
    assert!(said.lines().count() <= 21, "{said}");
    assert_eq!(listing(&pins), files);
    assert_eq!(links(&pins), before);
}

#[test]
fn a_full_table_says_how_far_it_came() {
    let machine = Machine::new("full").unwrap();
    let kernel = try_load(&machine, &pins(&machine), OBJECT, &[("FRONTENDS", 16)]).unwrap();
    let mut tables = kernel.service_tables().unwrap();
    let rows: Vec<(FrontendKey, Frontend)> = (1..=40u16)
        .map(|port| {
            let key = FrontendKey {
                port: port.into(),
                ..Default::default()
            };
            (key, Frontend::default())
        })
        .collect();
    let stopped = tables.frontends.set(&rows).unwrap_err();
    assert!(matches!(stopped.cause, TableError::Full), "{stopped}");
    assert!(stopped.done > 0);
    assert_eq!(tables.frontends.load().unwrap().len(), stopped.done);
    let keys: Vec<_> = rows.iter().map(|(key, _)| *key).collect();
    tables.frontends.remove(&keys).unwrap();
    assert_eq!(tables.frontends.load().unwrap(), []);
}

#[test]
fn a_row_of_zeros_is_absent_from_an_array() {
    let machine = Machine::new("array").unwrap();
    let kernel = load(&machine, &pins(&machine));
    let mut epoch = kernel.policy_tables().unwrap().epoch;
    assert_eq!(epoch.load().unwrap(), []);
    epoch.set(&[(0, 7)]).unwrap();
    assert_eq!(epoch.load().unwrap(), [(0, 7)]);
    epoch.remove(&[0]).unwrap();
    assert_eq!(epoch.load().unwrap(), []);
}

#[test]
fn a_table_of_another_version_goes_only_when_nothing_uses_it() {
    let machine = Machine::new("tables").unwrap();
    let pins = pins(&machine);
    let kernel = load(&machine, &pins);
    let table = TABLES.iter().find(|t| t.name == "LIVE").unwrap();
    let used = pins.join("LIVE_v0");
    output(
        Command::new("bpftool")
            .args(["map", "pin", "pinned"])
            .arg(pin_path(&pins, table))
            .arg(&used),
    );
    let create = |name: &str| {
        let path = pins.join(name);
        let layout = "type array key 4 value 4 entries 1 name FORMER";
        let mut bpftool = Command::new("bpftool");
        bpftool.args(["map", "create"]).arg(&path);
        bpftool.args(layout.split(' '));
        output(&mut bpftool);
        path
    };
    let unused = create("FORMER_v3");
    // What an agent knew that was killed halfway through taking over from it is still to be read.
    let unread = create("FLOWS_v2");
    let state_of = |path: &Path| {
        let found = kernel.census(&[]).unwrap();
        let mut found = found.into_iter();
        let it = found.find(|it| it.what.ends_with(path.to_str().unwrap()));
        it.unwrap().state
    };
    assert_eq!(state_of(&unread), State::InUse);
    kernel.end_take_over();
    assert_eq!(state_of(&unread), State::Unused);
    assert_eq!(state_of(&used), State::InUse);
    assert_eq!(state_of(&unused), State::Unused);
    assert_eq!(state_of(&pin_path(&pins, table)), State::Current);
}

#[test]
fn a_second_agent_is_refused() {
    let node = Node::prepare(NodeOptions::named("second")).unwrap();
    let _first = lock::lock(&node.machine().dir().join("run")).unwrap();
    let mut second = node.agent_launch().spawn().unwrap();
    let status = second.wait(PATIENCE).unwrap();
    assert!(!status.success());
    let said = second.log();
    assert!(
        said.contains("another weir-agent serves this node"),
        "{said}"
    );
    assert_eq!(
        listing(&pins(node.machine())).len(),
        0,
        "it has changed nothing"
    );
}

fn start_agent(node: &mut Node) {
    // What an agent before it has said must not be taken for its own words.
    let log = node.machine().dir().join("agent.log");
    if log.exists() {
        std::fs::remove_file(log).unwrap();
    }
    node.start_agent().unwrap();
    let agent = node.agent().unwrap();
    agent
        .wait_for_log("our programs are on their hooks", PATIENCE)
        .unwrap();
}

#[test]
fn what_an_agent_pinned_outlives_it_and_serves_the_next() {
    let mut node = Node::prepare(NodeOptions::named("outlive")).unwrap();
    start_agent(&mut node);
    let before = links(&pins(node.machine()));
    assert_eq!(before.len(), 8);
    node.kill_agent().unwrap();
    assert_eq!(links(&pins(node.machine())), before);
    start_agent(&mut node);
    let after = links(&pins(node.machine()));
    for (name, (link, program)) in &before {
        assert_eq!(after[name].0, *link, "{name}");
        assert_ne!(after[name].1, *program, "{name}");
    }
}

#[test]
fn an_agent_closes_the_lock_again_and_notices_a_new_address() {
    let mut node = Node::prepare(NodeOptions::named("audit")).unwrap();
    start_agent(&mut node);
    let netns = node.machine().netns();
    output(
        netns
            .command("nft")
            .args(["flush", "chain", "inet", "weir", "prerouting"]),
    );
    netns.ip("addr add 198.51.100.7/32 dev lo").unwrap();
    let agent = node.agent().unwrap();
    agent.wait_for_log("it is closed again", PATIENCE).unwrap();
    agent.wait_for_log("198.51.100.7", PATIENCE).unwrap();
    let state = node.machine().netns().run(second_lock::state).unwrap();
    assert_eq!(state.unwrap(), Lock::Closed { drops: 0 });
    let metrics = node.metrics().unwrap();
    assert!(
        metrics.contains("weir_second_lock_drops_total 0"),
        "{metrics}"
    );
}

/// Everything of a machine's kernel that Weir could have left something in.
fn remains(machine: &Machine) -> String {
    let netns = machine.netns();
    let cgroup = machine.cgroup().path();
    [
        listing(machine.bpffs().path()).join("\n"),
        output(netns.command("nft").args(["list", "ruleset"])),
        output(Command::new("bpftool").args(["cgroup", "show"]).arg(cgroup)),
        netns.ip("-o addr show dev lo").unwrap(),
        netns.ip("-o link show").unwrap(),
        netns.ip("-4 route show").unwrap(),
        netns.ip("-6 route show").unwrap(),
    ]
    .join("\n----\n")
}

#[test]
fn cleanup_leaves_nothing() {
    let mut node = Node::prepare(NodeOptions::named("cleanup")).unwrap();
    let before = remains(node.machine());
    // A device of an attachment that no lease explains, in use: it is closed.
    add_device(node.machine().netns());
    let netns = node.machine().netns();
    netns.ip(&format!("link set {DEVICE} up")).unwrap();
    netns
        .ip(&format!("route add 10.244.1.9/32 dev {DEVICE}"))
        .unwrap();
    start_agent(&mut node);
    let netns = node.machine().netns();
    assert_eq!(netns.run(filters_of_pods).unwrap().len(), 2);
    let queue = output(netns.command("tc").args(["qdisc", "show", "dev", DEVICE]));
    assert!(queue.contains("ingress_block 1464158465"), "{queue}");

    let run = node.machine().dir().join("run");
    let mut cleanup = node.machine().netns().command(binary("weir-agent"));
    cleanup
        .arg("cleanup")
        .arg("--bpffs")
        .arg(pins(node.machine()))
        .arg("--cgroup")
        .arg(node.machine().cgroup().path())
        .arg("--run-dir")
        .arg(&run);
    let refused = cleanup.output().unwrap();
    assert!(!refused.status.success(), "an agent runs");
    node.kill_agent().unwrap();
    let said = output(&mut cleanup);
    assert_eq!(remains(node.machine()), before, "{said}");
    for what in [
        format!("removed device {DEVICE}"),
        "weir_connect4".to_owned(),
        "FRONTENDS_v4".to_owned(),
        "169.254.53.53 of lo".to_owned(),
        "route to 10.244.1.0/24".to_owned(),
        "the second lock".to_owned(),
    ] {
        assert!(said.contains(&what), "{what}: {said}");
    }
    assert_eq!(output(&mut cleanup), "", "nothing is left to remove");
}
