//! `tercet status`, `top` and `drain`: what operators ask of a gateway.

mod json;
mod screen;
mod table;

use std::{
    io::{self, IsTerminal as _},
    time::Duration,
};

use anyhow::{Context as _, Result, anyhow, bail};
use futures::FutureExt as _;
use tercet_proto::{
    is_broken,
    v1::{
        DrainWorkerRequest, GatewayStatus, GetStatusRequest, WatchStatusRequest,
        admin_client::AdminClient,
    },
};
use tokio::time;
use tonic::{Code, Status, transport::Channel};

use self::screen::Screen;
use crate::{
    args::{AdminAddress, DrainArgs, LogArgs, StatusArgs, TopArgs},
    failure::misconfigured,
    output::{print, print_line},
    process::{self, Identity},
    progress::showing,
};

/// Time between two looks at a cluster.
const PERIOD_MILLIS: u32 = 1000;
/// The same, of one that waits for something to happen.
const WAITING_MILLIS: u32 = 200;
/// Pause before a gateway that went away is asked again.
const AGAIN: Duration = Duration::from_secs(1);

/// Runs `tercet status`.
pub(crate) fn status(args: &StatusArgs, log: &LogArgs) -> Result<()> {
    process::run(Identity::client(), log, || show(args).boxed())
}

/// Runs `tercet top`.
pub(crate) fn top(args: &TopArgs, log: &LogArgs) -> Result<()> {
    process::run(Identity::client(), log, || watch(&args.address).boxed())
}

/// Runs `tercet drain`.
pub(crate) fn drain(args: &DrainArgs, log: &LogArgs) -> Result<()> {
    process::run(Identity::client(), log, || tell_to_drain(args).boxed())
}

async fn show(args: &StatusArgs) -> Result<()> {
    let status = ask(&args.address).await?;
    Ok(print(&if args.json { json::status(&status) } else { table::status(&status) })?)
}

async fn watch(address: &AdminAddress) -> Result<()> {
    let first = ask(address).await?;
    if !(io::stdin().is_terminal() && io::stdout().is_terminal()) {
        return Ok(print(&table::status(&first))?);
    }
    let (mut screen, mut exit) = Screen::enter()?;
    screen.show(&table::status(&first), "")?;
    loop {
        let gone = tokio::select! {
            gone = follow(address, &mut screen) => gone?,
            () = exit.asked() => return Ok(()),
        };
        screen.note(&gone)?;
        tokio::select! {
            () = time::sleep(AGAIN) => {}
            () = exit.asked() => return Ok(()),
        }
    }
}

/// Shows how the gateway is until it goes away; returns what is to be said then.
async fn follow(address: &AdminAddress, screen: &mut Screen) -> Result<String> {
    let lost = || format!("{} does not answer, asking again", address.admin);
    let Ok(mut client) = connect(address).await else { return Ok(lost()) };
    let request = WatchStatusRequest { interval_millis: PERIOD_MILLIS };
    let Ok(statuses) = client.watch_status(request).await else { return Ok(lost()) };
    let mut statuses = statuses.into_inner();
    while let Ok(Some(message)) = statuses.message().await {
        screen.show(&table::status(&message.status.unwrap_or_default()), "q ends")?;
    }
    Ok(lost())
}

async fn tell_to_drain(args: &DrainArgs) -> Result<()> {
    let DrainArgs { worker, address, wait } = args;
    let mut client = connect(address).await?;
    let epoch = |status: &GatewayStatus| {
        status.workers.iter().find(|known| known.worker_id == *worker).map(|known| known.epoch)
    };
    let before = epoch(&status_of(address, &mut client).await?);
    let request = DrainWorkerRequest { worker_id: worker.clone() };
    let told = client.drain_worker(request).await;
    let streams = told.map_err(|status| denied(address, &status))?.into_inner().streams;
    let left = match streams {
        0 => "no stream is left there".to_owned(),
        1 => "1 stream finishes there or moves".to_owned(),
        _ => format!("{streams} streams finish there or move"),
    };
    print_line(&format!("{worker} takes no new requests, {left}"))?;
    let Some(wait) = *wait else { return Ok(()) };
    let gone = async {
        let request = WatchStatusRequest { interval_millis: WAITING_MILLIS };
        let statuses = client.watch_status(request).await;
        let mut statuses = statuses.map_err(|status| denied(address, &status))?.into_inner();
        loop {
            let message = statuses.message().await.map_err(|status| denied(address, &status))?;
            let Some(message) = message else {
                bail!("the gateway at {} stopped before the worker had left", address.admin);
            };
            // Another epoch is the worker started anew.
            let now = epoch(&message.status.unwrap_or_default());
            if now.is_none() || now != before {
                return Ok(());
            }
        }
    };
    let gone =
        showing(|| format!("waiting for {worker} to leave"), time::timeout(wait, gone)).await;
    gone.map_err(|_| anyhow!("{worker} has not left the cluster within {wait:?}"))??;
    Ok(print_line(&format!("{worker} has left the cluster"))?)
}

async fn ask(address: &AdminAddress) -> Result<GatewayStatus> {
    status_of(address, &mut connect(address).await?).await
}

async fn status_of(
    address: &AdminAddress,
    client: &mut AdminClient<Channel>,
) -> Result<GatewayStatus> {
    let answer = client.get_status(GetStatusRequest {}).await;
    let answer = answer.map_err(|status| denied(address, &status))?.into_inner();
    answer.status.context("the gateway told nothing")
}

async fn connect(address: &AdminAddress) -> Result<AdminClient<Channel>> {
    let endpoint = tercet_client::endpoint(&address.admin)
        .map_err(|error| misconfigured(anyhow!("--admin {error}")))?;
    let channel = endpoint.connect().await.with_context(|| unanswered(address))?;
    Ok(AdminClient::new(channel))
}

fn unanswered(address: &AdminAddress) -> String {
    format!(
        "no gateway serves operators at {}: give the --admin-listen of one as --admin HOST:PORT, on \
         its machine",
        address.admin
    )
}

/// Turns what a gateway said, or that it said nothing, into an error for people.
fn denied(address: &AdminAddress, status: &Status) -> anyhow::Error {
    let said = match status.message() {
        "" => status.code().description(),
        message => message,
    };
    match status.code() {
        Code::NotFound => misconfigured(anyhow!(said.to_owned())),
        Code::Unimplemented if !said.contains("SIGTERM") => misconfigured(anyhow!(
            "{} serves clients, not operators: give the --admin-listen of a gateway as --admin",
            address.admin
        )),
        Code::Unavailable if is_broken(status) && said.starts_with("worker") => {
            anyhow!(said.to_owned())
        }
        _ if is_broken(status) => anyhow!(said.to_owned()).context(unanswered(address)),
        _ => anyhow!(said.to_owned()),
    }
}
