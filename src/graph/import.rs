//! `HloModuleProto` bytes to [`Graph`].

use super::error::GraphError;
use super::ir::Graph;

/// Reads an unoptimised HLO module; bytes it does not know are kept.
pub fn from_hlo(_bytes: &[u8]) -> Result<Graph, GraphError> {
    unimplemented!()
}
