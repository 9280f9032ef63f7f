//! What a step costs, and what happens where the past does not simply go on: truncation,
//! compaction, a prompt that is too long, another model.

use std::sync::Arc;

use hotloop::{
    backend::SampleEnd,
    event::{Code, Done, RerenderReason, Status},
    item::{Body, Item, Role},
    ledger::Source,
    model::Model,
    parse::{Answer, FormattedPiece},
    request::{NewItem, Settings, Truncation},
    response::{End, Next, Open},
    session::Committed,
};

use crate::{
    reference::{Batches, Names, full_text, lossy, messages},
    rollout::tools,
    support::{
        client::{Ask, Client, answer, done, message, output, text_of},
        families::{Family, family, fresh},
        scripted::Scripted,
    },
};

/// A client with one model, and the items of its conversation.
struct Talk<'a> {
    family: &'a Family,
    client: Client,
    model: Arc<Model>,
    backend: Arc<Scripted>,
}

impl<'a> Talk<'a> {
    fn new(family: &'a Family, context_length: u32) -> Self {
        let (model, backend) = family.model(context_length);
        Self {
            family,
            client: Client::default(),
            model,
            backend,
        }
    }

    /// One response from its create to its commit; the model says these.
    fn step(&self, parent: Option<&Arc<Committed>>, ask: Ask, says: &[Answer]) -> Arc<Committed> {
        let mut open = self.client.create(&self.model, parent, ask).unwrap();
        for says in says {
            let next = self.sample(&mut open, says);
            if let Next::Finish(end) = next {
                return open.commit(end.into(), &self.client.held);
            }
        }
        open.commit(End::Completed.into(), &self.client.held)
    }

    fn sample(&self, open: &mut Open, says: &Answer) -> Next {
        let tokenizer = &self.family.artifacts.tokenizer;
        let is_added = |content: &str| tokenizer.token_id(content).is_some();
        let mut ids = Vec::new();
        for piece in self.family.artifacts.family.format(says, &is_added) {
            match piece {
                FormattedPiece::Special(content) => ids.extend(tokenizer.token_id(&content)),
                FormattedPiece::Text(text) => ids.extend(self.family.spell(&text)),
            }
        }
        ids.push(self.family.end(!says.calls.is_empty()));
        self.backend.queue(&ids, &[3], SampleEnd::Stop);
        let mut events = Vec::new();
        for chunk in answer(open) {
            if let Some(end) = open.chunk(chunk, &mut events).unwrap() {
                return open.end_round(end, &mut events);
            }
        }
        panic!("the sample has not ended")
    }

    fn encoded(&self) -> u64 {
        self.family.artifacts.tokenizer.encoded_tokens()
    }
}

fn user(text: &str) -> NewItem {
    NewItem::Item(message(Role::User, text))
}

fn says(text: &str) -> Answer {
    Answer {
        text: text.to_owned(),
        ..Answer::default()
    }
}

