use proptest::prelude::*;
use tercet_kernels::{DenseMatrix, DenseType, Isa, Kernels, MatrixMut, Screen, ScreenQuery};

use crate::support::{Random, assert_bits, scalar, variants};

fn matrix(rows: usize, cols: usize, weights: &[f32]) -> DenseMatrix {
    let bytes: Vec<u8> = weights.iter().flat_map(|weight| weight.to_le_bytes()).collect();
    DenseMatrix::new(DenseType::F32, rows, cols, bytes.as_slice().into()).unwrap()
}

fn screen(kernels: Kernels, w: &DenseMatrix, parts: usize) -> Screen {
    let mut screen = Screen::new(w).unwrap();
    for part in screen.parts_mut(parts) {
        kernels.fill_screen(w, part);
    }
    screen
}

fn query(cols: usize, x: &[f32]) -> ScreenQuery {
    let mut query = ScreenQuery::new(cols);
    for x in x.chunks_exact(cols) {
        assert!(query.push(x), "activations of a common size");
    }
    query
}

fn estimates(kernels: Kernels, screen: &Screen, query: &ScreenQuery, cuts: &[usize]) -> Vec<f32> {
    let mut out = vec![f32::NAN; query.tokens() * screen.rows()];
    for part in MatrixMut::new(&mut out, query.tokens(), screen.rows()).split_columns(cuts) {
        kernels.screen_matmul(screen, query, part);
    }
    out
}

/// Asserts that no exact product is beyond the bound of its estimate; returns the largest share of
/// a bound that was needed.
fn hold(w: &DenseMatrix, x: &[f32]) -> f32 {
    let (rows, cols) = (w.rows(), w.cols());
    let screen = screen(scalar(), w, 1);
    assert!(screen.is_sound());
    let query = query(cols, x);
    let found = estimates(scalar(), &screen, &query, &[]);
    let all: Vec<u32> = (0..rows).map(|row| u32::try_from(row).unwrap()).collect();
    let mut worst = 0.0_f32;
    for (token, (x, found)) in x.chunks_exact(cols).zip(found.chunks_exact(rows)).enumerate() {
        let mut exact = vec![f32::NAN; rows];
        scalar().dense_rows(w, &all, x, &mut exact);
        let mut product = vec![f32::NAN; rows];
        scalar().dense_matmul(w, x, MatrixMut::new(&mut product, 1, rows).into_columns());
        assert_bits(Isa::Scalar, &exact, &product, "some rows and all rows");
        for (row, (exact, found)) in exact.iter().zip(found).enumerate() {
            let bound = screen.bound(&query, token, row);
            let share = (exact - found).abs() / bound;
            assert!(share <= 1.0, "row {row}: {exact} is {share} bounds from {found}");
            worst = worst.max(share);
            // What reaches a product is found by that product.
            let mut reaches = false;
            screen.reaching(&query, token, row..row + 1, &[*found], *exact, |_| reaches = true);
            assert!(reaches, "row {row} does not reach its own product");
        }
    }
    for kernels in variants() {
        let built = self::screen(kernels, w, 3);
        for cuts in [&[][..], &[rows / 3, rows / 2]] {
            let other = estimates(kernels, &built, &query, cuts);
            assert_bits(kernels.isa(), &other, &found, (w, query.tokens()));
        }
        for row in 0..rows {
            for token in 0..query.tokens() {
                let bounds = [&built, &screen].map(|screen| screen.bound(&query, token, row));
                assert_bits(kernels.isa(), &bounds[..1], &bounds[1..], "bound");
            }
        }
        for x in x.chunks_exact(cols) {
            let (mut some, mut expected) = (vec![f32::NAN; rows], vec![f32::NAN; rows]);
            kernels.dense_rows(w, &all, x, &mut some);
            scalar().dense_rows(w, &all, x, &mut expected);
            assert_bits(kernels.isa(), &some, &expected, "some rows");
        }
    }
    worst
}

#[test]
fn estimates_keep_to_their_bounds_on_every_shape() {
    let mut random = Random(11);
    for cols in [1_usize, 7, 16, 100, 127, 128, 129, 640, 2560] {
        for tokens in 1..=4 {
            let w = matrix(5, cols, &random.floats(5 * cols));
            hold(&w, &random.floats(tokens * cols));
        }
    }
}

/// Activations along the error of a row: the case in which Cauchy and Schwarz are right. A bound
/// that is a little too small does not survive it.
#[test]
fn bounds_are_no_larger_than_the_worst_case_needs() {
    let mut random = Random(12);
    let cols = 384;
    let w = matrix(1, cols, &random.floats(cols));
    let kept = screen(scalar(), &w, 1);
    let mut weights = vec![0.0; cols];
    scalar().dense_row(&w, 0, &mut weights);
    // What the screen keeps of each weight, asked one after the other.
    let missed: Vec<f32> = (0..cols)
        .map(|col| {
            let mut unit = vec![0.0; cols];
            unit[col] = 1.0;
            weights[col] - estimates(scalar(), &kept, &query(cols, &unit), &[])[0]
        })
        .collect();
    let worst = hold(&w, &missed);
    assert!(worst > 0.99, "the worst case needs {worst} of its bound");
}

#[test]
fn rows_of_zeros_and_of_one_large_number_are_kept() {
    let cols = 256;
    let mut weights = vec![0.0; 3 * cols];
    weights[cols + 5] = 1e9;
    weights[2 * cols..].fill(1e-13);
    let mut random = Random(13);
    hold(&matrix(3, cols, &weights), &random.floats(2 * cols));
}

#[test]
fn what_might_overflow_is_kept_out() {
    for bad in [f32::INFINITY, f32::NAN, 1e20] {
        let mut weights = vec![1.0; 2 * 128];
        weights[130] = bad;
        assert!(!screen(scalar(), &matrix(2, 128, &weights), 1).is_sound(), "{bad}");
        let mut query = ScreenQuery::new(128);
        assert!(!query.push(&weights[128..]), "{bad}");
        assert_eq!(query.tokens(), 0);
    }
    assert!(!ScreenQuery::new(2).push(&[0.0, -0.0]));
    assert!(!ScreenQuery::new(2).push(&[1e-20, 0.0]));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn estimates_keep_to_their_bounds(
        cols in 1_usize..300,
        seed in any::<u64>(),
        size_of_w in -30_i32..28,
        size_of_x in -30_i32..28,
        spikes in 0_usize..4,
    ) {
        let mut random = Random(seed);
        let mut numbers = |len: usize, size: i32| {
            let mut numbers = random.floats(len);
            for _ in 0..spikes {
                let at = random.below(len);
                // Once at most, so that no number is too large for a query.
                numbers[at] = 1000.0 * numbers[at].clamp(-1.0, 1.0);
            }
            numbers.iter_mut().for_each(|x| *x *= 2.0_f32.powi(size));
            // At least one that a query can work with.
            numbers[len - 1] = 2.0_f32.powi(size);
            numbers
        };
        let w = matrix(3, cols, &numbers(3 * cols, size_of_w));
        let x = numbers(cols, size_of_x);
        hold(&w, &x);
    }
}
