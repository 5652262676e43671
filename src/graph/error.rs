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
    #[error("split of {of:?}: {problem}")]
    Split { of: String, problem: String },
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

/// `; did you mean "x"?` for the candidate most like `found`, or nothing. Comparing takes time in proportion to both
/// lengths: what is too long for a slip of the pen is not compared.
pub fn closest<'a>(found: &str, candidates: impl IntoIterator<Item = &'a str>) -> String {
    const LONGEST: usize = 256;
    candidates
        .into_iter()
        .filter(|c| c.len().max(found.len()) <= LONGEST)
        .map(|c| (strsim::normalized_damerau_levenshtein(&found.to_lowercase(), &c.to_lowercase()), c))
        .filter(|(likeness, _)| *likeness > 0.5)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map_or(String::new(), |(_, c)| format!("; did you mean {c:?}?"))
}

/// Adds a suggestion to serde's message about an unknown field or variant.
pub fn explain(message: &str) -> String {
    let mut quoted = message.split('`').skip(1).step_by(2);
    match quoted.next() {
        Some(found) if message.contains("unknown field") || message.contains("unknown variant") => {
            let hint = closest(found, quoted);
            format!("{message}{hint}")
        }
        _ => message.to_owned(),
    }
}
