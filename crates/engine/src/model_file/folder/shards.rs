//! The safetensors files of a folder, one or several.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::path::{Component, Path};

use serde::Deserialize;

use super::json::Json;
use crate::model_file::error::ModelError;
use crate::model_file::mapping::FileBytes;

/// Most files a model may be cut into; the largest known one has 191.
const MAX_SHARDS: usize = 4096;

/// Most bytes of a header, as in the reference implementation.
const MAX_HEADER: usize = 100_000_000;

/// Element types of safetensors files.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) enum ElementType {
    F32,
    F16,
    BF16,
    U8,
    /// A type no weight of a supported model has.
    Other(String),
}

impl ElementType {
    fn parse(name: &str) -> Self {
        match name {
            "F32" => Self::F32,
            "F16" => Self::F16,
            "BF16" => Self::BF16,
            "U8" => Self::U8,
            other => Self::Other(other.to_owned()),
        }
    }

    /// Returns the bytes of one element, if known.
    fn bytes(&self) -> Option<u64> {
        match self {
            Self::F32 => Some(4),
            Self::F16 | Self::BF16 => Some(2),
            Self::U8 => Some(1),
            Self::Other(_) => None,
        }
    }
}

impl std::fmt::Display for ElementType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::F32 => "F32",
            Self::F16 => "F16",
            Self::BF16 => "BF16",
            Self::U8 => "U8",
            Self::Other(name) => name,
        })
    }
}

/// One tensor of a folder.
#[derive(Clone, Debug)]
pub(crate) struct Entry {
    /// The file it is in.
    pub(crate) file: FileBytes,
    /// Its bytes in that file.
    pub(crate) range: Range<usize>,
    /// Its element type.
    pub(crate) dtype: ElementType,
    /// Its dimensions, outermost first.
    pub(crate) shape: Vec<usize>,
}

/// All tensors of a folder by name.
#[derive(Debug)]
pub(crate) struct Shards {
    label: String,
    entries: BTreeMap<String, Entry>,
}

impl Shards {
    /// Maps `model.safetensors`, or the files `model.safetensors.index.json` lists.
    pub(crate) fn open(folder: &Path) -> Result<Self, ModelError> {
        let label = folder.display().to_string();
        let mut entries = BTreeMap::new();
        let single = folder.join("model.safetensors");
        if single.is_file() {
            read_file(&FileBytes::map(&single)?, &mut entries)?;
            return Ok(Self { label, entries });
        }
        let index = folder.join("model.safetensors.index.json");
        let Some(index) = Json::read_optional(&index)? else {
            let found = "it has neither model.safetensors nor model.safetensors.index.json";
            return Err(ModelError::NotAModel { file: label, found: found.to_owned() });
        };
        for name in shard_names(&index)? {
            read_file(&FileBytes::map(&folder.join(name))?, &mut entries)?;
        }
        Ok(Self { label, entries })
    }

    /// Maps one file.
    pub(crate) fn open_file(path: &Path) -> Result<Self, ModelError> {
        let mut entries = BTreeMap::new();
        read_file(&FileBytes::map(path)?, &mut entries)?;
        Ok(Self { label: path.display().to_string(), entries })
    }

    /// Returns all tensors by name.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (&str, &Entry)> {
        self.entries.iter().map(|(name, entry)| (name.as_str(), entry))
    }

    /// Returns a tensor.
    pub(crate) fn get(&self, name: &str) -> Option<&Entry> {
        self.entries.get(name)
    }

    /// Returns the folder's name for messages.
    pub(crate) fn label(&self) -> &str {
        &self.label
    }
}

/// Returns the distinct file names of an index, refusing any that would leave the folder.
fn shard_names(index: &Json) -> Result<Vec<String>, ModelError> {
    let weights = index
        .value("weight_map")
        .and_then(serde_json::Value::as_object)
        .ok_or_else(|| index.missing("weight_map", "an object from tensor to file names"))?;
    let mut names: HashMap<&str, ()> = HashMap::new();
    for value in weights.values() {
        let plain = value.as_str().filter(|name| {
            let mut parts = Path::new(name).components();
            matches!((parts.next(), parts.next()), (Some(Component::Normal(_)), None))
        });
        let name = plain
            .ok_or_else(|| index.wrong("weight_map", value, "file names within the folder"))?;
        names.insert(name, ());
        if names.len() > MAX_SHARDS {
            let expected = format!("at most {MAX_SHARDS} files");
            return Err(ModelError::config(index.label(), "weight_map", "more", expected));
        }
    }
    let mut names: Vec<String> = names.into_keys().map(str::to_owned).collect();
    names.sort_unstable();
    Ok(names)
}

