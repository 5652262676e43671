//! How a head is asked over gRPC (`proto/foreshard/v1/head.proto`, docs/decisions/0021): both ends of the connection, and
//! reports as messages.
//!
//! # Guarantees
//! Who is asked shows the certificate of the head, who asks that of the operator and the job's token; without an
//! [`Identity`](crate::tls::Identity) the token alone counts. Messages, calls, connections and the time they take are bounded
//! on both ends.
//!
//! # Assumptions
//! Both ends may be of different versions. What one does not know is left out, what is missing is nothing.
//!
//! `rpc` knows nothing of Kubernetes, nor of how a job is run.

mod ask;
mod report;
mod serve;
#[cfg(test)]
mod tests;

/// Messages and both ends of the service, made from the `.proto` by `make proto`.
#[allow(clippy::all, rust_2018_idioms)]
pub mod v1 {
    include!("foreshard.v1.rs");
}

pub use ask::{AskError, Head, Line, Reports};
pub use serve::serve;

/// The protocol that both ends agree on while they shake hands (ALPN).
const HTTP2: &[u8] = b"h2";
/// What carries the job's token: `authorization: Bearer TOKEN`.
const AUTHORIZATION: &str = "authorization";
/// Longest report: one line per shard and worker.
const MAX_REPORT: usize = 4 << 20;
/// Longest request, and longest headers of one.
const MAX_REQUEST: usize = 16 << 10;
/// How often a quiet connection is tried, and how long the other end may take to answer that.
const ALIVE: std::time::Duration = std::time::Duration::from_secs(10);
