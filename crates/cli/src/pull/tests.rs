//! Pulls from a hub on this machine that misbehaves as told.

use std::{
    collections::BTreeMap,
    io::{BufRead as _, BufReader},
    net::{TcpListener, TcpStream},
    sync::{Arc, Mutex},
    thread,
};

use serde_json::json;
use sha1::Sha1;
use sha2::{Digest as _, Sha256};

use super::*;

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// A request as the hub received it.
#[derive(Clone, Debug)]
struct Request {
    path: String,
    headers: BTreeMap<String, String>,
}

impl Request {
    fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(String::as_str)
    }
}

/// An answer, cut off after some bytes of its body if told so.
struct Reply {
    status: u16,
    headers: Vec<(&'static str, String)>,
    body: Vec<u8>,
    cut: Option<usize>,
}

impl Reply {
    fn new(status: u16, body: impl Into<Vec<u8>>) -> Self {
        Self { status, headers: Vec::new(), body: body.into(), cut: None }
    }

    fn header(mut self, name: &'static str, value: impl Into<String>) -> Self {
        self.headers.push((name, value.into()));
        self
    }
}

/// A server that answers by a function and remembers what it was asked.
struct Server {
    address: String,
    seen: Arc<Mutex<Vec<Request>>>,
}

impl Server {
    fn start(mut answer: impl FnMut(&Request, usize) -> Reply + Send + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let seen = Arc::new(Mutex::new(Vec::<Request>::new()));
        let log = Arc::clone(&seen);
        // Ends with the process: the tests of a module share it.
        thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                let Some(request) = read(&stream) else { continue };
                let count = {
                    let mut log = log.lock().unwrap();
                    log.push(request.clone());
                    log.iter().filter(|seen| seen.path == request.path).count()
                };
                write(&mut stream, &answer(&request, count));
            }
        });
        Self { address, seen }
    }

    fn seen(&self, part: &str) -> Vec<Request> {
        let seen = self.seen.lock().unwrap();
        seen.iter().filter(|request| request.path.contains(part)).cloned().collect()
    }
}

fn read(stream: &TcpStream) -> Option<Request> {
    let mut lines = BufReader::new(stream).lines().map_while(Result::ok);
    let path = lines.next()?.split(' ').nth(1)?.to_owned();
    let headers = lines
        .take_while(|line| !line.is_empty())
        .filter_map(|line| {
            let (name, value) = line.split_once(':')?;
            Some((name.to_ascii_lowercase(), value.trim().to_owned()))
        })
        .collect();
    Some(Request { path, headers })
}

fn write(stream: &mut TcpStream, reply: &Reply) {
    let mut head = format!(
        "HTTP/1.1 {} x\r\ncontent-length: {}\r\nconnection: close\r\n",
        reply.status,
        reply.body.len()
    );
    for (name, value) in &reply.headers {
        head.push_str(&format!("{name}: {value}\r\n"));
    }
    head.push_str("\r\n");
    let body = &reply.body[..reply.cut.unwrap_or(reply.body.len())];
    // A client that has seen enough may be gone.
    drop(stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(body)));
}

/// Bytes without a pattern that a shift would keep.
fn weights(length: u32) -> Vec<u8> {
    (0..length).map(|at| (at.wrapping_mul(2_654_435_761) >> 24) as u8).collect()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn files() -> BTreeMap<&'static str, Vec<u8>> {
    BTreeMap::from([
        ("config.json", b"{}".to_vec()),
        ("tokenizer.json", b"{\"model\": 1}".to_vec()),
        ("model.safetensors", weights(300_000)),
        ("pytorch_model.bin", b"pickle".to_vec()),
    ])
}

/// What the hub says about [`files`]: the weights are kept outside of git.
fn listing() -> Reply {
    let siblings: Vec<_> = files()
        .into_iter()
        .map(|(name, content)| {
            let mut object = Sha1::new_with_prefix(format!("blob {}\0", content.len()));
            object.update(&content);
            let mut file = json!({
                "rfilename": name, "size": content.len(), "blobId": hex(&object.finalize()),
            });
            if name == "model.safetensors" {
                file["lfs"] = json!({"sha256": hex(&Sha256::digest(&content)),
                                     "size": content.len(), "pointerSize": 135});
            }
            file
        })
        .collect();
    Reply::new(200, json!({"sha": COMMIT, "siblings": siblings}).to_string())
}

/// Serves a file, from the byte asked for on.
fn content(request: &Request) -> Reply {
    let name = request.path.rsplit('/').next().unwrap();
    let Some(content) = files().remove(name) else { return Reply::new(404, "") };
    let range = request.header("range").and_then(|range| range.strip_prefix("bytes="));
    match range.and_then(|range| range.strip_suffix('-')?.parse::<usize>().ok()) {
        None => Reply::new(200, content),
        Some(from) => {
            let value = format!("bytes {from}-{}/{}", content.len() - 1, content.len());
            Reply::new(206, &content[from..]).header("content-range", value)
        }
    }
}

