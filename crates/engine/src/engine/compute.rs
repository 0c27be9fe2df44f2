//! What runs on the compute thread.

use std::{
    collections::HashMap,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, atomic::Ordering},
};

use super::{Attachment, Command, EventSink, Shared, StepObserver, StepReport, limits, lock};
use crate::{
    pipeline::StageFrame,
    plan::StepResult,
    request::{SequenceEvent, SequenceFailure},
    runner::{Input, Produced, StageRunner},
    scheduler::{Planned, RequestKey, Scheduler, SchedulerConfig},
};

/// What the compute thread owns.
pub(super) struct Computer {
    pub(super) shared: Arc<Shared>,
    /// The limits of this stage alone.
    pub(super) base: SchedulerConfig,
    pub(super) scheduler: Scheduler,
    pub(super) runner: StageRunner,
    pub(super) sinks: HashMap<RequestKey, EventSink>,
    pub(super) downstream: Option<Attachment>,
    pub(super) observer: Option<StepObserver>,
}

impl Computer {
    pub(super) fn run(mut self) {
        // A panic is a defect of ours. It ends this engine, not the process: the sinks are dropped,
        // which tells their owners, and `is_alive` turns false.
        let shared = Arc::clone(&self.shared);
        let ended = catch_unwind(AssertUnwindSafe(|| self.compute_until_stopped()));
        shared.stopped.store(true, Ordering::Release);
        lock(&shared.inbox).clear();
        if let Err(panic) = ended {
            std::panic::resume_unwind(panic);
        }
    }

    fn compute_until_stopped(&mut self) {
        let mut idle = true;
        loop {
            for command in self.shared.receive(idle) {
                if matches!(command, Command::Stop) {
                    self.fail_all(&SequenceFailure::Stopped);
                    return;
                }
                self.obey(command);
            }
            idle = match self.scheduler.plan() {
                Some(planned) => {
                    self.compute(planned);
                    false
                }
                None => true,
            };
            *lock(&self.shared.load) = self.scheduler.load();
        }
    }

    fn obey(&mut self, command: Command) {
        match command {
            Command::Submit(key, request, mut sink) => match self.scheduler.submit(key, request) {
                Ok(None) => {
                    self.sinks.insert(key, sink);
                }
                Ok(Some(event)) => sink(event),
                // `Engine::submit` has checked; the limits may have shrunk since.
                Err(error) => {
                    sink(SequenceEvent::Failed(SequenceFailure::PipelineBroken(error.to_string())));
                }
            },
            Command::Cancel(key) => {
                if self.sinks.remove(&key).is_some() {
                    self.scheduler.cancel(key);
                }
            }
            Command::Attach(attachment) => self.attach(attachment),
            Command::Detach { epoch, reason } => {
                if self.is_current(epoch) {
                    self.detach(reason);
                }
            }
            Command::Deliver { epoch, result } => {
                if self.is_current(epoch) {
                    self.take_in(result);
                }
            }
            Command::Observe(observer) => self.observer = Some(observer),
            Command::Draft(drafter, tokens) => self.scheduler.draft_with(drafter, tokens),
            Command::Stop => unreachable!("the loop ends at a stop"),
        }
    }

    fn is_current(&self, epoch: u64) -> bool {
        self.downstream.as_ref().is_some_and(|downstream| downstream.epoch == epoch)
    }

    fn attach(&mut self, attachment: Attachment) {
        // The engine takes requests already: to refuse some in between would be wrong.
        self.lose_link("it was replaced by a newer link".to_owned());
        let config = limits(self.base, &attachment);
        self.scheduler.reconfigure(config);
        *lock(&self.shared.limits) = config;
        self.downstream = Some(attachment);
        self.shared.attached.store(true, Ordering::Release);
    }

    fn detach(&mut self, reason: String) {
        self.shared.attached.store(false, Ordering::Release);
        self.lose_link(reason);
    }

    fn lose_link(&mut self, reason: String) {
        self.downstream = None;
        self.runner.reset();
        self.fail_all(&SequenceFailure::PipelineBroken(reason));
    }

    fn fail_all(&mut self, failure: &SequenceFailure) {
        for key in self.scheduler.abandon() {
            self.tell(key, SequenceEvent::Failed(failure.clone()));
        }
    }

    fn compute(&mut self, planned: Planned) {
        for (key, event) in planned.events {
            self.tell(key, event);
        }
        let step = planned.plan.step;
        let produced = self
            .runner
            .step(&planned.plan, Input::Tokens(&planned.ids))
            .unwrap_or_else(|error| panic!("the scheduler planned what cannot be: {error}"));
        let elapsed = self.runner.last_step();
        let screen = self.runner.screen_tally();
        self.scheduler.observe(&planned.shape, elapsed);
        if let Some(observer) = &mut self.observer {
            let (shape, tally) = (planned.shape, planned.tally);
            observer(&StepReport { shape, tally, elapsed, screen });
        }
        match produced {
            Produced::Results(results) => self.take_in(StepResult { step, results }),
            Produced::Activations(activations) => {
                let Some(attachment) = &mut self.downstream else { return };
                let frame = StageFrame { plan: planned.plan, activations };
                if let Err(lost) = attachment.downstream.send(frame) {
                    self.detach(lost.to_string());
                }
            }
        }
    }

    fn take_in(&mut self, result: StepResult) {
        match self.scheduler.apply(result) {
            Ok(events) => {
                for (key, event) in events {
                    self.tell(key, event);
                }
            }
            Err(mismatch) => self.detach(mismatch.to_string()),
        }
    }

    fn tell(&mut self, key: RequestKey, event: SequenceEvent) {
        let last = !matches!(event, SequenceEvent::Scheduled { .. } | SequenceEvent::Token { .. });
        if let Some(sink) = self.sinks.get_mut(&key) {
            sink(event);
        }
        if last {
            self.sinks.remove(&key);
        }
    }
}
