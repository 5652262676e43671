//! What can be wrong with a bundle or a graph.

/// Names the file or op, the field, the value found and the way out.
#[derive(Debug, thiserror::Error)]
pub enum GraphError {
    #[error("not an HLO module: {what}: {problem}; is the file cut short?")]
    Malformed { what: &'static str, problem: String },
    #[error("op {op} ({opcode}) of {computation}: {problem}")]
    Op { computation: String, op: String, opcode: String, problem: String },
    #[error("computation {computation}: {problem}")]
    Computation { computation: String, problem: String },
    #[error("bundle file {file}: {problem}")]
    File { file: String, problem: String },
    #[error("pass {pass}: {problem}")]
    Pass { pass: &'static str, problem: String },
    #[error("{file}: {source}")]
    In { file: String, source: Box<GraphError> },
    #[error("{0}")]
    Invalid(String),
}

impl GraphError {
    /// Says in which file of the bundle it is.
    pub fn in_file(self, file: &str) -> Self {
        GraphError::In { file: file.to_owned(), source: Box::new(self) }
    }
}
