//! The tables and plots of `tests/bench/plots.py`, made of what the programs print.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, ensure};
use tercet_tests::{Scratch, Tercet, python, run, workspace};

const PROGRAM: &str = "tests/bench/plots.py";
/// Points of a small sweep: for each number of threads, prompts alone and batches.
const POINTS: usize = 2 * (2 + 2);

/// Builds the example that measures kernels and returns its path.
fn kernels() -> Result<PathBuf> {
    let cargo = env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut build = Command::new(cargo);
    build.current_dir(workspace()).args(["build", "--quiet", "--package", "tercet-kernels"]);
    run(build.args(["--example", "kernels"]))?;
    let target = env::var_os("CARGO_TARGET_DIR").unwrap_or_else(|| "target".into());
    Ok(workspace().join(target).join("debug/examples/kernels"))
}

/// Completes a small sweep of the built-in model in `out`.
fn plots(mut command: Command, kernels: &Path, out: &Path) -> Result<String> {
    command.arg("--out").arg(out).arg("--tercet").arg(Tercet::binary());
    command.arg("--kernels").arg(kernels).args(["--only", "ternary 2560x2560", "--ms", "1"]);
    command.args(["--tokens", "1,16", "--contexts", "128,130", "--batches", "1,8"]);
    run(command.args(["--threads", "1,2", "--generate", "2", "--repeat", "1"]))
}

#[test]
fn a_sweep_becomes_tables_and_is_not_measured_twice() -> Result<()> {
    let scratch = Scratch::new("tables")?;
    let out = scratch.path().join("plots");
    let kernels = kernels()?;
    let tables = || {
        let mut command = Command::new("python3");
        command.arg(workspace().join(PROGRAM)).arg("--tables");
        plots(command, &kernels, &out)
    };
    let told = tables()?;
    // A median with its range, by threads, context, batch and kernel.
    for row in ["\n| 1 | ", "\n| 130 | ", "\n| 8 | ", "\n| ternary 2560x2560 | 16 | 2 | "] {
        let row = told.split(row).nth(1).with_context(|| format!("no row {row:?} in {told}"))?;
        let row = row.lines().next().unwrap_or_default();
        ensure!(row.contains(" (") && !row.contains("|  |"), "{row}");
    }
    let sweep = fs::read_to_string(out.join("sweep.jsonl"))?;
    ensure!(sweep.lines().count() == POINTS, "{sweep}");
    ensure!(tables()? == told, "nothing is measured twice");
    ensure!(fs::read_to_string(out.join("sweep.jsonl"))? == sweep, "nothing is measured twice");
    ensure!(fs::read_to_string(out.join("tables.md"))?.trim() == told.trim(), "the file differs");
    Ok(())
}

#[test]
fn a_sweep_becomes_plots() -> Result<()> {
    let Some(command) = python(PROGRAM, "matplotlib") else { return Ok(()) };
    let scratch = Scratch::new("plots")?;
    plots(command, &kernels()?, scratch.path())?;
    for (name, part) in [
        ("threads", "8 x 16"),
        ("context", "one sequence"),
        ("batch", "2 threads"),
        ("roofline", "ternary 2560x2560"),
    ] {
        let drawn = fs::read_to_string(scratch.path().join(name).with_extension("svg"))?;
        ensure!(drawn.contains("<svg") && drawn.contains(part), "no {part} in {name}.svg");
    }
    Ok(())
}
