use proptest::prelude::*;
use proptest::sample::Index;
use serde::de::IgnoredAny;

use super::*;

/// The tokens that end a turn in these tests, besides markers.
const END_TOKENS: [&str; 2] = ["<|im_end|>", "</s>"];

/// Ordinary added tokens, which mean nothing to any family.
const OTHER_TOKENS: [&str; 2] = ["<|im_start|>", "<0x0A>"];

/// Which markers are added tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Added {
    All,
    None,
}

impl Added {
    const BOTH: [Self; 2] = [Self::All, Self::None];

    fn asks(self, text: &str) -> bool {
        self == Self::All && Markers::added(&|_| true).find(text).is_some()
    }
}

fn options(added: Added) -> ParserOptions {
    ParserOptions {
        reasoning: true,
        in_reasoning: false,
        tools: Arc::new(["f", "get_weather", "ü\"x"].map(str::to_owned).into()),
        markers_added: Markers::added(&|text| added.asks(text)),
        end_tokens: Arc::new(END_TOKENS.map(str::to_owned).into()),
    }
}

/// What a tokenizer would make of `output`: added tokens as special pieces.
fn pieces(output: &str, added: Added) -> Vec<FormattedPiece> {
    let mut pieces = Vec::new();
    let mut text = String::new();
    let mut rest = output;
    let tokens: Vec<&str> = END_TOKENS
        .into_iter()
        .chain(OTHER_TOKENS)
        .chain(
            Markers::added(&|text| added.asks(text))
                .iter()
                .map(Marker::text),
        )
        .collect();
    while let Some(next) = rest.chars().next() {
        if let Some(token) = tokens.iter().find(|token| rest.starts_with(**token)) {
            if !text.is_empty() {
                pieces.push(FormattedPiece::Text(std::mem::take(&mut text)));
            }
            pieces.push(FormattedPiece::Special((*token).to_owned()));
            rest = &rest[token.len()..];
        } else {
            text.push(next);
            rest = &rest[next.len_utf8()..];
        }
    }
    if !text.is_empty() {
        pieces.push(FormattedPiece::Text(text));
    }
    pieces
}

/// Parses with every text cut into pieces of as many characters as `cuts` says in turn; whole if it says nothing.
fn parse(
    family: Family,
    options: ParserOptions,
    pieces: &[FormattedPiece],
    cuts: &[usize],
) -> Vec<Parsed> {
    let mut parser = family.parser(options);
    let mut cuts = cuts.iter().cycle();
    let mut out = Vec::new();
    for piece in pieces {
        match piece {
            FormattedPiece::Special(token) => parser.push(Piece::Special(token), &mut out),
            FormattedPiece::Text(text) => {
                let mut rest = text.as_str();
                while !rest.is_empty() {
                    let length = cuts.next().map_or(rest.len(), |count| {
                        rest.char_indices()
                            .nth(*count)
                            .map_or(rest.len(), |(at, _)| at)
                    });
                    parser.push(Piece::Text(&rest[..length]), &mut out);
                    rest = &rest[length..];
                }
            }
        }
    }
    parser.finish(&mut out);
    let length = out.len();
    parser.finish(&mut out);
    assert_eq!(
        out.len(),
        length,
        "a second finish has nothing left to hand out"
    );
    out
}

/// The events, adjacent deltas joined, each whole call as one line. Asserts what `Parsed` promises of their order.
fn transcript(events: &[Parsed]) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    let mut call: Option<(String, String)> = None;
    let mut last = None;
    for event in events {
        let kind = std::mem::discriminant(event);
        let joins = last.replace(kind) == Some(kind);
        match event {
            Parsed::Reasoning(text) | Parsed::Text(text) => {
                assert!(call.is_none() && !text.is_empty(), "{events:?}");
                let label = if matches!(event, Parsed::Text(_)) {
                    "text"
                } else {
                    "reasoning"
                };
                match lines.last_mut() {
                    Some(line) if joins => line.push_str(text),
                    _ => lines.push(format!("{label}: {text}")),
                }
            }
            Parsed::CallBegin { name } => {
                assert!(call.is_none(), "{events:?}");
                call = Some((name.clone(), String::new()));
            }
            Parsed::CallArguments(delta) => {
                assert!(!delta.is_empty(), "{events:?}");
                call.as_mut().unwrap().1.push_str(delta);
            }
            Parsed::CallEnd { arguments } => {
                let (name, sent) = call.take().unwrap();
                assert_eq!(&sent, arguments);
                assert!(arguments.starts_with('{'), "{arguments}");
                assert!(
                    serde_json::from_str::<IgnoredAny>(arguments).is_ok(),
                    "{arguments}"
                );
                lines.push(format!("call {name}: {arguments}"));
            }
            Parsed::CallBroken { raw } => {
                let (name, sent) = call.take().unwrap();
                assert!(raw.contains(&sent), "{events:?}");
                lines.push(format!("broken {name} {sent}: {raw}"));
            }
        }
    }
    assert!(call.is_none(), "{events:?}");
    lines
}

/// Parses the output with all markers as added tokens and with none, whole and character by character.
#[track_caller]
fn reads(family: Family, output: &str, expected: &[&str]) {
    reads_with(family, options, output, expected);
}

