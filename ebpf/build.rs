//! Tells bpf-linker how to generate code.

fn main() {
    for argument in [
        // Loads and stores of whole words at any offset in packets and maps, as x86-64 and arm64 do them
        // and their verifiers allow: addresses are bytes in our types.
        "--cpu-features=+alu32,+allows-misaligned-mem-access",
        // Short copies and fills are instructions, not calls of a loop over bytes.
        "--disable-expand-memcpy-in-order",
    ] {
        println!("cargo::rustc-link-arg-bins={argument}");
    }
}
