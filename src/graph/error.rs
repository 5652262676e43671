//! What can be wrong with a bundle or a graph.

/// Names the file or op, the field, the value found and the way out.
#[derive(Debug, thiserror::Error)]
pub enum GraphError {
    #[error("{0}")]
    Invalid(String),
}
