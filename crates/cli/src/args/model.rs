//! The command line of `tercet model`.

use std::{path::PathBuf, time::Duration};

use clap::{Args, Subcommand};
use tercet_engine::model_file::synth::{HeadType, Shape, TernaryType};

use super::{
    DEFAULT_ADDRESS,
    values::{ByteSize, byte_size, duration},
};
use crate::pull::Repository;

/// `tercet model`.
#[derive(Args, Debug)]
pub(crate) struct ModelCommand {
    #[command(subcommand)]
    pub(crate) action: ModelAction,
}

/// What to do with a model file.
#[derive(Debug, Subcommand)]
pub(crate) enum ModelAction {
    /// Tell what a model file holds
    Inspect {
        /// GGUF file or Hugging Face folder
        path: PathBuf,
        /// Prints JSON
        #[arg(long)]
        json: bool,
    },
    /// Read a model wholly, as a server does, and print its identity
    Verify {
        /// GGUF file or Hugging Face folder
        path: PathBuf,
    },
    /// Write a model as one GGUF file, as exactly as the storage allows
    Convert {
        /// GGUF file or Hugging Face folder to read
        source: PathBuf,
        /// GGUF file to write
        out: PathBuf,
        /// Name of the model in the file [default: the source's]
        #[arg(long, value_name = "NAME")]
        name: Option<String>,
        /// Storage of the ternary weights: i2_s, tq1_0, tq2_0 or q2_0 [default: i2_s for BitNet,
        /// q2_0 for models whose inputs are quantised in blocks, tq2_0 for others]
        #[arg(long = "type", value_name = "TYPE")]
        ternary: Option<TernaryType>,
        /// Writes what lets the model load fastest: the layout of memory, and digests that a server
        /// believes at first and checks while it answers
        #[arg(long)]
        native: bool,
        /// Folder of a LoRA adapter, as PEFT saves it, to merge into training weights first
        #[arg(long, value_name = "DIR")]
        lora: Option<PathBuf>,
        /// Replaces an existing file
        #[arg(long)]
        force: bool,
    },
    /// Make up a model of a known shape, to measure with
    Synth(SynthArgs),
    /// Download a model from a hub, going on where an earlier pull ended
    Pull(PullArgs),
    /// Load a model into a running server
    Load {
        /// GGUF file or Hugging Face folder, below the --model-dir of the server
        path: String,
        /// Name of the model in requests [default: the model's own]
        #[arg(long, value_name = "NAME")]
        name: Option<String>,
        /// Memory for the keys and values of its sequences [default: all that no other model has]
        #[arg(long, value_name = "SIZE", value_parser = byte_size)]
        kv: Option<ByteSize>,
        #[command(flatten)]
        server: WorkerAddress,
    },
    /// Unload a model of a running server
    Unload {
        /// Its name
        name: String,
        /// How long its streams get to finish before they are told to resume elsewhere [default:
        /// the server's --drain-timeout]
        #[arg(long, value_name = "TIME", value_parser = duration)]
        grace: Option<Duration>,
        #[command(flatten)]
        server: WorkerAddress,
    },
    /// List the models of a running server
    List {
        /// Prints JSON
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        server: WorkerAddress,
    },
}

/// A server whose models are looked after.
#[derive(Args, Debug)]
pub(crate) struct WorkerAddress {
    /// A `tercet serve` or a `tercet worker`; a gateway has no models of its own
    #[arg(long, env = "TERCET_CONNECT", value_name = "HOST:PORT", default_value = DEFAULT_ADDRESS)]
    pub(crate) connect: String,
}

/// `tercet model pull`.
#[derive(Args, Debug)]
pub(crate) struct PullArgs {
    /// Repository and revision, such as microsoft/bitnet-b1.58-2B-4T or owner/name@v1.0
    #[arg(value_name = "REPO[@REVISION]")]
    pub(crate) repository: Repository,
    /// Folder to write to [default: the repository's name, in the current folder]
    #[arg(long, value_name = "DIR")]
    pub(crate) out: Option<PathBuf>,
    /// Files to download instead of the usual ones, such as *TQ2_0.gguf; a * stands for any text
    #[arg(long, value_name = "PATTERN")]
    pub(crate) file: Option<String>,
    /// The hub. A token is taken from the environment variable HF_TOKEN, or from where the hub's
    /// own programs keep it, and sent to this hub alone
    #[arg(long, env = "HF_ENDPOINT", value_name = "URL", default_value = "https://huggingface.co")]
    pub(crate) endpoint: String,
}

/// `tercet model synth`.
#[derive(Args, Debug)]
pub(crate) struct SynthArgs {
    /// Shape: 125m, bitnet-2b-4t, llama3-8b, bonsai-4b, 70b, 100b or 405b. Any of its sizes can be
    /// replaced
    #[arg(long, value_name = "NAME")]
    pub(crate) shape: Shape,
    /// Width of the residual stream [default: the shape's]
    #[arg(long, value_name = "N")]
    pub(crate) hidden: Option<usize>,
    /// Width of the MLP [default: the shape's]
    #[arg(long, value_name = "N")]
    pub(crate) mlp: Option<usize>,
    /// Layers [default: the shape's]
    #[arg(long, value_name = "N")]
    pub(crate) layers: Option<usize>,
    /// Query heads [default: the shape's]
    #[arg(long, value_name = "N")]
    pub(crate) heads: Option<usize>,
    /// Key and value heads [default: the shape's]
    #[arg(long, value_name = "N")]
    pub(crate) kv_heads: Option<usize>,
    /// Width of a head [default: the shape's]
    #[arg(long, value_name = "N")]
    pub(crate) head_dim: Option<usize>,
    /// Tokens [default: the shape's]
    #[arg(long, value_name = "N")]
    pub(crate) vocab: Option<usize>,
    /// Positions [default: the shape's]
    #[arg(long, value_name = "N")]
    pub(crate) context: Option<usize>,
    /// Storage of the ternary weights: i2_s, tq1_0, tq2_0 or q2_0
    #[arg(long = "type", value_name = "TYPE", default_value_t = TernaryType::I2S)]
    pub(crate) ternary: TernaryType,
    /// Storage of embedding and head: f32, f16, bf16, q8_0, q6_k or q4_0
    #[arg(long, value_name = "TYPE", default_value_t = HeadType::F16)]
    pub(crate) head: HeadType,
    /// What the weights are drawn from
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(crate) seed: u64,
    /// GGUF file to write
    #[arg(long, value_name = "FILE")]
    pub(crate) out: PathBuf,
    /// Replaces an existing file
    #[arg(long)]
    pub(crate) force: bool,
}
