//! The node agent: one straight line from what the cluster says to what the kernel holds, and back
//! from what happened to what is exported. `app` wires it; docs/architecture.md is the map.

pub mod kernel {
    //! Everything privileged. Nothing outside of this folder calls aya or opens netlink.
    pub mod object;
}
pub mod model;
