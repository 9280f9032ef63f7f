//! Every way out of a response has exactly one record.

use std::time::Duration;

use hotloop::proto::{self as pb, connect_request::Command};

use super::program::{Place, Row, create, paced};

/// `end reason finish`, and whether the record says what the client was told.
fn how(row: &Row) -> String {
    let words = [&row.end, &row.reason, &row.finish].map(String::as_str);
    words.join(" ").trim().to_owned()
}

#[tokio::test]
async fn every_way_out_has_one_record() {
    let place = Place::new("price_book_version = \"2026-11\"\ncheckpoint_ms = 10");
    let mut program = place.start().await;
    let mut told: Vec<(String, pb::Done)> = Vec::new();
    let mut expected: Vec<&str> = Vec::new();
    let mut talk = program.talk().await;

    talk.create(create("words 20")).await;
    told.push(talk.done().await);
    expected.push("completed  stop");

    talk.create(pb::Create {
        max_output_tokens: Some(5),
        ..create("words 20")
    })
    .await;
    told.push(talk.done().await);
    expected.push("incomplete max_output_tokens length");

    talk.create(create("break")).await;
    told.push(talk.done().await);
    expected.push("failed backend_error");

    talk.create(create("hang")).await;
    let response_id = talk.delta().await;
    talk.send(Command::Cancel(pb::Cancel {
        response_id,
        ..pb::Cancel::default()
    }))
    .await;
    told.push(talk.done().await);
    expected.push("cancelled");

    // Nothing is sampled, and that is a record too.
    talk.create(pb::Create {
        generate: Some(false),
        ..create("words 20")
    })
    .await;
    told.push(talk.done().await);
    expected.push("completed");

    // A held response is one, whatever it samples.
    let tool = pb::FunctionTool {
        name: "step".to_owned(),
        parameters: r#"{"type":"object","properties":{"n":{"type":"integer"}}}"#.to_owned(),
        ..pb::FunctionTool::default()
    };
    talk.create(pb::Create {
        hold: true,
        tools: vec![pb::Tool {
            tool: Some(pb::tool::Tool::Function(tool)),
        }],
        ..create("call")
    })
    .await;
    let (response_id, held) = talk.done().await;
    let output = pb::FunctionCallOutput {
        call_id: held.call_ids[0].clone(),
        output: "ok".to_owned(),
    };
    talk.send(Command::Append(pb::Append {
        response_id,
        input: vec![pb::Item {
            item: Some(pb::item::Item::FunctionCallOutput(output)),
            ..pb::Item::default()
        }],
    }))
    .await;
    told.push(talk.done().await);
    expected.push("completed  stop");
    let (before, after) = (held.receipt.unwrap(), told[5].1.receipt.clone().unwrap());
    assert_eq!(before.record_id, after.record_id);
    assert_eq!(told[5].1.usage.unwrap().samples, 2);
    let (before, after) = (before.stream.unwrap(), after.stream.unwrap());
    assert_eq!((before.responses, after.responses), (6, 6));
    assert!(before.output_tokens < after.output_tokens);

    // What is refused, or cancelled before its turn, is no response.
    talk.create(pb::Create {
        model: Some("nobody".to_owned()),
        ..create("words 1")
    })
    .await;
    assert_eq!(talk.error().await.code, "model_not_found");

    // The client goes while it samples.
    let mut other = program.talk().await;
    other.create(paced("words 400")).await;
    let gone = other.delta().await;
    drop(other);
    expected.push("incomplete interrupted");
    let rows = place.settled(7).await;
    drop(talk);
    program.stop().await;

    assert_eq!(place.rows(), rows);
    assert_eq!(rows.iter().map(how).collect::<Vec<_>>(), expected);
    for (row, (id, done)) in rows.iter().zip(&told) {
        assert_eq!(row.response, *id);
        let usage = done.usage.unwrap();
        let counted = (row.input, row.output, row.samples);
        let said = [usage.input_tokens, usage.output_tokens, usage.samples].map(u64::from);
        assert_eq!(counted, said.into());
        assert_eq!(row.new + row.reused, row.input);
        let receipt = done.receipt.as_ref().unwrap();
        assert_eq!(receipt.record_id, row.id);
        let charged = receipt.response.unwrap();
        assert_eq!((charged.responses, charged.input_tokens), (1, row.input));
        assert_eq!(
            (charged.new_tokens, charged.output_tokens),
            (row.new, row.output)
        );
    }
    let whole = &rows[0];
    assert!(
        whole.output >= 20 && whole.delivered == whole.output,
        "{whole:?}"
    );
    assert_eq!((rows[4].output, rows[4].samples), (0, 0));
    assert!(rows[3].output > 0, "{:?}", rows[3]);
    let left = &rows[6];
    assert_eq!(left.response, gone);
    assert!(
        left.output < 400 && left.delivered <= left.output,
        "{left:?}"
    );

    // What the stream came to is the sum of its records.
    let last = told.last().unwrap().1.receipt.as_ref().unwrap();
    let total = last.stream.unwrap();
    let sum = |of: fn(&Row) -> u64| rows[..6].iter().map(of).sum::<u64>();
    assert_eq!(total.input_tokens, sum(|row| row.input));
    assert_eq!(total.new_tokens, sum(|row| row.new));
    assert_eq!(total.output_tokens, sum(|row| row.output));
}

#[tokio::test]
async fn a_server_that_is_told_to_stop_settles_what_runs() {
    let place = Place::new("");
    let mut program = place.start().await;
    let mut talk = program.talk().await;
    talk.create(paced("words 5000")).await;
    let running = talk.delta().await;
    let stopped = tokio::spawn(program.stop());
    let (id, done) = talk.done().await;
    drop(talk);
    stopped.await.unwrap();
    let rows = place.rows();
    assert_eq!(rows.len(), 1);
    assert_eq!((&rows[0].response, &id), (&running, &running));
    assert_eq!(how(&rows[0]), "incomplete interrupted");
    assert_eq!(rows[0].output, u64::from(done.usage.unwrap().output_tokens));
    assert!(rows[0].output > 0);
}

#[tokio::test]
async fn without_a_journal_there_is_a_receipt_all_the_same() {
    let place = Place::new("");
    let config = std::fs::read_to_string(place.path("hotloop.toml")).unwrap();
    let config = config.replace("path = \"journal\"", "");
    std::fs::write(place.path("hotloop.toml"), config).unwrap();
    let mut program = place.start().await;
    let mut talk = program.talk().await;
    for count in 1..3 {
        talk.create(create("words 2")).await;
        let receipt = talk.done().await.1.receipt.unwrap();
        assert!(receipt.record_id.starts_with("rec_"));
        assert_eq!(receipt.stream.unwrap().responses, count);
    }
    assert!(!place.path("journal").exists());
    tokio::time::timeout(Duration::from_secs(20), async {
        drop(talk);
        program.stop().await;
    })
    .await
    .unwrap();
}
