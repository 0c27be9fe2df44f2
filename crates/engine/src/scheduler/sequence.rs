//! One sequence on its way through the scheduler.

use tercet_text::{PageName, prefix::PAGE_IDS};

use super::{RequestKey, pages::Pages, speculation::Drafts};
use crate::{
    kv::{PAGE_POSITIONS, pages_for},
    plan::{PageId, Run, RunOutcome, RunOutput, SampledToken, Scores, SequenceId},
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
    pub(super) in_flight: bool,
    pub(super) table: Table,
    pub(super) drafts: Drafts,
}

/// The pages of a sequence, and their names.
#[derive(Debug)]
pub(super) struct Table {
    /// The name before that of the first page.
    root: PageName,
    /// Names of the full pages of the tokens, as far as they were needed.
    names: Vec<PageName>,
    /// While running: pages for all tokens, in order of position.
    pages: Vec<PageId>,
    /// The first of them were hit: others computed them.
    hit: usize,
    /// The first of them have been told to the stages.
    told: usize,
    /// The first of them are cached under their names.
    published: usize,
    /// The page after those is cached already, as computed by somebody else.
    diverged: bool,
}

impl Table {
    pub(super) fn new(root: PageName) -> Self {
        Self {
            root,
            names: Vec::new(),
            pages: Vec::new(),
            hit: 0,
            told: 0,
            published: 0,
            diverged: false,
        }
    }

    pub(super) fn pages(&self) -> &[PageId] {
        &self.pages
    }

    /// Returns the pages that the stages have not been told of and that hold positions below `end`.
    pub(super) fn tell(&mut self, end: usize) -> Vec<PageId> {
        let told = self.told;
        self.told = told.max(pages_for(end));
        self.pages[told..self.told].to_vec()
    }

    /// Adds a page at the end.
    pub(super) fn push(&mut self, page: PageId) {
        self.pages.push(page);
    }

    /// Names the full pages of `tokens`.
    fn name(&mut self, tokens: &[u32]) {
        let last = *self.names.last().unwrap_or(&self.root);
        let named = self.names.len() * PAGE_IDS;
        self.names.extend(last.chain(&tokens[named..]));
    }
}

impl Sequence {
    /// Takes pages for all tokens, cached ones where there are some; none at all if they do not
    /// suffice. Returns whether they do.
    pub(super) fn take_pages(&mut self, pages: &mut Pages) -> bool {
        self.table.name(&self.tokens);
        let hit = pages.hit(&self.table.names[..self.most_hits()], &self.tokens, 0);
        let due = pages_for(self.tokens.len()) - hit.len();
        if due > pages.available() {
            pages.release(&hit);
            return false;
        }
        self.table.hit = hit.len();
        self.table.pages = hit;
        let rest = (0..due).map(|_| pages.allocate().expect("as many were available"));
        self.table.pages.extend(rest);
        true
    }

    /// Before the first row: takes pages that have been cached since, instead of empty ones.
    pub(super) fn hit_more(&mut self, pages: &mut Pages) {
        let from = self.table.hit;
        let more = pages.hit(&self.table.names[..self.most_hits()], &self.tokens, from);
        if !more.is_empty() {
            self.table.hit += more.len();
            let spare: Vec<PageId> =
                self.table.pages.splice(from..from + more.len(), more).collect();
            pages.release(&spare);
        }
    }

    /// Returns how many pages may be hit: at least the last row is to be computed.
    fn most_hits(&self) -> usize {
        let skippable = if self.request.may_skip_rows() { self.tokens.len() - 1 } else { 0 };
        skippable / PAGE_IDS
    }

    /// Begins: returns the pages that hold its first positions already.
    pub(super) fn open(&mut self) -> Vec<PageId> {
        self.opened = true;
        self.computed = self.table.hit * PAGE_IDS;
        self.table.published = self.table.hit;
        self.table.tell(self.computed)
    }

    /// Returns the tokens of prompt and completion, as far as sampling looks at them.
    pub(super) fn history(&self) -> (Vec<u32>, Vec<u32>) {
        let Output::Generate { .. } = self.request.output else { return Default::default() };
        let sampling = &self.request.sampling;
        let (prompt, completion) = self.tokens.split_at(self.request.prompt.len());
        let prompt = if sampling.looks_at_prompt() { prompt } else { &[] };
        let completion = if sampling.looks_at_completion() { completion } else { &[] };
        (prompt.to_vec(), completion.to_vec())
    }

    /// Returns the first position to compute.
    pub(super) fn next_position(&self) -> usize {
        if self.opened { self.computed } else { self.table.hit * PAGE_IDS }
    }

    /// Returns whether `other` is about to publish the next page of this one, which has not begun.
    pub(super) fn can_await(&self, other: &Self) -> bool {
        let next = self.table.hit;
        next < self.most_hits()
            && !other.cancelled
            && !other.table.diverged
            && other.next_position() < (next + 1) * PAGE_IDS
            && other.table.names.get(next) == self.table.names.get(next)
    }

