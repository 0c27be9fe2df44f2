//! The built binary: output, exit codes, signals.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod chat;
mod operate;
mod resume;
mod sampling;
mod support;
mod usage;

use std::io::Read as _;

use support::{Running, Scratch, fail, succeed, tercet, words};

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
    let measured = |line: &str| -> serde_json::Value {
        let report = succeed(&format!("bench {line} --prompt 4 --generate 2 --repeat 1 --json"));
        serde_json::from_str(&report).unwrap()
    };
    let report = measured(&format!("--model {out} --threads 1 --batch 1"));
    for rate in ["prefill_tokens_per_second", "decode_tokens_per_second"] {
        assert!(report[rate]["median"].as_f64().is_some_and(|rate| rate > 0.0), "{report}");
    }
    assert_eq!((&report["threads"], &report["batch"]), (&1.into(), &1.into()));
    assert!(report["recommendation"].is_null(), "{report}");
}

#[test]
fn every_documented_field_is_told() {
    let line = "bench --prompt 4,70 --batch 1,3 --generate 3 --repeat 2 --threads 2 --json";
    let report: serde_json::Value = serde_json::from_str(&succeed(line)).unwrap();
    let help = succeed("bench --help");
    let documented = |name: &str| assert!(help.contains(name), "{name} is not in the help");
    let sizes: Vec<_> = report["points"]
        .as_array()
        .unwrap()
        .iter()
        .map(|point| (point["prompt"].as_u64().unwrap(), point["batch"].as_u64().unwrap()))
        .collect();
    assert_eq!(sizes, [(4, 1), (4, 3), (70, 1), (70, 3)]);
    for point in report["points"].as_array().unwrap() {
        for (field, value) in point.as_object().unwrap() {
            documented(field);
            if field == "screen" {
                // The head of the built-in model stays in the caches.
                assert!(value.is_null(), "{point}");
                continue;
            }
            let number = if value.is_object() { &value["max"] } else { value };
            assert!(number.as_f64().is_some_and(|number| number > 0.0), "{field}: {point}");
        }
        let least = point["stream_tokens"]["min"].as_u64().unwrap();
        let most = point["stream_tokens"]["max"].as_u64().unwrap();
        assert!((3..=most).contains(&least), "{point}");
        assert!(point["decode_tokens_per_second"]["min"].as_f64().is_some(), "{point}");
    }
    for group in ["load", "machine"] {
        for field in report[group].as_object().unwrap().keys() {
            documented(field);
        }
    }
    for (field, value) in report.as_object().unwrap() {
        documented(field);
        assert!(report["points"][0].get(field).is_none_or(|first| first == value), "{field}");
    }
    let load = &report["load"];
    let seconds = |field: &str| load[field].as_f64().unwrap();
    assert!(seconds("first_token_seconds") > seconds("load_seconds"), "{load}");
    let bytes = |field: &str| load[field].as_u64().unwrap();
    assert!(bytes("peak_resident_bytes") >= bytes("resident_bytes"), "{load}");
    assert!(bytes("resident_bytes") > bytes("weight_bytes"), "{load}");
    let rates = report["machine"]["read_bytes_per_second"].as_array().unwrap();
    let threads: Vec<_> = rates.iter().map(|rate| rate["threads"].as_u64().unwrap()).collect();
    assert_eq!(threads, [1, 2]);
    assert!(rates.iter().all(|rate| rate["min"].as_f64() > Some(1e6)), "{rates:?}");
}

#[test]
fn settings_are_recommended_from_what_is_measured() {
    let report = succeed("bench --threads 1 --prompt 4 --generate 2 --repeat 1 --json");
    let report: serde_json::Value = serde_json::from_str(&report).unwrap();
    let recommended = &report["recommendation"];
    assert_eq!(
        (&recommended["threads"], &recommended["measured"][0]["batch"]),
        (&1.into(), &1.into())
    );
    assert!(recommended["measured"].as_array().unwrap().len() > 1, "{report}");
    assert!(recommended["kv_bytes"].as_u64() > Some(0), "{report}");
    assert!(["edge", "server"].map(Into::into).contains(&recommended["profile"]), "{report}");

    let table = succeed("bench --prompt 4 --generate 2 --repeat 1");
    assert!(table.contains("\nprefill ") && table.contains("\ndecode "), "{table}");
    let last = table.split("\nrecommended: ").nth(1).unwrap();
    let settings = last.lines().next().unwrap();
    let accepted = succeed(&format!("serve {settings} --print-config"));
    assert!(accepted.contains("# flag --max-sequences"), "{accepted}");
    let one = succeed("bench --prompt 4 --generate 2 --repeat 1 --batch 2");
    assert!(one.contains("\ndecode ") && !one.contains("recommended"), "{one}");
}
