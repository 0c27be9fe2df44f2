//! The command line: every setting once, with its flag, its environment variable and its help.

mod cluster;
mod gateway;
mod model;
mod operate;
mod sampling;
mod values;

use std::{num::NonZeroUsize, path::PathBuf, time::Duration};

use anyhow::anyhow;
use clap::{Args, Parser, Subcommand};
use tercet_cluster::WorkerId;
use tercet_engine::{EngineOptions, HeadScreen, Speculation, model_file::Placement};
use tercet_kernels::Isa;
use tercet_telemetry::LogFormat;
use tercet_worker::{ModelSource, ModelSpec};

use self::values::{byte_size, duration, layers, served_model, stretch};
pub(crate) use self::{
    cluster::ClusterArgs,
    gateway::GatewayLimits,
    model::{ModelAction, ModelCommand, PullArgs, WorkerAddress},
    operate::{AdminAddress, AdminArgs, DrainArgs, StatusArgs, TopArgs},
    sampling::SamplingArgs,
    values::{ByteSize, Layers, ServedModel},
};
use crate::{failure::misconfigured, profile::Profile};

/// Where servers listen and clients connect unless told otherwise.
const DEFAULT_ADDRESS: &str = "127.0.0.1:7171";

/// Where gateways serve operators unless told otherwise, if they can.
pub(crate) const DEFAULT_ADMIN_ADDRESS: &str = "127.0.0.1:7173";

/// Serves ternary language models from CPUs, alone or as a cluster.
///
/// A setting is taken from its flag, else from its environment variable, else from the
/// configuration file, else from the profile, else from its default. `--print-config` shows every
/// setting of a command and where it comes from.
#[derive(Debug, Parser)]
#[command(name = "tercet", version, propagate_version = true, max_term_width = 100)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
    #[command(flatten)]
    pub(crate) log: LogArgs,
    #[command(flatten)]
    pub(crate) configuration: ConfigurationArgs,
}

/// Where settings come from besides flags and environment.
#[derive(Args, Debug)]
pub(crate) struct ConfigurationArgs {
    /// Configuration file, in TOML: the long flags without dashes are its keys, a table such as
    /// `[worker]` holds what is for one command alone [default: tercet/tercet.toml in
    /// $XDG_CONFIG_HOME or ~/.config, else /etc/tercet/tercet.toml]
    #[arg(long, env = "TERCET_CONFIG", value_name = "FILE", global = true)]
    pub(crate) config: Option<PathBuf>,
    /// Prints every setting of the command and where it comes from, as a configuration file, and
    /// does nothing else
    #[arg(long, global = true)]
    pub(crate) print_config: bool,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Serve models from this process alone: gateway and worker in one
    Serve(ServeArgs),
    /// Serve models, or some layers of one, as a part of a cluster
    Worker(WorkerArgs),
    /// Serve the models of a cluster's workers at one address
    Gateway(GatewayArgs),
    /// Continue a prompt and print the text as it comes
    Generate(GenerateArgs),
    /// Talk with a model, line by line
    Chat(ChatArgs),
    /// Show the workers and the models of a cluster
    Status(StatusArgs),
    /// Show them live, until q is pressed
    Top(TopArgs),
    /// Have a worker finish or hand over its streams, leave the cluster and stop
    Drain(DrainArgs),
    /// Measure prefill and decode speed of the engine
    Bench(BenchArgs),
    /// Look into model files, convert them, make them up; load and unload models of a server
    Model(ModelCommand),
    /// Print a script that completes commands and flags in a shell
    Completions {
        /// The shell; `source <(tercet completions bash)` turns completion on
        shell: clap_complete::Shell,
    },
}

/// Logs of every command.
#[derive(Args, Debug)]
pub(crate) struct LogArgs {
    /// What to log to stderr, such as `info` or `warn,tercet_gateway=debug` [default: info for
    /// servers, warn for all else]
    #[arg(long = "log", env = "TERCET_LOG", value_name = "FILTER", global = true)]
    pub(crate) filter: Option<String>,
    /// Form of the log lines: text or json
    #[arg(long = "log-format", env = "TERCET_LOG_FORMAT", value_name = "FORMAT", global = true)]
    #[arg(default_value_t)]
    pub(crate) format: LogFormat,
}