#[track_caller]
fn reads_with(
    family: Family,
    options: impl Fn(Added) -> ParserOptions,
    output: &str,
    expected: &[&str],
) {
    for added in Added::BOTH {
        for cuts in [&[][..], &[1]] {
            let events = parse(family, options(added), &pieces(output, added), cuts);
            assert_eq!(transcript(&events), expected, "{added:?}, cuts {cuts:?}");
        }
    }
}

mod hermes {
    use super::*;

    #[test]
    fn reasoning_text_and_parallel_calls() {
        reads(
            Family::Hermes,
            "<think>\nLet me see.\n\nYes.\n</think>\n\nTwo calls:\n<tool_call>\n{\"name\": \"f\", \"arguments\": \
             {\"s\": \"}</tool_call>\\\"{\", \"n\": [1, {}]}}\n</tool_call>\n<tool_call>\n{\"name\": \
             \"get_weather\", \"arguments\": {}}\n</tool_call><|im_end|>",
            &[
                "reasoning: Let me see.\n\nYes.",
                "text: Two calls:",
                "call f: {\"s\": \"}</tool_call>\\\"{\", \"n\": [1, {}]}",
                "call get_weather: {}",
            ],
        );
    }

    #[test]
    fn arguments_may_come_before_the_name() {
        reads(
            Family::Hermes,
            "<tool_call>{\"id\": 7, \"arguments\": {\"name\": \"x\"} , \"name\": \"f\", \"extra\": [\"name\"]}</tool_call>",
            &["call f: {\"name\": \"x\"}"],
        );
    }

