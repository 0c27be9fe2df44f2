//! `tercet completions`: scripts for shells, from the command line's own table.

use anyhow::Result;
use clap::CommandFactory as _;
use clap_complete::Shell;

use crate::{args::Cli, output::print};

/// Runs `tercet completions`.
pub(crate) fn run(shell: Shell) -> Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "tercet", &mut script);
    Ok(print(&String::from_utf8_lossy(&script))?)
}
