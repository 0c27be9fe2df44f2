//! The tensors of a Hugging Face folder.

use tercet_kernels::DenseType;

use super::Quantization;
use super::shards::{ElementType, Entry, Shards};
use crate::model_file::config::ActivationScheme;
use crate::model_file::error::ModelError;
use crate::model_file::tensors::{Part, Role, Source, Storage, Tensor};

/// Mapped weights and how to read their ternary matrices.
#[derive(Debug)]
pub(crate) struct FolderModel {
    pub(crate) shards: Shards,
    pub(crate) quantization: Quantization,
    /// Names of the two norms that only BitNet has.
    pub(crate) sub_norms: [&'static str; 2],
}

impl FolderModel {
    fn entry(&self, name: &str) -> Result<&Entry, ModelError> {
        self.shards.get(name).ok_or_else(|| ModelError::MissingTensor {
            file: self.shards.label().to_owned(),
            tensor: name.to_owned(),
        })
    }

    fn name(&self, role: Role) -> String {
        match role {
            Role::Embed => "model.embed_tokens.weight".to_owned(),
            Role::OutputNorm => "model.norm.weight".to_owned(),
            Role::Head => "lm_head.weight".to_owned(),
            Role::Layer(layer, part) => {
                let name = match part {
                    Part::AttnSubNorm => self.sub_norms[0],
                    Part::FfnSubNorm => self.sub_norms[1],
                    other => other.folder_name(),
                };
                format!("model.layers.{layer}.{name}")
            }
        }
    }

    fn tensor(name: String, entry: &Entry, shape: (usize, usize), storage: Storage) -> Tensor {
        let (rows, cols) = shape;
        let activations = match storage {
            Storage::Groups(_) => ActivationScheme::Block64,
            _ => ActivationScheme::Token,
        };
        Tensor {
            name,
            file: entry.file.clone(),
            range: entry.range.clone(),
            rows,
            cols,
            storage,
            activations,
            paired_heads: None,
            factor: None,
            exact_scale: None,
            trusted: false,
        }
    }
}

/// Refuses a tensor whose shape is not the expected one.
fn check_shape(name: &str, entry: &Entry, expected: &[usize]) -> Result<(), ModelError> {
    if entry.shape == expected {
        return Ok(());
    }
    let problem = format!("has shape {:?}, the configuration asks for {expected:?}", entry.shape);
    Err(ModelError::tensor(entry.file.label(), name, problem))
}

/// Returns the dense type of floating-point elements.
pub(crate) fn dense_type(name: &str, entry: &Entry) -> Result<DenseType, ModelError> {
    match &entry.dtype {
        ElementType::F32 => Ok(DenseType::F32),
        ElementType::F16 => Ok(DenseType::F16),
        ElementType::BF16 => Ok(DenseType::Bf16),
        other => {
            let problem = format!("has type {other}, expected F32, F16 or BF16");
            Err(ModelError::tensor(entry.file.label(), name, problem))
        }
    }
}

impl Source for FolderModel {
    fn vector(&self, role: Role, length: usize) -> Result<Tensor, ModelError> {
        let name = self.name(role);
        let entry = self.entry(&name)?;
        check_shape(&name, entry, &[length])?;
        let storage = Storage::Dense(dense_type(&name, entry)?);
        Ok(Self::tensor(name, entry, (1, length), storage))
    }

    fn ternary(&self, role: Role, rows: usize, cols: usize) -> Result<Tensor, ModelError> {
        let name = self.name(role);
        let entry = self.entry(&name)?;
        let storage = match self.quantization {
            Quantization::Master => {
                check_shape(&name, entry, &[rows, cols])?;
                Storage::Master(dense_type(&name, entry)?)
            }
            Quantization::Groups => {
                check_shape(&name, entry, &[rows, cols])?;
                Storage::Groups(dense_type(&name, entry)?)
            }
            Quantization::Packed(rule) => {
                if entry.dtype != ElementType::U8 {
                    let problem = format!(
                        "has type {}, expected U8: quantization_config says the weights are packed",
                        entry.dtype
                    );
                    return Err(ModelError::tensor(entry.file.label(), &name, problem));
                }
                check_shape(&name, entry, &[rows.div_ceil(4), cols])?;
                let scale_name = format!("{name}_scale");
                let scale = self.entry(&scale_name)?;
                dense_type(&scale_name, scale)?;
                if !matches!(scale.shape.as_slice(), [] | [1]) {
                    check_shape(&scale_name, scale, &[1])?;
                }
                Storage::Packed { scale: scale.clone(), rule }
            }
        };
        Ok(Self::tensor(name, entry, (rows, cols), storage))
    }

    fn dense(&self, role: Role, rows: usize, cols: usize) -> Result<Tensor, ModelError> {
        let name = self.name(role);
        let entry = self.entry(&name)?;
        check_shape(&name, entry, &[rows, cols])?;
        let storage = Storage::Dense(dense_type(&name, entry)?);
        Ok(Self::tensor(name, entry, (rows, cols), storage))
    }
}
