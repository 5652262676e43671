//! The protobuf wire format, as much of it as HLO needs: fields in, fields out, nothing lost.
//!
//! # Source
//! <https://protobuf.dev/programming-guides/encoding/>; field numbers: `xla/service/hlo.proto`, `xla/xla_data.proto`.

use super::error::GraphError;

/// Field numbers of `HloModuleProto`.
pub mod module {
    pub const NAME: u32 = 1;
    pub const ENTRY_NAME: u32 = 2;
    pub const COMPUTATIONS: u32 = 3;
    pub const HOST_PROGRAM_SHAPE: u32 = 4;
    pub const ID: u32 = 5;
    pub const ENTRY_ID: u32 = 6;
    pub const INPUT_OUTPUT_ALIAS: u32 = 8;
}

/// Field numbers of `HloComputationProto`.
pub mod computation {
    pub const NAME: u32 = 1;
    pub const INSTRUCTIONS: u32 = 2;
    pub const PROGRAM_SHAPE: u32 = 4;
    pub const ID: u32 = 5;
    pub const ROOT_ID: u32 = 6;
}

/// Field numbers of `HloInstructionProto`.
pub mod instruction {
    pub const NAME: u32 = 1;
    pub const OPCODE: u32 = 2;
    pub const SHAPE: u32 = 3;
    pub const METADATA: u32 = 7;
    pub const LITERAL: u32 = 8;
    pub const PARAMETER_NUMBER: u32 = 9;
    pub const TUPLE_INDEX: u32 = 13;
    pub const DIMENSIONS: u32 = 14;
    pub const WINDOW: u32 = 15;
    pub const CONVOLUTION: u32 = 16;
    pub const SLICE_DIMENSIONS: u32 = 17;
    pub const DYNAMIC_SLICE_SIZES: u32 = 20;
    pub const PADDING: u32 = 21;
    pub const DOT: u32 = 30;
    pub const GATHER: u32 = 33;
    pub const GATHER_SLICE_SIZES: u32 = 34;
    pub const ID: u32 = 35;
    pub const OPERANDS: u32 = 36;
    pub const CONTROL_PREDECESSORS: u32 = 37;
    pub const CALLED: u32 = 38;
    pub const CUSTOM_CALL_TARGET: u32 = 28;
    pub const SCATTER: u32 = 48;
    pub const FEATURE_GROUPS: u32 = 50;
    pub const BATCH_GROUPS: u32 = 58;
    pub const COMPARISON_DIRECTION: u32 = 63;
    pub const CUSTOM_CALL_HAS_SIDE_EFFECT: u32 = 65;
}

/// One field of a message.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Value<'a> {
    Varint(u64),
    Fixed64(u64),
    Bytes(&'a [u8]),
    Fixed32(u32),
}

/// Iterates over the fields of a message; yields (number, value, the field's bytes with its tag).
#[derive(Clone)]
pub struct Fields<'a> {
    rest: &'a [u8],
    what: &'static str,
}

impl<'a> Fields<'a> {
    /// `what` names the message in errors.
    pub fn new(message: &'a [u8], what: &'static str) -> Self {
        Self { rest: message, what }
    }

    fn malformed(&self, problem: &str) -> GraphError {
        GraphError::Malformed { what: self.what, problem: problem.to_owned() }
    }

    fn varint(&mut self) -> Result<u64, GraphError> {
        let (n, used) = varint(self.rest).ok_or_else(|| self.malformed("a number runs over the end"))?;
        self.rest = &self.rest[used..];
        Ok(n)
    }

    fn take(&mut self, n: usize) -> Result<&'a [u8], GraphError> {
        let (taken, rest) = self.rest.split_at_checked(n).ok_or_else(|| self.malformed("a field runs over the end"))?;
        self.rest = rest;
        Ok(taken)
    }

    fn field(&mut self) -> Result<(u32, Value<'a>, &'a [u8]), GraphError> {
        let start = self.rest;
        let tag = self.varint()?;
        let number = u32::try_from(tag >> 3).ok().filter(|&n| n > 0 && n < 1 << 29);
        let number = number.ok_or_else(|| self.malformed("a field number out of range"))?;
        let value = match tag & 7 {
            0 => Value::Varint(self.varint()?),
            1 => Value::Fixed64(u64::from_le_bytes(self.take(8)?.try_into().expect("8 bytes"))),
            2 => {
                let n = usize::try_from(self.varint()?).map_err(|_| self.malformed("a length out of range"))?;
                Value::Bytes(self.take(n)?)
            }
            5 => Value::Fixed32(u32::from_le_bytes(self.take(4)?.try_into().expect("4 bytes"))),
            t => return Err(self.malformed(&format!("wire type {t}"))),
        };
        Ok((number, value, &start[..start.len() - self.rest.len()]))
    }
}

