//! Streams, what they should be, and when their tokens came.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use tercet_proto::v1::{GenerateRequest, generate_request::Input};
use tercet_tests::{Client, Completion, Dice, collect, sampled};
use tokio::{
    task::JoinSet,
    time::{self, Instant},
};

use super::cluster::{Cluster, PREFILL_MICROS, RATE};

/// Requests to draw from.
const REQUESTS: u64 = 48;
/// Streams begin within this time.
const BEGINS: std::ops::Range<u32> = 0..150;

/// Requests and their undisturbed completions.
pub(super) struct Pool {
    requests: Vec<GenerateRequest>,
    completions: Vec<Completion>,
}

/// A stream that has completed.
pub(super) struct Stream {
    pub(super) seed: u64,
    prompt_tokens: u32,
    opened: Instant,
    /// When each token came.
    tokens: Vec<Instant>,
    /// Where it went on at another worker.
    pub(super) resumed: Vec<usize>,
}

/// Streams under way.
pub(super) struct Running(JoinSet<Result<(usize, Stream, Completion)>>);

impl Pool {
    /// Returns requests for synthetic workers, of all lengths, some of which end early.
    pub(super) fn synthetic() -> Self {
        let mut dice = Dice::new(1);
        let requests = (0..REQUESTS).map(|seed| {
            let length = usize::try_from(dice.between(1, 400)).expect("small");
            let prompt = "All the world's a stage ".chars().cycle().take(length).collect();
            let most = dice.between(120, 400);
            let mut request = sampled(Input::Prompt(prompt), seed, most);
            let stop = request.stop.get_or_insert_default();
            stop.ignore_eos = Some(dice.once_in(2));
            // Hits some of them.
            stop.token_ids = (3..23).collect();
            request
        });
        Self { requests: requests.collect(), completions: Vec::new() }
    }

    /// Returns requests for the demo model.
    pub(super) fn demo() -> Self {
        let speakers = ["KING HENRY", "HAMLET", "ROMEO", "JULIET", "FALSTAFF", "OTHELLO", "LEAR"];
        let requests = (0_u64..16).map(|seed| {
            let speaker = speakers[usize::try_from(seed).expect("small") % speakers.len()];
            let prompt = Input::Prompt(format!("{speaker}.\n"));
            let mut request = sampled(prompt, seed, 200);
            // Withheld text must survive a move too.
            request.stop.get_or_insert_default().strings = vec!["\n\nTHE END OF ALL".to_owned()];
            request
        });
        Self { requests: requests.collect(), completions: Vec::new() }
    }

    /// Learns what each request comes to while nothing happens.
    pub(super) async fn run_undisturbed(&mut self, cluster: &mut Cluster) -> Result<()> {
        for requests in self.requests.chunks(super::STREAMS) {
            let mut streams = JoinSet::new();
            for (number, request) in requests.iter().cloned().enumerate() {
                streams.spawn(stream(cluster.client().clone(), number, request, Duration::ZERO));
            }
            let mut completions = vec![None; requests.len()];
            while let Some(ended) = streams.join_next().await {
                let (number, _, completion) = ended??;
                completions[number] = Some(completion);
            }
            self.completions.extend(completions.into_iter().flatten());
        }
        // So that its lines are of the trials only.
        cluster.attribute(&mut []);
        ensure!(self.completions.len() == self.requests.len());
        Ok(())
    }

    /// Begins different streams at random moments.
    pub(super) fn begin(&self, client: &Client, dice: &mut Dice, count: usize) -> Running {
        let mut numbers: Vec<usize> = (0..self.requests.len()).collect();
        let mut streams = JoinSet::new();
        for _ in 0..count.min(numbers.len()) {
            let left = u32::try_from(numbers.len()).expect("small");
            let number =
                numbers.swap_remove(usize::try_from(dice.between(0, left)).expect("small"));
            let request = self.requests[number].clone();
            streams.spawn(stream(client.clone(), number, request, dice.millis(BEGINS)));
        }
        Running(streams)
    }
}

impl Running {
    /// Waits for all streams and holds them to their undisturbed completions.
    pub(super) async fn join(&mut self, pool: &Pool) -> Result<Vec<Stream>> {
        let mut streams = Vec::new();
        while let Some(ended) = self.0.join_next().await {
            let (number, stream, completion) = ended??;
            let expected = &pool.completions[number];
            ensure!(completion == *expected, "{completion:?}\nis not {expected:?}");
            streams.push(stream);
        }
        Ok(streams)
    }
}

async fn stream(
    client: Client,
    number: usize,
    request: GenerateRequest,
    after: Duration,
) -> Result<(usize, Stream, Completion)> {
    time::sleep(after).await;
    let seed = request.sampling.as_ref().and_then(|sampling| sampling.seed).unwrap_or_default();
    let opened = Instant::now();
    let mut tokens = Vec::new();
    let messages = client.open(request).await.with_context(|| format!("open stream {seed}"))?;
    let completion = collect(messages, |delta| {
        tokens.extend(delta.token_ids.iter().map(|_| Instant::now()));
    });
    let completion = completion.await.with_context(|| format!("stream {seed}"))?;
    let prompt_tokens = completion.started.prompt_tokens;
    Ok((number, Stream { seed, prompt_tokens, opened, tokens, resumed: Vec::new() }, completion))
}

impl Stream {
    /// Returns how long each move took: the time without a token, less that of one token and of
    /// computing those before.
    pub(super) fn recoveries(&self) -> impl Iterator<Item = Duration> {
        let pace = Duration::from_secs_f64(1.0 / RATE);
        self.resumed.iter().map(move |&index| {
            let before = index.checked_sub(1).map_or(self.opened, |before| self.tokens[before]);
            // A stream that resumes behind its last token has nothing to wait for.
            let gap = self.tokens.get(index).map_or(Duration::ZERO, |token| *token - before);
            let computed = u64::from(self.prompt_tokens) + u64::try_from(index).unwrap_or(u64::MAX);
            gap.saturating_sub(pace + Duration::from_micros(PREFILL_MICROS * computed))
        })
    }

    /// Returns the longest time in which nothing came.
    pub(super) fn longest_pause(&self) -> Duration {
        let before = std::iter::once(&self.opened).chain(&self.tokens);
        before.zip(&self.tokens).map(|(before, token)| *token - *before).max().unwrap_or_default()
    }
}
