use std::time::Duration;

use super::*;

/// Returns the value of the series whose line starts with `series`.
fn value(metrics: &Metrics, series: &str) -> Option<f64> {
    let text = metrics.encode();
    let rest = text.lines().find_map(|line| line.strip_prefix(series))?;
    rest.trim().parse().ok()
}

const LABELS: &str = concat!(
    "component=\"gateway\",gen_ai_operation_name=\"chat\",",
    "gen_ai_provider_name=\"tercet\",gen_ai_request_model=\"demo\""
);

#[tokio::test(start_paused = true)]
async fn a_request_is_measured_from_start_to_last_token() {
    let metrics = Metrics::new();
    let streams = "tercet_streams{component=\"gateway\",gen_ai_request_model=\"demo\"}";
    let mut request = metrics.request(Component::Gateway, Operation::Chat, "demo");
    assert_eq!(value(&metrics, streams), Some(1.0));
    request.prompt(7);
    tokio::time::advance(Duration::from_millis(300)).await;
    request.completion(1);
    request.completion(0);
    tokio::time::advance(Duration::from_millis(200)).await;
    request.completion(2);
    tokio::time::advance(Duration::from_millis(500)).await;
    request.succeed();

    let read = |name: &str, first: &str, last: &str| {
        value(&metrics, &format!("{name}{{{first}{LABELS}{last}}}"))
    };
    assert_eq!(read("gen_ai_server_time_to_first_token_seconds_sum", "", ""), Some(0.3));
    assert_eq!(read("gen_ai_server_time_per_output_token_seconds_sum", "", ""), Some(0.1));
    let duration = "gen_ai_server_request_duration_seconds";
    let no_error = ",error_type=\"\"";
    assert_eq!(read(&format!("{duration}_sum"), "", no_error), Some(1.0));
    for (bound, expected) in [("0.64", 0.0), ("1.28", 1.0), ("+Inf", 1.0)] {
        let le = format!("le=\"{bound}\",");
        assert_eq!(read(&format!("{duration}_bucket"), &le, no_error), Some(expected), "{bound}");
    }
    let tokens = |kind: &str| {
        let labels = format!("component=\"gateway\",gen_ai_request_model=\"demo\",kind=\"{kind}\"");
        value(&metrics, &format!("tercet_tokens_total{{{labels}}}"))
    };
    assert_eq!(tokens("prompt"), Some(7.0));
    assert_eq!(tokens("completion"), Some(3.0));
    assert_eq!(value(&metrics, streams), Some(0.0));
}

#[tokio::test(start_paused = true)]
async fn a_failed_and_a_dropped_request_say_why() {
    let metrics = Metrics::new();
    metrics.request(Component::Gateway, Operation::Chat, "demo").fail("NON_FINITE");
    drop(metrics.request(Component::Gateway, Operation::Chat, "demo"));
    for error in ["NON_FINITE", "CANCELLED"] {
        let series = format!(
            "gen_ai_server_request_duration_seconds_count{{{LABELS},error_type=\"{error}\"}}"
        );
        assert_eq!(value(&metrics, &series), Some(1.0), "{error}");
    }
    let series = format!("gen_ai_server_time_per_output_token_seconds_count{{{LABELS}}}");
    assert_eq!(value(&metrics, &series), Some(0.0), "one token has no gap");
}

