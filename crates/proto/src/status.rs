//! Why a call failed, in a form that programs read: google.rpc ErrorInfo in the gRPC status.
//!
//! [`Reason`] is the one place that says which code a failure has and whether the stream it ended
//! may go on elsewhere.

use std::collections::HashMap;
use std::error::Error;
use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt};

/// `ErrorInfo.domain` of every reason.
pub const DOMAIN: &str = "tercet";

/// Why a call failed.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
#[non_exhaustive]
pub enum Reason {
    /// The request is malformed; `BadRequest` names the fields. Fault: the caller.
    InvalidRequest,
    /// No model of this name is served here. Fault: the caller.
    ModelUnknown,
    /// The answering server has no room now; `RetryInfo` may say when. Nobody's fault.
    Overloaded,
    /// The worker still loads or warms up the model. Nobody's fault.
    Loading,
    /// The worker is about to stop and asks its callers to go on elsewhere. Nobody's fault.
    Draining,
    /// The gateway knows the model but has no worker that could serve it now. Nobody's fault.
    NoWorker,
    /// A later stage of the worker's pipeline is gone. Fault: the link or that stage.
    PipelineBroken,
    /// The worker cannot compute any more. Fault: the worker.
    WorkerFailed,
    /// The stream ended without saying how. Fault: the worker or the link to it.
    StreamBroken,
    /// A value that is not finite came up in the computation: it would anywhere. Fault: the model.
    NonFinite,
    /// Computing this very request fails, wherever it is tried. Fault: us.
    Poison,
    /// A frame or a claim of an older incarnation. Fault: the peer, which has been replaced.
    StaleEpoch,
    /// Two parties hold different models under one name. Fault: the deployment.
    ModelMismatch,
}

impl Reason {
    /// Every reason.
    pub const ALL: [Self; 13] = [
        Self::InvalidRequest,
        Self::ModelUnknown,
        Self::Overloaded,
        Self::Loading,
        Self::Draining,
        Self::NoWorker,
        Self::PipelineBroken,
        Self::WorkerFailed,
        Self::StreamBroken,
        Self::NonFinite,
        Self::Poison,
        Self::StaleEpoch,
        Self::ModelMismatch,
    ];

    /// Returns the name on the wire, `ErrorInfo.reason`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::InvalidRequest => "INVALID_REQUEST",
            Self::ModelUnknown => "MODEL_UNKNOWN",
            Self::Overloaded => "OVERLOADED",
            Self::Loading => "LOADING",
            Self::Draining => "DRAINING",
            Self::NoWorker => "NO_WORKER",
            Self::PipelineBroken => "PIPELINE_BROKEN",
            Self::WorkerFailed => "WORKER_FAILED",
            Self::StreamBroken => "STREAM_BROKEN",
            Self::NonFinite => "NON_FINITE",
            Self::Poison => "POISON",
            Self::StaleEpoch => "STALE_EPOCH",
            Self::ModelMismatch => "MODEL_MISMATCH",
        }
    }

    /// Returns the gRPC code of a status with this reason.
    pub fn code(self) -> Code {
        match self {
            Self::InvalidRequest => Code::InvalidArgument,
            Self::ModelUnknown => Code::NotFound,
            Self::Overloaded => Code::ResourceExhausted,
            Self::Loading
            | Self::Draining
            | Self::NoWorker
            | Self::PipelineBroken
            | Self::WorkerFailed
            | Self::StreamBroken => Code::Unavailable,
            Self::NonFinite | Self::Poison => Code::Internal,
            Self::StaleEpoch => Code::Aborted,
            Self::ModelMismatch => Code::FailedPrecondition,
        }
    }

    /// Returns whether the same request may succeed at another worker, resumed where it broke off.
    pub fn is_movable(self) -> bool {
        match self {
            Self::Overloaded
            | Self::Loading
            | Self::Draining
            | Self::NoWorker
            | Self::PipelineBroken
            | Self::WorkerFailed
            | Self::StreamBroken => true,
            Self::InvalidRequest
            | Self::ModelUnknown
            | Self::NonFinite
            | Self::Poison
            | Self::StaleEpoch
            | Self::ModelMismatch => false,
        }
    }

    /// Returns a status with this reason.
    pub fn status(self, message: impl Into<String>) -> Status {
        let mut details = ErrorDetails::new();
        self.describe(&mut details);
        Status::with_error_details(self.code(), message, details)
    }

    /// Returns a status with this reason that says when to come back.
    pub fn status_retry_after(self, message: impl Into<String>, delay: Duration) -> Status {
        let mut details = ErrorDetails::with_retry_info(Some(delay));
        self.describe(&mut details);
        Status::with_error_details(self.code(), message, details)
    }

    /// Returns the reason a status carries; `None` if it carries none known here.
    pub fn of(status: &Status) -> Option<Self> {
        if status.details().is_empty() {
            return None;
        }
        let info = status.get_details_error_info().filter(|info| info.domain == DOMAIN)?;
        info.reason.parse().ok()
    }

    /// Adds this reason to the details of a status.
    pub(crate) fn describe(self, details: &mut ErrorDetails) {
        details.set_error_info(self.as_str(), DOMAIN, HashMap::new());
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Reason {
    type Err = UnknownReason;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::ALL
            .into_iter()
            .find(|reason| reason.as_str() == text)
            .ok_or_else(|| UnknownReason(text.to_owned()))
    }
}

