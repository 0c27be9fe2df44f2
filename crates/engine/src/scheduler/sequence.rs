//! One sequence on its way through the scheduler.

use super::RequestKey;
use crate::{
    plan::{Run, RunOutcome, RunOutput, Scores, SequenceId},
    request::{Output, SequenceEvent, SequenceFailure, SequenceRequest, StopReason},
};

#[derive(Debug)]
pub(super) struct Sequence {
    pub(super) key: RequestKey,
    pub(super) request: SequenceRequest,
    /// Prompt, resumed and generated tokens.
    pub(super) tokens: Vec<u32>,
    /// Positions whose keys and values the stages hold.
    pub(super) computed: usize,
    pub(super) cancelled: bool,
    pub(super) scores: Scores,
    /// While running.
    pub(super) id: SequenceId,
    pub(super) opened: bool,
    pub(super) pages: usize,
    pub(super) in_flight: bool,
}

impl Sequence {
    /// Returns whether only the row of the last token is missing, and a token is wanted after it.
    pub(super) fn decodes(&self) -> bool {
        self.computed + 1 == self.tokens.len()
            && matches!(self.request.output, Output::Generate { .. })
    }

    /// Returns what the last stage tells of the next `rows` rows.
    pub(super) fn output_of(&self, rows: usize) -> RunOutput {
        let end = self.computed + rows;
        match self.request.output {
            Output::Score => RunOutput::Score(
                self.tokens[self.computed + 1..self.tokens.len().min(end + 1)].to_vec(),
            ),
            Output::Generate { .. } if end == self.tokens.len() => RunOutput::Sample,
            Output::Generate { .. } => RunOutput::None,
        }
    }

    /// Takes in the answer to `run`; the error names what does not fit.
    pub(super) fn take_in(
        &mut self,
        run: &Run,
        outcome: Option<RunOutcome>,
        context: usize,
        vocab: usize,
    ) -> Result<Vec<SequenceEvent>, &'static str> {
        match (&run.output, outcome) {
            (_, Some(RunOutcome::NonFinite)) => {
                Ok(vec![SequenceEvent::Failed(SequenceFailure::NonFinite)])
            }
            (RunOutput::None, None) => Ok(Vec::new()),
            (RunOutput::Sample, Some(RunOutcome::Token(id))) => {
                if id as usize >= vocab {
                    return Err("a token id beyond the vocabulary");
                }
                let index = self.tokens.len() - self.request.prompt.len();
                self.tokens.push(id);
                let mut events = vec![SequenceEvent::Token { index, id }];
                events.extend(self.stop_reason(context).map(SequenceEvent::Finished));
                Ok(events)
            }
            (RunOutput::Score(targets), Some(RunOutcome::Scores(scores))) => {
                if scores.logprobs.len() != targets.len() || scores.top_ids.len() != run.rows {
                    return Err("as many scores as rows are due");
                }
                self.scores.logprobs.extend(scores.logprobs);
                self.scores.top_ids.extend(scores.top_ids);
                let done = self.computed == self.tokens.len();
                let scores = done.then(|| std::mem::take(&mut self.scores));
                Ok(scores.map(SequenceEvent::Scores).into_iter().collect())
            }
            _ => Err("a result of another kind is due"),
        }
    }

    /// Returns why the completion is complete, if it is.
    pub(super) fn stop_reason(&self, context: usize) -> Option<StopReason> {
        let Output::Generate { max_tokens, stop_ids } = &self.request.output else { return None };
        let completion = &self.tokens[self.request.prompt.len()..];
        if completion.last().is_some_and(|id| stop_ids.contains(id)) {
            Some(StopReason::Eos)
        } else if completion.len() >= *max_tokens {
            Some(StopReason::MaxTokens)
        } else if self.tokens.len() >= context {
            Some(StopReason::Context)
        } else {
            None
        }
    }
}
