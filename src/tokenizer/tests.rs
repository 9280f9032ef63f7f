#[path = "../../tests/support/vocab.rs"]
pub(crate) mod vocab;

use std::sync::{Arc, OnceLock};

use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;

/// A vocabulary as we serve it and as the crate does.
struct Subject {
    name: &'static str,
    ours: Tokenizer,
    theirs: HfTokenizer,
    added: Vec<String>,
}

impl Subject {
    fn new(name: &'static str, json: &[u8]) -> Self {
        let theirs = HfTokenizer::from_bytes(json).unwrap();
        let ours = Tokenizer::from_json(json).unwrap_or_else(|error| panic!("{name}: {error}"));
        let added = ours.added.iter().map(|token| token.content.to_string());
        Self {
            name,
            added: added.collect(),
            ours,
            theirs,
        }
    }

    fn encode(&self, text: &str, at_start: bool, untrusted: &[usize]) -> Encoded {
        let mut encoded = Encoded::default();
        self.ours.encode(text, at_start, untrusted, &mut encoded);
        encoded
    }

    fn reference(&self, text: &str) -> Vec<TokenId> {
        let encoding = self.theirs.encode_fast(text, false).unwrap();
        encoding.get_ids().to_vec()
    }

    fn decode(&self, ids: &[TokenId]) -> String {
        let mut detokenizer = self.ours.detokenizer();
        let mut text = String::new();
        for &id in ids {
            for piece in detokenizer.push(id) {
                match piece {
                    DetokPiece::Text(part) | DetokPiece::Special(part) => text.push_str(part),
                }
            }
        }
        text + detokenizer.finish()
    }
}

fn edited(json: &[u8], edit: impl FnOnce(&mut Value)) -> Vec<u8> {
    let mut value = serde_json::from_slice(json).unwrap();
    edit(&mut value);
    serde_json::to_vec(&value).unwrap()
}

/// Adds tokens, given as (content, further fields), with the next free ids.
fn add(json: &mut Value, tokens: &[(&str, Value)]) {
    let vocab = json["model"]["vocab"].as_object().unwrap().clone();
    let added = json["added_tokens"].as_array_mut().unwrap();
    let highest = added
        .iter()
        .map(|token| token["id"].as_u64().unwrap() + 1)
        .max();
    let mut next = highest.unwrap_or(0).max(vocab.len() as u64);
    for (content, fields) in tokens {
        let known = vocab.get(*content).and_then(Value::as_u64);
        let mut token = json!({
            "id": known.unwrap_or(next), "content": content, "single_word": false,
            "lstrip": false, "rstrip": false, "normalized": false, "special": false,
        });
        for (key, value) in fields.as_object().unwrap() {
            token[key] = value.clone();
        }
        next += u64::from(known.is_none());
        added.push(token);
    }
}

/// All that added tokens can be, in one vocabulary that also folds compatible characters.
fn odd() -> Vec<u8> {
    edited(vocab::qwen(), |json| {
        json["normalizer"] = json!({"type": "Sequence", "normalizers": [
            {"type": "NFKC"}, {"type": "Lowercase"},
        ]});
        let odd = [
            ("<mask>", json!({"lstrip": true})),
            ("<end>", json!({"rstrip": true, "special": true})),
            ("<both>", json!({"lstrip": true, "rstrip": true})),
            ("<Norm>", json!({"normalized": true})),
            (
                "<norm-l>",
                json!({"normalized": true, "lstrip": true, "rstrip": true}),
            ),
            ("<a>", json!({})),
            ("<a><b>", json!({})),
            ("><b", json!({})),
            ("\n\n", json!({})),
            ("    ", json!({"normalized": true})),
            ("~", json!({})),
        ];
        add(json, &odd);
    })
}

/// Unigram takes the likeliest pieces, control tokens included.
fn unigram() -> Vec<u8> {
    let mut vocab = vec![
        json!(["<unk>", 0.0]),
        json!(["<s>", 0.0]),
        json!(["</s>", 0.0]),
    ];
    vocab.extend((0..=255_u8).map(|byte| json!([format!("<0x{byte:02X}>"), -9.0])));
    vocab.extend((b'!'..=b'~').map(|byte| json!([char::from(byte).to_string(), -7.0])));
    vocab.extend(["▁", "▁the", "th", "ing", "er", "▁a"].map(|piece| json!([piece, -4.0])));
    let mut json: Value = serde_json::from_slice(vocab::mistral()).unwrap();
    json["model"] = json!({"type": "Unigram", "unk_id": 0, "byte_fallback": true, "vocab": vocab});
    json["added_tokens"].as_array_mut().unwrap().truncate(3);
    serde_json::to_vec(&json).unwrap()
}

