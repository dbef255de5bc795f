//! What the plugin and the agent agree on: the frames of their socket, how an attachment is named,
//! how a release is left for an agent that is not there, and how both write to the disk. The plugin itself
//! is the binary.

pub mod attachment;
pub mod durable;
pub mod released;
pub mod wire;