/// `tercet serve`.
#[derive(Args, Debug)]
pub(crate) struct ServeArgs {
    #[command(flatten)]
    pub(crate) model: ServedModelArgs,
    /// Address to serve gRPC at; port 0 takes a free one
    #[arg(long, env = "TERCET_LISTEN", value_name = "HOST:PORT", default_value = DEFAULT_ADDRESS)]
    pub(crate) listen: String,
    #[command(flatten)]
    pub(crate) engine: EngineArgs,
    #[command(flatten)]
    pub(crate) gateway: GatewayLimits,
    #[command(flatten)]
    pub(crate) admin: AdminArgs,
    #[command(flatten)]
    pub(crate) server: ServerArgs,
}

/// `tercet worker`.
#[derive(Args, Debug)]
pub(crate) struct WorkerArgs {
    #[command(flatten)]
    pub(crate) model: ServedModelArgs,
    /// Layers to hold, the end excluded, such as 0..15: several workers then serve one model as a
    /// pipeline [default: all]
    #[arg(long, env = "TERCET_LAYERS", value_name = "A..B", value_parser = layers)]
    pub(crate) layers: Option<Layers>,
    /// Address to serve gRPC at; port 0 takes a free one
    #[arg(long, env = "TERCET_LISTEN", value_name = "HOST:PORT", default_value = "127.0.0.1:7172")]
    pub(crate) listen: String,
    /// Address at which gateways and other workers reach this one [default: the bound address]
    #[arg(long, env = "TERCET_ADVERTISE", value_name = "HOST:PORT")]
    pub(crate) advertise: Option<String>,
    /// Name of this worker in the cluster; a worker of the same name started later replaces it
    /// [default: the advertised address]
    #[arg(long, env = "TERCET_WORKER_ID", value_name = "ID")]
    pub(crate) id: Option<WorkerId>,
    #[command(flatten)]
    pub(crate) cluster: ClusterArgs,
    #[command(flatten)]
    pub(crate) engine: EngineArgs,
    #[command(flatten)]
    pub(crate) server: ServerArgs,
}

/// `tercet gateway`.
#[derive(Args, Debug)]
pub(crate) struct GatewayArgs {
    /// Address to serve gRPC at; port 0 takes a free one
    #[arg(long, env = "TERCET_LISTEN", value_name = "HOST:PORT", default_value = DEFAULT_ADDRESS)]
    pub(crate) listen: String,
    /// Threads for connections. One is enough for tens of thousands of tokens per second; with
    /// more, each token costs more
    #[arg(long, env = "TERCET_IO_THREADS", value_name = "N", default_value = "1")]
    pub(crate) io_threads: NonZeroUsize,
    #[command(flatten)]
    pub(crate) cluster: ClusterArgs,
    #[command(flatten)]
    pub(crate) limits: GatewayLimits,
    #[command(flatten)]
    pub(crate) admin: AdminArgs,
    #[command(flatten)]
    pub(crate) server: ServerArgs,
}

/// The models of a server.
#[derive(Args, Debug)]
pub(crate) struct ServedModelArgs {
    /// GGUF file or Hugging Face folder to serve, with its name in requests [its own] and its part
    /// of --kv-memory; may be given several times, or once with ; between. Models without a part
    /// share equally what the others leave [default: the built-in demo model]
    #[arg(long, env = "TERCET_MODEL", value_name = "[NAME=]PATH[,kv=SIZE]")]
    #[arg(value_delimiter = ';', value_parser = served_model)]
    pub(crate) model: Vec<ServedModel>,
    /// Name of the only model in requests [default: the model's own]
    #[arg(long, env = "TERCET_NAME", value_name = "NAME")]
    pub(crate) name: Option<String>,
    /// Allows models to be loaded, from below this folder, and unloaded at run time, by whoever
    /// reaches the server: see `tercet model load`. One more equal part of --kv-memory is kept for
    /// them, and a model loaded takes what is asked for it, else all that no other has [default:
    /// not allowed]
    #[arg(long, env = "TERCET_MODEL_DIR", value_name = "DIR")]
    pub(crate) model_dir: Option<PathBuf>,
}

