//! A real etcd for one test.

use std::{
    env, fs,
    io::{self, BufRead as _, BufReader, Write as _},
    net::TcpListener,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        atomic::{AtomicU32, Ordering},
        mpsc,
    },
    thread,
};

use super::super::endpoints::Endpoints;
use crate::suite::PATIENCE;

/// A running etcd of one member, with its own directory and ports; killed when dropped.
pub(super) struct EtcdServer {
    binary: PathBuf,
    directory: PathBuf,
    client_port: u16,
    peer_port: u16,
    child: Child,
}

/// Returns the etcd to test with.
///
/// Without one, says which test did not run, or fails where the tools are required.
pub(super) fn find() -> Option<PathBuf> {
    if let Some(named) = env::var_os("TERCET_ETCD").map(PathBuf::from) {
        assert!(named.is_file(), "TERCET_ETCD={} is not a file", named.display());
        return Some(named);
    }
    let installed = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/tools/bin/etcd");
    let path = env::var_os("PATH").unwrap_or_default();
    let on_path = env::split_paths(&path).map(|directory| directory.join("etcd"));
    let found = [installed].into_iter().chain(on_path).find(|candidate| candidate.is_file());
    if found.is_none() {
        let test = thread::current().name().unwrap_or("a test").to_owned();
        let missing = "no etcd in $TERCET_ETCD, target/tools/bin or $PATH";
        assert!(
            env::var_os("TERCET_REQUIRE_TOOLS").is_none_or(|required| required != "1"),
            "{missing}"
        );
        // Past the test harness, which keeps the output of passing tests to itself.
        writeln!(io::stderr(), "DID NOT RUN: {test}: {missing}").unwrap();
    }
    found
}

/// Returns a port that was free a moment ago.
pub(super) fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

impl EtcdServer {
    pub(super) fn start(binary: &Path) -> Self {
        Self::start_on(binary, free_port())
    }

    /// Starts on a given port for clients.
    pub(super) fn start_on(binary: &Path, client_port: u16) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let name =
            format!("tercet-etcd-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let directory = env::temp_dir().join(name);
        let peer_port = free_port();
        let child = spawn(binary, &directory, client_port, peer_port);
        Self { binary: binary.to_owned(), directory, client_port, peer_port, child }
    }

    pub(super) fn address(&self) -> String {
        format!("http://127.0.0.1:{}", self.client_port)
    }

    /// Returns raw access.
    pub(super) fn endpoints(&self) -> Endpoints {
        Endpoints::new(&Endpoints::parse(&[self.address()]).unwrap())
    }

    /// Kills it without notice.
    pub(super) fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Starts it anew where it was, with everything it had stored.
    pub(super) fn restart(&mut self) {
        self.child = spawn(&self.binary, &self.directory, self.client_port, self.peer_port);
    }

    /// Deletes everything it had stored; it must be dead.
    pub(super) fn wipe(&self) {
        fs::remove_dir_all(&self.directory).unwrap();
    }

    /// Sends it a signal, such as `STOP`.
    pub(super) fn signal(&self, signal: &str) {
        let pid = self.child.id().to_string();
        let sent = Command::new("kill").args([&format!("-{signal}"), &pid]).status().unwrap();
        assert!(sent.success(), "kill -{signal} {pid}: {sent}");
    }
}

impl Drop for EtcdServer {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
        fs::remove_dir_all(&self.directory).ok();
    }
}

/// Starts etcd and waits until it serves.
fn spawn(binary: &Path, directory: &Path, client_port: u16, peer_port: u16) -> Child {
    let (client, peer) =
        (format!("http://127.0.0.1:{client_port}"), format!("http://127.0.0.1:{peer_port}"));
    let mut child = Command::new(binary)
        .arg("--data-dir")
        .arg(directory)
        .args(["--name", "one", "--initial-cluster", &format!("one={peer}")])
        .args(["--listen-client-urls", &client, "--advertise-client-urls", &client])
        .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
        // One member elects itself: no reason to be slow about it.
        .args(["--heartbeat-interval", "20", "--election-timeout", "200"])
        .args(["--logger", "zap", "--log-level", "info"])
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("start {}: {error}", binary.display()));
    let log = BufReader::new(child.stderr.take().unwrap());
    let (ready, waiting) = mpsc::channel();
    // Reads on until etcd dies: a full pipe would stop it.
    thread::spawn(move || {
        let mut said = Vec::new();
        for line in log.lines().map_while(Result::ok) {
            // As releases 3.4 to 3.6 say it.
            let serves = line.contains("serving client traffic insecurely");
            said.push(line);
            if serves {
                ready.send(Ok(())).ok();
                said.clear();
            }
        }
        ready.send(Err(said.join("\n"))).ok();
    });
    match waiting.recv_timeout(PATIENCE) {
        Ok(Ok(())) => child,
        Ok(Err(said)) => panic!("etcd ended: {said}"),
        Err(_) => {
            child.kill().ok();
            child.wait().ok();
            panic!("etcd is not ready after {PATIENCE:?}")
        }
    }
}
