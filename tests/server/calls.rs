//! The calls beside the stream, and what every call meets: keys, sizes, health, reflection.

use hotloop::proto::{
    self, CreateRequest, Item, OutputText, Reasoning, ResponseStatus, SpanSource,
    connect_response::Event, item,
};
use tokio::time::timeout;
use tonic::{Code, Request, Status};
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};
use tonic_types::StatusExt as _;

use crate::{
    client::{Client, MESSAGE_BYTES_MAX, Round, after, held_rollout, hold, on, say, text_of, user},
    program::{NEVER, Program, Serve},
};

async fn start() -> (Program, Client) {
    let program = Serve::new().start().await;
    let client = Client::of(&program).await;
    (program, client)
}

fn reason(status: &Status) -> String {
    let info = status
        .get_details_error_info()
        .expect("a status has details");
    assert_eq!(info.domain, "hotloop");
    info.reason
}

impl Client {
    async fn get_prompt(
        &self,
        request: proto::GetPromptRequest,
    ) -> Result<proto::GetPromptResponse, Status> {
        let got = self.responses().get_prompt(self.ask(request)).await?;
        Ok(got.into_inner())
    }

    async fn input_items(&self, id: &str, page_size: u32) -> Vec<Vec<Item>> {
        let mut pages = Vec::new();
        let mut page_token = String::new();
        loop {
            let request = self.ask(proto::ListInputItemsRequest {
                response_id: id.to_owned(),
                page_size,
                page_token,
            });
            let page = self
                .responses()
                .list_input_items(request)
                .await
                .unwrap()
                .into_inner();
            pages.push(page.items);
            page_token = page.next_page_token;
            if page_token.is_empty() {
                return pages;
            }
        }
    }
}

#[tokio::test]
async fn a_prompt_can_be_looked_at_token_by_token() {
    let (_program, client) = start().await;
    let mut talk = client.stream().await;
    let create = proto::Create {
        instructions: Some("Answer in as few steps as you can.".into()),
        ..hold("rollout 20")
    };
    talk.create(create).await;
    let mut round = talk.round().await;
    while !round.calls.is_empty() {
        talk.append(&round.response_id, round.outputs()).await;
        round = talk.round().await;
    }
    let whole = proto::GetPromptRequest {
        response_id: round.response_id.clone(),
        include_sampled: true,
        ..Default::default()
    };
    let prompt = client.get_prompt(whole.clone()).await.unwrap();
    let report = round.done.prompt.clone().unwrap();
    assert_eq!(prompt.fingerprint, report.fingerprint);
    assert_eq!(prompt.total_tokens as usize, prompt.token_ids.len());

    // Without what was sampled last it is as long as the report says, and another prompt.
    let unanswered = proto::GetPromptRequest {
        include_sampled: false,
        ..whole.clone()
    };
    let unanswered = client.get_prompt(unanswered).await.unwrap();
    assert_eq!(unanswered.total_tokens, report.tokens);
    assert!(prompt.token_ids.starts_with(&unanswered.token_ids));
    assert!(unanswered.fingerprint != prompt.fingerprint);

    // The spans cover it without gaps.
    let mut at = 0;
    for span in &prompt.spans {
        assert_eq!(span.first_token, at);
        assert!(span.end_token > at, "{span:?}");
        at = span.end_token;
    }
    assert_eq!(at, prompt.total_tokens);

    // Every item that was sent has one, with its own text; so has every item that was sampled.
    let texts_of = |source: SpanSource, id: &str| {
        let spans = prompt.spans.iter();
        spans
            .filter(|span| span.source() == source && span.item_id == id)
            .map(|span| (span.first_token, span.end_token - span.first_token))
            .collect::<Vec<_>>()
    };
    let page = |first_token, max_tokens| {
        client.get_prompt(proto::GetPromptRequest {
            first_token,
            max_tokens,
            ..whole.clone()
        })
    };
    let [instructions] = texts_of(SpanSource::Instructions, "")[..] else {
        panic!("the instructions have one span: {:?}", prompt.spans);
    };
    let text = page(instructions.0, instructions.1).await.unwrap().text;
    assert!(
        text.contains("Answer in as few steps as you can."),
        "{text}"
    );
    let input = client.input_items(&round.response_id, 1000).await.concat();
    assert_eq!(input.len(), 21);
    for item in &input {
        let [span] = texts_of(SpanSource::InputItem, &item.id)[..] else {
            panic!("{item:?} has one span: {:?}", prompt.spans);
        };
        let shown = page(span.0, span.1).await.unwrap();
        let text = match &item.item {
            Some(item::Item::Message(message)) => text_of(message),
            Some(item::Item::FunctionCallOutput(output)) => output.output.clone(),
            other => panic!("{other:?} was not sent"),
        };
        assert!(
            shown.text.contains(&text),
            "{text:?} is not in {:?}",
            shown.text
        );
    }
    for id in &round.done.output_item_ids {
        assert_eq!(texts_of(SpanSource::Sampled, id).len(), 1, "{id}");
    }

    // In pages it is the same, and so are the spans.
    let mut ids = Vec::new();
    let mut text = String::new();
    while (ids.len() as u32) < prompt.total_tokens {
        let first = ids.len() as u32;
        let page = page(first, 97).await.unwrap();
        assert_eq!(
            (page.total_tokens, &page.fingerprint),
            (prompt.total_tokens, &prompt.fingerprint)
        );
        assert_eq!(page.spans.first().unwrap().first_token, first);
        assert_eq!(
            page.spans.last().unwrap().end_token,
            first + page.token_ids.len() as u32
        );
        ids.extend(page.token_ids);
        text += &page.text;
    }
    assert_eq!((ids, text), (prompt.token_ids.clone(), prompt.text.clone()));
    let past = page(prompt.total_tokens, 0).await.unwrap();
    assert!(
        past.token_ids.is_empty() && past.spans.is_empty(),
        "{past:?}"
    );
    let status = page(prompt.total_tokens + 1, 0).await.unwrap_err();
    assert_eq!(
        (status.code(), &*reason(&status)),
        (Code::OutOfRange, "INVALID_FIELD")
    );
    let violations = status.get_details_bad_request().unwrap().field_violations;
    assert_eq!(violations[0].field, "first_token");
    talk.close().await;
}

