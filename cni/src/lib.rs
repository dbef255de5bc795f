//! What the plugin and the agent agree on: the frames of their socket, how an attachment is named,
//! and how a release is left for an agent that is not there. The plugin itself is the binary.

pub mod attachment;
pub mod released;
pub mod wire;
