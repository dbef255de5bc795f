//! What the tests stand on: machines made of namespaces, processes, a real control plane, virtual
//! machines, packets and tables in memory. No test is here; they are in `tests/tests`.

pub mod application;
pub mod binaries;
pub mod bpffs;
pub mod bytes;
pub mod cache;
pub mod cgroup;
pub mod cluster;
pub mod complaint;
pub mod control_plane;
pub mod debian;
pub mod edges;
pub mod frames;
pub mod go;
pub mod kubectl;
pub mod kubelet;
pub mod load;
pub mod machine;
pub mod mix;
pub mod netns;
pub mod node;
pub mod not_run;
pub mod oracle;
pub mod pki;
pub mod pod;
pub mod process;
pub mod programs;
pub mod real;
pub mod run;
pub mod shop;
pub mod tables;
pub mod traffic;
pub mod vm;
pub mod workloads;
pub mod world;
