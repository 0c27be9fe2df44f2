use tercet_proto::{
    is_movable, retry_after,
    v1::{GenerateRequest, GenerateResponse, generate_response::Event},
};
use tokio::time::{self, Instant};
use tonic::{Extensions, Request, Status, Streaming, metadata::MetadataMap};

use crate::{Client, progress::Progress};

/// A completion in the making, over as many servers as it takes. Dropping it cancels the
/// computation.
#[derive(Debug)]
pub struct Generation {
    client: Client,
    request: GenerateRequest,
    metadata: MetadataMap,
    deadline: Option<Instant>,
    progress: Progress,
    /// What is left to read; `None` once it is lost or over.
    stream: Option<Streaming<GenerateResponse>>,
    /// The server asked last.
    server: usize,
    trials: Trials,
}

/// How it goes since the last new token.
#[derive(Debug)]
struct Trials {
    /// Attempts that failed.
    failed: usize,
    /// Since when.
    since: Option<Instant>,
    /// Until when each server asked to be left alone.
    not_before: Vec<Option<Instant>>,
}

/// Why a completion did not come to its end.
#[derive(Debug, thiserror::Error)]
pub enum GenerateError {
    /// A server's answer that would be the same anywhere, or the only one there is. Fault: mostly
    /// the caller, the status says.
    #[error("{}", said(.0))]
    Refused(#[source] Status),
    /// Fault: the servers or the network.
    #[error(
        "the text broke off after {tokens} tokens and could not be resumed in {attempts} attempts"
    )]
    Lost {
        /// Tokens that came.
        tokens: usize,
        /// Attempts since the last of them.
        attempts: usize,
        /// What became of the last attempt.
        source: Status,
    },
}

impl GenerateError {
    /// Returns what a server, or the lack of one, said last.
    pub fn status(&self) -> &Status {
        match self {
            Self::Refused(status) | Self::Lost { source: status, .. } => status,
        }
    }
}

fn said(status: &Status) -> &str {
    match status.message() {
        "" => status.code().description(),
        message => message,
    }
}

impl Generation {
    pub(crate) async fn open(
        client: Client,
        request: Request<GenerateRequest>,
    ) -> Result<Self, GenerateError> {
        let timeout = tercet_proto::timeout(request.metadata());
        let (metadata, _, request) = request.into_parts();
        let (server, servers) = (client.current(), client.len());
        let mut generation = Self {
            client,
            request,
            metadata,
            deadline: timeout.map(|timeout| Instant::now() + timeout),
            progress: Progress::default(),
            stream: None,
            server,
            trials: Trials { failed: 0, since: None, not_before: vec![None; servers] },
        };
        while let Err(status) = generation.attempt().await {
            generation.trials.fail(generation.server, &status);
            let options = generation.client.options();
            let attempts = generation.trials.failed;
            if generation.is_final(&status) || attempts >= options.opening_attempts {
                return Err(GenerateError::Refused(status));
            }
            generation.move_on(status, attempts).await?;
        }
        Ok(generation)
    }

    /// Returns what comes next, as if there were one stream that nothing disturbs; `None` after
    /// `Finished`.
    ///
    /// # Errors
    ///
    /// Returns an error if a server refuses the request for good, or the stream breaks off and
    /// cannot be resumed in the attempts and the time that the options allow. Nothing comes after
    /// an error.
    pub async fn next(&mut self) -> Result<Option<Event>, GenerateError> {
        loop {
            let Some(stream) = &mut self.stream else { return Ok(None) };
            let broken = match read(stream, self.deadline).await {
                Ok(message) => {
                    let before = self.progress.tokens();
                    match self.progress.take(message) {
                        Ok(Some(event)) => {
                            if self.progress.tokens() > before {
                                self.trials.succeed();
                            }
                            if self.progress.is_finished() {
                                self.stream = None;
                            }
                            return Ok(Some(event));
                        }
                        Ok(None) => continue,
                        Err(error) => Status::unavailable(error.to_string()),
                    }
                }
                Err(status) => status,
            };
            self.stream = None;
            self.resume(broken).await?;
        }
    }

