//! Running programs: to their end, or beside the test.

use std::{
    env, fs,
    io::{BufRead as _, BufReader, Read, Write as _},
    path::PathBuf,
    process::{Child, ChildStdin, Command, ExitStatus, Stdio},
    sync::{
        Arc, Mutex, OnceLock,
        mpsc::{self, Receiver, RecvTimeoutError},
    },
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use tokio::time::Instant;

use crate::workspace;

/// How long a test waits for anything: far longer than a loaded machine needs.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Runs a command to its end and returns its standard output.
///
/// # Errors
///
/// Returns an error that carries all of its output if it cannot run or does not succeed.
pub fn run(command: &mut Command) -> Result<String> {
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("run {:?}", command.get_program()))?;
    let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
    if !output.status.success() {
        let stderr = String::from_utf8_lossy(&output.stderr);
        bail!("{command:?}: {}\n{stdout}{stderr}", output.status);
    }
    Ok(stdout)
}

/// Builds the programs of a package, optimised, and returns the directory that they are in.
///
/// # Panics
///
/// Panics if they do not build.
pub(crate) fn release(package: &str) -> PathBuf {
    let cargo = env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut build = Command::new(cargo);
    build.current_dir(workspace()).args(["build", "--quiet", "--release", "--bins"]);
    run(build.args(["--package", package])).expect("the programs of the workspace build");
    let target = env::var_os("CARGO_TARGET_DIR").unwrap_or_else(|| "target".into());
    workspace().join(target).join("release")
}

/// Returns the path of a program of this package, optimised.
///
/// It is in `TERCET_TEST_BINS` if that is set, as by `tests/run`; otherwise it is built first.
///
/// # Panics
///
/// Panics if it does not build.
pub fn helper(name: &str) -> PathBuf {
    static PROGRAMS: OnceLock<PathBuf> = OnceLock::new();
    let programs = PROGRAMS.get_or_init(|| {
        let set = env::var_os("TERCET_TEST_BINS").map(PathBuf::from);
        set.unwrap_or_else(|| release("tercet-tests"))
    });
    programs.join(name)
}

/// A program that runs beside the test, killed when dropped.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    input: Option<ChildStdin>,
    lines: Receiver<String>,
    /// Everything said so far on both streams, for messages.
    said: Arc<Mutex<String>>,
}

impl Process {
    /// Starts a program; the name is for messages.
    ///
    /// # Errors
    ///
    /// Returns an error if it cannot be started.
    pub fn start(name: &str, command: &mut Command) -> Result<Self> {
        Self::start_with(name, command, Stdio::null())
    }

    /// Starts a program that listens to [`Process::say`]; the name is for messages.
    ///
    /// # Errors
    ///
    /// Returns an error if it cannot be started.
    pub fn start_listening(name: &str, command: &mut Command) -> Result<Self> {
        Self::start_with(name, command, Stdio::piped())
    }

    fn start_with(name: &str, command: &mut Command, input: Stdio) -> Result<Self> {
        let mut child = command
            .stdin(input)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("start {command:?}"))?;
        let said = Arc::new(Mutex::new(String::new()));
        let (sender, lines) = mpsc::channel();
        let input = child.stdin.take();
        let stdout = child.stdout.take().expect("standard output is piped");
        let stderr = child.stderr.take().expect("standard error is piped");
        follow(stdout, Arc::clone(&said), move |line| {
            // A test that is over listens no more, and the program may still speak.
            _ = sender.send(line);
        });
        follow(stderr, Arc::clone(&said), |_| ());
        Ok(Self { name: name.to_owned(), child, input, lines, said })
    }

    /// Waits for a line of standard output, and returns what `find` makes of it. Earlier lines are
    /// consumed.
    ///
    /// # Errors
    ///
    /// Returns an error if the program ends, or [`PATIENCE`] does, before such a line comes.
    pub fn line<T>(&mut self, what: &str, find: impl Fn(&str) -> Option<T>) -> Result<T> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match self.lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(line) => {
                    if let Some(found) = find(&line) {
                        return Ok(found);
                    }
                }
                Err(RecvTimeoutError::Timeout) => {
                    bail!("{}: no {what} within {PATIENCE:?}\n{}", self.name, self.said());
                }
                Err(RecvTimeoutError::Disconnected) => {
                    let status = self.child.wait()?;
                    bail!("{}: no {what} before it ended, {status}\n{}", self.name, self.said());
                }
            }
        }
    }

    /// Writes a line to its standard input.
    ///
    /// # Errors
    ///
    /// Returns an error if it does not listen, or listens no more.
    pub fn say(&mut self, line: &str) -> Result<()> {
        let input = self.input.as_mut().context("not started to listen")?;
        writeln!(input, "{line}").with_context(|| format!("say {line:?} to {}", self.name))
    }

    /// Returns the id of the process.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Returns its resident memory in KiB.
    ///
    /// # Errors
    ///
    /// Returns an error if it is gone.
    pub fn resident(&self) -> Result<u64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.id()))
            .with_context(|| format!("{}: is gone", self.name))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let kib = line.and_then(|line| line.trim().strip_suffix(" kB")).context("no VmRSS")?;
        Ok(kib.trim().parse()?)
    }

    /// Returns everything that it said so far.
    pub fn said(&self) -> String {
        self.said.lock().map_or_else(|broken| broken.into_inner().clone(), |said| said.clone())
    }

    /// Kills it without notice, like `kill -9`, and returns when it is gone.
    ///
    /// # Errors
    ///
    /// Returns an error if the system refuses.
    pub fn kill(&mut self) -> Result<()> {
        self.child.kill().with_context(|| format!("kill {}", self.name))?;
        self.child.wait().with_context(|| format!("wait for {}", self.name))?;
        Ok(())
    }

    /// Sends a signal by its name, like `TERM`.
    ///
    /// # Errors
    ///
    /// Returns an error if the system refuses.
    pub fn signal(&self, signal: &str) -> Result<()> {
        run(Command::new("kill").arg(format!("-{signal}")).arg(self.id().to_string()))?;
        Ok(())
    }

    /// Waits until the program ends by itself.
    ///
    /// # Errors
    ///
    /// Returns an error if it still runs after [`PATIENCE`].
    pub fn wait(&mut self) -> Result<ExitStatus> {
        let deadline = Instant::now() + PATIENCE;
        // Its standard output closes when it ends.
        loop {
            match self.lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(_) => (),
                Err(RecvTimeoutError::Disconnected) => return Ok(self.child.wait()?),
                Err(RecvTimeoutError::Timeout) => {
                    bail!("{}: still runs after {PATIENCE:?}\n{}", self.name, self.said());
                }
            }
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Fails only for a process that is gone already.
        _ = self.child.kill();
        _ = self.child.wait();
    }
}

/// Hands on the lines of a stream, on a thread that ends with it.
fn follow(
    stream: impl Read + Send + 'static,
    said: Arc<Mutex<String>>,
    mut each: impl FnMut(String) + Send + 'static,
) {
    thread::spawn(move || {
        let mut stream = BufReader::new(stream);
        let mut line = Vec::new();
        while stream.read_until(b'\n', &mut line).is_ok_and(|length| length > 0) {
            let text = String::from_utf8_lossy(&line);
            if let Ok(mut said) = said.lock() {
                said.push_str(&text);
            }
            each(text.trim_end().to_owned());
            line.clear();
        }
    });
}
