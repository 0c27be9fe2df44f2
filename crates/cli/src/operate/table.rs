//! A cluster for people.

use std::time::Duration;

use tercet_proto::v1::{
    GatewayStatus, ModelState, WorkerHealth, WorkerModelStatus, WorkerState, WorkerStatus,
};

/// Characters of an identity that tell it from others.
const IDENTITY: usize = 12;

/// Returns a status as tables.
pub(super) fn status(status: &GatewayStatus) -> String {
    let registry = status.registry.unwrap_or_default();
    let mut text = format!(
        "gateway {}, up {}, {} of {} streams, registry {}{}\n\n",
        status.version,
        span(status.uptime_seconds),
        status.streams,
        status.max_streams,
        if registry.connected { "connected" } else { "out of reach" },
        if status.draining { ", draining" } else { "" },
    );
    if status.workers.is_empty() {
        text.push_str("no worker is known\n");
    }
    let models = status.models.iter().map(|model| {
        [
            model.name.clone(),
            format!("{}/{}", model.ready_workers, model.workers),
            model.running.to_string(),
            model.waiting.to_string(),
            model.queued.to_string(),
            model.identity.chars().take(IDENTITY).collect(),
        ]
    });
    let head = ["MODEL", "READY", "RUNNING", "WAITING", "QUEUED", "IDENTITY"];
    push_table(&mut text, head, "<>>>><", models);
    if !status.models.is_empty() && !status.workers.is_empty() {
        text.push('\n');
    }
    let rows = status.workers.iter().flat_map(|worker| {
        let nothing = WorkerModelStatus::default();
        let models = if worker.models.is_empty() { vec![nothing] } else { worker.models.clone() };
        let row = |(nth, model): (usize, WorkerModelStatus)| row(worker, nth, &model);
        models.into_iter().enumerate().map(row).collect::<Vec<_>>()
    });
    let head = [
        "WORKER",
        "STATE",
        "ADDRESS",
        "STREAMS",
        "TOKENS",
        "MODEL",
        "LAYERS",
        "RUN",
        "WAIT",
        "FREE KV",
        "DECODE/S",
        "PREFILL/S",
        "NOTE",
    ];
    push_table(&mut text, head, "<<<>><<>>>>><", rows);
    text
}

/// Returns the line of a model of a worker; what concerns all of them is in the first.
fn row(worker: &WorkerStatus, nth: usize, model: &WorkerModelStatus) -> [String; 13] {
    let first = |text: String| if nth == 0 { text } else { String::new() };
    let layers = model.layers.unwrap_or_default();
    let load = |tell: fn(&tercet_proto::v1::ModelLoad) -> String| {
        model.load.as_ref().map_or_else(|| "-".to_owned(), tell)
    };
    [
        first(worker.worker_id.clone()),
        first(worker_state(worker.state()).to_owned()),
        first(worker.address.clone()),
        first(worker.streams.to_string()),
        first(worker.outstanding_tokens.to_string()),
        model.name.clone(),
        format!("{}..{}/{}", layers.start, layers.end, model.layer_count),
        load(|load| load.running.to_string()),
        load(|load| load.waiting.to_string()),
        load(|load| load.free_kv_tokens.to_string()),
        load(|load| rate(load.decode_tokens_per_second)),
        load(|load| rate(load.prefill_tokens_per_second)),
        notes(worker, nth, model).join(", "),
    ]
}

/// Returns what is not as it should be.
fn notes(worker: &WorkerStatus, nth: usize, model: &WorkerModelStatus) -> Vec<String> {
    let mut notes = Vec::new();
    if nth == 0 {
        match (worker.health(), worker.report_age_seconds) {
            (WorkerHealth::Answering, _) => {}
            (WorkerHealth::Silent | WorkerHealth::Lost, Some(age)) => {
                notes.push(format!("{} for {}", health(worker.health()), span(age)));
            }
            (other, _) => notes.push(health(other).to_owned()),
        }
        if worker.kept {
            notes.push("not in the registry".to_owned());
        }
    }
    if let Some(left) = model.ejected_seconds {
        notes.push(format!("left alone for {left:.1} s"));
    }
    if model.slow {
        notes.push("slow".to_owned());
    }
    if model.state() != ModelState::Ready {
        notes.push(model_state(model.state()).to_owned());
    }
    notes
}

pub(super) fn worker_state(state: WorkerState) -> &'static str {
    match state {
        WorkerState::Unspecified => "unknown",
        WorkerState::Loading => "loading",
        WorkerState::Ready => "ready",
        WorkerState::Draining => "draining",
    }
}

pub(super) fn model_state(state: ModelState) -> &'static str {
    match state {
        ModelState::Unspecified => "unknown",
        ModelState::Loading => "loading",
        ModelState::Ready => "ready",
        ModelState::Draining => "draining",
        ModelState::Failed => "failed",
    }
}

pub(super) fn health(health: WorkerHealth) -> &'static str {
    match health {
        WorkerHealth::Unspecified => "unknown",
        WorkerHealth::Unheard => "unheard",
        WorkerHealth::Answering => "answering",
        WorkerHealth::Lost => "lost",
        WorkerHealth::Silent => "silent",
        WorkerHealth::Gone => "gone",
        WorkerHealth::Unjudged => "unjudged",
    }
}

