//! Files that appear complete or not at all.

use std::fs::{self, File, OpenOptions};
use std::io::{BufWriter, Seek as _, SeekFrom, Write as _};
use std::path::{Path, PathBuf};

use super::error::ModelError;

/// Bytes gathered before a write reaches the operating system.
const BUFFER: usize = 1 << 20;
/// Bytes between two reports of progress.
const REPORT_EVERY: u64 = 16 << 20;

/// How far a file has been written.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Progress {
    /// Bytes written so far.
    pub written: u64,
    /// Bytes the file will have.
    pub total: u64,
}

/// A file under a temporary name beside its target; dropped without
/// [`commit`](Self::commit), it disappears.
pub(crate) struct OutputFile<'a> {
    file: BufWriter<File>,
    temporary: PathBuf,
    target: PathBuf,
    overwrite: bool,
    committed: bool,
    progress: Progress,
    report: &'a mut dyn FnMut(Progress),
}

impl std::fmt::Debug for OutputFile<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("OutputFile")
            .field("temporary", &self.temporary)
            .field("target", &self.target)
            .field("progress", &self.progress)
            .finish_non_exhaustive()
    }
}

impl<'a> OutputFile<'a> {
    /// Creates the temporary file for `total` bytes, unless the target exists and must stay.
    pub(crate) fn create(
        target: &Path,
        overwrite: bool,
        total: u64,
        report: &'a mut dyn FnMut(Progress),
    ) -> Result<Self, ModelError> {
        if !overwrite && target.exists() {
            return Err(ModelError::Exists { path: target.to_owned() });
        }
        let Some(name) = target.file_name() else {
            return Err(ModelError::Unwritable {
                what: target.display().to_string(),
                problem: "the path names no file; add a file name".to_owned(),
            });
        };
        let mut hidden = std::ffi::OsString::from(".");
        hidden.push(name);
        hidden.push(format!(".{}.partial", std::process::id()));
        let temporary = target.with_file_name(hidden);
        let mut options = OpenOptions::new();
        let file = options.write(true).create_new(true).open(&temporary).map_err(|source| {
            ModelError::Io { action: "create", path: temporary.clone(), source }
        })?;
        Ok(Self {
            file: BufWriter::with_capacity(BUFFER, file),
            temporary,
            target: target.to_owned(),
            overwrite,
            committed: false,
            progress: Progress { written: 0, total },
            report,
        })
    }

    /// Appends bytes.
    pub(crate) fn write(&mut self, bytes: &[u8]) -> Result<(), ModelError> {
        self.file.write_all(bytes).map_err(|source| self.error("write", source))?;
        let before = self.progress.written / REPORT_EVERY;
        self.progress.written += bytes.len() as u64;
        if self.progress.written / REPORT_EVERY != before {
            (self.report)(self.progress);
        }
        Ok(())
    }

    /// Replaces bytes written before.
    pub(crate) fn overwrite(&mut self, at: u64, bytes: &[u8]) -> Result<(), ModelError> {
        let end = self.progress.written;
        let write = |file: &mut BufWriter<File>| {
            file.seek(SeekFrom::Start(at))?;
            file.write_all(bytes)?;
            file.seek(SeekFrom::Start(end))
        };
        write(&mut self.file).map(drop).map_err(|source| self.error("write", source))
    }

    /// Returns the bytes written so far.
    pub(crate) fn written(&self) -> u64 {
        self.progress.written
    }

    /// Makes the file durable and gives it its name.
    pub(crate) fn commit(mut self) -> Result<u64, ModelError> {
        self.file.flush().map_err(|source| self.error("write", source))?;
        self.file.get_ref().sync_all().map_err(|source| self.error("sync", source))?;
        if self.overwrite {
            fs::rename(&self.temporary, &self.target)
                .map_err(|source| self.error("rename", source))?;
        } else {
            // Unlike a rename, a link fails if the target has appeared meanwhile.
            match fs::hard_link(&self.temporary, &self.target) {
                Ok(()) => {
                    fs::remove_file(&self.temporary)
                        .map_err(|source| self.error("remove", source))?;
                }
                Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {
                    return Err(ModelError::Exists { path: self.target.clone() });
                }
                // Some file systems have no links.
                Err(_) => fs::rename(&self.temporary, &self.target)
                    .map_err(|source| self.error("rename", source))?,
            }
        }
        self.committed = true;
        if let Some(folder) = self.target.parent().filter(|folder| !folder.as_os_str().is_empty()) {
            File::open(folder)
                .and_then(|folder| folder.sync_all())
                .map_err(|source| self.error("sync the folder of", source))?;
        }
        (self.report)(self.progress);
        Ok(self.progress.written)
    }

    fn error(&self, action: &'static str, source: std::io::Error) -> ModelError {
        ModelError::Io { action, path: self.temporary.clone(), source }
    }
}

impl Drop for OutputFile<'_> {
    fn drop(&mut self) {
        if !self.committed {
            // Nothing can be done about a failure here, and the file's name says what it is.
            drop(fs::remove_file(&self.temporary));
        }
    }
}
