//! Computes the steps of one stage: opens and closes sequences, runs the rows, samples at the end.

mod answers;
mod screening;

use std::{collections::HashMap, fmt, ops::Range, sync::Arc, time::Duration};

use tercet_kernels::{Isa, Kernels, Screen};
use tercet_text::{Constraint, GrammarError, Grammars};

use self::answers::Answers;
use crate::{
    engine::{EngineError, EngineOptions, ScreenTally, StepError},
    forward::{Forward, Row, Workspace},
    kv::{KvCache, KvShape},
    model_file::{ModelConfig, ModelError, ModelFile, Report, StageWeights},
    plan::{OpenSequence, RunOutput, RunResult, SequenceId, StepPlan},
    pool::ComputePool,
    pool::Unverified,
    sampler::{History, Sampler, SamplingParams},
};

/// Sees the logits of a row: the sequence, the position of the row, one logit for each token id.
pub type LogitsObserver = Box<dyn FnMut(SequenceId, usize, &[f32]) + Send>;

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
    /// One for each thread.
    samplers: Vec<Sampler>,
    observer: Option<LogitsObserver>,
    screen: Option<Screen>,
    screened: ScreenTally,
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
        let weights = Arc::new(model.load_reporting(layers, options.placement, report)?);
        let screen = weights
            .head
            .as_ref()
            .and_then(|head| screening::build(kernels, &pool, &head.matrix, options.head_screen));
        Ok(Self {
            weights,
            screen,
            screened: ScreenTally::default(),
            kernels,
            pool,
            kv: KvCache::new(shape, pages.min(useful)),
            sequences: HashMap::new(),
            work: Workspace::new(&model.config),
            samplers: Vec::new(),
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

    pub(crate) fn unverified(&self) -> Option<Unverified> {
        Unverified::new(&self.pool, &self.weights)
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

    /// Returns the bytes of the screen of the head, if it has one.
    pub(crate) fn screen_bytes(&self) -> Option<usize> {
        self.screen.as_ref().map(Screen::size)
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

    /// Returns what the screen of the head did since it was last asked.
    pub(crate) fn screen_tally(&mut self) -> ScreenTally {
        std::mem::take(&mut self.screened)
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
        let Self { config, weights, kernels, pool, kv, work, sequences, .. } = self;
        let (samplers, observer) = (&mut self.samplers, &mut self.observer);
        let (screen, tally) = (self.screen.as_ref(), &mut self.screened);
        let mut logits = std::mem::take(&mut work.logits);
        let produced = pool.region(|lead| {
            let mut forward = Forward { config, weights, kernels: *kernels, lead, kv, work };
            if let Input::Tokens(ids) = &input {
                forward.embed(ids);
            }
            let failed = forward.layers(&rows);
            if weights.head.is_some() {
                let logits = &mut logits;
                let mut answers = Answers { sequences, samplers, observer, screen, tally, logits };
                return Produced::Results(answers.answer(&mut forward, plan, &failed));
            }
            let hidden = forward.work.hidden_mut(rows.len());
            for (row, failed) in hidden.chunks_exact_mut(config.hidden).zip(failed) {
                if failed {
                    row.fill(f32::NAN);
                }
            }
            Produced::Activations(hidden.to_vec())
        });
        self.work.logits = logits;
        Ok(produced)
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
            if let RunOutput::Verify(drafts) = &run.output {
                let fits = drafts.len() + 1 == run.rows;
                if !fits || drafts.iter().any(|id| *id as usize >= self.config.vocab) {
                    return Err(frame("drafts do not fit their rows".to_owned()));
                }
            }
            self.kv.extend(run.sequence, run.position, run.rows, run.drafts(), &run.pages)?;
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
}

impl fmt::Debug for StageRunner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StageRunner")
            .field("weights", &self.weights.range)
            .field("kernels", &self.kernels)
            .finish_non_exhaustive()
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