fn subjects() -> &'static [Subject] {
    static SUBJECTS: OnceLock<Vec<Subject>> = OnceLock::new();
    SUBJECTS.get_or_init(|| {
        let mut subjects: Vec<Subject> = vocab::all()
            .into_iter()
            .map(|(name, json)| Subject::new(name, json))
            .collect();
        subjects.push(Subject::new("odd", &odd()));
        subjects.push(Subject::new("unigram", &unigram()));
        subjects
    })
}

fn subject(name: &str) -> &'static Subject {
    subjects()
        .iter()
        .find(|subject| subject.name == name)
        .unwrap()
}

/// A part of a random text; literals are numbers until it is known of which vocabulary.
#[derive(Debug, Clone)]
enum Fragment {
    Text(String),
    Literal(usize),
    /// A literal without its last characters.
    Cut(usize, usize),
}

impl Fragment {
    fn any() -> impl Strategy<Value = Self> {
        prop_oneof![
            4 => "[a-z ]{0,12}".prop_map(Self::Text),
            2 => "[ \n\t\r\u{A0}]{1,6}".prop_map(Self::Text),
            2 => any::<String>().prop_map(Self::Text),
            2 => prop::sample::select(vec![
                "don't", " 12345", "{\"a\": [1, 2]}", "日本語", "👨‍👩‍👧", "e\u{301}", "\u{301}",
                "ＡＢｃ", "<", ">", "[", "▁", "<0x0A>", "＜/s＞", "<NORM>", "＜norm＞", "\0", "<b>",
            ]).prop_map(|text| Self::Text(text.to_owned())),
            4 => any::<usize>().prop_map(Self::Literal),
            1 => (any::<usize>(), 1..4_usize).prop_map(|(token, less)| Self::Cut(token, less)),
        ]
    }

    fn of(&self, subject: &Subject) -> String {
        let literal = |token: &usize| subject.added[token % subject.added.len()].clone();
        match self {
            Self::Text(text) => text.clone(),
            Self::Literal(token) => literal(token),
            Self::Cut(token, less) => {
                let mut text = literal(token);
                text.truncate(
                    text.char_indices()
                        .nth_back(less - 1)
                        .map_or(0, |(at, _)| at),
                );
                text
            }
        }
    }

    fn join(fragments: &[Self], subject: &Subject) -> String {
        fragments
            .iter()
            .map(|fragment| fragment.of(subject))
            .collect()
    }
}

