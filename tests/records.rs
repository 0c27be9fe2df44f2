//! What keeps workers in use.

use std::{fs, path::Path, process::Command, time::Duration};

use anyhow::{Context as _, Result, ensure};
use tercet_proto::v1::{GenerateRequest, generate_request::Input};
use tercet_tests::{Client, Etcd, PATIENCE, Scratch, Tercet, metric, run, sampled, tool};
use tokio::time;

const MAX_TOKENS: u32 = 400;

fn request(seed: u64) -> GenerateRequest {
    sampled(Input::Prompt("KING HENRY.\n".to_owned()), seed, MAX_TOKENS)
}

/// Waits until something holds that the gateway's metrics tell.
async fn until(what: &str, holds: impl Fn() -> Result<bool>) -> Result<()> {
    let wait = async {
        while !holds()? {
            time::sleep(Duration::from_millis(5)).await;
        }
        Ok(())
    };
    let told = time::timeout(PATIENCE, wait).await;
    told.with_context(|| format!("{what}: not within {PATIENCE:?}"))?
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_record_takes_no_worker_away_that_answers() -> Result<()> {
    let Some(grpcurl) = tool("grpcurl") else { return Ok(()) };
    let Some(etcd) = Etcd::start()? else { return Ok(()) };
    let url = etcd.url();
    let cluster = ["--etcd", &url, "--cluster", "records", "--listen", "127.0.0.1:0"];
    let mut worker = Tercet::start(["worker", "--threads", "1"].iter().chain(&cluster))?;
    let gateway = ["gateway", "--metrics-listen", "127.0.0.1:0", "--worker-wait", "1s"];
    let mut gateway = Tercet::start(gateway.iter().chain(&cluster))?;
    let metrics = gateway.listener("metrics")?;
    for part in [&worker, &gateway] {
        part.serving().await?;
    }
    let client = Client::connect(gateway.address()).await?;
    let expected = client.generate(request(1)).await?;

    forget_workers(&grpcurl, url.strip_prefix("http://").context("no http")?)?;
    let kept = || metric(&metrics, "tercet_workers_kept", &[]);
    until("it is kept", || Ok(kept()? == 1.0)).await?;
    ensure!(metric(&metrics, "tercet_workers", &[])? == 1.0, "it is still chosen");
    ensure!(client.generate(request(1)).await? == expected);

    // It is dropped once it is really gone.
    worker.process().kill()?;
    until("it is dropped", || Ok(kept()? == 0.0)).await?;
    ensure!(client.generate(request(1)).await.is_err(), "nobody is there");
    Ok(())
}

/// What of etcd's service [`forget_workers`] needs.
const DELETE_RANGE: &str = r#"
syntax = "proto3";
package etcdserverpb;
service KV { rpc DeleteRange(DeleteRangeRequest) returns (DeleteRangeResponse); }
message DeleteRangeRequest { bytes key = 1; bytes range_end = 2; }
message DeleteRangeResponse { int64 deleted = 2; }
"#;

/// Deletes the records of all workers from etcd, as if their leases had lapsed.
fn forget_workers(grpcurl: &Path, etcd: &str) -> Result<()> {
    let directory = Scratch::new("forget")?;
    fs::write(directory.path().join("kv.proto"), DELETE_RANGE)?;
    let mut call = Command::new(grpcurl);
    call.arg("-plaintext").arg("-import-path").arg(directory.path()).args(["-proto", "kv.proto"]);
    // `/tercet/` up to `/tercet0`, in base64.
    call.args(["-d", r#"{"key":"L3RlcmNldC8=","range_end":"L3RlcmNldDA="}"#]);
    let deleted = run(call.args([etcd, "etcdserverpb.KV/DeleteRange"]))?;
    ensure!(deleted.contains("\"deleted\": \"1\""), "{deleted}");
    Ok(())
}
