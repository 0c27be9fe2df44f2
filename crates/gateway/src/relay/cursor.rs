//! Where the client's stream is, and what of a worker's stream still belongs into it.

use tercet_proto::v1::generate_response::Event;
use tercet_proto::{raw, v1};

/// Position of the client's stream.
#[derive(Debug)]
pub(crate) struct Cursor {
    seed: u64,
    /// Every token of the completion so far, those that the client came with first.
    ids: Vec<u32>,
    /// Length of the prompt, once the client was told.
    prompt_tokens: Option<u32>,
    /// Whether the client has the prompt back.
    echoed: bool,
    /// Number of the current attempt.
    attempt: u32,
    /// Attempt and index of the last text that went out without a token: the rest of a withheld
    /// text, which a resumed stream may repeat.
    text_alone: Option<(u32, u32)>,
}

/// What to do with a message of a worker.
#[derive(Debug, PartialEq)]
pub(crate) enum Step<M = v1::GenerateResponse> {
    /// The client gets it.
    Forward(M),
    /// The client has it already.
    Skip,
    /// The worker's stream makes no sense: resume elsewhere.
    Broken(String),
    /// The worker answers differently from the one before it.
    Mismatch(String),
}

impl Cursor {
    /// Returns the start of a stream; `given` are the tokens that the client resumes after.
    pub(crate) fn new(seed: u64, given: Vec<u32>) -> Self {
        Self { seed, ids: given, prompt_tokens: None, echoed: false, attempt: 0, text_alone: None }
    }

    pub(crate) fn seed(&self) -> u64 {
        self.seed
    }

    pub(crate) fn ids(&self) -> &[u32] {
        &self.ids
    }

    pub(crate) fn len(&self) -> usize {
        self.ids.len()
    }

    /// Expects the messages of a new worker from here on.
    pub(crate) fn begin_attempt(&mut self) {
        self.attempt += 1;
    }

    /// Takes an encoded message if all there is to it are the tokens that come next, and returns
    /// their number. Any other has to be decoded.
    pub(crate) fn pass(&mut self, message: &[u8]) -> Option<usize> {
        self.prompt_tokens?;
        let next = self.ids.len();
        let delta = raw::Delta::peek(message, &mut self.ids)?;
        if delta.tokens == 0 || usize::try_from(delta.index) != Ok(next) {
            self.ids.truncate(next);
            return None;
        }
        Some(delta.tokens)
    }

    /// Takes a worker's message.
    pub(crate) fn accept(&mut self, response: v1::GenerateResponse) -> Step {
        match response.event {
            Some(Event::Started(started)) => self.started(started),
            _ if self.prompt_tokens.is_none() => {
                Step::Broken("the first message is not `started`".to_owned())
            }
            Some(Event::Delta(delta)) => self.delta(delta),
            Some(Event::Prompt(_)) if std::mem::replace(&mut self.echoed, true) => Step::Skip,
            Some(Event::Prompt(_)) => Step::Forward(response),
            Some(Event::Finished(_)) => Step::Forward(response),
            // Of a later version: nothing that a client of this one needs.
            None => Step::Skip,
        }
    }

    fn started(&mut self, started: v1::Started) -> Step {
        if started.seed != self.seed {
            return Step::Broken(format!("asked for seed {}, got {}", self.seed, started.seed));
        }
        match self.prompt_tokens {
            None => {
                self.prompt_tokens = Some(started.prompt_tokens);
                Step::Forward(v1::GenerateResponse { event: Some(Event::Started(started)) })
            }
            Some(told) if told == started.prompt_tokens => Step::Skip,
            Some(told) => Step::Mismatch(format!(
                "the prompt has {} tokens here, {told} at the worker before",
                started.prompt_tokens
            )),
        }
    }