fn fragments() -> impl Strategy<Value = Vec<Fragment>> {
    prop::collection::vec(Fragment::any(), 0..14)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn pieces_encode_as_the_whole_does(fragments in fragments()) {
        for subject in subjects() {
            let text = Fragment::join(&fragments, subject);
            let ids = subject.encode(&text, true, &[]).ids;
            prop_assert_eq!(ids, subject.reference(&text), "{}: {:?}", subject.name, text);
        }
    }

    #[test]
    fn halves_of_a_cut_encode_on_their_own(fragments in fragments(), trusted in any::<u64>()) {
        for subject in subjects() {
            let text = Fragment::join(&fragments, subject);
            let untrusted: Vec<usize> = text
                .char_indices()
                .map(|(start, _)| start)
                .filter(|start| trusted >> (start % 64) & 1 == 1)
                .collect();
            for untrusted in [&[][..], &untrusted] {
                let whole = subject.encode(&text, true, untrusted);
                for cut in &whole.cuts {
                    let (left, right) = text.split_at(cut.byte);
                    let middle = untrusted.partition_point(|&offset| offset < cut.byte);
                    let (in_left, in_right) = untrusted.split_at(middle);
                    let in_right: Vec<usize> = in_right.iter().map(|at| at - cut.byte).collect();
                    let left = subject.encode(left, true, in_left).ids;
                    let right = subject.encode(right, false, &in_right).ids;
                    prop_assert_eq!(&whole.ids[..cut.token], left, "{}: {:?}", subject.name, text);
                    prop_assert_eq!(&whole.ids[cut.token..], right, "{}: {:?}", subject.name, text);
                    let token = subject.ours.added(whole.ids[cut.token]).unwrap();
                    prop_assert_eq!(&text[cut.byte..cut.byte + cut.len], token);
                }
            }
        }
    }

    #[test]
    fn what_a_client_writes_is_never_a_control_token(
        parts in prop::collection::vec((fragments(), fragments()), 1..4),
    ) {
        for subject in subjects() {
            check_guarded(subject, &parts)?;
        }
    }

    #[test]
    fn streamed_text_is_the_lossy_text_of_all_bytes(
        picks in prop::collection::vec(any::<u32>(), 0..60),
    ) {
        for subject in subjects() {
            let size = subject.ours.vocab_size() as u32;
            let ids: Vec<TokenId> = picks.iter().map(|pick| pick % (size + 2)).collect();
            let mut expected = String::new();
            for run in ids.chunk_by(|&a, &b| {
                !subject.ours.table.is_control(a) && !subject.ours.table.is_control(b)
            }) {
                let bytes: Vec<u8> = run.iter().flat_map(|&id| subject.ours.bytes_of(id)).copied().collect();
                expected += &String::from_utf8_lossy(&bytes);
            }
            prop_assert_eq!(subject.decode(&ids), expected, "{}", subject.name);
        }
    }

    #[test]
    fn marks_come_off_again(text in any::<String>(), fragments in fragments()) {
        for subject in subjects() {
            let text = text.clone() + &Fragment::join(&fragments, subject);
            let guard = subject.ours.guard();
            let marked = guard.mark(&text).into_owned();
            prop_assert_eq!(guard.unmark(marked).0, text);
        }
    }
}

/// Renders trusted and client parts in turn, and looks whose control tokens are whose.
fn check_guarded(
    subject: &Subject,
    parts: &[(Vec<Fragment>, Vec<Fragment>)],
) -> Result<(), TestCaseError> {
    let control = |id: &TokenId| subject.ours.table.is_control(*id);
    // A control token that swallows nothing, so that it stands for its content alone.
    let token = subject
        .ours
        .added
        .iter()
        .find(|token| token.cut && token.control)
        .unwrap();
    let mut rendered = String::new();
    let mut plain = String::new();
    for (first, second) in parts {
        // Two client parts in a row: a literal must not arise where they meet either.
        for client in [first, second] {
            let client = Fragment::join(client, subject);
            rendered += &subject.ours.guard().mark(&client);
            plain += &client;
        }
        // The bar keeps the client's end from running on into the template's token.
        let trusted = format!("|{}\n", token.content);
        rendered += &trusted;
        plain += &trusted;
    }
    let (text, untrusted) = subject.ours.guard().unmark(rendered);
    prop_assert_eq!(&text, &plain);
    let encoded = subject.encode(&text, true, &untrusted);
    let found: Vec<TokenId> = encoded.ids.iter().copied().filter(control).collect();
    prop_assert_eq!(
        &found,
        &vec![token.id; parts.len()],
        "{}: {:?}",
        subject.name,
        text
    );
    if ["llama3", "harmony", "deepseek"].contains(&subject.name) {
        prop_assert_eq!(subject.decode(&encoded.ids), text);
    }
    Ok(())
}

#[test]
fn training_is_deterministic() {
    assert!(vocab::qwen_over(&[vocab::CORPUS], 900) == vocab::qwen());
}

#[test]
fn lookups_agree_with_the_file() {
    let qwen = &subject("qwen").ours;
    let end = qwen.token_id("<|im_end|>").unwrap();
    assert_eq!(qwen.added(end), Some("<|im_end|>"));
    assert_eq!(qwen.bytes_of(end), b"<|im_end|>");
    assert!(qwen.is_special(end) && qwen.is_cut(end));
    let think = qwen.token_id("<think>").unwrap();
    assert!(!qwen.is_special(think) && qwen.is_cut(think));
    assert_eq!(qwen.token_id("the"), None);
    assert_eq!(qwen.added(0), None);
    assert_eq!(qwen.vocab_size(), think as usize + 2);
    assert_eq!(qwen.bytes_of(TokenId::MAX), b"");
    assert_eq!(
        qwen.fingerprint(),
        <[u8; 32]>::from(Sha256::digest(vocab::qwen()))
    );
    assert!(qwen.size_bytes() > vocab::qwen().len());
}

