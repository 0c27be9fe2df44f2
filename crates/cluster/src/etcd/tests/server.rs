//! Real etcd processes for one test.

use std::{
    env,
    ffi::OsString,
    fs,
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

use super::super::endpoints::{Endpoints, Plan};
use crate::{EtcdOptions, suite::PATIENCE};

/// A member of etcd with its own directory and ports, alone unless made by
/// [`cluster`](super::cluster); killed when dropped.
pub(super) struct EtcdServer {
    pub(super) place: Place,
    running: Running,
}

/// Where a member is and how it is started.
#[derive(Clone)]
pub(super) struct Place {
    pub(super) binary: PathBuf,
    pub(super) name: String,
    pub(super) directory: PathBuf,
    pub(super) client_port: u16,
    pub(super) peer_port: u16,
    /// All members, as `name=url,...`.
    pub(super) initial_cluster: String,
    pub(super) scheme: &'static str,
    pub(super) arguments: Vec<OsString>,
}

struct Running {
    child: Child,
    serves: mpsc::Receiver<Result<(), String>>,
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

/// Returns the path of a new directory or file of this test.
pub(super) fn scratch(what: &str) -> PathBuf {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    env::temp_dir().join(format!("tercet-{what}-{}-{count}", std::process::id()))
}

impl Place {
    /// Returns a new one for a member alone.
    pub(super) fn alone(binary: &Path) -> Self {
        let peer_port = free_port();
        Self {
            binary: binary.to_owned(),
            name: "one".to_owned(),
            directory: scratch("etcd"),
            client_port: free_port(),
            peer_port,
            initial_cluster: format!("one=http://127.0.0.1:{peer_port}"),
            scheme: "http",
            // One member elects itself: no reason to be slow about it.
            arguments: ["--heartbeat-interval", "20", "--election-timeout", "200"]
                .map(OsString::from)
                .to_vec(),
        }
    }

    /// Starts etcd, which serves once most members run.
    pub(super) fn launch(self) -> EtcdServer {
        let running = spawn(&self);
        EtcdServer { place: self, running }
    }
}

impl EtcdServer {
    pub(super) fn start(binary: &Path) -> Self {
        Self::start_at(Place::alone(binary))
    }

    pub(super) fn start_at(place: Place) -> Self {
        let server = place.launch();
        server.ready();
        server
    }

    /// Waits until it serves.
    pub(super) fn ready(&self) {
        match self.running.serves.recv_timeout(PATIENCE) {
            Ok(Ok(())) => {}
            Ok(Err(said)) => panic!("etcd ended: {said}"),
            Err(_) => panic!("etcd is not ready after {PATIENCE:?}"),
        }
    }

    pub(super) fn address(&self) -> String {
        format!("{}://127.0.0.1:{}", self.place.scheme, self.place.client_port)
    }

    /// Returns raw access.
    pub(super) fn endpoints(&self) -> Endpoints {
        let options = EtcdOptions::new(vec![self.address()], "test".parse().unwrap());
        endpoints(&options)
    }

    /// Kills it without notice.
    pub(super) fn kill(&mut self) {
        self.running.child.kill().unwrap();
        self.running.child.wait().unwrap();
    }

    /// Starts it anew where it was, with everything it had stored.
    pub(super) fn restart(&mut self) {
        self.running = spawn(&self.place);
    }

    /// Deletes everything it had stored; it must be dead.
    pub(super) fn wipe(&self) {
        fs::remove_dir_all(&self.place.directory).unwrap();
    }

    /// Sends it a signal, such as `STOP`.
    pub(super) fn signal(&self, signal: &str) {
        let pid = self.running.child.id().to_string();
        let sent = Command::new("kill").args([&format!("-{signal}"), &pid]).status().unwrap();
        assert!(sent.success(), "kill -{signal} {pid}: {sent}");
    }
}

impl Drop for EtcdServer {
    fn drop(&mut self) {
        self.running.child.kill().ok();
        self.running.child.wait().ok();
        fs::remove_dir_all(&self.place.directory).ok();
    }
}

/// Returns raw access as these options have it.
pub(super) fn endpoints(options: &EtcdOptions) -> Endpoints {
    Endpoints::new(Plan::new(options).unwrap(), options).unwrap()
}

fn spawn(place: &Place) -> Running {
    let client = format!("{}://127.0.0.1:{}", place.scheme, place.client_port);
    let peer = format!("http://127.0.0.1:{}", place.peer_port);
    let mut child = Command::new(&place.binary)
        .arg("--data-dir")
        .arg(&place.directory)
        .args(["--name", &place.name, "--initial-cluster", &place.initial_cluster])
        .args(["--listen-client-urls", &client, "--advertise-client-urls", &client])
        .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
        .args(["--logger", "zap", "--log-level", "info"])
        .args(&place.arguments)
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("start {}: {error}", place.binary.display()));
    let log = BufReader::new(child.stderr.take().unwrap());
    let (ready, serves) = mpsc::channel();
    // Reads on until etcd dies: a full pipe would stop it.
    thread::spawn(move || {
        let mut said = Vec::new();
        for line in log.lines().map_while(Result::ok) {
            // As releases 3.4 to 3.6 say it.
            let serves = line.contains("serving client traffic ");
            said.push(line);
            if serves {
                ready.send(Ok(())).ok();
                said.clear();
            }
        }
        ready.send(Err(said.join("\n"))).ok();
    });
    Running { child, serves }
}
