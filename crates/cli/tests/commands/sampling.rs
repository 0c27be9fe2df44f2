//! Flags that say how a text is drawn and what it looks like.

use std::{fs, io::Read as _, process::Output};

use crate::{
    chat::piped,
    support::{Running, Scratch, fail, succeed, tercet, words},
};

const TEXT: &str = "generate --prompt The --max-tokens 24 --seed 7";

/// Long enough for words to come again.
const LONG: &str = "generate --prompt The --max-tokens 150 --ignore-eos --temperature 0";

/// Runs a command whose last arguments have spaces.
fn text(line: &str, more: &[&str]) -> String {
    let mut arguments = words(line);
    arguments.extend(more);
    let Output { status, stdout, stderr } = tercet(arguments).output().unwrap();
    assert!(status.success(), "{more:?}: {}", String::from_utf8_lossy(&stderr));
    String::from_utf8(stdout).unwrap()
}

/// Starts a server and returns its address.
fn serve() -> (Running, String) {
    let mut server = Running::start("serve --listen 127.0.0.1:0");
    let first = server.lines().next().unwrap();
    let address = first.strip_prefix("listening on ").unwrap().to_owned();
    (server, address)
}

/// A token of a listing: its log-probability, id and text.
fn token(line: &str) -> (f32, u32, &str) {
    let (logprob, rest) = line.trim_start().split_once(' ').unwrap();
    let (id, rest) = rest.trim_start().split_once(' ').unwrap();
    let shown = rest.strip_prefix('"').unwrap();
    let end = shown.find('"').unwrap();
    (logprob.parse().unwrap(), id.parse().unwrap(), &shown[..end])
}

#[test]
fn tokens_are_listed_with_their_log_probabilities() {
    let greedy = "generate --prompt The --max-tokens 12 --ignore-eos --temperature 0";
    let plain = succeed(greedy);
    let listed = succeed(&format!("{greedy} --logprobs 2 --echo"));
    let mut lines = listed.lines();
    let prompt = lines.next().unwrap();
    assert!(prompt.starts_with("prompt ") && prompt.ends_with(" \"The\""), "{prompt}");
    let lines: Vec<_> = lines.collect();
    assert_eq!(lines.len(), 12, "{listed}");
    let mut shown = String::new();
    for line in lines {
        let (logprob, _, text) = token(line);
        assert!(logprob <= 0.0, "{line}");
        shown.push_str(text);
        // Greedy: the chosen one is the likeliest, and the next is no likelier.
        let top: Vec<_> = line.split("  \"").skip(1).collect();
        let [first, second] = top[..] else { panic!("two alternatives: {line}") };
        let of = |part: &str| part.rsplit_once(' ').unwrap().1.parse::<f32>().unwrap();
        assert!(first.starts_with(&format!("{text}\"")), "{line}");
        assert!(of(first) == logprob && of(second) <= logprob, "{line}");
    }
    assert_eq!(shown, plain.replace('\n', "\\n").replace('\'', "\\'"));
    assert_eq!(succeed(&format!("{greedy} --echo")), format!("The{plain}"));
}

#[test]
fn every_flag_reaches_the_model() {
    let (_server, address) = serve();
    let usual = succeed(TEXT);
    let listed = succeed(&format!("{TEXT} --logprobs 0"));
    let ids: Vec<u32> = listed.lines().map(|line| token(line).1).collect();
    // The likeliest token alone is left by any of these.
    let greedy = succeed(&format!("{TEXT} --temperature 0"));
    assert_ne!(usual, greedy);
    assert_eq!(succeed(&format!("{TEXT} --min-p 1")), greedy);
    let long = succeed(LONG);
    for more in [
        "--repetition-penalty 5".to_owned(),
        "--frequency-penalty 2".to_owned(),
        "--presence-penalty 2".to_owned(),
        format!("--logit-bias {}=-100", ids[0]),
    ] {
        let line = format!("{LONG} {more}");
        let changed = succeed(&line);
        if more.starts_with("--logit-bias") {
            let line = format!("{TEXT} {more} --logprobs 0");
            assert!(succeed(&line).lines().all(|line| token(line).1 != ids[0]), "{more}");
        } else {
            assert_ne!(changed, long, "{more}");
        }
        assert_eq!(succeed(&format!("{line} --connect {address}")), changed, "{more}");
    }
    // The first place of this token is the end.
    let stop = ids[5];
    let end = ids.iter().position(|id| *id == stop).unwrap() + 1;
    let line = format!("{TEXT} --stop-token {stop} --logprobs 0");
    assert_eq!(succeed(&line).lines().count(), end);
    assert_eq!(succeed(&format!("{line} --connect {address}")).lines().count(), end);
    assert_eq!(succeed(&format!("{TEXT} --cache-salt mine --connect {address}")), usual);
    let long = "s".repeat(257);
    let said = fail(&format!("{TEXT} --cache-salt {long}"), 2);
    assert!(said.contains("256"), "{said}");
}

