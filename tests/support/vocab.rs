//! Small vocabularies in the style of well-known model families, trained when first asked for.
//!
//! They have the families' pre-tokenisers, normalisers, decoders and added tokens, on a corpus
//! written for this purpose. Training is deterministic: the same bytes every time.

#![allow(
    dead_code,
    unreachable_pub,
    clippy::expect_used,
    reason = "shared by unit tests, integration tests and examples, none of which uses all of it"
)]

use std::collections::HashSet;
use std::sync::OnceLock;

use serde_json::{Value, json};
use tokenizers::models::TrainerWrapper;
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::{NormalizerWrapper, PreTokenizerWrapper, Tokenizer};

/// ChatML's tokens as Qwen has them; those after the third are markup, not special.
const CHATML: [(&str, bool); 9] = [
    ("<|endoftext|>", true),
    ("<|im_start|>", true),
    ("<|im_end|>", true),
    ("<tool_call>", false),
    ("</tool_call>", false),
    ("<tool_response>", false),
    ("</tool_response>", false),
    ("<think>", false),
    ("</think>", false),
];

const GPT4_REGEX: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const O200K_REGEX: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// How a byte-level vocabulary departs from the plainest one.
#[derive(Debug, Clone, Copy)]
pub struct ByteLevel<'a> {
    /// What the pre-tokeniser splits by.
    pub regex: &'a str,
    /// Whether text is brought to NFC first.
    pub nfc: bool,
    /// Whether a word that is a token is taken whole, whatever the merges say.
    pub ignore_merges: bool,
    /// Added tokens, and whether each is special; they get the highest ids.
    pub added: &'a [(&'a str, bool)],
    /// Tokens without the added ones.
    pub vocab_size: usize,
}

/// Qwen's style: NFC, digits one by one, ChatML.
pub fn qwen() -> &'static [u8] {
    static JSON: OnceLock<Vec<u8>> = OnceLock::new();
    JSON.get_or_init(|| qwen_over(&[CORPUS], 900))
}

/// Qwen's style over another corpus.
pub fn qwen_over(corpus: &[&str], vocab_size: usize) -> Vec<u8> {
    let style = ByteLevel {
        regex: &GPT4_REGEX.replace("{1,3}", ""),
        nfc: true,
        ignore_merges: false,
        added: &CHATML,
        vocab_size,
    };
    byte_level(corpus, style)
}

/// Llama 3's style: no normaliser, whole words before merges.
pub fn llama3() -> &'static [u8] {
    static JSON: OnceLock<Vec<u8>> = OnceLock::new();
    JSON.get_or_init(|| {
        let added = [
            ("<|begin_of_text|>", true),
            ("<|end_of_text|>", true),
            ("<|start_header_id|>", true),
            ("<|end_header_id|>", true),
            ("<|eom_id|>", true),
            ("<|eot_id|>", true),
            ("<|python_tag|>", true),
        ];
        let style = ByteLevel {
            regex: GPT4_REGEX,
            nfc: false,
            ignore_merges: true,
            added: &added,
            vocab_size: 900,
        };
        byte_level(&[CORPUS], style)
    })
}

/// The style of gpt-oss: o200k's regex, harmony's tokens.
pub fn harmony() -> &'static [u8] {
    static JSON: OnceLock<Vec<u8>> = OnceLock::new();
    JSON.get_or_init(|| {
        let added = [
            ("<|startoftext|>", true),
            ("<|endoftext|>", true),
            ("<|return|>", true),
            ("<|constrain|>", true),
            ("<|channel|>", true),
            ("<|start|>", true),
            ("<|end|>", true),
            ("<|message|>", true),
            ("<|call|>", true),
        ];
        let style = ByteLevel {
            regex: O200K_REGEX,
            nfc: false,
            ignore_merges: false,
            added: &added,
            vocab_size: 900,
        };
        byte_level(&[CORPUS], style)
    })
}

/// Mistral's style: SentencePiece, a space only before the prompt's first word, bytes for unknown
/// characters. The corpus mentions `[INST]` so often that the model can spell it itself.
pub fn mistral() -> &'static [u8] {
    static JSON: OnceLock<Vec<u8>> = OnceLock::new();
    JSON.get_or_init(|| {
        let added = [
            "<unk>",
            "<s>",
            "</s>",
            "[INST]",
            "[/INST]",
            "[TOOL_CALLS]",
            "[AVAILABLE_TOOLS]",
            "[/AVAILABLE_TOOLS]",
            "[TOOL_RESULTS]",
            "[/TOOL_RESULTS]",
        ];
        let mut json = sentence_piece(&added);
        json["pre_tokenizer"] = json!({
            "type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": false,
        });
        bytes(&json)
    })
}

