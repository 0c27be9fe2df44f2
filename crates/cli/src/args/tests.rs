//! Every setting is documented, reachable by environment, and refused when wrong.

use clap::{Arg, CommandFactory as _, error::ErrorKind};
use tercet_engine::model_file::synth::Shape;

use super::*;

/// Arguments of one call rather than settings of an installation.
const ONE_SHOT: [&str; 46] = [
    "batch",
    "choice",
    "context",
    "echo",
    "file",
    "force",
    "generate",
    "grace",
    "head",
    "head_dim",
    "heads",
    "hidden",
    "ignore_eos",
    "json",
    "json_schema",
    "kv",
    "kv_heads",
    "layers",
    "logit_bias",
    "logprobs",
    "lora",
    "max_tokens",
    "mlp",
    "name",
    "native",
    "no_history",
    "out",
    "path",
    "print_config",
    "prompt",
    "regex",
    "repeat",
    "repository",
    "seed",
    "shape",
    "shell",
    "source",
    "stop",
    "stop_token",
    "system",
    "ternary",
    "verbose",
    "version",
    "vocab",
    "wait",
    "worker",
];

/// Calls `check` with every argument of every command.
fn for_each_argument(command: &clap::Command, check: &mut impl FnMut(&str, &Arg)) {
    for argument in command.get_arguments().filter(|argument| argument.get_id() != "help") {
        check(command.get_name(), argument);
    }
    for inner in command.get_subcommands() {
        for_each_argument(inner, check);
    }
}

#[test]
fn the_table_is_consistent() {
    Cli::command().debug_assert();
}

#[test]
fn every_argument_has_help_and_a_variable() {
    let mut seen = 0;
    for_each_argument(&Cli::command(), &mut |command, argument| {
        let id = argument.get_id().as_str();
        seen += 1;
        assert!(argument.get_help().is_some(), "{command} {id} has no help");
        match argument.get_env().map(|name| name.to_str().unwrap()) {
            // The hub's own tools call it so, too.
            Some("HF_ENDPOINT") => assert_eq!(id, "endpoint"),
            Some(name) => assert!(name.starts_with("TERCET_"), "{command} {id}: {name}"),
            None => assert!(ONE_SHOT.contains(&id), "{command} {id} has no variable"),
        }
    });
    assert!(seen > 50, "{seen}");
}

#[test]
fn one_variable_is_one_setting() {
    let mut by_name = std::collections::HashMap::new();
    for_each_argument(&Cli::command(), &mut |command, argument| {
        if let Some(name) = argument.get_env() {
            let flag = argument.get_long().unwrap().to_owned();
            let known = by_name.entry(name.to_owned()).or_insert_with(|| flag.clone());
            assert_eq!(*known, flag, "{command}: {name:?}");
        }
    });
}

