//! Segments: what one shard runs between two exchanges.
