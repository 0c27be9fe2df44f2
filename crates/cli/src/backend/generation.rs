//! A text in the making, over as many servers as it takes.
//!
//! A stream that breaks is asked for again with the seed and the tokens so far, at the next server
//! or, after a pause, at the same: the text that comes is the one that would have come.

use std::time::Duration;

use anyhow::Result;
use tercet_proto::{
    is_movable, retry_after,
    v1::{
        Delta, Finished, GenerateRequest, GenerateResponse, Prompt, Resume,
        generate_response::Event,
    },
};
use tonic::{Status, Streaming};

use super::servers::Servers;

/// Attempts without a new token after which a text is given up.
const MOST_ATTEMPTS: usize = 8;
/// The first pause, once every server has been tried; each one after it is twice as long.
const FIRST_PAUSE: Duration = Duration::from_millis(250);
/// The longest pause.
const LONGEST_PAUSE: Duration = Duration::from_secs(4);

/// What comes of a generation.
#[derive(Debug)]
pub(crate) enum Piece {
    /// The prompt, in tokens, is being read.
    Prompt(u32),
    /// The prompt itself, if it was asked for.
    Echo(Prompt),
    /// More of the text; may be empty.
    Delta(Delta),
    /// The text is complete.
    Finished(Finished),
}

/// A text in the making. Dropping it cancels the computation.
#[derive(Debug)]
pub(crate) struct Generation<'a> {
    servers: &'a mut Servers,
    request: GenerateRequest,
    stream: Streaming<GenerateResponse>,
    /// Of the first `started`.
    seed: Option<u64>,
    /// Every token so far.
    ids: Vec<u32>,
    /// Attempts since the last new token.
    attempts: usize,
    /// Number of tokens, and of the stream, when the last text came without a token: a resumed
    /// stream repeats it.
    text_alone: Option<(usize, usize)>,
    /// Streams begun after the first.
    moves: usize,
    /// Whether the prompt has come back: a resumed stream repeats it.
    is_echoed: bool,
}

impl<'a> Generation<'a> {
    /// Asks for a text; each server once until one takes the request.
    pub(super) async fn start(servers: &'a mut Servers, request: GenerateRequest) -> Result<Self> {
        let mut tried = 1;
        let stream = loop {
            match servers.client().generate(request.clone()).await {
                Ok(stream) => break stream.into_inner(),
                Err(status) if is_movable(&status) && tried < servers.len() => {
                    tried += 1;
                    servers.advance();
                }
                Err(status) => return Err(servers.failure(&status)),
            }
        };
        Ok(Self {
            servers,
            request,
            stream,
            seed: None,
            ids: Vec::new(),
            attempts: 0,
            text_alone: None,
            moves: 0,
            is_echoed: false,
        })
    }

    /// Returns what comes next; `Finished` is the last.
    pub(crate) async fn next(&mut self) -> Result<Piece> {
        loop {
            let broken = match self.stream.message().await {
                Ok(Some(message)) => match message.event {
                    Some(Event::Started(started)) if self.seed.is_none() => {
                        self.seed = Some(started.seed);
                        return Ok(Piece::Prompt(started.prompt_tokens));
                    }
                    Some(Event::Delta(delta)) => {
                        if let Some(delta) = self.take(delta) {
                            return Ok(Piece::Delta(delta));
                        }
                        continue;
                    }
                    Some(Event::Prompt(prompt)) if !self.is_echoed => {
                        self.is_echoed = true;
                        return Ok(Piece::Echo(prompt));
                    }
                    Some(Event::Finished(finished)) => return Ok(Piece::Finished(finished)),
                    Some(Event::Started(_) | Event::Prompt(_)) | None => continue,
                },
                Ok(None) => {
                    Status::unavailable("the server closed the stream before the text was complete")
                }
                Err(status) => status,
            };
            self.resume(broken).await?;
        }
    }

    /// Takes new tokens in and returns what is new.
    fn take(&mut self, delta: Delta) -> Option<Delta> {
        if delta.token_ids.is_empty() {
            let at = (self.ids.len(), self.moves);
            let is_repeated =
                self.text_alone.is_some_and(|(ids, moves)| ids == at.0 && moves != at.1);
            self.text_alone = Some(at);
            return (!is_repeated).then_some(delta);
        }
        self.ids.extend_from_slice(&delta.token_ids);
        self.attempts = 0;
        Some(delta)
    }

    /// Begins a stream that goes on where the broken one ended.
    async fn resume(&mut self, mut broken: Status) -> Result<()> {
        let tokens = self.ids.len();
        if let Some(seed) = self.seed {
            self.request.resume = Some(Resume { seed, token_ids: self.ids.clone() });
        }
        loop {
            // The worker of this process does not come back.
            if !is_movable(&broken) || self.servers.address().is_none() {
                return Err(self.servers.failure(&broken));
            }
            if self.attempts == MOST_ATTEMPTS {
                return Err(self.servers.failure(&broken).context(format!(
                    "the text broke off after {tokens} tokens and could not be resumed in \
                     {MOST_ATTEMPTS} attempts"
                )));
            }
            self.attempts += 1;
            if let Some(round) = self.attempts.checked_sub(self.servers.len() + 1) {
                let asked = retry_after(&broken).unwrap_or_default();
                tokio::time::sleep(pause(round).max(asked.min(LONGEST_PAUSE))).await;
            }
            let last = self.servers.address().unwrap_or_default().to_owned();
            self.servers.advance();
            let next = self.servers.address().unwrap_or_default();
            tracing::warn!(from = last, at = next, tokens, "a stream broke, resuming");
            match self.servers.client().generate(self.request.clone()).await {
                Ok(stream) => {
                    self.stream = stream.into_inner();
                    self.moves += 1;
                    return Ok(());
                }
                Err(status) => broken = status,
            }
        }
    }
}

/// Returns how long to wait before an attempt; `round` counts those before it that waited.
fn pause(round: usize) -> Duration {
    let factor = u32::try_from(round).ok().and_then(|round| 2_u32.checked_pow(round));
    factor.map_or(LONGEST_PAUSE, |factor| FIRST_PAUSE.saturating_mul(factor)).min(LONGEST_PAUSE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_to_a_limit() {
        let millis = |round| pause(round).as_millis();
        assert_eq!([0, 1, 2, 3, 4, 5].map(millis), [250, 500, 1000, 2000, 4000, 4000]);
        assert_eq!(millis(1000), 4000);
    }
}