/// Llama 2's style: SentencePiece by normaliser, so that a space stands before each piece.
pub fn llama2() -> &'static [u8] {
    static JSON: OnceLock<Vec<u8>> = OnceLock::new();
    JSON.get_or_init(|| bytes(&legacy(&["<unk>", "<s>", "</s>"])))
}

/// Phi 3's style: Llama 2's, with tokens that swallow the white space after them.
pub fn phi3() -> &'static [u8] {
    static JSON: OnceLock<Vec<u8>> = OnceLock::new();
    JSON.get_or_init(|| {
        let added = [
            "<unk>",
            "<s>",
            "</s>",
            "<|endoftext|>",
            "<|assistant|>",
            "<|system|>",
            "<|end|>",
            "<|user|>",
        ];
        let mut json = legacy(&added);
        for token in json["added_tokens"].as_array_mut().expect("a list") {
            let content = token["content"].as_str().expect("a string");
            token["rstrip"] = Value::Bool(content == "</s>" || content.starts_with("<|"));
        }
        bytes(&json)
    })
}

/// Gemma's style: pieces by normaliser, runs of white space and markup among the added tokens.
pub fn gemma() -> &'static [u8] {
    static JSON: OnceLock<Vec<u8>> = OnceLock::new();
    JSON.get_or_init(|| {
        let added = [
            "<pad>",
            "<eos>",
            "<bos>",
            "<unk>",
            "<start_of_turn>",
            "<end_of_turn>",
            "\n\n",
            "▁▁",
            "▁▁▁▁",
            "<table>",
            "</table>",
        ];
        let mut json = sentence_piece(&added);
        json["normalizer"] = json!({"type": "Replace", "pattern": {"String": " "}, "content": "▁"});
        json["pre_tokenizer"] = json!({
            "type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious",
            "invert": false,
        });
        json["decoder"]["decoders"]
            .as_array_mut()
            .expect("a list")
            .truncate(3);
        for token in json["added_tokens"].as_array_mut().expect("a list") {
            let id = token["id"].as_u64().expect("a number");
            token["special"] = Value::Bool(id < 6);
        }
        // The model makes the runs of spaces itself, since it sees them as pieces.
        let merges = json["model"]["merges"].as_array_mut().expect("a list");
        merges.splice(0..0, [json!(["▁", "▁"]), json!(["▁▁", "▁▁"])]);
        bytes(&json)
    })
}

/// DeepSeek's style: byte-level, an empty normaliser, tokens called normalised and beyond ASCII.
pub fn deepseek() -> &'static [u8] {
    static JSON: OnceLock<Vec<u8>> = OnceLock::new();
    JSON.get_or_init(|| {
        let added = [
            ("<｜begin▁of▁sentence｜>", true),
            ("<｜end▁of▁sentence｜>", true),
            ("<｜User｜>", false),
            ("<｜Assistant｜>", false),
            ("<｜tool▁calls▁begin｜>", false),
            ("<｜tool▁calls▁end｜>", false),
            ("<think>", false),
            ("</think>", false),
        ];
        let style = ByteLevel {
            regex: GPT4_REGEX,
            nfc: false,
            ignore_merges: false,
            added: &added,
            vocab_size: 900,
        };
        let mut json: Value =
            serde_json::from_slice(&byte_level(&[CORPUS], style)).expect("what was just written");
        json["normalizer"] = json!({"type": "Sequence", "normalizers": []});
        for token in json["added_tokens"].as_array_mut().expect("a list") {
            let content = token["content"].as_str().expect("a string");
            token["normalized"] = Value::Bool(content.starts_with("<｜"));
        }
        bytes(&json)
    })
}

/// All of the above by name.
pub fn all() -> [(&'static str, &'static [u8]); 8] {
    [
        ("qwen", qwen()),
        ("llama3", llama3()),
        ("harmony", harmony()),
        ("mistral", mistral()),
        ("llama2", llama2()),
        ("phi3", phi3()),
        ("gemma", gemma()),
        ("deepseek", deepseek()),
    ]
}

