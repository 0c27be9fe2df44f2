//! Computes the steps of one stage: opens and closes sequences, runs the rows, samples at the end.

use std::{collections::HashMap, fmt, ops::Range, sync::Arc, time::Duration};

use tercet_kernels::{Isa, Kernels};
use tercet_text::{Constraint, GrammarError, Grammars};

use crate::{
    engine::{EngineError, EngineOptions, StepError},
    forward::{Forward, Row, Workspace},
    kv::{KvCache, KvShape},
    model_file::{ModelConfig, ModelError, ModelFile, Report, StageWeights},
    plan::{
        OpenSequence, Run, RunOutcome, RunOutput, RunResult, Scores, SequenceId, StepPlan,
        TokenLogprobs,
    },
    pool::ComputePool,
    sampler::{History, Sampler, SamplingParams, largest, token_id},
};

/// Sees the logits of a row: the sequence, the position of the row, one logit for each token id.
pub type LogitsObserver = Box<dyn FnMut(SequenceId, usize, &[f32]) + Send>;

/// Rows of logits computed at once: bounds the memory of a `Score` over a large vocabulary.
const LOGIT_ROWS: usize = 16;

/// What comes into a stage.
#[derive(Debug)]
pub(crate) enum Input<'a> {
    /// Token ids, for the first stage.
    Tokens(&'a [u32]),
    /// Rows x hidden size, from the stage before.
    Activations(Vec<f32>),
}

/// What a stage makes of a step.
#[derive(Debug)]
pub(crate) enum Produced {
    /// Rows x hidden size, for the next stage. The rows of a run that failed are NaN.
    Activations(Vec<f32>),
    /// The answers of the last stage.
    Results(Vec<RunResult>),
}

/// A sequence that is open in a stage.
#[derive(Debug)]
struct Opened {
    sampling: SamplingParams,
    /// Kept up where tokens are sampled, if sampling looks at it.
    history: History,
    /// Kept up where tokens are sampled, if the completion has a grammar; else what is wrong with it.
    constraint: Option<Result<Constraint, GrammarError>>,
}

/// A stage with its KV cache and the sequences that are open in it.
pub(crate) struct StageRunner {
    config: ModelConfig,
    weights: Arc<StageWeights>,
    kernels: Kernels,
    pool: ComputePool,
    kv: KvCache,
    sequences: HashMap<SequenceId, Opened>,
    work: Workspace,
    sampler: Sampler,
    observer: Option<LogitsObserver>,
    grammars: Option<Arc<Grammars>>,
    last_step: Duration,
}

impl StageRunner {
    pub(crate) fn load(
        model: &ModelFile,
        layers: Range<usize>,
        options: &EngineOptions,
        pool: ComputePool,
        report: Report<'_>,
    ) -> Result<Self, EngineError> {
        let total = model.config.layers;
        if layers.is_empty() || layers.end > total {
            return Err(EngineError::Layers {
                layers,
                expected: format!("the model has layers 0..{total}"),
            });
        }
        let kernels = match options.isa {
            Some(isa) => Kernels::new(isa).ok_or(EngineError::Isa(isa))?,
            None => Kernels::detect(),
        };
        let shape = KvShape::new(&model.config, layers.len());
        let pages = options.kv_bytes / shape.page_bytes();
        if pages == 0 {
            let page_bytes = shape.page_bytes();
            return Err(EngineError::KvTooSmall { bytes: options.kv_bytes, page_bytes });
        }
        // More pages than all sequences together can fill would never be used.
        let useful = options
            .max_sequences
            .saturating_mul(crate::kv::pages_for(options.context_of(&model.config)));
        Ok(Self {
            weights: Arc::new(model.load_reporting(layers, report)?),
            kernels,
            pool,
            kv: KvCache::new(shape, pages.min(useful)),
            sequences: HashMap::new(),
            work: Workspace::new(&model.config),
            sampler: Sampler::default(),
            observer: None,
            grammars: options.grammars.clone(),
            last_step: Duration::ZERO,
            config: model.config.clone(),
        })
    }

