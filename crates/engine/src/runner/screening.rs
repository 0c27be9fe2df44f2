//! Choosing tokens without reading the whole head.
//!
//! The [`Screen`] of the head estimates every logit and says how far the exact one can be. First the
//! rows with the best estimates are computed exactly, as many as decide the choice, together with
//! those that penalties or biases change. The least of the best of them is a floor: whatever decides
//! reaches it. Then every row whose estimate and bound reach the floor is computed exactly. So the
//! rows that decide are among those computed, with the bits of the whole head, and so is the choice.

use tercet_kernels::{DenseMatrix, DenseType, Kernels, Lead, Screen, ScreenQuery};
use tercet_text::TokenMask;

use crate::{engine::HeadScreen, forward::split, pool::ComputePool, sampler::token_id};

/// Most tokens of a step that are screened: for more, arithmetic is the limit and not memory.
pub(super) const MOST_TOKENS: usize = 3;

/// Heads of fewer bytes are not worth a screen: they stay in the caches.
const LEAST_BYTES: usize = 8 << 20;

/// The whole head is computed if more than this part of its rows may decide.
const MOST_ROWS: usize = 8;

/// Pieces in which a screen is built, so that others who compute wait for one only.
const TURNS: usize = 16;

/// Builds the screen of a head, if one is wanted and possible.
pub(super) fn build(
    kernels: Kernels,
    pool: &ComputePool,
    head: &DenseMatrix,
    wanted: HeadScreen,
) -> Option<Screen> {
    let wide = match head.kind() {
        DenseType::F32 | DenseType::F16 | DenseType::Bf16 | DenseType::Q8_0 => true,
        DenseType::Q4_0 | DenseType::Q6K => false,
    };
    let worth = wide && head.bytes().len() >= LEAST_BYTES && kernels.is_quick_to_screen();
    if wanted == HeadScreen::Off || (wanted == HeadScreen::Auto && !worth) {
        return None;
    }
    let mut screen = Screen::new(head)?;
    let mut parts = screen.parts_mut(TURNS * pool.threads());
    while !parts.is_empty() {
        let now = parts.split_off(parts.len().saturating_sub(pool.threads()));
        let _turn = pool.turn();
        pool.region(|lead| lead.run(now, |_, part| kernels.fill_screen(head, part)));
    }
    screen.is_sound().then_some(screen)
}

/// What a choice needs to know of the logits.
pub(super) struct Wish {
    /// How many of the largest decide.
    pub(super) keep: usize,
    /// Which ids may be chosen, if not all.
    pub(super) mask: Option<TokenMask>,
    /// Ids, ascending, whose logits are changed before the choice.
    pub(super) changed: Vec<u32>,
}

/// Estimates of the logits of some tokens.
pub(super) struct Estimates<'a> {
    x: &'a [f32],
    query: ScreenQuery,
    /// Tokens x vocabulary.
    all: &'a [f32],
    /// For each token, rows with the largest estimates that may be chosen and are not changed.
    leaders: Vec<Vec<u32>>,
}

/// Logits among which are all that decide.
pub(super) struct Deciding {
    /// Ids, ascending, and what their logits are after changes.
    pub(super) logits: Vec<(u32, f32)>,
    /// Rows of the head that were computed.
    pub(super) computed: u64,
}

/// The head and its screen.
pub(super) struct Screening<'a> {
    pub(super) kernels: Kernels,
    pub(super) lead: &'a Lead<'a>,
    pub(super) screen: &'a Screen,
    pub(super) head: &'a DenseMatrix,
}

impl Wish {
    fn allows(&self, id: u32) -> bool {
        self.mask.as_ref().is_none_or(|mask| mask.allows(id))
    }

    /// Returns the best estimates of rows that may be chosen and are not changed.
    fn leaders(&self, first: usize, estimates: &[f32]) -> Vec<(f32, u32)> {
        let mut leaders: Vec<(f32, u32)> = Vec::with_capacity(self.keep + 1);
        let mut least = f32::NEG_INFINITY;
        for (row, &estimate) in (first..).zip(estimates) {
            if estimate <= least {
                continue;
            }
            let id = token_id(row);
            if self.changed.binary_search(&id).is_ok() || !self.allows(id) {
                continue;
            }
            leaders.push((estimate, id));
            if leaders.len() > self.keep {
                leaders.sort_unstable_by(|a, b| b.0.total_cmp(&a.0));
                leaders.pop();
            }
            if leaders.len() == self.keep {
                least = leaders.iter().fold(f32::INFINITY, |least, leader| least.min(leader.0));
            }
        }
        leaders
    }
}

