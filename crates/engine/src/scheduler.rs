//! Decides what each step computes: a state machine without threads, clocks or sockets.
//!
//! ```text
//! submit -> waiting --admit: slot and pages--> running --last token, cancel--> closed
//!              ^                                  |
//!              +------ preempt: no page left -----+
//! ```
//!
//! Continuous batching: each step takes the next row of every running sequence that has a token to
//! continue from, and fills up with rows of prompts, as many as the streams beside them can bear.
//! Full pages outlive their sequence, for others that begin with the same tokens, until the room is
//! needed. A preempted sequence is computed anew from its tokens, or from what is left of its
//! pages; since a sequence's bits depend on nothing but itself, none of that changes an answer.
//!
//! Where few sequences decode and a drafter is there, a step verifies guesses of their next tokens as
//! well. Only tokens that were sampled are ever part of a sequence, or of a page that others share.

mod batch;
mod pace;
mod pages;
mod sequence;
mod speculation;
#[cfg(test)]
mod tests;

use std::{collections::VecDeque, time::Duration};

use tercet_text::PageName;
use thiserror::Error;

pub use self::pace::StepShape;
use self::{
    pace::Pace,
    pages::Pages,
    sequence::{Sequence, Table},
    speculation::{Drafts, Speculation},
};
use crate::{
    drafter::Drafter,
    kv::PAGE_POSITIONS,
    plan::{
        OpenSequence, Run, RunOutcome, RunOutput, RunResult, Scores, SequenceId, StepPlan,
        StepResult,
    },
    request::{SequenceEvent, SequenceRequest, SubmitError},
    sampler::SamplingParams,
};

/// Limits of a scheduler.
#[derive(Clone, Copy, Debug)]
pub struct SchedulerConfig {
    /// Token ids are below this.
    pub vocab: usize,
    /// Most tokens of a sequence, by the model.
    pub context: usize,
    /// KV pages of the smallest stage.
    pub pages: usize,
    /// Most running sequences.
    pub max_sequences: usize,
    /// Most waiting sequences.
    pub max_waiting: usize,
    /// Most prompt rows in a step.
    pub prefill_chunk: usize,
    /// How many times as long a step may take with prompt rows as with the decoding ones alone.
    pub prefill_stretch: f64,
    /// Digest of the model: cached pages of different models have different names.
    pub model: [u8; 32],
    /// Steps that may be under way at once: the number of stages.
    pub steps_in_flight: usize,
}

impl SchedulerConfig {
    /// Returns the most tokens that a sequence can have.
    pub fn context_limit(&self) -> usize {
        self.context.min(self.pages * PAGE_POSITIONS)
    }
}

/// Names a request to whoever submitted it.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub struct RequestKey(pub u64);

/// A later stage answered something that was not asked.
#[derive(Debug, Error)]
#[error("the result of step {step} does not fit what was asked: {what}")]
pub struct ResultMismatch {
    step: u64,
    what: &'static str,
}

/// How full a scheduler is.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Load {
    /// Sequences being computed.
    pub running: usize,
    /// Sequences waiting for a slot or for pages.
    pub waiting: usize,
    /// KV pages that sequences refer to.
    pub pages_referenced: usize,
    /// KV pages kept for a prefix that may come again, and free for everything else.
    pub pages_cached: usize,
    /// KV pages in all.
    pub pages: usize,
}

/// A step to compute.
#[derive(Debug)]
pub struct Planned {
    /// The step.
    pub plan: StepPlan,
    /// The tokens of its rows, in order.
    pub ids: Vec<u32>,
    /// What to tell of the sequences that the step begins.
    pub events: Vec<(RequestKey, SequenceEvent)>,
    /// What the step is made of.
    pub shape: StepShape,
    /// What else happened since the step before.
    pub tally: Tally,
}

/// What happened between two steps.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Tally {
    /// Sequences that lost their pages to older ones.
    pub preemptions: usize,
    /// Tokens that need not be computed, since their pages were cached.
    pub hit_tokens: usize,
    /// Drafts that were verified.
    pub drafted: usize,
    /// Drafts that were right: tokens that came without a step of their own.
    pub accepted: usize,
}

/// The state machine. See the module's documentation.
#[derive(Debug)]
pub struct Scheduler {
    config: SchedulerConfig,
    next_id: u64,
    next_step: u64,
    waiting: VecDeque<Sequence>,
    /// In order of admission: the last is preempted first.
    running: Vec<Sequence>,
    closing: Vec<SequenceId>,
    in_flight: VecDeque<(u64, Vec<Run>)>,
    pages: Pages,
    pace: Pace,
    /// Absent where no drafts are made.
    speculation: Option<Speculation>,
    /// Whether the shortest prompt comes first in the next step, else the oldest.
    shortest_first: bool,
    tally: Tally,
}

