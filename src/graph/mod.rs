//! The model as a graph of XLA ops: import, passes, verification, cutting, export.
//!
//! `graph` knows nothing of devices, costs, plans or files.

pub mod cut;
pub mod error;
pub mod export;
pub mod import;
pub mod ir;
pub mod manifest;
pub mod model;
pub mod passes;
pub mod proto;
pub mod region;
pub mod scope;
pub mod shape;
pub mod split;
pub mod text;
pub mod verify;

pub use error::GraphError;
pub use ir::{CompId, Computation, Graph, Lane, Op, OpId};
pub use manifest::Manifest;
pub use model::{GradGraph, Model, Part, StateTensor};
pub use region::Region;
pub use shape::{ArrayShape, DType, Shape};
pub use split::Split;