    pub(crate) fn observe_logits(&mut self, observer: Option<LogitsObserver>) {
        self.observer = observer;
    }

    pub(crate) fn isa(&self) -> Isa {
        self.kernels.isa()
    }

    /// Returns the digests of the weights, and tells `report` how far they are.
    pub(crate) fn part_digests(
        &self,
        report: Report<'_>,
    ) -> Result<Vec<(String, [u8; 32])>, ModelError> {
        self.pool.part_digests(&self.weights, report)
    }

    pub(crate) fn weights(&self) -> Arc<StageWeights> {
        Arc::clone(&self.weights)
    }

    pub(crate) fn kv_pages(&self) -> usize {
        self.kv.pages()
    }

    /// Returns the bytes of the KV cache.
    pub(crate) fn kv_bytes(&self) -> usize {
        self.kv.bytes()
    }

    pub(crate) fn kv_pages_in_use(&self) -> usize {
        self.kv.pages_in_use()
    }

    /// Forgets all sequences.
    pub(crate) fn reset(&mut self) {
        self.sequences.clear();
        self.kv.clear();
    }

    /// Returns what the last step took, from the beginning of its turn.
    pub(crate) fn last_step(&self) -> Duration {
        self.last_step
    }

    /// Computes one step. After an error the stage is unusable until it is reset.
    #[expect(clippy::disallowed_types, reason = "what is measured is the work, paused or not")]
    pub(crate) fn step(
        &mut self,
        plan: &StepPlan,
        input: Input<'_>,
    ) -> Result<Produced, StepError> {
        self.open_and_close(plan)?;
        let pool = self.pool.clone();
        let _turn = pool.turn();
        let begun = std::time::Instant::now();
        let produced = self.compute(plan, input);
        self.last_step = begun.elapsed();
        produced
    }

    /// Computes one step, having a turn of the pool.
    fn compute(&mut self, plan: &StepPlan, input: Input<'_>) -> Result<Produced, StepError> {
        let rows = rows_of(plan);
        self.check(plan.step, rows.len(), &input)?;
        self.work.fit(rows.len());
        if let Input::Activations(activations) = &input {
            self.work.hidden_mut(rows.len()).copy_from_slice(activations);
        }
        let Self { config, weights, kernels, pool, kv, work, .. } = self;
        let mut failed = pool.region(|lead| {
            let mut forward = Forward { config, weights, kernels: *kernels, lead, kv, work };
            if let Input::Tokens(ids) = &input {
                forward.embed(ids);
            }
            forward.layers(&rows)
        });
        if self.weights.head.is_none() {
            let hidden = self.work.hidden_mut(rows.len());
            for (row, failed) in hidden.chunks_exact_mut(self.config.hidden).zip(&failed) {
                if *failed {
                    row.fill(f32::NAN);
                }
            }
            return Ok(Produced::Activations(hidden.to_vec()));
        }
        let mut results = Vec::new();
        let mut first_row = 0;
        for run in &plan.runs {
            let outcome = self.answer(run, first_row, &mut failed[first_row..first_row + run.rows]);
            results.extend(outcome.map(|outcome| RunResult { sequence: run.sequence, outcome }));
            first_row += run.rows;
        }
        Ok(Produced::Results(results))
    }

