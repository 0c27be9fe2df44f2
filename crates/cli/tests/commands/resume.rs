//! A text that outlives its server.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};

use crate::support::{Running, fail, succeed};

const TEXT: &str = "generate --prompt The --max-tokens 400 --ignore-eos --seed 7";
/// Slow enough to be killed in the middle.
const SLOW: &str = "serve --isa scalar --threads 1 --listen";

/// Starts a server and returns its address.
fn serve(listen: &str) -> (Running, String) {
    let mut server = Running::start(&format!("{SLOW} {listen}"));
    let first = server.lines().next().unwrap();
    let address = first.strip_prefix("listening on ").unwrap().to_owned();
    (server, address)
}

/// Reads the rest of a text that was begun, and what was said on stderr.
fn rest(mut generate: Running, mut text: Vec<u8>) -> (String, String) {
    generate.0.stdout.take().unwrap().read_to_end(&mut text).unwrap();
    let mut said = String::new();
    generate.0.stderr.take().unwrap().read_to_string(&mut said).unwrap();
    assert_eq!(generate.0.wait().unwrap().code(), Some(0), "{said}");
    (String::from_utf8(text).unwrap(), said)
}

#[test]
fn a_text_goes_on_at_the_next_server() {
    let whole = succeed(TEXT);
    let ((first, address), (_second, other)) = (serve("127.0.0.1:0"), serve("127.0.0.1:0"));
    let mut generate = Running::start(&format!("{TEXT} --connect {address} --connect {other}"));
    let mut text = vec![0; 20];
    generate.0.stdout.as_mut().unwrap().read_exact(&mut text).unwrap();
    drop(first);
    let (text, said) = rest(generate, text);
    assert_eq!(text, whole);
    assert!(said.contains("resuming"), "it broke off: {said}");
}

#[test]
fn a_text_waits_for_its_server_to_come_back() {
    let whole = succeed(TEXT);
    let (first, address) = serve("127.0.0.1:0");
    let mut generate = Running::start(&format!("{TEXT} --connect {address}"));
    let mut text = vec![0; 20];
    generate.0.stdout.as_mut().unwrap().read_exact(&mut text).unwrap();
    drop(first);
    let (_again, _) = serve(&address);
    let (text, said) = rest(generate, text);
    assert_eq!(text, whole);
    assert!(said.contains("resuming"), "it broke off: {said}");
}

#[test]
fn the_first_server_that_answers_is_asked() {
    let (_server, address) = serve("127.0.0.1:0");
    let line = "generate --prompt The --max-tokens 8 --seed 7";
    let text = succeed(line);
    assert_eq!(succeed(&format!("{line} --connect 127.0.0.1:1,{address}")), text);
    let none = fail(&format!("{line} --connect 127.0.0.1:1,127.0.0.1:2"), 1);
    assert!(none.starts_with("no server answers at 127.0.0.1:1 or 127.0.0.1:2"), "{none}");
}

#[test]
fn a_chat_goes_on_when_its_server_is_back() {
    let (first, address) = serve("127.0.0.1:0");
    let mut chat = Running::start(&format!("chat --seed 1 --max-tokens 8 --connect {address}"));
    let mut stdin = chat.0.stdin.take().unwrap();
    let mut lines = chat.lines();
    let mut errors = BufReader::new(chat.0.stderr.take().unwrap()).lines().map(Result::unwrap);
    stdin.write_all(b"Speak.\n").unwrap();
    let answer = lines.next().unwrap();
    drop(first);
    stdin.write_all(b"Speak.\n/show\n").unwrap();
    let error = errors.next().unwrap();
    assert!(error.starts_with(&format!("error: no server answers at {address}")), "{error}");
    let (_again, _) = serve(&address);
    stdin.write_all(b"/new\nSpeak.\n/quit\n").unwrap();
    let rest: Vec<_> = lines.collect();
    assert_eq!(rest.last(), Some(&answer), "{rest:?}");
    assert_eq!(chat.0.wait().unwrap().code(), Some(0));
}
