//! The compute thread of a later stage.

use std::{collections::HashMap, sync::Mutex, thread};

use tercet_engine::{
    Downstream as _, Followed, Follower, SamplingParams, StageFrame,
    plan::{OpenSequence, PageId, Run, RunOutput, SequenceId, StepPlan},
};
use tercet_proto::{
    Reason,
    v1::{self, ConnectResponse, connect_response},
};
use tercet_telemetry::{Metrics, PageState, RowKind, SequenceState};
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;
use tonic::Status;
use tracing::Span;

use super::{QUEUE, link::WireDownstream, wire};
use crate::{administration, core::Facts, span};

/// Answers on their way to the stage before.
pub(crate) type Answers = mpsc::Sender<Result<ConnectResponse, Status>>;

/// A later stage: its thread, and who may use it.
#[derive(Debug)]
pub(crate) struct Stage {
    commands: mpsc::Sender<Command>,
    seat: Mutex<Seat>,
    pub(crate) parts: Vec<v1::PartDigest>,
    pub(crate) kv_pages: usize,
}

/// Who uses a stage. One head at a time: two would fill its KV cache for each other.
#[derive(Debug, Default)]
struct Seat {
    /// The head that has it or had it last, and the epoch of its latest link.
    last: Option<(String, u64)>,
    /// Counts the links, so that one that is over does not give up its successor's seat.
    link: u64,
    /// Cancelled when the link is replaced; absent when there is none.
    taken: Option<CancellationToken>,
}

/// The right to use a stage, until it is dropped or replaced by a later link of the same head.
#[derive(Debug)]
pub(crate) struct Seated<'a> {
    stage: &'a Stage,
    /// Number of the link.
    pub(crate) link: u64,
    /// Cancelled when the link is replaced.
    pub(crate) replaced: CancellationToken,
}

/// What the thread is told.
#[derive(Debug)]
pub(crate) enum Command {
    /// Computes a step to see that all is well, and to have the weights in memory.
    WarmUp(oneshot::Sender<Result<(), String>>),
    /// A new link begins: whatever was open is forgotten.
    Begin {
        /// Number of the link.
        link: u64,
        epoch: u64,
        answers: Answers,
        next: Option<WireDownstream>,
    },
    /// Computes a step, unless its link is over.
    Step { link: u64, frame: StageFrame },
    /// The link is over.
    End { link: u64 },
}

impl Stage {
    /// Starts the thread.
    pub(crate) fn start(
        follower: Follower,
        facts: &Facts,
        parts: &[(String, [u8; 32])],
        metrics: Metrics,
    ) -> std::io::Result<Self> {
        let (commands, inbox) = mpsc::channel(QUEUE);
        let kv_pages = follower.kv_pages();
        let computer = Computer {
            hidden: facts.config.hidden,
            model: facts.name.clone(),
            layers: facts.layers_label(),
            follower,
            metrics,
            spans: HashMap::new(),
            current: None,
        };
        thread::Builder::new()
            .name("tercet-stage".to_owned())
            .spawn(move || computer.run(inbox))?;
        Ok(Self { commands, seat: Mutex::default(), parts: administration::parts(parts), kv_pages })
    }

    /// Computes a first step.
    pub(crate) async fn warm_up(&self) -> Result<(), String> {
        let (done, result) = oneshot::channel();
        self.tell(Command::WarmUp(done)).await.map_err(|lost| lost.message().to_owned())?;
        result.await.unwrap_or_else(|_| Err("the compute thread ended".to_owned()))
    }

    /// Returns whether the thread still computes; false after a defect.
    pub(crate) fn is_alive(&self) -> bool {
        !self.commands.is_closed()
    }

    /// Takes the stage for a link of `head`; a later link of the same head replaces its last one.
    pub(crate) fn take(&self, head: &str, epoch: u64) -> Result<Seated<'_>, Status> {
        let mut seat = lock(&self.seat);
        match (&seat.last, &seat.taken) {
            (Some((last, latest)), _) if last == head && epoch <= *latest => {
                return Err(Reason::StaleEpoch
                    .status(format!("epoch {epoch} of head {head} is over: {latest} came later")));
            }
            (Some((last, _)), Some(_)) if last != head => {
                return Err(Reason::Overloaded.status(format!("the stage serves head {last}")));
            }
            _ => {}
        }
        if let Some(replaced) = seat.taken.take() {
            replaced.cancel();
        }
        seat.last = Some((head.to_owned(), epoch));
        seat.link += 1;
        let replaced = CancellationToken::new();
        seat.taken = Some(replaced.clone());
        Ok(Seated { stage: self, link: seat.link, replaced })
    }

    /// Tells the thread something.
    pub(crate) async fn tell(&self, command: Command) -> Result<(), Status> {
        let told = self.commands.send(command).await;
        told.map_err(|_| Reason::WorkerFailed.status("the compute thread of the stage ended"))
    }
}