#[test]
fn the_fixed_spellings_parse() {
    for line in [
        "serve",
        "serve --model m.gguf --listen 127.0.0.1:0 --threads 2 --metrics-listen 127.0.0.1:0 --name m",
        "worker --model m --layers 0..3 --listen 127.0.0.1:0 --etcd http://a:1,http://b:2 --cluster c --threads 1",
        "worker --etcd a:1 --listen=0.0.0.0:7172 --advertise=10.0.0.1:7172 --otlp-endpoint=http://o:4317",
        "gateway --listen 127.0.0.1:0 --etcd http://a:1 --cluster c",
        "gateway --etcd a:1 --routing prefix-affinity --max-queue 0 --max-queue-wait 5s",
        "generate --connect 127.0.0.1:7171 --prompt x --max-tokens 8 --seed 1",
        "generate --prompt -x --stop a --stop b --temperature 0 --top-k 3 --top-p 0.5",
        "generate --prompt x --min-p 0.1 --repetition-penalty 1.1 --frequency-penalty -1 --presence-penalty=0.5",
        "generate --prompt x --logit-bias 1=-100,2=3 --logit-bias 4=0.5 --stop-token 1,2 --cache-salt s",
        "generate --prompt x --logprobs 3 --echo --regex -?[0-9]+",
        "chat --connect 127.0.0.1:7171",
        "chat --choice A --choice B --min-p 0",
        "chat --json-schema schema.json",
        "bench --model m --threads 2 --prompt 8 --generate 8 --batch 2 --json",
        "model inspect m --json",
        "model convert a b --force --type tq1_0 --lora l",
        "model pull o/n@v1 --out d --file *.gguf --endpoint http://127.0.0.1:1",
        "model synth --shape bitnet-2b-4t --type i2_s --head q6_k --seed 1 --layers 3 --hidden 96 --mlp 160 --kv-heads 1 --out f",
        "status --json",
        "status --connect 127.0.0.1:7173",
        "top --admin 127.0.0.1:7173",
        "drain w1 --wait",
        "drain --wait=1m w1 --connect 127.0.0.1:7173",
        "gateway --etcd a:1 --admin-listen off",
        "gateway --etcd a:1 --io-threads 4",
        "--log debug serve",
        "serve --log-format json",
    ] {
        let parsed = Cli::try_parse_from(format!("tercet {line}").split(' '));
        assert!(parsed.is_ok(), "{line}: {}", parsed.unwrap_err());
    }
    for shape in Shape::ALL {
        let line = format!("tercet model synth --shape {shape} --out f");
        assert!(Cli::try_parse_from(line.split(' ')).is_ok(), "{shape}");
    }
}

#[test]
fn wrong_usage_is_refused() {
    for (line, expected) in [
        ("", ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand),
        ("serve --thread 2", ErrorKind::UnknownArgument),
        ("serve --threads 0", ErrorKind::ValueValidation),
        ("serve --isa mmx", ErrorKind::ValueValidation),
        ("serve --layers 0..3", ErrorKind::UnknownArgument),
        ("serve --max-streams 0", ErrorKind::ValueValidation),
        ("serve --routing fastest", ErrorKind::InvalidValue),
        ("serve --prefill-stretch 1", ErrorKind::ValueValidation),
        ("worker --layers 3..3 --etcd a:1", ErrorKind::ValueValidation),
        ("worker", ErrorKind::MissingRequiredArgument),
        ("gateway --etcd a:1 --io-threads 0", ErrorKind::ValueValidation),
        ("gateway --etcd a:1 --cluster a/b", ErrorKind::ValueValidation),
        ("generate", ErrorKind::MissingRequiredArgument),
        ("generate --prompt x --max-tokens 0", ErrorKind::ValueValidation),
        ("generate --prompt x --min-p 1.5", ErrorKind::ValueValidation),
        ("generate --prompt x --repetition-penalty 0", ErrorKind::ValueValidation),
        ("generate --prompt x --presence-penalty 3", ErrorKind::ValueValidation),
        ("generate --prompt x --logit-bias 3", ErrorKind::ValueValidation),
        ("generate --prompt x --logprobs 21", ErrorKind::ValueValidation),
        ("drain", ErrorKind::MissingRequiredArgument),
        ("drain w1 --wait=soon", ErrorKind::ValueValidation),
        ("bench --batch 0", ErrorKind::ValueValidation),
        ("model synth --shape 9b --out f", ErrorKind::ValueValidation),
        ("serve --log-format xml", ErrorKind::ValueValidation),
    ] {
        let arguments = std::iter::once("tercet").chain(line.split_whitespace());
        let error = Cli::try_parse_from(arguments).unwrap_err();
        assert_eq!(error.kind(), expected, "{line}: {error}");
    }
}

#[test]
fn the_stretch_of_steps_reaches_the_engine() {
    let default = EngineOptions::default().prefill_stretch;
    for (line, expected) in [("serve", default), ("worker --etcd a:1 --prefill-stretch 2.5", 2.5)] {
        let words = std::iter::once("tercet").chain(line.split(' '));
        let options = match Cli::try_parse_from(words).unwrap().command {
            Command::Serve(args) => args.engine.options(None),
            Command::Worker(args) => args.engine.options(None),
            other => panic!("{other:?}"),
        };
        assert!((options.prefill_stretch - expected).abs() < 1e-9, "{line}");
    }
}