    #[test]
    fn a_name_is_decoded_and_arguments_are_not() {
        reads(
            Family::Hermes,
            r#"<tool_call>{"name": "\u00fc\"x", "arguments": {"\u00fc" :  1.0e0}}</tool_call>"#,
            &[r#"call ü"x: {"\u00fc" :  1.0e0}"#],
        );
    }

    #[test]
    fn a_call_of_no_tool_is_text() {
        reads(
            Family::Hermes,
            "So:\n<tool_call>\n{\"name\": \"g\", \"arguments\": {}}\n</tool_call>",
            &["text: So:\n<tool_call>\n{\"name\": \"g\", \"arguments\": {}}\n</tool_call>"],
        );
        reads_with(
            Family::Hermes,
            |added| ParserOptions {
                tools: Arc::default(),
                ..options(added)
            },
            "So:\n<tool_call>\n{\"name\": \"f\", \"arguments\": {}}\n</tool_call>\n",
            &["text: So:\n<tool_call>\n{\"name\": \"f\", \"arguments\": {}}\n</tool_call>\n"],
        );
    }

    #[test]
    fn a_call_breaks_at_the_byte_that_can_be_in_none() {
        reads(
            Family::Hermes,
            "a\n\n<tool_call>\n{\"name\": \"f\", \"arguments\": {\"k\": 'v'}}\n</tool_call>",
            &[
                "text: a\n",
                "broken f {\"k\": : \n<tool_call>\n{\"name\": \"f\", \"arguments\": {\"k\": ",
                "text: 'v'}}\n</tool_call>",
            ],
        );
    }

    #[test]
    fn arguments_must_be_an_object() {
        for arguments in ["\"{}\"", "[]", "null", "1"] {
            let head = "<tool_call>{\"name\": \"f\", \"arguments\": ";
            let broken = format!("broken f : {head}");
            let text = format!("text: {arguments}}}</tool_call>");
            reads(
                Family::Hermes,
                &format!("{head}{arguments}}}</tool_call>"),
                &[&broken, &text],
            );
        }
        reads(
            Family::Hermes,
            "<tool_call>{\"name\": \"f\"}</tool_call>",
            &[
                "broken f : <tool_call>{\"name\": \"f\"",
                "text: }</tool_call>",
            ],
        );
    }

    #[test]
    fn a_name_or_arguments_written_twice_break_a_call() {
        for (head, sent, rest) in [
            (r#"{"name": "f", "name""#, "", r#": "f", "arguments": {}}"#),
            (
                r#"{"name": "f", "arguments": {}, "parameters""#,
                "{}",
                ": {}}",
            ),
        ] {
            // The quote that ends the second name is where that is clear.
            let raw = &head[..head.len() - 1];
            reads(
                Family::Hermes,
                &format!("<tool_call>{head}{rest}"),
                &[
                    &format!("broken f {sent}: <tool_call>{raw}"),
                    &format!("text: \"{rest}"),
                ],
            );
        }
    }

    #[test]
    fn markers_in_a_string_are_content() {
        let arguments = r#"{"a": "<tool_call></tool_call><think><|im_end|>"}"#;
        reads(
            Family::Hermes,
            &format!("<tool_call>{{\"name\": \"f\", \"arguments\": {arguments}}}"),
            &[&format!("call f: {arguments}")],
        );
    }

    #[test]
    fn a_new_call_begins_where_one_was_left_unfinished() {
        reads(
            Family::Hermes,
            "<tool_call>\n{\"name\": \"f\", \"arguments\": \n<tool_call>{\"na\n<tool_call>{\"name\": \"f\", \"arguments\": {}}",
            &[
                "broken f : <tool_call>\n{\"name\": \"f\", \"arguments\": \n",
                "text: <tool_call>{\"na",
                "call f: {}",
            ],
        );
    }

    #[test]
    fn a_truncated_call_is_broken_or_text() {
        reads(
            Family::Hermes,
            "<tool_call>\n{\"name\": \"f\", \"arguments\": {\"k\": \"<|im_end|>",
            &["broken f {\"k\": \": <tool_call>\n{\"name\": \"f\", \"arguments\": {\"k\": \""],
        );
        reads(
            Family::Hermes,
            "ok\n<tool_call>\n{\"na",
            &["text: ok\n<tool_call>\n{\"na"],
        );
    }

    #[test]
    fn a_call_is_handed_out_before_its_closing_marker() {
        let mut parser = Family::Hermes.parser(options(Added::All));
        let mut out = Vec::new();
        let mut after = |piece| {
            out.clear();
            parser.push(piece, &mut out);
            out.clone()
        };
        assert_eq!(after(Piece::Special("<tool_call>")), []);
        assert_eq!(after(Piece::Text("\n{\"name\": \"f")), []);
        assert_eq!(
            after(Piece::Text("\", \"argum")),
            [Parsed::CallBegin {
                name: "f".to_owned()
            }]
        );
        assert_eq!(
            after(Piece::Text("ents\": {\"a\"")),
            [Parsed::CallArguments("{\"a\"".to_owned())]
        );
        assert_eq!(
            after(Piece::Text(": 1}")),
            [Parsed::CallArguments(": 1}".to_owned())]
        );
        assert_eq!(
            after(Piece::Text("}")),
            [Parsed::CallEnd {
                arguments: "{\"a\": 1}".to_owned()
            }]
        );
        assert_eq!(after(Piece::Text("\n")), []);
        assert_eq!(after(Piece::Special("</tool_call>")), []);
    }

    #[test]
    fn text_that_spells_an_added_token_is_text() {
        let quoted = [
            FormattedPiece::Text("<think>no</think><tool_call>{\"name\": \"f\", ".to_owned()),
            FormattedPiece::Text("\"arguments\": {}}</tool_call>".to_owned()),
        ];
        for cuts in [&[][..], &[1]] {
            assert_eq!(
                transcript(&parse(Family::Hermes, options(Added::All), &quoted, cuts)),
                [
                    "text: <think>no</think><tool_call>{\"name\": \"f\", \"arguments\": {}}</tool_call>"
                ]
            );
        }
    }

    #[test]
    fn only_the_newlines_of_the_format_are_taken_away() {
        reads(
            Family::Hermes,
            "<think>\n\n</think>\n\n\nHi\n",
            &["text: \nHi\n"],
        );
        reads(
            Family::Hermes,
            "<think>a</think>b",
            &["reasoning: a", "text: b"],
        );
        reads(
            Family::Hermes,
            " \n<think>\n\n a\n\n</think>\n",
            &["reasoning: \n a\n"],
        );
        reads(Family::Hermes, "\n\n", &["text: \n\n"]);
        reads(
            Family::Hermes,
            "<tool_call>{\"name\":\"f\",\"arguments\":{}}\n</tool_call>\n \n",
            &["call f: {}"],
        );
        reads(
            Family::Hermes,
            "<tool_call>{\"name\":\"f\",\"arguments\":{}}\n</tool_call>\n Bye",
            &["call f: {}", "text: \n Bye"],
        );
    }

    #[test]
    fn reasoning_is_looked_for_only_where_it_may_be() {
        reads(Family::Hermes, "a<think>b", &["text: a<think>b"]);
        reads(
            Family::Hermes,
            "<think><tool_call><think>",
            &["reasoning: <tool_call><think>"],
        );
        reads_with(
            Family::Hermes,
            |added| ParserOptions {
                reasoning: false,
                ..options(added)
            },
            "<think>a</think>b",
            &["text: <think>a</think>b"],
        );
        reads_with(
            Family::Hermes,
            |added| ParserOptions {
                in_reasoning: true,
                ..options(added)
            },
            "\na\n</think>\n\n\n<tool_call>{\"name\":\"f\",\"arguments\":{}}",
            &["reasoning: \na", "call f: {}"],
        );
        reads_with(
            Family::Hermes,
            |added| ParserOptions {
                in_reasoning: true,
                ..options(added)
            },
            "cut short\n",
            &["reasoning: cut short\n"],
        );
    }

    #[test]
    fn an_end_token_is_dropped_at_the_end_only() {
        reads(Family::Hermes, "Hi<|im_end|>", &["text: Hi"]);
        reads(Family::Hermes, "Hi<|im_end|></s>", &["text: Hi<|im_end|>"]);
        reads(
            Family::Hermes,
            "Hi<|im_end|>\n<|im_start|>",
            &["text: Hi<|im_end|>\n<|im_start|>"],
        );
    }

    #[test]
    fn what_is_held_back_is_bounded() {
        let space = " ".repeat(GAP_BYTES_MAX + 1);
        reads(
            Family::Hermes,
            &format!("{space}<think>a"),
            &[&format!("text: {space}<think>a")],
        );
        let long = "x".repeat(call::NAME_BYTES_MAX + 1);
        reads_with(
            Family::Hermes,
            |added| ParserOptions {
                tools: Arc::new([long.clone()].into()),
                ..options(added)
            },
            &format!("<tool_call>{{\"name\": \"{long}\", \"arguments\": {{}}}}"),
            &[&format!(
                "text: <tool_call>{{\"name\": \"{long}\", \"arguments\": {{}}}}"
            )],
        );
        let id = "7".repeat(call::HEADER_BYTES_MAX);
        reads(
            Family::Hermes,
            &format!("<tool_call>{{\"id\": {id}, \"name\": \"f\", \"arguments\": {{}}}}"),
            &[&format!(
                "text: <tool_call>{{\"id\": {id}, \"name\": \"f\", \"arguments\": {{}}}}"
            )],
        );
    }

    #[test]
    fn long_arguments_before_the_name_are_held_back_up_to_the_limit() {
        let output = |bytes: usize| {
            let text = "x".repeat(bytes);
            format!("<tool_call>{{\"arguments\":{{\"a\":\"{text}\"}},\"name\":\"f\"}}")
        };
        let lines = |bytes| {
            transcript(&parse(
                Family::Hermes,
                options(Added::All),
                &pieces(&output(bytes), Added::All),
                &[],
            ))
        };
        assert!(lines(call::ARGUMENTS_HELD_BYTES_MAX - 16)[0].starts_with("call f: "));
        assert!(lines(call::ARGUMENTS_HELD_BYTES_MAX)[0].starts_with("text: <tool_call>"));
    }
}

mod llama3 {
    use super::*;

    #[test]
    fn calls_where_the_answer_begins_with_one() {
        reads(
            Family::Llama3,
            r#"{"name": "f", "parameters": {"a": "}"}}</s>"#,
            &[r#"call f: {"a": "}"}"#],
        );
        reads(
            Family::Llama3,
            "\n<|python_tag|>{\"type\": \"function\", \"name\": \"f\", \"parameters\": {}}; \
             {\"name\": \"f\", \"arguments\": {\"b\":2}}\n<|python_tag|>{\"name\": \"f\", \"parameters\": {}}\n;\n",
            &["call f: {}", "call f: {\"b\":2}", "call f: {}"],
        );
        reads(
            Family::Llama3,
            "<think>\nhm\n</think>\n\n{\"name\": \"f\", \"parameters\": {}} done; {\"name\": \"f\", \"parameters\": {}}",
            &[
                "reasoning: hm",
                "call f: {}",
                "text:  done; {\"name\": \"f\", \"parameters\": {}}",
            ],
        );
    }

    #[test]
    fn no_calls_in_the_text() {
        for text in [
            "See {\"name\": \"f\", \"parameters\": {}}",
            "\n {\"answer\": {\"name\": \"f\"}}",
            "{\"name\": \"Bob\", \"age\": 7}",
            "{}",
            "<|python_tag|>print(1)",
            "a<|python_tag|>{\"name\": \"f\", \"parameters\": {}}",
        ] {
            reads(Family::Llama3, text, &[&format!("text: {text}")]);
        }
        reads(
            Family::Llama3,
            "{\"name\": \"f\", \"parameters\": {}};; {\"name\": \"f\", \"parameters\": {}}",
            &[
                "call f: {}",
                "text: ;; {\"name\": \"f\", \"parameters\": {}}",
            ],
        );
    }

    #[test]
    fn json_that_is_no_call_is_not_held_back_past_its_first_key() {
        let mut parser = Family::Llama3.parser(options(Added::All));
        let mut out = Vec::new();
        parser.push(Piece::Text("{\"title\": \"A"), &mut out);
        assert_eq!(out, [Parsed::Text("{\"title\": \"A".to_owned())]);
    }
}

mod mistral {
    use super::*;

    #[test]
    fn an_array_of_calls() {
        reads(
            Family::Mistral,
            "Two: [TOOL_CALLS] [{\"name\": \"f\", \"arguments\": {\"a\": \"]\"}, \"id\": \"abcdefghi\"}, \
             {\"arguments\": {}, \"name\": \"get_weather\"}\n] </s>",
            &[
                "text: Two: ",
                "call f: {\"a\": \"]\"}",
                "call get_weather: {}",
            ],
        );
    }

    #[test]
    fn calls_by_name() {
        reads(
            Family::Mistral,
            "[THINK]a\n[/THINK]\n[TOOL_CALLS]f[ARGS]{\"a\": [1]}[TOOL_CALLS]get_weather[CALL_ID]abcdefghi[ARGS] {}</s>",
            &[
                "reasoning: a\n",
                "text: \n",
                "call f: {\"a\": [1]}",
                "call get_weather: {}",
            ],
        );
    }

    #[test]
    fn what_is_no_call_is_text() {
        for text in [
            "[TOOL_CALLS][]",
            "[TOOL_CALLS]g[ARGS]{}",
            "[TOOL_CALLS]f",
            "[TOOL_CALLS]f[CALL_ID]x",
            "[TOOL_CALLS]",
            "[TOOL_CALLS][ARGS]{}",
            "[ARGS]{}[/THINK]",
            "[TOOL_CALLS][{\"name\": \"g\"}]",
        ] {
            reads(Family::Mistral, text, &[&format!("text: {text}")]);
        }
        reads(
            Family::Mistral,
            "[TOOL_CALLS][{\"name\": \"f\", \"arguments\": {}}, {\"name\": \"g\"}]",
            &["call f: {}", "text: , {\"name\": \"g\"}]"],
        );
        reads(
            Family::Mistral,
            "[TOOL_CALLS][{\"name\": \"f\", \"arguments\": {}} and",
            &["call f: {}", "text:  and"],
        );
        reads(
            Family::Mistral,
            "[TOOL_CALLS]f[ARGS]x",
            &["broken f : [TOOL_CALLS]f[ARGS]", "text: x"],
        );
    }

    #[test]
    fn a_new_call_begins_where_one_was_left_unfinished() {
        reads(
            Family::Mistral,
            "[TOOL_CALLS]f[TOOL_CALLS]f[ARGS]{}",
            &["text: [TOOL_CALLS]f", "call f: {}"],
        );
        reads(
            Family::Mistral,
            "[TOOL_CALLS][{\"name\": \"f\", \"arguments\": {}}[TOOL_CALLS]f[ARGS]{}",
            &["call f: {}", "call f: {}"],
        );
        let unfinished = [
            FormattedPiece::Special("[TOOL_CALLS]".to_owned()),
            FormattedPiece::Text("f".to_owned()),
            FormattedPiece::Special("[ARGS]".to_owned()),
            FormattedPiece::Text("{\"a\": ".to_owned()),
            FormattedPiece::Special("[TOOL_CALLS]".to_owned()),
            FormattedPiece::Text("f".to_owned()),
            FormattedPiece::Special("[ARGS]".to_owned()),
            FormattedPiece::Text("{}".to_owned()),
        ];
        assert_eq!(
            transcript(&parse(
                Family::Mistral,
                options(Added::All),
                &unfinished,
                &[1]
            )),
            [
                "broken f {\"a\": : [TOOL_CALLS]f[ARGS]{\"a\": ",
                "call f: {}"
            ]
        );
    }

    #[test]
    fn a_marker_is_never_taken_for_the_bracket_it_begins_with() {
        assert_eq!(
            transcript(&parse(
                Family::Mistral,
                options(Added::All),
                &pieces("[TOOL_CALLS]f[ARGS]{\"a\": [ARGS]", Added::All),
                &[1]
            )),
            [
                "broken f {\"a\": : [TOOL_CALLS]f[ARGS]{\"a\": ",
                "text: [ARGS]"
            ]
        );
    }
}

mod harmony {
    use super::*;

    #[test]
    fn reasoning_preamble_and_calls() {
        reads(
            Family::Harmony,
            "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary<|message|>Looking.<|end|>\
             <|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json<|message|>{\"a\": \"}\"}<|call|>\
             <|start|>assistant to=functions.get_weather<|channel|>commentary json<|message|> {}\n<|call|>",
            &[
                "reasoning: Hm.",
                "text: Looking.",
                "call f: {\"a\": \"}\"}",
                "call get_weather: {}",
            ],
        );
        reads(
            Family::Harmony,
            " to=functions.f<|channel|>analysis code<|message|>{}<|call|>",
            &["call f: {}"],
        );
    }

    #[test]
    fn messages_of_one_kind_are_paragraphs() {
        reads(
            Family::Harmony,
            "<|channel|>commentary<|message|>A.<|end|>\n<|start|>assistant<|channel|>final<|message|>B.<|return|>",
            &["text: A.\n\nB."],
        );
        reads(
            Family::Harmony,
            "<|channel|>final<|message|>A.<|end|><|start|>assistant to=functions.f<|message|>{}<|call|>\
             <|channel|>final<|message|>B.",
            &["text: A.", "call f: {}", "text: B."],
        );
        reads(
            Family::Harmony,
            "<|channel|>analysis<|message|>A.<|end|><|channel|>analysis<|message|><|end|><|message|>",
            &["reasoning: A.", "text: <|message|>"],
        );
    }

    #[test]
    fn the_reasoning_may_be_open_and_cut_short() {
        reads_with(
            Family::Harmony,
            |added| ParserOptions {
                in_reasoning: true,
                ..options(added)
            },
            "Hm.<|end|><|start|>assistant<|channel|>final<|message|>Yes.",
            &["reasoning: Hm.", "text: Yes."],
        );
    }

    #[test]
    fn what_has_no_headers_is_text() {
        for text in ["Hello", " \n total", "to", " to=functions.f"] {
            reads(Family::Harmony, text, &[&format!("text: {text}")]);
        }
        let mut parser = Family::Harmony.parser(options(Added::All));
        let mut out = Vec::new();
        parser.push(Piece::Text("Hello"), &mut out);
        assert_eq!(out, [Parsed::Text("Hello".to_owned())]);
    }

    #[test]
    fn other_recipients_roles_and_channels_are_text() {
        for head in [
            "<|channel|>commentary to=functions.g <|constrain|>json<|message|>",
            "<|channel|>analysis to=browser.search<|message|>",
            "<|start|>user<|message|>",
            "<|channel|>other<|message|>",
        ] {
            reads(
                Family::Harmony,
                &format!("{head}{{}}<|call|>"),
                &[&format!("text: {head}{{}}")],
            );
        }
    }

    #[test]
    fn a_header_is_bounded_and_has_each_part_once() {
        for head in [
            format!("<|channel|>final{}", " ".repeat(call::HEADER_BYTES_MAX)),
            "<|channel|>final <|channel|>analysis".to_owned(),
            "<|channel|>commentary to=functions.f<|constrain|>json<|constrain|>json".to_owned(),
        ] {
            reads(
                Family::Harmony,
                &format!("{head}<|message|>{{}}<|end|>"),
                &[&format!("text: {head}<|message|>{{}}")],
            );
        }
    }

    #[test]
    fn a_call_breaks_at_the_byte_or_marker_that_can_be_in_none() {
        let head = "<|channel|>commentary to=functions.f<|message|>";
        reads(
            Family::Harmony,
            &format!("{head}{{\"a\": <|call|>"),
            &[&format!("broken f {{\"a\": : {head}{{\"a\": ")],
        );
        reads(
            Family::Harmony,
            &format!("{head}x=1<|call|>"),
            &[&format!("broken f : {head}"), "text: x=1"],
        );
        assert_eq!(
            transcript(&parse(
                Family::Harmony,
                options(Added::All),
                &pieces(
                    &format!(
                        "{head}{{\"a\": \"<|call|><|start|>assistant<|channel|>final<|message|>Hi"
                    ),
                    Added::All
                ),
                &[1],
            )),
            [
                format!("broken f {{\"a\": \": {head}{{\"a\": \""),
                "text: Hi".to_owned()
            ]
        );
    }

    #[test]
    fn a_quoted_marker_in_text_is_text() {
        assert_eq!(
            transcript(&parse(
                Family::Harmony,
                options(Added::All),
                &[
                    FormattedPiece::Special("<|channel|>".to_owned()),
                    FormattedPiece::Text("final".to_owned()),
                    FormattedPiece::Special("<|message|>".to_owned()),
                    FormattedPiece::Text("Use <|call|>.".to_owned()),
                    FormattedPiece::Special("<|return|>".to_owned()),
                ],
                &[1],
            )),
            ["text: Use <|call|>."]
        );
    }
}

#[test]
fn plain_has_reasoning_and_no_calls() {
    reads(
        Family::Plain,
        "<think>\na\n</think>\n\n<tool_call>{\"name\": \"f\", \"arguments\": {}}\n</s>",
        &[
            "reasoning: a",
            "text: <tool_call>{\"name\": \"f\", \"arguments\": {}}\n",
        ],
    );
}

#[test]
fn outputs_of_many_slices_read_as_short_ones_do() {
    let read = |family: Family, text: String| {
        let pieces = [FormattedPiece::Text(text)];
        parse(family, options(Added::None), &pieces, &[])
    };
    let text = "<tool_cal<é".repeat(100_000);
    let lines = transcript(&read(Family::Hermes, text.clone()));
    assert!(lines.len() == 1 && lines[0].strip_prefix("text: ") == Some(text.as_str()));
    let calls = "{\"name\": \"f\", \"parameters\": {\"é\": 1}}; ".repeat(30_000);
    let lines = transcript(&read(Family::Llama3, calls));
    assert!(lines.len() == 30_000 && lines.iter().all(|line| line == "call f: {\"é\": 1}"));
}

#[test]
fn earlier_events_are_left_as_they_are() {
    let mut parser = Family::Plain.parser(options(Added::All));
    let mut out = Vec::new();
    parser.push(Piece::Text("a"), &mut out);
    parser.push(Piece::Text(""), &mut out);
    parser.push(Piece::Text("b"), &mut out);
    assert_eq!(
        out,
        [Parsed::Text("a".to_owned()), Parsed::Text("b".to_owned())]
    );
}

#[test]
fn families_are_detected_by_their_templates() {
    let detect = |template: &str| Family::detect(template, &|_| false);
    assert_eq!(
        detect("{{ '\\n<tool_call>\\n{\"name\": \"' }}"),
        Family::Hermes
    );
    assert_eq!(detect("'<tool_call>\\n<function=' + name"), Family::Plain);
    assert_eq!(detect("<tool_call>{{ name }}<arg_key>"), Family::Plain);
    assert_eq!(
        detect("<|start_header_id|>{{ '\"parameters\": ' }}"),
        Family::Llama3
    );
    assert_eq!(detect("<|start_header_id|>{{ content }}"), Family::Plain);
    assert_eq!(detect("{{ '[TOOL_CALLS] [' }}"), Family::Mistral);
    assert_eq!(
        detect("<|channel|>analysis<|message|> <tool_call>"),
        Family::Harmony
    );
    assert_eq!(detect("<|im_start|>{{ content }}<|im_end|>"), Family::Plain);
    assert_eq!(
        Family::detect("{{ content }}", &|token| ["<|channel|>", "<|message|>"]
            .contains(&token)),
        Family::Harmony
    );
}

#[test]
fn a_family_s_name_reads_back() {
    for family in Family::ALL {
        assert_eq!(family.to_string().parse(), Ok(family));
    }
    assert_eq!("Hermes".parse::<Family>(), Err(UnknownFamily));
}

#[test]
fn prompts_that_open_the_reasoning_are_recognised() {
    assert!(Family::Hermes.reasoning_opened("<|im_start|>assistant\n<think>\n"));
    assert!(!Family::Hermes.reasoning_opened("<|im_start|>assistant\n<think>\n\n</think>\n\n"));
    assert!(!Family::Hermes.reasoning_opened(""));
    assert!(Family::Mistral.reasoning_opened("[/INST][THINK]"));
    assert!(Family::Harmony.reasoning_opened("<|start|>assistant<|channel|>analysis<|message|>"));
    assert!(!Family::Harmony.reasoning_opened("<|start|>assistant"));
}

#[test]
fn call_ids_have_the_form_of_their_family() {
    let alphanumeric = |id: &str| id.bytes().all(|byte| byte.is_ascii_alphanumeric());
    let id = Family::Mistral.call_id();
    assert!(id.len() == 9 && alphanumeric(&id), "{id}");
    let id = Family::Hermes.call_id();
    let random = id.strip_prefix("call_").unwrap();
    assert!(random.len() == 24 && alphanumeric(random), "{id}");
    assert_ne!(Family::Hermes.call_id(), id);
}

fn family() -> impl Strategy<Value = Family> {
    prop::sample::select(&Family::ALL[..])
}

/// Headers are harmony's own, so what is lost in one cannot be told from what is format.
fn headless_family() -> impl Strategy<Value = Family> {
    family().prop_map(|family| match family {
        Family::Harmony => Family::Hermes,
        Family::Hermes | Family::Llama3 | Family::Mistral | Family::Plain => family,
    })
}

fn added() -> impl Strategy<Value = Added> {
    prop::sample::select(&Added::BOTH[..])
}

fn cuts() -> impl Strategy<Value = Vec<usize>> {
    prop_oneof![
        Just(vec![1]),
        prop::collection::vec(1..4_usize, 1..8),
        prop::collection::vec(1..40_usize, 1..8),
    ]
}

/// Text that nothing could mistake for a marker: `<` and `[` come without what follows them in one.
fn nasty() -> impl Strategy<Value = String> {
    let part = prop_oneof![
        any::<String>(),
        prop::sample::select(
            &[
                "\n", "\n\n", " ", "\r\n", "\u{a0}", "\u{301}", "🦀", "{", "}", "\"", "\\"
            ][..]
        )
        .prop_map(str::to_owned),
    ];
    prop::collection::vec(part, 0..5).prop_map(|parts| parts.concat().replace(['<', '['], "("))
}

/// The arguments of a call in some spelling, with text in them that looks like a marker or the end of the call.
fn arguments() -> impl Strategy<Value = String> {
    let string = prop_oneof![
        any::<String>(),
        prop::sample::select(
            &[
                "</tool_call>",
                "<|call|>",
                "}]}",
                "\"}}",
                "[TOOL_CALLS]",
                "</think>",
                "\\",
                "\n"
            ][..]
        )
        .prop_map(str::to_owned),
    ];
    let leaf = prop_oneof![
        string.prop_map(serde_json::Value::from),
        any::<i32>().prop_map(serde_json::Value::from),
        Just(serde_json::Value::Null),
    ];
    let value = leaf.prop_recursive(3, 12, 3, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..3).prop_map(serde_json::Value::from),
            prop::collection::hash_map(any::<String>(), inner, 0..3)
                .prop_map(|map| serde_json::Value::Object(map.into_iter().collect())),
        ]
    });
    (
        prop::collection::hash_map("[a-z\"}]{0,4}", value, 0..3),
        any::<bool>(),
    )
        .prop_map(|(map, pretty)| {
            let object = serde_json::Value::Object(map.into_iter().collect());
            if pretty {
                serde_json::to_string_pretty(&object).unwrap()
            } else {
                object.to_string()
            }
        })
}

