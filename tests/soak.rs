//! 64 clients ask for everything at once, change their minds, and are answered as if each was
//! alone; afterwards nothing is left of them.
//!
//! `TERCET_SOAK_SECONDS` sets how long, `TERCET_SOAK_SEED` repeats a run: what each client asks and
//! when it gives up, in tokens.

use std::{
    env, fs,
    ops::AddAssign,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context as _, Result, bail, ensure};
use tercet_proto::v1::GenerateRequest;
use tercet_tests::{
    Answer, Client, Dice, PATIENCE, Reference, Source, Tercet, collect_from, full, measured,
    metric, workspace,
};
use tokio::{
    sync::Notify,
    task::JoinSet,
    time::{self, Instant},
};
use tonic::{Code, Request, Status};

const CLIENTS: u64 = 64;
/// Room for two sequences of the whole context: there is never enough for all.
const KV_MEMORY: &str = "--kv-memory=6MiB";
/// That many pages: 3 layers of 2 heads of 64 elements make 196,608 bytes of each.
const PAGES: f64 = 32.0;

fn serve(limits: &[&str]) -> Result<Tercet> {
    let serve = ["serve", "--listen=127.0.0.1:0", "--metrics-listen=127.0.0.1:0", "--threads=2"];
    Tercet::start(serve.iter().chain(limits))
}

/// Draws what to ask, and asks a server that does nothing else, one after the other.
async fn references(dice: &mut Dice, count: usize) -> Result<Vec<Reference>> {
    let text = fs::read_to_string(workspace().join("tests/fixtures/demo-model/heldout.txt"))?;
    let source = Source { model: "", vocab: 1000, context: 1024, text: &text, chat: true };
    let server = serve(&["--kv-memory=64MiB"])?;
    server.serving().await?;
    let client = Client::connect(server.address()).await?;
    let mut references = Vec::new();
    for _ in 0..count {
        references.push(Reference::ask(&client, source.draw(dice)).await?);
    }
    Ok(references)
}

/// What became of streams.
#[derive(Clone, Copy, Debug, Default)]
struct Outcomes {
    completed: u64,
    cancelled: u64,
    expired: u64,
    resumed: u64,
    tokens: usize,
}

impl AddAssign for Outcomes {
    fn add_assign(&mut self, other: Self) {
        self.completed += other.completed;
        self.cancelled += other.cancelled;
        self.expired += other.expired;
        self.resumed += other.resumed;
        self.tokens += other.tokens;
    }
}

/// One client, until the time is over.
async fn client(
    address: String,
    references: Arc<Vec<Reference>>,
    mut dice: Dice,
    until: Instant,
) -> Result<Outcomes> {
    let client = Client::connect(&address).await?;
    let mut outcomes = Outcomes::default();
    while Instant::now() < until {
        let mut reference = dice.pick(&references).clone();
        let mut asked = Outcomes::default();
        if dice.between(0, 4) == 0 {
            let index = *dice.pick(&reference.resumable());
            reference = reference.resumed(index).1;
            asked.resumed = 1;
        }
        asked += match dice.between(0, 10) {
            0..2 => cancelled(&client, &reference, &mut dice).await?,
            2..4 => expired(&client, &reference, &mut dice).await?,
            _ => {
                reference.repeat(&client).await?;
                Outcomes { completed: 1, tokens: reference.answer.ids.len(), ..Outcomes::default() }
            }
        };
        outcomes += asked;
    }
    Ok(outcomes)
}

/// Returns how many tokens the request of a reference goes on after.
fn first(reference: &Reference) -> usize {
    reference.request.resume.as_ref().map_or(0, |resume| resume.token_ids.len())
}

/// Goes away after some tokens, or before the first.
async fn cancelled(client: &Client, reference: &Reference, dice: &mut Dice) -> Result<Outcomes> {
    let length = u32::try_from(reference.answer.ids.len())?;
    let enough = usize::try_from(dice.between(0, length + 1))?;
    let (mut got, gone) = (Answer::default(), Notify::new());
    if enough == 0 {
        gone.notify_one();
    }
    let stream = client.open(reference.request.clone()).await?;
    let reading = collect_from(stream, first(reference), |delta| {
        got.push(delta);
        if got.ids.len() >= enough {
            gone.notify_one();
        }
    });
    let ended = tokio::select! {
        biased;
        () = gone.notified() => None,
        ended = reading => Some(ended?),
    };
    match ended {
        // More may have been there to read than was wanted, even all.
        Some(completion) => {
            got.finish(&completion)?;
            reference.check(&got)?;
        }
        None => reference.check_part(&got)?,
    }
    Ok(Outcomes { cancelled: 1, tokens: got.ids.len(), ..Outcomes::default() })
}