fn usual(request: &Request) -> Reply {
    if request.path.starts_with("/api/") { listing() } else { content(request) }
}

struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("tercet-pull-{name}-{}", std::process::id()));
        drop(fs::remove_dir_all(&path));
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    fn names(&self) -> Vec<String> {
        let entries = fs::read_dir(&self.0).unwrap();
        let mut names: Vec<_> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort_unstable();
        names
    }

    /// Checks that all that was wanted is there, whole, and nothing else.
    fn is_complete(&self) {
        let wanted = ["config.json", "model.safetensors", "tokenizer.json"];
        assert_eq!(self.names(), [&[VERIFIED], wanted.as_slice()].concat());
        for name in wanted {
            assert!(fs::read(self.0.join(name)).unwrap() == files()[name], "{name}");
        }
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        drop(fs::remove_dir_all(&self.0));
    }
}

fn hub(server: &Server, token: Option<&str>) -> Hub {
    Hub::new(&server.address, token.and_then(Token::new), Duration::ZERO).unwrap()
}

/// Pulls, and returns the lines said.
fn pulled(server: &Server, token: Option<&str>, folder: &Folder) -> Result<Vec<String>> {
    let repository = "o/n".parse().unwrap();
    let mut lines = Vec::new();
    let path = pull(&hub(server, token), &repository, None, &folder.0, &mut |line| {
        lines.push(line.to_owned());
        Ok(())
    })?;
    assert_eq!(path, folder.0);
    Ok(lines)
}

fn failure(server: &Server, token: Option<&str>, folder: &Folder) -> String {
    crate::failure::message(&pulled(server, token, folder).unwrap_err())
}

#[test]
fn a_model_is_pulled_once() {
    let server = Server::start(|request, _| usual(request));
    let folder = Folder::new("once");
    let lines = pulled(&server, None, &folder).unwrap();
    assert_eq!(lines.len(), 3);
    assert!(lines.contains(&"model.safetensors, 292 KiB".to_owned()), "{lines:?}");
    folder.is_complete();
    assert_eq!(server.seen("/o/n/resolve/").len(), 3);
    assert!(server.seen("/o/n/resolve/").iter().all(|seen| seen.path.contains(COMMIT)));
    assert!(server.seen("").iter().all(|seen| seen.header("authorization").is_none()));

    // Nothing is asked for again, whether what was verified is remembered or not.
    for forget in [false, true] {
        if forget {
            fs::remove_file(folder.0.join(VERIFIED)).unwrap();
        }
        assert_eq!(pulled(&server, None, &folder).unwrap(), [""; 0]);
        folder.is_complete();
    }
    assert_eq!(server.seen("/o/n/resolve/").len(), 3);

    // A file that is not what it should be is, once nothing vouches for it.
    fs::write(folder.0.join("config.json"), "[]").unwrap();
    fs::remove_file(folder.0.join(VERIFIED)).unwrap();
    assert_eq!(pulled(&server, None, &folder).unwrap(), ["config.json, 0 KiB"]);
    folder.is_complete();
}

#[test]
fn a_transfer_that_breaks_off_goes_on_where_it_ended() {
    let server = Server::start(|request, count| {
        let mut reply = usual(request);
        if request.path.ends_with(".safetensors") && count <= 3 {
            reply.cut = Some(70_000);
        }
        reply
    });
    let folder = Folder::new("cut");
    pulled(&server, None, &folder).unwrap();
    folder.is_complete();
    let ranges: Vec<_> =
        server.seen(".safetensors").iter().map(|r| r.headers.get("range").cloned()).collect();
    let from = |byte: u32| Some(format!("bytes={byte}-"));
    assert_eq!(ranges, [None, from(70_000), from(140_000), from(210_000)]);
}

#[test]
fn an_interrupted_pull_is_resumed_and_a_hub_without_ranges_starts_again() {
    for has_ranges in [true, false] {
        let server = Server::start(move |request, _| {
            let mut plain = request.clone();
            if !has_ranges {
                plain.headers.remove("range");
            }
            usual(&plain)
        });
        let folder = Folder::new(&format!("resumed-{has_ranges}"));
        let sum = hex(&Sha256::digest(weights(300_000)));
        let partial = format!(".model.safetensors.{}.partial", &sum[..16]);
        fs::write(folder.0.join(partial), &weights(300_000)[..123_456]).unwrap();
        pulled(&server, None, &folder).unwrap();
        folder.is_complete();
        let asked = server.seen(".safetensors");
        assert_eq!(asked.len(), 1);
        assert_eq!(asked[0].header("range"), Some("bytes=123456-"));
    }
}

#[test]
fn a_damaged_partial_file_is_replaced() {
    let server = Server::start(|request, _| usual(request));
    let folder = Folder::new("damaged");
    let sum = hex(&Sha256::digest(weights(300_000)));
    for (length, requests) in [(1000, 2), (300_000, 1), (300_001, 1)] {
        let before = server.seen(".safetensors").len();
        drop(fs::remove_file(folder.0.join("model.safetensors")));
        let partial = format!(".model.safetensors.{}.partial", &sum[..16]);
        fs::write(folder.0.join(partial), vec![7; length]).unwrap();
        pulled(&server, None, &folder).unwrap();
        folder.is_complete();
        assert_eq!(server.seen(".safetensors").len() - before, requests, "{length}");
    }
}

