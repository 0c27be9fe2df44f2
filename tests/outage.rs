//! etcd is away for long, and no request fails.

use std::{
    env,
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use futures::future::try_join_all;
use serde_json::Value;
use tercet_cluster::{EtcdOptions, EtcdRegistry, Registry as _, View, WorkerId};
use tercet_proto::v1::{GenerateRequest, generate_request::Input};
use tercet_tests::{
    Client, EtcdTrio, PATIENCE, Process, Tercet, helper, http_post, measured, metric,
    relay::{self, Conditions, Relay},
    sampled, serving,
    synthetic::Options,
};
use tokio::{
    sync::watch,
    task::JoinSet,
    time::{self, Instant},
};

/// Streams at once, each followed by the next.
const STREAMS: u64 = 16;
/// Tokens of each: about half a second's worth.
const TOKENS: u32 = 50;
/// Within what time of etcd's return membership is right.
const RETURN: Duration = Duration::from_secs(5);

/// How long it is away; `TERCET_OUTAGE_SECONDS` makes it as long as an operator would see.
fn outage() -> Result<Duration> {
    let seconds = env::var("TERCET_OUTAGE_SECONDS").ok();
    let seconds = seconds.map_or(Ok(8), |seconds| seconds.parse()).context("whole seconds")?;
    Ok(Duration::from_secs(seconds))
}

fn request(stream: u64) -> GenerateRequest {
    sampled(Input::Prompt(format!("{stream} or not {stream}")), stream, TOKENS)
}

/// Generates one completion after the other, until told to stop, and holds each to the first.
async fn load(
    client: Client,
    stream: u64,
    done: Arc<AtomicUsize>,
    stop: watch::Receiver<bool>,
) -> Result<()> {
    let first = client.generate(request(stream)).await?;
    while !*stop.borrow() {
        let next = client.generate(request(stream)).await;
        let count = done.fetch_add(1, Ordering::Relaxed);
        let next = next.with_context(|| format!("stream {stream}, after {count} of all"))?;
        ensure!(next == first, "stream {stream}: {next:?} is not {first:?}");
    }
    Ok(())
}

/// Makes the store forget all that came before a change made now.
fn compact(etcd: &str) -> Result<()> {
    let put = http_post(etcd, "/v3/kv/put", r#"{"key": "Zm9v", "value": "YmFy"}"#)?;
    let (_, body) = put.split_once("\r\n\r\n").context("a response has a head")?;
    let body = body.get(body.find('{').unwrap_or(0)..=body.rfind('}').unwrap_or(0));
    let answer: Value = serde_json::from_str(body.unwrap_or_default()).context(put.clone())?;
    let revision = answer["header"]["revision"].as_str().context(put.clone())?;
    let request = format!(r#"{{"revision": "{revision}", "physical": true}}"#);
    let compacted = http_post(etcd, "/v3/kv/compaction", &request)?;
    ensure!(compacted.starts_with("HTTP/1.1 200"), "{compacted}");
    Ok(())
}

struct Bench {
    etcd: EtcdTrio,
    relays: Vec<Relay>,
    urls: String,
}

impl Bench {
    async fn start() -> Result<Option<Self>> {
        let Some(etcd) = EtcdTrio::start()? else { return Ok(None) };
        let relays = etcd.addresses().map(|address| Relay::start("127.0.0.1:0", address));
        let relays = try_join_all(relays).await?;
        let urls = relays.iter().map(|relay| format!("http://{}", relay.address()));
        let urls = urls.collect::<Vec<_>>().join(",");
        Ok(Some(Self { etcd, relays, urls }))
    }

    /// Starts a worker that does not wait for etcd.
    fn worker(&self, id: &str) -> Result<(Process, String)> {
        let etcd = self.urls.split(',').map(str::to_owned).collect();
        let options = Options { etcd, ..Options::new(id.parse()?) };
        let mut command = Command::new(helper("synthetic-worker"));
        let mut process = Process::start(id, command.args(options.args()))?;
        let address = process.line("line `listening on`", |line| {
            line.strip_prefix("listening on ").map(str::to_owned)
        })?;
        Ok((process, address))
    }

    /// Lets nothing through between etcd and all others, or everything.
    fn stall(&self, stalled: bool) {
        for relay in &self.relays {
            relay.obey(relay::Command::Conditions(Conditions { stalled, ..Conditions::default() }));
        }
    }
}

fn is_right(view: &View, expected: &[&str]) -> bool {
    view.current && view.workers.keys().map(WorkerId::as_str).eq(expected.iter().copied())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_request_fails_while_etcd_is_away() -> Result<()> {
    let Some(mut bench) = Bench::start().await? else { return Ok(()) };
    let (mut doomed, address) = bench.worker("doomed")?;
    let (_first, other) = bench.worker("first")?;
    let gateway = ["gateway", "--listen", "127.0.0.1:0", "--metrics-listen", "127.0.0.1:0"];
    let mut gateway = Tercet::start(gateway.into_iter().chain(["--etcd", &bench.urls]))?;
    let metrics = gateway.listener("metrics")?;
    for address in [&address, &other] {
        serving(address).await?;
    }
    gateway.serving().await?;
    let urls = bench.urls.split(',').map(str::to_owned).collect();
    let registry = EtcdRegistry::connect(EtcdOptions::new(urls, "default".parse()?))?;
    let mut views = registry.watch();
    let both = |view: &Arc<View>| is_right(view, &["doomed", "first"]);
    time::timeout(PATIENCE, views.wait_for(both)).await??;

    let (stop, stopped) = watch::channel(false);
    let done = Arc::new(AtomicUsize::new(0));
    let mut streams = JoinSet::new();
    let client = Client::connect(gateway.address()).await?;
    for stream in 0..STREAMS {
        streams.spawn(load(client.clone(), stream, Arc::clone(&done), stopped.clone()));
    }
    for member in 0..3 {
        time::sleep(Duration::from_millis(500)).await;
        bench.etcd.kill(member)?;
    }
    // Away: a worker dies with its streams, another one comes, and what can be used is used.
    let away = Instant::now();
    time::sleep(outage()? / 2).await;
    let before = done.load(Ordering::Relaxed);
    doomed.kill()?;
    let _late = bench.worker("late")?;
    time::sleep_until(away + outage()?).await;
    let during = done.load(Ordering::Relaxed) - before;
    ensure!(during > 0, "no request was answered while etcd was away and a worker dead");
    ensure!(!views.borrow().current, "etcd is not away");

    // Back, but out of reach, with its history forgotten.
    bench.stall(true);
    bench.etcd.restart()?;
    compact(&bench.etcd.addresses()[0])?;
    let back = Instant::now();
    bench.stall(false);
    let right = |view: &Arc<View>| is_right(view, &["first", "late"]);
    let is_right = time::timeout(PATIENCE, views.wait_for(right)).await.is_ok();
    ensure!(is_right, "still {:?}", *views.borrow());
    let took = back.elapsed();
    while metric(&metrics, "tercet_workers", &[])? != 2.0 {
        ensure!(back.elapsed() < PATIENCE, "the gateway does not route to the new worker");
        time::sleep(Duration::from_millis(10)).await;
    }
    let routed = back.elapsed();
    stop.send_replace(true);
    while let Some(ended) = streams.join_next().await {
        ended??;
    }
    let done = done.load(Ordering::Relaxed);
    measured(&format!(
        "etcd away for {:?} under {STREAMS} streams: {done} completions, none failed; membership \
         right {took:?} after its return, routed to after {routed:?}",
        back - away,
    ));
    ensure!(took < RETURN, "membership was right after {took:?} only");
    Ok(())
}
