//! Models that choose at random keep to every grammar, as the real parser reads them.

use std::collections::HashSet;

use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};

use serde_json::Value;

use super::*;
use crate::{
    backend::{
        SampleEnd, Sampling,
        lark::{SCHEMA_BYTES_MAX, SCHEMA_VALUES_MAX},
        local::sampler::{SampleError, Sampler},
    },
    parse::{Calls, Demand, Family, Markers, Parsed, ParserOptions, Piece},
    tokenizer::{DetokPiece, tests::vocab},
};

/// A family's format over a vocabulary.
struct Stage {
    family: Family,
    tokenizer: Tokenizer,
    parsing: ParserOptions,
    guides: Guides,
    end_tokens: Arc<[TokenId]>,
    /// Makes the tokens likelier that end free text, which would go on for ever.
    bias: Arc<[(TokenId, f32)]>,
}

const ENDS: [&str; 5] = ["<|im_end|>", "<|eot_id|>", "</s>", "<|return|>", "<|call|>"];

impl Stage {
    fn new(family: Family, vocabulary: &[u8]) -> Self {
        let tokenizer = Tokenizer::from_json(vocabulary).unwrap();
        let ids = |texts: &[&str]| -> Vec<TokenId> {
            texts
                .iter()
                .filter_map(|text| tokenizer.token_id(text))
                .collect()
        };
        let end_tokens: Arc<[TokenId]> = ids(&ENDS).into();
        let likelier = [
            "<tool_call>",
            "[TOOL_CALLS]",
            "</think>",
            "<|end|>",
            "<|channel|>",
        ];
        let bias = ids(&likelier).into_iter().chain(end_tokens.iter().copied());
        let contents = end_tokens.iter().filter_map(|id| tokenizer.added(*id));
        Self {
            parsing: ParserOptions {
                reasoning: true,
                in_reasoning: false,
                tools: Arc::new(["step", "step_two"].map(String::from).into()),
                markers_added: Markers::added(&|text| tokenizer.token_id(text).is_some()),
                end_tokens: Arc::new(contents.map(String::from).collect()),
            },
            guides: Guides::new(&tokenizer, &end_tokens).unwrap(),
            bias: bias.map(|id| (id, 4.0)).collect(),
            family,
            tokenizer,
            end_tokens,
        }
    }

    fn grammar(&self, demand: &Demand) -> Arc<Grammar> {
        Arc::new(self.family.grammar(&self.parsing, demand).unwrap())
    }

    /// What a model writes that knows nothing.
    fn walk(&self, grammar: &Arc<Grammar>, seed: u64, temperature: f32) -> Walk {
        let guide = self.guides.guide(&"one".into(), grammar).unwrap();
        let sampling = Sampling {
            seed: Some(seed),
            temperature,
            logit_bias: self.bias.clone(),
            end_tokens: self.end_tokens.clone(),
            ..Sampling::greedy(3000)
        };
        let mut sampler = Sampler::new(sampling, usize::MAX, Some(guide));
        let mut random = StdRng::seed_from_u64(seed);
        // More than the vocabulary has, as models are padded.
        let size = self.tokenizer.vocab_size() + 37;
        let mut tokens = Vec::new();
        loop {
            let logits: Vec<f32> = (0..size).map(|_| random.random_range(-3.0..3.0)).collect();
            let sampled = sampler.sample(&logits).unwrap();
            assert!((sampled.token as usize) < self.tokenizer.vocab_size());
            tokens.push(sampled.token);
            if let Some(end) = sampled.end {
                return Walk { tokens, end };
            }
        }
    }

    fn read(&self, tokens: &[TokenId]) -> Read {
        let mut parser = self.family.parser(self.parsing.clone());
        let mut detokenizer = self.tokenizer.detokenizer();
        let mut parsed = Vec::new();
        for id in tokens {
            for piece in detokenizer.push(*id) {
                let piece = match piece {
                    DetokPiece::Special(text) => Piece::Special(text),
                    DetokPiece::Text(text) => Piece::Text(text),
                };
                parser.push(piece, &mut parsed);
            }
        }
        assert!(detokenizer.is_whole(), "a character was left incomplete");
        parser.finish(&mut parsed);
        let mut read = Read::default();
        for event in parsed {
            match event {
                Parsed::Reasoning(_) => {}
                Parsed::Text(text) => read.text.push_str(&text),
                Parsed::CallBegin { name } => read.names.push(name),
                Parsed::CallArguments(_) => {}
                Parsed::CallEnd { arguments } => {
                    read.arguments.push(arguments);
                }
                Parsed::CallBroken { raw } => panic!("broken: {raw}"),
            }
        }
        assert_eq!(read.names.len(), read.arguments.len());
        read
    }
}

