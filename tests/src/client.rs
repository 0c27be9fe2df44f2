//! A client of the public service.

use anyhow::{Context as _, Result, bail, ensure};
use tercet_proto::v1::{
    self, Delta, Finished, GenerateRequest, GenerateResponse, Prompt, Sampling, ScoreRequest,
    ScoreResponse, Started, Stop, TokenIds, TokenLogprob, TokenizeRequest, generate_request::Input,
    generate_response::Event, inference_client::InferenceClient,
};
use tonic::{Request, Streaming, transport::Channel};

/// A connection to something that serves `tercet.v1.Inference`.
#[derive(Clone, Debug)]
pub struct Client {
    inference: InferenceClient<Channel>,
}

/// A stream that has ended as it should.
#[derive(Clone, Debug, PartialEq)]
pub struct Completion {
    /// First message.
    pub started: Started,
    /// The prompt, if it came back.
    pub prompt: Option<Prompt>,
    /// Token ids of all deltas.
    pub ids: Vec<u32>,
    /// Texts of all deltas.
    pub text: String,
    /// Log-probabilities of all deltas.
    pub logprobs: Vec<TokenLogprob>,
    /// Last message.
    pub finished: Finished,
}

impl Client {
    /// Connects to an address.
    ///
    /// # Errors
    ///
    /// Returns an error if nothing takes the connection.
    pub async fn connect(address: &str) -> Result<Self> {
        Ok(Self { inference: InferenceClient::new(crate::connect(address).await?) })
    }

    /// Opens a stream.
    ///
    /// # Errors
    ///
    /// Returns an error if the request is refused.
    pub async fn open(
        &self,
        request: impl tonic::IntoRequest<GenerateRequest>,
    ) -> Result<Streaming<GenerateResponse>> {
        Ok(self.inference.clone().generate(request).await?.into_inner())
    }

    /// Generates a completion, to its end.
    ///
    /// # Errors
    ///
    /// Returns an error if the stream breaks any of its promises.
    pub async fn generate(&self, request: GenerateRequest) -> Result<Completion> {
        collect(self.open(request).await?, |_| ()).await
    }

    /// Returns the token ids of a text.
    ///
    /// # Errors
    ///
    /// Returns an error if the request is refused.
    pub async fn tokenize(&self, text: &str) -> Result<Vec<u32>> {
        let request = TokenizeRequest { text: text.to_owned(), ..TokenizeRequest::default() };
        let response = self.inference.clone().tokenize(request).await?.into_inner();
        Ok(response.tokens.context("no tokens")?.ids)
    }

    /// Returns the scores of token ids.
    ///
    /// # Errors
    ///
    /// Returns an error if the request is refused.
    pub async fn score(&self, ids: Vec<u32>) -> Result<ScoreResponse> {
        let request = ScoreRequest { model: String::new(), tokens: Some(TokenIds { ids }) };
        Ok(self.inference.clone().score(request).await?.into_inner())
    }

    /// Returns the models served.
    ///
    /// # Errors
    ///
    /// Returns an error if the request is refused.
    pub async fn models(&self) -> Result<Vec<v1::ModelInfo>> {
        let request = Request::new(v1::ListModelsRequest {});
        Ok(self.inference.clone().list_models(request).await?.into_inner().models)
    }
}

/// Reads a stream to its end, showing each delta to `see`.
///
/// # Errors
///
/// Returns an error if it fails, has no `started` or `finished`, or repeats or skips a token.
pub async fn collect(
    stream: Streaming<GenerateResponse>,
    see: impl FnMut(&Delta),
) -> Result<Completion> {
    collect_from(stream, 0, see).await
}

/// Reads a stream whose tokens begin at an index, like one that resumes, as [`collect`] does.
///
/// # Errors
///
/// Returns an error as [`collect`] does.
pub async fn collect_from(
    mut stream: Streaming<GenerateResponse>,
    first: usize,
    mut see: impl FnMut(&Delta),
) -> Result<Completion> {
    let (mut started, mut prompt) = (None, None);
    let (mut ids, mut text, mut logprobs) = (Vec::new(), String::new(), Vec::new());
    while let Some(message) = stream.message().await? {
        match message.event.context("a message without an event")? {
            Event::Started(first) => {
                ensure!(started.replace(first).is_none(), "started twice");
            }
            Event::Delta(delta) => {
                ensure!(
                    usize::try_from(delta.index)? == first + ids.len(),
                    "a delta at {} after {} tokens",
                    delta.index,
                    first + ids.len()
                );
                see(&delta);
                ids.extend(&delta.token_ids);
                text.push_str(&delta.text);
                logprobs.extend(delta.logprobs);
            }
            Event::Prompt(echo) => {
                ensure!(started.is_some() && ids.is_empty(), "the prompt is not told first");
                ensure!(prompt.replace(echo).is_none(), "the prompt is told twice");
            }
            Event::Finished(mut finished) => {
                // How it was computed is no part of the answer: it differs from run to run.
                ensure!(finished.timings.take().is_some(), "finished without timings");
                if let Some(usage) = &mut finished.usage {
                    usage.cached_tokens = 0;
                }
                ensure!(stream.message().await?.is_none(), "a message after finished");
                let started = started.context("finished without started")?;
                return Ok(Completion { started, prompt, ids, text, logprobs, finished });
            }
        }
    }
    bail!("the stream ended after {} tokens without finished", ids.len())
}

/// Returns a request to continue a text: greedy, on past the end of the text.
pub fn greedy(input: Input, max_tokens: u32) -> GenerateRequest {
    let sampling = Sampling { temperature: Some(0.0), ..Sampling::default() };
    request(input, sampling, max_tokens)
}

/// Returns a request to continue a text: drawn with a seed, on past the end of the text.
pub fn sampled(input: Input, seed: u64, max_tokens: u32) -> GenerateRequest {
    let sampling = Sampling { seed: Some(seed), ..Sampling::default() };
    request(input, sampling, max_tokens)
}

fn request(input: Input, sampling: Sampling, max_tokens: u32) -> GenerateRequest {
    GenerateRequest {
        input: Some(input),
        sampling: Some(sampling),
        stop: Some(Stop {
            max_tokens: Some(max_tokens),
            ignore_eos: Some(true),
            ..Stop::default()
        }),
        ..GenerateRequest::default()
    }
}
