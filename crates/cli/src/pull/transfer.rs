//! One file, gone on with where it was left, verified, and given its name last.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read, Seek as _, SeekFrom, Write as _},
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, anyhow, bail};
use sha1::Sha1;
use sha2::{Digest as _, Sha256};
use ureq::http::HeaderMap;

use super::{
    Wanted,
    http::{Answer, Hub, TRIES},
};

/// Bytes read at once.
const BUFFER: usize = 1 << 20;

/// What the content of a file must hash to.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) enum Checksum {
    /// Of the content.
    Sha256(String),
    /// SHA-1 of the content as a git object.
    GitBlob(String),
}

impl Checksum {
    pub(super) fn hex(&self) -> &str {
        match self {
            Self::Sha256(hex) | Self::GitBlob(hex) => hex,
        }
    }

    fn start(&self, size: u64) -> Hasher {
        match self {
            Self::Sha256(_) => Hasher::Sha256(Sha256::new()),
            Self::GitBlob(_) => Hasher::Sha1(Sha1::new_with_prefix(format!("blob {size}\0"))),
        }
    }

    /// Whether a file's content is right.
    pub(super) fn matches(&self, path: &Path, size: u64) -> Result<bool> {
        let mut hasher = self.start(size);
        File::open(path)
            .and_then(|file| hash(file, &mut hasher))
            .with_context(|| format!("read {}", path.display()))?;
        Ok(hasher.finish() == self.hex())
    }
}

enum Hasher {
    Sha256(Sha256),
    Sha1(Sha1),
}

impl Hasher {
    fn update(&mut self, bytes: &[u8]) {
        match self {
            Self::Sha256(hasher) => hasher.update(bytes),
            Self::Sha1(hasher) => hasher.update(bytes),
        }
    }

    fn finish(self) -> String {
        let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        match self {
            Self::Sha256(hasher) => hex(&hasher.finalize()),
            Self::Sha1(hasher) => hex(&hasher.finalize()),
        }
    }
}

/// Hashes what is left of a file.
fn hash(mut file: File, hasher: &mut Hasher) -> io::Result<u64> {
    let mut buffer = vec![0; BUFFER];
    let mut total = 0;
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(total),
            count => {
                hasher.update(&buffer[..count]);
                total += count as u64;
            }
        }
    }
}

/// A file under a hidden name beside its own, locked by whoever writes it.
struct Partial {
    file: File,
    path: PathBuf,
    hasher: Hasher,
    length: u64,
}

impl Partial {
    /// Opens what an earlier pull of the same content left, or begins.
    fn open(path: PathBuf, wanted: &Wanted) -> Result<Self> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
            .with_context(|| format!("open {}", path.display()))?;
        if file.try_lock().is_err() {
            bail!("{} is being written by another process", path.display());
        }
        let hasher = wanted.checksum.start(wanted.size);
        let mut partial = Self { file, path, hasher, length: 0 };
        let read = partial.file.try_clone().and_then(|file| hash(file, &mut partial.hasher));
        partial.length = read.with_context(|| format!("read {}", partial.path.display()))?;
        if partial.length > wanted.size {
            partial.restart(wanted)?;
        }
        Ok(partial)
    }

    /// Forgets all content.
    fn restart(&mut self, wanted: &Wanted) -> Result<()> {
        self.file
            .set_len(0)
            .and_then(|()| self.file.seek(SeekFrom::Start(0)))
            .with_context(|| format!("empty {}", self.path.display()))?;
        self.hasher = wanted.checksum.start(wanted.size);
        self.length = 0;
        Ok(())
    }

    fn append(&mut self, bytes: &[u8], wanted: &Wanted) -> Result<()> {
        self.file.write_all(bytes).map_err(|error| {
            let left = wanted.size - self.length;
            let full = error.kind() == io::ErrorKind::StorageFull;
            let error = anyhow::Error::from(error);
            let path = self.path.display();
            if full {
                error.context(format!(
                    "no room for the {left} bytes left of {path}; make some, and \
                                       pull again to go on"
                ))
            } else {
                error.context(format!("write {path}"))
            }
        })?;
        self.hasher.update(bytes);
        self.length += bytes.len() as u64;
        Ok(())
    }

    /// Makes the file durable and gives it its name.
    fn commit(self, path: &Path) -> Result<()> {
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
        self.file
            .sync_all()
            .and_then(|()| fs::rename(&self.path, path))
            .and_then(|()| folder.map_or(Ok(()), |folder| File::open(folder)?.sync_all()))
            .with_context(|| format!("give {} its name", path.display()))
    }
}

