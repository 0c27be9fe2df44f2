use std::time::Duration;

use crate::{Aliases, Routing};

/// How a gateway behaves. Plain data; every field has a default.
#[derive(Clone, Debug)]
pub struct Config {
    /// Most generations and scorings in progress; more are refused with RESOURCE_EXHAUSTED.
    pub max_streams: u32,
    /// Most new requests that wait for a slot at a worker, per model; more are refused with
    /// RESOURCE_EXHAUSTED.
    pub max_queue: usize,
    /// Longest wait for a slot while workers answer and have no room.
    pub max_queue_wait: Duration,
    /// Names that lead to models.
    pub aliases: Aliases,
    /// How a worker is chosen for a request.
    pub routing: Routing,
    /// Most times one stream goes on at another worker. Workers that cannot be reached or have no
    /// room do not count: they cost time, which `worker_wait` bounds.
    pub max_moves: u32,
    /// Longest wait for a worker that answers and has the model, at its start and after each break.
    pub worker_wait: Duration,
    /// How long a worker is left alone after its first failure; doubles with each further one.
    pub ejection: Duration,
    /// Longest that a worker is left alone.
    pub max_ejection: Duration,
    /// How long a worker may say nothing before new requests avoid it and its streams go on
    /// elsewhere if they can. Reports of its load are asked for four times as often.
    pub suspect_after: Duration,
    /// How long a stream may bring nothing while its worker computes no step of the model, before
    /// it goes on elsewhere.
    pub progress_timeout: Duration,
    /// How many times slower than its peers a worker must be for new requests to avoid it.
    pub slow_factor: f64,
    /// Longest wait of a request that must run alone for a worker without others.
    pub alone_wait: Duration,
    /// When a drain begins: how long connections are still accepted, and requests refused, so that
    /// load balancers notice first.
    pub drain_delay: Duration,
    /// How long streams get to finish in a drain before they are told to resume elsewhere.
    pub drain_timeout: Duration,
    /// Pings idle and busy client connections this often.
    pub keepalive_interval: Duration,
    /// Closes a client connection whose ping is not answered within this time.
    pub keepalive_timeout: Duration,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            max_streams: 1024,
            max_queue: 256,
            max_queue_wait: Duration::from_secs(30),
            aliases: Aliases::default(),
            routing: Routing::default(),
            max_moves: 8,
            worker_wait: Duration::from_secs(10),
            ejection: Duration::from_millis(250),
            max_ejection: Duration::from_secs(5),
            suspect_after: Duration::from_secs(1),
            progress_timeout: Duration::from_secs(10),
            slow_factor: 4.0,
            alone_wait: Duration::from_secs(60),
            drain_delay: Duration::ZERO,
            drain_timeout: Duration::from_secs(30),
            keepalive_interval: Duration::from_secs(30),
            keepalive_timeout: Duration::from_secs(10),
        }
    }
}
