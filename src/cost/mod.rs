//! The `cost` room.
