//! What the agent's local API says, as types: shared by the agent, which fills them, and the `weir`
//! command, which prints them.

pub mod views;
