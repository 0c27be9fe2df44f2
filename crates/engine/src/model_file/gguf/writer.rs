//! Writer of GGUF version 3 files.

use super::value::kinds;
use super::{DEFAULT_ALIGNMENT, MAGIC, VERSION, types};
use crate::model_file::error::ModelError;
use crate::model_file::output::OutputFile;

/// Metadata entries in the order they are added.
#[derive(Debug, Default)]
pub(crate) struct Metadata {
    bytes: Vec<u8>,
    count: u64,
}

impl Metadata {
    fn entry(&mut self, key: &str, kind: u32) {
        self.count += 1;
        push_string(&mut self.bytes, key);
        self.bytes.extend(kind.to_le_bytes());
    }

    fn array(&mut self, key: &str, kind: u32, length: usize) {
        self.entry(key, kinds::ARRAY);
        self.bytes.extend(kind.to_le_bytes());
        self.bytes.extend((length as u64).to_le_bytes());
    }

    /// Adds text.
    pub(crate) fn string(&mut self, key: &str, value: &str) {
        self.entry(key, kinds::STRING);
        push_string(&mut self.bytes, value);
    }

    /// Adds a number.
    pub(crate) fn u32(&mut self, key: &str, value: u32) {
        self.entry(key, kinds::U32);
        self.bytes.extend(value.to_le_bytes());
    }

    /// Adds a number.
    pub(crate) fn i32(&mut self, key: &str, value: i32) {
        self.entry(key, kinds::I32);
        self.bytes.extend(value.to_le_bytes());
    }

    /// Adds a number.
    pub(crate) fn f32(&mut self, key: &str, value: f32) {
        self.entry(key, kinds::F32);
        self.bytes.extend(value.to_le_bytes());
    }

    /// Adds a truth value.
    pub(crate) fn bool(&mut self, key: &str, value: bool) {
        self.entry(key, kinds::BOOL);
        self.bytes.push(value.into());
    }

    /// Adds texts.
    pub(crate) fn strings(&mut self, key: &str, values: &[String]) {
        self.array(key, kinds::STRING, values.len());
        for value in values {
            push_string(&mut self.bytes, value);
        }
    }

    /// Adds numbers.
    pub(crate) fn u32s(&mut self, key: &str, values: &[u32]) {
        self.array(key, kinds::U32, values.len());
        self.bytes.extend(values.iter().flat_map(|value| value.to_le_bytes()));
    }

    /// Adds numbers.
    pub(crate) fn i32s(&mut self, key: &str, values: &[i32]) {
        self.array(key, kinds::I32, values.len());
        self.bytes.extend(values.iter().flat_map(|value| value.to_le_bytes()));
    }

    /// Adds numbers.
    pub(crate) fn f32s(&mut self, key: &str, values: &[f32]) {
        self.array(key, kinds::F32, values.len());
        self.bytes.extend(values.iter().flat_map(|value| value.to_le_bytes()));
    }
}

fn push_string(bytes: &mut Vec<u8>, text: &str) {
    bytes.extend((text.len() as u64).to_le_bytes());
    bytes.extend(text.as_bytes());
}

/// A tensor to be written.
#[derive(Clone, Debug)]
pub(crate) struct TensorPlan {
    /// Its name.
    pub(crate) name: String,
    /// Outputs, `None` for a vector.
    pub(crate) rows: Option<usize>,
    /// Inputs, or a vector's length.
    pub(crate) cols: usize,
    /// Type number.
    pub(crate) kind: u32,
}

impl TensorPlan {
    /// Returns the bytes the tensor takes.
    fn size(&self) -> Result<u64, ModelError> {
        let (rows, cols) = (self.rows.unwrap_or(1) as u64, self.cols as u64);
        let total = rows.checked_mul(cols);
        total.and_then(|total| types::size(self.kind, cols, total)).ok_or_else(|| {
            ModelError::Unwritable {
                what: format!("tensor `{}`", self.name),
                problem: format!(
                    "{rows} rows of {cols} do not fit {}, whose blocks need a multiple of {}",
                    types::name(self.kind),
                    match self.kind {
                        types::I2_S => "128 elements in all",
                        types::Q8_0 => "32 a row",
                        types::Q4_0 => "32 a row",
                        types::Q2_0 => "64 a row",
                        _ => "256 a row",
                    }
                ),
            }
        })
    }
}