    fn delta(&mut self, mut delta: v1::Delta) -> Step {
        let Ok(next) = u32::try_from(self.ids.len()) else {
            return Step::Broken("more tokens than can be counted".to_owned());
        };
        let Some(overlap) = next.checked_sub(delta.index) else {
            return Step::Broken(format!("expected index {next}, got {}", delta.index));
        };
        if delta.token_ids.is_empty() {
            return self.text(delta, overlap);
        }
        if overlap > 0 {
            // Both within the ids: `index` is below their number.
            let known = &self.ids[self.ids.len() - usize::try_from(overlap).unwrap_or(0)..];
            let differs = known.iter().zip(&delta.token_ids).position(|(known, got)| known != got);
            if let Some(at) = differs {
                return Step::Mismatch(format!(
                    "token {} of the delta at {} is {} here, {} at the worker before",
                    at, delta.index, delta.token_ids[at], known[at]
                ));
            }
            if delta.token_ids.len() <= known.len() {
                return Step::Skip;
            }
            if !delta.text.is_empty() {
                // Its text belongs to old and new tokens, and only the worker could tell them apart.
                return Step::Broken(format!(
                    "the delta at {} begins before index {next} and goes on after it",
                    delta.index
                ));
            }
            delta.token_ids.drain(..known.len());
            let told = known.len().min(delta.logprobs.len());
            delta.logprobs.drain(..told);
            delta.index = next;
        }
        self.ids.extend_from_slice(&delta.token_ids);
        Step::Forward(v1::GenerateResponse { event: Some(Event::Delta(delta)) })
    }