/// Trains a byte-level vocabulary.
pub fn byte_level(corpus: &[&str], style: ByteLevel<'_>) -> Vec<u8> {
    let normalizer = if style.nfc {
        json!({"type": "NFC"})
    } else {
        Value::Null
    };
    let byte_level = json!({
        "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false,
    });
    let split = json!({
        "type": "Split", "pattern": {"Regex": style.regex}, "behavior": "Isolated", "invert": false,
    });
    let pre_tokenizer = json!({"type": "Sequence", "pretokenizers": [split, byte_level]});
    let alphabet = tokenizers::pre_tokenizers::byte_level::ByteLevel::alphabet();
    let trainer = BpeTrainer::builder()
        .show_progress(false)
        .vocab_size(style.vocab_size)
        .min_frequency(2)
        .initial_alphabet(alphabet.into_iter().collect())
        .build();
    let mut json = train(trainer, corpus, &normalizer, &pre_tokenizer);
    let size = json["model"]["vocab"].as_object().expect("a map").len();
    json["model"]["ignore_merges"] = style.ignore_merges.into();
    json["decoder"] = byte_level;
    json["added_tokens"] = (size..)
        .zip(style.added)
        .map(|(id, &(content, special))| added_token(id, content, special))
        .collect();
    bytes(&json)
}