/// A header with the place of every tensor.
#[derive(Debug)]
pub(crate) struct Layout {
    header: Vec<u8>,
    /// Where the metadata ends.
    metadata_end: u64,
    /// Bytes of each tensor, without padding.
    sizes: Vec<u64>,
    total: u64,
}

impl Layout {
    /// Lays out the file.
    pub(crate) fn new(metadata: &Metadata, tensors: &[TensorPlan]) -> Result<Self, ModelError> {
        let mut header = Vec::with_capacity(metadata.bytes.len() + tensors.len() * 64);
        header.extend(MAGIC);
        header.extend(VERSION.to_le_bytes());
        header.extend((tensors.len() as u64).to_le_bytes());
        header.extend(metadata.count.to_le_bytes());
        header.extend(&metadata.bytes);
        let metadata_end = header.len() as u64;
        let mut sizes = Vec::with_capacity(tensors.len());
        let mut offset = 0_u64;
        for tensor in tensors {
            let size = tensor.size()?;
            push_string(&mut header, &tensor.name);
            let dimensions: u32 = if tensor.rows.is_some() { 2 } else { 1 };
            header.extend(dimensions.to_le_bytes());
            header.extend((tensor.cols as u64).to_le_bytes());
            header.extend(tensor.rows.iter().flat_map(|rows| (*rows as u64).to_le_bytes()));
            header.extend(tensor.kind.to_le_bytes());
            header.extend(offset.to_le_bytes());
            sizes.push(size);
            offset += size.next_multiple_of(DEFAULT_ALIGNMENT);
        }
        while !(header.len() as u64).is_multiple_of(DEFAULT_ALIGNMENT) {
            header.push(0);
        }
        let total = header.len() as u64 + offset;
        Ok(Self { header, metadata_end, sizes, total })
    }

    /// Returns the size of the file.
    pub(crate) fn total(&self) -> u64 {
        self.total
    }

    /// Writes header and tensors; `fill` writes the bytes of the tensor with the given index.
    pub(crate) fn write(
        &self,
        mut out: OutputFile<'_>,
        fill: impl FnMut(usize, &mut OutputFile<'_>) -> Result<(), ModelError>,
    ) -> Result<u64, ModelError> {
        self.fill(&mut out, fill)?;
        out.commit()
    }

    /// As [`Self::write`], where the last metadata entry, an array of numbers, is known only when all
    /// tensors are: `fill` appends its elements, and may append none.
    pub(crate) fn write_with_last(
        &self,
        mut out: OutputFile<'_>,
        mut fill: impl FnMut(usize, &mut OutputFile<'_>, &mut Vec<f32>) -> Result<(), ModelError>,
    ) -> Result<u64, ModelError> {
        let mut last = Vec::new();
        self.fill(&mut out, |index, out| fill(index, out, &mut last))?;
        let bytes: Vec<u8> = last.iter().flat_map(|value| value.to_le_bytes()).collect();
        out.overwrite(self.metadata_end - bytes.len() as u64, &bytes)?;
        out.commit()
    }

    fn fill(
        &self,
        out: &mut OutputFile<'_>,
        mut fill: impl FnMut(usize, &mut OutputFile<'_>) -> Result<(), ModelError>,
    ) -> Result<(), ModelError> {
        out.write(&self.header)?;
        for (index, size) in self.sizes.iter().enumerate() {
            let start = out.written();
            fill(index, out)?;
            debug_assert_eq!(out.written() - start, *size, "tensor {index} has its planned size");
            let padded = start + size.next_multiple_of(DEFAULT_ALIGNMENT);
            let padding = padded - out.written();
            out.write(&vec![0; usize::try_from(padding).unwrap_or_default()])?;
        }
        Ok(())
    }
}