impl Drop for Seated<'_> {
    fn drop(&mut self) {
        let mut seat = lock(&self.stage.seat);
        if seat.link == self.link {
            seat.taken = None;
        }
    }
}

/// Locks; every section above leaves the seat whole.
fn lock(seat: &Mutex<Seat>) -> std::sync::MutexGuard<'_, Seat> {
    seat.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// What the thread owns.
struct Computer {
    follower: Follower,
    hidden: usize,
    model: String,
    layers: String,
    metrics: Metrics,
    /// Of the open sequences.
    spans: HashMap<SequenceId, Span>,
    current: Option<Current>,
}

/// The link being served.
struct Current {
    link: u64,
    epoch: u64,
    answers: Answers,
    next: Option<WireDownstream>,
}

impl Computer {
    fn run(mut self, mut inbox: mpsc::Receiver<Command>) {
        while let Some(command) = inbox.blocking_recv() {
            match command {
                Command::WarmUp(done) => {
                    let warm = self.warm_up();
                    // Whoever asked may have gone.
                    drop(done.send(warm));
                }
                Command::Begin { link, epoch, answers, next } => {
                    self.forget();
                    self.current = Some(Current { link, epoch, answers, next });
                }
                Command::Step { link, frame } => {
                    if self.current.as_ref().is_some_and(|current| current.link == link)
                        && let Err(status) = self.step(frame)
                    {
                        self.give_up(status);
                    }
                }
                Command::End { link } => {
                    if self.current.as_ref().is_some_and(|current| current.link == link) {
                        self.forget();
                    }
                }
            }
            self.metrics.set_sequences(&self.model, SequenceState::Running, self.spans.len());
            let (used, all) = (self.follower.kv_pages_in_use(), self.follower.kv_pages());
            self.metrics.set_kv_pages(&self.model, PageState::Used, used);
            self.metrics.set_kv_pages(&self.model, PageState::Free, all - used);
        }
    }

    fn step(&mut self, frame: StageFrame) -> Result<(), Status> {
        let Some(current) = &mut self.current else { return Ok(()) };
        for ended in &frame.plan.close {
            self.spans.remove(ended);
        }
        for open in &frame.plan.open {
            let span = span::stage(&open.traceparent, &self.model, &self.layers, open.id.0);
            self.spans.insert(open.id, span);
        }
        let decode = frame.plan.runs.iter().filter(|run| run.decodes()).count();
        let drafts = frame.plan.runs.iter().map(Run::drafts).sum();
        let prompt = frame.plan.rows() - decode - drafts;
        let rows = [(RowKind::Prompt, prompt), (RowKind::Decode, decode), (RowKind::Draft, drafts)];
        let followed = self.follower.apply(frame);
        self.metrics.step(&self.model, self.follower.last_step(), &rows);
        match followed.map_err(|error| Reason::PipelineBroken.status(error.to_string()))? {
            Followed::Forward(frame) => match &mut current.next {
                Some(next) => {
                    next.send(frame).map_err(|lost| Reason::PipelineBroken.status(lost.to_string()))
                }
                None => Err(Reason::PipelineBroken.status("no stage holds the layers after these")),
            },
            Followed::Result(result) => {
                let result = connect_response::Kind::Result(wire::result(current.epoch, result));
                let answer = ConnectResponse { kind: Some(result) };
                current
                    .answers
                    .try_send(Ok(answer))
                    .map_err(|_| Reason::PipelineBroken.status("the results are not taken"))
            }
        }
    }

    /// Ends the link for a reason.
    fn give_up(&mut self, status: Status) {
        tracing::warn!(%status, "the pipeline link is given up");
        if let Some(current) = &self.current {
            // Full or closed: then the link ends without a word.
            drop(current.answers.try_send(Err(status)));
        }
        self.forget();
    }

    fn forget(&mut self) {
        self.current = None;
        self.spans.clear();
        self.follower.reset();
    }

    fn warm_up(&mut self) -> Result<(), String> {
        self.forget();
        let sequence = SequenceId(0);
        let open = OpenSequence {
            id: sequence,
            sampling: SamplingParams::greedy(),
            prompt: Vec::new(),
            completion: Vec::new(),
            traceparent: String::new(),
            pages: Vec::new(),
        };
        let pages = vec![PageId(0)];
        let run = Run { sequence, position: 0, rows: 1, output: RunOutput::Sample, pages };
        let plan = StepPlan { step: 0, open: vec![open], close: Vec::new(), runs: vec![run] };
        let activations = vec![0.0; self.hidden];
        let computed = self.follower.apply(StageFrame { plan, activations });
        self.forget();
        computed.map(drop).map_err(|error| error.to_string())
    }
}