    fn open_and_close(&mut self, plan: &StepPlan) -> Result<(), StepError> {
        let frame = |what| StepError::Frame { step: plan.step, what };
        for id in &plan.close {
            self.sequences.remove(id);
            self.kv.release(*id);
        }
        for open in &plan.open {
            let mut ids =
                open.prompt.iter().chain(&open.completion).chain(open.sampling.logit_bias.keys());
            if ids.any(|id| *id as usize >= self.config.vocab) {
                return Err(frame(format!(
                    "sequence {} opens with token ids beyond the vocabulary",
                    open.id
                )));
            }
            let opened = Opened {
                sampling: open.sampling.clone(),
                history: History::new(&open.prompt, &open.completion),
                constraint: self.constrain(open),
            };
            if self.sequences.insert(open.id, opened).is_some() {
                return Err(frame(format!("sequence {} is open already", open.id)));
            }
            self.kv.open(open.id, &open.pages)?;
        }
        for run in &plan.runs {
            if !self.sequences.contains_key(&run.sequence) {
                return Err(frame(format!("sequence {} is not open", run.sequence)));
            }
            if run.rows == 0 || run.position + run.rows > self.config.context {
                return Err(frame(format!(
                    "{} rows at position {} of a context of {}",
                    run.rows, run.position, self.config.context
                )));
            }
            if let RunOutput::Score(targets) = &run.output {
                let fits = targets.len() == run.rows || targets.len() + 1 == run.rows;
                if !fits || targets.iter().any(|id| *id as usize >= self.config.vocab) {
                    return Err(frame("score targets do not fit their rows".to_owned()));
                }
            }
            self.kv.extend(run.sequence, run.position, run.rows, &run.pages)?;
        }
        Ok(())
    }

    fn check(&self, step: u64, rows: usize, input: &Input<'_>) -> Result<(), StepError> {
        let (got, expected) = match input {
            Input::Tokens(ids) => (ids.len(), rows),
            Input::Activations(activations) => (activations.len(), rows * self.config.hidden),
        };
        if got != expected {
            let what = format!("{got} inputs came for {rows} rows, {expected} were due");
            return Err(StepError::Frame { step, what });
        }
        Ok(())
    }

    /// Returns what the last stage says of `run`, whose rows begin at `first_row` of the step.
    fn answer(&mut self, run: &Run, first_row: usize, failed: &mut [bool]) -> Option<RunOutcome> {
        if failed.contains(&true) {
            return Some(RunOutcome::NonFinite);
        }
        let last = first_row + run.rows;
        match &run.output {
            RunOutput::None if self.observer.is_none() => None,
            RunOutput::None => {
                self.for_each_logits(run, first_row..last, |_, _, _| {});
                None
            }
            RunOutput::Sample => {
                let observe_from = if self.observer.is_some() { first_row } else { last - 1 };
                let mut sampled = Ok((0, None));
                let finite = self.for_each_logits(run, observe_from..last, |this, row, logits| {
                    if row + 1 == last {
                        sampled = this.sample(run, logits);
                    }
                });
                Some(match sampled {
                    _ if !finite => RunOutcome::NonFinite,
                    Ok((id, logprobs)) => RunOutcome::Token { id, logprobs },
                    Err(error) => RunOutcome::Grammar(error.to_string()),
                })
            }
            RunOutput::Score(targets) => {
                let mut scores = Scores::default();
                let finite = self.for_each_logits(run, first_row..last, |this, row, logits| {
                    let best = this.kernels.argmax(logits);
                    scores.top_ids.push(token_id(best));
                    if let Some(&target) = targets.get(row - first_row) {
                        let normal = Normalizer::new(this.kernels, logits, logits[best]);
                        scores.logprobs.push(normal.logprob(logits, target));
                    }
                });
                Some(if finite { RunOutcome::Scores(scores) } else { RunOutcome::NonFinite })
            }
        }
    }

