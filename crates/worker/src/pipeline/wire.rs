//! Steps and results as messages, and back. What comes from a peer is checked here as far as it can
//! be without the stage's state.

use std::sync::Arc;

use bytes::Bytes;
use tercet_engine::{
    SamplingParams, StageFrame,
    plan::{
        OpenSequence, PageId, Run, RunOutcome, RunOutput, RunResult, SampledToken, Scores,
        SequenceId, StepPlan, StepResult, TokenLogprobs,
    },
};
use tercet_proto::{GrammarSpec, Reason, v1};
use thiserror::Error;

use crate::{core::wire as number, grammar};

/// A message that no stage of this release sends.
#[derive(Debug, Error, PartialEq)]
pub(crate) enum WireError {
    #[error("step {step}: {bytes} bytes of activations are not whole numbers of f32")]
    Activations { step: u64, bytes: usize },
    #[error("step {step}: sequence {sequence} opens with unusable sampler parameters")]
    Sampler { step: u64, sequence: u64 },
    #[error("step {step}: the result of sequence {sequence} is empty")]
    Outcome { step: u64, sequence: u64 },
    #[error("step {step}: sequence {sequence} failed in an unknown way: {failure}")]
    Failure { step: u64, sequence: u64, failure: String },
}

/// Returns a step as a message.
pub(crate) fn step(epoch: u64, frame: StageFrame) -> v1::Step {
    let StageFrame { plan, activations } = frame;
    let mut bytes = Vec::with_capacity(size_of_val(activations.as_slice()));
    for value in &activations {
        bytes.extend_from_slice(&value.to_le_bytes());
    }
    v1::Step {
        epoch,
        step: plan.step,
        open: plan.open.into_iter().map(open).collect(),
        close: plan.close.into_iter().map(|sequence| sequence.0).collect(),
        runs: plan.runs.into_iter().map(run).collect(),
        activations: Bytes::from(bytes),
    }
}

fn open(open: OpenSequence) -> v1::OpenSequence {
    let sampling = open.sampling;
    v1::OpenSequence {
        sequence: open.id.0,
        sampler: Some(v1::SamplerParameters {
            temperature: sampling.temperature,
            top_k: sampling.top_k,
            top_p: sampling.top_p,
            seed: sampling.seed,
            min_p: sampling.min_p,
            repetition_penalty: sampling.repetition_penalty,
            frequency_penalty: sampling.frequency_penalty,
            presence_penalty: sampling.presence_penalty,
            logit_bias: sampling.logit_bias,
            top_logprobs: sampling.top_logprobs,
            grammar: sampling.grammar.as_deref().map(grammar::message),
        }),
        traceparent: open.traceparent,
        pages: pages(open.pages),
        prompt_ids: open.prompt,
        completion_ids: open.completion,
    }
}

fn pages(pages: Vec<PageId>) -> Vec<u32> {
    pages.into_iter().map(|page| page.0).collect()
}

fn read_pages(pages: Vec<u32>) -> Vec<PageId> {
    pages.into_iter().map(PageId).collect()
}

fn run(run: Run) -> v1::Run {
    v1::Run {
        sequence: run.sequence.0,
        position: number(run.position),
        rows: number(run.rows),
        pages: pages(run.pages),
        output: match run.output {
            RunOutput::None => None,
            RunOutput::Sample => Some(v1::run::Output::Sample(v1::SampleOutput {})),
            RunOutput::Score(targets) => Some(v1::run::Output::Score(v1::ScoreOutput { targets })),
            RunOutput::Verify(drafts) => Some(v1::run::Output::Verify(v1::VerifyOutput { drafts })),
        },
    }
}

/// Reads a step.
pub(crate) fn read_step(message: v1::Step) -> Result<StageFrame, WireError> {
    let v1::Step { epoch: _, step, open, close, runs, activations } = message;
    let (values, rest) = activations.as_chunks::<4>();
    if !rest.is_empty() {
        return Err(WireError::Activations { step, bytes: activations.len() });
    }
    let activations = values.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
    let open = open.into_iter().map(|open| read_open(step, open)).collect::<Result<_, _>>()?;
    let close = close.into_iter().map(SequenceId).collect();
    let runs = runs.into_iter().map(read_run).collect();
    Ok(StageFrame { plan: StepPlan { step, open, close, runs }, activations })
}

fn read_open(step: u64, open: v1::OpenSequence) -> Result<OpenSequence, WireError> {
    let v1::OpenSequence { sequence, sampler, traceparent, pages, prompt_ids, completion_ids } =
        open;
    let sampling = sampler
        .map(|sampler| SamplingParams {
            temperature: sampler.temperature,
            top_k: sampler.top_k,
            top_p: sampler.top_p,
            seed: sampler.seed,
            min_p: sampler.min_p,
            repetition_penalty: sampler.repetition_penalty,
            frequency_penalty: sampler.frequency_penalty,
            presence_penalty: sampler.presence_penalty,
            logit_bias: sampler.logit_bias,
            grammar: sampler
                .grammar
                .and_then(GrammarSpec::read)
                .map(|spec| Arc::new(grammar::grammar(spec))),
            top_logprobs: sampler.top_logprobs,
        })
        .filter(SamplingParams::are_usable)
        .ok_or(WireError::Sampler { step, sequence })?;
    Ok(OpenSequence {
        id: SequenceId(sequence),
        sampling,
        traceparent,
        pages: read_pages(pages),
        prompt: prompt_ids,
        completion: completion_ids,
    })
}

