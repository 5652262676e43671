//! Integer and boolean scalars: what loop counters and slice indices are made of.

use super::super::cut::op;
use super::super::ir::Op;
use super::super::proto::{Fields, Value, Writer, find, instruction};
use super::super::shape::{ArrayShape, DType, Shape};

/// A known integer or boolean scalar.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Scalar {
    pub dtype: DType,
    /// Sign- or zero-extended.
    pub value: i64,
}

/// Whether values of this shape can be [`Scalar`]s.
pub fn is_scalar(shape: &Shape) -> Option<DType> {
    let array = shape.as_array()?;
    let integer = field(array.dtype).is_some();
    (array.dims.is_empty() && integer).then_some(array.dtype)
}

/// Field of `LiteralProto` that holds values of this type.
fn field(dtype: DType) -> Option<u32> {
    Some(match dtype {
        DType::Bool => 2,
        DType::Uint8 => 3,
        DType::Int32 => 4,
        DType::Int64 => 5,
        DType::Uint32 => 6,
        DType::Uint64 => 7,
        _ => return None,
    })
}

impl Scalar {
    /// Wraps `value` to the width of the type.
    pub fn new(dtype: DType, value: i64) -> Self {
        let value = match dtype {
            DType::Bool => i64::from(value != 0),
            DType::Uint8 => i64::from(value as u8),
            DType::Int32 => i64::from(value as i32),
            DType::Uint32 => i64::from(value as u32),
            _ => value,
        };
        Self { dtype, value }
    }

    /// The value of a constant op.
    pub fn of_constant(constant: &Op) -> Option<Self> {
        let dtype = is_scalar(&constant.shape)?;
        let literal = find(&constant.attributes, instruction::LITERAL)?.bytes("literal").ok()?;
        let mut value = 0;
        for found in Fields::new(literal, "literal") {
            let (number, content, _) = found.ok()?;
            if Some(number) != field(dtype) {
                continue;
            }
            value = match (dtype, content) {
                (DType::Uint8, Value::Bytes(&[b])) => i64::from(b),
                (_, content) => {
                    let mut numbers = Vec::new();
                    content.numbers("literal", &mut numbers).ok()?;
                    *numbers.first()? as i64
                }
            };
        }
        Some(Self::new(dtype, value))
    }

    /// A constant op with this value.
    pub fn to_constant(self) -> Op {
        let shape: Shape = ArrayShape::scalar(self.dtype).into();
        let mut literal = Writer::default();
        literal.bytes(1, &super::super::export::dense(&shape));
        let number = field(self.dtype).expect("made from such a type");
        match self.dtype {
            DType::Uint8 => literal.bytes(number, &[self.value as u8]),
            _ => literal.numbers(number, [self.value as u64]),
        }
        let mut attributes = Writer::default();
        attributes.bytes(instruction::LITERAL, &literal.0);
        op("constant", "constant", shape, Vec::new(), attributes.0)
    }
}

/// The result of `op` on known scalars, where it is one of the ops that indices are computed with.
pub fn fold(op: &Op, operands: &[Scalar]) -> Option<Scalar> {
    let dtype = is_scalar(&op.shape)?;
    let unsigned = |s: &Scalar| s.value as u64;
    let value = match (&*op.opcode, operands) {
        ("add", [a, b]) => a.value.wrapping_add(b.value),
        ("subtract", [a, b]) => a.value.wrapping_sub(b.value),
        ("multiply", [a, b]) => a.value.wrapping_mul(b.value),
        ("minimum", [a, b]) if a.dtype != DType::Uint64 => a.value.min(b.value),
        ("maximum", [a, b]) if a.dtype != DType::Uint64 => a.value.max(b.value),
        ("and", [a, b]) => a.value & b.value,
        ("or", [a, b]) => a.value | b.value,
        ("not", [a]) if a.dtype == DType::Bool => 1 - a.value,
        ("not", [a]) => !a.value,
        ("negate", [a]) => a.value.wrapping_neg(),
        ("convert" | "copy" | "reshape", [a]) => a.value,
        ("clamp", [low, x, high]) if x.dtype != DType::Uint64 => x.value.max(low.value).min(high.value),
        ("select", [which, yes, no]) => {
            if which.value != 0 {
                yes.value
            } else {
                no.value
            }
        }
        ("compare", [a, b]) => {
            let order = if a.dtype == DType::Uint64 { unsigned(a).cmp(&unsigned(b)) } else { a.value.cmp(&b.value) };
            let direction = find(&op.attributes, instruction::COMPARISON_DIRECTION)?.text("direction").ok()?;
            i64::from(match direction {
                "EQ" => order.is_eq(),
                "NE" => order.is_ne(),
                "LT" => order.is_lt(),
                "LE" => order.is_le(),
                "GT" => order.is_gt(),
                "GE" => order.is_ge(),
                _ => return None,
            })
        }
        _ => return None,
    };
    Some(Scalar::new(dtype, value))
}
