//! What the tests stand on: machines made of namespaces, processes, a real control plane, virtual
//! machines. No test is here; they are in `tests/tests`.

pub mod application;
pub mod bpffs;
pub mod cgroup;
pub mod machine;
pub mod netns;
pub mod node;
pub mod oracle;
pub mod process;
pub mod run;
pub mod workloads;