impl ServedModelArgs {
    /// Returns the models to serve.
    pub(crate) fn specs(&self) -> anyhow::Result<Vec<ModelSpec>> {
        let mut specs: Vec<_> = self
            .model
            .iter()
            .map(|model| ModelSpec {
                source: ModelSource::Path(model.path.clone()),
                name: model.name.clone(),
                kv_bytes: model.kv_memory.map(|size| size.0),
            })
            .collect();
        if specs.is_empty() {
            specs.push(ModelSpec::default());
        }
        if let Some(name) = &self.name {
            let [only] = specs.as_mut_slice() else {
                return Err(misconfigured(anyhow!(
                    "--name {name} names one model of {}: give each as --model NAME=PATH",
                    specs.len()
                )));
            };
            only.name = Some(name.clone());
        }
        Ok(specs)
    }
}

/// What computes.
#[derive(Args, Clone, Debug)]
pub(crate) struct ComputeArgs {
    /// Settings for this machine: threads, sequences, chunk, KV memory and context follow from its
    /// CPUs and memory, as far as they are not given otherwise [default: none]
    #[arg(long, env = "TERCET_PROFILE", value_name = "PROFILE")]
    pub(crate) profile: Option<Profile>,
    /// Compute threads, of all models together [default: the CPUs this process may use, by its
    /// affinity and the CPU quota of its control group]
    #[arg(long, env = "TERCET_THREADS", value_name = "N")]
    threads: Option<NonZeroUsize>,
    /// Instruction set: scalar, neon, dotprod, i8mm, avx2, avx-vnni or avx512 [default: the best this
    /// CPU has]
    #[arg(long, env = "TERCET_ISA", value_name = "ISA")]
    pub(crate) isa: Option<Isa>,
    /// Where ternary weights live: `auto`, in huge pages of the process where the system has them,
    /// which is fastest, or `mapped`, in the file, shared by all processes that read it
    #[arg(long, env = "TERCET_WEIGHTS", value_name = "PLACE", default_value = "auto")]
    pub(crate) weights: Placement,
    /// Most prompt tokens computed in one step, between the tokens of running sequences
    #[arg(long, env = "TERCET_PREFILL_CHUNK", value_name = "N", default_value = "128")]
    pub(crate) prefill_chunk: NonZeroUsize,
    /// Whether to keep a copy of the output matrix of 6 bits a weight, which rules out most rows
    /// for greedy choices and small top_k, so that decoding reads less; it changes no answer: auto
    /// for large matrices of 8 bits a weight or more, off, or on
    #[arg(long, env = "TERCET_HEAD_SCREEN", value_name = "WHEN", default_value = "auto")]
    pub(crate) head_screen: HeadScreen,
}

impl ComputeArgs {
    /// Returns the number of compute threads that was asked for, if any was.
    pub(crate) fn threads_given(&self) -> Option<usize> {
        self.threads.map(NonZeroUsize::get)
    }

    /// Returns the number of compute threads.
    ///
    /// The standard library takes the affinity mask and the quotas of control groups into account,
    /// of version 1 and 2 and of every group above, rounded down to whole CPUs.
    pub(crate) fn threads(&self) -> usize {
        let available = || std::thread::available_parallelism().unwrap_or(NonZeroUsize::MIN);
        self.threads.unwrap_or_else(available).get()
    }
}

