//! The compute thread: takes requests in, plans steps, computes them, tells what came out.

mod compute;
mod error;
mod report;
mod screen;
#[cfg(test)]
mod tests;

use std::{
    collections::{HashMap, VecDeque},
    fmt,
    ops::{ControlFlow, Range},
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::JoinHandle,
};

use tercet_kernels::Isa;
use tercet_text::Grammars;

use self::compute::Computer;
pub use self::{
    error::{EngineError, StepError},
    report::{StepObserver, StepReport},
    screen::{HeadScreen, ScreenTally, UnknownHeadScreen},
};
use crate::{
    drafter::{Drafter, PromptLookup, Speculation},
    model_file::{ModelConfig, ModelError, ModelFile, Placement, Report, StageWeights},
    pipeline::Downstream,
    plan::StepResult,
    pool::{ComputePool, Unverified},
    request::{SequenceEvent, SequenceRequest, SubmitError},
    runner::{LogitsObserver, StageRunner},
    scheduler::{Load, RequestKey, Scheduler, SchedulerConfig},
};

/// How an engine is set up.
#[derive(Clone, Debug)]
pub struct EngineOptions {
    /// Compute threads, at least 1.
    pub threads: usize,
    /// Instruction set; the best that the CPU has if absent.
    pub isa: Option<Isa>,
    /// Layers to hold; all if absent.
    pub layers: Option<Range<usize>>,
    /// Most tokens of a sequence; the model's context if absent or larger.
    pub context: Option<usize>,
    /// Most bytes of KV cache.
    pub kv_bytes: usize,
    /// Most sequences computed at once.
    pub max_sequences: usize,
    /// Most sequences waiting.
    pub max_waiting: usize,
    /// Most prompt rows in a step.
    pub prefill_chunk: usize,
    /// Where the weights live.
    pub placement: Placement,
    /// How many times as long a step may take with prompt rows as with the decoding ones alone:
    /// more than 1. Prompts get at least a row, however large that makes the step. [`f64::MAX`]
    /// always gives them the whole chunk.
    pub prefill_stretch: f64,
    /// Whether tokens are guessed ahead. A pipeline of several stages never does.
    pub speculation: Speculation,
    /// Whether tokens are chosen with the help of a compressed copy of the head.
    pub head_screen: HeadScreen,
    /// Compiles the grammars of requests; without it a request that has one fails.
    pub grammars: Option<Arc<Grammars>>,
}

impl Default for EngineOptions {
    fn default() -> Self {
        Self {
            threads: 1,
            isa: None,
            layers: None,
            context: None,
            kv_bytes: 1 << 30,
            max_sequences: 32,
            max_waiting: 256,
            prefill_chunk: 128,
            placement: Placement::default(),
            prefill_stretch: 1.6,
            speculation: Speculation::Off,
            head_screen: HeadScreen::default(),
            grammars: None,
        }
    }
}

impl EngineOptions {
    /// Returns the most tokens that a sequence of this model may have.
    pub fn context_of(&self, model: &ModelConfig) -> usize {
        self.context.map_or(model.context, |context| context.min(model.context))
    }
}

/// Takes what happens to one sequence, in order, on the compute thread: it must not block.
pub type EventSink = Box<dyn FnMut(SequenceEvent) + Send>;

/// The later stages of a pipeline, as the first one sees them.
#[derive(Debug)]
pub struct Attachment {
    /// Sends frames to the next stage.
    pub downstream: Box<dyn Downstream>,
    /// Names this link: results and losses of other epochs are ignored.
    pub epoch: u64,
    /// Number of stages, the first included.
    pub stages: usize,
    /// KV pages of the smallest later stage.
    pub kv_pages: usize,
}

/// A model, or its first layers, being computed on a thread of its own.
pub struct Engine {
    shared: Arc<Shared>,
    facts: Facts,
    thread: Option<JoinHandle<()>>,
}

/// What does not change while an engine lives.
#[derive(Debug)]
struct Facts {
    config: ModelConfig,
    layers: Range<usize>,
    isa: Isa,
    scheduler: SchedulerConfig,
    weights: Arc<StageWeights>,
    pool: ComputePool,
    kv_bytes: usize,
    screen_bytes: Option<usize>,
}

#[derive(Debug)]
struct Shared {
    inbox: Mutex<VecDeque<Command>>,
    arrived: Condvar,
    next_key: AtomicU64,
    load: Mutex<Load>,
    /// Limits in force: those of the smallest stage.
    limits: Mutex<SchedulerConfig>,
    attached: AtomicBool,
    stopped: AtomicBool,
}

enum Command {
    Submit(RequestKey, SequenceRequest, EventSink),
    Cancel(RequestKey),
    Attach(Attachment),
    Detach { epoch: u64, reason: String },
    Deliver { epoch: u64, result: StepResult },
    Observe(StepObserver),
    Draft(Option<Box<dyn Drafter>>, usize),
    Stop,
}

impl fmt::Debug for Command {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Submit(..) => "Submit",
            Self::Cancel(..) => "Cancel",
            Self::Attach(..) => "Attach",
            Self::Detach { .. } => "Detach",
            Self::Deliver { .. } => "Deliver",
            Self::Observe(..) => "Observe",
            Self::Draft(..) => "Draft",
            Self::Stop => "Stop",
        })
    }
}

