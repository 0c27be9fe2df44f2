//! Cached prefixes: when they are hit, when not, and what is evicted.

use super::*;

fn prompt(first: u32, length: usize) -> Vec<u32> {
    made_up(first as usize, length)
}

#[test]
fn a_prompt_that_comes_again_begins_after_its_full_pages() {
    // One row is left to compute, even if all pages are there.
    for (length, cached) in [(63, 0), (64, 0), (65, 64), (127, 64), (128, 64), (129, 128)] {
        let mut simulation = Simulation::new(config(8, 4, 50));
        for key in 0..3 {
            simulation.submit(key, request(&prompt(1, length), 2));
            simulation.drain();
            assert_eq!(simulation.completion(key), expected(&prompt(1, length), 2));
        }
        assert_eq!(simulation.cached(0), [0]);
        assert_eq!((simulation.cached(1), simulation.cached(2)), (vec![cached], vec![cached]));
        assert_eq!(simulation.tally.hit_tokens, 2 * cached);
    }
}

#[test]
fn a_completion_is_a_prefix_of_the_next_turn() {
    let mut simulation = Simulation::new(config(8, 4, 50));
    let mut turn = prompt(1, 60);
    simulation.submit(0, request(&turn, 80));
    simulation.drain();
    turn.extend(simulation.completion(0));
    turn.extend([1, 2, 3]);
    simulation.submit(1, request(&turn, 5));
    simulation.drain();
    // The last of the 140 tokens was never an input.
    assert_eq!(simulation.cached(1), [128]);
    assert_eq!(simulation.completion(1), expected(&turn, 5));
}

#[test]
fn other_ids_and_other_salts_share_nothing() {
    let mut simulation = Simulation::new(config(8, 4, 50));
    let ids = prompt(1, 130);
    let mut other = ids.clone();
    other[0] += 1;
    let mut late = ids.clone();
    late[100] += 1;
    let salted =
        |salt: &str| SequenceRequest { cache_salt: salt.to_owned(), ..request(&prompt(1, 130), 1) };
    let asked = [request(&ids, 1), request(&other, 1), request(&late, 1), salted("a"), salted("b")];
    for (key, asked) in (0..).zip(asked) {
        simulation.submit(key, asked);
        simulation.drain();
    }
    simulation.submit(9, salted("a"));
    simulation.drain();
    let cached: Vec<_> = [0, 1, 2, 3, 4, 9].map(|key| simulation.cached(key)[0]).to_vec();
    assert_eq!(cached, [0, 0, 64, 0, 0, 128]);
}

#[test]
fn scores_fill_the_cache_and_compute_every_row() {
    let mut simulation = Simulation::new(config(8, 4, 50));
    let ids = prompt(1, 130);
    let score = || SequenceRequest { output: Output::Score, ..request(&ids, 1) };
    simulation.submit(0, score());
    simulation.drain();
    simulation.submit(1, score());
    simulation.submit(2, request(&ids, 1));
    simulation.drain();
    let cached: Vec<_> = [0, 1, 2].map(|key| simulation.cached(key)[0]).to_vec();
    assert_eq!(cached, [0, 0, 128]);
    let told = &simulation.told[&RequestKey(1)];
    assert!(matches!(told.last(), Some(SequenceEvent::Scores(scores)) if scores.top_ids == ids));
}

#[test]
fn prompts_that_come_together_compute_their_common_pages_once() {
    for steps_in_flight in 1..4 {
        let config = SchedulerConfig { steps_in_flight, ..config(40, 8, 40) };
        let mut simulation = Simulation::new(config);
        let mut rows = 0;
        let asked = |key: u32| [prompt(1, 200), prompt(key + 2, 20)].concat();
        for key in 0_u32..6 {
            simulation.submit(key.into(), request(&asked(key), 3));
        }
        loop {
            while let Some(shape) = simulation.plan() {
                rows += shape.prompt_rows;
            }
            if !simulation.apply() {
                break;
            }
        }
        // 192 of the 220 rows are those of the first.
        assert_eq!((rows, simulation.tally.hit_tokens), (220 + 5 * 28, 5 * 192));
        for key in 0_u32..6 {
            assert_eq!(simulation.completion(key.into()), expected(&asked(key), 3));
        }
    }
}