/// How a model is computed, and how much of it at once.
#[derive(Args, Clone, Debug)]
pub(crate) struct EngineArgs {
    #[command(flatten)]
    compute: ComputeArgs,
    /// Most memory for the keys and values of sequences, of all models together
    #[arg(long, env = "TERCET_KV_MEMORY", value_name = "SIZE", value_parser = byte_size)]
    #[arg(default_value = "1GiB")]
    kv_memory: ByteSize,
    /// Most tokens of a sequence, prompt and completion together [default: the model's context]
    #[arg(long, env = "TERCET_CONTEXT", value_name = "N")]
    context: Option<NonZeroUsize>,
    /// Most sequences computed at once
    #[arg(long, env = "TERCET_MAX_SEQUENCES", value_name = "N", default_value = "32")]
    max_sequences: NonZeroUsize,
    /// Most sequences waiting for their turn; more are refused
    #[arg(long, env = "TERCET_MAX_WAITING", value_name = "N", default_value = "256")]
    max_waiting: NonZeroUsize,
    /// While prompts are read, how many times as long a step of the running sequences may take as
    /// without them, above 1: less keeps their tokens coming, more reads prompts faster
    #[arg(long, env = "TERCET_PREFILL_STRETCH", value_name = "X", value_parser = stretch)]
    #[arg(default_value = "1.6")]
    prefill_stretch: f64,
    /// Guess tokens of few running sequences ahead, and verify them together: off, or lookup, from
    /// where their latest tokens stood before; no answer changes
    #[arg(long, env = "TERCET_SPECULATE", value_name = "HOW", default_value = "off")]
    speculate: Speculate,
}

/// How tokens are guessed ahead.
#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum Speculate {
    Off,
    Lookup,
}

/// Most tokens guessed ahead of a sequence in a step.
const MOST_DRAFTS: usize = 7;

impl EngineArgs {
    /// Returns the options of an engine that holds `layers`, or all.
    pub(crate) fn options(&self, layers: Option<&Layers>) -> EngineOptions {
        EngineOptions {
            threads: self.compute.threads(),
            isa: self.compute.isa,
            layers: layers.map(|layers| layers.0.clone()),
            context: self.context.map(NonZeroUsize::get),
            kv_bytes: self.kv_memory.0,
            max_sequences: self.max_sequences.get(),
            max_waiting: self.max_waiting.get(),
            prefill_chunk: self.compute.prefill_chunk.get(),
            placement: self.compute.weights,
            prefill_stretch: self.prefill_stretch,
            head_screen: self.compute.head_screen,
            speculation: match self.speculate {
                Speculate::Off => Speculation::Off,
                Speculate::Lookup => Speculation::Lookup { tokens: MOST_DRAFTS },
            },
            ..EngineOptions::default()
        }
    }
}

impl EngineArgs {
    /// Logs what was decided, by the profile or otherwise.
    pub(crate) fn log(&self) {
        let options = self.options(None);
        tracing::info!(
            profile = %self.compute.profile.map_or("none", Profile::name),
            threads = options.threads,
            max_sequences = options.max_sequences,
            prefill_chunk = options.prefill_chunk,
            prefill_stretch = options.prefill_stretch,
            kv_bytes = options.kv_bytes,
            context = options.context,
            "settings of the engine"
        );
    }
}

/// What all servers have.
#[derive(Args, Debug)]
pub(crate) struct ServerArgs {
    /// At shutdown, how long streams get to finish before they are told to resume elsewhere
    #[arg(long, env = "TERCET_DRAIN_TIMEOUT", value_name = "TIME", value_parser = duration)]
    #[arg(default_value = "30s")]
    pub(crate) drain_timeout: Duration,
    /// Address to serve /metrics, /livez and /readyz at [default: nowhere]
    #[arg(long, env = "TERCET_METRICS_LISTEN", value_name = "HOST:PORT")]
    pub(crate) metrics_listen: Option<String>,
    /// OTLP/gRPC collector to send traces to, such as http://127.0.0.1:4317 [default: none]
    #[arg(long, env = "TERCET_OTLP_ENDPOINT", value_name = "URL")]
    pub(crate) otlp_endpoint: Option<String>,
}

/// Where a client command finds its model.
#[derive(Args, Debug)]
pub(crate) struct BackendArgs {
    /// Server to ask; without it the model is computed in this process. Given several times, or
    /// separated by commas: when one goes away, the text goes on at the next
    #[arg(long, env = "TERCET_CONNECT", value_name = "HOST:PORT", value_delimiter = ',')]
    pub(crate) connect: Vec<String>,
    /// With --connect, the name of a model there; without, a GGUF file or a Hugging Face folder
    /// [default: the server's only model; the built-in demo model]
    #[arg(long, env = "TERCET_MODEL", value_name = "NAME_OR_PATH")]
    pub(crate) model: Option<String>,
    #[command(flatten)]
    pub(crate) engine: ComputeArgs,
}

