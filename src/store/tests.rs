use super::{encoding::*, *};
use crate::{
    event::RerenderReason,
    item::{Body, CallId, Item, ItemStatus, NamedLogprob, Part, Role, Tool, ToolKind},
    ledger::{Boundary, Cut, Draft, Piece, Source, Span},
    request::{Effort, TextFormat, ToolChoice, Truncation},
};

/// A small record.
pub(super) fn record(tenant: &str, id: &str, parent: Option<&str>, root: &str) -> Record {
    Record {
        id: id.into(),
        tenant: tenant.into(),
        parent: parent.map(ResponseId::from),
        root: root.into(),
        model: "sim".into(),
        artifacts: [7; 32],
        settings: Settings::default(),
        reset: Vec::new(),
        date: jiff::civil::date(2026, 2, 28),
        affinity: root.into(),
        batches: Vec::new(),
        pending: Vec::new(),
        visible: Visible::default(),
        growth: Growth {
            kept: Boundary { byte: 0, token: 0 },
            pieces: Vec::new(),
        },
        prompt_tokens: 0,
        prompt_entries: 0,
        open_calls: Vec::new(),
        incomplete: None,
        finish: None,
        usage: Usage::default(),
        prompt: PromptReport::default(),
        created_at_ms: 0,
        metadata: BTreeMap::new(),
    }
}

/// A record in which everything that can be set is set, and every kind of item stands.
fn full() -> Record {
    let item = |id: &str, status, body| ValidItem {
        item: Arc::new(Item {
            id: id.into(),
            status,
            body,
        }),
        answers: None,
    };
    let message = |role, parts| Body::Message { role, parts };
    let logprob = NamedLogprob {
        token: 5,
        text: "né".to_owned(),
        logprob: -0.25,
        top: vec![(6, "x".to_owned(), -1.5)],
    };
    let call_id = || CallId::from("call_1");
    let input = vec![
        item(
            "1",
            ItemStatus::Completed,
            message(Role::System, vec![Part::InputText("s".into())]),
        ),
        item("2", ItemStatus::Completed, message(Role::Developer, vec![])),
        item(
            "3",
            ItemStatus::Completed,
            message(Role::User, vec![Part::InputText("日本".into())]),
        ),
        item(
            "4",
            ItemStatus::Completed,
            Body::Compaction {
                summary: "sum".into(),
            },
        ),
        ValidItem {
            answers: Some("tool".into()),
            ..item(
                "5",
                ItemStatus::Completed,
                Body::FunctionCallOutput {
                    call_id: call_id(),
                    output: "out".into(),
                },
            )
        },
        item(
            "6",
            ItemStatus::Completed,
            Body::CustomToolCallOutput {
                call_id: call_id(),
                output: "out".into(),
            },
        ),
    ];
    let output = vec![
        item(
            "7",
            ItemStatus::Completed,
            Body::Reasoning {
                content: "hm".into(),
            },
        ),
        item(
            "8",
            ItemStatus::Incomplete,
            message(
                Role::Assistant,
                vec![
                    Part::OutputText {
                        text: "né".into(),
                        logprobs: [logprob].into(),
                    },
                    Part::Refusal("no".into()),
                ],
            ),
        ),
        item(
            "9",
            ItemStatus::InProgress,
            Body::FunctionCall {
                call_id: call_id(),
                name: "tool".into(),
                arguments: "{ }".into(),
            },
        ),
        item(
            "10",
            ItemStatus::Completed,
            Body::CustomToolCall {
                call_id: call_id(),
                name: "free".into(),
                input: "i".into(),
                arguments: r#"{"input":"i"}"#.into(),
            },
        ),
    ];
    let tools = [
        Tool {
            name: "tool".into(),
            description: Some("does".into()),
            kind: ToolKind::Function {
                parameters: "{}".into(),
                strict: true,
            },
        },
        Tool {
            name: "free".into(),
            description: None,
            kind: ToolKind::Custom,
        },
    ];
    Record {
        settings: Settings {
            model: Some("sim".into()),
            instructions: Some("be".into()),
            tools: Some(tools.into()),
            tool_choice: Some(ToolChoice::Allowed {
                required: true,
                names: vec!["tool".into()],
            }),
            parallel_tool_calls: Some(false),
            text: Some(TextFormat::JsonSchema {
                name: "n".into(),
                schema: "{}".into(),
                strict: true,
            }),
            reasoning_effort: Some(Effort::High),
            max_output_tokens: Some(300),
            temperature: Some(0.5),
            top_p: Some(0.25),
            top_k: Some(40),
            seed: Some(1 << 40),
            stop: Some(["END".into()].into()),
            presence_penalty: Some(-1.0),
            frequency_penalty: Some(2.0),
            logit_bias: Some([(300, -100.0)].into()),
            top_logprobs: Some(2),
            store: Some(true),
            truncation: Some(Truncation::Auto),
            prompt_cache_key: Some("key".into()),
            safety_identifier: Some("who".into()),
            service_tier: Some("auto".into()),
        },
        reset: vec!["seed".to_owned()],
        batches: vec![
            Batch {
                sampled: false,
                items: input.clone(),
            },
            Batch {
                sampled: true,
                items: output,
            },
        ],
        pending: input[..1].to_vec(),
        visible: Visible {
            from: 300,
            pinned: Some(2),
            hidden_items: 4,
        },
        growth: Growth {
            kept: Boundary {
                byte: 1000,
                token: 300,
            },
            pieces: vec![Piece {
                sampled: true,
                draft: Draft {
                    text: "<|im_end|>né".to_owned(),
                    ids: vec![151_645, 2, 70_000],
                    cuts: vec![Cut {
                        byte: 1000,
                        token: 300,
                        len: 10,
                    }],
                    untrusted: vec![1010],
                    spans: vec![
                        Span {
                            tokens: 300..301,
                            source: Source::Sampled("7".into()),
                        },
                        Span {
                            tokens: 301..302,
                            source: Source::Input("5".into()),
                        },
                        Span {
                            tokens: 302..303,
                            source: Source::Instructions,
                        },
                        Span {
                            tokens: 303..303,
                            source: Source::Template,
                        },
                    ],
                },
            }],
        },
        prompt_tokens: 299,
        prompt_entries: 3,
        open_calls: vec![OpenCall {
            call_id: call_id(),
            name: "tool".into(),
            custom: true,
        }],
        incomplete: Some(IncompleteReason::Interrupted),
        finish: Some(Finish::ContentFilter),
        usage: Usage {
            input_tokens: 1,
            cached_tokens: 2,
            output_tokens: 3,
            reasoning_tokens: 4,
            samples: 5,
        },
        prompt: PromptReport {
            tokens: 1,
            reused_tokens: 2,
            encoded_tokens: 3,
            dropped_tokens: 4,
            sampled_tokens: 5,
            extends_previous: true,
            rerender: Some(RerenderReason::Truncation),
            truncated_items: 6,
            fingerprint: [9; 16],
            head_tokens_cached: 7,
        },
        created_at_ms: 1_700_000_000_000,
        metadata: BTreeMap::from([("k".to_owned(), "v".to_owned())]),
        ..record("acme", "resp_2", Some("resp_1"), "resp_0")
    }
}

