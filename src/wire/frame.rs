//! Frames: the one format in which anything travels between processes of a job.
//!
//! A frame is a 64-byte header and a chunk of a message. Numbers are little-endian.
//!
//! | bytes | field | |
//! |---|---|---|
//! | 0..4 | magic | `FSHD` |
//! | 4..6 | version | [`VERSION`] |
//! | 6 | kind | [`Kind`] |
//! | 7 | flags | zero |
//! | 8..16 | step | training step the message belongs to |
//! | 16..24 | revision | of the plan that produced it |
//! | 24..28 | incarnation | of the sender: a worker that came back has a higher one |
//! | 28..32 | microbatch | |
//! | 32..36 | channel | what it is: an index agreed on by both ends through the plan |
//! | 36..40 | chunk length | at most [`MAX_CHUNK`] |
//! | 40..48 | total | length of the whole message |
//! | 48..56 | offset | of this chunk |
//! | 56..60 | payload checksum | CRC-32 of the chunk |
//! | 60..64 | header checksum | CRC-32 of bytes 0..60 |
//!
//! Chunks of one message follow each other in order, without gaps; chunks of different messages may interleave.

use std::io::{self, Read, Write};

/// Version of the wire format; both ends must agree.
pub const VERSION: u16 = 1;
/// Bytes of a header.
pub const HEADER: usize = 64;
/// Longest chunk: bounds what a reader allocates before it has seen a checksum.
pub const MAX_CHUNK: usize = 1 << 20;

const MAGIC: [u8; 4] = *b"FSHD";

/// What a message is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
pub enum Kind {
    /// JSON: a [`super::control`] message.
    Control = 1,
    /// Rows of a batch tensor; channel: its index in the manifest.
    Batch = 2,
    /// A tensor between shards or replicas; channel: its index in the plan's wiring.
    Tensor = 3,
    /// A state tensor on its way to the parent or to its next owner; channel: its index in the model's state.
    State = 4,
    /// A param's summed gradient on its way to the param's next owner; channel: the param's index.
    Gradient = 5,
}

/// Everything about a chunk but its bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    pub kind: Kind,
    pub step: u64,
    pub revision: u64,
    pub incarnation: u32,
    pub microbatch: u32,
    pub channel: u32,
    pub total: u64,
    pub offset: u64,
    pub chunk: u32,
    pub checksum: u32,
}

/// What can be wrong with a frame. After any of these the connection is of no more use.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    #[error("the peer closed the connection")]
    Closed,
    #[error("the connection ended inside a frame, {missing} bytes short")]
    Truncated { missing: usize },
    #[error("not a Foreshard peer: a frame starts with {found:02x?}, expected {MAGIC:02x?}")]
    Magic { found: [u8; 4] },
    #[error("the peer speaks wire version {found}, this build speaks {VERSION}; run the same release on both ends")]
    Version { found: u16 },
    #[error("header checksum {found:08x}, computed {computed:08x}: the connection garbles data")]
    HeaderChecksum { found: u32, computed: u32 },
    #[error("payload checksum {found:08x}, computed {computed:08x}, channel {channel}: the connection garbles data")]
    PayloadChecksum { channel: u32, found: u32, computed: u32 },
    #[error("unknown kind of frame {0}")]
    UnknownKind(u8),
    #[error("frame flags {0:#04x}: not known to this version")]
    Flags(u8),
    #[error("a chunk of {found} bytes, the limit is {MAX_CHUNK}")]
    ChunkTooLong { found: u32 },
    #[error("a message of {found} bytes, the limit here is {limit}")]
    MessageTooLong { found: u64, limit: u64 },
    #[error("chunk {offset}+{chunk} of a message of {total} bytes, expected offset {expected}")]
    OutOfOrder { offset: u64, chunk: u32, total: u64, expected: u64 },
    #[error(transparent)]
    Io(#[from] io::Error),
}

impl Kind {
    fn from_u8(n: u8) -> Result<Self, FrameError> {
        [Self::Control, Self::Batch, Self::Tensor, Self::State, Self::Gradient]
            .into_iter()
            .find(|&k| k as u8 == n)
            .ok_or(FrameError::UnknownKind(n))
    }
}

