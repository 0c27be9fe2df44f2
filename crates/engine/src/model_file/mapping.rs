//! The bytes of one model file, mapped or embedded, and memory for copies of them. The only unsafe
//! code of this crate.

#![expect(unsafe_code, reason = "mapping a file into memory has no safe interface")]

mod arena;

use std::fs::File;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use memmap2::{Mmap, UncheckedAdvice};
use tercet_kernels::WeightBytes;

pub(crate) use self::arena::Arena;
use super::error::ModelError;

/// An owner of bytes that never change and never move.
type Owner = Arc<dyn AsRef<[u8]> + Send + Sync>;

/// The bytes of one file; clones share them.
#[derive(Clone)]
pub(crate) struct FileBytes {
    label: Arc<str>,
    owner: Owner,
    /// The owner, if it is a mapping.
    map: Option<Arc<Mmap>>,
}

impl FileBytes {
    /// Maps the file at `path` read-only.
    ///
    /// The file must not be truncated or rewritten in place while the model is in use; replacing
    /// it by rename, as this crate's own writers do, is safe.
    pub(crate) fn map(path: &Path) -> Result<Self, ModelError> {
        let io = |action| move |source| ModelError::Io { action, path: path.to_owned(), source };
        let file = File::open(path).map_err(io("open"))?;
        let length = file.metadata().map_err(io("stat"))?.len();
        // An empty mapping is an error on some systems; an empty file gets its own message later.
        if length == 0 {
            return Ok(Self::new(path.display().to_string(), Arc::new([])));
        }
        // SAFETY: the mapping is private and read-only, and nothing in this process writes to the
        // file. Another process that truncates it could raise SIGBUS, as with every mapped file;
        // model files are replaced by rename, never in place.
        let map = unsafe { Mmap::map(&file) }.map_err(io("map"))?;
        let map = Arc::new(map);
        let file = Self::new(path.display().to_string(), Arc::clone(&map) as Owner);
        Ok(Self { map: Some(map), ..file })
    }

    /// Wraps bytes that are in memory already.
    pub(crate) fn new(label: impl Into<Arc<str>>, owner: Owner) -> Self {
        Self { label: label.into(), owner, map: None }
    }

    /// Returns the name used in messages.
    pub(crate) fn label(&self) -> &str {
        &self.label
    }

    /// Returns all bytes.
    pub(crate) fn bytes(&self) -> &[u8] {
        (*self.owner).as_ref()
    }

    /// Gives the memory of `range` back to the system; if it is read again, it comes from the file.
    pub(crate) fn forget(&self, range: Range<usize>) {
        let Some(map) = &self.map else { return };
        // SAFETY: the mapping is read-only and of a file, so that its pages hold what the file
        // does, before and after.
        let forgotten = unsafe {
            map.unchecked_advise_range(UncheckedAdvice::DontNeed, range.start, range.len())
        };
        // It saves memory only: a system that cannot do it loses nothing else.
        drop(forgotten);
    }

    /// Returns weight bytes that borrow `range` of the file and keep the file alive.
    ///
    /// # Panics
    /// If the range does not lie inside the file; ranges are checked when headers are read.
    pub(crate) fn share(&self, range: Range<usize>) -> WeightBytes {
        WeightBytes::shared(Arc::clone(&self.owner), range)
            .expect("tensor ranges were checked against the file's length")
    }
}

impl std::fmt::Debug for FileBytes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FileBytes")
            .field("label", &self.label)
            .field("len", &self.bytes().len())
            .finish()
    }
}