/// A reason of a newer version, or of none.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[error("unknown error reason {0:?}")]
pub struct UnknownReason(pub String);

/// Returns whether the request that ended with `status` may go on at another worker.
///
/// The peer's reason decides. Without one:
/// - an error of the transport (it has a source) means that the peer or the link broke;
/// - UNAVAILABLE says so itself;
/// - UNKNOWN is what a stream that ended without a status turns into: HTTP/2 resets with NO_ERROR
///   or CANCEL, as sent by a server that is torn down, look like a plain end of the stream;
/// - anything else was said by a live peer about this request.
///
/// An expired deadline looks like a transport error too: callers keep deadlines themselves.
pub fn is_movable(status: &Status) -> bool {
    match Reason::of(status) {
        Some(reason) => reason.is_movable(),
        None => is_broken(status),
    }
}

/// Returns whether `status` was made up on this side of the connection, or by nobody, because the
/// peer could not answer.
pub fn is_broken(status: &Status) -> bool {
    Reason::of(status).is_none()
        && (status.source().is_some() || matches!(status.code(), Code::Unavailable | Code::Unknown))
}

/// Returns whether `status` was made up because no connection could be made: the request has not
/// reached the peer.
pub fn is_unreachable(status: &Status) -> bool {
    let mut cause = status.source();
    while let Some(error) = cause {
        if error.is::<tonic::ConnectError>() {
            return true;
        }
        cause = error.source();
    }
    false
}

/// Returns when the server asks to be called again.
pub fn retry_after(status: &Status) -> Option<Duration> {
    status.get_details_retry_info()?.retry_delay
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    #[test]
    fn reasons_survive_the_wire() {
        for reason in Reason::ALL {
            let status = reason.status_retry_after("because", Duration::from_millis(1500));
            assert_eq!(Reason::of(&status), Some(reason));
            assert_eq!(status.code(), reason.code());
            assert_eq!(status.message(), "because");
            assert_eq!(retry_after(&status), Some(Duration::from_millis(1500)));
            assert_eq!(is_movable(&status), reason.is_movable());
            assert!(!is_broken(&status), "{reason} was said by a peer");
            assert_eq!(retry_after(&reason.status("because")), None);
        }
    }

    #[test]
    fn reasons_of_others_are_not_ours() {
        let mut details = ErrorDetails::new();
        details.set_error_info("DRAINING", "example.com", HashMap::new());
        let foreign = Status::with_error_details(Code::NotFound, "gone", details);
        assert_eq!(Reason::of(&foreign), None);
        assert!(!is_movable(&foreign));

        let newer = "TOO_WARM".parse::<Reason>();
        assert_eq!(newer, Err(UnknownReason("TOO_WARM".to_owned())));
    }

    #[test]
    fn broken_transports_are_movable() {
        let mut reset = Status::unknown("h2 protocol error");
        reset.set_source(Arc::new(std::io::Error::from(std::io::ErrorKind::ConnectionReset)));
        assert!(is_movable(&reset));
        let mut internal = Status::internal("h2 protocol error");
        internal.set_source(Arc::new(std::io::Error::from(std::io::ErrorKind::BrokenPipe)));
        assert!(is_movable(&internal));
        assert!(!is_unreachable(&internal));
        let refused = std::io::Error::from(std::io::ErrorKind::ConnectionRefused);
        let refused = Status::from_error(Box::new(tonic::ConnectError(Box::new(refused))));
        assert!(is_movable(&refused) && is_unreachable(&refused));
        assert!(is_movable(&Status::unavailable("connect error")));
        assert!(is_movable(&Status::unknown("missing grpc-status trailer")));
    }

    #[test]
    fn answers_of_a_live_peer_are_final() {
        for status in [
            Status::invalid_argument("no"),
            Status::internal("no"),
            Status::cancelled("no"),
            Status::deadline_exceeded("no"),
            Status::unimplemented("no"),
            Status::resource_exhausted("no"),
        ] {
            assert!(!is_movable(&status), "{status}");
        }
    }
}
