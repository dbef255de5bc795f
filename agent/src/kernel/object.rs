//! The BPF object, as built from `ebpf` by the build script.

/// The ELF file with every program and map, aligned as its parser needs it.
pub const OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/weir"));