/// Downloads `url` to `path`, and tells how many bytes are there.
pub(super) fn fetch(
    hub: &Hub,
    url: &str,
    wanted: &Wanted,
    path: &Path,
    mut progress: impl FnMut(u64),
) -> Result<()> {
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder).with_context(|| format!("create {}", folder.display()))?;
    }
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let hex = wanted.checksum.hex();
    // Content of another revision is not gone on with.
    let hidden = format!(".{name}.{}.partial", hex.get(..16).unwrap_or(hex));
    let mut partial = Partial::open(path.with_file_name(hidden), wanted)?;
    let resumed = partial.length > 0;
    complete(hub, url, wanted, &mut partial, &mut progress)?;
    if finished(&mut partial, wanted)? {
        return partial.commit(path);
    }
    // What was there before may have been damaged; what came now, in one go, can only come again.
    if resumed {
        partial.restart(wanted)?;
        complete(hub, url, wanted, &mut partial, &mut progress)?;
        if finished(&mut partial, wanted)? {
            return partial.commit(path);
        }
    }
    let damaged = partial.path.clone();
    drop(partial);
    fs::remove_file(&damaged).with_context(|| format!("remove {}", damaged.display()))?;
    Err(anyhow!("its content does not have the checksum {hex} that the hub names: try again later"))
}

/// Whether all of the content is there and right.
fn finished(partial: &mut Partial, wanted: &Wanted) -> Result<bool> {
    let fresh = wanted.checksum.start(wanted.size);
    let found = std::mem::replace(&mut partial.hasher, fresh).finish();
    Ok(partial.length == wanted.size && found == wanted.checksum.hex())
}

/// Appends what is missing, in as many requests as it takes; those that bring nothing are counted.
fn complete(
    hub: &Hub,
    url: &str,
    wanted: &Wanted,
    partial: &mut Partial,
    progress: &mut impl FnMut(u64),
) -> Result<()> {
    let mut tries = 1;
    let mut most = partial.length;
    while partial.length < wanted.size {
        let before = partial.length;
        let problem = match hub.get(url, Some(before).filter(|length| *length > 0))? {
            Answer::Refused(416) => {
                partial.restart(wanted)?;
                anyhow!("the hub has no bytes after {before}")
            }
            Answer::Refused(status) => bail!("the hub answers {status}"),
            Answer::Found(response) => {
                if before > 0 && !continues(response.status().as_u16(), response.headers(), before)
                {
                    partial.restart(wanted)?;
                }
                let mut body = response.into_body();
                let limit = wanted.size - partial.length + 1;
                receive(body.with_config().limit(limit).reader(), wanted, partial, progress)?
            }
        };
        if partial.length > wanted.size {
            bail!("the hub sends more than the {} bytes it names", wanted.size);
        }
        if partial.length > most {
            most = partial.length;
            tries = 0;
        } else if tries == TRIES {
            return Err(problem.context(format!("gave up after {TRIES} tries")));
        }
        if partial.length < wanted.size {
            tries += 1;
            hub.wait(tries, None);
        }
    }
    Ok(())
}

/// Whether an answer goes on where the content ends.
fn continues(status: u16, headers: &HeaderMap, length: u64) -> bool {
    let range = headers.get("content-range").and_then(|range| range.to_str().ok());
    status == 206 && range.is_some_and(|range| range.starts_with(&format!("bytes {length}-")))
}

/// Appends a body and returns why it ended; only what is wrong on this side is an error.
fn receive(
    mut body: impl Read,
    wanted: &Wanted,
    partial: &mut Partial,
    progress: &mut impl FnMut(u64),
) -> Result<anyhow::Error> {
    let mut buffer = vec![0; BUFFER];
    loop {
        match body.read(&mut buffer) {
            Ok(0) => return Ok(anyhow!("the content ends after {} bytes", partial.length)),
            Ok(count) => partial.append(&buffer[..count], wanted)?,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Ok(anyhow::Error::from(error).context("receive")),
        }
        progress(partial.length);
        if partial.length > wanted.size {
            return Ok(anyhow!("the content is too long"));
        }
    }
}