#[tokio::test]
async fn a_response_can_be_got_listed_and_forgotten() {
    let (_program, client) = start().await;
    let mut talk = client.stream().await;
    let create = proto::Create {
        metadata: [("ticket".to_owned(), "42".to_owned())].into(),
        input: (0..5).map(|n| user(&format!("echo {n}"))).collect(),
        ..say("")
    };
    let first = talk.answer(create).await;
    let second = talk
        .answer(after(&first.response_id, vec![user("echo last")]))
        .await;

    let got = client.get_response(&first.response_id).await.unwrap();
    assert_eq!(got.status(), ResponseStatus::Completed);
    assert_eq!((&*got.model, &*got.metadata["ticket"]), ("fast", "42"));
    assert_eq!(
        (got.usage, got.prompt),
        (first.done.usage, first.done.prompt.clone())
    );
    let ids: Vec<&String> = got.output.iter().map(|item| &item.id).collect();
    assert_eq!(ids, first.done.output_item_ids.iter().collect::<Vec<_>>());
    let got = client.get_response(&second.response_id).await.unwrap();
    assert_eq!(got.previous_response_id, first.response_id);

    let pages = client.input_items(&second.response_id, 4).await;
    assert_eq!(pages.iter().map(Vec::len).collect::<Vec<_>>(), [4, 2]);
    assert_eq!(
        pages.concat(),
        client.input_items(&second.response_id, 0).await.concat()
    );
    let texts: Vec<String> = pages
        .concat()
        .iter()
        .map(|item| match &item.item {
            Some(item::Item::Message(message)) => text_of(message),
            other => panic!("{other:?} was not sent"),
        })
        .collect();
    assert_eq!(
        texts,
        [
            "echo 0",
            "echo 1",
            "echo 2",
            "echo 3",
            "echo 4",
            "echo last"
        ]
    );
    let request = client.ask(proto::ListInputItemsRequest {
        response_id: second.response_id.clone(),
        page_token: "of another server".into(),
        ..Default::default()
    });
    let status = client
        .responses()
        .list_input_items(request)
        .await
        .unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);

    let delete = || {
        client.ask(proto::DeleteResponseRequest {
            response_id: first.response_id.clone(),
        })
    };
    client.responses().delete_response(delete()).await.unwrap();
    let status = client
        .responses()
        .delete_response(delete())
        .await
        .unwrap_err();
    assert_eq!(
        (status.code(), &*reason(&status)),
        (Code::NotFound, "RESPONSE_NOT_FOUND")
    );
    let status = client.get_response(&first.response_id).await.unwrap_err();
    assert_eq!(status.code(), Code::NotFound);
    let sent = talk
        .create(after(&first.response_id, vec![user("echo x")]))
        .await;
    assert_eq!(
        talk.refusal(&sent).await.code,
        "previous_response_not_found"
    );
    // What was continued from it stays as it is.
    let third = talk
        .answer(after(&second.response_id, vec![user("echo on")]))
        .await;
    assert!(third.done.prompt.unwrap().extends_previous);
    talk.close().await;
}

