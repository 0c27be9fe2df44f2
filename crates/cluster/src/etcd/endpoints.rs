//! Calls to whichever etcd member answers.

use std::{
    future::Future,
    hash::{BuildHasher as _, Hasher as _, RandomState},
    sync::atomic::{AtomicUsize, Ordering},
    time::Duration,
};

use tokio::time;
use tonic::{
    Code, Request, Status,
    metadata::MetadataValue,
    transport::{Channel, Endpoint},
};

use crate::ClusterError;

/// How long a TCP connection may take to come about.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// How often a connection is probed, used or not: a watch can be silent for hours, and a member
/// that vanished without closing its connections is found only by asking.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(5);
/// How long the answer to a probe may take.
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(3);
/// How long one member may take to answer one call.
pub(super) const CALL_TIMEOUT: Duration = Duration::from_secs(3);

/// The members of an etcd cluster, one connection each, made when first used.
///
/// A channel balanced over all of them would keep sending calls to a dead one: tonic takes an
/// endpoint whose connection failed for ready.
pub(super) struct Endpoints {
    channels: Vec<Channel>,
    /// Index of the member that answered last.
    preferred: AtomicUsize,
}

impl Endpoints {
    /// Reads the addresses of the members.
    pub(super) fn parse(addresses: &[String]) -> Result<Vec<Endpoint>, ClusterError> {
        if addresses.is_empty() {
            return Err(ClusterError::NoEndpoint);
        }
        addresses.iter().map(|address| parse(address)).collect()
    }

    /// Must be called inside the runtime that will drive the connections.
    pub(super) fn new(endpoints: &[Endpoint]) -> Self {
        let channels = endpoints
            .iter()
            .map(|endpoint| {
                endpoint
                    .clone()
                    .connect_timeout(CONNECT_TIMEOUT)
                    .http2_keep_alive_interval(KEEPALIVE_INTERVAL)
                    .keep_alive_timeout(KEEPALIVE_TIMEOUT)
                    .keep_alive_while_idle(true)
                    .connect_lazy()
            })
            .collect();
        Self { channels, preferred: AtomicUsize::new(0) }
    }

    /// Calls the member that answered last, then the others in turn, until one gives an answer
    /// that is not its own trouble.
    pub(super) async fn call<T, F>(&self, call: impl Fn(Channel) -> F) -> Result<T, Status>
    where
        F: Future<Output = Result<T, Status>>,
    {
        let preferred = self.preferred.load(Ordering::Relaxed);
        let mut failure = None;
        for turn in 0..self.channels.len() {
            let index = (preferred + turn) % self.channels.len();
            let answer = time::timeout(CALL_TIMEOUT, call(self.channels[index].clone()))
                .await
                .unwrap_or_else(|_| Err(Status::deadline_exceeded("etcd did not answer in time")));
            match answer {
                Err(status) if is_trouble(status.code()) => failure = Some(status),
                answer => {
                    self.preferred.store(index, Ordering::Relaxed);
                    return answer;
                }
            }
        }
        Err(failure.expect("there is at least one endpoint"))
    }

    /// Lets the next call begin with another member.
    pub(super) fn rotate(&self) {
        let next = (self.preferred.load(Ordering::Relaxed) + 1) % self.channels.len();
        self.preferred.store(next, Ordering::Relaxed);
    }
}

fn parse(address: &str) -> Result<Endpoint, ClusterError> {
    let invalid = |reason: &str| ClusterError::InvalidEndpoint {
        endpoint: address.to_owned(),
        reason: reason.to_owned(),
    };
    let with_scheme = match address.split_once("://") {
        None => format!("http://{address}"),
        Some(("http", _)) => address.to_owned(),
        Some(("https", _)) => {
            return Err(invalid("TLS to etcd is not supported, expected http://HOST:PORT"));
        }
        Some(_) => return Err(invalid("expected http://HOST:PORT")),
    };
    let endpoint =
        Endpoint::from_shared(with_scheme).map_err(|error| invalid(&error.to_string()))?;
    if endpoint.uri().host().is_none_or(str::is_empty) {
        return Err(invalid("expected http://HOST:PORT"));
    }
    Ok(endpoint)
}

/// Whether another member may answer better.
fn is_trouble(code: Code) -> bool {
    matches!(
        code,
        Code::Unavailable
            | Code::DeadlineExceeded
            | Code::Cancelled
            | Code::Unknown
            | Code::Internal
            | Code::ResourceExhausted
    )
}

/// Returns a request that a member cut off from the majority refuses instead of taking it into a
/// stream that stays silent.
pub(super) fn with_leader<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.metadata_mut().insert("hasleader", MetadataValue::from_static("true"));
    request
}

/// Growing pauses between attempts.
pub(super) struct Backoff {
    next: Duration,
}

impl Backoff {
    const FIRST: Duration = Duration::from_millis(100);
    const LONGEST: Duration = Duration::from_secs(2);

    pub(super) fn new() -> Self {
        Self { next: Self::FIRST }
    }

    pub(super) fn reset(&mut self) {
        self.next = Self::FIRST;
    }

    /// Returns the next pause: doubling, with up to a half taken off at random so that many
    /// processes that lost the same member do not return at the same moment.
    pub(super) fn pause(&mut self) -> Duration {
        let pause = self.next;
        self.next = (pause * 2).min(Self::LONGEST);
        // `RandomState` is seeded at random; nothing here needs more than that.
        let permille = RandomState::new().build_hasher().finish() % 500;
        pause - pause.mul_f64(permille as f64 / 1000.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_checked_before_anything_starts() {
        let parse = |addresses: &[&str]| {
            Endpoints::parse(&addresses.iter().map(|&a| a.to_owned()).collect::<Vec<_>>())
        };
        assert!(matches!(parse(&[]), Err(ClusterError::NoEndpoint)));
        for wrong in ["", "https://a:2379", "ftp://a:1", "http://", "http://a b", "unix:///x"] {
            let refused = parse(&["http://127.0.0.1:2379", wrong]);
            assert!(
                matches!(&refused, Err(ClusterError::InvalidEndpoint { endpoint, .. }) if endpoint == wrong),
                "{wrong}: {refused:?}"
            );
        }
        let good = parse(&["http://127.0.0.1:2379", "etcd-0.etcd:2379"]).unwrap();
        assert_eq!(good[1].uri().host(), Some("etcd-0.etcd"));
    }

    #[test]
    fn pauses_grow_to_a_limit_and_start_over() {
        let mut backoff = Backoff::new();
        for step in 0..12 {
            let full = (Backoff::FIRST * 2_u32.pow(step)).min(Backoff::LONGEST);
            let pause = backoff.pause();
            assert!(pause <= full && pause >= full / 2, "{pause:?} of {full:?}");
        }
        backoff.reset();
        assert!(backoff.pause() <= Backoff::FIRST);
    }
}
