//! The programs, by what they are attached to.

mod pod;
mod socket;