/// A submitted sequence; dropping it cancels the sequence within one step.
#[derive(Debug)]
pub struct SequenceHandle {
    shared: Arc<Shared>,
    key: RequestKey,
}

impl Engine {
    /// Loads the weights and starts computing, on threads of its own. Layers, if a range is given, must begin at 0.
    pub fn load(model: &ModelFile, options: &EngineOptions) -> Result<Self, EngineError> {
        Self::load_observed(model, options, None)
    }

    /// As [`Self::load`], and shows every row of logits to `observer`, on one of the compute threads.
    pub fn load_observed(
        model: &ModelFile,
        options: &EngineOptions,
        observer: Option<LogitsObserver>,
    ) -> Result<Self, EngineError> {
        let pool = ComputePool::new(options.threads)?;
        Self::load_on(model, options, &pool, observer, &mut |_| ControlFlow::Continue(()))
    }

    /// As [`Self::load_observed`], computed on the threads of `pool`, whatever `options` says of
    /// threads: engines that share a pool take turns, step by step. Tells `report` how far the
    /// reading of the weights is, which may end it.
    pub fn load_on(
        model: &ModelFile,
        options: &EngineOptions,
        pool: &ComputePool,
        observer: Option<LogitsObserver>,
        report: Report<'_>,
    ) -> Result<Self, EngineError> {
        for (limit, name) in [
            (options.max_sequences, "max_sequences"),
            (options.max_waiting, "max_waiting"),
            (options.prefill_chunk, "prefill_chunk"),
        ] {
            if limit == 0 {
                return Err(EngineError::Zero(name));
            }
        }
        if !(options.prefill_stretch > 1.0 && options.prefill_stretch.is_finite()) {
            return Err(EngineError::Stretch(options.prefill_stretch));
        }
        if options.context == Some(0) {
            return Err(EngineError::Zero("context"));
        }
        let layers = options.layers.clone().unwrap_or(0..model.config.layers);
        if layers.start != 0 {
            return Err(EngineError::Layers {
                layers,
                expected: "an engine begins at layer 0; later layers follow one".to_owned(),
            });
        }
        let mut runner = StageRunner::load(model, layers.clone(), options, pool.clone(), report)?;
        runner.observe_logits(observer);
        let scheduler = SchedulerConfig {
            vocab: model.config.vocab,
            context: options.context_of(&model.config),
            pages: runner.kv_pages(),
            max_sequences: options.max_sequences,
            max_waiting: options.max_waiting,
            prefill_chunk: options.prefill_chunk,
            prefill_stretch: options.prefill_stretch,
            model: model.header_digest(),
            steps_in_flight: 1,
        };
        let shared = Arc::new(Shared {
            inbox: Mutex::new(VecDeque::new()),
            arrived: Condvar::new(),
            next_key: AtomicU64::new(0),
            load: Mutex::new(Load { pages: scheduler.pages, ..Load::default() }),
            limits: Mutex::new(scheduler),
            attached: AtomicBool::new(layers.end == model.config.layers),
            stopped: AtomicBool::new(false),
        });
        let facts = Facts {
            config: model.config.clone(),
            layers,
            isa: runner.isa(),
            scheduler,
            weights: runner.weights(),
            pool: pool.clone(),
            kv_bytes: runner.kv_bytes(),
            screen_bytes: runner.screen_bytes(),
        };
        let base = scheduler;
        let mut scheduler = Scheduler::new(base);
        match options.speculation {
            Speculation::Off => {}
            Speculation::Lookup { tokens } => {
                scheduler.draft_with(Some(Box::new(PromptLookup)), tokens);
            }
        }
        let computer = Computer {
            shared: Arc::clone(&shared),
            base,
            scheduler,
            runner,
            sinks: HashMap::new(),
            downstream: None,
            observer: None,
        };
        let thread = std::thread::Builder::new()
            .name("tercet-engine".to_owned())
            .spawn(move || computer.run())
            .map_err(EngineError::Thread)?;
        Ok(Self { shared, facts, thread: Some(thread) })
    }

    /// Returns the model's configuration.
    pub fn config(&self) -> &ModelConfig {
        &self.facts.config
    }

    /// Returns the layers held.
    pub fn layers(&self) -> Range<usize> {
        self.facts.layers.clone()
    }

    /// Returns whether the engine holds the whole model.
    pub fn is_whole(&self) -> bool {
        self.facts.layers.end == self.facts.config.layers
    }

    /// Returns the instruction set in use.
    pub fn isa(&self) -> Isa {
        self.facts.isa
    }

    /// Returns the most tokens that a sequence can have now.
    pub fn context_limit(&self) -> usize {
        lock(&self.shared.limits).context_limit()
    }

    /// Returns the most sequences computed at once.
    pub fn max_sequences(&self) -> usize {
        self.facts.scheduler.max_sequences
    }

