//! A batch, looked at before it is trained on.

use serde::{Deserialize, Serialize};

use crate::graph::{ArrayShape, DType};
use crate::units::Bytes;

/// Most elements of a batch that are looked at, over all its tensors: 256 KiB of `float32`, a few tens of microseconds.
/// What is larger is sampled evenly.
pub const SAMPLE: u64 = 1 << 16;

/// Elements of a float tensor that are looked at together when it is sampled: some cache lines.
const BLOCK: usize = 256;
/// Bytes of padding that are looked at together.
const STRIDE: usize = 64;

/// One tensor of a batch, in host memory.
#[derive(Clone, Copy, Debug)]
pub struct TensorView<'a> {
    pub name: &'a str,
    /// The leading axis counts rows.
    pub shape: &'a ArrayShape,
    /// Dense, row-major, little-endian.
    pub data: &'a [u8],
    /// Rows may end in zeros that are no data, along their first axis; see [`crate::graph::Manifest::padded`].
    pub padded: bool,
}

/// Traits of one batch.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct BatchProfile {
    /// The gradient variant that takes its shapes.
    pub variant: String,
    pub rows: u64,
    pub bytes: Bytes,
    /// In the order of the batch.
    pub tensors: Vec<TensorProfile>,
    /// Elements looked at; never above [`SAMPLE`].
    pub touched: u64,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TensorProfile {
    pub name: String,
    pub dtype: DType,
    pub dims: Vec<u64>,
    pub bytes: Bytes,
    pub content: Content,
}

/// What the values of a tensor look like.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Content {
    /// Nothing worth a look: integers of fixed length, booleans.
    Plain,
    /// Rows of variable length.
    Ragged(Lengths),
    /// Of the elements looked at.
    Floats { looked_at: u64, zeros: f64, non_finite: u64 },
}

/// Lengths of rows without the zeros they end in, in steps of their first axis.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Lengths {
    /// Steps that a row has room for.
    pub room: u64,
    /// Rows looked at.
    pub rows: u64,
    pub min: u64,
    pub quarter: u64,
    pub median: u64,
    pub three_quarters: u64,
    pub max: u64,
    pub mean: f64,
}

impl Lengths {
    /// Share of the tensor that is padding.
    pub fn padding(&self) -> f64 {
        if self.room == 0 { 0.0 } else { 1.0 - self.mean / self.room as f64 }
    }
}

/// A batch that is not one.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ProfileError {
    #[error("batch tensor {tensor}: {found} bytes, its shape {shape} takes {expected}")]
    Size { tensor: String, shape: String, expected: u64, found: u64 },
    #[error(
        "batch tensor {tensor} has {found} rows, the batch has {expected}; the leading axis of every tensor counts rows"
    )]
    Rows { tensor: String, expected: u64, found: u64 },
    #[error("batch tensor {tensor} has shape {shape} and no axis for its rows")]
    Scalar { tensor: String, shape: String },
}

impl BatchProfile {
    /// Share of the elements of padded tensors that is padding; 0 where rows have one length.
    pub fn padding(&self) -> f64 {
        let ragged = self.tensors.iter().filter_map(|t| match &t.content {
            Content::Ragged(lengths) => Some((t.bytes.0 as f64, lengths.padding())),
            _ => None,
        });
        let (all, padding) = ragged.fold((0.0, 0.0), |(all, sum), (bytes, share)| (all + bytes, sum + bytes * share));
        if all > 0.0 { padding / all } else { 0.0 }
    }

    /// Lengths of the first tensor whose rows vary.
    pub fn lengths(&self) -> Option<&Lengths> {
        self.tensors.iter().find_map(|t| match &t.content {
            Content::Ragged(lengths) => Some(lengths),
            _ => None,
        })
    }

    /// Values among those looked at that no training survives.
    pub fn non_finite(&self) -> u64 {
        let of = |t: &TensorProfile| if let Content::Floats { non_finite, .. } = t.content { non_finite } else { 0 };
        self.tensors.iter().map(of).sum()
    }
}

