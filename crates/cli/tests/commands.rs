//! The built binary: output, exit codes, signals.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    ffi::OsStr,
    io::{BufRead as _, BufReader, Read as _, Write as _},
    path::PathBuf,
    process::{Child, Command, Output, Stdio},
};

/// Returns a command that no setting of the developer's shell reaches.
fn tercet(args: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_tercet"));
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("TERCET_") {
            command.env_remove(name);
        }
    }
    command.args(args).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

fn words(line: &str) -> Vec<&str> {
    line.split(' ').collect()
}

fn run(line: &str) -> Output {
    tercet(words(line)).output().unwrap()
}

/// Runs a command that must succeed, saying nothing on stderr.
fn succeed(line: &str) -> String {
    let Output { status, stdout, stderr } = run(line);
    let stderr = String::from_utf8(stderr).unwrap();
    assert!(status.success(), "{line}: {stderr}");
    assert_eq!(stderr, "", "{line}");
    String::from_utf8(stdout).unwrap()
}

/// Runs a command that must fail with this code and one line, which it returns.
fn fail(line: &str, code: i32) -> String {
    let Output { status, stdout, stderr } = run(line);
    let stderr = String::from_utf8(stderr).unwrap();
    assert_eq!(status.code(), Some(code), "{line}: {stderr}");
    assert_eq!(stdout, b"", "{line}");
    let line = stderr.strip_prefix("error: ").expect("an error").trim_end();
    assert!(!line.contains('\n'), "{line}");
    line.to_owned()
}

/// A process that does not outlive its test.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended by itself.
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

impl Running {
    fn start(line: &str) -> Self {
        Self(tercet(words(line)).stdin(Stdio::piped()).spawn().unwrap())
    }

    fn lines(&mut self) -> impl Iterator<Item = String> + use<> {
        BufReader::new(self.0.stdout.take().unwrap()).lines().map(Result::unwrap)
    }

    fn signal(&self, signal: &str) {
        let sent = Command::new("kill").args([signal, &self.0.id().to_string()]).status().unwrap();
        assert!(sent.success());
    }
}

/// A folder that goes with its test.
struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Self {
        let path = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(name);
        drop(std::fs::remove_dir_all(&path));
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    fn file(&self, name: &str) -> String {
        self.0.join(name).to_str().unwrap().to_owned()
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        drop(std::fs::remove_dir_all(&self.0));
    }
}

#[test]
fn a_seed_repeats_a_text_here_and_on_a_server() {
    let line = "generate --prompt The --max-tokens 24 --seed 7";
    let text = succeed(line);
    assert!(text.len() > 24, "{text}");
    assert_eq!(succeed(line), text);
    assert_ne!(succeed(&line.replace('7', "8")), text);
    let greedy = "generate --prompt The --max-tokens 24 --temperature 0";
    assert_eq!(succeed(greedy), succeed(&format!("{greedy} --seed 9")));

    let mut server = Running::start("serve --listen 127.0.0.1:0 --metrics-listen 127.0.0.1:0");
    let mut lines = server.lines();
    assert!(lines.next().unwrap().starts_with("metrics listening on 127.0.0.1:"));
    let line_of_grpc = lines.next().unwrap();
    let address = line_of_grpc.strip_prefix("listening on ").unwrap();
    assert_eq!(succeed(&format!("{line} --connect {address}")), text);
    assert_eq!(succeed(&format!("{line} --connect {address} --model demo")), text);

    let unknown = fail(&format!("{line} --connect {address} --model other"), 2);
    assert!(unknown.contains("other") && unknown.contains("demo"), "{unknown}");
    let taken = fail(&format!("serve --listen {address}"), 1);
    assert!(taken.contains("--listen") && taken.contains(address), "{taken}");

    server.signal("-TERM");
    assert_eq!(server.0.wait().unwrap().code(), Some(0));
    assert_eq!(lines.next(), None, "nothing else is printed");
    let gone = fail(&format!("{line} --connect {address}"), 1);
    assert!(gone.starts_with(&format!("no server answers at {address}")), "{gone}");
}

#[test]
fn stop_strings_end_a_text() {
    let line = "generate --prompt The --max-tokens 64 --seed 7";
    let text = succeed(line);
    let stop: String = text.chars().skip(20).take(3).collect();
    let cut = &text[..text.find(&stop).unwrap()];
    let mut arguments = words(line);
    arguments.extend(["--stop", &stop]);
    let output = tercet(arguments).output().unwrap();
    assert_eq!(String::from_utf8(output.stdout).unwrap(), cut);
}