impl<'a> Iterator for Fields<'a> {
    type Item = Result<(u32, Value<'a>, &'a [u8]), GraphError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.rest.is_empty() {
            return None;
        }
        let field = self.field();
        if field.is_err() {
            self.rest = &[];
        }
        Some(field)
    }
}

impl<'a> Value<'a> {
    pub fn bytes(self, field: &'static str) -> Result<&'a [u8], GraphError> {
        match self {
            Value::Bytes(b) => Ok(b),
            other => Err(GraphError::Malformed { what: field, problem: format!("{other:?} where bytes belong") }),
        }
    }
    pub fn text(self, field: &'static str) -> Result<&'a str, GraphError> {
        std::str::from_utf8(self.bytes(field)?)
            .map_err(|_| GraphError::Malformed { what: field, problem: "not UTF-8".to_owned() })
    }
    pub fn number(self, field: &'static str) -> Result<u64, GraphError> {
        match self {
            Value::Varint(n) => Ok(n),
            other => Err(GraphError::Malformed { what: field, problem: format!("{other:?} where a number belongs") }),
        }
    }
    /// Appends the numbers of a repeated field, packed or not.
    pub fn numbers(self, field: &'static str, out: &mut Vec<u64>) -> Result<(), GraphError> {
        match self {
            Value::Varint(n) => out.push(n),
            Value::Bytes(mut b) => {
                while !b.is_empty() {
                    let (n, used) = varint(b).ok_or_else(|| GraphError::Malformed {
                        what: field,
                        problem: "a number runs over the end".to_owned(),
                    })?;
                    out.push(n);
                    b = &b[used..];
                }
            }
            other => {
                return Err(GraphError::Malformed { what: field, problem: format!("{other:?} where numbers belong") });
            }
        }
        Ok(())
    }
}

/// A number and the bytes it took.
fn varint(b: &[u8]) -> Option<(u64, usize)> {
    let mut n = 0u64;
    for (i, &byte) in b.iter().take(10).enumerate() {
        n |= u64::from(byte & 0x7f) << (7 * i);
        if byte < 0x80 {
            return Some((n, i + 1));
        }
    }
    None
}

/// Writes a message field by field.
#[derive(Clone, Debug, Default)]
pub struct Writer(pub Vec<u8>);

impl Writer {
    fn raw_varint(&mut self, mut n: u64) {
        while n >= 0x80 {
            self.0.push(n as u8 | 0x80);
            n >>= 7;
        }
        self.0.push(n as u8);
    }
    pub fn number(&mut self, field: u32, n: u64) {
        self.raw_varint(u64::from(field) << 3);
        self.raw_varint(n);
    }
    pub fn bytes(&mut self, field: u32, b: &[u8]) {
        self.raw_varint(u64::from(field) << 3 | 2);
        self.raw_varint(b.len() as u64);
        self.0.extend_from_slice(b);
    }
    /// A repeated number, packed; nothing when empty.
    pub fn numbers(&mut self, field: u32, ns: impl IntoIterator<Item = u64>) {
        let mut packed = Writer::default();
        ns.into_iter().for_each(|n| packed.raw_varint(n));
        if !packed.0.is_empty() {
            self.bytes(field, &packed.0);
        }
    }
    /// Fields as they were imported.
    pub fn fields(&mut self, raw: &[u8]) {
        self.0.extend_from_slice(raw);
    }
}

/// The last field of that number in an op's attributes.
pub fn find<'a>(attributes: &'a [u8], field: u32) -> Option<Value<'a>> {
    Fields::new(attributes, "attributes").flatten().filter(|(n, _, _)| *n == field).map(|(_, v, _)| v).last()
}

/// All numbers of a repeated field.
pub fn all_numbers(attributes: &[u8], field: u32) -> Vec<u64> {
    let mut out = Vec::new();
    for (n, value, _) in Fields::new(attributes, "attributes").flatten() {
        if n == field && value.numbers("attributes", &mut out).is_err() {
            break;
        }
    }
    out
}

/// The attributes without one field.
pub fn without(attributes: &[u8], field: u32) -> Vec<u8> {
    let mut out = Vec::with_capacity(attributes.len());
    for (n, _, raw) in Fields::new(attributes, "attributes").flatten() {
        if n != field {
            out.extend_from_slice(raw);
        }
    }
    out
}