#[test]
fn a_record_is_read_as_it_was_written() {
    let bytes = encode(&full()).unwrap();
    assert_eq!(decode(&bytes), Ok(full()));
    let ids: Vec<String> = full().output_ids().map(ToString::to_string).collect();
    assert_eq!(ids, ["7", "8", "9", "10"]);
}

/// What is stored is made of types that are there for other reasons. Where one of them changes, so
/// does this: then `VERSION` has to be raised, since records of the old shape are in people's files.
#[test]
fn the_format_of_version_1_is_what_it_was() {
    assert_eq!(VERSION, 1);
    let bytes = encode(&full()).unwrap();
    let checksum: [u8; 8] = bytes[2..10].try_into().unwrap();
    assert_eq!(
        (bytes.len(), u64::from_le_bytes(checksum)),
        (534, 6_502_614_294_400_369_570)
    );

    let efforts = [
        Effort::None,
        Effort::Minimal,
        Effort::Low,
        Effort::Medium,
        Effort::High,
    ];
    assert_eq!(postcard::to_stdvec(&efforts).unwrap(), [0, 1, 2, 3, 4]);
    let choices = (
        ToolChoice::Auto,
        ToolChoice::None,
        ToolChoice::Required,
        ToolChoice::Function("f".into()),
        ToolChoice::Custom("c".into()),
    );
    let bytes = postcard::to_stdvec(&choices).unwrap();
    assert_eq!(bytes, [0, 1, 2, 3, 1, b'f', 4, 1, b'c']);
    let rest = (
        (TextFormat::Plain, TextFormat::JsonObject),
        (Truncation::Disabled, Truncation::Auto),
        (Finish::Stop, Finish::ToolCalls, Finish::Length),
        (
            IncompleteReason::MaxOutputTokens,
            IncompleteReason::ContentFilter,
        ),
        (
            RerenderReason::Template,
            RerenderReason::Settings,
            RerenderReason::Model,
        ),
    );
    let bytes = postcard::to_stdvec(&rest).unwrap();
    assert_eq!(bytes, [0, 1, 0, 1, 0, 1, 2, 0, 1, 0, 1, 2]);
}

#[test]
fn another_version_is_refused_as_such() {
    let mut bytes = encode(&full()).unwrap();
    bytes[..2].copy_from_slice(&0_u16.to_le_bytes());
    assert_eq!(decode(&bytes), Err(Unreadable::Version { found: 0 }));
    assert_eq!(
        StoreError::from(Unreadable::Version { found: 0 }).to_string(),
        "a record cannot be read: it is of version 0, and this program reads 1"
    );
}

#[test]
fn a_record_with_any_wrong_bit_is_refused() {
    let bytes = encode(&full()).unwrap();
    for at in 0..bytes.len() {
        let mut damaged = bytes.clone();
        damaged[at] ^= 1 << (at % 8);
        assert!(decode(&damaged).is_err(), "byte {at}");
        assert!(decode(&bytes[..at]).is_err(), "{at} bytes");
    }
    assert_eq!(decode(&[bytes, vec![0]].concat()), Err(Unreadable::Damaged));
}