impl Scheduler {
    /// Returns a scheduler without sequences.
    pub fn new(config: SchedulerConfig) -> Self {
        Self {
            config,
            next_id: 0,
            next_step: 0,
            waiting: VecDeque::new(),
            running: Vec::new(),
            closing: Vec::new(),
            in_flight: VecDeque::new(),
            pages: Pages::new(config.pages),
            pace: Pace::new(),
            speculation: None,
            shortest_first: false,
            tally: Tally::default(),
        }
    }

    /// Has `drafter` guess up to `tokens` tokens of a sequence ahead, from now on; nobody, if absent
    /// or 0. A pipeline of several stages computes no drafts.
    pub fn draft_with(&mut self, drafter: Option<Box<dyn Drafter>>, tokens: usize) {
        let drafter = drafter.filter(|_| tokens > 0);
        self.speculation = drafter.map(|drafter| Speculation::new(drafter, tokens));
    }

    /// Returns the limits.
    pub fn config(&self) -> &SchedulerConfig {
        &self.config
    }

    /// Returns how full the scheduler is.
    pub fn load(&self) -> Load {
        Load {
            running: self.running.len(),
            waiting: self.waiting.len(),
            pages_referenced: self.pages.referenced(),
            pages_cached: self.pages.idle(),
            pages: self.config.pages,
        }
    }

    /// Checks `request` against the limits of a scheduler with this configuration.
    pub fn check(config: &SchedulerConfig, request: &SequenceRequest) -> Result<(), SubmitError> {
        if request.prompt.is_empty() {
            return Err(SubmitError::EmptyPrompt);
        }
        let ids = request.prompt.iter().chain(&request.resumed);
        if let Some((index, &id)) = ids.enumerate().find(|&(_, &id)| id as usize >= config.vocab) {
            return Err(SubmitError::InvalidId { index, id, vocab: config.vocab });
        }
        let SamplingParams { logit_bias, .. } = &request.sampling;
        if let Some(&id) = logit_bias.keys().find(|id| **id as usize >= config.vocab) {
            return Err(SubmitError::InvalidBias { id, vocab: config.vocab });
        }
        if !request.sampling.are_usable() {
            return Err(SubmitError::Sampling);
        }
        let tokens = request.prompt.len() + request.resumed.len();
        let limit = config.context_limit();
        if tokens > limit {
            return Err(SubmitError::TooLong { tokens, limit });
        }
        Ok(())
    }

    /// Queues `request`, or says why its completion is complete already.
    pub fn submit(
        &mut self,
        key: RequestKey,
        request: SequenceRequest,
    ) -> Result<Option<SequenceEvent>, SubmitError> {
        Self::check(&self.config, &request)?;
        let mut tokens = request.prompt.clone();
        tokens.extend(&request.resumed);
        let root = PageName::root(&self.config.model, &request.cache_salt);
        let sequence = Sequence {
            key,
            request,
            tokens,
            computed: 0,
            cancelled: false,
            scores: Scores::default(),
            id: SequenceId(0),
            opened: false,
            in_flight: false,
            table: Table::new(root),
            drafts: Drafts::default(),
        };
        if let Some(reason) = sequence.stop_reason(self.config.context_limit()) {
            return Ok(Some(SequenceEvent::Finished(reason)));
        }
        if self.waiting.len() >= self.config.max_waiting {
            return Err(SubmitError::QueueFull { waiting: self.config.max_waiting });
        }
        self.waiting.push_back(sequence);
        Ok(None)
    }

    /// Forgets a request: nothing more is told about it.
    pub fn cancel(&mut self, key: RequestKey) {
        self.waiting.retain(|sequence| sequence.key != key);
        if let Some(index) = self.running.iter().position(|sequence| sequence.key == key) {
            if self.running[index].in_flight {
                self.running[index].cancelled = true;
            } else {
                self.close(index);
            }
        }
    }

    /// Forgets everything, cached pages too, as when a later stage is lost, and returns the requests
    /// that were there.
    pub fn abandon(&mut self) -> Vec<RequestKey> {
        let keys = self
            .running
            .drain(..)
            .chain(self.waiting.drain(..))
            .filter(|sequence| !sequence.cancelled)
            .map(|sequence| sequence.key)
            .collect();
        self.closing.clear();
        self.in_flight.clear();
        self.pages = Pages::new(self.config.pages);
        keys
    }

    /// Adopts the limits of newly attached stages. Only an idle scheduler can.
    pub fn reconfigure(&mut self, config: SchedulerConfig) {
        assert!(
            self.running.is_empty() && self.in_flight.is_empty(),
            "only an idle scheduler changes its limits"
        );
        self.config = config;
        self.pages = Pages::new(config.pages);
        self.pace = Pace::new();
        self.next_step = 0;
    }