#[tokio::test]
async fn models_can_be_listed() {
    let (_program, client) = start().await;
    let request = client.ask(proto::ListModelsRequest {});
    let models = client
        .models()
        .list_models(request)
        .await
        .unwrap()
        .into_inner()
        .models;
    let names: Vec<(&str, bool)> = models.iter().map(|it| (&*it.name, it.is_default)).collect();
    assert_eq!(names, [("fast", true), ("paced", false)]);
    for model in &models {
        assert_eq!((&*model.backend, &*model.family), ("sim", "hermes"));
        assert!(model.healthy && model.appends_tool_outputs && model.context_length > 0);
        let request = client.ask(proto::GetModelRequest {
            name: model.name.clone(),
        });
        let got = client
            .models()
            .get_model(request)
            .await
            .unwrap()
            .into_inner()
            .model;
        assert_eq!(got.as_ref(), Some(model));
    }
    for name in ["nobody", ""] {
        let request = client.ask(proto::GetModelRequest { name: name.into() });
        let status = client.models().get_model(request).await.unwrap_err();
        assert_eq!(
            (status.code(), &*reason(&status)),
            (Code::NotFound, "MODEL_NOT_FOUND")
        );
    }
}

#[tokio::test]
async fn one_response_needs_no_stream() {
    let (program, client) = start().await;
    let request = |create| {
        client.ask(CreateRequest {
            request_id: "one".into(),
            create,
        })
    };
    // The same events as on a stream.
    let mut talk = client.stream().await;
    let streamed = talk.answer(say("think twice")).await;
    let mut events = client
        .responses()
        .create(request(Some(say("think twice"))))
        .await
        .unwrap()
        .into_inner();
    let mut messages = Vec::new();
    while let Some(message) = timeout(NEVER, events.message()).await.unwrap().unwrap() {
        assert_eq!((&*message.request_id, &*message.lane), ("one", ""));
        assert_eq!(message.sequence_number, messages.len() as u64 + 1);
        messages.push(message);
    }
    let created = Round::of(messages);
    assert_eq!(kinds(&created), kinds(&streamed));
    assert_eq!(created.text, streamed.text);
    let tokens = |round: &Round| round.done.prompt.clone().unwrap().tokens;
    assert_eq!(tokens(&created), tokens(&streamed));
    // It can be continued, from a stream and without one.
    assert_eq!(
        talk.answer(after(&created.response_id, vec![user("echo on")]))
            .await
            .text,
        "on"
    );
    talk.close().await;

    for (create, param) in [
        (
            Some(proto::Create {
                hold: true,
                ..say("echo x")
            }),
            "create.hold",
        ),
        (None, "create"),
        (Some(proto::Create::default()), "create.input"),
    ] {
        let mut events = client
            .responses()
            .create(request(create))
            .await
            .unwrap()
            .into_inner();
        let refused = events.message().await.unwrap().unwrap();
        let Some(Event::Error(error)) = refused.event else {
            panic!("not refused: {refused:?}");
        };
        assert_eq!((&*error.code, &*error.param), ("invalid_request", param));
        assert_eq!(events.message().await.unwrap(), None);
    }

    // The call's cancellation cancels the response.
    let create = request(Some(on("paced", say("slow 5000"))));
    let mut events = client
        .responses()
        .create(create)
        .await
        .unwrap()
        .into_inner();
    let created = events.message().await.unwrap().unwrap();
    events.message().await.unwrap().unwrap();
    drop(events);
    program
        .says(&[&created.response_id, "usage", "incomplete"])
        .await;
}

/// The kinds of its events, however the deltas were cut.
fn kinds(round: &Round) -> Vec<std::mem::Discriminant<Event>> {
    let events = round.messages.iter().filter_map(|it| it.event.as_ref());
    let mut kinds: Vec<_> = events.map(std::mem::discriminant).collect();
    kinds.dedup();
    kinds
}

#[tokio::test]
async fn without_a_key_nobody_gets_in() {
    let program = Serve::new().keys("ada:0123456789abcdef").start().await;
    let nobody = Client::of(&program).await;
    for (client, expected) in [
        (nobody.clone(), "API_KEY_MISSING"),
        (nobody.with_key("0123456789abcdeF"), "API_KEY_INVALID"),
    ] {
        let connect = client.try_stream().await.err().unwrap();
        let get = client.get_response("resp_x").await.unwrap_err();
        let request = client.ask(proto::ListModelsRequest {});
        let models = client.models().list_models(request).await.unwrap_err();
        for status in [connect, get, models] {
            assert_eq!(
                (status.code(), &*reason(&status)),
                (Code::Unauthenticated, expected)
            );
        }
    }
    // A load balancer has no key.
    let check = HealthClient::new(nobody.channel.clone())
        .check(HealthCheckRequest::default())
        .await
        .unwrap()
        .into_inner();
    assert_eq!(check.status(), ServingStatus::Serving);
    let mut talk = nobody.with_key("0123456789abcdef").stream().await;
    assert_eq!(talk.answer(say("echo in")).await.text, "in");
    talk.close().await;
    let log = program.log();
    assert!(!log.contains("0123456789abcde"), "{log}");
}