/// Profiles a batch.
///
/// Padding is told from data by being zero at the end of a row: a row that really ends in zeros counts as shorter.
///
/// # Errors
/// [`ProfileError`]: tensor, what was found and what was expected.
/// # Complexity
/// O(min(elements, [`SAMPLE`]) + tensors + rows looked at · log), whatever the size of the batch.
pub fn profile(variant: &str, tensors: &[TensorView<'_>]) -> Result<BatchProfile, ProfileError> {
    let mut rows = None;
    let share = SAMPLE / tensors.len().max(1) as u64;
    let (mut out, mut touched) = (Vec::with_capacity(tensors.len()), 0);
    for view in tensors {
        let &TensorView { name, shape, data, padded } = view;
        let tensor = || name.to_owned();
        if data.len() as u64 != shape.bytes().0 {
            let (expected, found) = (shape.bytes().0, data.len() as u64);
            return Err(ProfileError::Size { tensor: tensor(), shape: shape.to_string(), expected, found });
        }
        let Some(&found) = shape.dims.first() else {
            return Err(ProfileError::Scalar { tensor: tensor(), shape: shape.to_string() });
        };
        let expected = *rows.get_or_insert(found);
        if found != expected {
            return Err(ProfileError::Rows { tensor: tensor(), expected, found });
        }
        let (content, n) = match Float::of(shape.dtype) {
            _ if padded && shape.dims.len() > 1 => lengths(shape, data, share),
            Some(float) => floats(float, data, share),
            None => (Content::Plain, 0),
        };
        touched += n;
        let (dims, bytes) = (shape.dims.to_vec(), shape.bytes());
        out.push(TensorProfile { name: tensor(), dtype: shape.dtype, dims, bytes, content });
    }
    let bytes = out.iter().map(|t| t.bytes).sum();
    Ok(BatchProfile { variant: variant.to_owned(), rows: rows.unwrap_or(0), bytes, tensors: out, touched })
}

/// Lengths of rows, as many as `budget` elements allow; with the elements looked at.
fn lengths(shape: &ArrayShape, data: &[u8], budget: u64) -> (Content, u64) {
    let (rows, room) = (shape.dims[0] as usize, shape.dims[1]);
    let element = shape.dtype.size() as usize;
    let row = data.len().checked_div(rows).unwrap_or(0);
    let step = (row as u64).checked_div(room).unwrap_or(0) as usize;
    let mut budget_bytes = budget as usize * element;
    let mut found = Vec::new();
    for i in evenly(rows) {
        // The last rows would be cut short: better fewer.
        if budget_bytes < STRIDE.min(row) {
            break;
        }
        let (used, seen) = trailing(&data[i * row..(i + 1) * row], budget_bytes);
        budget_bytes -= seen;
        found.push(if step == 0 { 0 } else { used.div_ceil(step) as u64 });
    }
    found.sort_unstable();
    let at = |quarter: usize| found.get((found.len().saturating_sub(1)) * quarter / 4).copied().unwrap_or(0);
    let lengths = Lengths {
        room,
        rows: found.len() as u64,
        min: at(0),
        quarter: at(1),
        median: at(2),
        three_quarters: at(3),
        max: at(4),
        mean: found.iter().sum::<u64>() as f64 / found.len().max(1) as f64,
    };
    (Content::Ragged(lengths), budget - (budget_bytes / element) as u64)
}

/// Bytes of a row up to its last one that is not zero, and bytes looked at. Past `budget` what is left counts as data.
fn trailing(row: &[u8], budget: usize) -> (usize, usize) {
    let mut end = row.len();
    while end > 0 {
        let begin = end.saturating_sub(STRIDE);
        if row.len() - begin > budget {
            break;
        }
        let block = &row[begin..end];
        // One pass that vectorises; only the block with data is searched.
        if block.iter().fold(0, |any, b| any | b) != 0 {
            let last = block.iter().rposition(|b| *b != 0).unwrap_or(0);
            return (begin + last + 1, row.len() - begin);
        }
        end = begin;
    }
    (end, row.len() - end)
}

/// All of `0..n`, any beginning of it spread over the whole.
///
/// # Source
/// Additive recurrence by the golden ratio (Knuth, The Art of Computer Programming 3, 6.4), with the nearest stride that
/// meets every position.
fn evenly(n: usize) -> impl Iterator<Item = usize> {
    const GOLDEN: f64 = 0.618_033_988_749_895;
    fn gcd(a: usize, b: usize) -> usize {
        if b == 0 { a } else { gcd(b, a % b) }
    }
    let start = ((n as f64 * GOLDEN) as usize).max(1);
    let stride = (start..).find(|&s| gcd(s, n) == 1).unwrap_or(1);
    (0..n).scan(0usize, move |at, _| {
        let now = *at;
        *at = (*at + stride) % n;
        Some(now)
    })
}

/// How a float type is laid out, as far as zeros and non-finite values go.
#[derive(Clone, Copy)]
struct Float {
    /// Bytes of an element.
    width: usize,
    /// The bits without sign.
    magnitude: u64,
    /// Magnitudes from here on are infinite or no number.
    limit: u64,
}

impl Float {
    fn of(dtype: DType) -> Option<Self> {
        let (width, limit) = match dtype {
            DType::Float64 | DType::Complex128 => (8, 0x7ff << 52),
            DType::Float32 | DType::Complex64 => (4, 0xff << 23),
            DType::Bfloat16 => (2, 0xff << 7),
            DType::Float16 => (2, 0x1f << 10),
            DType::Float8E5m2 => (1, 0x1f << 2),
            // Finite but for one pattern.
            DType::Float8E4m3fn => (1, 0x7f),
            _ => return None,
        };
        Some(Self { width, magnitude: u64::MAX >> (65 - 8 * width), limit })
    }
}

/// Zeros and non-finite values, in even blocks; with the elements looked at. A complex number counts as two.
fn floats(Float { width, magnitude, limit }: Float, data: &[u8], budget: u64) -> (Content, u64) {
    let n = data.len() / width;
    let (mut zeros, mut non_finite, mut looked_at) = (0, 0, 0);
    let mut look = |block: &[u8]| {
        let count = |value: fn(&[u8]) -> u64| {
            block.chunks_exact(width).fold((0u64, 0u64), |(z, f), c| {
                let v = value(c) & magnitude;
                (z + u64::from(v == 0), f + u64::from(v >= limit))
            })
        };
        // One loop for each width, so that the compiler knows it.
        let (z, f) = match width {
            8 => count(|c| u64::from_le_bytes([c[0], c[1], c[2], c[3], c[4], c[5], c[6], c[7]])),
            4 => count(|c| u32::from_le_bytes([c[0], c[1], c[2], c[3]]).into()),
            2 => count(|c| u16::from_le_bytes([c[0], c[1]]).into()),
            _ => count(|c| c[0].into()),
        };
        zeros += z;
        non_finite += f;
        looked_at += (block.len() / width) as u64;
    };
    if n as u64 <= budget {
        look(data);
    } else {
        let blocks = budget as usize / BLOCK;
        for i in 0..blocks {
            let from = (i as u128 * (n - BLOCK) as u128 / (blocks - 1).max(1) as u128) as usize;
            look(&data[from * width..(from + BLOCK) * width]);
        }
    }
    let zeros = if looked_at > 0 { zeros as f64 / looked_at as f64 } else { 0.0 };
    (Content::Floats { looked_at, zeros, non_finite }, looked_at)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn tokens(rows: &[u64], room: u64) -> (ArrayShape, Vec<u8>) {
        let shape = ArrayShape::new(DType::Int32, vec![rows.len() as u64, room]);
        let row = |&n: &u64| (0..room).flat_map(move |i| if i < n { 7i32 } else { 0 }.to_le_bytes());
        (shape, rows.iter().flat_map(row).collect())
    }

    fn view<'a>((shape, data): &'a (ArrayShape, Vec<u8>), padded: bool) -> TensorView<'a> {
        TensorView { name: "x", shape, data, padded }
    }

    #[test]
    fn tells_padding_from_data() {
        let batch = tokens(&[3, 8, 0, 5], 8);
        let found = profile("t8", &[view(&batch, true)]).unwrap();
        let lengths = found.lengths().unwrap();
        assert_eq!((lengths.min, lengths.median, lengths.max, lengths.mean), (0, 3, 8, 4.0));
        assert_eq!((found.rows, found.bytes, found.padding()), (4, Bytes(128), 0.5));
        // The same rows where nothing can be padded: zeros are data.
        assert_eq!(profile("t8", &[view(&batch, false)]).unwrap().padding(), 0.0);
    }

    #[test]
    fn counts_steps_of_the_padded_axis() {
        let shape = ArrayShape::new(DType::Float32, vec![1, 4, 2]);
        let data: Vec<u8> = [1.0f32, 1.0, 1.0, 0.0, 0.0, 2.0, 0.0, 0.0].iter().flat_map(|v| v.to_le_bytes()).collect();
        let found = profile("v", &[view(&(shape, data), true)]).unwrap();
        assert_eq!(found.lengths().unwrap().max, 3);
    }

    #[test]
    fn large_batches_are_sampled_within_the_bound() {
        // 100,000 elements, nearly all padding, in two tensors; then a hundred times as many.
        for rows in [195, 19_500] {
            let lengths: Vec<u64> = (0..rows).map(|i| i * 31 % 64).collect();
            let (ids, targets) = (tokens(&lengths, 256), tokens(&lengths, 256));
            let n = ids.0.n_elements() + targets.0.n_elements();
            let found = profile("t256", &[view(&ids, true), view(&targets, true)]).unwrap();
            assert!(n >= 99_000 && found.touched <= SAMPLE, "{} of {n}", found.touched);
            let lengths = found.lengths().unwrap();
            assert!(lengths.rows >= 100, "{lengths:?}");
            assert!((lengths.mean - 31.5).abs() < 3.0 && lengths.median.abs_diff(32) < 5, "{lengths:?}");
            let values = (ArrayShape::new(DType::Float32, vec![n]), vec![0; 4 * n as usize]);
            let found = profile("t256", &[view(&values, false)]).unwrap();
            assert_eq!(found.touched, n.min(SAMPLE));
        }
    }

    #[test]
    fn a_row_longer_than_the_bound_counts_as_data_where_it_was_not_looked_at() {
        let batch = tokens(&[1], 4 * SAMPLE);
        let found = profile("t", &[view(&batch, true)]).unwrap();
        assert_eq!((found.touched, found.lengths().unwrap().max), (SAMPLE, 3 * SAMPLE));
    }

    #[test]
    fn knows_zeros_and_non_finite_values_of_every_float_type() {
        let cases: [(DType, [&[u8]; 4]); 6] = [
            (
                DType::Float64,
                [
                    &1f64.to_le_bytes(),
                    &(-0f64).to_le_bytes(),
                    &f64::NAN.to_le_bytes(),
                    &f64::NEG_INFINITY.to_le_bytes(),
                ],
            ),
            (
                DType::Float32,
                [
                    &1f32.to_le_bytes(),
                    &(-0f32).to_le_bytes(),
                    &f32::NAN.to_le_bytes(),
                    &f32::NEG_INFINITY.to_le_bytes(),
                ],
            ),
            (DType::Bfloat16, [&[0x80, 0x3f], &[0, 0x80], &[0xc0, 0x7f], &[0x80, 0xff]]),
            (DType::Float16, [&[0, 0x3c], &[0, 0x80], &[0, 0x7e], &[0, 0xfc]]),
            (DType::Float8E5m2, [&[0x3c], &[0x80], &[0x7e], &[0xfc]]),
            // The one pattern that is no number, with either sign.
            (DType::Float8E4m3fn, [&[0x7e], &[0x80], &[0x7f], &[0xff]]),
        ];
        for (dtype, values) in cases {
            let batch = (ArrayShape::new(dtype, vec![4]), values.concat());
            let found = profile("v", &[view(&batch, false)]).unwrap();
            let expected = Content::Floats { looked_at: 4, zeros: 0.25, non_finite: 2 };
            assert_eq!((&found.tensors[0].content, found.non_finite()), (&expected, 2), "{dtype:?}");
        }
    }

    #[test]
    fn refuses_what_is_no_batch() {
        let (a, b) = (tokens(&[1, 2], 4), tokens(&[1], 4));
        let e = profile("t", &[view(&a, true), view(&b, true)]).unwrap_err();
        assert_eq!(e, ProfileError::Rows { tensor: "x".to_owned(), expected: 2, found: 1 });
        let short = TensorView { data: &a.1[1..], ..view(&a, true) };
        assert!(profile("t", &[short]).unwrap_err().to_string().contains("31 bytes, its shape s32[2,4] takes 32"));
        let scalar = (ArrayShape::scalar(DType::Float32), vec![0; 4]);
        assert!(matches!(profile("t", &[view(&scalar, false)]), Err(ProfileError::Scalar { .. })));
    }

    proptest! {
        #[test]
        fn lengths_are_those_of_a_slow_count(rows in prop::collection::vec(0u64..70, 0..20), extra in 0u64..40) {
            let room = rows.iter().copied().max().unwrap_or(0) + extra;
            let found = profile("t", &[view(&tokens(&rows, room), true)]).unwrap();
            let lengths = found.lengths().unwrap();
            let sum: u64 = rows.iter().sum();
            prop_assert_eq!(lengths.rows, rows.len() as u64);
            prop_assert_eq!(lengths.max, rows.iter().copied().max().unwrap_or(0));
            prop_assert_eq!(lengths.min, rows.iter().copied().min().unwrap_or(0));
            prop_assert!((lengths.mean * rows.len() as f64 - sum as f64).abs() < 1e-6);
        }

        #[test]
        fn every_row_is_visited_once(n in 0usize..3000) {
            let mut seen: Vec<usize> = evenly(n).collect();
            seen.sort_unstable();
            prop_assert_eq!(seen, (0..n).collect::<Vec<_>>());
        }
    }
}
