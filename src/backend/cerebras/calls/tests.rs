use proptest::{collection::vec, prelude::*};

use super::*;
use crate::backend::cerebras::wire::FunctionDelta;

/// Puts deltas in order, each drained on its own, and the end.
struct Play {
    assembler: Assembler,
    out: Vec<Parsed>,
}

impl Play {
    fn new(holds: bool) -> Self {
        let tools = ["a", "b"].map(str::to_owned).into();
        Self {
            assembler: Assembler::new(Arc::new(tools), holds),
            out: Vec::new(),
        }
    }

    fn call(&mut self, index: u32, id: &str, name: &str, arguments: &str) -> Vec<Parsed> {
        let some = |text: &str| Some(text.to_owned());
        let delta = CallDelta {
            index: Some(index),
            id: some(id),
            function: Some(FunctionDelta {
                name: some(name),
                arguments: some(arguments),
            }),
        };
        self.assembler.call(delta).unwrap();
        self.drained()
    }

    fn text(&mut self, text: &str) -> Vec<Parsed> {
        self.assembler.text(text);
        self.drained()
    }

    fn drained(&mut self) -> Vec<Parsed> {
        self.assembler.drain(&mut self.out).unwrap();
        std::mem::take(&mut self.out)
    }

    fn finish(&mut self, whole: bool) -> Vec<Parsed> {
        self.assembler.finish(whole, &mut self.out);
        std::mem::take(&mut self.out)
    }
}

fn begin(name: &str) -> Parsed {
    Parsed::CallBegin { name: name.into() }
}

fn arguments(text: &str) -> Parsed {
    Parsed::CallArguments(text.into())
}

fn end(text: &str) -> Parsed {
    Parsed::CallEnd {
        arguments: text.into(),
    }
}

fn text(text: &str) -> Parsed {
    Parsed::Text(text.into())
}

#[test]
fn a_call_in_one_piece_ends_at_once() {
    let mut play = Play::new(false);
    let whole = r#"{"x": "}\"{"}"#;
    assert_eq!(
        play.call(0, "1", "a", whole),
        [begin("a"), arguments(whole), end(whole)]
    );
    assert_eq!(play.text("after"), [text("after")]);
    assert_eq!(play.finish(true), []);
}

#[test]
fn fragments_are_handed_out_as_they_come() {
    let mut play = Play::new(false);
    assert_eq!(play.call(0, "1", "a", ""), [begin("a")]);
    assert_eq!(play.call(0, "", "", " {\"x"), [arguments("{\"x")]);
    assert_eq!(
        play.call(0, "", "", "\": 1}\n"),
        [arguments("\": 1}"), end("{\"x\": 1}")]
    );
    assert_eq!(play.call(0, "", "", "\n"), []);
}

#[test]
fn what_comes_in_turns_is_told_one_after_the_other() {
    let mut play = Play::new(false);
    assert_eq!(play.call(0, "1", "a", ""), [begin("a")]);
    assert_eq!(play.call(1, "2", "b", "{\"y\":"), []);
    assert_eq!(play.text("meanwhile"), []);
    assert_eq!(play.call(0, "", "", "{"), [arguments("{")]);
    assert_eq!(play.call(1, "", "", "2}"), []);
    assert_eq!(
        play.call(0, "", "", "}"),
        [
            arguments("}"),
            end("{}"),
            begin("b"),
            arguments("{\"y\":2}"),
            end("{\"y\":2}"),
            text("meanwhile"),
        ]
    );
}

#[test]
fn calls_that_share_an_index_are_told_apart_by_their_ids() {
    let mut play = Play::new(false);
    let one = [begin("a"), arguments("{}"), end("{}")];
    assert_eq!(play.call(0, "1", "a", "{}"), one);
    assert_eq!(play.call(0, "2", "a", "{}"), one);
    assert_eq!(play.call(0, "2", "a", ""), []);
}

