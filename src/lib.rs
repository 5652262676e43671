//! Foreshard: foresee the load, then shard the model.
//!
//! The crate is a house of rooms; imports run one way, from the top of this list to the bottom.

// Core: sync, deterministic; no clock, environment, files, `unsafe` or Kubernetes.
pub mod units;

pub mod forecast;
pub mod graph;
pub mod topology;

pub mod profile;

pub mod cost;
pub mod plan;
pub mod transition;

// Contract: data only.
pub mod api;
pub mod wire;

// Edges: may block, fail, surprise.
pub mod device;
pub mod telemetry;
pub mod tls;

pub mod rpc;

pub mod fetch;
pub mod operator;
pub mod runtime;
pub mod trainer;

pub mod bench;
pub mod local;

pub mod cli;