/// SentencePiece by normaliser instead of pre-tokeniser.
fn legacy(added: &[&str]) -> Value {
    let mut json = sentence_piece(added);
    json["normalizer"] = json!({"type": "Sequence", "normalizers": [
        {"type": "Prepend", "prepend": "▁"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
    ]});
    json["pre_tokenizer"] = Value::Null;
    json
}

/// A vocabulary of pieces, which begins with `added` and then all bytes.
fn sentence_piece(added: &[&str]) -> Value {
    let of_bytes = (0..=255_u8).map(|byte| format!("<0x{byte:02X}>"));
    let reserved = added
        .iter()
        .map(|&content| content.to_owned())
        .chain(of_bytes);
    let trainer = BpeTrainer::builder()
        .show_progress(false)
        .vocab_size(1_000)
        .min_frequency(2)
        .limit_alphabet(120)
        .initial_alphabet(('!'..='~').collect::<HashSet<char>>())
        .special_tokens(
            reserved
                .map(|content| tokenizers::AddedToken::from(content, true))
                .collect(),
        )
        .build();
    // Trained word by word, which is quick; used on whole pieces, as these models do.
    let words = json!({
        "type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": true,
    });
    let mut json = train(trainer, &[CORPUS], &Value::Null, &words);
    json["model"]["unk_token"] = "<unk>".into();
    json["model"]["byte_fallback"] = true.into();
    json["model"]["fuse_unk"] = true.into();
    json["decoder"] = json!({"type": "Sequence", "decoders": [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ]});
    json["added_tokens"] = (0..)
        .zip(added)
        .map(|(id, content)| added_token(id, content, true))
        .collect();
    json
}

fn added_token(id: usize, content: &str, special: bool) -> Value {
    json!({
        "id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
        "normalized": false, "special": special,
    })
}

fn train(trainer: BpeTrainer, corpus: &[&str], normalizer: &Value, pre_tokenizer: &Value) -> Value {
    let read = "a component that the crate can read";
    let normalizer: Option<NormalizerWrapper> =
        serde_json::from_value(normalizer.clone()).expect(read);
    let pre_tokenizer: Option<PreTokenizerWrapper> =
        serde_json::from_value(pre_tokenizer.clone()).expect(read);
    let mut tokenizer = Tokenizer::new(BPE::default());
    tokenizer
        .with_normalizer(normalizer)
        .expect("no added tokens that it could fail on")
        .with_pre_tokenizer(pre_tokenizer);
    let mut trainer: TrainerWrapper = trainer.into();
    tokenizer
        .train(&mut trainer, corpus.iter())
        .expect("a corpus that can be trained on");
    serde_json::to_value(&tokenizer).expect("a tokenizer that can be written")
}

fn bytes(json: &Value) -> Vec<u8> {
    serde_json::to_vec(json).expect("a value that can be written")
}

/// Prose, JSON, code and several scripts.
pub const CORPUS: &str = r##"
The agent reads the file, thinks about it, and calls a tool. The tool returns a result, and the agent
reads the result. Then the agent calls another tool, and so on, until the work is done. Each step costs
only what is new in it: the text that was there before has been read before, and the tokens that were
there before are still there. That is what this service is for. It is not for the first step, which costs
what it always did; it is for the hundredth, which costs as little as the second.
When the model writes that it wants to run the tests, the client runs the tests and sends what they said.
When the tests fail, the model reads the message, changes a line, and wants to run them again. It's the
same loop every time; they've seen it before, we'll see it again, and you're seeing it now. I'd say it
doesn't matter whether the answer is long or short, what matters is where the next one begins.
[INST] What is the weather in Paris? [/INST] It is sunny. [INST] And in London? [/INST] It is raining.
[INST] Write a poem. [/INST] No. [INST] Why not? [/INST] Because. [INST] Please? [/INST] Well then.
[INST]x[/INST]y[INST]x[/INST]y[INST]x[/INST]y[INST]x[/INST]y[INST]x[/INST]y[INST]x[/INST]y</s></s></s>
{"name": "get_weather", "arguments": {"city": "Paris", "unit": "celsius"}}
{"name": "get_weather", "arguments": {"city": "London", "unit": "celsius"}}
{"name": "read_file", "arguments": {"path": "src/main.rs", "start_line": 1, "end_line": 100}}
{"name": "run_command", "arguments": {"command": "cargo test", "timeout_secs": 60}}
{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi! How can I help you today?"}
{"role": "tool", "content": "{\"temperature\": 21.5, \"sunny\": true, \"wind\": null}"}
{"type": "object", "properties": {"city": {"type": "string", "description": "The city"}}, "required": ["city"]}
pub fn encode(&self, text: &str, out: &mut Vec<u32>) -> Result<(), Error> {
    let mut start = 0;
    for (index, piece) in self.pieces(text).enumerate() {
        if piece.is_empty() {
            continue;
        }
        out.extend(self.model.tokenize(piece)?.iter().map(|token| token.id));
        start += piece.len();
    }
    Ok(())
}

def main(argv: list[str]) -> int:
    """Reads a file and prints its lines."""
    with open(argv[1], encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if line.startswith("#") or not line.strip():
                continue
            print(f"{number:>6}  {line.rstrip()}")
    return 0

if __name__ == "__main__":
    raise SystemExit(main(sys.argv))

fn main() {
    println!("{}", (1..=10).map(|n| n * n).sum::<u32>());
}
# A title
## A second title
- one item, two items, three items
- https://example.org/path?query=value&other=1
1, 2, 3, 10, 20, 100, 1000, 2024, 2025, 2026, 3.14159, -1, 0x1F, 1e-9
Der Agent liest die Datei und ruft ein Werkzeug auf. Das Ergebnis ist größer als erwartet, und die Straße
ist länger. Für jeden Schritt zahlt man nur, was neu ist; das Übrige wurde schon gelesen.
L'agent lit le fichier, puis il appelle un outil. Le résultat est déjà là, où l'on ne l'attendait pas. Ça
ne coûte que ce qui est nouveau à chaque étape. Où êtes-vous allés cet été ? À la plage, peut-être.
El agente lee el archivo y llama a una herramienta. ¿Qué más? Mañana será otro día, señor.
Агент читает файл и вызывает инструмент. Результат читается, и всё начинается снова. Каждый шаг стоит
только того, что в нём нового. Это было прочитано раньше, и это будет прочитано потом.
代理读取文件并调用工具。工具返回结果,代理读取结果。每一步只需要新的内容。今天天气很好,我们去公园吧。
模型写出它想要运行测试,客户端运行测试并返回结果。文件,工具,结果,模型,测试,文件,工具,结果。
エージェントはファイルを読み、ツールを呼び出します。結果を読みます。これは新しいものだけです。
에이전트는 파일을 읽고 도구를 호출합니다. 결과를 읽습니다. 새로운 것만 비용이 듭니다.
الوكيل يقرأ الملف ويستدعي الأداة. ثم يقرأ النتيجة. كل خطوة تكلف ما هو جديد فقط.
एजेंट फ़ाइल पढ़ता है और एक उपकरण बुलाता है। फिर वह परिणाम पढ़ता है।
👍 👍 😀 😀 🎉 🎉 ❤️ ❤️ 👨‍👩‍👧 👍🏽 → ← ≤ ≥ ≠ × ÷ € £ ° § … – — “quoted” ‘single’
"##;
