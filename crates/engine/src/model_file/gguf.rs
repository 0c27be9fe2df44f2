//! Reader of GGUF version 3 headers: <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>.
//!
//! ```text
//! "GGUF" | version u32 | tensor count u64 | metadata count u64
//! metadata: key string | type u32 | value        string: length u64, UTF-8 bytes
//! tensors:  name string | dimension count u32 | dimensions u64.. | type u32 | offset u64
//! padding to general.alignment (32 unless told), then tensor data
//! ```
//!
//! Dimensions are innermost first. Every count is bounded by the bytes left in the file before
//! anything is allocated for it, so memory use never exceeds a small multiple of the header.

pub(crate) mod model;
pub(crate) mod rope;
pub(crate) mod value;
pub(crate) mod writer;

use std::collections::BTreeMap;
use std::ops::Range;

use super::error::ModelError;
use super::mapping::FileBytes;
use value::{Cursor, Value};

/// First four bytes of every GGUF file.
pub(crate) const MAGIC: [u8; 4] = *b"GGUF";
/// The version read and written.
pub(crate) const VERSION: u32 = 3;
/// Alignment of tensor data unless `general.alignment` says otherwise.
pub(crate) const DEFAULT_ALIGNMENT: u64 = 32;
/// The fewest bytes a metadata entry can take: empty key, type, one byte of value.
const MIN_ENTRY: u64 = 8 + 4 + 1;
/// The fewest bytes a tensor entry can take: empty name, one dimension, type, offset.
const MIN_TENSOR: u64 = 8 + 4 + 8 + 4 + 8;
/// Most dimensions a tensor can have.
const MAX_DIMENSIONS: u32 = 4;

/// Type numbers of tensors, as in ggml.
pub(crate) mod types {
    pub(crate) const F32: u32 = 0;
    pub(crate) const F16: u32 = 1;
    pub(crate) const Q4_0: u32 = 2;
    pub(crate) const Q8_0: u32 = 8;
    pub(crate) const Q6_K: u32 = 14;
    pub(crate) const BF16: u32 = 30;
    pub(crate) const TQ1_0: u32 = 34;
    pub(crate) const TQ2_0: u32 = 35;
    pub(crate) const I2_S: u32 = 36;
    pub(crate) const Q2_0: u32 = 42;

    /// Returns the name of a type number, or the number itself.
    pub(crate) fn name(kind: u32) -> String {
        match kind {
            F32 => "F32".into(),
            F16 => "F16".into(),
            Q4_0 => "Q4_0".into(),
            Q8_0 => "Q8_0".into(),
            Q6_K => "Q6_K".into(),
            BF16 => "BF16".into(),
            TQ1_0 => "TQ1_0".into(),
            TQ2_0 => "TQ2_0".into(),
            I2_S => "I2_S".into(),
            Q2_0 => "Q2_0".into(),
            // Types of llama.cpp that are named in messages only.
            3 => "Q4_1".into(),
            6 => "Q5_0".into(),
            7 => "Q5_1".into(),
            10 => "Q2_K".into(),
            11 => "Q3_K".into(),
            12 => "Q4_K".into(),
            13 => "Q5_K".into(),
            20 => "IQ4_NL".into(),
            23 => "IQ4_XS".into(),
            other => format!("{other}"),
        }
    }

    /// Returns the bytes of a tensor with rows of `cols` elements and `total` elements, `None`
    /// if the type is unknown, the rows are no whole number of blocks, or the size overflows.
    pub(crate) fn size(kind: u32, cols: u64, total: u64) -> Option<u64> {
        let (block, bytes) = match kind {
            F32 => (1, 4),
            F16 | BF16 => (1, 2),
            Q4_0 => (32, 18),
            Q8_0 => (32, 34),
            Q6_K => (256, 210),
            TQ1_0 => (256, 54),
            TQ2_0 => (256, 66),
            Q2_0 => (64, 18),
            // Blocks run through the flattened tensor, not along rows; one scale ends it.
            I2_S => {
                return total.is_multiple_of(128).then(|| (total / 4).checked_add(32)).flatten();
            }
            _ => return None,
        };
        blocks(cols, total, block, bytes)
    }