/// An answer of long ago, with log probabilities as a client may send them back: they take room
/// in the message and none in the prompt.
fn ballast(bytes: usize) -> Vec<Item> {
    let token = proto::TokenLogprob {
        token: "x".repeat(1 << 20),
        ..Default::default()
    };
    let text = OutputText {
        text: "Yes.".into(),
        logprobs: vec![token; bytes >> 20],
    };
    let message = proto::Message {
        role: proto::Role::Assistant.into(),
        content: vec![proto::ContentPart {
            part: Some(proto::content_part::Part::OutputText(text)),
        }],
    };
    vec![
        user("Are you there?"),
        Item {
            item: Some(item::Item::Message(message)),
            ..Item::default()
        },
        user("echo heavy"),
    ]
}

#[tokio::test]
async fn a_large_message_is_taken_and_one_too_large_ends_the_stream() {
    let (program, client) = start().await;
    let create = |bytes: usize| proto::Create {
        input: ballast(bytes),
        ..say("")
    };
    let mut talk = client.stream().await;
    assert_eq!(talk.answer(create(20 << 20)).await.text, "heavy");

    // A prompt that no model could read is refused for that, not for its size on the wire.
    let reasoning = Item {
        item: Some(item::Item::Reasoning(Reasoning {
            content: " ".repeat(17 << 20),
        })),
        ..Item::default()
    };
    let sent = talk
        .create(proto::Create {
            input: vec![reasoning, user("echo x")],
            ..say("")
        })
        .await;
    let refusal = talk.refusal(&sent).await;
    assert_eq!(
        (&*refusal.code, &*refusal.param),
        ("invalid_request", "create.input[0]")
    );

    let held = {
        talk.create_on("held", hold("rollout 2")).await;
        talk.round_on("held").await
    };
    talk.create(create(MESSAGE_BYTES_MAX)).await;
    let (_, ended) = talk.rest().await;
    let status = ended.unwrap_err();
    assert_eq!(status.code(), Code::ResourceExhausted, "{status:?}");
    assert_eq!(reason(&status), "MESSAGE_TOO_LARGE");
    // The stream is over, and what it held is not.
    program
        .says(&[&held.response_id, "usage", "incomplete"])
        .await;
    let mut talk = client.stream().await;
    let next = talk.answer(after(&held.response_id, held.outputs())).await;
    assert_eq!(next.calls.len(), 1);
    talk.close().await;

    let request = client.ask(CreateRequest {
        create: Some(create(MESSAGE_BYTES_MAX)),
        ..Default::default()
    });
    let status = client.responses().create(request).await.unwrap_err();
    assert_eq!(status.code(), Code::ResourceExhausted, "{status:?}");
    assert_eq!(reason(&status), "MESSAGE_TOO_LARGE");
}

#[tokio::test]
async fn reflection_knows_our_services() {
    let (_program, client) = start().await;
    let expected = [
        "grpc.health.v1.Health",
        "hotloop.v1.ModelsService",
        "hotloop.v1.ResponsesService",
    ];
    macro_rules! services {
        ($version:ident) => {{
            use tonic_reflection::pb::$version::{
                ServerReflectionRequest, server_reflection_client::ServerReflectionClient,
                server_reflection_request::MessageRequest,
                server_reflection_response::MessageResponse,
            };
            let request = ServerReflectionRequest {
                message_request: Some(MessageRequest::ListServices(String::new())),
                ..Default::default()
            };
            let mut answers = ServerReflectionClient::new(client.channel.clone())
                .server_reflection_info(Request::new(tokio_stream::iter([request])))
                .await
                .unwrap()
                .into_inner();
            let answer = answers.message().await.unwrap().unwrap();
            match answer.message_response {
                Some(MessageResponse::ListServicesResponse(list)) => list
                    .service
                    .into_iter()
                    .map(|it| it.name)
                    .collect::<Vec<_>>(),
                other => panic!("no list: {other:?}"),
            }
        }};
    }
    for services in [services!(v1), services!(v1alpha)] {
        for service in expected {
            assert!(
                services.iter().any(|it| it == service),
                "{service} is not in {services:?}"
            );
        }
    }
}

#[tokio::test]
async fn a_held_rollout_can_be_followed_from_outside() {
    let (_program, client) = start().await;
    let mut talk = client.stream().await;
    let rounds: Vec<Round> = held_rollout(&mut talk, 3).await;
    let got = client.get_response(&rounds[0].response_id).await.unwrap();
    assert_eq!(got.output.len(), 4);
    assert_eq!(got.usage, rounds[3].done.usage);
    let Some(Event::Done(done)) = rounds[3].messages.last().unwrap().event.clone() else {
        unreachable!()
    };
    assert_eq!(got.prompt, done.prompt);
    talk.close().await;
}
