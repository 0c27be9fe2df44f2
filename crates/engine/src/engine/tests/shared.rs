//! Engines on one pool: they compute the same, take turns, and outlive each other's defects.

use super::*;

fn engine(pool: &ComputePool, observer: Option<LogitsObserver>) -> Engine {
    Engine::load_on(&demo::model().unwrap(), &options(), pool, observer, &mut |_| {
        ControlFlow::Continue(())
    })
    .unwrap()
}

#[test]
fn engines_on_one_pool_take_turns_and_change_no_token() {
    let alone = Engine::load(&demo::model().unwrap(), &options()).unwrap();
    let asked = |seed| request(&prompts(3)[2], 40, sampled(seed));
    let expected: Vec<_> = (0..2).map(|seed| tokens(&submit(&alone, asked(seed)).1)).collect();
    for threads in [1, 2] {
        let pool = ComputePool::new(threads).unwrap();
        let engines = [engine(&pool, None), engine(&pool, None), engine(&pool, None)];
        // Never ends by itself: an engine that computes all the time stops no other.
        let (_busy, stream) = submit(&engines[0], request(&[1, 2], 1000, sampled(9)));
        assert_eq!(stream.recv_timeout(WAIT), Ok(SequenceEvent::Scheduled { cached: 0 }));
        let begun: Vec<_> = engines[1..]
            .iter()
            .zip(0..)
            .map(|(engine, seed)| submit(engine, asked(seed)))
            .collect();
        for ((_handle, receiver), expected) in begun.iter().zip(&expected) {
            assert_eq!(tokens(receiver), *expected, "on {threads} threads");
        }
        assert!(stream.try_iter().count() < 1000, "the busy engine was done before");
    }
}

#[test]
fn an_engine_that_breaks_down_leaves_the_others_at_work() {
    for threads in [1, 2] {
        let pool = ComputePool::new(threads).unwrap();
        let sound = engine(&pool, None);
        let (_handle, receiver) = submit(&sound, request(&[1, 2], 60, sampled(1)));
        let mut rows = 0;
        let broken = engine(
            &pool,
            Some(Box::new(move |_, _, _| {
                rows += 1;
                assert!(rows < 5, "on purpose");
            })),
        );
        let (_broken, lost) = submit(&broken, request(&[1, 2], 60, sampled(1)));
        assert!(lost.iter().all(|event| !matches!(event, SequenceEvent::Finished(_))));
        assert_eq!(tokens(&receiver).len(), 60);
        let (_handle, receiver) = submit(&sound, request(&[3], 3, sampled(1)));
        assert_eq!(tokens(&receiver).len(), 3);
        assert!(sound.is_alive());
        let refused = broken.submit(request(&[3], 3, sampled(1)), Box::new(|_| {}));
        assert_eq!(refused.unwrap_err(), SubmitError::Stopped);
    }
}

#[test]
fn loading_tells_how_far_it_is_and_can_be_interrupted() {
    let (model, pool) = (demo::model().unwrap(), ComputePool::new(1).unwrap());
    let mut reading = Vec::new();
    let engine = Engine::load_on(&model, &options(), &pool, None, &mut |progress| {
        reading.push(progress);
        ControlFlow::Continue(())
    });
    let mut hashing = Vec::new();
    let parts = engine.unwrap().part_digests(&mut |progress| {
        hashing.push(progress);
        ControlFlow::Continue(())
    });
    let names: Vec<_> = parts.unwrap().into_iter().map(|(name, _)| name).collect();
    assert_eq!(names, ["embed", "layer.0", "layer.1", "layer.2", "head"]);
    for told in [&reading, &hashing] {
        assert!(told.is_sorted_by_key(|progress| progress.done), "{told:?}");
        let last = told.last().unwrap();
        assert!(last.done == last.total && last.total > 100_000, "{last:?}");
    }

    let mut reports = 0;
    let interrupted = Engine::load_on(&model, &options(), &pool, None, &mut |_| {
        reports += 1;
        if reports == 2 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    });
    assert!(matches!(interrupted, Err(EngineError::Model(ModelError::Interrupted))));
    assert_eq!(reports, 2, "nothing is read after that");
}
