//! `tercet model pull`: a model from a hub that speaks the interface of huggingface.co.
//!
//! The `hf-hub` crate is not used: it brings nearly three hundred crates with a second HTTP stack
//! and a second TLS library, does not go on with partial files, and keeps them in a cache of links
//! where a folder is wanted.

mod http;
mod select;
mod transfer;

use std::{
    collections::BTreeMap,
    fs,
    io::{self, Write as _},
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, Result, anyhow, bail};
use serde::Deserialize;

use crate::{
    args::PullArgs,
    failure::misconfigured,
    output::print_line,
    progress::{Line, size},
};
use http::{Answer, Hub, Token};
use select::select;
use transfer::{Checksum, fetch};

/// What was verified, by file name, so that a second pull reads nothing.
const VERIFIED: &str = ".tercet-pull.json";
/// Most bytes of a hub's answer about a repository; the largest have some hundred thousand.
const MAX_LISTING: u64 = 1 << 26;
/// The first pause before another try; each is twice the one before.
const PAUSE: Duration = Duration::from_millis(500);

/// A repository and a revision of it, as in `owner/name@main`.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Repository {
    name: String,
    revision: String,
}

impl std::str::FromStr for Repository {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let expected = "expected OWNER/NAME or OWNER/NAME@REVISION, such as \
                        microsoft/bitnet-b1.58-2B-4T";
        let (name, revision) = text.split_once('@').unwrap_or((text, "main"));
        let plain = |part: &str| {
            let is_plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
            !part.is_empty() && part.chars().all(is_plain) && !part.starts_with('.')
        };
        let parts: Vec<&str> = name.split('/').collect();
        // Branches may have slashes: refs/pr/1.
        let is_revision = !revision.is_empty() && revision.split('/').all(plain);
        if parts.len() > 2 || !parts.iter().all(|part| plain(part)) || !is_revision {
            return Err(expected.to_owned());
        }
        Ok(Self { name: name.to_owned(), revision: revision.to_owned() })
    }
}

/// What a hub says about a repository.
#[derive(Deserialize)]
struct Listing {
    /// The commit the revision stands for.
    sha: String,
    #[serde(default)]
    siblings: Vec<Sibling>,
}

/// One file of a repository.
#[derive(Clone, Deserialize)]
struct Sibling {
    rfilename: String,
    size: Option<u64>,
    /// Its name as a git object.
    #[serde(rename = "blobId")]
    blob_id: Option<String>,
    lfs: Option<Lfs>,
}

/// A file kept outside of git.
#[derive(Clone, Deserialize)]
struct Lfs {
    sha256: String,
    size: u64,
}

/// A file to have.
#[derive(Clone, Debug, Eq, PartialEq)]
struct Wanted {
    name: String,
    size: u64,
    checksum: Checksum,
}

/// Runs `tercet model pull`.
pub(crate) fn run(args: &PullArgs) -> Result<()> {
    let hub = Hub::new(&args.endpoint, Token::find(), PAUSE).map_err(misconfigured)?;
    let name = args.repository.name.rsplit('/').next().unwrap_or(&args.repository.name);
    let folder = args.out.clone().unwrap_or_else(|| PathBuf::from(name));
    let path =
        pull(&hub, &args.repository, args.file.as_deref(), &folder, &mut |line| print_line(line))?;
    Ok(print_line(&path.display().to_string())?)
}

/// Downloads what is missing, and returns the path of the model.
fn pull(
    hub: &Hub,
    repository: &Repository,
    pattern: Option<&str>,
    folder: &Path,
    say: &mut dyn FnMut(&str) -> io::Result<()>,
) -> Result<PathBuf> {
    let (commit, wanted) = list(hub, repository, pattern)?;
    fs::create_dir_all(folder).with_context(|| format!("create {}", folder.display()))?;
    let mut verified = Verified::read(folder);
    let total: u64 = wanted.iter().map(|file| file.size).sum();
    let mut before = 0;
    for file in &wanted {
        let path = folder.join(&file.name);
        if verified.holds(file, &path)? {
            before += file.size;
            continue;
        }
        let url = hub.url(&format!("{}/resolve/{commit}/{}", repository.name, file.name));
        let mut line = Line::new();
        let progress = |done: u64| {
            let percent = (before + done) * 100 / total.max(1);
            line.show(&format!("{}, {percent}% of {}", file.name, size(total)));
        };
        fetch(hub, &url, file, &path, progress)
            .with_context(|| format!("pull {} of {}", file.name, repository.name))?;
        verified.add(file)?;
        before += file.size;
        say(&format!("{}, {}", file.name, size(file.size)))?;
    }
    match wanted.as_slice() {
        [only] if only.name.ends_with(".gguf") => Ok(folder.join(&only.name)),
        _ => Ok(folder.to_owned()),
    }
}