    /// [`size`] of a type whose blocks of `block` elements take `bytes` bytes.
    pub(crate) fn blocks(cols: u64, total: u64, block: u64, bytes: u64) -> Option<u64> {
        cols.is_multiple_of(block).then(|| (total / block).checked_mul(bytes)).flatten()
    }
}

/// Weights and bytes of a Q2_0 block: of today's files, and of older ones with the same number.
const Q2_0_BLOCKS: [(u64, u64); 2] = [(64, 18), (128, 34)];

/// One tensor as the header describes it; nothing about its data has been checked.
#[derive(Debug)]
pub(crate) struct TensorInfo {
    /// Dimensions, innermost first.
    pub(crate) dimensions: Vec<u64>,
    /// Type number.
    pub(crate) kind: u32,
    /// Offset from the start of the data.
    offset: u64,
}

impl TensorInfo {
    /// Returns the row length.
    fn cols(&self) -> u64 {
        self.dimensions.first().copied().unwrap_or(1)
    }

    /// Returns the number of elements, `None` if it overflows.
    fn elements(&self) -> Option<u64> {
        self.dimensions.iter().try_fold(1_u64, |product, size| product.checked_mul(*size))
    }
}

/// A parsed header over the file's bytes.
#[derive(Debug)]
pub(crate) struct Gguf {
    file: FileBytes,
    metadata: BTreeMap<String, Value>,
    tensors: BTreeMap<String, TensorInfo>,
    data_start: u64,
    /// Weights and bytes of this file's Q2_0 blocks.
    q2_0: (u64, u64),
}

impl Gguf {
    /// Parses the header of `file`.
    pub(crate) fn parse(file: FileBytes) -> Result<Self, ModelError> {
        let (metadata, tensors, data_start, q2_0) = {
            let mut cursor = Cursor::new(file.bytes(), file.label());
            let (tensor_count, metadata_count) = prologue(&mut cursor)?;
            let metadata = read_metadata(&mut cursor, metadata_count)?;
            let tensors = read_tensors(&mut cursor, tensor_count)?;
            let alignment = alignment(&metadata, file.label())?;
            let data_start = cursor.position().next_multiple_of(alignment);
            for (name, tensor) in &tensors {
                if !tensor.offset.is_multiple_of(alignment) {
                    let problem = format!(
                        "tensor `{name}` starts at offset {}, not a multiple of the alignment \
                         {alignment}",
                        tensor.offset
                    );
                    return Err(ModelError::damaged(file.label(), problem));
                }
            }
            let data = (file.bytes().len() as u64).saturating_sub(data_start);
            let q2_0 = q2_0_block(&tensors, data, alignment);
            (metadata, tensors, data_start, q2_0)
        };
        Ok(Self { file, metadata, tensors, data_start, q2_0 })
    }

    /// Returns the file's bytes.
    pub(crate) fn file(&self) -> &FileBytes {
        &self.file
    }

    /// Returns a metadata value.
    pub(crate) fn value(&self, key: &str) -> Option<&Value> {
        self.metadata.get(key)
    }

