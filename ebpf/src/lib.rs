//! Nothing: lets the loader build-depend on this package, so that cargo tracks its sources.
#![no_std]
