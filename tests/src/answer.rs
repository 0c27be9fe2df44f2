//! Answers compared to the bit, whole or in part.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result, ensure};
use tercet_proto::v1::{Delta, FinishReason, GenerateRequest, Prompt, Resume, finished::Matched};

use crate::{Client, Completion, collect_from};

/// What a stream has said: all that a request decides, and nothing of when or where it was
/// computed.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Answer {
    /// Token ids of the completion.
    pub ids: Vec<u32>,
    /// Text of the completion.
    pub text: String,
    /// The log-probabilities that were asked for: of each token, and of the likeliest ones.
    pub logprobs: Vec<(Likelihood, Vec<(u32, Likelihood)>)>,
    /// How it ended; absent while it has not.
    pub end: Option<End>,
}

/// Bits of a log-probability, and the bytes of the token.
pub type Likelihood = (u32, Vec<u8>);

/// What is told at the beginning and at the end of an answer.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct End {
    /// Seed in use.
    pub seed: u64,
    /// Tokens of the prompt.
    pub prompt_tokens: u32,
    /// Tokens of the completion.
    pub completion_tokens: u32,
    /// Why.
    pub reason: FinishReason,
    /// The stop string or token that ended it.
    pub matched: Option<Matched>,
    /// The prompt, if it was asked for.
    pub prompt: Option<Prompt>,
}

impl Answer {
    /// Takes in what comes next.
    pub fn push(&mut self, delta: &Delta) {
        self.ids.extend(&delta.token_ids);
        self.text.push_str(&delta.text);
        self.logprobs.extend(delta.logprobs.iter().map(|token| {
            let top = token.top.iter();
            let top = top.map(|top| (top.id, (top.logprob.to_bits(), top.token.clone())));
            ((token.logprob.to_bits(), token.token.clone()), top.collect())
        }));
    }

    /// Takes in that it is complete.
    ///
    /// # Errors
    ///
    /// Returns an error if the end tells no usage, or a reason that is none.
    pub fn finish(&mut self, completion: &Completion) -> Result<()> {
        let usage = completion.finished.usage.as_ref().context("the end tells no usage")?;
        let reason = completion.finished.reason();
        ensure!(reason != FinishReason::Unspecified, "the end tells no reason");
        ensure!(usage.prompt_tokens == completion.started.prompt_tokens, "two prompt lengths");
        self.end = Some(End {
            seed: completion.started.seed,
            prompt_tokens: usage.prompt_tokens,
            completion_tokens: usage.completion_tokens,
            reason,
            matched: completion.finished.matched.clone(),
            prompt: completion.prompt.clone(),
        });
        Ok(())
    }
}

/// The answer that a request got from a server that had nothing else to do.
#[derive(Clone, Debug)]
pub struct Reference {
    /// What was asked.
    pub request: GenerateRequest,
    /// The whole answer.
    pub answer: Answer,
    /// Bytes of text that are out after a number of tokens.
    released: BTreeMap<usize, usize>,
}

impl Reference {
    /// Asks a server.
    ///
    /// # Errors
    ///
    /// Returns an error if the request is refused or the stream fails.
    pub async fn ask(client: &Client, request: GenerateRequest) -> Result<Self> {
        let (mut answer, mut released) = (Answer::default(), BTreeMap::from([(0, 0)]));
        let stream = client.open(request.clone()).await?;
        let completion = collect_from(stream, 0, |delta| {
            answer.push(delta);
            released.insert(answer.ids.len(), answer.text.len());
        })
        .await?;
        answer.finish(&completion)?;
        Ok(Self { request, answer, released })
    }

    /// Holds the part of an answer that came before its stream ended early to this one.
    ///
    /// # Errors
    ///
    /// Returns an error that shows both if this one does not begin so.
    pub fn check_part(&self, got: &Answer) -> Result<()> {
        let whole = &self.answer;
        let released = self.released.get(&got.ids.len());
        ensure!(
            whole.ids.starts_with(&got.ids)
                && whole.text.starts_with(&got.text)
                && whole.logprobs.starts_with(&got.logprobs)
                && released.is_none_or(|released| *released == got.text.len()),
            "{:?}\nbegins\n{got:?}\nnot\n{whole:?}",
            self.request
        );
        Ok(())
    }

    /// Holds a whole answer to this one.
    ///
    /// # Errors
    ///
    /// Returns an error that shows both if they differ.
    pub fn check(&self, got: &Answer) -> Result<()> {
        ensure!(*got == self.answer, "{:?}\ngot\n{got:?}\nnot\n{:?}", self.request, self.answer);
        Ok(())
    }

    /// Returns the numbers of tokens after which a client may have lost its stream.
    pub fn resumable(&self) -> Vec<usize> {
        let all = self.released.keys().copied();
        all.filter(|index| *index < self.answer.ids.len()).collect()
    }

    /// Returns the request that goes on after some tokens, and the answer that it must get.
    ///
    /// # Panics
    ///
    /// Panics if the number of tokens is not one of [`Self::resumable`].
    pub fn resumed(&self, index: usize) -> (GenerateRequest, Self) {
        let (before, after) = self.answer.ids.split_at(index);
        let seed = self.answer.end.as_ref().expect("a reference is complete").seed;
        let resume = Resume { seed, token_ids: before.to_vec() };
        let request = GenerateRequest { resume: Some(resume), ..self.request.clone() };
        let said = self.released[&index];
        let released = self.released.range(index..);
        let rest = Self {
            request: request.clone(),
            answer: Answer {
                ids: after.to_vec(),
                text: self.answer.text[said..].to_owned(),
                // None, where none were asked for.
                logprobs: self.answer.logprobs.iter().skip(index).cloned().collect(),
                end: self.answer.end.clone(),
            },
            released: released.map(|(tokens, bytes)| (tokens - index, bytes - said)).collect(),
        };
        (request, rest)
    }

    /// Asks a server for the same and holds its answer to this one.
    ///
    /// # Errors
    ///
    /// Returns an error if the stream fails, or that shows both answers if they differ.
    pub async fn repeat(&self, client: &Client) -> Result<()> {
        let resume = self.request.resume.as_ref();
        let first = resume.map_or(0, |resume| resume.token_ids.len());
        let mut got = Answer::default();
        let stream = client.open(self.request.clone()).await?;
        let completion = collect_from(stream, first, |delta| got.push(delta)).await?;
        got.finish(&completion)?;
        self.check(&got)
    }
}