fn read_run(run: v1::Run) -> Run {
    let size = |number: u32| usize::try_from(number).unwrap_or(usize::MAX);
    Run {
        sequence: SequenceId(run.sequence),
        position: size(run.position),
        rows: size(run.rows),
        pages: read_pages(run.pages),
        output: match run.output {
            None => RunOutput::None,
            Some(v1::run::Output::Sample(v1::SampleOutput {})) => RunOutput::Sample,
            Some(v1::run::Output::Score(score)) => RunOutput::Score(score.targets),
            Some(v1::run::Output::Verify(verify)) => RunOutput::Verify(verify.drafts),
        },
    }
}

/// Returns a result as a message.
pub(crate) fn result(epoch: u64, result: StepResult) -> v1::StepResult {
    let outcome = |outcome| match outcome {
        RunOutcome::Token { id, .. } => v1::run_result::Outcome::TokenId(id),
        RunOutcome::Tokens(tokens) => {
            let token = |SampledToken { id, logprobs }| v1::SampledToken {
                id,
                logprobs: logprobs.as_ref().map(write_logprobs),
            };
            let tokens = tokens.into_iter().map(token).collect();
            v1::run_result::Outcome::Tokens(v1::TokensResult { tokens })
        }
        RunOutcome::Scores(Scores { logprobs, top_ids }) => {
            v1::run_result::Outcome::Scores(v1::ScoreResult { logprobs, top_ids })
        }
        RunOutcome::NonFinite => {
            v1::run_result::Outcome::Failure(Reason::NonFinite.as_str().to_owned())
        }
        RunOutcome::Grammar(why) => v1::run_result::Outcome::GrammarFailure(why),
    };
    let results = result.results.into_iter().map(|run| v1::RunResult {
        sequence: run.sequence.0,
        logprobs: logprobs(&run.outcome),
        outcome: Some(outcome(run.outcome)),
    });
    v1::StepResult { epoch, step: result.step, results: results.collect() }
}

fn logprobs(outcome: &RunOutcome) -> Option<v1::SampledLogprobs> {
    let RunOutcome::Token { logprobs: Some(logprobs), .. } = outcome else { return None };
    Some(write_logprobs(logprobs))
}

fn write_logprobs(logprobs: &TokenLogprobs) -> v1::SampledLogprobs {
    let (top_ids, top_logprobs) = logprobs.top.iter().copied().unzip();
    v1::SampledLogprobs { logprob: logprobs.logprob, top_ids, top_logprobs }
}

fn read_logprobs(logprobs: v1::SampledLogprobs) -> TokenLogprobs {
    let v1::SampledLogprobs { logprob, top_ids, top_logprobs } = logprobs;
    TokenLogprobs { logprob, top: top_ids.into_iter().zip(top_logprobs).collect() }
}

/// Reads a result.
pub(crate) fn read_result(message: v1::StepResult) -> Result<StepResult, WireError> {
    let v1::StepResult { epoch: _, step, results } = message;
    let read = |run: v1::RunResult| {
        let sequence = run.sequence;
        let outcome = match run.outcome.ok_or(WireError::Outcome { step, sequence })? {
            v1::run_result::Outcome::TokenId(id) => {
                RunOutcome::Token { id, logprobs: run.logprobs.map(read_logprobs) }
            }
            v1::run_result::Outcome::Tokens(v1::TokensResult { tokens }) => {
                let token = |token: v1::SampledToken| SampledToken {
                    id: token.id,
                    logprobs: token.logprobs.map(read_logprobs),
                };
                RunOutcome::Tokens(tokens.into_iter().map(token).collect())
            }
            v1::run_result::Outcome::Scores(v1::ScoreResult { logprobs, top_ids }) => {
                RunOutcome::Scores(Scores { logprobs, top_ids })
            }
            v1::run_result::Outcome::Failure(failure) if failure == Reason::NonFinite.as_str() => {
                RunOutcome::NonFinite
            }
            v1::run_result::Outcome::GrammarFailure(why) => RunOutcome::Grammar(why),
            v1::run_result::Outcome::Failure(failure) => {
                return Err(WireError::Failure { step, sequence, failure });
            }
        };
        Ok(RunResult { sequence: SequenceId(sequence), outcome })
    };
    let results = results.into_iter().map(read).collect::<Result<_, _>>()?;
    Ok(StepResult { step, results })
}

#[cfg(test)]
mod tests {
    use tercet_text::Grammar;

    use super::*;