/// `tercet generate`.
#[derive(Args, Debug)]
pub(crate) struct GenerateArgs {
    #[command(flatten)]
    pub(crate) backend: BackendArgs,
    /// Text to continue
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub(crate) prompt: String,
    #[command(flatten)]
    pub(crate) sampling: SamplingArgs,
    /// Prints a line for each token instead of the text: its natural log-probability, its id, what
    /// it stands for, and the N likeliest tokens at its place
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(..=20))]
    pub(crate) logprobs: Option<u32>,
    /// Prints the prompt first, as the model got it
    #[arg(long)]
    pub(crate) echo: bool,
}

/// `tercet chat`.
#[derive(Args, Debug)]
pub(crate) struct ChatArgs {
    #[command(flatten)]
    pub(crate) backend: BackendArgs,
    /// What the model is told before the conversation
    #[arg(long, value_name = "TEXT")]
    pub(crate) system: Option<String>,
    #[command(flatten)]
    pub(crate) sampling: SamplingArgs,
    /// Tells after each answer how many tokens it took and how fast they came
    #[arg(long)]
    pub(crate) verbose: bool,
    /// Keeps no history of what is typed, which is otherwise in tercet/chat-history in
    /// $XDG_STATE_HOME or ~/.local/state
    #[arg(long)]
    pub(crate) no_history: bool,
}

/// `tercet bench`.
#[derive(Args, Debug)]
pub(crate) struct BenchArgs {
    /// GGUF file or Hugging Face folder to measure [default: the built-in demo model]
    #[arg(long, env = "TERCET_MODEL", value_name = "PATH")]
    pub(crate) model: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) engine: ComputeArgs,
    /// Tokens of each prompt. With several, each is measured with each --batch
    #[arg(long, value_name = "N,..", value_delimiter = ',', default_value = "128")]
    pub(crate) prompt: Vec<NonZeroUsize>,
    /// Tokens to generate after each prompt; 0 measures prefill alone
    #[arg(long, value_name = "N", default_value_t = 64)]
    pub(crate) generate: usize,
    /// Sequences at once, one number or several, and nothing else; without it one sequence is
    /// measured, then more of them and other numbers of threads, and settings for a server are
    /// recommended
    #[arg(long, value_name = "N,..", value_delimiter = ',')]
    pub(crate) batch: Vec<NonZeroUsize>,
    /// Measurements; one more before them warms up
    #[arg(long, value_name = "N", default_value = "3")]
    pub(crate) repeat: NonZeroUsize,
    /// Prints JSON
    ///
    /// Fields: model, format, shape, isa, threads, repeat, prefill_chunk; bytes_per_token (weights
    /// read by a step). points, one for each --prompt and --batch: prompt, generate, batch;
    /// prefill_tokens_per_second and decode_tokens_per_second (median, min, max; of all sequences
    /// together), first_token_seconds (of every sequence); step_bytes (weights, keys and values
    /// that a step in the middle reads), decode_bytes_per_second, bandwidth_share (of machine's
    /// median), screen (null without; bytes, tokens chosen with it, rows of the head computed for
    /// them, fallbacks to the whole head); stream_tokens (min and max of the sequences, over the
    /// measured time). The point measured first stands at the top as well. load: open_seconds,
    /// load_seconds,
    /// first_token_seconds (from the start to the first token of all, after the first --prompt
    /// or 512 tokens of it), weight_bytes,
    /// kv_bytes, resident_bytes, peak_resident_bytes (null where the system does not tell). machine:
    /// cpu, cpus, read_buffer_bytes, read_bytes_per_second (threads, median, min, max).
    /// recommendation (null with --batch): profile, threads, max_sequences, kv_bytes (for so many
    /// sequences of 1024 tokens), cpus, and measured, a list of threads, batch,
    /// decode_tokens_per_second, prefill_tokens_per_second (null but for a batch of 1).
    #[arg(long)]
    pub(crate) json: bool,
}

#[cfg(test)]
mod tests;