#[test]
fn a_reader_that_leaves_is_no_failure() {
    let line = "generate --prompt The --max-tokens 900 --ignore-eos --seed 1";
    let mut running = Running::start(line);
    let mut stdout = running.0.stdout.take().unwrap();
    stdout.read_exact(&mut [0]).unwrap();
    drop(stdout);
    let mut said = String::new();
    running.0.stderr.take().unwrap().read_to_string(&mut said).unwrap();
    assert_eq!(running.0.wait().unwrap().code(), Some(0), "{said}");
    assert_eq!(said, "");
}

#[test]
fn a_chat_goes_on_after_an_interrupt() {
    let mut chat = Running::start("chat --ignore-eos --seed 1");
    let mut stdin = chat.0.stdin.take().unwrap();
    let mut stdout = chat.0.stdout.take().unwrap();
    stdin.write_all(b"Speak, my lord.\n").unwrap();
    stdout.read_exact(&mut [0]).unwrap();
    chat.signal("-INT");
    stdin.write_all(b"/help\n/quit\n").unwrap();
    let mut rest = String::new();
    stdout.read_to_string(&mut rest).unwrap();
    assert!(rest.contains("\n/help "), "{rest}");
    assert_eq!(chat.0.wait().unwrap().code(), Some(0));
}

#[test]
fn mistakes_are_told_in_one_line() {
    for (line, code, expected) in [
        ("serve --model /no/such", 2, "/no/such"),
        ("serve --listen nonsense", 2, "HOST:PORT"),
        ("serve --log a=b=c", 2, "a=b=c"),
        ("worker --etcd 127.0.0.1:1 --listen 127.0.0.1:0 --layers 1..9", 2, "0..3"),
        ("worker --etcd 127.0.0.1:1 --listen 0.0.0.0:0", 2, "--advertise"),
        ("gateway --etcd http:// --listen 127.0.0.1:0", 2, "etcd"),
        ("generate --prompt x --model /no/such", 2, "GGUF"),
        ("generate --prompt x --connect nowhere", 2, "HOST:PORT"),
        ("generate --prompt x --connect http://127.0.0.1:1", 2, "HOST:PORT"),
        ("bench --prompt 1020 --generate 10", 2, "1024"),
        ("model inspect Cargo.toml", 2, "GGUF"),
    ] {
        let said = fail(line, code);
        assert!(said.contains(expected), "{line}: {said}");
    }
    assert_eq!(run("serve --no-such-flag").status.code(), Some(2));
    assert_eq!(run("--version").status.code(), Some(0));
}

#[test]
fn a_converted_model_says_the_same() {
    let scratch = Scratch::new("convert");
    let source = format!("{}/../../tests/fixtures/bitnet-packed", env!("CARGO_MANIFEST_DIR"));
    let out = scratch.file("out.gguf");
    let written = succeed(&format!("model convert {source} {out}"));
    assert!(written.starts_with(&format!("wrote {out}, ")), "{written}");
    let exists = fail(&format!("model convert {source} {out}"), 2);
    assert!(exists.contains("--force"), "{exists}");
    succeed(&format!("model convert {source} {out} --force"));

    let inspect = |path: &str| -> serde_json::Value {
        serde_json::from_str(&succeed(&format!("model inspect {path} --json"))).unwrap()
    };
    let (before, after) = (inspect(&source), inspect(&out));
    assert_eq!(before["config"], after["config"]);
    let generate = "generate --prompt The --max-tokens 24 --seed 7 --ignore-eos --model";
    assert_eq!(succeed(&format!("{generate} {source}")), succeed(&format!("{generate} {out}")));
}

#[test]
fn a_made_up_model_is_measured() {
    let scratch = Scratch::new("synth");
    let out = scratch.file("m.gguf");
    succeed(&format!("model synth --shape 125m --type i2_s --head q6_k --seed 3 --out {out}"));
    let line = format!("bench --model {out} --threads 1 --prompt 4 --generate 2 --repeat 1 --json");
    let report: serde_json::Value = serde_json::from_str(&succeed(&line)).unwrap();
    for rate in ["prefill_tokens_per_second", "decode_tokens_per_second"] {
        assert!(report[rate]["median"].as_f64().is_some_and(|rate| rate > 0.0), "{report}");
    }
    assert_eq!(report["threads"], 1);
    let table = succeed("bench --prompt 4 --generate 2 --repeat 1");
    assert!(table.contains("\nprefill ") && table.contains("\ndecode "), "{table}");
}