#[test]
fn texts_keep_to_their_form() {
    let scratch = Scratch::new("forms");
    let (_server, address) = serve();
    let line = "generate --prompt The --max-tokens 60 --seed 3";
    let connect = format!("{line} --connect {address}");
    let schema = r#"{"type": "object", "properties": {"age": {"type": "integer", "minimum": 0,
        "maximum": 99}}, "required": ["age"], "additionalProperties": false}"#;
    let file = scratch.file("schema.json");
    fs::write(&file, schema).unwrap();

    let answer = text(line, &["--json-schema", schema]);
    let value: serde_json::Value = serde_json::from_str(&answer).unwrap();
    assert!(value["age"].as_u64().is_some_and(|age| age < 100), "{answer}");
    assert_eq!(text(line, &["--json-schema", &file]), answer);
    assert_eq!(text(&connect, &["--json-schema", &file]), answer);

    let answer = text(line, &["--regex", "-[a-c]{3}[0-9]"]);
    assert!(answer.len() == 5 && answer.starts_with('-'), "{answer}");
    assert_eq!(text(&connect, &["--regex", "-[a-c]{3}[0-9]"]), answer);

    let choices = ["--choice", "my lord", "--choice", "your grace"];
    let answer = text(line, &choices);
    assert!(["my lord", "your grace"].contains(&answer.as_str()), "{answer}");
    assert_eq!(text(&connect, &choices), answer);

    let answer = text(line, &["--json"]);
    assert!(answer.starts_with('{'), "{answer}");
    assert_eq!(text(&connect, &["--json"]), answer);
}

#[test]
fn forms_that_cannot_be_are_refused() {
    for (more, expected) in [
        ("--json --regex a", "--json and --regex are both given"),
        ("--choice a --json-schema {}", "--json-schema and --choice are both given"),
        ("--json --ignore-eos", "--ignore-eos goes on past the end that --json has"),
        ("--json-schema /no/such", "read the JSON Schema /no/such"),
        ("--regex (", "regex"),
        ("--json-schema {", "schema"),
        ("--logit-bias 1=2,1=3", "--logit-bias gives token 1 both 2 and 3"),
        ("--logit-bias 999999=1", "999999"),
        ("--stop-token 999999", "999999"),
    ] {
        let said = fail(&format!("generate --prompt x --max-tokens 3 {more}"), 2);
        assert!(said.contains(expected), "{more}: {said}");
        assert!(!said.starts_with("internal"), "{said}");
    }
    let said = fail("chat --json --choice a", 2);
    assert!(said.contains("--json and --choice"), "{said}");
}

#[test]
fn a_chat_keeps_to_a_form() {
    let entries =
        "/set choice [\"aye\", \"nay\"]\nSpeak.\n/show\n/set choice\n/set regex z+y\nSpeak.\n";
    let said = piped("chat --seed 1 --max-tokens 9", entries);
    let lines: Vec<_> = said.lines().collect();
    assert!(["aye", "nay"].contains(&lines[0]), "{said}");
    assert_eq!(lines[1], "choice aye nay", "{said}");
    let last = lines.last().unwrap();
    assert!(last.starts_with('z') && last.trim_start_matches('z').len() <= 1, "{said}");

    let mut chat = Running::start("chat --json --max-tokens 3");
    std::io::Write::write_all(&mut chat.0.stdin.take().unwrap(), b"/set regex a\n").unwrap();
    let mut said = String::new();
    chat.0.stderr.take().unwrap().read_to_string(&mut said).unwrap();
    assert!(said.starts_with("error: regex a: --json and --regex are both given"), "{said}");
    assert_eq!(chat.0.wait().unwrap().code(), Some(0));
}