#[test]
fn no_arguments_are_an_empty_object() {
    let mut play = Play::new(false);
    assert_eq!(play.call(0, "1", "a", ""), [begin("a")]);
    assert_eq!(play.finish(true), [arguments("{}"), end("{}")]);
}

#[test]
fn malformed_arguments_break_the_call() {
    for raw in ["{x}", "null", "[1]", "{\"x\": 1"] {
        let mut play = Play::new(false);
        let mut told = play.call(0, "1", "a", raw);
        told.extend(play.finish(true));
        let broken = Parsed::CallBroken { raw: raw.into() };
        assert_eq!(told, [begin("a"), arguments(raw), broken]);
    }
    let deep = "{\"x\":".to_owned() + &"[".repeat(200);
    let mut play = Play::new(false);
    play.call(0, "1", "a", &deep);
    assert_eq!(play.finish(true), [Parsed::CallBroken { raw: deep }]);
}

#[test]
fn a_call_that_is_cut_off_comes_to_nothing() {
    let mut play = Play::new(false);
    assert_eq!(
        play.call(0, "1", "a", "{\"x\""),
        [begin("a"), arguments("{\"x\"")]
    );
    assert_eq!(play.call(1, "2", "b", "{}"), []);
    assert_eq!(play.finish(false), []);
}

#[test]
fn a_call_of_no_tool_is_text() {
    let mut play = Play::new(false);
    assert_eq!(play.call(0, "1", "other", "{\"x\""), []);
    assert_eq!(play.call(0, "", "", ":1}"), [text("other{\"x\":1}")]);
}

#[test]
fn where_one_call_is_allowed_it_ends_with_the_answer() {
    let mut play = Play::new(true);
    assert_eq!(play.call(0, "1", "a", "{}"), [begin("a"), arguments("{}")]);
    assert_eq!(play.finish(true), [end("{}")]);
}

#[test]
fn what_waits_is_bounded() {
    let mut play = Play::new(false);
    play.call(0, "1", "a", "{\"");
    play.assembler.text(&"x".repeat(HELD_BYTES_MAX));
    assert!(play.assembler.drain(&mut play.out).is_err());

    let mut many = Assembler::new(Arc::default(), false);
    let refused = (0..1000).find_map(|index| {
        let delta = CallDelta {
            index: Some(index),
            ..CallDelta::default()
        };
        many.call(delta).err().map(|_| index)
    });
    assert_eq!(refused, Some(128));
}

proptest! {
    /// Whoever's turn it is: the calls come whole, in the order in which they began, and in the form
    /// that a parser promises.
    #[test]
    fn calls_in_any_turns_come_one_after_the_other(turns in vec(0u32..3, 0..150), holds: bool) {
        let texts = ["{\"a\": [1, {\"b\": \"}\\\"\"}]}", "{}", " {\"é\": \"\\\\\"} \n"];
        let mut rest = texts.map(str::chars);
        let mut play = Play::new(holds);
        let mut told = Vec::new();
        let mut begun = Vec::new();
        for index in turns.into_iter().chain((0..3).flat_map(|index| [index; 40])) {
            let name = if begun.contains(&index) { "" } else { "a" };
            let Some(piece) = rest[index as usize].next() else {
                continue;
            };
            if !name.is_empty() {
                begun.push(index);
            }
            told.extend(play.call(index, "", name, &piece.to_string()));
        }
        told.extend(play.finish(true));
        let mut expected = Vec::new();
        for index in begun {
            let whole = texts[index as usize].trim();
            expected.extend([begin("a"), arguments(whole), end(whole)]);
        }
        let joined = told.into_iter().fold(Vec::new(), |mut joined: Vec<Parsed>, next| {
            match (joined.last_mut(), &next) {
                (Some(Parsed::CallArguments(text)), Parsed::CallArguments(more)) => {
                    text.push_str(more);
                }
                _ => joined.push(next),
            }
            joined
        });
        prop_assert_eq!(joined, expected);
    }
}