/// Has little time.
async fn expired(client: &Client, reference: &Reference, dice: &mut Dice) -> Result<Outcomes> {
    let mut request: Request<GenerateRequest> = Request::new(reference.request.clone());
    request.set_timeout(Duration::from_millis(dice.between(1, 2000).into()));
    let mut got = Answer::default();
    let ended = match client.open(request).await {
        Ok(stream) => collect_from(stream, first(reference), |delta| got.push(delta)).await,
        Err(error) => Err(error),
    };
    let tokens = got.ids.len();
    match ended {
        Ok(completion) => {
            got.finish(&completion)?;
            reference.check(&got)?;
            Ok(Outcomes { completed: 1, tokens, ..Outcomes::default() })
        }
        Err(error) => {
            let code = error.downcast_ref::<Status>().map(Status::code);
            // The client's own clock may be the first to notice.
            if !matches!(code, Some(Code::DeadlineExceeded | Code::Cancelled)) {
                return Err(error);
            }
            reference.check_part(&got)?;
            Ok(Outcomes { expired: 1, tokens, ..Outcomes::default() })
        }
    }
}

/// Waits until nothing is referred to, looks at what is kept, and returns its pages.
async fn rest(metrics: &str) -> Result<f64> {
    let pages = |state| metric(metrics, "tercet_kv_pages", &[&format!("state=\"{state}\"")]);
    let sequences = |state| metric(metrics, "tercet_sequences", &[&format!("state=\"{state}\"")]);
    let deadline = Instant::now() + PATIENCE;
    loop {
        let left = [pages("used")?, sequences("running")?, sequences("waiting")?];
        if left == [0.0; 3] {
            break;
        }
        if Instant::now() > deadline {
            bail!("pages, running and waiting sequences stay: {left:?}");
        }
        time::sleep(Duration::from_millis(100)).await;
    }
    let (cached, free) = (pages("cached")?, pages("free")?);
    ensure!(cached > 0.0 && cached + free == PAGES, "{cached} + {free} of {PAGES} pages");
    Ok(cached)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn streams_of_all_kinds_are_as_if_alone_and_leave_nothing() -> Result<()> {
    let setting = |name| match env::var(name) {
        Ok(value) => value.parse::<u64>().map(Some).with_context(|| format!("{name}={value}")),
        Err(_) => Ok(None),
    };
    let now = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs();
    let seed = setting("TERCET_SOAK_SEED")?.unwrap_or(now);
    let seconds = setting("TERCET_SOAK_SECONDS")?.unwrap_or_else(|| if full() { 600 } else { 15 });
    soak(seed, seconds).await.with_context(|| format!("repeat it with TERCET_SOAK_SEED={seed}"))
}

async fn soak(seed: u64, seconds: u64) -> Result<()> {
    // In KiB: in a short run buffers still find their sizes.
    let (count, growth) = if seconds >= 300 { (240, 4 << 10) } else { (48, 16 << 10) };
    measured(&format!("TERCET_SOAK_SEED={seed}, {seconds} s"));
    let mut dice = Dice::new(seed);
    let references = Arc::new(references(&mut dice, count).await?);

    let limits = ["--max-sequences=24", "--prefill-chunk=48", KV_MEMORY];
    let mut server = serve(&limits)?;
    let metrics = server.listener("metrics")?;
    server.serving().await?;
    let before = server.process().resident()?;
    let begun = Instant::now();
    let half = begun + Duration::from_secs(seconds) / 2;
    let until = begun + Duration::from_secs(seconds);
    let mut clients = JoinSet::new();
    for nth in 0..CLIENTS {
        let dice = Dice::new(seed ^ (nth << 32));
        let address = server.address().to_owned();
        clients.spawn(client(address, Arc::clone(&references), dice, until));
    }

    // The most of each half: of the first after the time in which buffers find their sizes.
    let (mut first, mut second) = (0, 0);
    let mut outcomes = Outcomes::default();
    let mut tick = time::interval(Duration::from_millis(200));
    loop {
        tokio::select! {
            ended = clients.join_next() => match ended {
                Some(ended) => outcomes += ended??,
                None => break,
            },
            now = tick.tick() => {
                let resident = server.process().resident()?;
                let most = if now < half { &mut first } else { &mut second };
                *most = resident.max(*most);
            }
        }
    }
    let cached = rest(&metrics).await?;
    let after = server.process().resident()?;
    let preemptions = metric(&metrics, "tercet_preemptions_total", &[])?;
    let hits = metric(&metrics, "tercet_prefix_hit_tokens_total", &[])?;
    measured(&format!(
        "seed {seed}, {seconds} s: {outcomes:?}, {preemptions} preemptions, {hits} tokens of \
         prefixes; resident: {before} KiB before, at most {first} and {second} KiB in the halves, \
         {after} KiB at the end; pages: none referred to, {cached} cached of {PAGES}"
    ));

    // A run without them would show nothing.
    let Outcomes { completed, cancelled, expired, resumed, .. } = outcomes;
    for (what, number) in [("ends", completed), ("cancels", cancelled), ("deadlines", expired)] {
        ensure!(number >= 8, "{number} {what}: {outcomes:?}");
    }
    ensure!(resumed >= 8 && preemptions >= 1.0 && hits >= 64.0, "{preemptions} {hits}");
    ensure!(second <= first + growth, "memory grows: {first} KiB, then {second} KiB");
    let said = server.process().said();
    let complaint = said.lines().find(|line| line.contains("ERROR") || line.contains("panicked"));
    ensure!(complaint.is_none(), "{complaint:?}");

    // What is cached now is as good as computed.
    let client = Client::connect(server.address()).await?;
    for reference in references.iter().take(12) {
        reference.repeat(&client).await?;
    }
    rest(&metrics).await?;
    Ok(())
}