    /// Returns the next step, or nothing when there is nothing to do or enough is under way.
    pub fn plan(&mut self) -> Option<Planned> {
        if self.in_flight.len() >= self.config.steps_in_flight {
            return None;
        }
        self.admit();
        let mut runs = self.plan_decode();
        self.plan_prefill(&mut runs);
        self.plan_drafts(&mut runs);
        if runs.is_empty() && (self.closing.is_empty() || !self.in_flight.is_empty()) {
            return None;
        }
        let mut open = Vec::new();
        let mut events = Vec::new();
        let mut ids = Vec::new();
        let mut shape = StepShape::default();
        for run in &mut runs {
            let sequence =
                find(&mut self.running, run.sequence).expect("runs are made of running sequences");
            let end = run.position + run.rows;
            sequence.in_flight = true;
            let drafts = run.drafts();
            ids.extend(&sequence.tokens[run.position..end - drafts]);
            if let RunOutput::Verify(drafts) = &run.output {
                ids.extend(drafts);
            }
            if sequence.decodes() {
                shape.decode_rows += run.rows - drafts;
                shape.draft_rows += drafts;
            } else {
                shape.prompt_rows += run.rows;
                shape.prompt_positions += (run.position..end).sum::<usize>();
            }
            if !sequence.opened {
                let pages = sequence.open();
                let cached = pages.len() * PAGE_POSITIONS;
                self.tally.hit_tokens += cached;
                let (prompt, completion) = sequence.history();
                open.push(OpenSequence {
                    id: sequence.id,
                    sampling: sequence.request.sampling.clone(),
                    traceparent: sequence.request.traceparent.clone(),
                    pages,
                    prompt,
                    completion,
                });
                events.push((sequence.key, SequenceEvent::Scheduled { cached }));
            }
            run.pages = sequence.table.tell(end);
        }
        let step = self.next_step;
        self.next_step += 1;
        self.in_flight.push_back((step, runs.clone()));
        let plan = StepPlan { step, open, close: std::mem::take(&mut self.closing), runs };
        Some(Planned { plan, ids, events, shape, tally: std::mem::take(&mut self.tally) })
    }

    /// Learns what it took to compute a step, waiting not counted: the following are cut to it.
    pub fn observe(&mut self, shape: &StepShape, elapsed: Duration) {
        self.pace.observe(shape, elapsed);
        if let Some(speculation) = self.speculation.as_mut().filter(|_| shape.prompt_rows == 0) {
            speculation.observe(shape.decode_rows + shape.draft_rows, shape.draft_rows, elapsed);
        }
    }

    /// Takes in what the last stage computed.
    pub fn apply(
        &mut self,
        result: StepResult,
    ) -> Result<Vec<(RequestKey, SequenceEvent)>, ResultMismatch> {
        let mismatch = |what| ResultMismatch { step: result.step, what };
        let (step, runs) =
            self.in_flight.pop_front().ok_or_else(|| mismatch("no step is under way"))?;
        if step != result.step {
            return Err(mismatch("an earlier step is due"));
        }
        let mut outcomes = result.results.into_iter().peekable();
        let mut events = Vec::new();
        for run in runs {
            let index = self
                .running
                .iter()
                .position(|sequence| sequence.id == run.sequence)
                .expect("a sequence in flight stays running");
            let outcome = outcomes.next_if(|result| result.sequence == run.sequence);
            let sequence = &mut self.running[index];
            sequence.in_flight = false;
            // What a failed run has written is of no use to anybody.
            if !matches!(&outcome, Some(RunResult { outcome: RunOutcome::NonFinite, .. })) {
                sequence.computed += run.rows - run.drafts();
                sequence.publish(&mut self.pages);
            }
            if sequence.cancelled {
                self.close(index);
                continue;
            }
            let limit = self.config.context_limit();
            let told = sequence
                .take_in(&run, outcome.map(|result| result.outcome), limit, self.config.vocab)
                .map_err(|what| ResultMismatch { step, what })?;
            if run.drafts() > 0 {
                let accepted = sequence.accept_drafts(&run, &mut self.pages);
                self.tally.drafted += run.drafts();
                self.tally.accepted += accepted;
                if let Some(speculation) = &mut self.speculation {
                    speculation.verified(&mut sequence.drafts, run.drafts(), accepted);
                }
            }
            let key = sequence.key;
            if told.iter().any(ends) {
                self.close(index);
            }
            events.extend(told.into_iter().map(|event| (key, event)));
        }
        if outcomes.next().is_some() {
            return Err(ResultMismatch {
                step,
                what: "a result of a run that was not in the step",
            });
        }
        Ok(events)
    }

    /// Moves waiting sequences into free slots, in order, while their prompts find pages.
    fn admit(&mut self) {
        while self.running.len() < self.config.max_sequences {
            let Some(mut sequence) = self.waiting.pop_front() else { return };
            if !sequence.take_pages(&mut self.pages) {
                self.waiting.push_front(sequence);
                return;
            }
            sequence.id = SequenceId(self.next_id);
            self.next_id += 1;
            self.running.push(sequence);
        }
    }
}

fn find(running: &mut [Sequence], id: SequenceId) -> Option<&mut Sequence> {
    running.iter_mut().find(|sequence| sequence.id == id)
}

fn ends(event: &SequenceEvent) -> bool {
    !matches!(event, SequenceEvent::Scheduled { .. } | SequenceEvent::Token { .. })
}
