//! Stacks: tensors whose rows along the leading axis are known one by one.
//!
//! A `scan` over layers keeps weights, residuals and gradients of all layers in one tensor each. Unrolled, every
//! iteration reads or writes one row: kept as rows, they can live where their layer lives.

use super::super::ir::OpId;
use super::super::shape::ArrayShape;

/// A tensor as rows; each row keeps the leading axis, with size one.
#[derive(Clone, Debug)]
pub struct Stack {
    pub shape: ArrayShape,
    pub rows: Vec<Option<OpId>>,
    /// Where rows not given come from.
    pub base: Option<OpId>,
    /// The whole tensor, once something has asked for it.
    pub whole: Option<OpId>,
    /// The split parameter it stands for.
    pub parameter: Option<usize>,
}

impl Stack {
    pub fn is_full(&self) -> bool {
        self.rows.iter().all(Option::is_some)
    }

    /// All rows, when they are known.
    pub fn full_rows(&self) -> Option<Vec<OpId>> {
        self.rows.iter().copied().collect()
    }
}

/// Shape of one row of a tensor.
pub fn row_shape(shape: &ArrayShape) -> ArrayShape {
    let mut row = shape.clone();
    if let Some(first) = row.dims.first_mut() {
        *first = 1;
    }
    row
}

/// Ops that work on each element for itself.
pub fn is_elementwise(opcode: &str) -> bool {
    matches!(
        opcode,
        "abs"
            | "add"
            | "and"
            | "atan2"
            | "cbrt"
            | "ceil"
            | "clamp"
            | "compare"
            | "convert"
            | "copy"
            | "cosine"
            | "divide"
            | "exponential"
            | "exponential-minus-one"
            | "floor"
            | "is-finite"
            | "log"
            | "log-plus-one"
            | "logistic"
            | "maximum"
            | "minimum"
            | "multiply"
            | "negate"
            | "not"
            | "or"
            | "power"
            | "remainder"
            | "round-nearest-afz"
            | "round-nearest-even"
            | "rsqrt"
            | "select"
            | "sign"
            | "sine"
            | "sqrt"
            | "subtract"
            | "tan"
            | "tanh"
            | "xor"
            | "erf"
            | "reduce-precision"
            | "popcnt"
            | "count-leading-zeros"
            | "shift-left"
            | "shift-right-logical"
            | "shift-right-arithmetic"
            | "real"
            | "imag"
    )
}