    /// Returns a tensor's description.
    pub(crate) fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        self.tensors.get(name)
    }

    /// Returns all tensors' names and descriptions.
    pub(crate) fn tensors(&self) -> impl Iterator<Item = (&str, &TensorInfo)> {
        self.tensors.iter().map(|(name, tensor)| (name.as_str(), tensor))
    }

    /// Returns the weights of this file's Q2_0 blocks: 64, in older files 128.
    pub(crate) fn q2_0_block(&self) -> usize {
        if self.q2_0 == Q2_0_BLOCKS[1] { 128 } else { 64 }
    }

    /// Returns the place of a tensor's bytes in the file, checked against its end.
    pub(crate) fn range(
        &self,
        name: &str,
        tensor: &TensorInfo,
    ) -> Result<Range<usize>, ModelError> {
        let label = self.file.label();
        let total = tensor.elements().ok_or_else(|| {
            let problem = format!("has dimensions {:?}, too many elements", tensor.dimensions);
            ModelError::tensor(label, name, problem)
        })?;
        let size = match tensor.kind {
            types::Q2_0 => types::blocks(tensor.cols(), total, self.q2_0.0, self.q2_0.1),
            kind => types::size(kind, tensor.cols(), total),
        };
        let size = size.ok_or_else(|| {
            if tensor.kind == types::I2_S {
                let problem = format!(
                    "of type I2_S has {total} elements: expected a multiple of 128, for the format \
                     packs whole groups of 128 and leaves the rest out of the file"
                );
                return ModelError::tensor(label, name, problem);
            }
            let problem = format!(
                "of type {} cannot have dimensions {:?}: expected one of the types F32, F16, \
                 BF16, Q4_0, Q8_0 (rows of 32), Q6_K, TQ1_0, TQ2_0 (rows of 256), Q2_0 (rows of \
                 {}), I2_S (128 elements in all)",
                types::name(tensor.kind),
                tensor.dimensions,
                self.q2_0.0
            );
            ModelError::tensor(label, name, problem)
        })?;
        let length = self.file.bytes().len();
        let start = self.data_start.checked_add(tensor.offset);
        let end = start.and_then(|start| start.checked_add(size));
        match (start.map(usize::try_from), end.map(usize::try_from)) {
            (Some(Ok(start)), Some(Ok(end))) if end <= length => Ok(start..end),
            _ => {
                let problem = format!(
                    "tensor `{name}` takes {size} bytes at offset {} of the data that starts at \
                     {}, but the file ends at {length}",
                    tensor.offset, self.data_start
                );
                Err(ModelError::damaged(label, problem))
            }
        }
    }

    /// Checks that every tensor lies inside the file and none overlaps another.
    pub(crate) fn check_layout(&self) -> Result<(), ModelError> {
        let mut ranges = Vec::with_capacity(self.tensors.len());
        for (name, tensor) in &self.tensors {
            ranges.push((self.range(name, tensor)?, name));
        }
        ranges.sort_by_key(|(range, _)| (range.start, range.end));
        for pair in ranges.windows(2) {
            let [(first, first_name), (second, second_name)] = pair else { continue };
            if second.start < first.end {
                let problem = format!(
                    "tensors `{first_name}` (bytes {first:?}) and `{second_name}` (bytes \
                     {second:?}) overlap"
                );
                return Err(ModelError::damaged(self.file.label(), problem));
            }
        }
        Ok(())
    }
}

/// Returns the Q2_0 block with which every tensor of that type fills the room up to the next tensor,
/// or to the end of the `data` bytes; today's if none does or there are no such tensors.
fn q2_0_block(tensors: &BTreeMap<String, TensorInfo>, data: u64, alignment: u64) -> (u64, u64) {
    let mut offsets: Vec<u64> = tensors.values().map(|tensor| tensor.offset).collect();
    offsets.sort_unstable();
    let fills = |(block, bytes): (u64, u64)| {
        tensors.values().filter(|tensor| tensor.kind == types::Q2_0).all(|tensor| {
            let next = offsets.partition_point(|offset| *offset <= tensor.offset);
            let end = offsets.get(next).copied().unwrap_or(data);
            let room = end.saturating_sub(tensor.offset);
            let elements = tensor.elements();
            elements
                .and_then(|elements| types::blocks(tensor.cols(), elements, block, bytes))
                .is_some_and(|size| size <= room && room - size < alignment)
        })
    };
    Q2_0_BLOCKS.into_iter().find(|block| fills(*block)).unwrap_or(Q2_0_BLOCKS[0])
}