struct Walk {
    tokens: Vec<TokenId>,
    end: SampleEnd,
}

#[derive(Debug, Default)]
struct Read {
    text: String,
    names: Vec<String>,
    arguments: Vec<String>,
}

fn qwen() -> Stage {
    Stage::new(Family::Hermes, vocab::qwen())
}

/// All the ways in which calls are written.
fn stages() -> Vec<(&'static str, Stage)> {
    let mut spelled = qwen();
    spelled.parsing.markers_added = Markers::default();
    spelled.parsing.reasoning = false;
    let named = String::from_utf8(vocab::mistral().to_vec()).unwrap();
    let named = named.replace("[AVAILABLE_TOOLS]", "[ARGS]");
    vec![
        ("hermes", qwen()),
        ("hermes without added markers", spelled),
        ("llama3", Stage::new(Family::Llama3, vocab::llama3())),
        ("mistral", Stage::new(Family::Mistral, vocab::mistral())),
        (
            "mistral with names",
            Stage::new(Family::Mistral, named.as_bytes()),
        ),
        ("harmony", Stage::new(Family::Harmony, vocab::harmony())),
    ]
}

fn json(schema: &str) -> Demand {
    Demand {
        json: Some(schema.into()),
        calls: None,
    }
}

const STRICT: &str = r#"{
    "type": "object",
    "properties": {
        "unit": {"enum": ["celsius", "fahrenheit"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 14},
        "city": {"type": "string", "maxLength": 9}
    },
    "required": ["unit", "days"],
    "additionalProperties": false
}"#;

