//! Everything is restarted, one after another, and no client notices.

use std::{
    io::{BufRead as _, BufReader, Read as _},
    ops::Range,
    process::Stdio,
    sync::Arc,
};

use anyhow::{Context as _, Result, bail, ensure};
use tercet_proto::v1::{GenerateRequest, generate_request::Input, generate_response::Event};
use tercet_tests::{
    Client, Etcd, PATIENCE, Process, Tercet, measured, metric, python, sampled,
    synthetic::{Options, SyntheticWorker},
};
use tokio::{
    sync::watch,
    task::{JoinSet, block_in_place, spawn_blocking},
    time,
};
use tokio_util::sync::CancellationToken;

const GATEWAYS: usize = 2;
const WORKERS: usize = 3;
/// Different requests; each is asked again and again.
const SEEDS: Range<u64> = 0..8;
const PROMPT: &str = "KING HENRY.";
/// Where a stream of the Python client is in its middle.
const MIDDLE: Range<usize> = 50..300;
/// Between two looks at a gateway's metrics.
const POLL: time::Duration = time::Duration::from_millis(50);
/// Streams get so long to finish: less than they take.
const DRAIN_MILLIS: u64 = 300;

/// What is asked of the cluster, and what comes of it while nothing happens.
struct Load {
    /// Rust clients at once.
    clients: usize,
    /// Of the Rust clients, by seed.
    answers: Vec<(GenerateRequest, Answer)>,
    /// Of the Python client, whose completions are longer.
    long: (GenerateRequest, Answer),
}

#[derive(Clone, Debug, PartialEq)]
struct Answer {
    ids: Vec<u32>,
    text: String,
    reason: i32,
}

/// A cluster whose parts keep their addresses when they start anew.
struct Cluster {
    gateways: Vec<Tercet>,
    workers: Vec<Worker>,
    etcd: Etcd,
    name: &'static str,
    start_worker: StartWorker,
}

