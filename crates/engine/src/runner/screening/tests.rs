use tercet_kernels::{AlignedBytes, MatrixMut};

use super::*;
use crate::sampler::{History, Sampler, SamplingParams, adjusted, changed, uniform};

const COLS: usize = 200;

/// A head in which rows come several times, so that logits are equal, and some almost do.
fn head(rows: usize, seed: u64) -> DenseMatrix {
    let mut bytes = AlignedBytes::zeroed(4 * rows * COLS);
    let numbers = bytes.as_chunks_mut().0;
    for (index, number) in numbers.iter_mut().enumerate() {
        let (row, col) = (index / COLS, index % COLS);
        let draw = uniform(seed, (row % 90 * COLS + col) as u64) - 0.5;
        // Close to the row that it copies, or equal.
        let near = if row / 90 % 2 == 1 && col == 7 { 1.0 + 1e-6 } else { 1.0 };
        #[expect(clippy::cast_possible_truncation, reason = "any number will do")]
        let value = (draw * near) as f32;
        *number = value.to_le_bytes();
    }
    DenseMatrix::new(DenseType::F32, rows, COLS, bytes.into()).unwrap()
}

#[expect(clippy::cast_possible_truncation, reason = "any number will do")]
fn activations(seed: u64) -> Vec<f32> {
    (0..COLS as u64).map(|i| (uniform(!seed, i) - 0.5) as f32 * 3.0).collect()
}

/// The choice with the screen, and with all logits; and the rows that the first computed.
fn choices(rows: usize, seed: u64, params: &SamplingParams, threads: usize) -> (u32, u32, u64) {
    let pool = ComputePool::new(threads).unwrap();
    let kernels = Kernels::detect();
    let (head, x) = (head(rows, seed), activations(seed));
    let screen = build(kernels, &pool, &head, HeadScreen::On).unwrap();
    let history = History::new(&[3, 8, 70], &[8, 8, 91]);
    let mut logits = vec![0.0; rows];
    kernels.dense_matmul(&head, &x, MatrixMut::new(&mut logits, 1, rows).into_columns());
    let mut sampler = Sampler::default();
    let expected = sampler.sample(kernels, &logits, params, &history, None, 5);
    let wish = Wish {
        keep: params.deciding(rows).unwrap(),
        mask: None,
        changed: changed(params, &history),
    };
    let _turn = pool.turn();
    let mut buffer = Vec::new();
    let decided = pool.region(|lead| {
        let screening = Screening { kernels, lead, screen: &screen, head: &head };
        let estimates = screening.estimate(&x, &[&wish], &mut buffer).unwrap();
        let adjust = |id, logit| adjusted(id, logit, params, &history);
        screening.decide(&estimates, 0, &wish, adjust).unwrap()
    });
    for (id, logit) in &decided.logits {
        let exact = adjusted(*id, logits[*id as usize], params, &history);
        assert_eq!(logit.to_bits(), exact.to_bits(), "row {id}");
    }
    (sampler.choose_among(kernels, &decided.logits, params, 5), expected, decided.computed)
}

#[test]
fn equal_and_almost_equal_rows_are_told_apart_as_by_the_whole_head() {
    for seed in 0..60 {
        let params = SamplingParams {
            temperature: if seed % 3 == 0 { 0.0 } else { 0.7 },
            top_k: [0, 9, 40][usize::try_from(seed % 3).unwrap()],
            top_p: if seed % 2 == 0 { 0.9 } else { 1.0 },
            seed,
            repetition_penalty: if seed % 4 == 1 { 1.5 } else { 1.0 },
            frequency_penalty: if seed % 5 == 2 { -2.0 } else { 0.0 },
            logit_bias: if seed % 7 == 3 { [(17, 3.0), (40, -3.0)].into() } else { [].into() },
            ..SamplingParams::greedy()
        };
        let threads = 1 + usize::try_from(seed % 3).unwrap();
        let (found, expected, computed) = choices(2700, seed, &params, threads);
        assert_eq!(found, expected, "seed {seed}");
        assert!(computed < 2700 / 8, "seed {seed}: {computed} rows");
    }
}

#[test]
fn rows_that_cannot_be_told_apart_need_the_whole_head() {
    let pool = ComputePool::new(1).unwrap();
    let kernels = Kernels::detect();
    let bytes = AlignedBytes::zeroed(4 * 500 * COLS);
    let head = DenseMatrix::new(DenseType::F32, 500, COLS, bytes.into()).unwrap();
    let screen = build(kernels, &pool, &head, HeadScreen::On).unwrap();
    let wish = Wish { keep: 1, mask: None, changed: Vec::new() };
    let (x, mut buffer) = (activations(1), Vec::new());
    let _turn = pool.turn();
    pool.region(|lead| {
        let screening = Screening { kernels, lead, screen: &screen, head: &head };
        assert!(screening.estimate(&[f32::NAN; COLS], &[&wish], &mut Vec::new()).is_none());
        let estimates = screening.estimate(&x, &[&wish], &mut buffer).unwrap();
        assert!(screening.decide(&estimates, 0, &wish, |_, logit| logit).is_none());
    });
}

#[test]
fn heads_that_gain_nothing_get_no_screen() {
    let pool = ComputePool::new(2).unwrap();
    let kernels = Kernels::detect();
    let small = head(300, 1);
    assert!(build(kernels, &pool, &small, HeadScreen::Auto).is_none());
    assert!(build(kernels, &pool, &small, HeadScreen::Off).is_none());
    assert!(build(kernels, &pool, &small, HeadScreen::On).is_some());
    let bytes = AlignedBytes::zeroed(DenseType::Q4_0.row_bytes(4096) * 4096);
    let packed = DenseMatrix::new(DenseType::Q4_0, 4096, 4096, bytes.into()).unwrap();
    assert!(packed.bytes().len() >= LEAST_BYTES);
    assert!(build(kernels, &pool, &packed, HeadScreen::Auto).is_none());
    let bytes = AlignedBytes::zeroed(LEAST_BYTES);
    let large = DenseMatrix::new(DenseType::F16, LEAST_BYTES / 2048, 1024, bytes.into()).unwrap();
    let screened = build(kernels, &pool, &large, HeadScreen::Auto).is_some();
    assert_eq!(screened, kernels.is_quick_to_screen());
}
