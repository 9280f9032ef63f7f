//! A sink that cannot be written for a whole run gets everything from the next one.

use std::{collections::BTreeSet, path::Path};

use super::program::{Place, create, until};

const EXPORT: &str = r#"
    [[billing.export]]
    name = "usage"
    kind = "jsonl"
    path = "absent/usage.jsonl"
    attempts_max = 2
    rest_ms_min = 10
"#;

/// The ids in this file, and how many lines it has.
pub(crate) fn exported(path: &Path) -> (BTreeSet<String>, usize) {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    let whole = text.lines().filter_map(|line| {
        let record: serde_json::Value = serde_json::from_str(line).ok()?;
        Some(record["id"].as_str()?.to_owned())
    });
    let ids: Vec<String> = whole.collect();
    (ids.iter().cloned().collect(), ids.len())
}

#[tokio::test]
async fn a_sink_that_is_down_for_the_whole_run_loses_nothing() {
    let place = Place::new(EXPORT);
    let sink = place.path("absent/usage.jsonl");
    // One run that is stopped and one that is killed.
    for run in 1..3 {
        let mut program = place.start().await;
        let mut talk = program.talk().await;
        for _ in 0..30 {
            talk.create(create("words 3")).await;
            talk.done().await;
        }
        place.settled(run * 30).await;
        drop(talk);
        match run {
            1 => program.stop().await,
            _ => program.kill(),
        }
        assert!(!sink.exists());
    }

    std::fs::create_dir(place.path("absent")).unwrap();
    let program = place.start().await;
    until(|| exported(&sink).0.len() == 60).await;
    program.stop().await;
    let ids: BTreeSet<String> = place.rows().into_iter().map(|row| row.id).collect();
    let (found, lines) = exported(&sink);
    assert_eq!(found, ids);
    println!(
        "a sink that was down for two runs: {} records, {lines} lines",
        ids.len()
    );

    // What it has does not come again.
    let program = place.start().await;
    program.stop().await;
    assert_eq!(exported(&sink).1, lines);
}
