//! [`Graph`] to `HloModuleProto` bytes.

use super::ir::Graph;

/// Output `output` may take the memory of parameter `parameter`, which must be donated on execution.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Alias {
    pub output: usize,
    pub parameter: usize,
}

/// Writes a module whose root is the tuple of the graph's outputs (also when there is only one). Parameters and
/// outputs are dense and row-major.
pub fn to_hlo(_graph: &Graph, _aliases: &[Alias]) -> Vec<u8> {
    unimplemented!()
}
