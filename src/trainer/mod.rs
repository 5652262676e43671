//! The `trainer` room.