enum Worker {
    Synthetic(SyntheticWorker),
    Engine(Tercet),
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rolling_restart_of_everything_is_invisible() -> Result<()> {
    let Some(etcd) = Etcd::start()? else { return Ok(()) };
    let cluster = Cluster::start(etcd, "rolling", |url, number, address| {
        let options = Options {
            etcd: vec![url.to_owned()],
            cluster: "rolling".parse()?,
            listen: address.unwrap_or("127.0.0.1:0").to_owned(),
            rate: 100.0,
            prefill_micros: 20,
            drain_millis: DRAIN_MILLIS,
            ..Options::new(format!("worker-{number}").parse()?)
        };
        let mut worker = SyntheticWorker::start(&options)?;
        worker.registered()?;
        Ok(Worker::Synthetic(worker))
    })
    .await?;
    let load = Load::learn(&cluster, 8, 200, 800).await?;
    roll(cluster, load, true).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rolling_restart_of_engines_is_invisible() -> Result<()> {
    let Some(etcd) = Etcd::start()? else { return Ok(()) };
    let cluster = Cluster::start(etcd, "engines", |url, number, address| {
        let (id, drain) = (format!("worker-{number}"), format!("{DRAIN_MILLIS}ms"));
        let listen = address.unwrap_or("127.0.0.1:0");
        // The portable code: slow enough for streams to be in progress.
        let args = ["worker", "--threads", "1", "--isa", "scalar", "--id", &id, "--listen", listen];
        let shared = ["--etcd", url, "--cluster", "engines", "--drain-timeout", &drain];
        Ok(Worker::Engine(Tercet::start(args.into_iter().chain(shared))?))
    })
    .await?;
    let load = Load::learn(&cluster, 3, 300, 600).await?;
    // Too fast for the Python client to be surely in the middle of a stream.
    roll(cluster, load, false).await
}

type StartWorker = fn(&str, usize, Option<&str>) -> Result<Worker>;

impl Cluster {
    async fn start(etcd: Etcd, name: &'static str, start: StartWorker) -> Result<Self> {
        let url = etcd.url();
        let workers = (0..WORKERS).map(|number| start(&url, number, None));
        let workers = workers.collect::<Result<Vec<_>>>()?;
        let mut cluster = Self { gateways: Vec::new(), workers, etcd, name, start_worker: start };
        for worker in &cluster.workers {
            worker.serving().await?;
        }
        for _ in 0..GATEWAYS {
            let gateway = cluster.start_gateway("127.0.0.1:0")?;
            gateway.serving().await?;
            cluster.gateways.push(gateway);
        }
        Ok(cluster)
    }

    /// Restarts a worker and returns when all gateways have it back.
    async fn restart_worker(&mut self, number: usize) -> Result<()> {
        let worker = &mut self.workers[number];
        let address = worker.address().to_owned();
        terminate(worker.process())?;
        *worker = block_in_place(|| (self.start_worker)(&self.etcd.url(), number, Some(&address)))?;
        worker.serving().await?;
        for gateway in &mut self.gateways {
            let metrics = gateway.listener("metrics")?;
            let back = async {
                while metric(&metrics, "tercet_workers", &[])? < WORKERS as f64 {
                    time::sleep(POLL).await;
                }
                anyhow::Ok(())
            };
            time::timeout(PATIENCE, back).await.context("the worker does not come back")??;
        }
        Ok(())
    }

    async fn restart_gateway(&mut self, number: usize) -> Result<()> {
        let address = self.gateways[number].address().to_owned();
        terminate(self.gateways[number].process())?;
        self.gateways[number] = self.start_gateway(&address)?;
        self.gateways[number].serving().await
    }

    /// Returns how many streams the gateways have moved since they started.
    fn moves(&mut self) -> Result<f64> {
        let moved = self
            .gateways
            .iter_mut()
            .map(|gateway| metric(&gateway.listener("metrics")?, "tercet_stream_moves_total", &[]));
        moved.sum()
    }

    fn start_gateway(&self, listen: &str) -> Result<Tercet> {
        let (url, drain) = (self.etcd.url(), format!("{DRAIN_MILLIS}ms"));
        let args = ["gateway", "--listen", listen, "--metrics-listen", "127.0.0.1:0"];
        let shared = ["--etcd", &url, "--cluster", self.name, "--drain-timeout", &drain];
        Tercet::start(args.into_iter().chain(shared))
    }

    fn addresses(&self) -> Vec<String> {
        self.gateways.iter().map(|gateway| gateway.address().to_owned()).collect()
    }
}

impl Worker {
    fn address(&self) -> &str {
        match self {
            Self::Synthetic(worker) => worker.address(),
            Self::Engine(worker) => worker.address(),
        }
    }

    fn process(&mut self) -> &mut Process {
        match self {
            Self::Synthetic(worker) => worker.process(),
            Self::Engine(worker) => worker.process(),
        }
    }

    async fn serving(&self) -> Result<()> {
        tercet_tests::serving(self.address()).await
    }
}

/// Ends a process as an operator does.
fn terminate(process: &mut Process) -> Result<()> {
    process.signal("TERM")?;
    let status = block_in_place(|| process.wait())?;
    ensure!(status.success(), "{status}\n{}", process.said());
    Ok(())
}

impl Load {
    async fn learn(
        cluster: &Cluster,
        clients: usize,
        max_tokens: u32,
        long_tokens: u32,
    ) -> Result<Self> {
        let client = Client::connect(cluster.gateways[0].address()).await?;
        let mut answers = Vec::new();
        let lengths = SEEDS.map(|_| max_tokens).chain([long_tokens]);
        for (seed, max_tokens) in (SEEDS.start..).zip(lengths) {
            let request = sampled(Input::Prompt(PROMPT.to_owned()), seed, max_tokens);
            let answer = client.generate(request.clone()).await?;
            let reason = answer.finished.reason;
            answers.push((request, Answer { ids: answer.ids, text: answer.text, reason }));
        }
        let long = answers.pop().context("no seeds")?;
        Ok(Self { clients, answers, long })
    }
}

/// Restarts everything under load. `is_slow` says that a Python client surely notices.
async fn roll(mut cluster: Cluster, load: Load, is_slow: bool) -> Result<()> {
    let (load, over) = (Arc::new(load), CancellationToken::new());
    let mut clients = JoinSet::new();
    let mut completed = Vec::new();
    for number in 0..load.clients {
        let (count, counted) = watch::channel(0_usize);
        completed.push(counted);
        let mut addresses = cluster.addresses();
        addresses.rotate_left(number % GATEWAYS);
        let (load, over) = (Arc::clone(&load), over.clone());
        clients.spawn(rust_client(number, addresses, load, over, count));
    }
    let (count, mut python_tokens) = watch::channel(0_usize);
    let python = spawn_python(cluster.addresses(), Arc::clone(&load), over.clone(), count);
    let has_python = python.is_some();

    let (mut moves, parts) = (0.0, WORKERS + GATEWAYS);
    for part in 0..parts {
        // What was in progress is over before the next part goes.
        for count in &mut completed {
            let before = *count.borrow_and_update();
            let next = time::timeout(PATIENCE, count.wait_for(|now| *now > before)).await;
            if !matches!(next, Ok(Ok(_))) {
                over.cancel();
                let ended = clients.join_next().await.context("no client")?;
                bail!("a client stands still; one ended with {:?}", ended?);
            }
        }
        match part.checked_sub(WORKERS) {
            None => cluster.restart_worker(part).await?,
            Some(gateway) => {
                if has_python {
                    // It begins at the first gateway, and is in the middle of its stream.
                    let middle = python_tokens.wait_for(|tokens| MIDDLE.contains(tokens));
                    time::timeout(PATIENCE, middle).await.context("the Python client")??;
                }
                // Its counts go with it.
                moves = f64::max(moves, cluster.moves()?);
                cluster.restart_gateway(gateway).await?;
            }
        }
    }
    over.cancel();
    let (mut streams, mut resumes) = (0, 0);
    while let Some(ended) = clients.join_next().await {
        let (of_client, resumed) = ended??;
        streams += of_client;
        resumes += resumed;
    }
    ensure!(moves > 0.0, "no worker had a stream when it stopped");
    ensure!(resumes > 0, "no gateway had a stream when it stopped");
    let in_python = match python {
        Some(python) => python.await??.matches("resuming").count(),
        None => 0,
    };
    ensure!(in_python > 0 || !has_python || !is_slow, "nothing happened to the Python client");
    measured(&format!(
        "{streams} streams over a restart of {WORKERS} workers and {GATEWAYS} gateways: {moves} \
         moved by gateways, {resumes} resumed by the Rust client, {in_python} by the Python one"
    ));
    Ok(())
}

/// Asks until it is over; returns how many completions came and how often one was resumed.
async fn rust_client(
    number: usize,
    addresses: Vec<String>,
    load: Arc<Load>,
    over: CancellationToken,
    completed: watch::Sender<usize>,
) -> Result<(usize, usize)> {
    let client = tercet_client::Client::new(addresses, tercet_client::Options::default())?;
    let mut resumes = 0;
    for (request, expected) in load.answers.iter().cycle().skip(number) {
        let mut generation = client.generate(request.clone()).await?;
        let (mut ids, mut text, mut reason) = (Vec::new(), String::new(), 0);
        while let Some(event) = generation.next().await? {
            match event {
                Event::Delta(delta) => {
                    ensure!(usize::try_from(delta.index)? == ids.len(), "client {number}");
                    ids.extend(delta.token_ids);
                    text.push_str(&delta.text);
                }
                Event::Finished(finished) => reason = finished.reason,
                Event::Started(_) | Event::Prompt(_) => {}
            }
        }
        let answer = Answer { ids, text, reason };
        ensure!(answer == *expected, "client {number}: {answer:?}\nis not {expected:?}");
        resumes += generation.resumes();
        completed.send_modify(|completed| *completed += 1);
        if over.is_cancelled() {
            break;
        }
    }
    let streams = *completed.borrow();
    Ok((streams, resumes))
}

/// Runs the Python client again and again until it is over, and counts the tokens of each run; what
/// it said on stderr comes of it.
fn spawn_python(
    addresses: Vec<String>,
    load: Arc<Load>,
    over: CancellationToken,
    tokens: watch::Sender<usize>,
) -> Option<tokio::task::JoinHandle<Result<String>>> {
    python("tests/clients/resume.py", "grpc")?;
    Some(spawn_blocking(move || {
        let (request, expected) = &load.long;
        let seed = request.sampling.as_ref().and_then(|sampling| sampling.seed);
        let max_tokens = request.stop.as_ref().and_then(|stop| stop.max_tokens);
        let (seed, max_tokens) =
            (seed.unwrap_or(0).to_string(), max_tokens.unwrap_or(0).to_string());
        let mut told = String::new();
        while !over.is_cancelled() {
            let mut command =
                python("tests/clients/resume.py", "grpc").context("the client is gone")?;
            command.args(&addresses).args(["--prompt", PROMPT, "--seed", &seed]);
            command.args(["--max-tokens", &max_tokens, "--ignore-eos", "--ids"]);
            command.stdout(Stdio::piped()).stderr(Stdio::piped());
            let mut client = command.spawn().context("run python3")?;
            let mut ids: Vec<u32> = Vec::new();
            for line in BufReader::new(client.stdout.take().context("no stdout")?).lines() {
                ids.push(line?.parse()?);
                tokens.send_replace(ids.len());
            }
            client.stderr.take().context("no stderr")?.read_to_string(&mut told)?;
            let status = client.wait()?;
            ensure!(status.success(), "{status}\n{told}");
            ensure!(ids == expected.ids, "{ids:?}\nis not {:?}\n{told}", expected.ids);
        }
        Ok(told)
    }))
}
