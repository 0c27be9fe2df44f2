//! Wrong usage and configuration: what is said, and the exit codes.

use std::{fs, io::Read as _, process::Command};

use crate::support::{Running, Scratch, fail, run, succeed, tercet, words};

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
fn exit_codes_tell_whose_fault_it_is() {
    let scratch = Scratch::new("exit-codes");
    let config = scratch.file("tercet.toml");
    fs::write(&config, "max-tokens = 1\n").unwrap();
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = taken.local_addr().unwrap();
    for (line, code) in [
        ("generate --prompt x --max-tokens 1", 0),
        ("--version", 0),
        ("help serve", 0),
        ("serve --print-config", 0),
        ("completions fish", 0),
        // Nobody is there: the same line may work later.
        ("generate --prompt x --connect 127.0.0.1:1", 1),
        ("status --connect 127.0.0.1:1", 1),
        ("status --connect nowhere", 2),
        ("drain w1 --connect 127.0.0.1:1", 1),
        (&format!("serve --listen {taken}"), 1),
        (&format!("model convert Cargo.toml/x {config}"), 2),
        ("", 2),
        ("serv", 2),
        ("serve --threads many", 2),
        ("serve --profile huge", 2),
        ("gateway", 2),
        ("generate --prompt x --model /no/such", 2),
        ("generate --prompt x --config /no/such", 2),
        (&format!("generate --prompt x --config {config}"), 2),
        ("completions cmd", 2),
    ] {
        let arguments = line.split_whitespace();
        let output = tercet(arguments).output().unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{line}: {stderr}");
        assert_eq!(code == 0, stderr.is_empty(), "{line}: {stderr}");
        assert_eq!(code == 0, !output.stdout.is_empty(), "{line}");
    }
}

#[test]
fn wrong_flags_come_with_the_right_one() {
    for (line, expected) in [
        ("serve --thread 2", "'--threads'"),
        ("serv", "'serve'"),
        ("generate --prompt x --temprature 1", "'--temperature'"),
        ("serve --profile sever", "[possible values: edge, server]"),
        ("serve --kv-memory 1.5GiB", "such as 512MiB"),
        ("worker", "--etcd <URL>"),
    ] {
        let output = run(line);
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{line}");
        assert!(said.starts_with("error: ") && said.contains(expected), "{line}: {said}");
    }
}

#[test]
fn layers_of_configuration_reach_the_command() {
    let scratch = Scratch::new("layers");
    let home = scratch.0.join("tercet");
    fs::create_dir_all(&home).unwrap();
    fs::write(home.join("tercet.toml"), "temperature = 0\n[generate]\nmax-tokens = 5\n").unwrap();
    let generate = |environment: &[(&str, &str)], more: &str| {
        let mut command = tercet(words(&format!("generate --prompt The --seed 7{more}")));
        command.env_remove("TERCET_CONFIG").env("XDG_CONFIG_HOME", &scratch.0);
        let output = command.envs(environment.iter().copied()).output().unwrap();
        assert_eq!(String::from_utf8_lossy(&output.stderr), "");
        String::from_utf8(output.stdout).unwrap()
    };
    let own = |more: &str| succeed(&format!("generate --prompt The --seed 7 {more}"));
    assert_eq!(generate(&[], ""), own("--max-tokens 5 --temperature 0"), "the file");
    let hot = [("TERCET_TEMPERATURE", "1.5")];
    let expected = own("--max-tokens 5 --temperature 1.5");
    assert_ne!(expected, own("--max-tokens 5 --temperature 0"));
    assert_eq!(generate(&hot, ""), expected, "the environment before the file");
    let expected = own("--max-tokens 6 --temperature 0");
    assert_eq!(generate(&hot, " --max-tokens 6 --temperature 0"), expected, "flags before both");

    let mut command = tercet(["serve"]);
    let output = command.env("TERCET_THREADS", "many").output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(said, "error: TERCET_THREADS = \"many\": invalid digit found in string\n");

    let other = scratch.file("other.toml");
    fs::write(&other, "[generate]\nmax-tokens = 'few'\n").unwrap();
    let said = fail(&format!("generate --prompt x --config {other}"), 2);
    assert_eq!(said, format!("{other}:2: max-tokens = \"few\": invalid digit found in string"));
}

#[test]
fn a_profile_is_logged_and_obeyed() {
    let line = "serve --listen 127.0.0.1:0 --profile edge --context 100 --prefill-stretch 3";
    let mut server = Running::start(line);
    let address = server.lines().next().unwrap();
    let address = address.strip_prefix("listening on ").unwrap().to_owned();
    let long = "x ".repeat(200);
    let mut command = tercet(["generate", "--connect", &address, "--prompt", &long]);
    let output = command.output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{said}");
    assert!(said.contains("100"), "{said}");
    server.signal("-TERM");
    let mut log = String::new();
    server.0.stderr.take().unwrap().read_to_string(&mut log).unwrap();
    let line = log.lines().find(|line| line.contains("profile=edge")).expect(&log);
    let parts = ["threads=", "max_sequences=4", "prefill_chunk=32", "kv_bytes=", "context=100"];
    for part in parts.into_iter().chain(["prefill_stretch=3"]) {
        assert!(line.contains(part), "{line}");
    }
}

#[test]
fn completions_complete() {
    let script = succeed("completions bash");
    let scratch = Scratch::new("completions");
    let file = scratch.file("tercet.bash");
    fs::write(&file, &script).unwrap();
    let complete = |words: &str, index: usize| {
        let program = format!(
            "source {file}; COMP_WORDS=({words}); COMP_CWORD={index}; \
             $(complete -p tercet | sed 's/.*-F \\([^ ]*\\).*/\\1/') tercet \
             \"${{COMP_WORDS[$COMP_CWORD]}}\" \"${{COMP_WORDS[$COMP_CWORD-1]}}\"; \
             echo \"${{COMPREPLY[@]}}\""
        );
        let output = Command::new("bash").args(["-euc", &program]).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    };
    assert_eq!(complete("tercet gen", 1), "generate\n");
    assert_eq!(complete("tercet serve --max-seq", 2), "--max-sequences\n");
    assert!(complete("tercet serve --profile e", 3).contains("edge"));
    for shell in ["zsh", "fish", "elvish", "powershell"] {
        let script = succeed(&format!("completions {shell}"));
        assert!(script.contains("max-sequences") && script.contains("generate"), "{shell}");
    }
}
