//! The binary `tercet`: configuration, wiring, exit codes.
//!
//! Every command is a module; settings are declared once, in [`args`], with flag, environment
//! variable and help. Results go to stdout, logs and errors to stderr. Exit codes: 0 done, 1 failed,
//! 2 wrong usage or configuration.

mod args;
mod backend;
mod bench;
mod chat;
mod failure;
mod generate;
mod model;
mod output;
mod process;
mod servers;
mod shutdown;

use std::process::ExitCode;

use clap::Parser as _;

use self::args::{Cli, Command};

fn main() -> ExitCode {
    let Cli { command, log } = Cli::parse();
    let done = match command {
        Command::Serve(args) => servers::serve(&args, &log),
        Command::Worker(args) => servers::worker(&args, &log),
        Command::Gateway(args) => servers::gateway(&args, &log),
        Command::Generate(args) => generate::run(&args, &log),
        Command::Chat(args) => chat::run(&args, &log),
        Command::Bench(args) => bench::run(&args),
        Command::Model(args) => model::run(&args.action),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => failure::report(&error),
    }
}