fn calls(count: usize) -> Answer {
    let call = ("get_weather".to_owned(), r#"{"city": "Paris"}"#.to_owned());
    Answer {
        calls: vec![call; count],
        ..Answer::default()
    }
}

fn outputs(response: &Committed, text: &str) -> Vec<NewItem> {
    let calls = response.open_calls.iter();
    calls
        .map(|call| NewItem::Item(output(call.call_id.as_str(), text)))
        .collect()
}

/// Text of about so many tokens.
fn words(tokens: usize) -> String {
    "The agent reads the file and calls a tool. ".repeat(tokens.div_ceil(10))
}

fn with_tools() -> Settings {
    Settings {
        tools: Some(tools(1)),
        instructions: Some("Be brief.".into()),
        ..Settings::default()
    }
}

/// What a step encodes with so much history: as reported, and as counted; chained, then held.
fn cost(history: usize) -> [(u32, u64); 2] {
    let family = fresh("chatml_tools");
    let talk = Talk::new(&family, 1_000_000);
    let ask = Ask {
        input: vec![user(&words(history))],
        settings: with_tools(),
        ..Ask::default()
    };
    let start = talk.step(None, ask, &[calls(1)]);
    assert!(start.rope.len_tokens() > history);

    let ask = || Ask {
        input: outputs(&start, &words(400)),
        ..Ask::default()
    };
    let before = talk.encoded();
    let open = talk
        .client
        .create(&talk.model, Some(&start), ask())
        .unwrap();
    let counted = talk.encoded() - before;
    let report = done(&open).prompt;
    assert!(report.extends_previous && report.dropped_tokens == 0);
    let chained = (report.encoded_tokens, counted);
    // What is new stands behind the sample, and nothing else was encoded.
    let new = open.prompt().tokens.tokens_from(start.rope.len_tokens());
    assert_eq!(report.encoded_tokens as usize, new.len());
    assert_eq!(report.reused_tokens as usize, start.rope.len_tokens());

    // The same, but the outputs come one by one to a response that is held.
    let mut open = talk
        .client
        .create(
            &talk.model,
            Some(&start),
            Ask {
                hold: true,
                ..ask()
            },
        )
        .unwrap();
    assert_eq!(talk.sample(&mut open, &calls(8)), Next::Await);
    let ids: Vec<_> = open
        .open_calls()
        .iter()
        .map(|call| call.call_id.clone())
        .collect();
    let before = talk.encoded();
    for id in ids {
        let item = NewItem::Item(output(id.as_str(), &words(400)));
        open.append(vec![item], &talk.client.held).unwrap();
        assert!(open.prompt_ahead().is_some());
    }
    open.prepare(true).unwrap();
    let counted = talk.encoded() - before;
    let report = done(&open).prompt;
    assert!(report.extends_previous);
    // Each output is encoded when it comes, with the few tokens of the template around it.
    assert!(
        counted < u64::from(report.encoded_tokens) + 8 * 20,
        "{counted} for {report:?}"
    );
    [chained, (report.encoded_tokens, counted)]
}

#[test]
fn a_step_encodes_what_is_new_whatever_the_history() {
    let short = cost(1_000);
    assert!((350..500).contains(&short[0].0), "{short:?}");
    assert_eq!(u64::from(short[0].0), short[0].1);
    assert_eq!(short, cost(100_000));
}

#[test]
fn a_second_stream_encodes_none_of_the_head() {
    let family = fresh("chatml_tools");
    let mut talk = Talk::new(&family, 1_000_000);
    let settings = Settings {
        tools: Some(tools(15)),
        instructions: Some(words(2_000).into()),
        ..Settings::default()
    };
    let ask = || Ask {
        input: vec![user("Hello there.")],
        settings: settings.clone(),
        ..Ask::default()
    };
    let first = done(&talk.client.create(&talk.model, None, ask()).unwrap()).prompt;
    assert_eq!(first.head_tokens_cached, 0);
    assert!(first.encoded_tokens >= first.tokens);

    talk.client = talk.client.another();
    let before = talk.encoded();
    let open = talk.client.create(&talk.model, None, ask()).unwrap();
    let counted = talk.encoded() - before;
    let second = done(&open).prompt;
    assert_eq!(second.fingerprint, first.fingerprint);
    assert!(second.head_tokens_cached > 2_000 && second.extends_previous);
    assert_eq!(u64::from(second.encoded_tokens), counted);
    // The message, and the one token before which the head is cut.
    assert_eq!(
        second.encoded_tokens,
        second.tokens - second.head_tokens_cached + 1
    );

    // Another tenant's settings, or other ones, find nothing.
    let other = Ask {
        settings: Settings {
            tools: Some(tools(1)),
            ..settings.clone()
        },
        ..ask()
    };
    let other = done(&talk.client.create(&talk.model, None, other).unwrap()).prompt;
    assert_eq!(other.head_tokens_cached, 0);
}

/// Which messages the template was given for the last prompt, by what is seen of the conversation.
fn seen(family: &Family, response: &Committed) -> String {
    let nodes: Vec<&Committed> = response.chain().collect();
    let batches: Batches = nodes
        .iter()
        .rev()
        .flat_map(|node| &node.batches)
        .map(|batch| batch.iter().map(|new| new.item.clone()).collect())
        .collect();
    let calls = batches.iter().flatten().filter_map(|item| item.call());
    let names = Names {
        developer: "developer",
        calls: calls
            .map(|(id, name)| (id.to_string(), name.to_string()))
            .collect(),
    };
    let guard = family.artifacts.tokenizer.guard();
    let mark = |text: &str| guard.mark(text).into_owned();
    let all = messages(&batches, &names, &mark);
    let visible = response.view.as_ref().unwrap().visible;
    let pinned = visible.pinned.map(|at| all[at].clone());
    let seen = pinned
        .into_iter()
        .chain(all[visible.from..response.prompt_entries].iter().cloned())
        .collect();
    let text = full_text(
        family,
        &response.settings,
        seen,
        response.usage.samples > 0,
        &mark,
    );
    guard.unmark(text.unwrap()).0
}

fn prompt_text(response: &Committed) -> String {
    let text = text_of(&response.rope);
    let slices = response.rope.slices();
    let sampled = slices
        .last()
        .filter(|last| last.first_token >= response.prompt_tokens);
    text[..sampled.map_or(text.len(), |last| last.first_byte)].to_owned()
}

#[test]
fn truncation_keeps_calls_with_their_outputs_and_does_not_come_back_at_once() {
    let family = family("chatml_tools");
    let talk = Talk::new(family, 2_000);
    let mut parent: Option<Arc<Committed>> = None;
    let mut truncations = Vec::new();
    let mut hidden = 0;
    for step in 0..60 {
        // Small exchanges first, so that their number says little about their size.
        let size = if step % 7 == 0 { 150 } else { 5 };
        let settings = if step == 0 {
            Settings {
                truncation: Some(Truncation::Auto),
                ..with_tools()
            }
        } else {
            Settings::default()
        };
        let asked = format!("Question {step}. {}", words(size));
        let ask = Ask {
            input: vec![user(&asked)],
            settings,
            ..Ask::default()
        };
        let called = talk.step(parent.as_ref(), ask, &[calls(1 + step % 2)]);
        let ask = Ask {
            input: outputs(&called, &format!("Output {step}. {}", words(size))),
            ..Ask::default()
        };
        let answered = talk.step(Some(&called), ask, &[says(&format!("Answer {step}."))]);
        for response in [&called, &answered] {
            let report = response.prompt;
            assert!(report.tokens < 2_000);
            let text = prompt_text(response);
            assert_eq!(text, seen(family, response));
            assert_eq!(
                text.matches("{\"city\": \"Paris\"}").count(),
                text.matches("<tool_response>").count()
            );
            let items: usize = response
                .chain()
                .flat_map(|node| &node.batches)
                .map(Vec::len)
                .sum();
            assert!((report.truncated_items as usize) < items);
            if report.truncated_items != hidden {
                assert!(report.truncated_items > hidden);
                assert_eq!(report.rerender, Some(RerenderReason::Truncation));
                hidden = report.truncated_items;
                truncations.push((step, report.tokens));
            } else {
                assert!(report.extends_previous, "{report:?}");
            }
        }
        parent = Some(answered);
    }
    assert!(truncations.len() > 2, "{truncations:?}");
    for (step, tokens) in &truncations {
        assert!(
            (1_000..=1_750).contains(tokens),
            "after the one of step {step} there are {tokens}"
        );
    }
    let steps: Vec<_> = truncations.iter().map(|(step, _)| step).collect();
    assert!(
        steps.windows(2).all(|pair| pair[1] - pair[0] > 1),
        "{truncations:?}"
    );
}

#[test]
fn a_prompt_that_is_too_long_says_by_how_much_and_leaves_the_parent_usable() {
    let talk = Talk::new(family("chatml_tools"), 500);
    let ask = Ask {
        input: vec![user("Hello.")],
        ..Ask::default()
    };
    let parent = talk.step(None, ask, &[says("Hi.")]);
    let before = (parent.rope.tokens_from(0), text_of(&parent.rope));

    // The same create with room for it tells how long it is.
    let (roomy, _) = talk.family.model(100_000);
    let ask = |tokens| Ask {
        input: vec![user(&words(tokens))],
        ..Ask::default()
    };
    let open = talk.client.create(&roomy, Some(&parent), ask(600)).unwrap();
    let tokens = done(&open).prompt.tokens;
    drop(open);
    let error = talk
        .client
        .create(&talk.model, Some(&parent), ask(600))
        .err()
        .unwrap();
    assert_eq!(error.code, Code::ContextLengthExceeded);
    let surplus = tokens - 500 + 1;
    assert!(
        error
            .message
            .contains(&format!("{tokens} tokens, {surplus} more")),
        "{error}"
    );
    // Nothing can go: truncation helps as little.
    let auto = Settings {
        truncation: Some(Truncation::Auto),
        ..Settings::default()
    };
    let error = talk.client.create(
        &talk.model,
        Some(&parent),
        Ask {
            settings: auto,
            ..ask(600)
        },
    );
    assert_eq!(error.err().unwrap().code, Code::ContextLengthExceeded);

    assert_eq!((parent.rope.tokens_from(0), text_of(&parent.rope)), before);
    let next = talk.step(Some(&parent), ask(20), &[says("Well.")]);
    assert!(next.prompt.extends_previous);
}

fn compaction(summary: &str) -> NewItem {
    NewItem::Item(Item::new(Body::Compaction {
        summary: summary.into(),
    }))
}

#[test]
fn a_compaction_stands_in_place_of_everything_before_it_also_under_another_model() {
    let talk = Talk::new(family("chatml_tools"), 100_000);
    let ask = |input| Ask {
        input,
        ..Ask::default()
    };
    let first = talk.step(
        None,
        Ask {
            settings: with_tools(),
            ..ask(vec![user("The secret is 42.")])
        },
        &[calls(1)],
    );
    let second = talk.step(
        Some(&first),
        ask(outputs(&first, "Sunny.")),
        &[says("It is sunny.")],
    );
    let third = talk.step(
        Some(&second),
        ask(vec![
            user("Too early."),
            compaction("They talked."),
            user("Go on."),
        ]),
        &[says("Gladly.")],
    );
    let text = prompt_text(&third);
    assert_eq!(text, seen(talk.family, &third));
    assert!(text.contains("They talked.") && text.contains("Go on."));
    assert!(!text.contains("secret") && !text.contains("Sunny") && !text.contains("early"));
    assert_eq!(third.prompt.rerender, Some(RerenderReason::Truncation));
    // The question, the call, its output, the answer, and what came too early.
    assert_eq!(third.prompt.truncated_items, 5);
    // The head is still the same.
    assert!(third.prompt.reused_tokens > 100);

    let fourth = talk.step(Some(&third), ask(vec![user("And?")]), &[says("Done.")]);
    assert!(fourth.prompt.extends_previous);
    assert_eq!(fourth.prompt.truncated_items, 5);

    let llama = Talk {
        client: talk.client,
        ..Talk::new(family("llama3"), 100_000)
    };
    let fifth = llama.step(Some(&fourth), ask(vec![user("Still?")]), &[says("Yes.")]);
    let text = prompt_text(&fifth);
    assert_eq!(text, seen(llama.family, &fifth));
    assert!(text.contains("They talked.") && !text.contains("secret"));
    assert_eq!(fifth.prompt.truncated_items, 5);
}

#[test]
fn another_model_renders_everything_anew_and_says_so() {
    let talk = Talk::new(family("chatml_tools"), 100_000);
    let ask = |input| Ask {
        input,
        ..Ask::default()
    };
    let first = talk.step(
        None,
        Ask {
            settings: with_tools(),
            ..ask(vec![user("Hello.")])
        },
        &[calls(1)],
    );
    let second = talk.step(
        Some(&first),
        ask(outputs(&first, "Sunny <|eot_id|>.")),
        &[says("It is sunny.")],
    );
    let before = second.rope.tokens_from(0);

    let llama = Talk {
        client: talk.client,
        ..Talk::new(family("llama3"), 100_000)
    };
    let third = llama.step(Some(&second), ask(vec![user("And now?")]), &[says("Rain.")]);
    assert_eq!(prompt_text(&third), seen(llama.family, &third));
    let report = third.prompt;
    assert_eq!(report.rerender, Some(RerenderReason::Model));
    assert_eq!((report.reused_tokens, report.extends_previous), (0, false));
    assert_eq!(report.dropped_tokens as usize, before.len());
    // All of it, and once more the token before which the head is cut.
    assert_eq!(report.encoded_tokens, report.tokens + 1);
    assert_eq!((report.sampled_tokens, report.head_tokens_cached), (0, 0));
    // One `<|eot_id|>` a message, and none for the text that spells it.
    let end = llama.family.end(false);
    let prompt = third.rope.tokens_from(0);
    assert_eq!(prompt.iter().filter(|id| **id == end).count(), 7);

    let fourth = llama.step(Some(&third), ask(vec![user("And then?")]), &[says("Snow.")]);
    assert!(fourth.prompt.extends_previous);
    assert_eq!(second.rope.tokens_from(0), before);
    let status: Vec<&Status> = fourth.chain().map(|node| &node.status).collect();
    assert_eq!(status, [&Status::Completed; 4]);
}

#[test]
fn a_held_response_counts_what_each_of_its_samples_used() {
    let talk = Talk::new(family("chatml_tools"), 100_000);
    let ask = Ask {
        input: vec![user("Hello.")],
        settings: with_tools(),
        hold: true,
        ..Ask::default()
    };
    let mut open = talk.client.create(&talk.model, None, ask).unwrap();
    let mut used = (0, 0);
    for _ in 0..3 {
        let Done { prompt, .. } = done(&open);
        used.0 += prompt.tokens;
        assert_eq!(talk.sample(&mut open, &calls(1)), Next::Await);
        used.1 += open.prompt().tokens.len_tokens() as u32 - prompt.tokens;
        let id = open.open_calls()[0].call_id.clone();
        let item = NewItem::Item(output(id.as_str(), "Sunny."));
        open.append(vec![item], &talk.client.held).unwrap();
        assert_eq!(open.next(), Next::Sample);
        open.prepare(true).unwrap();
    }
    let usage = open.usage();
    assert_eq!(
        (usage.input_tokens, usage.output_tokens, usage.samples),
        (used.0, used.1, 3)
    );
}

#[test]
fn every_token_of_a_prompt_is_told_where_it_came_from() {
    let talk = Talk::new(family("chatml_tools"), 100_000);
    let first = talk.step(
        None,
        Ask {
            input: vec![user(" a ")],
            settings: with_tools(),
            ..Ask::default()
        },
        &[calls(1)],
    );
    let ask = Ask {
        input: outputs(&first, "a"),
        ..Ask::default()
    };
    let second = talk.step(Some(&first), ask, &[says("a")]);
    let ids = second.rope.tokens_from(0);
    let told: Vec<(&str, String)> = hotloop::prompt::spans(&second, second.view.as_ref().unwrap())
        .into_iter()
        .map(|span| {
            let source = match span.source {
                Source::Template => "template",
                Source::Instructions => "instructions",
                Source::Input(_) => "input",
                Source::Sampled(_) => "sampled",
            };
            (source, lossy(talk.family, &ids[span.tokens]))
        })
        .collect();
    let (head, rest) = told.split_at(3);
    assert_eq!(head[0].1, "<|im_start|>system\n");
    // A token that spans the edge of a text belongs to it.
    assert_eq!(head[1], ("instructions", "Be brief.\n".to_owned()));
    assert!(head[2].1.starts_with("\n# Tools") && head[2].1.ends_with("user\n"));
    let call = r#"<tool_call>
{"name": "get_weather", "arguments": {"city": "Paris"}}
</tool_call><|im_end|>"#;
    let wanted = [
        ("input", " a "),
        ("template", "<|im_end|>\n<|im_start|>assistant\n"),
        ("sampled", call),
        ("template", "\n<|im_start|>user\n<tool_response>\n"),
        ("input", "a"),
        (
            "template",
            "\n</tool_response><|im_end|>\n<|im_start|>assistant\n",
        ),
        ("sampled", "a<|im_end|>"),
    ];
    assert_eq!(rest, wanted.map(|(source, text)| (source, text.to_owned())));
}
