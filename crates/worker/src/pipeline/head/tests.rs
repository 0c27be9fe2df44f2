use tercet_cluster::LayerRange;
use tercet_engine::demo;
use tercet_telemetry::Metrics;

use super::*;
use crate::{
    Config, ModelSpec,
    core::{Core, Facts},
};

/// A head with layers 0..1 of the built-in model, told to have 4.
fn core() -> (Core, Arc<Hosted>) {
    let mut config = Config::new("head".parse().unwrap(), "head:1".to_owned());
    config.engine.layers = Some(0..1);
    let mut model = demo::model().unwrap();
    model.config.layers = 4;
    let facts = Facts::new(&model, &ModelSpec::default(), &config);
    let core = Core::new(config, Metrics::new()).unwrap();
    let model = core.host(facts, core.kv.take(None).unwrap()).unwrap();
    model.enter(Phase::Ready("".into()));
    (core, model)
}

fn view(core: &Core, stages: &[(&str, u32, u32)]) -> View {
    let record = |(id, start, end): (&str, u32, u32)| {
        let mut record = core.record();
        record.id = id.parse().unwrap();
        record.models[0].layers = LayerRange { start, end };
        record
    };
    let mut view = View::default();
    let own = [("head", 0, 1)];
    for worker in own.into_iter().chain(stages.iter().copied()).map(record) {
        view.workers.insert(worker.id.clone(), Arc::new(worker));
    }
    view
}

fn found(model: &Hosted, view: &View) -> Vec<String> {
    chains(view, model).iter().map(|chain| names(chain).join(" ")).collect()
}

#[test]
fn chains_reach_the_end_by_lowest_names_first() {
    let (core, model) = core();
    assert!(found(&model, &view(&core, &[])).is_empty());
    assert!(found(&model, &view(&core, &[("b", 1, 3)])).is_empty(), "the end is missing");
    assert!(found(&model, &view(&core, &[("b", 2, 4)])).is_empty(), "there is a gap");
    let all = view(&core, &[("d", 1, 4), ("c", 3, 4), ("b", 1, 3), ("e", 3, 4), ("a", 0, 4)]);
    assert_eq!(found(&model, &all), ["b c", "b e", "d"]);
}

#[test]
fn only_ready_stages_of_the_same_model_are_chained() {
    let (core, model) = core();
    let spoil = |change: fn(&mut WorkerRecord)| {
        let mut view = view(&core, &[("b", 1, 4)]);
        assert_eq!(found(&model, &view), ["b"]);
        change(Arc::make_mut(view.workers.get_mut(&"b".parse().unwrap()).unwrap()));
        found(&model, &view)
    };
    assert!(spoil(|worker| worker.state = WorkerState::Loading).is_empty());
    assert!(spoil(|worker| worker.state = WorkerState::Draining).is_empty());
    assert!(spoil(|worker| worker.models[0].name.push('x')).is_empty());
    assert!(spoil(|worker| worker.models[0].header_digest.push('0')).is_empty());
    assert!(spoil(|worker| worker.models[0].layer_count = 5).is_empty());
    assert!(spoil(|worker| worker.models[0].layers = LayerRange { start: 1, end: 1 }).is_empty());
}