impl Screening<'_> {
    /// Estimates the logits of the tokens `x`. `None` if that is impossible for these activations.
    pub(super) fn estimate<'a>(
        &self,
        x: &'a [f32],
        wishes: &[&Wish],
        buffer: &'a mut Vec<f32>,
    ) -> Option<Estimates<'a>> {
        let mut query = ScreenQuery::new(self.head.cols());
        if !x.chunks_exact(self.head.cols()).all(|x| query.push(x)) {
            return None;
        }
        let (kernels, screen, n) = (self.kernels, self.screen, wishes.len());
        buffer.resize(n * screen.rows(), 0.0);
        let mut found = vec![Vec::new(); n * self.lead.threads()];
        let parts: Vec<_> = split(self.lead, buffer, n, screen.rows())
            .into_iter()
            .zip(found.chunks_exact_mut(n))
            .collect();
        self.lead.run(parts, |_, (mut part, found)| {
            kernels.screen_matmul(screen, &query, part.reborrow());
            for (token, (wish, found)) in wishes.iter().zip(found).enumerate() {
                *found = wish.leaders(part.columns().start, part.row_mut(token));
            }
        });
        let leaders = wishes.iter().enumerate().map(|(token, wish)| {
            let mut leaders: Vec<_> = found.iter().skip(token).step_by(n).flatten().collect();
            leaders.sort_unstable_by(|a, b| b.0.total_cmp(&a.0));
            leaders.into_iter().take(wish.keep).map(|leader| leader.1).collect()
        });
        let leaders = leaders.collect();
        Some(Estimates { x, query, all: buffer, leaders })
    }

    /// Returns logits among which are all that decide the choice after token `token`, changed by
    /// `adjust`. `None` if too many rows may decide.
    pub(super) fn decide(
        &self,
        estimates: &Estimates<'_>,
        token: usize,
        wish: &Wish,
        adjust: impl Fn(u32, f32) -> f32,
    ) -> Option<Deciding> {
        let (vocab, cols) = (self.screen.rows(), self.head.cols());
        let most = vocab / MOST_ROWS;
        let x = &estimates.x[token * cols..(token + 1) * cols];
        let leaders = &estimates.leaders[token];
        let mut known: Vec<u32> = leaders.clone();
        known.extend(wish.changed.iter().copied().filter(|id| wish.allows(*id)));
        if known.is_empty() || known.len() > most.max(wish.keep) {
            return None;
        }
        known.sort_unstable();
        let mut logits = self.exact(x, &known);
        logits.iter_mut().for_each(|(id, logit)| *logit = adjust(*id, *logit));
        // With fewer leaders than decide, every row that may be chosen is known.
        if leaders.len() == wish.keep {
            let mut values: Vec<f32> = logits.iter().map(|(_, logit)| *logit).collect();
            let (_, floor, _) = values.select_nth_unstable_by(wish.keep - 1, |a, b| b.total_cmp(a));
            let rest = self.reaching(estimates, token, wish, *floor, &known);
            if known.len() + rest.len() > most.max(wish.keep) {
                return None;
            }
            logits.extend(self.exact(x, &rest));
        }
        let computed = logits.len() as u64;
        // Ids that are left out still take places among those kept if too few are left.
        let left_out = (0..token_id(vocab)).filter(|id| !wish.allows(*id));
        let places = wish.keep.saturating_sub(logits.len());
        logits.extend(left_out.take(places).map(|id| (id, f32::NEG_INFINITY)));
        logits.sort_unstable_by_key(|(id, _)| *id);
        Some(Deciding { logits, computed })
    }

    /// Returns the rows that may reach `floor`, besides those `known` and those changed.
    fn reaching(
        &self,
        estimates: &Estimates<'_>,
        token: usize,
        wish: &Wish,
        floor: f32,
        known: &[u32],
    ) -> Vec<u32> {
        let vocab = self.screen.rows();
        let share = vocab.div_ceil(self.lead.threads());
        let mut found = vec![Vec::new(); self.lead.threads()];
        let estimated = &estimates.all[token * vocab..(token + 1) * vocab];
        let parts = estimated.chunks(share).zip(&mut found).enumerate().collect();
        self.lead.run(parts, |_, (index, (estimated, found))| {
            let rows = index * share..index * share + estimated.len();
            self.screen.reaching(&estimates.query, token, rows, estimated, floor, |row| {
                let id = token_id(row);
                if known.binary_search(&id).is_err() && wish.allows(id) {
                    found.push(id);
                }
            });
        });
        found.into_iter().flatten().collect()
    }

    /// Returns the exact logits of some rows.
    fn exact(&self, x: &[f32], ids: &[u32]) -> Vec<(u32, f32)> {
        let mut logits = vec![0.0; ids.len()];
        let share = ids.len().div_ceil(self.lead.threads()).max(1);
        let parts = ids.chunks(share).zip(logits.chunks_mut(share)).collect();
        let (kernels, head) = (self.kernels, self.head);
        self.lead.run(parts, |_, (ids, logits)| kernels.dense_rows(head, ids, x, logits));
        ids.iter().copied().zip(logits).collect()
    }
}

#[cfg(test)]
mod tests;