#[test]
fn encoding_appends_and_counts() {
    let qwen = Tokenizer::from_json(vocab::qwen()).unwrap();
    assert_eq!(qwen.encoded_tokens(), 0);
    let mut out = Encoded::default();
    qwen.encode("<|im_start|>user", true, &[], &mut out);
    let first = out.ids.len();
    qwen.encode("\n<|im_end|>", false, &[], &mut out);
    assert_eq!(out.ids.len(), first + 2);
    assert_eq!(out.ids.last().copied(), qwen.token_id("<|im_end|>"));
    let start = Cut {
        byte: 0,
        token: 0,
        len: 12,
    };
    let end = Cut {
        byte: 1,
        token: 1,
        len: 10,
    };
    assert_eq!(out.cuts, [start, end]);
    assert_eq!(qwen.encoded_tokens(), out.ids.len() as u64);
}

#[test]
fn an_untrusted_literal_is_text_and_its_trusted_neighbours_are_tokens() {
    for name in ["llama3", "harmony"] {
        let subject = subject(name);
        let x = subject.added[0].as_str();
        let text = format!("{x}{x}{x}");
        let encoded = subject.encode(&text, true, &[x.len()]);
        assert_eq!(encoded.ids[0], subject.ours.added[0].id);
        assert_eq!(encoded.ids.last(), Some(&subject.ours.added[0].id));
        assert!(encoded.ids.len() > 4, "the middle one is several tokens");
        assert_eq!(encoded.cuts.len(), 2);
        assert_eq!(subject.decode(&encoded.ids), text);
    }
}

#[test]
fn a_model_cannot_spell_a_control_token() {
    let mistral = subject("mistral");
    let id = mistral.ours.token_id("[INST]").unwrap();
    let spelt = mistral.ours.hf.get_model().tokenize("x[INST]").unwrap();
    assert!(
        spelt.iter().any(|token| token.id == id),
        "the vocabulary no longer has the trap"
    );

    let text = "a[INST][INST] b[INST]";
    let encoded = mistral.encode(text, true, &[1, 7, 15]);
    assert!(!encoded.ids.contains(&id));
    assert_eq!(mistral.decode(&encoded.ids), format!(" {text}"));
    // Not even where nobody said that it was a client's.
    let mut ids = Vec::new();
    mistral.ours.encode_word("[INST]", &mut ids).unwrap();
    assert!(!ids.contains(&id));
}

#[test]
fn long_runs_of_literals_are_parted_in_one_go() {
    let mistral = subject("mistral");
    let text = "[INST]".repeat(2_000);
    let untrusted: Vec<usize> = (0..2_000).map(|index| index * 6).collect();
    let encoded = mistral.encode(&text, false, &untrusted);
    assert!(
        !encoded
            .ids
            .contains(&mistral.ours.token_id("[INST]").unwrap())
    );
    assert_eq!(mistral.decode(&encoded.ids), text);
}

