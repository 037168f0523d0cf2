//! Why a session ended.

use nix::errno::Errno;

use super::connection::ConnectionError;

/// Why a session ended before the front end wanted it to.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ServeError {
    /// The connection failed.
    #[error(transparent)]
    Connection(#[from] ConnectionError),
    /// A request that is not known.
    #[error("request {request} is not known")]
    Unknown {
        /// Its number.
        request: u32,
    },
    /// A request that belongs to a feature which the front end did not accept, or was not offered.
    #[error("{request} belongs to a feature that was not negotiated")]
    NotNegotiated {
        /// Its name.
        request: &'static str,
    },
    /// A payload of the wrong size.
    #[error("{request}: {got} bytes of payload, expected {expected}")]
    Size {
        /// The request's name.
        request: &'static str,
        /// Bytes expected.
        expected: usize,
        /// Bytes that came.
        got: usize,
    },
    /// Missing or stray file descriptors.
    #[error("{request}: {got} file descriptors, expected {expected}")]
    Descriptors {
        /// The request's name.
        request: &'static str,
        /// How many were expected.
        expected: usize,
        /// How many came.
        got: usize,
    },
    /// A request that cannot be carried out.
    #[error("{request}: {reason}")]
    Refused {
        /// The request's name.
        request: &'static str,
        /// Why.
        reason: String,
    },
    /// Memory that is gone.
    #[error("the file of {what} became shorter: what was in it is lost")]
    Lost {
        /// What it held.
        what: String,
    },
    /// A queue that cannot be run.
    #[error("queue {index} cannot run: {reason}")]
    Queue {
        /// The queue.
        index: usize,
        /// Why.
        reason: String,
    },
    /// The host failed.
    #[error("{call}: {reason}")]
    System {
        /// The call.
        call: &'static str,
        /// What it said.
        reason: Errno,
    },
}