#[test]
fn the_longest_unused_leaf_goes_first() {
    let mut simulation = Simulation::new(config(7, 4, 500));
    let (old, new) = (prompt(1, 193), prompt(2, 193));
    for (key, ids) in [(0, &old), (1, &new), (2, &old)] {
        simulation.submit(key, request(ids, 1));
        simulation.drain();
    }
    assert_eq!(simulation.cached(2), [192], "six pages are kept, one was free");
    // Needs two pages more than are free: those at the end of `new`, which is unused for longer.
    simulation.submit(3, request(&prompt(3, 129), 1));
    simulation.drain();
    simulation.submit(4, request(&old, 1));
    simulation.drain();
    assert_eq!(simulation.cached(4), [192]);
    simulation.submit(5, request(&new, 1));
    simulation.drain();
    assert_eq!(simulation.cached(5), [64]);
}

#[test]
fn pages_of_a_failed_run_are_not_kept() {
    let mut simulation = Simulation::new(config(8, 4, 70));
    let mut ids = prompt(1, 200);
    ids[150] = POISON;
    for key in 0..2 {
        simulation.submit(key, request(&ids, 1));
        simulation.drain();
        let told = simulation.told[&RequestKey(key)].last();
        assert_eq!(told, Some(&SequenceEvent::Failed(SequenceFailure::NonFinite)));
    }
    assert_eq!(simulation.cached(1), [128], "the runs before were sound");
}

#[test]
fn a_short_prompt_overtakes_a_long_one_and_both_end() {
    let mut simulation = Simulation::new(SchedulerConfig { context: 4096, ..config(64, 8, 16) });
    simulation.submit(0, request(&prompt(1, 3000), 1));
    let mut steps = 0;
    for key in 1_u32..20 {
        simulation.submit(key.into(), request(&prompt(key + 1, 30), 1));
        while simulation.told[&RequestKey(key.into())].len() < 3 {
            simulation.plan();
            simulation.apply();
            steps += 1;
        }
    }
    assert!(steps < 19 * 6, "{steps} steps for 19 prompts of 2 chunks");
    let first = &simulation.scheduler.running[0];
    assert!(first.computed >= steps / 2 * 16 - 64, "{} rows of the long one", first.computed);
    simulation.drain();
    assert_eq!(simulation.completion(0).len(), 1);
}

#[test]
fn streams_are_stretched_and_no_more() {
    let mut simulation = Simulation::new(SchedulerConfig { context: 4096, ..config(128, 9, 128) });
    let millis = |shape: &StepShape| 2.0 + (shape.decode_rows + shape.prompt_rows) as f64;
    let step = |simulation: &mut Simulation| {
        let shape = simulation.plan().unwrap();
        let elapsed = Duration::from_secs_f64(millis(&shape) / 1e3);
        simulation.scheduler.observe(&shape, elapsed);
        simulation.apply();
        shape
    };
    for key in 0_u32..8 {
        simulation.submit(key.into(), request(&prompt(key, 30), 500));
    }
    while step(&mut simulation).decode_rows < 8 {}
    for _ in 0..9 {
        step(&mut simulation);
    }
    simulation.submit(8, request(&prompt(50, 1500), 1));
    let mut steps = 0;
    while simulation.told[&RequestKey(8)].len() < 2 {
        let shape = step(&mut simulation);
        assert_eq!(shape.decode_rows, 8);
        assert!(millis(&shape) <= 16.0, "{shape:?} next to 10 milliseconds");
        steps += 1;
    }
    assert!((250..=320).contains(&steps), "{steps} steps of 6 rows for 1500");
}
