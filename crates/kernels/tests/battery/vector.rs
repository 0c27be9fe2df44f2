use proptest::prelude::*;

use crate::support::{Random, assert_bits, scalar, variants};

const LENGTHS: [usize; 22] =
    [0, 1, 2, 7, 8, 9, 15, 16, 17, 23, 24, 31, 32, 33, 47, 64, 100, 127, 128, 129, 2560, 6912];

/// Values that break careless code, mixed into random ones.
fn awkward() -> impl Strategy<Value = f32> {
    prop_oneof![
        8 => -10.0_f32..10.0,
        2 => prop::num::f32::NORMAL,
        1 => prop::num::f32::SUBNORMAL,
        1 => prop::sample::select(vec![0.0, -0.0, 1.0, f32::MAX, f32::MIN, f32::MIN_POSITIVE]),
    ]
}

fn awkward_rows(count: usize) -> impl Strategy<Value = Vec<Vec<f32>>> {
    (0_usize..80).prop_flat_map(move |len| {
        prop::collection::vec(prop::collection::vec(awkward(), len), count)
    })
}

fn compare(a: &[f32], b: &[f32], c: &[f32]) {
    let len = a.len();
    for kernels in variants() {
        assert_bits(kernels, &[kernels.dot(a, b)], &[scalar().dot(a, b)], ("dot", a, b));
        if len > 0 {
            let mut found = vec![0.0; len];
            let mut expected = vec![0.0; len];
            kernels.rms_norm(a, b, 1e-5, &mut found);
            scalar().rms_norm(a, b, 1e-5, &mut expected);
            assert_bits(kernels, &found, &expected, ("rms_norm", a, b));
        }
        let (mut found, mut expected) = (a.to_vec(), a.to_vec());
        kernels.relu2_mul(&mut found, b);
        scalar().relu2_mul(&mut expected, b);
        assert_bits(kernels, &found, &expected, ("relu2_mul", a, b));
        let (mut found, mut expected) = (a.to_vec(), a.to_vec());
        kernels.silu_mul(&mut found, b);
        scalar().silu_mul(&mut expected, b);
        assert_bits(kernels, &found, &expected, ("silu_mul", a, b));
        let (mut found, mut expected) = (a.to_vec(), a.to_vec());
        kernels.add(&mut found, b);
        scalar().add(&mut expected, b);
        assert_bits(kernels, &found, &expected, ("add", a, b));
        let (mut found, mut expected) = (a.to_vec(), a.to_vec());
        kernels.exp(&mut found);
        scalar().exp(&mut expected);
        assert_bits(kernels, &found, &expected, ("exp", a));
        for max in [0.0, 1.5, -3.0] {
            let expected = scalar().sum_exp(a, max);
            assert_bits(kernels, &[kernels.sum_exp(a, max)], &[expected], ("sum_exp", a, max));
        }
        assert_eq!(kernels.argmax(a), scalar().argmax(a), "argmax of {a:?}");
        let mut head = [a, b].concat();
        let mut expected = head.clone();
        kernels.rope(&mut head, c, a);
        scalar().rope(&mut expected, c, a);
        assert_bits(kernels, &head, &expected, ("rope", a, b, c));
    }
}

#[test]
fn every_length_gives_equal_bits() {
    let mut random = Random(5);
    for len in LENGTHS {
        let [a, b, c] = [(); 3].map(|()| random.floats(len));
        compare(&a, &b, &c);
    }
}

#[test]
fn sums_of_tiny_products_keep_their_sign() {
    let tiny = f32::from_bits(1);
    for len in LENGTHS {
        compare(&vec![tiny; len], &vec![-tiny; len], &vec![tiny; len]);
    }
}

#[test]
fn exponentials_equal_over_the_whole_range() {
    let x: Vec<f32> = (0..u32::MAX - 20_011).step_by(20_011).map(f32::from_bits).collect();
    let mut expected = x.clone();
    scalar().exp(&mut expected);
    for kernels in variants() {
        let mut found = x.clone();
        kernels.exp(&mut found);
        for (x, (found, expected)) in x.iter().zip(found.iter().zip(&expected)) {
            assert_bits(kernels, &[*found], &[*expected], x);
        }
    }
}

#[test]
fn the_largest_is_found_among_ties_and_nan() {
    let mut random = Random(6);
    for len in LENGTHS {
        for _ in 0..20 {
            let x: Vec<f32> = (0..len)
                .map(|_| [0.0, -0.0, 1.0, -1.0, f32::NAN, f32::NEG_INFINITY][random.below(6)])
                .collect();
            for kernels in variants() {
                assert_eq!(kernels.argmax(&x), scalar().argmax(&x), "{x:?}");
            }
        }
    }
}

#[test]
fn nan_and_infinity_pass_through() {
    for len in LENGTHS.into_iter().filter(|&len| len > 0) {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for at in [0, len / 2, len - 1] {
                let mut x = vec![0.5; len];
                x[at] = bad;
                compare(&x, &vec![0.25; len], &vec![0.75; len]);
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]
    #[test]
    fn awkward_values_give_equal_bits(rows in awkward_rows(3)) {
        compare(&rows[0], &rows[1], &rows[2]);
    }
}
