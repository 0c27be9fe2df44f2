//! What nobody waits for any more is not computed.

use super::*;

/// An engine that computes one row a step and waits for a permit after each: rows that were
/// computed come out, permits go in.
fn stepped() -> (Engine, Receiver<(SequenceId, usize)>, Sender<()>) {
    let (rows, seen) = mpsc::channel();
    let (permits, permitted) = mpsc::channel();
    let observer: LogitsObserver = Box::new(move |sequence, position, _| {
        // Both ends are gone once the test is done.
        rows.send((sequence, position)).unwrap_or(());
        permitted.recv().unwrap_or(());
    });
    let options = EngineOptions { max_sequences: 1, prefill_chunk: 1, ..options() };
    let model = demo::model().unwrap();
    (Engine::load_observed(&model, &options, Some(observer)).unwrap(), seen, permits)
}

#[test]
fn a_sequence_cancelled_in_its_prefill_ends_with_the_step() {
    let (engine, seen, permits) = stepped();
    let (handle, events) = submit(&engine, request(&[1; 500], 10, sampled(1)));
    for position in 0..20 {
        assert_eq!(seen.recv_timeout(WAIT).unwrap().1, position);
        permits.send(()).unwrap();
    }
    let (sequence, position) = seen.recv_timeout(WAIT).unwrap();
    assert_eq!(position, 20);
    drop(handle);
    let (_next, _events) = submit(&engine, request(&[2], 1, sampled(1)));
    permits.send(()).unwrap();
    let (next, position) = seen.recv_timeout(WAIT).unwrap();
    assert!(next != sequence && position == 0, "row {position} of {next} after the cancelled one");
    assert!(events.iter().all(|event| event == SequenceEvent::Scheduled { cached: 0 }));
}

#[test]
fn a_sequence_cancelled_in_the_queue_is_never_computed() {
    let (engine, seen, permits) = stepped();
    let (_first, first) = submit(&engine, request(&[1], 3, sampled(1)));
    let (running, _) = seen.recv_timeout(WAIT).unwrap();
    let (queued, events) = submit(&engine, request(&[2; 9], 3, sampled(1)));
    let (_last, last) = submit(&engine, request(&[3], 1, sampled(1)));
    drop(queued);
    drop(permits);
    assert_eq!((tokens(&first).len(), tokens(&last).len()), (3, 1));
    assert_eq!(events.iter().count(), 0, "it was not even scheduled");
    let others: Vec<_> = seen.try_iter().filter(|(sequence, _)| *sequence != running).collect();
    assert_eq!(others.len(), 1, "only the last one's: {others:?}");
}
