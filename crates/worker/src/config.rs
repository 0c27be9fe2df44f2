use std::{
    path::PathBuf,
    time::{Duration, SystemTime},
};

use tercet_cluster::WorkerId;
use tercet_engine::EngineOptions;

/// Where a worker's model is.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub enum ModelSource {
    /// In the program itself.
    #[default]
    BuiltIn,
    /// A GGUF file or a Hugging Face folder.
    Path(PathBuf),
}

/// A model to serve; by default the built-in one.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct ModelSpec {
    /// Where it is.
    pub source: ModelSource,
    /// Its name in requests; the model's own name if absent.
    pub name: Option<String>,
    /// Its part of the worker's KV memory, in bytes. Models that name none share equally what the
    /// others leave.
    pub kv_bytes: Option<usize>,
}

/// How a worker behaves. Plain data.
#[derive(Clone, Debug)]
pub struct Config {
    /// Name in the registry, unique in the cluster.
    pub id: WorkerId,
    /// Where others reach the worker, `host:port`.
    pub address: String,
    /// Tells incarnations of the same name apart; the later one has the greater epoch.
    pub epoch: u64,
    /// The models to serve.
    pub models: Vec<ModelSpec>,
    /// Folder below which models may be loaded at run time, and at whose presence models may be
    /// unloaded. Without it, neither is possible; with it, one more equal share of the KV memory
    /// stays unassigned at first.
    pub model_dir: Option<PathBuf>,
    /// How each is computed, except that they share the compute threads and the KV memory, and
    /// which layers are held. A range that begins after layer 0 makes the
    /// worker a later stage of a pipeline; one that ends early, the head of one.
    pub engine: EngineOptions,
    /// How long streams get to finish in a drain before they are told to resume elsewhere.
    pub drain_timeout: Duration,
    /// Pings idle and busy connections this often.
    pub keepalive_interval: Duration,
    /// Closes a connection whose ping is not answered within this time.
    pub keepalive_timeout: Duration,
}

impl Config {
    /// Returns the configuration of a worker that serves the built-in model on one thread, with
    /// the present time as its epoch.
    pub fn new(id: WorkerId, address: String) -> Self {
        Self {
            id,
            address,
            epoch: epoch_now(),
            models: vec![ModelSpec::default()],
            model_dir: None,
            engine: EngineOptions::default(),
            drain_timeout: Duration::from_secs(30),
            keepalive_interval: Duration::from_secs(10),
            keepalive_timeout: Duration::from_secs(5),
        }
    }
}

/// Returns the present time in microseconds: greater for everything that happens later, also in a
/// process started anew.
pub(crate) fn epoch_now() -> u64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_micros()).unwrap_or(u64::MAX)
}