#[test]
fn gauges_and_counters_have_their_names() {
    let metrics = Metrics::new();
    metrics.set_sequences("demo", SequenceState::Waiting, 3);
    metrics.set_kv_pages("demo", PageState::Cached, 5);
    metrics.set_model_state("demo", "ready");
    metrics.set_workers("demo", 2);
    metrics.worker_outstanding("w-1").set(4);
    metrics.worker_suspected("w-1").set(1);
    metrics.suspicion();
    metrics.set_queue_length("demo", 6);
    metrics.queue_waited("demo", Duration::from_millis(300));
    metrics.queue_refused(QueueRefusal::Hopeless);
    metrics.worker_ejected(EjectionCause::Slow);
    metrics.set_workers_kept(2);
    metrics.lone_run();
    metrics.poisoned();
    metrics.stream_moved(MoveCause::Draining);
    metrics.reject(Component::Gateway, "OVERLOADED");
    metrics.step("demo", Duration::from_millis(3), &[(RowKind::Prompt, 12), (RowKind::Decode, 0)]);
    metrics.step("demo", Duration::from_millis(3), &[(RowKind::Decode, 2)]);
    metrics.preempted("demo", 3);
    metrics.prefix_hit("demo", 128);
    metrics.drafted("demo", 9, 4);
    metrics.screened("demo", 7, 90, 1);
    for (series, expected) in [
        ("tercet_sequences{gen_ai_request_model=\"demo\",state=\"waiting\"}", 3.0),
        ("tercet_kv_pages{gen_ai_request_model=\"demo\",state=\"cached\"}", 5.0),
        ("tercet_model_state{gen_ai_request_model=\"demo\",state=\"ready\"}", 1.0),
        ("tercet_model_state{gen_ai_request_model=\"demo\",state=\"failed\"}", 0.0),
        ("tercet_workers{gen_ai_request_model=\"demo\"}", 2.0),
        ("tercet_worker_outstanding{worker=\"w-1\"}", 4.0),
        ("tercet_worker_suspected{worker=\"w-1\"}", 1.0),
        ("tercet_suspicions_total", 1.0),
        ("tercet_queue_length{gen_ai_request_model=\"demo\"}", 6.0),
        ("tercet_queue_wait_seconds_sum{gen_ai_request_model=\"demo\"}", 0.3),
        ("tercet_queue_refusals_total{reason=\"hopeless\"}", 1.0),
        ("tercet_ejections_total{cause=\"slow\"}", 1.0),
        ("tercet_workers_kept", 2.0),
        ("tercet_lone_runs_total", 1.0),
        ("tercet_poison_total", 1.0),
        ("tercet_stream_moves_total{cause=\"draining\"}", 1.0),
        ("tercet_rejections_total{component=\"gateway\",reason=\"OVERLOADED\"}", 1.0),
        ("tercet_step_duration_seconds_bucket{le=\"0.0025\",gen_ai_request_model=\"demo\"}", 0.0),
        ("tercet_step_duration_seconds_bucket{le=\"0.005\",gen_ai_request_model=\"demo\"}", 2.0),
        ("tercet_step_rows_total{gen_ai_request_model=\"demo\",kind=\"prompt\"}", 12.0),
        ("tercet_step_rows_total{gen_ai_request_model=\"demo\",kind=\"decode\"}", 2.0),
        ("tercet_drafted_tokens_total{gen_ai_request_model=\"demo\"}", 9.0),
        ("tercet_accepted_tokens_total{gen_ai_request_model=\"demo\"}", 4.0),
        ("tercet_preemptions_total{gen_ai_request_model=\"demo\"}", 3.0),
        ("tercet_prefix_hit_tokens_total{gen_ai_request_model=\"demo\"}", 128.0),
        ("tercet_screened_tokens_total{gen_ai_request_model=\"demo\"}", 7.0),
        ("tercet_screened_rows_total{gen_ai_request_model=\"demo\"}", 90.0),
        ("tercet_screen_fallbacks_total{gen_ai_request_model=\"demo\"}", 1.0),
    ] {
        assert_eq!(value(&metrics, series), Some(expected), "{series} in {}", metrics.encode());
    }
    metrics.forget_model("demo");
    for gone in ["tercet_sequences{", "tercet_kv_pages{", "tercet_model_state{"] {
        assert!(!metrics.encode().contains(gone), "{gone} after the model");
    }
    metrics.forget_worker("w-1");
    for gone in ["tercet_worker_outstanding", "tercet_worker_suspected"] {
        assert_eq!(value(&metrics, &format!("{gone}{{worker=\"w-1\"}}")), None);
    }
}

#[tokio::test]
async fn model_labels_are_bounded() {
    let metrics = Metrics::new();
    for nth in 0..MAX_MODEL_LABELS + 10 {
        metrics.set_workers(&format!("model-{nth}"), nth);
    }
    let text = metrics.encode();
    let series = text.lines().filter(|line| line.starts_with("tercet_workers{")).count();
    assert_eq!(series, MAX_MODEL_LABELS + 1);
    assert!(text.contains("tercet_workers{gen_ai_request_model=\"other\"}"));
    assert!(text.contains("tercet_workers{gen_ai_request_model=\"model-0\"} 0"));
}

/// Reads the text as a scraper does: every sample belongs to a declared family, the values are
/// numbers, buckets ascend, and the text ends as it must.
#[tokio::test]
async fn the_text_is_openmetrics() {
    let metrics = Metrics::new();
    let mut request = metrics.request(Component::Worker, Operation::TextCompletion, "a\"b\\c\nd");
    request.completion(2);
    request.succeed();
    let text = metrics.encode();
    let mut families: Vec<(String, String)> = Vec::new();
    let mut bucket = (String::new(), 0.0);
    for line in text.lines() {
        if let Some(declared) = line.strip_prefix("# TYPE ") {
            let (name, kind) = declared.split_once(' ').unwrap();
            families.push((name.to_owned(), kind.to_owned()));
            continue;
        }
        if line.starts_with('#') {
            continue;
        }
        let (series, number) = line.rsplit_once(' ').unwrap();
        let number: f64 = number.parse().unwrap_or_else(|_| panic!("no number in {line}"));
        let name = series.split('{').next().unwrap();
        let (family, kind) = families.last().unwrap();
        let suffix = name.strip_prefix(family.as_str());
        let suffix = suffix.unwrap_or_else(|| panic!("{line} is not of family {family}"));
        let allowed: &[&str] = match kind.as_str() {
            "counter" => &["_total"],
            "gauge" => &[""],
            "info" => &["_info"],
            "histogram" => &["_bucket", "_sum", "_count"],
            _ => panic!("unexpected type {kind}"),
        };
        assert!(allowed.contains(&suffix), "{line} of {kind}");
        if suffix == "_bucket" {
            let (before, bound) = series.split_once("le=\"").unwrap();
            let key = format!("{before}{}", bound.split_once('"').unwrap().1);
            assert!(bucket.0 != key || bucket.1 <= number, "buckets descend at {line}");
            bucket = (key, number);
        }
    }
    assert!(text.ends_with("# EOF\n"));
    assert!(text.contains(r#"gen_ai_request_model="a\"b\\c\nd""#), "labels are escaped: {text}");
}
