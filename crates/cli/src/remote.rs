//! `tercet model load`, `unload` and `list`: the models of a running server.

use std::{fmt::Write as _, time::Duration};

use anyhow::{Result, bail};
use tercet_proto::v1::{
    DescribeRequest, DescribeResponse, HeldModel, LoadModelRequest, ModelState, UnloadModelRequest,
    load_model_response::Event, worker_client::WorkerClient,
};
use tonic::{Code, Status, transport::Channel};

use crate::{
    args::{ByteSize, WorkerAddress},
    backend::{connect, refused},
    failure::misconfigured,
    output::{print, print_line},
    progress::{Line, load_line, size},
};

/// Loads a model and tells how far it is.
pub(crate) async fn load(
    server: &WorkerAddress,
    path: &str,
    name: Option<&str>,
    kv: Option<ByteSize>,
) -> Result<()> {
    let mut client = client(server).await?;
    let request = LoadModelRequest {
        path: path.to_owned(),
        name: name.unwrap_or_default().to_owned(),
        kv_memory: kv.map_or(0, |size| size.0 as u64),
    };
    let loading = client.load_model(request).await;
    let mut events = loading.map_err(|status| denied(server, &status))?.into_inner();
    let mut line = Line::new();
    loop {
        let event = events.message().await;
        match event.map_err(|status| denied(server, &status))?.and_then(|message| message.event) {
            Some(Event::Progress(progress)) => line.show(&load_line(&progress)),
            Some(Event::Ready(model)) => {
                drop(line);
                print_line(&format!("{} is served, identity {}", model.name, model.identity))?;
                return Ok(());
            }
            None => bail!("the server closed the stream before the model was loaded"),
        }
    }
}

/// Unloads a model.
pub(crate) async fn unload(
    server: &WorkerAddress,
    name: &str,
    grace: Option<Duration>,
) -> Result<()> {
    let grace_millis = grace.map(|grace| u64::try_from(grace.as_millis()).unwrap_or(u64::MAX));
    let request = UnloadModelRequest { name: name.to_owned(), grace_millis };
    let unloaded = client(server).await?.unload_model(request).await;
    let moved = unloaded.map_err(|status| denied(server, &status))?.into_inner().moved_streams;
    let told = match moved {
        0 => String::new(),
        1 => ", 1 stream was told to resume elsewhere".to_owned(),
        _ => format!(", {moved} streams were told to resume elsewhere"),
    };
    Ok(print_line(&format!("{name} is unloaded{told}"))?)
}

/// Lists the models.
pub(crate) async fn list(server: &WorkerAddress, json: bool) -> Result<()> {
    let described = client(server).await?.describe(DescribeRequest {}).await;
    let described = described.map_err(|status| denied(server, &status))?.into_inner();
    Ok(print(&if json { as_json(&described) } else { as_table(&described) })?)
}

async fn client(server: &WorkerAddress) -> Result<WorkerClient<Channel>> {
    Ok(WorkerClient::new(connect(&server.connect).await?))
}

/// Turns a refusal into an error for people.
fn denied(server: &WorkerAddress, status: &Status) -> anyhow::Error {
    match status.code() {
        Code::Unimplemented => misconfigured(anyhow::anyhow!(
            "{} is a gateway: ask one of its workers, or a `tercet serve`",
            server.connect
        )),
        Code::PermissionDenied | Code::AlreadyExists | Code::FailedPrecondition => {
            misconfigured(anyhow::anyhow!(status.message().to_owned()))
        }
        _ => refused(status),
    }
}

fn name_of(held: &HeldModel) -> &str {
    held.model.as_ref().map_or("", |model| &model.name)
}

fn state_of(held: &HeldModel) -> &'static str {
    match held.state() {
        ModelState::Unspecified => "unknown",
        ModelState::Loading => "loading",
        ModelState::Ready => "ready",
        ModelState::Draining => "draining",
        ModelState::Failed => "failed",
    }
}

fn as_table(described: &DescribeResponse) -> String {
    let width = described.models.iter().map(|held| name_of(held).len()).max().unwrap_or(0).max(5);
    let mut table = format!("{:width$}  {:8}  {:>10}  NOTE\n", "MODEL", "STATE", "KV MEMORY");
    for held in &described.models {
        let (name, state, kv) = (name_of(held), state_of(held), size(held.kv_memory));
        let line = format!("{name:width$}  {state:8}  {kv:>10}  {}", held.detail);
        table.push_str(line.trim_end());
        table.push('\n');
    }
    let (free, total) = (size(described.unassigned_kv_memory), size(described.kv_memory));
    let written = writeln!(table, "{free} of {total} KV memory are unassigned");
    debug_assert!(written.is_ok(), "writing to a string cannot fail");
    table
}

fn as_json(described: &DescribeResponse) -> String {
    let models: Vec<_> = described
        .models
        .iter()
        .map(|held| {
            serde_json::json!({
                "name": name_of(held),
                "state": state_of(held),
                "detail": held.detail,
                "identity": held.model.as_ref().map_or("", |model| &model.identity),
                "kv_memory": held.kv_memory,
            })
        })
        .collect();
    let described = serde_json::json!({
        "models": models,
        "kv_memory": described.kv_memory,
        "unassigned_kv_memory": described.unassigned_kv_memory,
    });
    format!("{described:#}\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_align() {
        let held = |name: &str, state: ModelState, detail: &str| HeldModel {
            model: Some(tercet_proto::v1::ModelInfo {
                name: name.to_owned(),
                ..Default::default()
            }),
            state: state.into(),
            detail: detail.to_owned(),
            kv_memory: 3 << 20,
            ..HeldModel::default()
        };
        let described = DescribeResponse {
            models: vec![
                held("a-long-name", ModelState::Ready, ""),
                held("b", ModelState::Failed, "it broke down"),
            ],
            kv_memory: 1 << 30,
            unassigned_kv_memory: 1 << 29,
            ..DescribeResponse::default()
        };
        assert_eq!(
            as_table(&described),
            "MODEL        STATE      KV MEMORY  NOTE\n\
             a-long-name  ready          3 MiB\n\
             b            failed         3 MiB  it broke down\n\
             512 MiB of 1.0 GiB KV memory are unassigned\n"
        );
    }
}