/// Asks for the files of a repository and chooses those a model needs.
fn list(
    hub: &Hub,
    repository: &Repository,
    pattern: Option<&str>,
) -> Result<(String, Vec<Wanted>)> {
    let Repository { name, revision } = repository;
    let revision_in_path = revision.replace('/', "%2F");
    let url = hub.url(&format!("api/models/{name}/revision/{revision_in_path}?blobs=true"));
    let mut body = match hub.get(&url, None)? {
        Answer::Found(response) => response.into_body(),
        Answer::Refused(status) => return Err(misconfigured(refusal(hub, repository, status))),
    };
    let listing: Listing = serde_json::from_reader(body.with_config().limit(MAX_LISTING).reader())
        .with_context(|| format!("read the list of files of {name} at {revision}"))?;
    let is_commit = !listing.sha.is_empty() && listing.sha.chars().all(|c| c.is_ascii_hexdigit());
    if !is_commit {
        bail!("the hub names `{}` as the commit of {name}, not a hexadecimal number", listing.sha);
    }
    let names: Vec<&str> = listing.siblings.iter().map(|file| file.rfilename.as_str()).collect();
    let chosen = select(&names, pattern)
        .map_err(|problem| misconfigured(anyhow!("{name} at {revision} {problem}")))?;
    let wanted = chosen.into_iter().map(|index| wanted(&listing.siblings[index]));
    Ok((listing.sha, wanted.collect::<Result<_>>()?))
}

fn wanted(file: &Sibling) -> Result<Wanted> {
    let name = file.rfilename.clone();
    let (size, checksum) = match (&file.lfs, file.size, &file.blob_id) {
        (Some(lfs), ..) => (lfs.size, Checksum::Sha256(lfs.sha256.to_ascii_lowercase())),
        (None, Some(size), Some(blob)) => (size, Checksum::GitBlob(blob.to_ascii_lowercase())),
        _ => bail!("the hub says neither size nor checksum of {name}"),
    };
    Ok(Wanted { name, size, checksum })
}

/// Says what a refused question about a repository means.
fn refusal(hub: &Hub, repository: &Repository, status: u16) -> anyhow::Error {
    let Repository { name, revision } = repository;
    let (endpoint, has_token) = (hub.endpoint(), hub.has_token());
    match (status, has_token) {
        (401, false) => anyhow!(
            "{endpoint} has no public model {name}: check the name, or give a token in HF_TOKEN if \
             it is private"
        ),
        (401, true) => anyhow!(
            "{endpoint} has no model {name} for this token: check the name, and that the token is \
             valid"
        ),
        (403, _) => anyhow!(
            "{endpoint} keeps {name} for those who were granted access: ask for it at \
             {endpoint}/{name}, and give a token in HF_TOKEN"
        ),
        (404, _) => anyhow!("{endpoint} has no model {name} with the revision {revision}"),
        _ => anyhow!("{endpoint} answers {status} when asked for {name}"),
    }
}

/// The checksums of files found right.
struct Verified {
    path: PathBuf,
    checksums: BTreeMap<String, String>,
}

impl Verified {
    /// A list that is damaged or absent costs a second look at the files only.
    fn read(folder: &Path) -> Self {
        let path = folder.join(VERIFIED);
        let text = fs::read_to_string(&path).unwrap_or_default();
        Self { path, checksums: serde_json::from_str(&text).unwrap_or_default() }
    }

    /// Whether a file is there and right; reads it if that is not known.
    fn holds(&mut self, file: &Wanted, path: &Path) -> Result<bool> {
        let found = match fs::metadata(path) {
            Ok(found) => found,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
            Err(error) => return Err(error).with_context(|| format!("look at {}", path.display())),
        };
        if !found.is_file() || found.len() != file.size {
            return Ok(false);
        }
        if self.checksums.get(&file.name).map(String::as_str) == Some(file.checksum.hex()) {
            return Ok(true);
        }
        let right = file.checksum.matches(path, file.size)?;
        if right {
            self.add(file)?;
        }
        Ok(right)
    }

    fn add(&mut self, file: &Wanted) -> Result<()> {
        self.checksums.insert(file.name.clone(), file.checksum.hex().to_owned());
        let text = serde_json::to_string_pretty(&self.checksums)?;
        let temporary = self.path.with_extension("json.partial");
        fs::File::create(&temporary)
            .and_then(|mut file| file.write_all(text.as_bytes()))
            .and_then(|()| fs::rename(&temporary, &self.path))
            .with_context(|| format!("write {}", self.path.display()))
    }
}

#[cfg(test)]
mod tests;
