//! The loaded weights of a range of layers.

use std::ops::Range;
use std::sync::Arc;

use tercet_kernels::{DenseMatrix, TernaryMatrix};

use super::digest::PartDigests;
use super::error::ModelError;

/// The weights of one stage: a contiguous range of layers, with the embedding if it starts the
/// model and the head if it ends it.
#[derive(Debug)]
pub struct StageWeights {
    /// Layers held, half-open.
    pub range: Range<usize>,
    /// Token embedding, present if the range starts at layer 0.
    pub embed: Option<Arc<DenseMatrix>>,
    /// One entry per layer of `range`, in order.
    pub layers: Vec<LayerWeights>,
    /// Final norm and head, present if the range ends the model.
    pub head: Option<HeadWeights>,
    /// What a native file says of these parts, believed until it was verified.
    pub(crate) claims: Option<Claims>,
}

/// Digests that nobody has computed from the weights yet.
#[derive(Debug)]
pub(crate) struct Claims {
    /// The file that says so.
    pub(crate) file: String,
    /// Those of the parts held, in order.
    pub(crate) digests: PartDigests,
}

impl Claims {
    /// Compares the digests with those computed.
    pub(crate) fn check(&self, found: &[(String, [u8; 32])]) -> Result<(), ModelError> {
        let wrong = found.iter().zip(&self.digests).find(|(found, claimed)| found != claimed);
        let Some(((part, _), _)) = wrong else { return Ok(()) };
        Err(ModelError::Damaged {
            file: self.file.clone(),
            problem: format!("the digest of its part {part} is not the one it tells"),
        })
    }
}

/// The weights of one layer.
#[derive(Debug)]
pub struct LayerWeights {
    /// Norm before attention.
    pub attn_norm: Vec<f32>,
    /// Query projection.
    pub q: TernaryMatrix,
    /// Key projection.
    pub k: TernaryMatrix,
    /// Value projection.
    pub v: TernaryMatrix,
    /// Norm over each query head (Qwen 3).
    pub q_norm: Option<Vec<f32>>,
    /// Norm over each key head (Qwen 3).
    pub k_norm: Option<Vec<f32>>,
    /// Norm between attention and its output projection (BitNet).
    pub attn_sub_norm: Option<Vec<f32>>,
    /// Output projection of attention.
    pub o: TernaryMatrix,
    /// Norm before the MLP.
    pub ffn_norm: Vec<f32>,
    /// Gate projection of the MLP.
    pub gate: TernaryMatrix,
    /// Up projection of the MLP.
    pub up: TernaryMatrix,
    /// Norm between the gated product and the down projection (BitNet).
    pub ffn_sub_norm: Option<Vec<f32>>,
    /// Down projection of the MLP.
    pub down: TernaryMatrix,
}

/// The final norm and the output matrix.
#[derive(Debug)]
pub struct HeadWeights {
    /// Norm before the head.
    pub norm: Vec<f32>,
    /// One row per vocabulary entry; shared with the embedding in a tied model.
    pub matrix: Arc<DenseMatrix>,
}
