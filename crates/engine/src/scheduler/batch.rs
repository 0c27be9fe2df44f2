//! What goes into a step: decoding rows, prompt rows, and who loses its pages for them.

use super::{Scheduler, find, sequence::Sequence, speculation};
use crate::{
    drafter::Undrafted,
    kv::pages_for,
    plan::{Run, RunOutput, SequenceId},
};

impl Scheduler {
    /// Returns one row for each sequence that waits for nothing but its next token.
    pub(super) fn plan_decode(&mut self) -> Vec<Run> {
        let limit = self.sequences_per_step();
        let ready: Vec<SequenceId> = self
            .running
            .iter()
            .filter(|sequence| !sequence.in_flight && sequence.decodes())
            .map(|sequence| sequence.id)
            .take(limit)
            .collect();
        let mut runs: Vec<Run> = Vec::new();
        for id in ready {
            // An earlier turn of this loop may have preempted it.
            let Some(sequence) = find(&mut self.running, id) else { continue };
            let pages = pages_for(sequence.tokens.len());
            let run = Run {
                sequence: id,
                position: sequence.next_position(),
                rows: 1,
                output: RunOutput::Sample,
                pages: Vec::new(),
            };
            if pages <= sequence.table.pages().len() || self.grow(id, &runs) {
                runs.push(run);
            }
        }
        runs
    }

    /// Adds rows of prompts to `runs`: in every other step those of the oldest prompt first, so that
    /// it is computed however many come after it, and in the others those of the prompt with the
    /// fewest rows left, so that it does not wait for a long one to end.
    pub(super) fn plan_prefill(&mut self, runs: &mut Vec<Run>) {
        let limit = self.sequences_per_step();
        let (chunk, stretch) = (self.config.prefill_chunk, self.config.prefill_stretch);
        let mut order = self.prompts();
        if order.len() > 1 {
            if self.shortest_first {
                order.sort_by_key(|&index| {
                    let sequence = &self.running[index];
                    sequence.tokens.len() - sequence.next_position()
                });
            }
            self.shortest_first = !self.shortest_first;
        }
        let mut budget = self.pace.budget(runs.len(), chunk, stretch);
        for index in order {
            if runs.len() >= limit {
                return;
            }
            let sequence = &self.running[index];
            let position = sequence.next_position();
            let rows = budget.take(position, sequence.tokens.len() - position);
            if rows == 0 {
                return;
            }
            runs.push(Run {
                sequence: sequence.id,
                position,
                rows,
                output: sequence.output_of(rows),
                pages: Vec::new(),
            });
        }
    }

    /// Adds drafts to `runs`, if nobody waits for a prompt: rows of prompts use the machine better.
    pub(super) fn plan_drafts(&mut self, runs: &mut [Run]) {
        let Some(speculation) = &mut self.speculation else { return };
        let free = speculation::MOST_ROWS.saturating_sub(runs.len());
        let several_stages = self.config.steps_in_flight > 1;
        if free == 0 || several_stages || !self.running.iter().all(Sequence::decodes) {
            return;
        }
        let limit = self.config.context_limit();
        let mut sequences: Vec<&mut Sequence> = Vec::with_capacity(runs.len());
        sequences.extend(self.running.iter_mut().filter(|sequence| {
            // A sequence without a page to grow into is not in the step.
            runs.iter().any(|run| run.sequence == sequence.id)
        }));
        let chances: Vec<_> = sequences
            .iter_mut()
            .map(|sequence| {
                let most = sequence.most_drafts(limit).min(free);
                speculation.chance(&mut sequence.drafts, most)
            })
            .collect();
        let mut free = free;
        let mut wanted = Vec::with_capacity(sequences.len());
        let shares = speculation.share(&chances);
        for ((sequence, chance), share) in sequences.iter_mut().zip(&chances).zip(shares) {
            let most = sequence.drafts.settle(chance, share).min(free);
            free -= most;
            if most > 0 {
                wanted.push(Undrafted { sequence: sequence.id, tokens: &sequence.tokens, most });
            }
        }
        if wanted.is_empty() {
            return;
        }
        let drafts = speculation.drafter.draft(&wanted);
        for (Undrafted { sequence, most, .. }, mut drafts) in wanted.into_iter().zip(drafts) {
            drafts.truncate(most);
            let run = runs.iter_mut().find(|run| run.sequence == sequence);
            if let Some(run) = run.filter(|_| !drafts.is_empty()) {
                run.rows += drafts.len();
                run.output = RunOutput::Verify(drafts);
            }
        }
    }

    /// Returns the running sequences whose prompts can go on, oldest first. One that has not begun
    /// looks at the cache again, and waits while an older one computes the page that it needs.
    fn prompts(&mut self) -> Vec<usize> {
        let mut prompts = Vec::new();
        for index in 0..self.running.len() {
            let (older, rest) = self.running.split_at_mut(index);
            let sequence = &mut rest[0];
            if sequence.in_flight || sequence.decodes() {
                continue;
            }
            if !sequence.opened {
                sequence.hit_more(&mut self.pages);
                if older.iter().any(|older| sequence.can_await(older)) {
                    continue;
                }
            }
            prompts.push(index);
        }
        prompts
    }

    /// Returns how many sequences a step takes, so that as many steps as there are stages can be
    /// under way.
    fn sequences_per_step(&self) -> usize {
        self.running.len().div_ceil(self.config.steps_in_flight)
    }

    /// Finds one more page for `id`, taking those of the youngest sequence if none is free. Returns
    /// whether there is one.
    fn grow(&mut self, id: SequenceId, planned: &[Run]) -> bool {
        while self.pages.available() == 0 {
            let victim = self.running.iter().rposition(|sequence| {
                !sequence.in_flight && planned.iter().all(|run| run.sequence != sequence.id)
            });
            match victim {
                Some(index) if self.running[index].id == id => {
                    // Alone it has room, by the context limit: it waits for the others to end.
                    if self.running.len() > 1 {
                        self.preempt(index);
                    }
                    return false;
                }
                Some(index) => self.preempt(index),
                None => return false,
            }
        }
        let page = self.pages.allocate().expect("one is available");
        let sequence = find(&mut self.running, id).expect("only others were preempted");
        sequence.table.push(page);
        true
    }

    fn preempt(&mut self, index: usize) {
        let sequence = self.close(index);
        self.waiting.push_front(sequence);
        self.tally.preemptions += 1;
    }

    pub(super) fn close(&mut self, index: usize) -> Sequence {
        let mut sequence = self.running.remove(index);
        if sequence.opened {
            self.closing.push(sequence.id);
            if let Some(speculation) = &mut self.speculation {
                speculation.drafter.forget(sequence.id);
            }
        }
        sequence.give_up_pages(&mut self.pages);
        sequence
    }
}
