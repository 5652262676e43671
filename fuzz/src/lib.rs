//! What fuzz targets share: the rooms under test, what must hold of them, and mutations that know the formats.

// The checks are written against the crate, and run against these rooms of it.
extern crate self as foreshard;

#[path = "../../src/units.rs"]
pub mod units;

#[path = "../../src/forecast/mod.rs"]
pub mod forecast;
#[path = "../../src/graph/mod.rs"]
pub mod graph;
#[path = "../../src/topology/mod.rs"]
pub mod topology;

#[path = "../../src/profile/mod.rs"]
pub mod profile;

#[path = "../../src/cost/mod.rs"]
pub mod cost;
#[path = "../../src/plan/mod.rs"]
pub mod plan;

#[path = "../../src/wire/mod.rs"]
pub mod wire;

pub mod checks;
pub mod messages;
pub mod mutate;