    /// Caches the pages that are full.
    pub(super) fn publish(&mut self, pages: &mut Pages) {
        let (full, _) = self.tokens[..self.computed].as_chunks();
        if self.table.published == full.len() || self.table.diverged {
            return;
        }
        self.table.name(&self.tokens);
        let Table { names, pages: own, published, diverged, .. } = &mut self.table;
        for (index, ids) in full.iter().enumerate().skip(*published) {
            let parent = index.checked_sub(1).map(|before| own[before]);
            if pages.publish(parent, names[index], ids, own[index]) != own[index] {
                *diverged = true;
                return;
            }
            *published += 1;
        }
    }

    /// Gives all pages up, those that are full to the cache, and is as if never begun.
    pub(super) fn give_up_pages(&mut self, pages: &mut Pages) {
        if self.table.diverged {
            let (full, _) = self.tokens[..self.computed].as_chunks();
            self.table.name(&self.tokens);
            let mut parent = None;
            for (index, ids) in full.iter().enumerate() {
                let page = self.table.pages[index];
                parent = Some(pages.publish(parent, self.table.names[index], ids, page));
            }
        }
        pages.release(&self.table.pages);
        self.table =
            Table { names: std::mem::take(&mut self.table.names), ..Table::new(self.table.root) };
        self.computed = 0;
        self.opened = false;
        self.scores = Scores::default();
    }

    /// Returns whether only the row of the last token is missing, and a token is wanted after it.
    pub(super) fn decodes(&self) -> bool {
        self.next_position() + 1 == self.tokens.len()
            && matches!(self.request.output, Output::Generate { .. })
    }

    /// Returns how many drafts can be of use after the last token: no more than tokens may follow
    /// it but one, and than its last page has room for.
    pub(super) fn most_drafts(&self, context: usize) -> usize {
        let Output::Generate { max_tokens, .. } = &self.request.output else { return 0 };
        let completion = self.tokens.len() - self.request.prompt.len();
        let wanted = (max_tokens - completion).min(context - self.tokens.len());
        let room = self.table.pages.len() * PAGE_POSITIONS - self.tokens.len();
        room.min(wanted.saturating_sub(1))
    }

    /// After the answer to `run` was taken in: the positions of the drafts that are tokens now are
    /// computed. Returns their number.
    pub(super) fn accept_drafts(&mut self, run: &Run, pages: &mut Pages) -> usize {
        let appended = self.tokens.len() - (run.position + 1);
        let accepted = appended.saturating_sub(1);
        self.computed += accepted;
        self.publish(pages);
        accepted
    }

    /// Returns what the last stage tells of the next `rows` rows.
    pub(super) fn output_of(&self, rows: usize) -> RunOutput {
        let first = self.next_position();
        let end = first + rows;
        match self.request.output {
            Output::Score => {
                RunOutput::Score(self.tokens[first + 1..self.tokens.len().min(end + 1)].to_vec())
            }
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
            (RunOutput::Sample | RunOutput::Verify(_), Some(RunOutcome::Grammar(why))) => {
                Ok(vec![SequenceEvent::Failed(SequenceFailure::Grammar(why))])
            }
            (RunOutput::None, None) => Ok(Vec::new()),
            (RunOutput::Sample, Some(RunOutcome::Token { id, logprobs })) => {
                self.append(vec![SampledToken { id, logprobs }], context, vocab)
            }
            (RunOutput::Verify(drafts), Some(RunOutcome::Tokens(sampled))) => {
                let agree = sampled.iter().zip(drafts).take_while(|(a, b)| a.id == **b).count();
                if !(1..=agree + 1).contains(&sampled.len()) {
                    return Err("tokens follow drafts only as long as those are right");
                }
                self.append(sampled, context, vocab)
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

    /// Adds tokens to the completion, up to one that completes it.
    fn append(
        &mut self,
        sampled: Vec<SampledToken>,
        context: usize,
        vocab: usize,
    ) -> Result<Vec<SequenceEvent>, &'static str> {
        let mut events = Vec::with_capacity(sampled.len());
        for SampledToken { id, logprobs } in sampled {
            if id as usize >= vocab {
                return Err("a token id beyond the vocabulary");
            }
            if logprobs.is_some() != self.request.sampling.top_logprobs.is_some() {
                return Err("log-probabilities only where they are asked for");
            }
            let index = self.tokens.len() - self.request.prompt.len();
            self.tokens.push(id);
            events.push(SequenceEvent::Token { index, id, logprobs });
            if let Some(reason) = self.stop_reason(context) {
                events.push(SequenceEvent::Finished(reason));
                break;
            }
        }
        Ok(events)
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
