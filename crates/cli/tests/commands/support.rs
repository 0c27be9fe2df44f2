//! Processes and files of the tests.

use std::{
    ffi::OsStr,
    io::{BufRead as _, BufReader},
    path::PathBuf,
    process::{Child, Command, Output, Stdio},
};

/// Returns a command that no setting of the developer's shell reaches.
pub(crate) fn tercet(args: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_tercet"));
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("TERCET_") {
            command.env_remove(name);
        }
    }
    // Nor the configuration of the machine.
    command.env("TERCET_CONFIG", "/dev/null");
    command.args(args).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

pub(crate) fn words(line: &str) -> Vec<&str> {
    line.split(' ').collect()
}

pub(crate) fn run(line: &str) -> Output {
    tercet(words(line)).output().unwrap()
}

/// Runs a command that must succeed, saying nothing on stderr.
pub(crate) fn succeed(line: &str) -> String {
    let Output { status, stdout, stderr } = run(line);
    let stderr = String::from_utf8(stderr).unwrap();
    assert!(status.success(), "{line}: {stderr}");
    assert_eq!(stderr, "", "{line}");
    String::from_utf8(stdout).unwrap()
}

/// Runs a command that must fail with this code and one line, which it returns.
pub(crate) fn fail(line: &str, code: i32) -> String {
    let Output { status, stdout, stderr } = run(line);
    let stderr = String::from_utf8(stderr).unwrap();
    assert_eq!(status.code(), Some(code), "{line}: {stderr}");
    assert_eq!(stdout, b"", "{line}");
    let line = stderr.strip_prefix("error: ").expect("an error").trim_end();
    assert!(!line.contains('\n'), "{line}");
    line.to_owned()
}

/// A process that does not outlive its test.
pub(crate) struct Running(pub(crate) Child);

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended by itself.
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

impl Running {
    pub(crate) fn start(line: &str) -> Self {
        Self(tercet(words(line)).stdin(Stdio::piped()).spawn().unwrap())
    }

    pub(crate) fn lines(&mut self) -> impl Iterator<Item = String> + use<> {
        BufReader::new(self.0.stdout.take().unwrap()).lines().map(Result::unwrap)
    }

    pub(crate) fn signal(&self, signal: &str) {
        self::signal(self.0.id(), signal);
    }
}

/// Sends a signal, such as `-TERM`.
pub(crate) fn signal(process: u32, signal: &str) {
    let sent = Command::new("kill").args([signal, &process.to_string()]).status().unwrap();
    assert!(sent.success());
}

/// A folder that goes with its test.
pub(crate) struct Scratch(pub(crate) PathBuf);

impl Scratch {
    pub(crate) fn new(name: &str) -> Self {
        let path = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(name);
        drop(std::fs::remove_dir_all(&path));
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    pub(crate) fn file(&self, name: &str) -> String {
        self.0.join(name).to_str().unwrap().to_owned()
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        drop(std::fs::remove_dir_all(&self.0));
    }
}
