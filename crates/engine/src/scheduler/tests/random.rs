//! Whatever is asked, cancelled and lost, in whatever order and however little room there is.

use proptest::prelude::*;

use super::*;

#[derive(Clone, Debug)]
enum Action {
    Submit(Asked),
    /// Of the request of this number, modulo those made.
    Cancel(usize),
    Plan {
        millis: u64,
    },
    Apply,
    Abandon,
}

#[derive(Clone, Debug)]
struct Asked {
    family: usize,
    /// Tokens that it has in common with others of the family.
    common: usize,
    own: usize,
    max_tokens: usize,
    kind: Kind,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    Plain,
    Salted,
    Score,
    /// Fails at this token.
    Poisoned(usize),
}

fn asked() -> impl Strategy<Value = Asked> {
    let kind = prop_oneof![
        6 => Just(Kind::Plain),
        1 => Just(Kind::Salted),
        1 => Just(Kind::Score),
        1 => (0_usize..250).prop_map(Kind::Poisoned),
    ];
    // Around whole pages most things can go wrong.
    let common = prop_oneof![
        0_usize..200,
        (0_usize..4, 0_usize..3)
            .prop_map(|(pages, more)| { (pages * 64 + more).saturating_sub(1) })
    ];
    (0_usize..3, common, 0_usize..80, 1_usize..150, kind).prop_map(
        |(family, common, own, max_tokens, kind)| Asked { family, common, own, max_tokens, kind },
    )
}

fn action() -> impl Strategy<Value = Action> {
    prop_oneof![
        10 => asked().prop_map(Action::Submit),
        4 => (0_usize..100).prop_map(Action::Cancel),
        60 => (1_u64..50).prop_map(|millis| Action::Plan { millis }),
        60 => Just(Action::Apply),
        1 => Just(Action::Abandon),
    ]
}

/// Returns the request, cut to what has room.
fn build(number: usize, asked: &Asked, limit: usize) -> SequenceRequest {
    let mut ids = made_up(asked.family * 100, asked.common);
    ids.extend(made_up(500 + number, asked.own.max(1)));
    ids.truncate(limit);
    let mut built = request(&ids, asked.max_tokens);
    match asked.kind {
        Kind::Plain => {}
        Kind::Salted => built.cache_salt = "salt".to_owned(),
        Kind::Score => built.output = Output::Score,
        Kind::Poisoned(at) => {
            let last = ids.len() - 1;
            built.prompt[at.min(last)] = POISON;
        }
    }
    built
}

/// Checks what one request was told against what it gets alone.
fn check_answer(asked: &SequenceRequest, told: &[SequenceEvent], limit: usize) {
    let last = told.last().expect("every request is answered");
    // What fills the context is complete without a step.
    let computed = asked.output == Output::Score || asked.prompt.len() < limit;
    if computed && asked.prompt.contains(&POISON) {
        assert_eq!(*last, SequenceEvent::Failed(SequenceFailure::NonFinite));
        return;
    }
    match &asked.output {
        Output::Score => {
            let scores = Scores {
                logprobs: asked.prompt[1..].iter().map(|id| -(*id as f32)).collect(),
                top_ids: asked.prompt.clone(),
            };
            assert_eq!(*last, SequenceEvent::Scores(scores));
        }
        Output::Generate { max_tokens, .. } => {
            let n = (*max_tokens).min(limit - asked.prompt.len());
            assert_eq!(tokens_of(told), expected(&asked.prompt, n));
            assert!(matches!(last, SequenceEvent::Finished(_)));
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    /// Every request that is not cancelled or lost is answered as if it were alone, whoever is
    /// preempted; and after every move each page has one role and as many references as tables.
    #[test]
    fn every_answer_equals_that_of_a_solo_run(
        actions in prop::collection::vec(action(), 1..300),
        pages in prop_oneof![1_usize..5, 1_usize..20],
        max_sequences in 1_usize..7,
        prefill_chunk in 1_usize..100,
        steps_in_flight in 1_usize..4,
        drafts in (0_usize..8, prop::sample::select(vec![0.0, 0.5, 0.8, 1.0])),
    ) {
        let config =
            SchedulerConfig { steps_in_flight, ..config(pages, max_sequences, prefill_chunk) };
        let limit = config.context_limit();
        let mut simulation = Simulation::new(config);
        let guesses = drafts::Guesses { acceptance: drafts.1, drawn: 0 };
        simulation.scheduler.draft_with(Some(Box::new(guesses)), drafts.0);
        let mut requests: Vec<Option<SequenceRequest>> = Vec::new();
        for action in &actions {
            match action {
                Action::Submit(asked) => {
                    let built = build(requests.len(), asked, limit);
                    simulation.submit(requests.len() as u64, built.clone());
                    requests.push(Some(built));
                }
                Action::Cancel(number) => {
                    if let Some(number) = number.checked_rem(requests.len()) {
                        requests[number] = None;
                        simulation.scheduler.cancel(RequestKey(number as u64));
                        simulation.check();
                    }
                }
                Action::Plan { millis } => {
                    if let Some(shape) = simulation.plan() {
                        simulation.scheduler.observe(&shape, Duration::from_millis(*millis));
                    }
                }
                Action::Apply => {
                    simulation.apply();
                }
                Action::Abandon => {
                    for key in simulation.abandon() {
                        prop_assert!(requests[usize::try_from(key.0).unwrap()].take().is_some());
                    }
                }
            }
        }
        simulation.drain();
        for (number, asked) in requests.iter().enumerate() {
            if let Some(asked) = asked {
                check_answer(asked, &simulation.told[&RequestKey(number as u64)], limit);
            }
        }
    }

    /// Many long requests in little room: all come to an end, by preempting each other.
    #[test]
    fn all_come_to_an_end_in_little_room(
        all in prop::collection::vec(asked(), 2..12),
        pages in 4_usize..9,
        max_sequences in 2_usize..6,
        steps_in_flight in 1_usize..4,
        drafts in (0_usize..8, prop::sample::select(vec![0.0, 0.5, 0.8, 1.0])),
    ) {
        let config = SchedulerConfig { steps_in_flight, ..config(pages, max_sequences, 40) };
        let limit = config.context_limit();
        let mut simulation = Simulation::new(config);
        let guesses = drafts::Guesses { acceptance: drafts.1, drawn: 0 };
        simulation.scheduler.draft_with(Some(Box::new(guesses)), drafts.0);
        let requests: Vec<_> =
            all.iter().enumerate().map(|(number, asked)| build(number, asked, limit)).collect();
        for (key, asked) in (0..).zip(&requests) {
            simulation.submit(key, asked.clone());
        }
        simulation.drain();
        for (key, asked) in (0..).zip(&requests) {
            check_answer(asked, &simulation.told[&RequestKey(key)], limit);
        }
    }
}