    /// Returns how many times it went on after a loss.
    pub fn resumes(&self) -> usize {
        self.progress.resumes()
    }

    /// Begins a stream that goes on where the broken one ended.
    async fn resume(&mut self, mut broken: Status) -> Result<(), GenerateError> {
        self.request.resume = self.progress.resume();
        loop {
            if self.is_final(&broken) {
                return Err(GenerateError::Refused(broken));
            }
            let attempts = self.trials.failed;
            self.trials.fail(self.server, &broken);
            if attempts >= self.client.options().attempts {
                return Err(self.lost(broken, attempts));
            }
            self.move_on(broken, attempts).await?;
            match self.attempt().await {
                Ok(()) => {
                    self.progress.resumed();
                    return Ok(());
                }
                Err(status) => broken = status,
            }
        }
    }

    /// Goes over to the next server, after a pause if each had its turn or it asked for one.
    async fn move_on(&mut self, broken: Status, attempts: usize) -> Result<(), GenerateError> {
        let options = self.client.options();
        let from = self.server;
        self.server = self.client.after(from);
        let now = Instant::now();
        let round = attempts.checked_sub(self.client.len());
        let pause = round.map(|round| now + options.pause(round));
        let until = pause.max(self.trials.not_before[self.server]).unwrap_or(now);
        let given_up = self.trials.since.unwrap_or(now) + options.patience;
        if until > given_up || self.deadline.is_some_and(|deadline| until > deadline) {
            return Err(self.lost(broken, attempts));
        }
        let (last, next) = (self.client.address(from), self.client.address(self.server));
        let (tokens, reason) = (self.progress.tokens(), said(&broken));
        if self.request.resume.is_some() {
            tracing::warn!(from = last, at = next, tokens, reason, "a stream broke, resuming");
        } else {
            tracing::info!(from = last, at = next, reason, "a request was not taken, asking again");
        }
        time::sleep_until(until).await;
        Ok(())
    }

    /// Sends the request to the server in turn.
    async fn attempt(&mut self) -> Result<(), Status> {
        let message = self.request.clone();
        let mut request =
            Request::from_parts(self.metadata.clone(), Extensions::default(), message);
        if let Some(deadline) = self.deadline {
            request.set_timeout(deadline.saturating_duration_since(Instant::now()));
        }
        let mut client = self.client.inference_at(self.server);
        self.stream = Some(client.generate(request).await?.into_inner());
        Ok(())
    }

    /// Returns whether an attempt elsewhere would end as this one.
    fn is_final(&self, status: &Status) -> bool {
        let is_late = self.deadline.is_some_and(|deadline| Instant::now() >= deadline);
        is_late || !is_movable(status) || self.client.address(self.server).is_none()
    }

    fn lost(&self, source: Status, attempts: usize) -> GenerateError {
        GenerateError::Lost { tokens: self.progress.tokens(), attempts, source }
    }
}

impl Trials {
    fn fail(&mut self, server: usize, status: &Status) {
        let now = Instant::now();
        self.failed += 1;
        self.since.get_or_insert(now);
        self.not_before[server] = retry_after(status).map(|delay| now + delay);
    }

    fn succeed(&mut self) {
        (self.failed, self.since) = (0, None);
    }
}

/// Reads a message before the deadline.
async fn read(
    stream: &mut Streaming<GenerateResponse>,
    deadline: Option<Instant>,
) -> Result<GenerateResponse, Status> {
    let message = match deadline {
        None => stream.message().await,
        Some(deadline) => match time::timeout_at(deadline, stream.message()).await {
            Ok(message) => message,
            Err(_) => Err(Status::deadline_exceeded("the completion took longer than it may")),
        },
    };
    let closed =
        || Status::unavailable("the server closed the stream before the text was complete");
    message?.ok_or_else(closed)
}
