//! Whole histories of the line, in memory.