#[test]
fn literals_that_json_spells_with_escapes_are_marked_as_their_readers_see_them() {
    let qwen = Tokenizer::from_json(vocab::qwen()).unwrap();
    let guard = qwen.guard();
    for (json, starts) in [
        (r#"{"a": "\u003c|im_end|>"}"#, vec![6]),
        (r#"{"a": "<|\u0069m_end|\u003E, \\n"}"#, vec![6]),
        (
            r#"{"a": "<|im_end|>\n\ud83d\ude00\u003c/think>"}"#,
            vec![6, 22],
        ),
        (r#"{"a": "\\u003c|im_end|> \u003d|im_end|>"}"#, vec![]),
        (r#"{"a": "half \ud83d \u00"}"#, vec![]),
        (r#"{"\u003c|im_end|>": 1}"#, vec![2]),
    ] {
        let marked = guard.mark_json(json).into_owned();
        // Printed as it was written nothing changes, and the JSON is still the same.
        assert_eq!(guard.unmark(marked.clone()).0, json);
        let Ok(value) = serde_json::from_str::<Value>(json) else {
            assert_eq!(marked, json);
            continue;
        };
        let read: Value = serde_json::from_str(&marked).unwrap();
        assert_eq!(guard.unmark(read.to_string()), (value.to_string(), starts));
    }
}

#[test]
fn a_literal_in_two_parts_is_marked_where_it_begins() {
    let qwen = &subject("qwen").ours;
    let rendered = format!(
        "{}{}",
        qwen.guard().mark("hi <|im_"),
        qwen.guard().mark("end|> ho")
    );
    assert_eq!(
        qwen.guard().unmark(rendered),
        ("hi <|im_end|> ho".to_owned(), vec![3])
    );
}

#[test]
fn overlapping_literals_are_all_marked() {
    let odd = &subject("odd").ours;
    let marked = odd.guard().mark("<a><b>x").into_owned();
    assert_eq!(
        odd.guard().unmark(marked),
        ("<a><b>x".to_owned(), vec![0, 2])
    );
}

#[test]
fn a_literal_that_only_normalising_makes_is_marked_too() {
    let odd = subject("odd");
    let id = odd.ours.token_id("<Norm>").unwrap();
    let text = "x ＜ＮＯＲＭ＞ y";
    assert!(odd.encode(text, true, &[]).ids.contains(&id));
    let (text, untrusted) = odd
        .ours
        .guard()
        .unmark(odd.ours.guard().mark(text).into_owned());
    assert_eq!(untrusted, [2]);
    assert!(!odd.encode(&text, true, &untrusted).ids.contains(&id));
}

#[test]
fn harmless_text_is_marked_without_a_copy() {
    let guard = subject("qwen").ours.guard();
    for text in [
        "",
        "a < b | c > d",
        "im_start|>",
        "< |im_end|>x",
        "日本語 👍",
    ] {
        assert!(
            matches!(guard.mark(text), std::borrow::Cow::Borrowed(_)),
            "{text:?}"
        );
    }
}

#[test]
fn white_space_and_single_letters_are_text_even_as_added_tokens() {
    let odd = subject("odd");
    for (content, text) in [("\n\n", "a\n\nb"), ("~", "a~b")] {
        let id = odd.ours.token_id(content).unwrap();
        assert!(matches!(
            odd.ours.guard().mark(text),
            std::borrow::Cow::Borrowed(_)
        ));
        assert!(odd.encode(text, true, &[]).ids.contains(&id));
        let mut detokenizer = odd.ours.detokenizer();
        assert_eq!(
            detokenizer.push(id).collect::<Vec<_>>(),
            [DetokPiece::Text(content)]
        );
    }
}

#[test]
fn spaces_that_are_both_added_and_spelt_by_the_model_are_spaces() {
    let gemma = subject("gemma");
    let id = gemma.ours.token_id("▁▁▁▁").unwrap();
    let encoded = gemma.encode("x\n    y", true, &[]);
    assert!(encoded.ids.contains(&id));
    assert_eq!(gemma.decode(&encoded.ids), "x\n    y");
    let table = gemma.ours.token_id("<table>").unwrap();
    let mut detokenizer = gemma.ours.detokenizer();
    assert_eq!(
        detokenizer.push(table).collect::<Vec<_>>(),
        [DetokPiece::Special("<table>")]
    );
    assert!(!gemma.ours.is_special(table));
}

#[test]
fn cuts_are_only_where_the_theorem_holds() {
    let odd = &subject("odd").ours;
    let cut = |content| odd.is_cut(odd.token_id(content).unwrap());
    assert!(cut("<|im_start|>"));
    assert!(cut("<end>"), "white space to its right goes with it");
    assert!(!cut("<mask>"), "takes white space to its left");
    assert!(!cut("<Norm>"), "is looked for in normalised text");
    assert!(!cut("\n\n"), "may be swallowed by a token before it");
    assert!(cut("<a>"), "only ever the beginning of a longer token");
    assert!(!cut("><b"), "begins inside <a><b>");
    let deepseek = &subject("deepseek").ours;
    let user = deepseek.token_id("<｜User｜>").unwrap();
    assert!(deepseek.is_cut(user), "nothing normalises there");
}

#[test]
fn a_character_is_held_until_it_is_complete() {
    let llama3 = &subject("llama3").ours;
    let byte = |byte: u8| (0..256).find(|&id| llama3.bytes_of(id) == [byte]).unwrap();
    let [a, b, c, d] = [0xF0, 0x9F, 0x91, 0x8D].map(byte);
    let end = llama3.token_id("<|eot_id|>").unwrap();
    let mut detokenizer = llama3.detokenizer();
    let mut push = |id| {
        let pieces = detokenizer.push(id).map(|piece| match piece {
            DetokPiece::Text(text) => format!("text {text}"),
            DetokPiece::Special(token) => format!("special {token}"),
        });
        pieces.collect::<Vec<_>>()
    };
    assert!(push(a).is_empty() && push(b).is_empty() && push(c).is_empty());
    assert_eq!(push(d), ["text 👍"]);
    assert!(push(a).is_empty());
    assert_eq!(push(end), ["text \u{FFFD}", "special <|eot_id|>"]);
    assert!(push(a).is_empty());
    assert_eq!(push(byte(b'x')), ["text \u{FFFD}x"]);
    assert_eq!(push(d), ["text \u{FFFD}"]);
    assert!(push(b'!'.into()).len() == 1 && push(a).is_empty());
    assert_eq!(detokenizer.finish(), "\u{FFFD}");
    assert_eq!(llama3.detokenizer().finish(), "");
}

#[test]
fn sentence_pieces_keep_the_space_before_the_first_word() {
    for name in ["mistral", "llama2", "phi3"] {
        let subject = subject(name);
        let encoded = subject.encode("the agent 🫠 reads", true, &[]);
        assert_eq!(
            subject.decode(&encoded.ids),
            " the agent 🫠 reads",
            "{name}"
        );
    }
    let mistral = subject("mistral");
    let encoded = mistral.encode("the agent", false, &[]);
    assert_eq!(mistral.decode(&encoded.ids), "the agent");
}

#[test]
fn where_the_regex_engine_gives_up_pieces_still_encode_as_the_whole_does() {
    let json = edited(vocab::llama3(), |json| {
        // Takes a step back for each space of a run before it knows that no \u{1} follows.
        json["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = json!(r"\s+(?=\x01)|\S+");
    });
    for subject in [subject("qwen"), &Subject::new("hard", &json)] {
        let text = format!("a{}b<|eot_id|>c", " ".repeat(1_100_000));
        let ids = subject.encode(&text, true, &[]).ids;
        assert!(ids == subject.reference(&text) && subject.decode(&ids) == text);
    }
}

#[test]
fn the_fast_encoder_is_used_where_it_gives_the_same_tokens() {
    let uses = |name: &str| subject(name).ours.has_fast_encoder();
    assert!(["qwen", "llama3", "harmony"].into_iter().all(uses));
    let sim = include_bytes!("../../models/sim/tokenizer.json");
    assert!(Tokenizer::from_json(sim).unwrap().has_fast_encoder());
    // Marks that only the newer Unicode of the two has an order for.
    let marks = "\u{11370}\u{11d42}";
    let qwen = subject("qwen");
    assert_eq!(qwen.encode(marks, true, &[]).ids, qwen.reference(marks));
    // A regular expression that it reads in another way, or not at all, keeps it out.
    let words = edited(vocab::qwen(), |json| {
        json["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] =
            json!(r"(?=\p{L})\p{L}+?|\s+|.");
    });
    let words = Subject::new("words", &words);
    for text in ["The agent reads", "x  y\n\nz 123 é日本"] {
        assert_eq!(words.encode(text, true, &[]).ids, words.reference(text));
    }
}

#[test]
fn what_no_model_should_fail_on_costs_the_failing_character_only() {
    let mut llama3 = Subject::new("llama3", vocab::llama3());
    let broken = edited(vocab::llama3(), |json| {
        json["model"]["vocab"].as_object_mut().unwrap().remove("x");
        json["model"]["merges"] = json!([]);
        json["model"]["unk_token"] = json!("absent");
    });
    llama3.ours.hf = HfTokenizer::from_bytes(broken).unwrap();
    llama3.ours.fast = None;
    let encoded = llama3.encode("<|eot_id|>ab xx cdxé", true, &[]);
    assert_eq!(llama3.decode(&encoded.ids), "<|eot_id|>ab  cdé");
}

#[test]
fn a_trusted_literal_inside_an_untrusted_one_is_found() {
    let odd = subject("odd");
    let inner = odd.ours.token_id("><b").unwrap();
    let outer = odd.ours.token_id("<a><b>").unwrap();
    assert_eq!(odd.encode("<a><b>", true, &[]).ids, [outer]);
    let encoded = odd.encode("<a><b>", true, &[0]).ids;
    assert!(encoded.contains(&inner) && !encoded.contains(&outer));
}

#[test]
fn what_cannot_be_served_exactly_is_refused() {
    let refuse =
        |base: &[u8], edit: fn(&mut Value)| Tokenizer::from_json(&edited(base, edit)).unwrap_err();
    let qwen = vocab::qwen();
    assert!(matches!(
        Tokenizer::from_json(b"{}"),
        Err(TokenizerError::Malformed { .. })
    ));
    assert!(matches!(
        refuse(qwen, |json| json["truncation"] = json!({
            "direction": "Right", "max_length": 512, "strategy": "LongestFirst", "stride": 0,
        })),
        TokenizerError::Truncation
    ));
    assert!(matches!(
        refuse(qwen, |json| json["padding"] = json!({
            "strategy": "BatchLongest", "direction": "Right", "pad_to_multiple_of": null,
            "pad_id": 0, "pad_type_id": 0, "pad_token": "x",
        })),
        TokenizerError::Padding
    ));
    assert!(matches!(
        refuse(qwen, |json| json["model"]["dropout"] = json!(0.1)),
        TokenizerError::Random
    ));
    assert!(matches!(
        refuse(qwen, |json| json["added_tokens"][3]["single_word"] = json!(true)),
        TokenizerError::SingleWord { content } if content == "<tool_call>"
    ));
    assert!(matches!(
        refuse(qwen, |json| json["added_tokens"][3]["id"] = json!(5_000)),
        TokenizerError::Misnumbered {
            declared: 5_000,
            ..
        }
    ));
    assert!(matches!(
        refuse(qwen, |json| json["model"] = json!({
            "type": "WordLevel", "vocab": {"a": 0, "<unk>": 1}, "unk_token": "<unk>",
        })),
        TokenizerError::Model { kind: "WordLevel" }
    ));
    assert!(matches!(
        refuse(qwen, |json| json["decoder"] = Value::Null),
        TokenizerError::Decoder { kind } if kind == "none"
    ));
    assert!(matches!(
        refuse(qwen, |json| json["decoder"] = json!({"type": "BPEDecoder", "suffix": "</w>"})),
        TokenizerError::Decoder { kind } if kind == "BPEDecoder"
    ));
    assert!(matches!(
        refuse(vocab::mistral(), |json| {
            json["decoder"]["decoders"][3]["stop"] = json!(1);
        }),
        TokenizerError::Decoder { kind } if kind == "Strip"
    ));
    assert!(matches!(
        refuse(qwen, |json| {
            // A special token that is also a letter of the alphabet.
            add(json, &[("~", json!({"special": true}))]);
        }),
        TokenizerError::Forgeable { content } if content == "~"
    ));
}

#[test]
fn a_table_that_the_decoder_contradicts_is_refused() {
    // The decoder says byte-level, the vocabulary is made of pieces with bytes spelt out.
    let json = edited(vocab::mistral(), |json| {
        json["decoder"] = json!({"type": "Sequence", "decoders": [
            {"type": "Fuse"},
            {"type": "ByteFallback"},
        ]});
    });
    assert!(matches!(
        Tokenizer::from_json(&json),
        Err(TokenizerError::ProbeDecode { .. })
    ));
}

#[test]
fn one_vocabulary_serves_many_threads() {
    let shared = Arc::new(Tokenizer::from_json(vocab::llama3()).unwrap());
    let texts: Vec<String> = (0..4).map(|n| format!("<|eot_id|>{n} reads {n}")).collect();
    let ids: Vec<Vec<TokenId>> = std::thread::scope(|scope| {
        let threads: Vec<_> = texts
            .iter()
            .map(|text| {
                let shared = Arc::clone(&shared);
                scope.spawn(move || {
                    let mut out = Encoded::default();
                    shared.encode(text, false, &[], &mut out);
                    out.ids
                })
            })
            .collect();
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap())
            .collect()
    });
    for (text, ids) in texts.iter().zip(ids) {
        assert_eq!(ids, subject("llama3").reference(text));
    }
}

#[test]
fn the_simulated_model_has_a_servable_vocabulary() {
    let json = include_bytes!("../../models/sim/tokenizer.json");
    let sim = Tokenizer::from_json(json).unwrap();
    assert_eq!(sim.vocab_size(), 4_096);
    let config: Value =
        serde_json::from_str(include_str!("../../models/sim/tokenizer_config.json")).unwrap();
    let end = config["eos_token"].as_str().unwrap();
    assert!(sim.token_id(end).is_some_and(|id| sim.is_special(id)));
}