fn calls(required: bool, parallel: bool) -> Demand {
    Demand {
        json: None,
        calls: Some(Calls {
            tools: vec![
                ("step".into(), STRICT.into()),
                ("step_two".into(), r#"{"type": "object"}"#.into()),
            ],
            required,
            parallel,
        }),
    }
}

fn assert_valid(schema: &str, value: &Value) {
    let root: Value = serde_json::from_str(schema).unwrap();
    assert!(
        matches(&root, &root, value),
        "{value} does not match {schema}"
    );
}

/// Whether the value matches the schema, for what the schemas here use.
fn matches(root: &Value, schema: &Value, value: &Value) -> bool {
    let empty = serde_json::Map::new();
    let properties = schema["properties"].as_object().unwrap_or(&empty);
    let number = |key: &str| schema[key].as_f64();
    let at_least = |key: &str, of: f64| number(key).is_none_or(|bound| of >= bound);
    let at_most = |key: &str, of: f64| number(key).is_none_or(|bound| of <= bound);
    let keyword = |(key, expected): (&String, &Value)| match (&**key, value) {
        ("type", _) => match expected.as_array() {
            Some(types) => types.iter().any(|name| is_a(name, value)),
            None => is_a(expected, value),
        },
        ("enum", _) => expected.as_array().unwrap().contains(value),
        ("const", _) => expected == value,
        ("anyOf", _) => {
            let options = expected.as_array().unwrap();
            options.iter().any(|option| matches(root, option, value))
        }
        ("$ref", _) => {
            let pointer = expected.as_str().unwrap().strip_prefix('#').unwrap();
            matches(root, root.pointer(pointer).unwrap(), value)
        }
        ("minimum" | "maximum", Value::Number(number)) => {
            let number = number.as_f64().unwrap();
            at_least("minimum", number) && at_most("maximum", number)
        }
        ("exclusiveMaximum", Value::Number(number)) => number.as_f64() < expected.as_f64(),
        ("minLength" | "maxLength", Value::String(text)) => {
            let length = text.chars().count() as f64;
            at_least("minLength", length) && at_most("maxLength", length)
        }
        ("pattern", Value::String(text)) => regex::Regex::new(expected.as_str().unwrap())
            .unwrap()
            .is_match(text),
        ("format", Value::String(text)) => text.parse::<jiff::civil::Date>().is_ok(),
        ("minItems" | "maxItems", Value::Array(items)) => {
            let count = items.len() as f64;
            at_least("minItems", count) && at_most("maxItems", count)
        }
        ("items", Value::Array(items)) => items.iter().all(|item| matches(root, expected, item)),
        ("properties", Value::Object(members)) => members.iter().all(|(key, member)| {
            properties
                .get(key)
                .is_none_or(|schema| matches(root, schema, member))
        }),
        ("required", Value::Object(members)) => {
            let keys = expected.as_array().unwrap();
            keys.iter()
                .all(|key| members.contains_key(key.as_str().unwrap()))
        }
        ("additionalProperties", Value::Object(members)) => members.iter().all(|(key, member)| {
            properties.contains_key(key)
                || expected
                    .as_bool()
                    .unwrap_or_else(|| matches(root, expected, member))
        }),
        ("x-guidance" | "$defs", _) => true,
        (
            "minimum"
            | "maximum"
            | "exclusiveMaximum"
            | "minLength"
            | "maxLength"
            | "pattern"
            | "format"
            | "minItems"
            | "maxItems"
            | "items"
            | "properties"
            | "required"
            | "additionalProperties",
            _,
        ) => true,
        (unknown, _) => panic!("{unknown} is not known here"),
    };
    schema.as_object().unwrap().iter().all(keyword)
}

/// Whether it is a JSON object, numbers that are too large for any type included.
fn is_object(json: &str) -> bool {
    serde_json::from_str::<serde::de::IgnoredAny>(json).is_ok() && json.starts_with('{')
}

fn is_a(name: &Value, value: &Value) -> bool {
    match name.as_str().unwrap() {
        "null" => value.is_null(),
        "boolean" => value.is_boolean(),
        "integer" => value.is_i64() || value.is_u64(),
        "number" => value.is_number(),
        "string" => value.is_string(),
        "array" => value.is_array(),
        "object" => value.is_object(),
        unknown => panic!("{unknown} is no type"),
    }
}

#[test]
fn text_keeps_to_its_schema() {
    let schemas = [
        STRICT,
        r#"{"type": "object", "properties": {"a": {"type": "object", "properties": {
            "b": {"type": "array", "minItems": 2, "maxItems": 4, "items": {"type": "boolean"}},
            "c": {"type": ["null", "integer"], "minimum": -9, "maximum": 9}},
            "required": ["b", "c"], "additionalProperties": false}},
            "required": ["a"], "additionalProperties": false}"#,
        r#"{"type": "array", "minItems": 1, "maxItems": 3, "items": {
            "type": "string", "pattern": "^[a-c]{2,5}-\\d$"}}"#,
        r#"{"type": "object", "properties": {"date": {"type": "string", "format": "date"},
            "n": {"type": "number", "minimum": 0, "exclusiveMaximum": 1}}, "required": ["date"],
            "additionalProperties": {"type": "null"}, "x-guidance": {"lenient": true}}"#,
        r##"{"$defs": {"tree": {"type": "object", "properties": {"value": {"const": 7},
            "left": {"$ref": "#/$defs/tree"}}, "required": ["value"], "additionalProperties": false}},
            "$ref": "#/$defs/tree"}"##,
        r#"{"anyOf": [{"type": "object", "properties": {"kind": {"const": "a"}}, "required": ["kind"],
            "additionalProperties": false}, {"type": "string", "minLength": 3, "maxLength": 6}]}"#,
    ];
    let stage = qwen();
    for schema in schemas {
        let grammar = stage.grammar(&json(schema));
        for seed in 0..12 {
            let walk = stage.walk(&grammar, seed, [0.0, 0.5, 1.0, 2.0][seed as usize % 4]);
            if walk.end == SampleEnd::Length {
                // Reasoning alone has no end of its own.
                continue;
            }
            let read = stage.read(&walk.tokens);
            let value = serde_json::from_str(&read.text).unwrap();
            assert_valid(schema, &value);
            assert_eq!(read.names, Vec::<String>::new());
        }
    }
}

