//! A worker is told to drain, and only its operator notices.

use anyhow::{Context as _, Result, ensure};
use futures::future::try_join_all;
use serde_json::Value;
use tercet_cluster::{EtcdOptions, EtcdRegistry, Registry as _};
use tercet_proto::v1::generate_request::Input;
use tercet_tests::{
    Client, Etcd, PATIENCE, Tercet, metric, run, sampled,
    synthetic::{Omission, Options, SyntheticWorker},
};
use tokio::{task::spawn_blocking, time};

const CLUSTER: &str = "operate";

/// Runs a command of an operator.
async fn operate(args: &[&str], admin: &str) -> Result<String> {
    let mut command = Tercet::command(args.iter().chain(&["--connect", admin]));
    spawn_blocking(move || run(&mut command)).await?
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_drained_worker_hands_over_leaves_and_ends_well() -> Result<()> {
    let Some(etcd) = Etcd::start()? else { return Ok(()) };
    let url = etcd.url();
    let shared = ["--etcd", &url, "--cluster", CLUSTER, "--listen", "127.0.0.1:0"];
    // Slow enough for streams to be in progress, and less time to finish than they take.
    let slow = ["worker", "--threads", "1", "--isa", "scalar", "--drain-timeout", "100ms", "--id"];
    let worker = |id| Tercet::start(slow.iter().chain(&[id]).chain(&shared));
    let (mut first, second) = (worker("one")?, worker("two")?);
    let listeners = ["--admin-listen", "127.0.0.1:0", "--metrics-listen", "127.0.0.1:0"];
    let mut gateway = Tercet::start(["gateway"].iter().chain(&listeners).chain(&shared))?;
    let (admin, metrics) = (gateway.listener("admin")?, gateway.listener("metrics")?);
    for part in [&first, &second, &gateway] {
        part.serving().await?;
    }
    let client = Client::connect(gateway.address()).await?;
    let requests: Vec<_> =
        (0..4).map(|seed| sampled(Input::Prompt("HAMLET.".to_owned()), seed, 400)).collect();
    let all = || try_join_all(requests.iter().map(|request| client.generate(request.clone())));
    let undisturbed = all().await?;

    let drain = async {
        // Not before the worker has something to hand over.
        while status(&admin).await?["workers"][0]["streams"] == 0 {
            time::sleep(time::Duration::from_millis(20)).await;
        }
        operate(&["drain", "one", "--wait"], &admin).await
    };
    let (disturbed, told) = tokio::try_join!(all(), drain)?;
    ensure!(disturbed == undisturbed, "{disturbed:?}\nis not {undisturbed:?}");
    ensure!(metric(&metrics, "tercet_stream_moves_total", &[])? >= 1.0, "nothing was handed over");
    ensure!(told.ends_with("one has left the cluster\n"), "{told}");
    ensure!(first.process().wait()?.success(), "{}", first.process().said());
    let left = status(&admin).await?;
    ensure!(left["workers"][0]["worker_id"] == "two" && left["workers"][1].is_null(), "{left:#}");
    ensure!(left["models"][0]["ready_workers"] == 1, "{left:#}");
    let registry = EtcdRegistry::connect(EtcdOptions::new(vec![url.clone()], CLUSTER.parse()?))?;
    let mut view = registry.watch();
    let current = time::timeout(PATIENCE, view.wait_for(|view| view.current)).await??;
    let names: Vec<_> = current.workers.keys().map(|id| id.as_str().to_owned()).collect();
    ensure!(names == ["two"], "{names:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_of_an_older_release_asks_for_sigterm() -> Result<()> {
    let Some(etcd) = Etcd::start()? else { return Ok(()) };
    let url = etcd.url();
    let mut options = Options::new("old".parse()?);
    (options.etcd, options.cluster) = (vec![url.clone()], CLUSTER.parse()?);
    options.without = vec![Omission::Drain];
    let mut old = SyntheticWorker::start(&options)?;
    old.registered()?;
    let args = ["gateway", "--etcd", &url, "--cluster", CLUSTER, "--listen", "127.0.0.1:0"];
    let mut gateway = Tercet::start(args.iter().chain(&["--admin-listen", "127.0.0.1:0"]))?;
    gateway.serving().await?;
    let admin = gateway.listener("admin")?;
    let refused = operate(&["drain", "old"], &admin).await.err().context("it was told")?;
    ensure!(format!("{refused}").contains("send it SIGTERM"), "{refused}");
    old.process().signal("TERM")?;
    ensure!(old.process().wait()?.success());
    Ok(())
}

async fn status(admin: &str) -> Result<Value> {
    Ok(serde_json::from_str(&operate(&["status", "--json"], admin).await?)?)
}