    /// Returns the token sampled from `logits` after `run`, which becomes part of the history.
    fn sample(
        &mut self,
        run: &Run,
        logits: &[f32],
    ) -> Result<(u32, Option<TokenLogprobs>), GrammarError> {
        let Self { sampler, kernels, sequences, .. } = self;
        let Opened { sampling, history, constraint } =
            sequences.get_mut(&run.sequence).expect("runs are of open sequences");
        let position = run.position + run.rows;
        let mut constraint = match constraint {
            Some(Ok(constraint)) => Some(constraint),
            Some(Err(error)) => return Err(error.clone()),
            None => None,
        };
        let mask = constraint.as_mut().map(|constraint| constraint.mask()).transpose()?;
        let id = sampler.sample(*kernels, logits, sampling, history, mask.as_ref(), position);
        if sampling.looks_at_completion() {
            history.push(id);
        }
        if let Some(constraint) = constraint {
            constraint.accept(id)?;
        }
        let logprobs = sampling.top_logprobs.map(|top| {
            let normal = Normalizer::new(*kernels, logits, logits[kernels.argmax(logits)]);
            let top = largest(logits, top as usize);
            TokenLogprobs {
                logprob: normal.logprob(logits, id),
                top: top.into_iter().map(|id| (id, normal.logprob(logits, id))).collect(),
            }
        });
        Ok((id, logprobs))
    }

    /// Returns the state of the grammar of a sequence that begins, in the stage that samples.
    fn constrain(&self, open: &OpenSequence) -> Option<Result<Constraint, GrammarError>> {
        self.weights.head.as_ref()?;
        let grammar = open.sampling.grammar.as_ref()?;
        Some(self.grammars.as_ref().ok_or(GrammarError::NoTokenizer).and_then(|grammars| {
            let mut constraint = grammars.compile(grammar)?;
            for id in &open.completion {
                constraint.accept(*id)?;
            }
            Ok(constraint)
        }))
    }

    /// Computes the logits of some rows of the step, a few at a time, and hands each row over.
    /// Returns false, at the first such row, if a logit is not finite.
    fn for_each_logits(
        &mut self,
        run: &Run,
        rows: Range<usize>,
        mut take: impl FnMut(&mut Self, usize, &[f32]),
    ) -> bool {
        let mut buffer = std::mem::take(&mut self.work.logits);
        let mut finite = true;
        let mut start = rows.start;
        while finite && start < rows.end {
            let end = rows.end.min(start + LOGIT_ROWS);
            buffer.resize((end - start) * self.config.vocab, 0.0);
            let Self { config, weights, kernels, pool, kv, work, .. } = self;
            pool.region(|lead| {
                let mut forward = Forward { config, weights, kernels: *kernels, lead, kv, work };
                forward.logits(start..end, &mut buffer);
            });
            let first_row = rows.start.max(start);
            for (row, logits) in (first_row..end).zip(buffer.chunks_exact(self.config.vocab)) {
                if !logits.iter().all(|logit| logit.is_finite()) {
                    finite = false;
                    break;
                }
                if let Some(mut observer) = self.observer.take() {
                    let first = rows.end - run.rows;
                    observer(run.sequence, run.position + (row - first), logits);
                    self.observer = Some(observer);
                }
                take(self, row, logits);
            }
            start = end;
        }
        self.work.logits = buffer;
        finite
    }
}

impl fmt::Debug for StageRunner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StageRunner")
            .field("weights", &self.weights.range)
            .field("kernels", &self.kernels)
            .finish_non_exhaustive()
    }
}

/// What turns the logits of a row into log-probabilities.
struct Normalizer {
    max: f32,
    log_sum: f32,
}

impl Normalizer {
    /// Returns that of `logits`, the largest of which is `max`.
    fn new(kernels: Kernels, logits: &[f32], max: f32) -> Self {
        Self { max, log_sum: libm::logf(kernels.sum_exp(logits, max)) }
    }

    fn logprob(&self, logits: &[f32], id: u32) -> f32 {
        logits[id as usize] - self.max - self.log_sum
    }
}

fn rows_of(plan: &StepPlan) -> Vec<Row> {
    plan.runs
        .iter()
        .flat_map(|run| {
            (run.position..run.position + run.rows)
                .map(|position| Row { sequence: run.sequence, position })
        })
        .collect()
}
