use tercet_proto::v1::{Delta, GenerateResponse, Resume, Started, generate_response::Event};

/// What has come of a generation, over all its streams.
#[derive(Debug, Default)]
pub(crate) struct Progress {
    /// The first `started`.
    started: Option<Started>,
    /// Every token so far.
    ids: Vec<u32>,
    /// Number of the stream and of tokens when the last text came without a token: a resumed stream
    /// repeats it.
    text_alone: Option<(usize, usize)>,
    /// Streams begun after the first.
    streams: usize,
    /// Whether the prompt has come back: a resumed stream repeats it.
    is_echoed: bool,
    is_finished: bool,
}

/// A message that does not go on where the last one ended.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[error("tokens came from index {index}, expected {expected}")]
pub(crate) struct OutOfPlace {
    index: usize,
    expected: usize,
}

impl Progress {
    /// Returns the number of tokens so far.
    pub(crate) fn tokens(&self) -> usize {
        self.ids.len()
    }

    /// Returns whether nothing can come any more.
    pub(crate) fn is_finished(&self) -> bool {
        self.is_finished
    }

    /// Returns where to go on; `None` from the beginning.
    pub(crate) fn resume(&self) -> Option<Resume> {
        let seed = self.started.as_ref()?.seed;
        Some(Resume { seed, token_ids: self.ids.clone() })
    }

    /// Returns the number of streams after the first.
    pub(crate) fn resumes(&self) -> usize {
        self.streams
    }

    /// Begins to take in another stream.
    pub(crate) fn resumed(&mut self) {
        self.streams += 1;
    }

    /// Takes a message in; returns what is new in it, if anything is.
    pub(crate) fn take(&mut self, message: GenerateResponse) -> Result<Option<Event>, OutOfPlace> {
        Ok(match message.event {
            Some(Event::Started(started)) => {
                let is_first = self.started.is_none();
                self.started.get_or_insert_with(|| started.clone());
                is_first.then_some(Event::Started(started))
            }
            Some(Event::Prompt(prompt)) => {
                let is_first = !std::mem::replace(&mut self.is_echoed, true);
                is_first.then_some(Event::Prompt(prompt))
            }
            Some(Event::Delta(delta)) => self.delta(delta)?.map(Event::Delta),
            Some(Event::Finished(finished)) => {
                self.is_finished = true;
                Some(Event::Finished(finished))
            }
            None => None,
        })
    }

    fn delta(&mut self, delta: Delta) -> Result<Option<Delta>, OutOfPlace> {
        let expected = self.ids.len();
        if delta.token_ids.is_empty() {
            let at = (self.streams, expected);
            let last = self.text_alone.replace(at);
            let is_repeated = last.is_some_and(|last| last.0 != at.0 && last.1 == at.1);
            return Ok((!is_repeated).then_some(delta));
        }
        let index = usize::try_from(delta.index).unwrap_or(usize::MAX);
        if index == expected {
            self.ids.extend_from_slice(&delta.token_ids);
            return Ok(Some(delta));
        }
        // Text cannot be cut at a token: either all of it is known, or none.
        let end = index.saturating_add(delta.token_ids.len());
        if end <= expected && self.ids[index..end] == delta.token_ids {
            return Ok(None);
        }
        Err(OutOfPlace { index, expected })
    }
}

#[cfg(test)]
mod tests {
    use tercet_proto::v1::{Finished, Prompt};

    use super::*;

    fn delta(index: u32, token_ids: &[u32], text: &str) -> Event {
        let (token_ids, text) = (token_ids.to_vec(), text.to_owned());
        Event::Delta(Delta { index, token_ids, text, ..Delta::default() })
    }

    fn take(progress: &mut Progress, event: Event) -> Result<Option<Event>, OutOfPlace> {
        progress.take(GenerateResponse { event: Some(event) })
    }

    #[test]
    fn what_comes_again_is_dropped() {
        let mut progress = Progress::default();
        let begun = [
            Event::Started(Started { seed: 7, ..Started::default() }),
            Event::Prompt(Prompt::default()),
            delta(0, &[1, 2], "ab"),
            delta(2, &[3], ""),
            delta(3, &[], "c"),
        ];
        for event in begun.clone() {
            assert_eq!(take(&mut progress, event.clone()), Ok(Some(event)));
        }
        assert_eq!(progress.resume(), Some(Resume { seed: 7, token_ids: vec![1, 2, 3] }));
        progress.resumed();
        for event in begun {
            assert_eq!(take(&mut progress, event), Ok(None));
        }
        let end = [delta(3, &[4], "d"), Event::Finished(Finished::default())];
        for event in end {
            assert!(!progress.is_finished());
            assert_eq!(take(&mut progress, event.clone()), Ok(Some(event)));
        }
        assert!(progress.is_finished());
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let mut progress = Progress::default();
        assert!(take(&mut progress, delta(0, &[1, 2], "ab")).is_ok());
        for (event, index) in
            [(delta(3, &[4], ""), 3), (delta(1, &[2, 3], ""), 1), (delta(0, &[9], ""), 0)]
        {
            assert_eq!(take(&mut progress, event), Err(OutOfPlace { index, expected: 2 }));
        }
        assert_eq!(progress.tokens(), 2);
    }
}