fn answer() -> impl Strategy<Value = Answer> {
    let name = prop::sample::select(&["f", "get_weather"][..]).prop_map(str::to_owned);
    (
        prop::option::of(nasty()),
        nasty(),
        prop::collection::vec((name, arguments()), 0..4),
    )
        .prop_map(|(reasoning, text, calls)| Answer {
            reasoning,
            text,
            calls,
        })
}

/// The part of the answer that the family can write.
fn writable(family: Family, mut answer: Answer) -> Answer {
    answer.reasoning = answer.reasoning.filter(|text| !text.is_empty());
    match family {
        Family::Llama3 if !answer.calls.is_empty() => answer.text.clear(),
        // What begins like a call is one.
        Family::Llama3 => answer.text.insert(0, 'a'),
        Family::Plain => answer.calls.clear(),
        Family::Hermes | Family::Mistral | Family::Harmony => {}
    }
    answer
}

fn read(events: &[Parsed]) -> Answer {
    let mut answer = Answer::default();
    for event in events {
        match event {
            Parsed::Reasoning(delta) => answer.reasoning.get_or_insert_default().push_str(delta),
            Parsed::Text(delta) => answer.text.push_str(delta),
            Parsed::CallBegin { name } => answer.calls.push((name.clone(), String::new())),
            Parsed::CallArguments(_) => {}
            Parsed::CallEnd { arguments } => {
                answer.calls.last_mut().unwrap().1.clone_from(arguments);
            }
            Parsed::CallBroken { raw } => panic!("broken: {raw}"),
        }
    }
    answer
}