fn rate(rate: f64) -> String {
    if rate > 0.0 { format!("{rate:.1}") } else { "-".to_owned() }
}

/// Returns a time for people.
fn span(seconds: f64) -> String {
    let whole = Duration::try_from_secs_f64(seconds).unwrap_or_default().as_secs();
    match whole {
        0..10 => format!("{seconds:.1} s"),
        10..60 => format!("{whole} s"),
        60..3600 => format!("{} min {} s", whole / 60, whole % 60),
        3600..86_400 => format!("{} h {} min", whole / 3600, whole / 60 % 60),
        _ => format!("{} d {} h", whole / 86_400, whole / 3600 % 24),
    }
}

/// Appends a table whose columns are as wide as they must be; `sides` says `<` or `>` for each.
fn push_table<const N: usize>(
    text: &mut String,
    head: [&str; N],
    sides: &str,
    rows: impl Iterator<Item = [String; N]>,
) {
    let mut lines: Vec<[String; N]> = rows.collect();
    if lines.is_empty() {
        return;
    }
    lines.insert(0, head.map(str::to_owned));
    let widths: [usize; N] = std::array::from_fn(|column| {
        lines.iter().map(|line| line[column].chars().count()).max().unwrap_or(0)
    });
    for line in &lines {
        let mut cells = Vec::with_capacity(N);
        for ((cell, width), side) in line.iter().zip(widths).zip(sides.chars()) {
            cells.push(if side == '>' {
                format!("{cell:>width$}")
            } else {
                format!("{cell:width$}")
            });
        }
        text.push_str(cells.join("  ").trim_end());
        text.push('\n');
    }
}

#[cfg(test)]
mod tests {
    use tercet_proto::v1::{LayerRange, ModelLoad, ModelStatus, RegistryStatus};

    use super::*;

    fn cluster() -> GatewayStatus {
        let held = |name: &str| WorkerModelStatus {
            name: name.to_owned(),
            layers: Some(LayerRange { start: 0, end: 30 }),
            layer_count: 30,
            state: ModelState::Ready.into(),
            load: Some(ModelLoad {
                running: 3,
                free_kv_tokens: 4096,
                decode_tokens_per_second: 23.14,
                ..ModelLoad::default()
            }),
            ..WorkerModelStatus::default()
        };
        let worker = |id: &str, health: WorkerHealth, models| WorkerStatus {
            worker_id: id.to_owned(),
            address: "10.0.0.2:7172".to_owned(),
            state: WorkerState::Ready.into(),
            health: health.into(),
            report_age_seconds: Some(75.0),
            streams: 2,
            outstanding_tokens: 300,
            models,
            ..WorkerStatus::default()
        };
        GatewayStatus {
            version: "0.1.0".to_owned(),
            uptime_seconds: 3725.0,
            streams: 4,
            max_streams: 1024,
            registry: Some(RegistryStatus { connected: true, revision: 9 }),
            workers: vec![
                worker("a", WorkerHealth::Answering, vec![held("chat"), held("code")]),
                worker("b", WorkerHealth::Silent, Vec::new()),
            ],
            models: vec![ModelStatus {
                name: "chat".to_owned(),
                identity: "0123456789abcdef".to_owned(),
                ready_workers: 1,
                workers: 2,
                running: 3,
                ..ModelStatus::default()
            }],
            ..GatewayStatus::default()
        }
    }

    #[test]
    fn tables_align() {
        let expected = "\
gateway 0.1.0, up 1 h 2 min, 4 of 1024 streams, registry connected

MODEL  READY  RUNNING  WAITING  QUEUED  IDENTITY
chat     1/2        3        0       0  0123456789ab

WORKER  STATE  ADDRESS        STREAMS  TOKENS  MODEL  LAYERS    RUN  WAIT  FREE KV  DECODE/S  PREFILL/S  NOTE
a       ready  10.0.0.2:7172        2     300  chat   0..30/30    3     0     4096      23.1          -
                                               code   0..30/30    3     0     4096      23.1          -
b       ready  10.0.0.2:7172        2     300         0..0/0      -     -        -         -          -  silent for 1 min 15 s, unknown
";
        assert_eq!(status(&cluster()), expected);
        let empty = status(&GatewayStatus { version: "0.1.0".to_owned(), ..Default::default() });
        assert_eq!(
            empty,
            "gateway 0.1.0, up 0.0 s, 0 of 0 streams, registry out of reach\n\nno worker is known\n"
        );
    }

    #[test]
    fn times_are_short() {
        let told = [0.25, 59.9, 61.0, 7261.0, 90_000.0].map(span);
        assert_eq!(told, ["0.2 s", "59 s", "1 min 1 s", "2 h 1 min", "1 d 1 h"]);
    }

    #[test]
    fn programs_get_everything() {
        let json: serde_json::Value =
            serde_json::from_str(&super::super::json::status(&cluster())).unwrap();
        assert_eq!(json["workers"][0]["models"][1]["load"]["free_kv_tokens"], 4096);
        assert_eq!(json["workers"][1]["health"], "silent");
        assert!(json["workers"][1]["ejected_seconds"].is_null());
        assert_eq!(json["models"][0]["identity"], "0123456789abcdef");
        assert_eq!(json["registry"]["connected"], true);
    }
}
