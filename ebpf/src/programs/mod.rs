//! The programs, by what they are attached to.

mod net;
mod pod;
mod socket;
