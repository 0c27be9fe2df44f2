//! `tercet model`: files looked into, converted, made up; models of a server.

use std::{
    io::{self, IsTerminal as _, Write as _},
    path::Path,
};

use anyhow::{Context as _, Result};
use tercet_engine::{
    ModelError, ModelFile,
    model_file::{
        Progress,
        convert::{ConvertOptions, Converted, to_gguf},
        synth::{self, SizeOverrides, SynthOptions},
    },
};
use tercet_worker::{LoadError, Verified};

use crate::{
    args::{LogArgs, ModelAction},
    failure::{misconfigured, no_model},
    output::{print, print_line},
    process::{self, Identity},
    progress::Line,
    pull, remote,
};

/// Runs `tercet model`.
pub(crate) fn run(action: &ModelAction, log: &LogArgs) -> Result<()> {
    match action {
        ModelAction::Inspect { path, json } => {
            let summary = open(path)?.summary();
            if *json {
                let json = serde_json::to_string_pretty(&summary).context("write JSON")?;
                print_line(&json)?;
            } else {
                print(&summary.to_string())?;
            }
        }
        ModelAction::Verify { path } => {
            let mut line = Line::new();
            let mut report = |done: usize, layers: usize| {
                line.show(&format!("{done} of {layers} layers"));
            };
            let verified = tercet_worker::verify(path, &mut report);
            drop(line);
            let Verified { name, identity } = verified.map_err(|error| match error {
                LoadError::Model(error) => no_model(error),
                // Those know the text at fault and not the file.
                other => {
                    misconfigured(anyhow::Error::from(other).context(path.display().to_string()))
                }
            })?;
            print_line(&format!("{name} is whole, identity {identity}"))?;
        }
        ModelAction::Convert { source, out, name, ternary, native, lora, force } => {
            let options = ConvertOptions {
                name: name.clone(),
                ternary: *ternary,
                lora: lora.clone(),
                native: *native,
                overwrite: *force,
            };
            let model = open(source)?;
            let mut converted = None;
            written(out, |progress| {
                let done = to_gguf(&model, out, &options, progress)?;
                converted = Some(done);
                Ok(done.bytes)
            })?;
            if let Some(converted) = converted {
                print_line(&faithfulness(&converted, lora.is_some()))?;
            }
        }
        ModelAction::Synth(args) => {
            let options = SynthOptions {
                shape: args.shape,
                sizes: SizeOverrides {
                    hidden: args.hidden,
                    intermediate: args.mlp,
                    layers: args.layers,
                    heads: args.heads,
                    kv_heads: args.kv_heads,
                    head_dim: args.head_dim,
                    vocab: args.vocab,
                    context: args.context,
                },
                ternary: args.ternary,
                head: args.head,
                seed: args.seed,
                overwrite: args.force,
            };
            written(&args.out, |progress| synth::write(&options, &args.out, progress))?;
        }
        ModelAction::Pull(args) => pull::run(args)?,
        ModelAction::Load { path, name, kv, server } => {
            let load = || remote::load(server, path, name.as_deref(), *kv);
            process::run(Identity::client(), log, load)?;
        }
        ModelAction::Unload { name, grace, server } => {
            process::run(Identity::client(), log, || remote::unload(server, name, *grace))?;
        }
        ModelAction::List { json, server } => {
            process::run(Identity::client(), log, || remote::list(server, *json))?;
        }
    }
    Ok(())
}

/// Says whether a conversion is the model it was made from.
fn faithfulness(converted: &Converted, is_merged: bool) -> String {
    let Converted { ternary, rounded_scales, same_header, .. } = converted;
    let source = if is_merged { "the source with the adapter merged" } else { "the source" };
    match (rounded_scales, same_header) {
        (0, true) => format!("{ternary}, exactly {source}"),
        (0, false) => format!("{ternary}; the settings do not read back as those of the source"),
        (count, _) => format!(
            "{ternary}; {count} scales were rounded to half precision, so this is not exactly \
             {source}"
        ),
    }
}

fn open(path: &Path) -> Result<ModelFile> {
    ModelFile::open(path).map_err(no_model)
}

/// Writes a file, tells a terminal how far it is, and says what was written.
fn written(
    out: &Path,
    write: impl FnOnce(&mut dyn FnMut(Progress)) -> Result<u64, ModelError>,
) -> Result<()> {
    let is_terminal = io::stderr().is_terminal();
    let mut last = None;
    let mut progress = |progress: Progress| {
        let percent = progress.written * 100 / progress.total.max(1);
        if is_terminal && last.replace(percent) != Some(percent) {
            // A terminal that is gone needs no progress.
            drop(write!(io::stderr(), "\r{percent}%"));
        }
    };
    let bytes = write(&mut progress).map_err(|error| match error {
        ModelError::Exists { path } => misconfigured(anyhow::anyhow!(
            "{} exists: choose another path, or replace it with --force",
            path.display()
        )),
        other => other.into(),
    });
    if last.is_some() {
        drop(write!(io::stderr(), "\r    \r"));
    }
    print_line(&format!("wrote {}, {} bytes", out.display(), bytes?))?;
    Ok(())
}