    fn frame() -> StageFrame {
        let sampling = SamplingParams {
            temperature: 0.7,
            top_k: 3,
            top_p: 0.9,
            seed: u64::MAX,
            min_p: 0.1,
            repetition_penalty: 1.1,
            frequency_penalty: -0.5,
            presence_penalty: 1.5,
            logit_bias: [(3, -100.0), (9, 0.25)].into(),
            grammar: Some(Arc::new(Grammar::Regex("[ab]+".to_owned()))),
            top_logprobs: Some(0),
        };
        let run = |sequence, rows, output| Run {
            sequence: SequenceId(sequence),
            position: 5,
            rows,
            output,
            pages: vec![PageId(u32::MAX), PageId(0)],
        };
        StageFrame {
            plan: StepPlan {
                step: 9,
                open: vec![OpenSequence {
                    id: SequenceId(1),
                    sampling,
                    traceparent: "00-aa-bb-01".to_owned(),
                    pages: vec![PageId(7)],
                    prompt: vec![5, 0],
                    completion: vec![8],
                }],
                close: vec![SequenceId(0)],
                runs: vec![
                    run(1, 1, RunOutput::None),
                    run(2, 1, RunOutput::Sample),
                    run(3, 2, RunOutput::Score(vec![7])),
                    run(4, 3, RunOutput::Verify(vec![9, 8])),
                ],
            },
            activations: vec![0.0, -0.0, 1.5e-42, f32::MAX, f32::INFINITY, -1.0, 3.25, 1.0],
        }
    }

    #[test]
    fn steps_survive_the_wire_to_the_bit() {
        let message = step(4, frame());
        assert_eq!((message.epoch, message.step), (4, 9));
        let read = read_step(message).unwrap();
        let bits = |frame: &StageFrame| -> Vec<u32> {
            frame.activations.iter().map(|value| value.to_bits()).collect()
        };
        assert_eq!(bits(&read), bits(&frame()));
        assert_eq!(read.plan, frame().plan);

        let nan = StageFrame { activations: vec![f32::NAN], ..frame() };
        assert!(read_step(step(1, nan)).unwrap().activations[0].is_nan(), "marks a failed row");
    }

    #[test]
    fn results_survive_the_wire() {
        let outcomes = [
            RunOutcome::Token { id: 0, logprobs: None },
            RunOutcome::Token {
                id: 1,
                logprobs: Some(TokenLogprobs { logprob: -0.5, top: vec![(2, -0.25), (1, -0.5)] }),
            },
            RunOutcome::Tokens(vec![
                SampledToken { id: 7, logprobs: None },
                SampledToken {
                    id: 8,
                    logprobs: Some(TokenLogprobs { logprob: -0.5, top: vec![(8, -0.5)] }),
                },
            ]),
            RunOutcome::Scores(Scores { logprobs: vec![-0.5], top_ids: vec![1, 2] }),
            RunOutcome::NonFinite,
            RunOutcome::Grammar("no token fits".to_owned()),
        ];
        let results = (0..)
            .zip(outcomes)
            .map(|(sequence, outcome)| RunResult { sequence: SequenceId(sequence), outcome });
        let given = StepResult { step: 3, results: results.collect() };
        assert_eq!(read_result(result(1, given.clone())), Ok(given));
    }

    #[test]
    fn malformed_messages_are_refused() {
        let mut cut = step(1, frame());
        cut.activations.truncate(7);
        assert_eq!(read_step(cut), Err(WireError::Activations { step: 9, bytes: 7 }));

        let unusable = WireError::Sampler { step: 9, sequence: 1 };
        let spoil = |change: fn(&mut v1::SamplerParameters)| {
            let mut message = step(1, frame());
            change(message.open[0].sampler.as_mut().unwrap());
            read_step(message)
        };
        assert_eq!(spoil(|sampler| sampler.temperature = f32::NAN), Err(unusable));
        assert!(spoil(|sampler| sampler.temperature = -1.0).is_err());
        assert!(spoil(|sampler| sampler.top_p = 0.0).is_err());
        assert!(spoil(|sampler| sampler.min_p = 1.5).is_err());
        assert!(spoil(|sampler| sampler.repetition_penalty = 0.0).is_err());
        assert!(spoil(|sampler| sampler.frequency_penalty = f32::INFINITY).is_err());
        assert!(spoil(|sampler| sampler.presence_penalty = f32::NAN).is_err());
        assert!(spoil(|sampler| *sampler.logit_bias.get_mut(&3).unwrap() = f32::NAN).is_err());
        let mut without = step(1, frame());
        without.open[0].sampler = None;
        assert!(read_step(without).is_err());

        let failed = |outcome| v1::StepResult {
            epoch: 1,
            step: 2,
            results: vec![v1::RunResult { sequence: 3, outcome, logprobs: None }],
        };
        let empty = WireError::Outcome { step: 2, sequence: 3 };
        assert_eq!(read_result(failed(None)), Err(empty));
        let failure = v1::run_result::Outcome::Failure("gremlins".to_owned());
        assert!(matches!(read_result(failed(Some(failure))), Err(WireError::Failure { .. })));
    }
}
