//! What the agent's local API says, as types: shared by the agent, which fills them, and the `weir`
//! command, which prints them; and what is asked of it that is more than a path.

pub mod explained;
pub mod question;
pub mod views;
