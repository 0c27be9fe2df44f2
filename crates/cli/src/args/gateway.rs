//! What a gateway does with requests.

use std::time::Duration;

use clap::{
    Args,
    builder::{PossibleValuesParser, TypedValueParser as _},
};
use tercet_gateway::{Alias, Routing};

use super::values::duration;

/// What a gateway takes on, and where it sends it.
#[derive(Args, Debug)]
pub(crate) struct GatewayLimits {
    /// Most generations and scorings in progress; more are refused
    #[arg(long, env = "TERCET_MAX_STREAMS", value_name = "N", default_value_t = 1024)]
    #[arg(value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) max_streams: u32,
    /// Name that leads to a model, or to several that share its requests by weight; may be given
    /// several times, or once with ; between. In the configuration file, the table `aliases`
    #[arg(long, env = "TERCET_ALIAS", value_name = "NAME=MODEL[=WEIGHT][,...]")]
    #[arg(value_delimiter = ';', value_parser = str::parse::<Alias>)]
    pub(crate) alias: Vec<Alias>,
    /// How a worker is chosen: in turn, by the fewest outstanding tokens, by the better of two
    /// drawn, by the cached pages of the prompt, or by the session of the client (metadata
    /// tercet-session-id)
    #[arg(long, env = "TERCET_ROUTING", value_name = "POLICY", default_value_t)]
    #[arg(value_parser = PossibleValuesParser::new(Routing::ALL.map(Routing::as_str))
        .try_map(|name| name.parse::<Routing>()))]
    pub(crate) routing: Routing,
    /// Most requests that wait for a slot at a worker, per model; more are refused
    #[arg(long, env = "TERCET_MAX_QUEUE", value_name = "N", default_value_t = 256)]
    pub(crate) max_queue: usize,
    /// Longest wait for a slot while all workers are busy
    #[arg(long, env = "TERCET_MAX_QUEUE_WAIT", value_name = "TIME", value_parser = duration)]
    #[arg(default_value = "30s")]
    pub(crate) max_queue_wait: Duration,
    /// Longest wait for a worker that answers and has the model
    #[arg(long, env = "TERCET_WORKER_WAIT", value_name = "TIME", value_parser = duration)]
    #[arg(default_value = "10s")]
    pub(crate) worker_wait: Duration,
    /// How long a worker may say nothing before its streams go on elsewhere and new ones avoid it
    #[arg(long, env = "TERCET_SUSPECT_AFTER", value_name = "TIME", value_parser = duration)]
    #[arg(default_value = "1s")]
    pub(crate) suspect_after: Duration,
    /// How long a stream may bring nothing while its worker computes nothing, before it goes on
    /// elsewhere
    #[arg(long, env = "TERCET_PROGRESS_TIMEOUT", value_name = "TIME", value_parser = duration)]
    #[arg(default_value = "10s")]
    pub(crate) progress_timeout: Duration,
    /// At shutdown, how long connections are still accepted and requests refused, so that load
    /// balancers notice first
    #[arg(long, env = "TERCET_DRAIN_DELAY", value_name = "TIME", value_parser = duration)]
    #[arg(default_value = "0s")]
    pub(crate) drain_delay: Duration,
}