    /// Returns the bytes of the KV cache: at most those of the options, and no more than the
    /// sequences can fill.
    pub fn kv_bytes(&self) -> usize {
        self.facts.kv_bytes
    }

    /// Returns the digests of the tensors held. Hashes them all, in turns with whoever else uses
    /// the pool, and tells `report` how far it is.
    ///
    /// # Errors
    /// [`ModelError::Interrupted`] if `report` says so.
    pub fn part_digests(&self, report: Report<'_>) -> Result<Vec<(String, [u8; 32])>, ModelError> {
        self.facts.pool.part_digests(&self.facts.weights, report)
    }

    /// Returns the check of what a native file says of its weights, `None` for other files.
    pub fn unverified(&self) -> Option<Unverified> {
        Unverified::new(&self.facts.pool, &self.facts.weights)
    }

    /// Returns how full the engine is.
    pub fn load_now(&self) -> Load {
        *lock(&self.shared.load)
    }

    /// Returns whether the engine still computes; false after a stop or a defect.
    pub fn is_alive(&self) -> bool {
        !self.shared.stopped.load(Ordering::Acquire)
    }

    /// Queues a sequence. `sink` is told what happens to it until its last event; if it is dropped
    /// without one, the engine has failed.
    pub fn submit(
        &self,
        request: SequenceRequest,
        sink: EventSink,
    ) -> Result<SequenceHandle, SubmitError> {
        if !self.is_alive() {
            return Err(SubmitError::Stopped);
        }
        if !self.shared.attached.load(Ordering::Acquire) {
            return Err(SubmitError::NoPipeline);
        }
        Scheduler::check(&lock(&self.shared.limits), &request)?;
        let key = RequestKey(self.shared.next_key.fetch_add(1, Ordering::Relaxed));
        let mut inbox = lock(&self.shared.inbox);
        let max = self.facts.scheduler.max_waiting;
        let queued = inbox.iter().filter(|command| matches!(command, Command::Submit(..))).count();
        if queued + lock(&self.shared.load).waiting >= max {
            return Err(SubmitError::QueueFull { waiting: max });
        }
        inbox.push_back(Command::Submit(key, request, sink));
        drop(inbox);
        self.shared.arrived.notify_one();
        Ok(SequenceHandle { shared: Arc::clone(&self.shared), key })
    }

    /// Returns the bytes of the screen of the head, if it has one.
    pub fn screen_bytes(&self) -> Option<usize> {
        self.facts.screen_bytes
    }

    /// Ends all sequences, and the computing after the present step.
    pub fn stop(&self) {
        self.shared.send(Command::Stop);
    }

    /// Tells `observer` of every step from now on, instead of the observer before.
    pub fn observe_steps(&self, observer: StepObserver) {
        self.shared.send(Command::Observe(observer));
    }

    /// Has `drafter` guess up to `tokens` tokens of a sequence ahead from now on, instead of what the
    /// options say; nobody if absent.
    pub fn draft_with(&self, drafter: Option<Box<dyn Drafter>>, tokens: usize) {
        self.shared.send(Command::Draft(drafter, tokens));
    }

    /// Attaches the later stages of the pipeline: sequences submitted from now on go through them.
    pub fn attach(&self, attachment: Attachment) {
        *lock(&self.shared.limits) = limits(self.facts.scheduler, &attachment);
        self.shared.attached.store(true, Ordering::Release);
        self.shared.send(Command::Attach(attachment));
    }

    /// Says that the link of `epoch` is lost: its sequences fail.
    pub fn detach(&self, epoch: u64, reason: &str) {
        self.shared.send(Command::Detach { epoch, reason: reason.to_owned() });
    }

    /// Hands in what the last stage computed.
    pub fn deliver(&self, epoch: u64, result: StepResult) {
        self.shared.send(Command::Deliver { epoch, result });
    }
}

impl fmt::Debug for Engine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Engine")
            .field("layers", &self.facts.layers)
            .field("load", &self.load_now())
            .finish_non_exhaustive()
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.stop();
        if let Some(thread) = self.thread.take() {
            // A panic of the compute thread was told when it happened.
            drop(thread.join());
        }
    }
}

impl Drop for SequenceHandle {
    fn drop(&mut self) {
        self.shared.send(Command::Cancel(self.key));
    }
}

impl Shared {
    fn send(&self, command: Command) {
        lock(&self.inbox).push_back(command);
        self.arrived.notify_one();
    }

    /// Returns all commands that have come; waits for one if `idle`.
    fn receive(&self, idle: bool) -> VecDeque<Command> {
        let mut inbox = lock(&self.inbox);
        if idle {
            inbox = self
                .arrived
                .wait_while(inbox, |inbox| inbox.is_empty())
                .unwrap_or_else(PoisonError::into_inner);
        }
        std::mem::take(&mut *inbox)
    }
}

/// Returns the limits of a stage together with the later ones.
fn limits(base: SchedulerConfig, attachment: &Attachment) -> SchedulerConfig {
    SchedulerConfig {
        pages: base.pages.min(attachment.kv_pages),
        steps_in_flight: attachment.stages,
        ..base
    }
}

/// Locks; a poisoned lock is taken as it is, since every section below leaves its data whole.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
