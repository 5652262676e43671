//! Mutations that keep lengths, checksums and brackets right, so that more inputs get past the first check.

use crate::graph::proto::{Fields, Value, Writer};
use crate::wire::frame::HEADER;

/// libFuzzer's own mutation, for what has no structure.
pub type Plain<'a> = dyn FnMut(&[u8]) -> Vec<u8> + 'a;

/// Numbers that limits are made of.
const NUMBERS: [u64; 12] = [0, 1, 2, 3, 13, 64, 255, 1 << 16, (1 << 31) - 1, 1 << 32, 1 << 63, u64::MAX];

/// Runs a structured mutation in place of libFuzzer's, three times out of four. Returns the new size.
pub fn run(
    data: &mut [u8],
    size: usize,
    max_size: usize,
    seed: u32,
    structured: impl Fn(&[u8], &mut Random, &mut Plain<'_>) -> Vec<u8>,
) -> usize {
    let mut random = Random(u64::from(seed));
    if random.below(4) == 0 {
        return libfuzzer_sys::fuzzer_mutate(data, size, max_size);
    }
    let mut plain = |bytes: &[u8]| {
        let mut buffer = bytes.to_vec();
        buffer.resize(bytes.len() + 16, 0);
        let (at, most) = (bytes.len(), buffer.len());
        let n = libfuzzer_sys::fuzzer_mutate(&mut buffer, at, most);
        buffer.truncate(n);
        buffer
    };
    let mut mutated = structured(&data[..size], &mut random, &mut plain);
    mutated.truncate(max_size);
    data[..mutated.len()].copy_from_slice(&mutated);
    mutated.len()
}

/// SplitMix64 (Steele, Lea, Flood, OOPSLA 2014).
pub struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
    fn below(&mut self, n: usize) -> usize {
        (self.next() % n.max(1) as u64) as usize
    }
    fn number(&mut self, near: u64) -> u64 {
        match self.below(3) {
            0 => NUMBERS[self.below(NUMBERS.len())],
            1 => near.wrapping_add(self.below(5) as u64).wrapping_sub(2),
            _ => self.below(400) as u64,
        }
    }
}

/// Changes one field somewhere inside a protobuf message.
pub fn protobuf(message: &[u8], random: &mut Random, plain: &mut Plain<'_>) -> Vec<u8> {
    inside(message, &[], random, plain)
}

/// `siblings`: messages of the same kind; fields are borrowed from them.
fn inside(message: &[u8], siblings: &[&[u8]], random: &mut Random, plain: &mut Plain<'_>) -> Vec<u8> {
    let fields: Vec<_> = Fields::new(message, "any").map_while(Result::ok).collect();
    if fields.is_empty() {
        return plain(message);
    }
    // The field at a random byte: large fields are chosen more often.
    let mut at = 0;
    let mut position = random.below(message.len());
    while position >= fields[at].2.len() && at + 1 < fields.len() {
        position -= fields[at].2.len();
        at += 1;
    }
    if random.below(8) == 0 {
        at = random.below(fields.len());
    }
    let (number, value, raw) = fields[at];
    let mut new = Writer::default();
    match value {
        Value::Bytes(inner) if is_message(inner) && random.below(8) > 0 => {
            let alike: Vec<&[u8]> = fields
                .iter()
                .filter_map(|(n, v, _)| match v {
                    Value::Bytes(b) if *n == number => Some(*b),
                    _ => None,
                })
                .collect();
            new.bytes(number, &inside(inner, &alike, random, plain));
        }
        _ => match (random.below(6), value) {
            (0, _) => {}
            (1, _) => {
                new.fields(raw);
                new.fields(fields[random.below(fields.len())].2);
            }
            (2 | 3, _) if !siblings.is_empty() => {
                let sibling = siblings[random.below(siblings.len())];
                let borrowed = Fields::new(sibling, "any").flatten().find(|(n, _, _)| *n == number);
                new.fields(borrowed.map_or(raw, |(_, _, raw)| raw));
            }
            (_, Value::Varint(n)) => new.number(number, random.number(n)),
            (4, Value::Bytes(packed)) if !is_message(packed) => {
                let mut numbers = Vec::new();
                let _ = value.numbers("any", &mut numbers);
                let i = random.below(numbers.len() + 1);
                match numbers.get_mut(i) {
                    Some(n) => *n = random.number(*n),
                    None => numbers.push(random.number(0)),
                }
                new.numbers(number, numbers);
            }
            (_, Value::Bytes(inner)) => new.bytes(number, &plain(inner)),
            _ => new.fields(&plain(raw)),
        },
    }
    let mut out = Writer::default();
    for (i, (_, _, raw)) in fields.iter().enumerate() {
        out.fields(if i == at { &new.0 } else { raw });
    }
    out.0
}