    fn text(&mut self, delta: v1::Delta, overlap: u32) -> Step {
        let sent = self
            .text_alone
            .is_some_and(|(attempt, index)| attempt != self.attempt && index == delta.index);
        if overlap > 0 || sent {
            return Step::Skip;
        }
        self.text_alone = Some((self.attempt, delta.index));
        Step::Forward(v1::GenerateResponse { event: Some(Event::Delta(delta)) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn started(seed: u64, prompt_tokens: u32) -> v1::GenerateResponse {
        let started = v1::Started { model: "demo".to_owned(), seed, prompt_tokens };
        v1::GenerateResponse { event: Some(Event::Started(started)) }
    }

    fn delta(index: u32, ids: &[u32], text: &str) -> v1::GenerateResponse {
        let delta = v1::Delta {
            index,
            token_ids: ids.to_vec(),
            text: text.to_owned(),
            ..v1::Delta::default()
        };
        v1::GenerateResponse { event: Some(Event::Delta(delta)) }
    }

    fn finished() -> v1::GenerateResponse {
        v1::GenerateResponse { event: Some(Event::Finished(v1::Finished::default())) }
    }

    /// Returns a cursor after `started` and the tokens 10, 11, 12 of a first attempt.
    fn cursor() -> Cursor {
        let mut cursor = Cursor::new(7, vec![10]);
        cursor.begin_attempt();
        assert_eq!(cursor.accept(started(7, 3)), Step::Forward(started(7, 3)));
        let two = delta(1, &[11, 12], "ab");
        assert_eq!(cursor.accept(two.clone()), Step::Forward(two));
        assert_eq!(cursor.ids(), [10, 11, 12]);
        cursor
    }

    #[test]
    fn a_resumed_stream_goes_on_where_the_client_is() {
        let mut cursor = cursor();
        cursor.begin_attempt();
        assert_eq!(cursor.accept(started(7, 3)), Step::Skip);
        let next = delta(3, &[13], "c");
        assert_eq!(cursor.accept(next.clone()), Step::Forward(next));
        assert_eq!(cursor.accept(finished()), Step::Forward(finished()));
        assert_eq!(cursor.ids(), [10, 11, 12, 13]);
    }

    #[test]
    fn the_prompt_comes_back_once() {
        let prompt = v1::Prompt { token_ids: vec![1, 2, 3], text: "abc".to_owned() };
        let prompt = v1::GenerateResponse { event: Some(Event::Prompt(prompt)) };
        let mut cursor = Cursor::new(7, Vec::new());
        cursor.begin_attempt();
        assert!(matches!(cursor.accept(prompt.clone()), Step::Broken(_)), "before started");
        cursor.accept(started(7, 3));
        assert_eq!(cursor.accept(prompt.clone()), Step::Forward(prompt.clone()));
        cursor.begin_attempt();
        assert_eq!(cursor.accept(started(7, 3)), Step::Skip);
        assert_eq!(cursor.accept(prompt), Step::Skip);
    }

    #[test]
    fn repeated_tokens_are_dropped() {
        let mut cursor = cursor();
        cursor.begin_attempt();
        assert_eq!(cursor.accept(delta(0, &[10], "x")), Step::Skip);
        assert_eq!(cursor.accept(delta(1, &[11, 12], "ab")), Step::Skip);
        assert_eq!(cursor.accept(delta(2, &[12, 13], "")), Step::Forward(delta(3, &[13], "")));
        assert_eq!(cursor.accept(delta(2, &[], "late")), Step::Skip);
        assert_eq!(cursor.ids(), [10, 11, 12, 13]);
    }

    #[test]
    fn text_that_cannot_be_split_breaks_the_stream() {
        let mut cursor = cursor();
        assert!(matches!(cursor.accept(delta(2, &[12, 13], "bc")), Step::Broken(_)));
        assert_eq!(cursor.ids(), [10, 11, 12]);
    }

    #[test]
    fn gaps_break_the_stream() {
        let mut cursor = cursor();
        assert!(matches!(cursor.accept(delta(4, &[14], "d")), Step::Broken(_)));
        assert!(matches!(cursor.accept(delta(4, &[], "d")), Step::Broken(_)));
        assert_eq!(cursor.ids(), [10, 11, 12]);
    }

    #[test]
    fn a_worker_that_disagrees_is_found_out() {
        let mut cursor = cursor();
        cursor.begin_attempt();
        assert!(matches!(cursor.accept(started(7, 4)), Step::Mismatch(_)));
        assert!(matches!(cursor.accept(started(8, 3)), Step::Broken(_)));
        assert!(matches!(cursor.accept(delta(1, &[11, 99], "ab")), Step::Mismatch(_)));
        assert!(matches!(cursor.accept(delta(2, &[99, 13], "")), Step::Mismatch(_)));
        assert_eq!(cursor.ids(), [10, 11, 12]);
    }

    #[test]
    fn the_rest_of_a_text_goes_out_once() {
        let mut cursor = cursor();
        let rest = delta(3, &[], "rest");
        assert_eq!(cursor.accept(rest.clone()), Step::Forward(rest.clone()));
        cursor.begin_attempt();
        assert_eq!(cursor.accept(started(7, 3)), Step::Skip);
        assert_eq!(cursor.accept(rest), Step::Skip);
    }

    #[test]
    fn only_tokens_that_come_next_pass_undecoded() {
        let message = |index, ids: &[u32]| raw::encode(&delta(index, ids, "x"));
        let mut fresh = Cursor::new(7, Vec::new());
        fresh.begin_attempt();
        assert_eq!(fresh.pass(&message(0, &[1])), None, "before started");
        let mut cursor = cursor();
        for (index, ids) in [(2, &[12, 13][..]), (4, &[14]), (3, &[]), (u32::MAX, &[13])] {
            assert_eq!(cursor.pass(&message(index, ids)), None, "{index}");
        }
        assert_eq!(cursor.pass(&raw::encode(&finished())), None);
        assert_eq!(cursor.ids(), [10, 11, 12]);
        assert_eq!(cursor.pass(&message(3, &[13, 14])), Some(2));
        assert_eq!(cursor.ids(), [10, 11, 12, 13, 14]);
        assert_eq!(cursor.accept(delta(4, &[14], "x")), Step::Skip);
    }

    #[test]
    fn nothing_goes_out_before_started() {
        let mut cursor = Cursor::new(7, Vec::new());
        cursor.begin_attempt();
        assert!(matches!(cursor.accept(delta(0, &[1], "a")), Step::Broken(_)));
        assert!(matches!(cursor.accept(finished()), Step::Broken(_)));
    }
}