#[test]
fn wrong_content_is_never_given_its_name() {
    let server = Server::start(|request, _| {
        let mut reply = usual(request);
        if request.path.ends_with(".safetensors") {
            reply.body[5] ^= 1;
        }
        reply
    });
    let folder = Folder::new("wrong");
    let error = failure(&server, None, &folder);
    assert!(error.contains("pull model.safetensors of o/n"), "{error}");
    assert!(error.contains("does not have the checksum"), "{error}");
    assert_eq!(folder.names(), [VERIFIED, "config.json"]);
}

#[test]
fn a_busy_hub_is_asked_again_but_not_for_ever() {
    let server = Server::start(|request, count| match count {
        1 => Reply::new(429, "").header("retry-after", "0"),
        2 => Reply::new(500, "oops"),
        3 => Reply::new(503, ""),
        _ => usual(request),
    });
    let folder = Folder::new("busy");
    pulled(&server, None, &folder).unwrap();
    folder.is_complete();

    let server = Server::start(|_, _| Reply::new(502, ""));
    let folder = Folder::new("broken");
    let error = failure(&server, None, &folder);
    assert!(error.contains("after 5 tries") && error.contains("answers 502"), "{error}");
    assert_eq!(server.seen("").len(), 5);
    assert_eq!(folder.names(), [""; 0]);
}

#[test]
fn a_token_is_for_the_hub_alone() {
    let other = Server::start(|request, _| content(request));
    let to = other.address.clone();
    let server = Server::start(move |request, _| match request.path.as_str() {
        path if path.starts_with("/api/") => listing(),
        path if path.contains("/resolve/") => {
            // First within the hub, then to the hosts of its storage.
            let name = path.rsplit('/').next().unwrap();
            Reply::new(307, "").header("location", format!("/moved/{name}?signature=x"))
        }
        path => {
            let name = path.rsplit('/').next().unwrap().split('?').next().unwrap();
            Reply::new(302, "").header("location", format!("{to}/blobs/{name}"))
        }
    });
    let folder = Folder::new("token");
    pulled(&server, Some("secret"), &folder).unwrap();
    folder.is_complete();
    let ours = server.seen("");
    assert_eq!(ours.len(), 7);
    assert!(ours.iter().all(|seen| seen.header("authorization") == Some("Bearer secret")));
    assert_eq!(other.seen("/blobs/").len(), 3);
    assert!(other.seen("").iter().all(|seen| seen.header("authorization").is_none()));
}

#[test]
fn what_is_not_there_is_said_once_and_clearly() {
    for (status, token, expected) in [
        (401, None, "has no public model o/n: check the name, or give a token in HF_TOKEN"),
        (401, Some("secret"), "has no model o/n for this token"),
        (403, Some("secret"), "for those who were granted access"),
        (404, None, "has no model o/n with the revision main"),
    ] {
        let server = Server::start(move |_, _| Reply::new(status, "{\"error\": \"x\"}"));
        let folder = Folder::new(&format!("refused-{status}-{}", token.is_some()));
        let error = failure(&server, token, &folder);
        assert!(error.contains(expected) && !error.contains("secret"), "{error}");
        assert_eq!(server.seen("").len(), 1);
    }
}

#[test]
fn a_hub_cannot_lead_astray() {
    for (location, expected) in [
        ("ftp://a/b", "no address"),
        ("//evil/b", "no address"),
        ("/again", "redirects more than 8 times"),
    ] {
        let server = Server::start(move |_, _| Reply::new(302, "").header("location", location));
        let error = failure(&server, None, &Folder::new("astray"));
        assert!(error.contains(expected), "{error}");
    }
    let server = Server::start(|_, _| Reply::new(200, "{\"sha\": \"../../x\", \"siblings\": []}"));
    let error = failure(&server, None, &Folder::new("commit"));
    assert!(error.contains("not a hexadecimal number"), "{error}");
    let server = Server::start(|_, _| Reply::new(200, "<html>"));
    let error = failure(&server, None, &Folder::new("html"));
    assert!(error.contains("read the list of files of o/n at main"), "{error}");
}

#[test]
fn repositories_are_named_as_on_the_hub() {
    let repository = |text: &str| text.parse::<Repository>().map(|r| (r.name, r.revision));
    let expected = |name: &str, revision: &str| Ok((name.to_owned(), revision.to_owned()));
    assert_eq!(repository("a/b"), expected("a/b", "main"));
    assert_eq!(repository("a-1/b_2.c@refs/pr/1"), expected("a-1/b_2.c", "refs/pr/1"));
    for text in ["", "a/b/c", "a/../b", "a b/c", "/a", "a/", "a/b@", "a/b@../c", "a/b?c"] {
        assert!(text.parse::<Repository>().is_err(), "{text}");
    }
}