fn is_message(bytes: &[u8]) -> bool {
    !bytes.is_empty() && Fields::new(bytes, "any").all(|f| f.is_ok())
}

/// Changes one value somewhere inside JSON.
pub fn json(text: &[u8], random: &mut Random, plain: &mut Plain<'_>) -> Vec<u8> {
    let Ok(mut value) = serde_json::from_slice::<serde_json::Value>(text) else { return plain(text) };
    let donor = pick(&mut value.clone(), random).clone();
    let place = pick(&mut value, random);
    match (random.below(4), &mut *place) {
        (0, place) => *place = donor,
        (1, serde_json::Value::Object(map)) => {
            let key = map.keys().nth(random.below(map.len())).cloned();
            key.and_then(|k| map.remove(&k));
        }
        (1, serde_json::Value::Array(list)) if !list.is_empty() => drop(list.remove(random.below(list.len()))),
        (2, serde_json::Value::Array(list)) => list.push(donor),
        (_, serde_json::Value::Number(n)) => *place = random.number(n.as_u64().unwrap_or(0)).into(),
        (_, serde_json::Value::String(s)) => {
            *place = String::from_utf8_lossy(&plain(s.as_bytes())).into_owned().into();
        }
        (_, place) => *place = serde_json::Value::Null,
    }
    serde_json::to_vec(&value).unwrap_or_default()
}

/// A random value inside `value`.
fn pick<'a>(value: &'a mut serde_json::Value, random: &mut Random) -> &'a mut serde_json::Value {
    let n = match value {
        serde_json::Value::Object(map) => map.len(),
        serde_json::Value::Array(list) => list.len(),
        _ => 0,
    };
    if n == 0 || random.below(6) == 0 {
        return value;
    }
    let at = random.below(n);
    match value {
        serde_json::Value::Object(map) => pick(map.values_mut().nth(at).expect("below the length"), random),
        serde_json::Value::Array(list) => pick(&mut list[at], random),
        leaf => leaf,
    }
}

/// Changes the first message of a stream of frames, or its header, and makes the checksums right again.
pub fn frames(stream: &[u8], random: &mut Random, plain: &mut Plain<'_>) -> Vec<u8> {
    const CHUNK: std::ops::Range<usize> = 36..40;
    let Some((header, body)) = stream.split_at_checked(HEADER) else { return plain(stream) };
    let mut header = header.to_vec();
    let length = u32::from_le_bytes(header[CHUNK].try_into().expect("4 bytes")) as usize;
    let (mut message, rest) = body.split_at(length.min(body.len()));
    let new;
    if random.below(3) > 0 {
        new = json(message, random, plain);
        message = &new;
        let length = message.len() as u32;
        header[CHUNK].copy_from_slice(&length.to_le_bytes());
        // Total; the offset stays.
        header[40..48].copy_from_slice(&u64::from(length).to_le_bytes());
    } else {
        // Any field between the version and the checksums.
        let at = 6 + random.below(50);
        header[at] = random.next() as u8;
    }
    header[56..60].copy_from_slice(&crc32fast::hash(message).to_le_bytes());
    let sum = crc32fast::hash(&header[..60]);
    header[60..64].copy_from_slice(&sum.to_le_bytes());
    // Now and then the same message again, or another one behind it.
    let rest = if random.below(8) == 0 { stream } else { rest };
    [&header, message, rest].concat()
}
