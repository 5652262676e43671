//! A worker's side of the connection to the parent, and what both sides share.

use std::io::Write;
use std::sync::Mutex;

use super::RuntimeError;
use super::link::Stamp;
use crate::tls::Writer;
use crate::wire::control::ToParent;
use crate::wire::frame::{Header, Kind, write_message};

/// The sending half; any thread may speak.
pub struct Control {
    stream: Mutex<Writer>,
}

impl Control {
    pub fn new(stream: Writer) -> Self {
        Self { stream: Mutex::new(stream) }
    }

    pub fn send(&self, message: &ToParent) -> Result<(), RuntimeError> {
        let json = serde_json::to_vec(message).expect("control messages are plain data");
        self.write(Stamp::NONE.header(Kind::Control, 0, 0, 0), &json)
    }

    pub fn write(&self, header: Header, message: &[u8]) -> Result<(), RuntimeError> {
        let mut stream = self.stream.lock().unwrap_or_else(|p| p.into_inner());
        write_message(&mut *stream, header, message)
            .and_then(|()| stream.flush())
            .map_err(|e| RuntimeError::Link { whom: "the parent".to_owned(), source: e.into() })
    }
}

/// A control message, or what is wrong with it.
pub fn parse<T: serde::de::DeserializeOwned>(kind: Kind, message: &[u8], from: &str) -> Result<T, RuntimeError> {
    let protocol = |message: String| RuntimeError::Protocol { whom: from.to_owned(), message };
    if kind != Kind::Control {
        return Err(protocol(format!("expected a control message, found a frame of kind {kind:?}")));
    }
    serde_json::from_slice(message).map_err(|e| protocol(format!("not a control message of this version: {e}")))
}