impl Header {
    pub fn encode(&self) -> [u8; HEADER] {
        let mut b = [0u8; HEADER];
        b[0..4].copy_from_slice(&MAGIC);
        b[4..6].copy_from_slice(&VERSION.to_le_bytes());
        b[6] = self.kind as u8;
        b[8..16].copy_from_slice(&self.step.to_le_bytes());
        b[16..24].copy_from_slice(&self.revision.to_le_bytes());
        b[24..28].copy_from_slice(&self.incarnation.to_le_bytes());
        b[28..32].copy_from_slice(&self.microbatch.to_le_bytes());
        b[32..36].copy_from_slice(&self.channel.to_le_bytes());
        b[36..40].copy_from_slice(&self.chunk.to_le_bytes());
        b[40..48].copy_from_slice(&self.total.to_le_bytes());
        b[48..56].copy_from_slice(&self.offset.to_le_bytes());
        b[56..60].copy_from_slice(&self.checksum.to_le_bytes());
        let sum = crc32fast::hash(&b[..60]);
        b[60..64].copy_from_slice(&sum.to_le_bytes());
        b
    }

    /// Checks everything that can be checked without the payload.
    pub fn decode(b: &[u8; HEADER]) -> Result<Self, FrameError> {
        let u32_at = |i: usize| u32::from_le_bytes(b[i..i + 4].try_into().expect("4 bytes"));
        let u64_at = |i: usize| u64::from_le_bytes(b[i..i + 8].try_into().expect("8 bytes"));
        if b[0..4] != MAGIC {
            return Err(FrameError::Magic { found: b[0..4].try_into().expect("4 bytes") });
        }
        let version = u16::from_le_bytes([b[4], b[5]]);
        if version != VERSION {
            return Err(FrameError::Version { found: version });
        }
        let (found, computed) = (u32_at(60), crc32fast::hash(&b[..60]));
        if found != computed {
            return Err(FrameError::HeaderChecksum { found, computed });
        }
        if b[7] != 0 {
            return Err(FrameError::Flags(b[7]));
        }
        let header = Self {
            kind: Kind::from_u8(b[6])?,
            step: u64_at(8),
            revision: u64_at(16),
            incarnation: u32_at(24),
            microbatch: u32_at(28),
            channel: u32_at(32),
            chunk: u32_at(36),
            total: u64_at(40),
            offset: u64_at(48),
            checksum: u32_at(56),
        };
        if header.chunk as usize > MAX_CHUNK {
            return Err(FrameError::ChunkTooLong { found: header.chunk });
        }
        if header.offset.checked_add(header.chunk.into()).is_none_or(|end| end > header.total) {
            let Self { offset, chunk, total, .. } = header;
            return Err(FrameError::OutOfOrder { offset, chunk, total, expected: 0 });
        }
        Ok(header)
    }
}

/// Writes a message as frames. `header`'s lengths, offset and checksum are filled in.
pub fn write_message(out: &mut impl Write, mut header: Header, message: &[u8]) -> io::Result<()> {
    header.total = message.len() as u64;
    header.offset = 0;
    // An empty message is one frame without payload.
    let empty: [&[u8]; 1] = [&[]];
    let chunks: &mut dyn Iterator<Item = &[u8]> =
        if message.is_empty() { &mut empty.into_iter() } else { &mut message.chunks(MAX_CHUNK) };
    for chunk in chunks {
        header.chunk = chunk.len() as u32;
        header.checksum = crc32fast::hash(chunk);
        out.write_all(&header.encode())?;
        out.write_all(chunk)?;
        header.offset += chunk.len() as u64;
    }
    Ok(())
}

/// Reads the next header, or [`FrameError::Closed`] when the peer has closed between two frames.
pub fn read_header(input: &mut impl Read) -> Result<Header, FrameError> {
    let mut b = [0u8; HEADER];
    let n = read_full(input, &mut b)?;
    match n {
        0 => Err(FrameError::Closed),
        HEADER => Header::decode(&b),
        n => Err(FrameError::Truncated { missing: HEADER - n }),
    }
}