/// Outputs made of everything that means something to some family, in any order.
fn noise() -> impl Strategy<Value = String> {
    let markers: Vec<&'static str> = Markers::added(&|_| true).iter().map(Marker::text).collect();
    let part = prop_oneof![
        4 => prop::sample::select(markers),
        4 => prop::sample::select(
            &[
                "{\"name\": \"f\", \"arguments\": {\"a\": [1, \"}\"]}}",
                "{\"name\": \"f\", \"parameters\": {}}",
                "{\"arguments\": {}, \"name\": \"get_weather\"}",
                "{\"name\": \"g\", \"arguments\": {}}",
                "{\"name\": \"f\", \"arguments\": ",
                "{\"name\": \"f",
                "{\"a\": \"",
                "{\"a\": ",
                "assistant",
                "final",
                "analysis",
                "commentary to=functions.f ",
                " to=functions.f",
                "json",
            ][..]
        ),
        2 => prop::sample::select(
            &["f", "[", "]", ",", ", ", ";", "{", "}", "{}", "\"", "\\", ":", "<", "</", "<|", "<tool", "[TOOL_", "é", "🦀"][..]
        ),
        3 => prop::sample::select(&["\n", "\n\n", " ", "\t"][..]),
        1 => prop::sample::select(&["<|im_end|>", "</s>", "<|im_start|>", "<0x0A>"][..]),
    ];
    prop::collection::vec(part, 0..14).prop_map(|parts| parts.concat())
}