#[test]
fn any_object_is_one() {
    let stage = qwen();
    let grammar = stage.grammar(&json(r#"{"type": "object"}"#));
    let mut whole = 0;
    for seed in 0..20 {
        let walk = stage.walk(&grammar, seed, 1.0);
        if walk.end == SampleEnd::Stop {
            whole += 1;
            let text = stage.read(&walk.tokens).text;
            assert!(is_object(&text), "{text}");
        }
    }
    assert!(whole > 10, "{whole}");
}

#[test]
fn calls_keep_to_their_schemas_in_every_family() {
    for (name, stage) in stages() {
        for (required, parallel) in [(false, true), (false, false), (true, true), (true, false)] {
            let grammar = stage.grammar(&calls(required, parallel));
            let (mut whole, mut called, mut several) = (0, 0, 0);
            for seed in 0..16 {
                let walk = stage.walk(&grammar, seed, 1.0);
                if walk.end == SampleEnd::Length {
                    continue;
                }
                whole += 1;
                let read = stage.read(&walk.tokens);
                for (tool, arguments) in read.names.iter().zip(&read.arguments) {
                    match &**tool {
                        "step" => assert_valid(STRICT, &serde_json::from_str(arguments).unwrap()),
                        other => {
                            assert_eq!(other, "step_two");
                            assert!(is_object(arguments), "{arguments}");
                        }
                    }
                }
                called += usize::from(!read.names.is_empty());
                several += usize::from(read.names.len() > 1);
                if required {
                    assert!(!read.names.is_empty(), "{name}: {read:?}");
                    assert_eq!(read.text, "", "{name}");
                }
                if !parallel || stage.family == Family::Harmony {
                    assert!(read.names.len() <= 1, "{name}: {read:?}");
                }
            }
            let case = format!("{name}, {required}, {parallel}: {whole}, {called}, {several}");
            // Nobody spells by chance what opens a call and is no token of its own.
            let spells = !required && ["hermes without added markers", "llama3"].contains(&name);
            assert!(whole >= 8 && (called > 0 || spells), "{case}");
        }
    }
}

#[test]
fn a_spelled_marker_opens_a_call_too() {
    let (_, stage) = stages().swap_remove(1);
    let grammar = stage.grammar(&calls(false, true));
    let ids = |text: &str| -> Vec<TokenId> {
        let all = 0..stage.tokenizer.vocab_size() as TokenId;
        let of = |byte| {
            all.clone()
                .find(|id| stage.tokenizer.bytes_of(*id) == [byte])
        };
        text.bytes().map(|byte| of(byte).unwrap()).collect()
    };
    for (text, kept) in [
        ("see <tool_call and > {\"name\": \"other", true),
        ("see <tool_call>\n{\"name\": \"step", true),
        ("see <tool_call>\n{\"name\": \"other", false),
        (
            "see <tool_call>\n{\"name\": \"step\", \"arguments\": {\"unit\": \"c",
            true,
        ),
        (
            "see <tool_call>\n{\"name\": \"step\", \"arguments\": {\"unit\": \"x",
            false,
        ),
    ] {
        let mut guide = stage.guides.guide(&"one".into(), &grammar).unwrap();
        let keeps = ids(text).into_iter().all(|id| {
            let mut logits = vec![0.0; stage.tokenizer.vocab_size()];
            guide.mask(&mut logits).unwrap();
            logits[id as usize].is_finite() && guide.advance(id).is_ok()
        });
        assert_eq!(keeps, kept, "{text}");
    }
}

#[test]
fn json_may_stand_in_place_of_calls() {
    for (name, stage) in stages() {
        let demand = Demand {
            json: Some(STRICT.into()),
            ..calls(false, true)
        };
        let grammar = match stage.family.grammar(&stage.parsing, &demand) {
            Ok(grammar) => Arc::new(grammar),
            Err(error) => {
                assert!(
                    ["llama3", "hermes without added markers"].contains(&name),
                    "{error}"
                );
                continue;
            }
        };
        let mut seen = HashSet::new();
        for seed in 0..16 {
            let walk = stage.walk(&grammar, seed, 1.0);
            if walk.end == SampleEnd::Stop {
                let read = stage.read(&walk.tokens);
                if read.names.is_empty() {
                    assert_valid(STRICT, &serde_json::from_str(&read.text).unwrap());
                } else {
                    assert_eq!(read.text, "");
                }
                seen.insert(read.names.is_empty());
            }
        }
        assert_eq!(seen.len(), 2, "{name}");
    }
}

#[test]
fn reasoning_stays_free_and_may_have_been_opened() {
    let mut stage = qwen();
    stage.parsing.in_reasoning = true;
    let grammar = stage.grammar(&json(r#"{"const": 1}"#));
    let end = stage.tokenizer.token_id("</think>").unwrap();
    let mut thought = 0;
    for seed in 0..8 {
        let walk = stage.walk(&grammar, seed, 1.0);
        assert_eq!(walk.end, SampleEnd::Stop);
        thought += walk.tokens.iter().position(|id| *id == end).unwrap();
        assert_eq!(stage.read(&walk.tokens).text, "1");
    }
    assert!(thought > 8, "{thought}");
}

/// The mask against the grammar's own meaning, for every token of the vocabulary.
#[test]
fn the_mask_is_exact() {
    let stage = qwen();
    let grammar = Arc::new(Grammar::Either(vec![
        Grammar::Text("the agent".into()),
        Grammar::Text("then {".into()),
        Grammar::Each(vec![
            Grammar::Token("<tool_call>"),
            Grammar::Text("x".into()),
        ]),
    ]));
    let may_follow = |before: &str, id: TokenId| {
        let special = stage.tokenizer.is_control(id);
        let text = String::from_utf8_lossy(stage.tokenizer.bytes_of(id)).into_owned();
        let whole = format!("{before}{text}");
        let ends = stage.end_tokens.contains(&id);
        if ends {
            ["the agent", "then {", "<tool_call>x"].contains(&before)
        } else if special {
            before.is_empty() && text == "<tool_call>"
        } else {
            let spelled = ["the agent", "then {"]
                .iter()
                .any(|all| all.starts_with(&whole));
            !text.is_empty() && (spelled || (before == "<tool_call>" && text == "x"))
        }
    };
    for seed in 0..30 {
        let mut guide = stage.guides.guide(&"one".into(), &grammar).unwrap();
        let mut random = StdRng::seed_from_u64(seed);
        let mut before = String::new();
        loop {
            let mut logits = vec![0.0; stage.tokenizer.vocab_size()];
            guide.mask(&mut logits).unwrap();
            let allowed: Vec<TokenId> = (0..)
                .zip(&logits)
                .filter_map(|(id, logit)| logit.is_finite().then_some(id))
                .collect();
            let all = 0..stage.tokenizer.vocab_size() as TokenId;
            let expected: Vec<TokenId> = all.filter(|id| may_follow(&before, *id)).collect();
            assert_eq!(allowed, expected, "{before:?}");
            let next = allowed[random.random_range(0..allowed.len())];
            if stage.end_tokens.contains(&next) {
                break;
            }
            before.push_str(&String::from_utf8_lossy(stage.tokenizer.bytes_of(next)));
            guide.advance(next).unwrap();
        }
    }
}

#[test]
fn nothing_allows_what_the_grammar_forbids() {
    let stage = qwen();
    let guide = stage
        .guides
        .guide(&"one".into(), &Arc::new(Grammar::Text("a".into())));
    let id = |bytes: &[u8]| {
        let all = 0..stage.tokenizer.vocab_size() as TokenId;
        all.into_iter()
            .find(|id| stage.tokenizer.bytes_of(*id) == bytes)
            .unwrap()
    };
    let (a, b) = (id(b"a"), id(b"b"));
    let sampling = Sampling {
        logit_bias: [(a, -100.0), (b, 100.0)].into(),
        top_logprobs: Some(1),
        end_tokens: stage.end_tokens.clone(),
        ..Sampling::greedy(9)
    };
    let mut sampler = Sampler::new(sampling, 9, Some(guide.unwrap()));
    let mut logits = vec![0.0; stage.tokenizer.vocab_size()];
    logits[b as usize] = 50.0;
    let first = sampler.sample(&logits).unwrap();
    assert_eq!((first.token, first.end), (a, None));
    // What the model thinks of it is told as it is.
    let logprob = first.logprob.unwrap();
    assert_eq!(logprob.top[0].0, b);
    assert!(logprob.logprob < -40.0);
    assert_eq!(sampler.sample(&logits).unwrap().end, Some(SampleEnd::Stop));
    // A model that is sure against all that is allowed fails.
    let guide = stage
        .guides
        .guide(&"one".into(), &Arc::new(Grammar::Text("a".into())));
    let mut sampler = Sampler::new(Sampling::greedy(9), 9, Some(guide.unwrap()));
    logits[a as usize] = f32::NEG_INFINITY;
    assert_eq!(sampler.sample(&logits), Err(SampleError::BadLogits));
}

#[test]
fn what_cannot_be_kept_to_is_refused_with_its_schema() {
    let stage = qwen();
    let many = format!(r#"{{"enum": [{}1]}}"#, "1,".repeat(SCHEMA_VALUES_MAX));
    let long = format!(r#"{{"title": "{}"}}"#, "x".repeat(SCHEMA_BYTES_MAX));
    for (schema, reason) in [
        (
            r#"{"not": {"type": "string"}}"#,
            "Unimplemented keys: [\"not\"]",
        ),
        (
            r#"{"type": "string", "format": "no-such"}"#,
            "Unknown format: no-such",
        ),
        (r#"{"type": "nothing"}"#, "Invalid type: nothing"),
        (
            r#"{"not": {}, "x-guidance": {"lenient": true}}"#,
            "Unimplemented keys: [\"not\"]",
        ),
        (many.as_str(), "it has more than 2000 values"),
        (long.as_str(), "it has more than 262144 bytes"),
    ] {
        let demand = Demand {
            json: Some(schema.into()),
            ..calls(false, true)
        };
        let grammar = stage.grammar(&demand);
        let refused = stage.guides.check(&"one".into(), &grammar).unwrap_err();
        assert_eq!(refused.reason, reason);
        assert_eq!(refused.schema.as_deref(), Some(schema));
    }
    let ending = Arc::new(Grammar::Token("<|im_end|>"));
    let refused = stage.guides.check(&"one".into(), &ending).unwrap_err();
    assert_eq!(refused.reason, "the marker <|im_end|> ends an answer");
}

/// Schemas made to break a compiler are kept to or refused; they neither take the program with
/// them nor more than seconds.
#[test]
fn hostile_schemas_do_no_harm() {
    let stage = qwen();
    let properties = (0..SCHEMA_VALUES_MAX - 3).map(|n| format!(r#""p{n}": {{}}"#));
    let properties: Vec<String> = properties.collect();
    let nested = |open: &str, close: &str, depth: usize| {
        format!("{}{{}}{}", open.repeat(depth), close.repeat(depth))
    };
    let wide = format!(
        r#"{{"type": "object", "properties": {{{}}}}}"#,
        properties.join(",")
    );
    for (kept, schema) in [
        (true, r##"{"$ref": "#"}"##),
        (true, r##"{"allOf": [{"$ref": "#"}]}"##),
        (true, r##"{"anyOf": [{"$ref": "#"}, {"$ref": "#"}]}"##),
        (false, r##"{"allOf": [{"$ref": "#"}], "type": "object"}"##),
        (false, r#"{"$ref": "https://example.org/schema"}"#),
        (true, r#"{"type": "array", "minItems": 4000000000}"#),
        (true, r#"{"type": "array", "maxItems": 4000000000}"#),
        (true, r#"{"type": "string", "minLength": 4000000000}"#),
        (
            true,
            r#"{"type": "string", "pattern": "((a{1,1000}){1,1000}){9}"}"#,
        ),
        (true, r#"{"type": "string", "pattern": "(.*a){200}"}"#),
        (false, r#"{"type": "string", "pattern": "(?=a)b"}"#),
        (false, r#"{"type": "integer", "multipleOf": 1e-300}"#),
        (true, &wide),
        (true, &nested(r#"{"items": "#, "}", 120)),
        (true, &nested(r#"{"properties": {"a": "#, "}}", 60)),
        (
            true,
            &nested(r#"{"allOf": [{"required": ["a"]}, "#, "]}", 60),
        ),
        (false, "{\"title\": \"\u{e9}\", \"type\": {\"\u{e9}\": 1}}"),
    ] as [(bool, &str); 17]
    {
        let start = std::time::Instant::now();
        let grammar = stage.grammar(&json(schema));
        let checked = stage.guides.check(&"one".into(), &grammar);
        let took = start.elapsed();
        let shown = &schema[..schema.floor_char_boundary(60)];
        let checked = checked.map_err(|error| error.reason);
        assert_eq!(checked.is_ok(), kept, "{shown}: {checked:?}");
        assert!(took.as_secs() < 20, "{took:?}: {shown}");
    }
}

#[test]
fn a_grammar_is_compiled_once_for_a_tenant() {
    let stage = qwen();
    let of = || stage.grammar(&calls(true, true));
    let get = |tenant: &str| stage.guides.get(&tenant.into(), &of()).unwrap();
    assert!(Arc::ptr_eq(&get("one"), &get("one")));
    assert!(!Arc::ptr_eq(&get("one"), &get("two")));
}
