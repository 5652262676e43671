//! The operator: looks at a job and the cluster, decides, and makes the cluster so.
//!
//! ```text
//! watch    jobs, their pods and plans, nodes, all pods       [`reconcile`]
//! listen   to the heads of jobs that run                     [`heads`]
//! observe  Kubernetes objects -> [`Snapshot`]                [`observe`], [`inventory`]
//! decide   Snapshot -> Desired, pure                         [`decide`], [`place`]
//! render   plan -> objects, pure                             [`render`]
//! apply    server-side; then status and events               [`reconcile`]
//! ```
//! The operator chooses nodes and devices. The graph is cut by the head of the job, which has the bundle, over the
//! devices it was given (docs/decisions/0012). With the operator gone, training goes on: everything it knows stands in
//! the API server and in the head's report. `operator` knows nothing of graphs, sockets of workers or plug-ins.

mod changes;
pub mod decide;
pub mod heads;
pub mod inventory;
mod key;
mod lease;
mod ledger;
pub mod observe;
pub mod place;
mod pods;
mod profiles;
mod recent;
pub mod reconcile;
pub mod render;
mod serve;
#[cfg(test)]
mod tests;
mod unreadable;

pub use decide::{Desired, Snapshot, decide};

use crate::tls::TlsError;

/// What stands between the operator and its work.
#[derive(Debug, thiserror::Error)]
pub enum OperatorError {
    #[error("cannot reach the API server")]
    Connect(#[source] kube::Error),
    #[error("cannot {verb} {what}")]
    Api { verb: &'static str, what: String, source: kube::Error },
    #[error("{0} is there already, and is not of this job; it is made when that one is gone")]
    Taken(String),
    #[error("{0} has no {1}")]
    Incomplete(String, &'static str),
    #[error("a look at the job was given up after {0} s: something does not answer")]
    NoAnswer(u64),
    #[error("the lease could not be renewed: another operator may work now")]
    LeaseLost,
    #[error(transparent)]
    Tls(#[from] TlsError),
    #[error("cannot listen on {address}")]
    Listen { address: std::net::SocketAddr, source: std::io::Error },
}

/// What another try is worth.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// The API server is busy or away: soon.
    Retry,
    /// Something else has to change first: later.
    Wait,
}

impl OperatorError {
    pub fn class(&self) -> Class {
        match self {
            OperatorError::Api { source: kube::Error::Api(status), .. } if matches!(status.code, 403 | 422) => {
                Class::Wait
            }
            _ => Class::Retry,
        }
    }
}