/// Reads magic, version and the two counts.
fn prologue(cursor: &mut Cursor<'_>) -> Result<(u64, u64), ModelError> {
    let magic = cursor.take(4, "the magic")?;
    if magic != MAGIC {
        let found = format!("it starts with the bytes {magic:02x?}, a GGUF file with \"GGUF\"");
        return Err(ModelError::NotAModel { file: cursor.label().to_owned(), found });
    }
    let version = cursor.u32("the version")?;
    if version != VERSION {
        let problem = if version == VERSION.swap_bytes() {
            "the file is big-endian; only little-endian GGUF is supported".to_owned()
        } else {
            format!("GGUF version {version} is not supported, expected {VERSION}; convert it again")
        };
        return Err(ModelError::unsupported(cursor.label(), problem));
    }
    let tensors = cursor.u64("the tensor count")?;
    let metadata = cursor.u64("the metadata count")?;
    cursor.check_count("tensors", tensors, MIN_TENSOR)?;
    cursor.check_count("metadata entries", metadata, MIN_ENTRY)?;
    Ok((tensors, metadata))
}

/// Reads all metadata entries.
fn read_metadata(
    cursor: &mut Cursor<'_>,
    count: u64,
) -> Result<BTreeMap<String, Value>, ModelError> {
    let mut metadata = BTreeMap::new();
    for index in 0..count {
        let key = cursor.string(&format!("key {index} of {count}"))?.to_owned();
        let kind = cursor.u32(&format!("the type of `{key}`"))?;
        let value = Value::read(cursor, kind, &key)?;
        if metadata.insert(key.clone(), value).is_some() {
            let problem = format!("the metadata key `{key}` appears twice");
            return Err(ModelError::damaged(cursor.label(), problem));
        }
    }
    Ok(metadata)
}

/// Reads all tensor descriptions.
fn read_tensors(
    cursor: &mut Cursor<'_>,
    count: u64,
) -> Result<BTreeMap<String, TensorInfo>, ModelError> {
    let mut tensors = BTreeMap::new();
    for index in 0..count {
        let name = cursor.string(&format!("the name of tensor {index} of {count}"))?.to_owned();
        let what = format!("the description of tensor `{name}`");
        let n_dimensions = cursor.u32(&what)?;
        if n_dimensions == 0 || n_dimensions > MAX_DIMENSIONS {
            let problem = format!("tensor `{name}` has {n_dimensions} dimensions, expected 1 to 4");
            return Err(ModelError::damaged(cursor.label(), problem));
        }
        let mut dimensions = Vec::with_capacity(4);
        for _ in 0..n_dimensions {
            dimensions.push(cursor.u64(&what)?);
        }
        if dimensions.contains(&0) {
            let problem = format!("tensor `{name}` has dimensions {dimensions:?}, none may be 0");
            return Err(ModelError::damaged(cursor.label(), problem));
        }
        let kind = cursor.u32(&what)?;
        let offset = cursor.u64(&what)?;
        let tensor = TensorInfo { dimensions, kind, offset };
        if tensors.insert(name.clone(), tensor).is_some() {
            let problem = format!("the tensor `{name}` appears twice");
            return Err(ModelError::damaged(cursor.label(), problem));
        }
    }
    Ok(tensors)
}

/// Returns the alignment of the data.
fn alignment(metadata: &BTreeMap<String, Value>, label: &str) -> Result<u64, ModelError> {
    let Some(value) = metadata.get("general.alignment") else {
        return Ok(DEFAULT_ALIGNMENT);
    };
    match value.as_u64() {
        // 64 KiB is the largest page size in use; larger alignments serve nobody.
        Some(alignment) if alignment.is_power_of_two() && (8..=65536).contains(&alignment) => {
            Ok(alignment)
        }
        _ => Err(ModelError::config(
            label,
            "general.alignment",
            value,
            "a power of two from 8 to 65536",
        )),
    }
}
