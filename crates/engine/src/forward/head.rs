//! The head: from hidden states to logits.

use super::{Forward, Workspace, split};

impl Forward<'_> {
    /// Returns what the head is multiplied with, of some rows of the step, ascending.
    pub(crate) fn head_inputs(&mut self, rows: &[usize]) -> &[f32] {
        let head = self.weights.head.as_ref().expect("the last stage holds the head");
        let hidden = self.config.hidden;
        let Workspace { hidden: x, normed, .. } = &mut *self.work;
        for (row, normed) in rows.iter().zip(normed.chunks_exact_mut(hidden)) {
            let x = &x[row * hidden..(row + 1) * hidden];
            self.kernels.rms_norm(x, &head.norm, self.config.rms_eps, normed);
        }
        &normed[..rows.len() * hidden]
    }

    /// Computes the logits of some rows of the step, ascending, into `out`, rows x vocabulary.
    /// Returns, for each row, whether its logits are all finite.
    pub(crate) fn logits(&mut self, rows: &[usize], out: &mut [f32]) -> Vec<bool> {
        let head = self.weights.head.as_ref().expect("the last stage holds the head");
        let (lead, vocab, n) = (self.lead, self.config.vocab, rows.len());
        let kernels = self.kernels;
        let normed = self.head_inputs(rows);
        let mut finite = vec![true; n * lead.threads()];
        let parts: Vec<_> =
            split(lead, out, n, vocab).into_iter().zip(finite.chunks_exact_mut(n)).collect();
        lead.run(parts, |_, (mut part, finite)| {
            kernels.dense_matmul(&head.matrix, normed, part.reborrow());
            for (row, finite) in finite.iter_mut().enumerate() {
                // Without an early end, so that it is done in vectors.
                *finite = part.row_mut(row).iter().fold(true, |all, x| all & x.is_finite());
            }
        });
        (0..n).map(|row| finite.iter().skip(row).step_by(n).all(|finite| *finite)).collect()
    }
}
