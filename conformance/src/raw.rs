//! Rings written by hand.
