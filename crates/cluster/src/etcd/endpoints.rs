//! Calls to whichever etcd member answers.

use std::{
    error::Error,
    fmt::Write as _,
    future::Future,
    hash::{BuildHasher as _, DefaultHasher, Hasher as _, RandomState},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use tokio::{sync::watch, time};
use tonic::{
    Code, Request, Status,
    metadata::MetadataValue,
    transport::{Channel, Endpoint},
};
use tracing::info;

use super::{
    EtcdOptions,
    access::{EtcdCredentials, EtcdTls, Pems},
    session::{Connection, Session, is_refusal},
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

/// Where the members of an etcd cluster are, and how they are talked to.
pub(super) struct Plan {
    endpoints: Vec<Endpoint>,
    tls: EtcdTls,
    /// What the files of `tls` held when they were read last.
    pems: Pems,
    user: Option<String>,
}

impl Plan {
    /// Checks the addresses and reads the files.
    pub(super) fn new(options: &EtcdOptions) -> Result<Self, ClusterError> {
        if options.endpoints.is_empty() {
            return Err(ClusterError::NoEndpoint);
        }
        let tls = options.tls.clone();
        let pems = tls.read()?;
        let parsed = options.endpoints.iter().map(|address| parse(address, tls.is_set()));
        let endpoints = parsed.collect::<Result<_, _>>()?;
        let user = options.credentials.as_ref().map(|credentials| credentials.user.clone());
        if let Some(credentials) = &options.credentials {
            // Read again for each use, but whoever misspelt the path is told now.
            credentials.password.read()?;
        }
        let plan = Self { endpoints, tls, pems, user };
        plan.secured(&plan.pems)?;
        Ok(plan)
    }

    /// Returns the endpoints as they are connected to.
    fn secured(&self, pems: &Pems) -> Result<Vec<Endpoint>, ClusterError> {
        let secured = |endpoint: &Endpoint| {
            let endpoint = endpoint.clone();
            if endpoint.uri().scheme_str() != Some("https") {
                return Ok(endpoint);
            }
            endpoint.tls_config(pems.config()).map_err(|error| ClusterError::Tls(reasons(&error)))
        };
        self.endpoints.iter().map(secured).collect()
    }

    /// Returns a channel to each member, connected when first used.
    fn channels(&self, pems: &Pems) -> Result<Vec<Channel>, ClusterError> {
        let connect = |endpoint: Endpoint| {
            endpoint
                .connect_timeout(CONNECT_TIMEOUT)
                .http2_keep_alive_interval(KEEPALIVE_INTERVAL)
                .keep_alive_timeout(KEEPALIVE_TIMEOUT)
                .keep_alive_while_idle(true)
                .connect_lazy()
        };
        Ok(self.secured(pems)?.into_iter().map(connect).collect())
    }
}

/// What a caller has to be allowed.
#[derive(Clone, Copy, Debug)]
pub(super) enum Right {
    /// To read the workers.
    Read,
    /// To store one.
    Write,
}

/// The members of an etcd cluster, one connection each, made when first used.
///
/// A channel balanced over all of them would keep sending calls to a dead one: tonic takes an
/// endpoint whose connection failed for ready.
pub(super) struct Endpoints {
    members: Vec<Member>,
    /// Index of the member that answered last.
    preferred: AtomicUsize,
    plan: Option<Mutex<Plan>>,
    user: Option<String>,
    /// What pauses are drawn from.
    dice: AtomicU64,
    /// Whether each [`Right`] was granted before.
    granted: [AtomicBool; 2],
    /// Why etcd refuses this process, while it never did otherwise.
    refused: watch::Sender<Option<Refusal>>,
}

/// Whom etcd refuses, and what it says.
#[derive(Clone, Debug)]
pub(super) struct Refusal {
    pub(super) user: Option<String>,
    pub(super) reason: String,
}

struct Member {
    channel: Mutex<Channel>,
    session: Session,
}

impl Endpoints {
    /// Must be called inside the runtime that will drive the connections.
    pub(super) fn new(plan: Plan, options: &EtcdOptions) -> Result<Self, ClusterError> {
        let channels = plan.channels(&plan.pems)?;
        let credentials = options.credentials.clone().map(Arc::new);
        let user = plan.user.clone();
        // Seeded at random; nothing here needs more than that.
        let dice = RandomState::new().build_hasher().finish();
        let endpoints = Self::over(channels, credentials, dice);
        Ok(Self { user, plan: Some(Mutex::new(plan)), ..endpoints })
    }

    /// Returns members at the ends of these channels.
    pub(super) fn over(
        channels: Vec<Channel>,
        credentials: Option<Arc<EtcdCredentials>>,
        dice: u64,
    ) -> Self {
        let members = channels.into_iter().map(|channel| Member {
            channel: Mutex::new(channel),
            session: Session::new(credentials.clone()),
        });
        Self {
            members: members.collect(),
            preferred: AtomicUsize::new(0),
            plan: None,
            user: None,
            dice: AtomicU64::new(dice),
            granted: Default::default(),
            refused: watch::Sender::new(None),
        }
    }

    /// Returns pauses of their own for one who tries again and again.
    pub(super) fn backoff(&self) -> Backoff {
        Backoff::new(self.dice.fetch_add(1, Ordering::Relaxed))
    }

    /// Calls the member that answered last, then the others in turn, until one gives an answer
    /// that is not its own trouble.
    pub(super) async fn call<T, F>(&self, call: impl Fn(Connection) -> F) -> Result<T, Status>
    where
        F: Future<Output = Result<T, Status>>,
    {
        let preferred = self.preferred.load(Ordering::Relaxed);
        let mut failure = None;
        for turn in 0..self.members.len() {
            let index = (preferred + turn) % self.members.len();
            match self.members[index].call(&call).await {
                Err(status) if is_trouble(status.code()) => failure = Some(status),
                answer => {
                    self.preferred.store(index, Ordering::Relaxed);
                    return answer;
                }
            }
        }
        self.renew_certificates();
        Err(failure.expect("there is at least one endpoint"))
    }

    /// Lets the next call begin with another member.
    pub(super) fn rotate(&self) {
        let next = (self.preferred.load(Ordering::Relaxed) + 1) % self.members.len();
        self.preferred.store(next, Ordering::Relaxed);
    }

    /// Connects anew with what the certificate files hold now, if that is something else.
    fn renew_certificates(&self) {
        let Some(plan) = &self.plan else { return };
        let mut plan = plan.lock().unwrap_or_else(PoisonError::into_inner);
        // Files that cannot be read, or do not fit, may be half written.
        let Some(pems) = plan.tls.read().ok().filter(|pems| *pems != plan.pems) else { return };
        let Ok(channels) = plan.channels(&pems) else { return };
        info!("the certificates for etcd have changed; connecting anew");
        plan.pems = pems;
        for (member, channel) in self.members.iter().zip(channels) {
            *member.channel.lock().unwrap_or_else(PoisonError::into_inner) = channel;
        }
    }

    /// Takes note of whether a call that needs a right went through.
    pub(super) fn judge<T>(&self, right: Right, answer: Result<&T, &Status>) {
        let granted = &self.granted[right as usize];
        match answer {
            Ok(_) => {
                granted.store(true, Ordering::Relaxed);
                self.refused.send_if_modified(|refused| refused.take().is_some());
            }
            Err(status) if is_refusal(status) && !granted.load(Ordering::Relaxed) => {
                let refusal =
                    Refusal { user: self.user.clone(), reason: status.message().to_owned() };
                self.refused.send_replace(Some(refusal));
            }
            Err(_) => {}
        }
    }

    /// Returns what tells whether etcd refuses this process.
    pub(super) fn refused(&self) -> watch::Receiver<Option<Refusal>> {
        self.refused.subscribe()
    }
}

impl Member {
    async fn call<T, F>(&self, call: &impl Fn(Connection) -> F) -> Result<T, Status>
    where
        F: Future<Output = Result<T, Status>>,
    {
        let channel = self.channel.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let attempt = |token| in_time(call(Connection::new(channel.clone(), token)));
        let token = in_time(self.session.other_than(None, &channel)).await?;
        match attempt(token.clone()).await {
            Err(status) if self.session.is_stale(&status) => {
                let token = in_time(self.session.other_than(Some(&token), &channel)).await?;
                attempt(token).await
            }
            answer => answer,
        }
    }
}

async fn in_time<T>(answer: impl Future<Output = Result<T, Status>>) -> Result<T, Status> {
    let late = |_| Err(Status::deadline_exceeded("etcd did not answer in time"));
    time::timeout(CALL_TIMEOUT, answer).await.unwrap_or_else(late)
}

/// Returns what an error and those that it comes from say.
pub(super) fn reasons(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(inner) = source {
        let inner_text = inner.to_string();
        if !text.contains(&inner_text) {
            write!(text, ": {inner_text}").expect("a string takes all that is written");
        }
        source = inner.source();
    }
    text
}

/// Returns what a member said, or what kept it from saying anything.
pub(super) fn told(status: &Status) -> String {
    let sources = status.source().map(|source| format!(": {}", reasons(source)));
    format!("{}{}", status.message(), sources.unwrap_or_default())
}

fn parse(address: &str, is_tls_set: bool) -> Result<Endpoint, ClusterError> {
    let expected = if is_tls_set {
        "with TLS settings, expected https://HOST:PORT"
    } else {
        "expected http://HOST:PORT or https://HOST:PORT"
    };
    let invalid = |reason: &str| ClusterError::InvalidEndpoint {
        endpoint: address.to_owned(),
        reason: reason.to_owned(),
    };
    let with_scheme = match address.split_once("://") {
        None if is_tls_set => format!("https://{address}"),
        None => format!("http://{address}"),
        Some(("https", _)) => address.to_owned(),
        Some(("http", _)) if !is_tls_set => address.to_owned(),
        Some(_) => return Err(invalid(expected)),
    };
    let endpoint =
        Endpoint::from_shared(with_scheme).map_err(|error| invalid(&error.to_string()))?;
    if endpoint.uri().host().is_none_or(str::is_empty) {
        return Err(invalid(expected));
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
    seed: u64,
    drawn: u64,
}

impl Backoff {
    const FIRST: Duration = Duration::from_millis(100);
    const LONGEST: Duration = Duration::from_secs(2);

    fn new(seed: u64) -> Self {
        Self { next: Self::FIRST, seed, drawn: 0 }
    }

    pub(super) fn reset(&mut self) {
        self.next = Self::FIRST;
    }

    /// Returns the next pause: doubling, with up to a half taken off at random so that many
    /// processes that lost the same member do not return at the same moment.
    pub(super) fn pause(&mut self) -> Duration {
        let pause = self.next;
        self.next = (pause * 2).min(Self::LONGEST);
        self.drawn += 1;
        let mut hasher = DefaultHasher::new();
        hasher.write_u64(self.seed);
        hasher.write_u64(self.drawn);
        let permille = hasher.finish() % 500;
        pause - pause.mul_f64(permille as f64 / 1000.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_checked_before_anything_starts() {
        let plan = |addresses: &[&str], tls: EtcdTls| {
            let addresses = addresses.iter().map(|&address| address.to_owned()).collect();
            let options = EtcdOptions::new(addresses, "test".parse().unwrap());
            Plan::new(&EtcdOptions { tls, ..options })
        };
        let named = || EtcdTls { server_name: Some("etcd".to_owned()), ..EtcdTls::default() };
        assert!(matches!(plan(&[], EtcdTls::default()), Err(ClusterError::NoEndpoint)));
        for wrong in ["", "ftp://a:1", "http://", "https://", "http://a b", "unix:///x"] {
            let refused = plan(&["http://127.0.0.1:2379", wrong], EtcdTls::default()).err();
            assert!(
                matches!(&refused, Some(ClusterError::InvalidEndpoint { endpoint, .. }) if endpoint == wrong),
                "{wrong}: {refused:?}"
            );
        }
        let plain = plan(&["http://a:2379"], named()).err();
        assert!(
            matches!(&plain, Some(ClusterError::InvalidEndpoint { .. })),
            "what should be secret would go out in the clear: {plain:?}"
        );
        for (tls, scheme) in [(EtcdTls::default(), "http"), (named(), "https")] {
            let good = plan(&["https://127.0.0.1:2379", "etcd-0.etcd:2379"], tls).unwrap();
            assert_eq!(good.endpoints[1].uri().host(), Some("etcd-0.etcd"));
            assert_eq!(good.endpoints[1].uri().scheme_str(), Some(scheme));
        }
    }

    #[test]
    fn pauses_grow_to_a_limit_and_start_over() {
        let mut backoff = Backoff::new(7);
        for step in 0..12 {
            let full = (Backoff::FIRST * 2_u32.pow(step)).min(Backoff::LONGEST);
            let pause = backoff.pause();
            assert!(pause <= full && pause >= full / 2, "{pause:?} of {full:?}");
        }
        backoff.reset();
        assert!(backoff.pause() <= Backoff::FIRST);
    }
}
