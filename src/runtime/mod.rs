//! The sidecar: a worker that executes one shard, and the session that drives all of them.

pub mod session;