fn any_options() -> impl Strategy<Value = (Added, ParserOptions)> {
    (
        added(),
        prop::bool::weighted(0.8),
        prop::bool::weighted(0.2),
        prop::bool::weighted(0.9),
    )
        .prop_map(|(added, reasoning, in_reasoning, tools)| {
            let mut options = ParserOptions {
                reasoning,
                in_reasoning,
                ..options(added)
            };
            if !tools {
                options.tools = Arc::default();
            }
            (added, options)
        })
}

/// The text without what may be format: whitespace and the family's markers.
fn essence(family: Family, text: &str) -> String {
    let mut text: String = text.chars().filter(|c| !c.is_ascii_whitespace()).collect();
    for marker in family.markers().iter() {
        text = text.replace(marker.text(), "");
    }
    text
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4000))]

    #[test]
    fn the_cuts_do_not_matter(
        family in family(), output in noise(), (added, options) in any_options(), cuts in cuts(),
    ) {
        let pieces = pieces(&output, added);
        let whole = transcript(&parse(family, options.clone(), &pieces, &[]));
        prop_assert_eq!(transcript(&parse(family, options, &pieces, &cuts)), whole);
    }

    #[test]
    fn nothing_is_lost(
        family in headless_family(), output in noise(), (added, options) in any_options(), cuts in cuts(),
    ) {
        let mut pieces = pieces(&output, added);
        let events = parse(family, options, &pieces, &cuts);
        if matches!(pieces.last(), Some(FormattedPiece::Special(last)) if END_TOKENS.contains(&last.as_str())) {
            pieces.pop();
        }
        let written: String = pieces.iter().map(|piece| match piece {
            FormattedPiece::Special(text) | FormattedPiece::Text(text) => text.as_str(),
        }).collect();
        // Every whole call is put back as a hole, which the JSON around its arguments may fill.
        let mut rest = essence(family, &written);
        let mut shown = String::new();
        let mut around = false;
        let mut take = |shown: &mut String, around: bool| {
            let part = essence(family, shown);
            shown.clear();
            match (rest.find(&part), around) {
                (Some(at), true) => rest.drain(..at + part.len()),
                (Some(0), false) => rest.drain(..part.len()),
                found => panic!("{part:?} at {found:?} in {rest:?}"),
            };
        };
        for event in &events {
            match event {
                Parsed::Reasoning(text) | Parsed::Text(text) | Parsed::CallBroken { raw: text } => shown.push_str(text),
                Parsed::CallBegin { .. } | Parsed::CallArguments(_) => {}
                Parsed::CallEnd { arguments } => {
                    take(&mut shown, around);
                    take(&mut arguments.clone(), true);
                    around = true;
                }
            }
        }
        take(&mut shown, around);
        if !around {
            prop_assert_eq!(rest, "");
        }
    }

    #[test]
    fn without_tools_and_reasoning_everything_is_text(
        family in headless_family(), output in noise(), added in added(), cuts in cuts(),
    ) {
        let options = ParserOptions { reasoning: false, tools: Arc::default(), ..options(added) };
        let output = format!("{output}.");
        let events = parse(family, options, &pieces(&output, added), &cuts);
        prop_assert_eq!(transcript(&events), [format!("text: {output}")]);
    }

    #[test]
    fn what_is_formatted_reads_back(
        family in family(), answer in answer(), added in added(), cuts in cuts(), ends in any::<bool>(),
    ) {
        let answer = writable(family, answer);
        let mut pieces = family.format(&answer, &|text| added.asks(text));
        if ends {
            pieces.push(FormattedPiece::Special(END_TOKENS[0].to_owned()));
        }
        let events = parse(family, options(added), &pieces, &cuts);
        prop_assert_eq!(read(&events), answer);
    }

    #[test]
    fn a_truncated_or_damaged_answer_does_not_depend_on_the_cuts(
        family in family(), answer in answer(), added in added(), cuts in cuts(),
        at in any::<Index>(), with in prop::option::of(any::<char>()),
    ) {
        let mut output: Vec<char> = family
            .format(&writable(family, answer), &|_| false)
            .into_iter()
            .flat_map(|piece| match piece {
                FormattedPiece::Special(text) | FormattedPiece::Text(text) => text.chars().collect::<Vec<_>>(),
            })
            .collect();
        output.push('.');
        let at = at.index(output.len());
        match with {
            Some(with) => output[at] = with,
            None => output.truncate(at),
        }
        let pieces = pieces(&output.into_iter().collect::<String>(), added);
        let whole = transcript(&parse(family, options(added), &pieces, &[]));
        prop_assert_eq!(transcript(&parse(family, options(added), &pieces, &cuts)), whole);
    }
}
