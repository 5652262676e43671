//! Element types and shapes of tensors.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::units::Bytes;

/// Element type of an array, by the names numpy and JAX use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DType {
    Bool,
    Int8,
    Int16,
    Int32,
    Int64,
    Uint8,
    Uint16,
    Uint32,
    Uint64,
    Float16,
    Bfloat16,
    Float32,
    Float64,
    Complex64,
    Complex128,
    #[serde(rename = "float8_e4m3fn")]
    Float8E4m3fn,
    #[serde(rename = "float8_e5m2")]
    Float8E5m2,
}

impl DType {
    /// Bytes one element takes.
    pub fn size(self) -> u64 {
        use DType::*;
        match self {
            Bool | Int8 | Uint8 | Float8E4m3fn | Float8E5m2 => 1,
            Int16 | Uint16 | Float16 | Bfloat16 => 2,
            Int32 | Uint32 | Float32 => 4,
            Int64 | Uint64 | Float64 | Complex64 => 8,
            Complex128 => 16,
        }
    }

    /// The number HLO gives this type (`PrimitiveType` in xla_data.proto).
    pub fn to_hlo(self) -> u64 {
        use DType::*;
        match self {
            Bool => 1,
            Int8 => 2,
            Int16 => 3,
            Int32 => 4,
            Int64 => 5,
            Uint8 => 6,
            Uint16 => 7,
            Uint32 => 8,
            Uint64 => 9,
            Float16 => 10,
            Float32 => 11,
            Float64 => 12,
            Complex64 => 15,
            Bfloat16 => 16,
            Complex128 => 18,
            Float8E5m2 => 19,
            Float8E4m3fn => 20,
        }
    }

    /// The inverse of [`DType::to_hlo`]; `None` for types Foreshard does not move between shards.
    pub fn from_hlo(n: u64) -> Option<Self> {
        use DType::*;
        [
            Bool,
            Int8,
            Int16,
            Int32,
            Int64,
            Uint8,
            Uint16,
            Uint32,
            Uint64,
            Float16,
            Bfloat16,
            Float32,
            Float64,
            Complex64,
            Complex128,
            Float8E4m3fn,
            Float8E5m2,
        ]
        .into_iter()
        .find(|t| t.to_hlo() == n)
    }

    /// The type's name in safetensors files, which know no `complex128`.
    pub fn to_safetensors(self) -> Option<safetensors::Dtype> {
        use safetensors::Dtype as S;
        Some(match self {
            DType::Bool => S::BOOL,
            DType::Int8 => S::I8,
            DType::Int16 => S::I16,
            DType::Int32 => S::I32,
            DType::Int64 => S::I64,
            DType::Uint8 => S::U8,
            DType::Uint16 => S::U16,
            DType::Uint32 => S::U32,
            DType::Uint64 => S::U64,
            DType::Float16 => S::F16,
            DType::Bfloat16 => S::BF16,
            DType::Float32 => S::F32,
            DType::Float64 => S::F64,
            DType::Complex64 => S::C64,
            DType::Complex128 => return None,
            DType::Float8E4m3fn => S::F8_E4M3,
            DType::Float8E5m2 => S::F8_E5M2,
        })
    }

    /// The inverse of [`DType::to_safetensors`].
    pub fn from_safetensors(dtype: safetensors::Dtype) -> Option<Self> {
        (1..=20).filter_map(Self::from_hlo).find(|d| d.to_safetensors() == Some(dtype))
    }

    /// Short HLO spelling, as in `f32[2,3]`.
    pub fn hlo_name(self) -> &'static str {
        use DType::*;
        match self {
            Bool => "pred",
            Int8 => "s8",
            Int16 => "s16",
            Int32 => "s32",
            Int64 => "s64",
            Uint8 => "u8",
            Uint16 => "u16",
            Uint32 => "u32",
            Uint64 => "u64",
            Float16 => "f16",
            Bfloat16 => "bf16",
            Float32 => "f32",
            Float64 => "f64",
            Complex64 => "c64",
            Complex128 => "c128",
            Float8E4m3fn => "f8e4m3fn",
            Float8E5m2 => "f8e5m2",
        }
    }
}

/// Shape of one tensor: element type and static dimensions, row-major.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ArrayShape {
    pub dtype: DType,
    pub dims: Vec<u64>,
}

impl ArrayShape {
    pub fn new(dtype: DType, dims: impl Into<Vec<u64>>) -> Self {
        Self { dtype, dims: dims.into() }
    }
    pub fn scalar(dtype: DType) -> Self {
        Self { dtype, dims: Vec::new() }
    }
    /// Number of elements; saturates, so that a hostile shape cannot wrap to a small size.
    pub fn n_elements(&self) -> u64 {
        self.dims.iter().fold(1u64, |n, &d| n.saturating_mul(d))
    }
    pub fn bytes(&self) -> Bytes {
        Bytes(self.n_elements().saturating_mul(self.dtype.size()))
    }
}

impl fmt::Display for ArrayShape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}[", self.dtype.hlo_name())?;
        for (i, d) in self.dims.iter().enumerate() {
            if i > 0 {
                f.write_str(",")?;
            }
            write!(f, "{d}")?;
        }
        f.write_str("]")
    }
}
impl fmt::Debug for ArrayShape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// What an op yields.
#[derive(Clone, PartialEq, Eq, Hash)]
pub enum Shape {
    Array(ArrayShape),
    Tuple(Vec<Shape>),
    /// Orders side effects; holds no data.
    Token,
    /// A type Foreshard cannot move (packed integers, opaque handles). Its op stays where its users are.
    Other {
        hlo_type: u64,
        dims: Vec<u64>,
    },
}

impl Shape {
    pub fn as_array(&self) -> Option<&ArrayShape> {
        match self {
            Shape::Array(a) => Some(a),
            _ => None,
        }
    }
    /// Total size of all leaves.
    pub fn bytes(&self) -> Bytes {
        match self {
            Shape::Array(a) => a.bytes(),
            Shape::Tuple(t) => t.iter().map(Shape::bytes).sum(),
            Shape::Token => Bytes(0),
            Shape::Other { dims, .. } => Bytes(dims.iter().fold(1u64, |n, &d| n.saturating_mul(d))),
        }
    }
}

impl From<ArrayShape> for Shape {
    fn from(a: ArrayShape) -> Self {
        Shape::Array(a)
    }
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Shape::Array(a) => fmt::Display::fmt(a, f),
            Shape::Tuple(t) => {
                f.write_str("(")?;
                for (i, s) in t.iter().enumerate() {
                    if i > 0 {
                        f.write_str(", ")?;
                    }
                    fmt::Display::fmt(s, f)?;
                }
                f.write_str(")")
            }
            Shape::Token => f.write_str("token[]"),
            Shape::Other { hlo_type, dims } => write!(f, "type{hlo_type}{dims:?}"),
        }
    }
}
impl fmt::Debug for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}