/// Reads and checks the chunk that follows `header`.
///
/// # Shapes
/// `chunk` is `header.chunk` bytes long.
pub fn read_chunk(input: &mut impl Read, header: &Header, chunk: &mut [u8]) -> Result<(), FrameError> {
    let n = read_full(input, chunk)?;
    if n < chunk.len() {
        return Err(FrameError::Truncated { missing: chunk.len() - n });
    }
    let computed = crc32fast::hash(chunk);
    if computed != header.checksum {
        return Err(FrameError::PayloadChecksum { channel: header.channel, found: header.checksum, computed });
    }
    Ok(())
}

/// Reads one whole message whose chunks do not interleave with others (a control connection).
pub fn read_message(input: &mut impl Read, limit: u64) -> Result<(Header, Vec<u8>), FrameError> {
    let first = read_header(input)?;
    if first.total > limit {
        return Err(FrameError::MessageTooLong { found: first.total, limit });
    }
    let mut header = first;
    let mut message = Vec::new();
    loop {
        let Header { offset, chunk, total, .. } = header;
        let expected = message.len() as u64;
        let same = (header.kind, header.channel, header.total) == (first.kind, first.channel, first.total);
        if offset != expected || !same || (chunk == 0 && total > 0) {
            return Err(FrameError::OutOfOrder { offset, chunk, total, expected });
        }
        message.resize(message.len() + chunk as usize, 0);
        read_chunk(input, &header, &mut message[offset as usize..])?;
        if message.len() as u64 == total {
            return Ok((first, message));
        }
        header = match read_header(input) {
            Err(FrameError::Closed) => {
                return Err(FrameError::Truncated { missing: (total as usize).saturating_sub(message.len()) });
            }
            other => other?,
        };
    }
}

/// Fills `buffer` as far as the input goes.
fn read_full(input: &mut impl Read, buffer: &mut [u8]) -> io::Result<usize> {
    let mut n = 0;
    while n < buffer.len() {
        match input.read(&mut buffer[n..]) {
            Ok(0) => break,
            Ok(k) => n += k,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(n)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn header(kind: Kind) -> Header {
        Header {
            kind,
            step: 7,
            revision: 3,
            incarnation: 1,
            microbatch: 2,
            channel: 5,
            total: 0,
            offset: 0,
            chunk: 0,
            checksum: 0,
        }
    }

    fn bytes_of(message: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        write_message(&mut out, header(Kind::Tensor), message).unwrap();
        out
    }

    #[test]
    fn carries_messages_of_any_length() {
        for len in [0, 1, MAX_CHUNK - 1, MAX_CHUNK, MAX_CHUNK + 1, 3 * MAX_CHUNK] {
            let message: Vec<u8> = (0..len).map(|i| (i * 31 % 251) as u8).collect();
            let wire = bytes_of(&message);
            let (h, got) = read_message(&mut &wire[..], 1 << 30).unwrap();
            assert_eq!((h.step, h.revision, h.incarnation, h.microbatch, h.channel), (7, 3, 1, 2, 5));
            assert!(got == message, "{len}");
        }
    }

    #[test]
    fn says_that_a_peer_is_not_one_of_ours() {
        let http = *b"GET / HTTP/1.1\r\nHost: x\r\n\r\n                                      ";
        let e = read_message(&mut &http[..], 1 << 20).unwrap_err();
        assert!(e.to_string().starts_with("not a Foreshard peer"), "{e}");
    }

    #[test]
    fn refuses_another_version_and_long_messages() {
        let mut wire = bytes_of(b"hello");
        wire[4] = 2;
        assert!(matches!(read_message(&mut &wire[..], 99), Err(FrameError::Version { found: 2 })));
        let wire = bytes_of(b"hello");
        assert!(matches!(read_message(&mut &wire[..], 4), Err(FrameError::MessageTooLong { found: 5, limit: 4 })));
    }

    proptest! {
        #[test]
        fn notices_every_flipped_bit(at in 0usize..HEADER + 100, bit in 0u8..8) {
            let mut wire = bytes_of(&[42; 100]);
            wire[at] ^= 1 << bit;
            prop_assert!(read_message(&mut &wire[..], 1 << 20).is_err());
        }

        #[test]
        fn notices_every_cut(at in 0usize..HEADER + 100) {
            let wire = bytes_of(&[42; 100]);
            prop_assert!(read_message(&mut &wire[..at], 1 << 20).is_err());
        }

        #[test]
        fn never_panics_on_garbage(garbage in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = read_message(&mut &garbage[..], 1 << 20);
        }
    }
}