/// One tensor as a safetensors header describes it.
#[derive(Deserialize)]
struct Info {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: (u64, u64),
}

/// A safetensors header.
#[derive(Deserialize)]
struct Header {
    #[serde(rename = "__metadata__")]
    _metadata: Option<serde_json::Value>,
    #[serde(flatten)]
    tensors: BTreeMap<String, Info>,
}

/// Adds the tensors of one file.
///
/// The safetensors crate's reader is not used: it adds offsets from the header without checking
/// for overflow, so a hostile file passes its check of the file's size.
fn read_file(file: &FileBytes, entries: &mut BTreeMap<String, Entry>) -> Result<(), ModelError> {
    let bytes = file.bytes();
    let damaged = |problem: String| Err(ModelError::damaged(file.label(), problem));
    let Some((length, rest)) = bytes.split_first_chunk::<8>() else {
        return damaged(format!("it has {} bytes, a safetensors file at least 8", bytes.len()));
    };
    let length = u64::from_le_bytes(*length);
    let header = match usize::try_from(length) {
        Ok(length) if length <= MAX_HEADER => rest.get(..length),
        _ => return damaged(format!("its header has {length} bytes, more than {MAX_HEADER}")),
    };
    let Some(header) = header else {
        return damaged(format!(
            "its header has {length} bytes, but the file ends after {}",
            rest.len()
        ));
    };
    let start = size_of::<u64>() + header.len();
    let data = bytes.len() - start;
    let header: Header = match serde_json::from_slice(header) {
        Ok(header) => header,
        Err(error) => return damaged(format!("its header is not valid: {error}")),
    };
    let mut ranges = Vec::with_capacity(header.tensors.len());
    for (name, info) in header.tensors {
        let dtype = ElementType::parse(&info.dtype);
        let range = place(&name, &info, &dtype, data)
            .map_err(|problem| ModelError::damaged(file.label(), problem))?;
        ranges.push((range.start, range.end, name.clone()));
        let shape = info.shape.iter().map(|size| usize::try_from(*size)).collect();
        let Ok(shape) = shape else {
            return damaged(format!("tensor `{name}` has the shape {:?}, too large", info.shape));
        };
        let range = start + range.start..start + range.end;
        let entry = Entry { file: file.clone(), range, dtype, shape };
        if entries.insert(name.clone(), entry).is_some() {
            return damaged(format!("the tensor `{name}` is in an earlier file of the folder too"));
        }
    }
    ranges.sort_unstable();
    for pair in ranges.windows(2) {
        let [(_, end, first), (begin, _, second)] = pair else { continue };
        if begin < end {
            return damaged(format!(
                "tensors `{first}` (ends at {end}) and `{second}` (starts at {begin}) overlap"
            ));
        }
    }
    Ok(())
}

/// Returns where a tensor's bytes are within the `data` bytes after the header.
fn place(
    name: &str,
    info: &Info,
    dtype: &ElementType,
    data: usize,
) -> Result<Range<usize>, String> {
    let (from, to) = info.data_offsets;
    let range = match (usize::try_from(from), usize::try_from(to)) {
        (Ok(from), Ok(to)) if from <= to && to <= data => from..to,
        _ => {
            return Err(format!(
                "tensor `{name}` takes bytes {from}..{to} of the data, but the data ends at {data}"
            ));
        }
    };
    let elements = info.shape.iter().try_fold(1_u64, |product, size| product.checked_mul(*size));
    let Some(width) = dtype.bytes() else { return Ok(range) };
    if elements.and_then(|elements| elements.checked_mul(width)) != Some(range.len() as u64) {
        return Err(format!(
            "tensor `{name}` has the shape {:?} of {} but {} bytes",
            info.shape,
            dtype,
            range.len()
        ));
    }
    Ok(range)
}
