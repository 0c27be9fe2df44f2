//! The binary `tercet`: configuration, wiring, exit codes.
//!
//! Every command is a module; settings are declared once, in [`args`], with flag, environment
//! variable and help. Results go to stdout, logs and errors to stderr. Exit codes: 0 done, 1 failed,
//! 2 wrong usage or configuration.

mod args;
mod backend;
mod bench;
mod chat;
mod completions;
mod failure;
mod generate;
mod model;
mod operate;
mod output;
mod process;
mod profile;
mod progress;
mod pull;
mod remote;
mod servers;
mod settings;
mod shutdown;

use std::{collections::BTreeMap, path::PathBuf, process::ExitCode};

use self::{
    args::{Cli, Command},
    settings::{Asked, Refusal},
};

fn main() -> ExitCode {
    let words: Vec<_> = std::env::args_os().collect();
    let variable =
        |name: &str| std::env::var_os(name).filter(|path| !path.is_empty()).map(PathBuf::from);
    let done = match settings::read(&words, variable) {
        Ok(Asked::Run(cli, flags)) => run(*cli, flags),
        Ok(Asked::Show(settings)) => output::print(&settings).map_err(Into::into),
        Err(Refusal::Settings(error)) => Err(error),
        // Help as well: clap knows where it goes and with which code.
        Err(Refusal::Usage(error)) => {
            drop(error.print());
            return ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2));
        }
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => failure::report(&error),
    }
}

/// Looks a path up in the environment.
fn variable(name: &str) -> Option<PathBuf> {
    std::env::var_os(name).filter(|path| !path.is_empty()).map(PathBuf::from)
}

fn run(cli: Cli, flags: BTreeMap<String, Vec<String>>) -> anyhow::Result<()> {
    let Cli { command, log, .. } = cli;
    match command {
        Command::Serve(args) => servers::serve(&args, &log),
        Command::Worker(args) => servers::worker(&args, &log),
        Command::Gateway(args) => servers::gateway(&args, &log),
        Command::Generate(args) => generate::run(&args, &log),
        Command::Chat(args) => chat::run(&args, flags, &log),
        Command::Status(args) => operate::status(&args, &log),
        Command::Top(args) => operate::top(&args, &log),
        Command::Drain(args) => operate::drain(&args, &log),
        Command::Bench(args) => bench::run(&args),
        Command::Model(args) => model::run(&args.action, &log),
        Command::Completions { shell } => completions::run(shell),
    }
}
