//! What a vocabulary must get right before it is served.

use tokenizers::Tokenizer as HfTokenizer;

use super::{AddedToken, Encoded, TokenId, Tokenizer, TokenizerError, detok};

/// So many added tokens are tried in every neighbourhood; the rest are reserved ones, all alike.
const ADDED_TOKENS_PROBED_MAX: usize = 64;
const RANDOM_SEQUENCES: usize = 300;

/// Checks that encoding by pieces, decoding by table and guarding do what they promise.
pub(super) fn check(tokenizer: &Tokenizer) -> Result<(), TokenizerError> {
    let mut sequences = Vec::new();
    for (text, probe) in texts(&tokenizer.added).iter().enumerate() {
        let whole = tokenizer
            .hf
            .encode_fast(probe.as_str(), false)
            .map_err(|_| TokenizerError::ProbeEncode { text })?;
        let ids = whole.get_ids();
        if encode_whole(tokenizer, probe) != ids || encode_cut(tokenizer, probe) != ids {
            return Err(TokenizerError::ProbeEncode { text });
        }
        sequences.push(ids.to_vec());
    }
    check_decoding(tokenizer, sequences)?;
    check_guard(tokenizer)
}

fn encode_whole(tokenizer: &Tokenizer, text: &str) -> Vec<TokenId> {
    let mut whole = Encoded::default();
    tokenizer.encode(text, true, &[], &mut whole);
    whole.ids
}

/// Encodes the parts between all cuts, each on its own.
fn encode_cut(tokenizer: &Tokenizer, text: &str) -> Vec<TokenId> {
    let mut whole = Encoded::default();
    tokenizer.encode(text, true, &[], &mut whole);
    let mut ends: Vec<usize> = whole.cuts.iter().map(|cut| cut.byte).collect();
    ends.push(text.len());
    let mut parts = Encoded::default();
    let mut start = 0;
    for end in ends {
        tokenizer.encode(&text[start..end], start == 0, &[], &mut parts);
        start = end;
    }
    parts.ids
}

/// Compares table and decoder, on what the probe texts encode to and on random tokens.
fn check_decoding(
    tokenizer: &Tokenizer,
    mut sequences: Vec<Vec<TokenId>>,
) -> Result<(), TokenizerError> {
    // Where the decoder turns an added token's content into something else, ours is the content.
    let differs = |id: TokenId| {
        tokenizer.added_token(id).is_some_and(|token| {
            detok::reads_as_bytes(&token.content)
                || token.control && token.content.contains('\u{2581}')
                || token.pattern != token.content
        })
    };
    let byte_level = is_byte_level(&tokenizer.hf);
    // Of invalid byte tokens the decoder makes one U+FFFD each, as many as the run is long.
    let odd_byte = |id: TokenId| {
        !byte_level
            && tokenizer.bytes_of(id).first() > Some(&0x7F)
            && std::str::from_utf8(tokenizer.bytes_of(id)).is_err()
    };
    let mut random = SplitMix(0x686F_746C_6F6F_7021);
    let size = tokenizer.vocab_size().max(1) as u64;
    for _ in 0..RANDOM_SEQUENCES {
        let length = 1 + random.next() % 24;
        let ids = (0..length).map(|_| (random.next() % size) as TokenId);
        sequences.push(ids.filter(|&id| !odd_byte(id)).collect());
    }
    for (sequence, ids) in sequences.iter_mut().enumerate() {
        ids.retain(|&id| !differs(id));
        let failed = TokenizerError::ProbeDecode { sequence };
        let Ok(theirs) = tokenizer.hf.decode(ids, false) else {
            return Err(failed);
        };
        let mut detokenizer = tokenizer.detokenizer();
        let mut ours = String::new();
        for &id in ids.iter() {
            for piece in detokenizer.push(id) {
                match piece {
                    detok::DetokPiece::Text(text) | detok::DetokPiece::Special(text) => {
                        ours.push_str(text);
                    }
                }
            }
        }
        ours.push_str(detokenizer.finish());
        let same = if byte_level {
            ours == theirs
        } else {
            // The decoder takes the spaces of the first word away.
            ours.trim_start_matches(' ') == theirs.trim_start_matches(' ')
        };
        if !same {
            return Err(failed);
        }
    }
    Ok(())
}

fn is_byte_level(hf: &HfTokenizer) -> bool {
    let decoder = hf.get_decoder().map(serde_json::to_string);
    decoder.is_some_and(|json| json.is_ok_and(|json| json.contains("\"ByteLevel\"")))
}

/// Has every control token written by a client, between words and alone.
fn check_guard(tokenizer: &Tokenizer) -> Result<(), TokenizerError> {
    // What stands for unknown characters stands for many texts and controls nothing.
    let unknown = encode_whole(tokenizer, "\u{10FFFE}");
    let control = |token: &&AddedToken| token.control && !unknown.contains(&token.id);
    for token in tokenizer.added.iter().filter(control) {
        for text in [token.content.to_string(), format!("a {} b", token.content)] {
            let marked = tokenizer.guard.mark(&text).into_owned();
            let (text, untrusted) = tokenizer.guard.unmark(marked);
            let mut encoded = Encoded::default();
            tokenizer.encode(&text, false, &untrusted, &mut encoded);
            if encoded.ids.contains(&token.id) {
                return Err(TokenizerError::Forgeable {
                    content: token.content.to_string(),
                });
            }
        }
    }
    Ok(())
}

/// The texts above, with the vocabulary's added tokens in all sorts of company.
pub(super) fn texts(added: &[AddedToken]) -> Vec<String> {
    let mut texts: Vec<String> = PROSE.iter().map(|&text| text.to_owned()).collect();
    texts.push(WHITE_SPACE.to_owned());
    texts.push(PROSE.concat() + WHITE_SPACE);
    let probed = &added[..added.len().min(ADDED_TOKENS_PROBED_MAX)];
    for (index, token) in probed.iter().enumerate() {
        let x = &*token.content;
        let y = &*probed[(index + 1) % probed.len()].content;
        texts.push(format!(
            "{x}word{x} word {x}\n{x}  \n\n{x}{x}{y}\t{x}é{y} {x}, {x}123{x}{{\"a\": \"{x}\"}}日本{x}👍🏽 {x}\u{301}{x}"
        ));
        texts.push(format!(" {x} {y}  {x}"));
        // A literal that is cut off or broken is text.
        let mut part = x.to_owned();
        part.pop();
        texts.push(format!("word {part} {part}{x}{part}"));
    }
    let all: String = PROSE
        .iter()
        .cycle()
        .zip(probed)
        .map(|(prose, token)| format!("{}{}", token.content, first_line(prose)))
        .collect();
    texts.push(all);
    texts
}

fn first_line(text: &str) -> &str {
    text.split_inclusive('\n').next().unwrap_or(text)
}

/// Steele, Lea and Flood's generator: the same sequences on every machine.
pub(super) struct SplitMix(pub(super) u64);

impl SplitMix {
    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut bits = self.0;
        bits = (bits ^ (bits >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        bits = (bits ^ (bits >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        bits ^ (bits >> 31)
    }
}

const WHITE_SPACE: &str = " a  b   c    d     e      f\n\n\ng\n \n  \n   h\t\ti \t \t j\r\nk\r\r\nl \r\n \
\u{A0}m\u{A0}\u{A0}n\u{2003}o\u{3000}p\u{200B}q\u{FEFF}r\u{2028}s\u{85}t\u{B}u\u{C}v\n    \n\t\n        w \n";

const PROSE: &[&str] = &[
    "The agent reads the file, edits two lines, and runs the tests again; this time they'd pass, \
     wouldn't they? \"It's 3:45 p.m.,\" she said -- \"we've 1,234,567 left (about 99.9%).\" I'LL \
     SAY IT'S FINE. Don't; can't; we're; You'Ve; o'clock; rock'n'roll; well-known e-mail \
     user@example.org, https://example.org/a/b?c=d&e=f#g_h; A/B, C++, C#, .NET, v1.2.3-rc.4+build.5.\n\
     ALLCAPS camelCase PascalCase snake_case kebab-case SCREAMING_SNAKE x1y2z3 0xDEADBEEF 1e-9\n",
    "pub fn advance(&mut self, items: &[Item]) -> Result<Vec<u32>, Error> {\n    let mut ids = \
     Vec::with_capacity(items.len() * 4);\n    for (i, item) in items.iter().enumerate() {\n        \
     if i % 2 == 0 && !item.is_empty() || self.done? {\n            ids.extend_from_slice(&item.ids[..]); \
     // keep\n        }\n    }\n\n    Ok(ids)\n}\n\n\ndef f(x: int = 0, *args, **kwargs) -> str:\n\t\
     \"\"\"Doc.\"\"\"\n\treturn f'{x!r:>10}' if x else \"\\n\\t\\\\\" + '\\u00e9'\n\n<div class=\"a\" \
     id='b'>&nbsp;&lt;</div>\nSELECT * FROM t WHERE a <> 'b' -- c\n#!/bin/sh\nls -la | grep \"$1\" \
     > /dev/null 2>&1 && echo ${X:-y}\n",
    "{\"name\": \"search\", \"arguments\": {\"query\": \"caf\\u00e9 \\\"quoted\\\"\", \"limit\": 10, \
     \"deep\": [[], {}, [1, -2.5e+10, true, false, null]], \"path\": \"C:\\\\temp\\\\x.txt\"}}\n\
     {\"a\":1,\"b\":[{\"c\":\"d\"},{\"e\":[]}],\"f\":\"\"}\n---\nkey: value\nlist:\n  - one\n  - two\n\
     | a | b |\n|---|---|\n| 1 | 2 |\n# Title\n\n* item **bold** _it_ `code`\n1. one\n2. two\n```rust\nx\n```\n",
    "Größe, Straße, naïve, façade, smørrebrød, Łódź, İstanbul, žluťoučký kůň. Быстрая коричневая \
     лиса прыгает через ленивую собаку. Η γρήγορη καφετιά αλεπού. الثعلب البني السريع يقفز فوق الكلب \
     الكسول ١٢٣. השועל החום המהיר. तेज़ भूरी लोमड़ी आलसी कुत्ते के ऊपर कूदती है १२३। বাংলা ভাষা। தமிழ் \
     மொழி. ภาษาไทยไม่มีช่องว่าง ພາສາລາວ. Tiếng Việt có dấu. ქართული ენა. Հայերեն. አማርኛ.\n",
    "敏捷的棕色狐狸跳过了懒狗。今天是2026年11月，温度是２５度。「日本語」のテキスト、カタカナとひらがな。ﾊﾝｶｸ \
     한국어 문장은 띄어쓰기가 있습니다. 한글 \u{1112}\u{1161}\u{11AB}. 繁體中文，標點：「」『』！？…—～\n",
    "👍 👍🏽 👨‍👩‍👧‍👦 🏳️‍🌈 🇩🇪🇫🇷 ☃️ ☃ ❤️‍🔥 🫠 ①②③ ½ ² ™ © ﬁ ﬀ Ａｂｃ ℌ 𝔘𝔫𝔦 𝟘𝟙𝟚 ∀x∈ℝ: ⌈x⌉ ≥ ∑ᵢ₌₁ⁿ √2 → ∞ ¬(a∧b) \
     ░▒▓█ ┌─┐ «guillemets» „quotes“ ‚single‘ \u{2013}\u{2014}\u{2026} \u{AD}soft \u{200D}\u{200C}\u{202E}rtl\u{202C}\n",
    "e\u{301} \u{E9} a\u{308}\u{323} a\u{323}\u{308} \u{1E69} s\u{323}\u{307} s\u{307}\u{323} \u{212B} \u{C5} A\u{30A} \
     o\u{302}\u{303}\u{301} \u{301}lead n\u{303}o Z\u{351}\u{32B}\u{343}\u{32A}\u{302}\u{32B}\u{33D}a\u{334}\u{319}l\u{323}go \
     \u{2581}meta\u{2581}\u{2581}space \u{120}gpt\u{10A} <0xE6> <0x0A> <unk> \u{FFFD} \u{FFFF} \u{10FFFF} \u{E000} \
     \u{1}\u{2}\u{7F}\u{1B}[0m\0nul <| |> <|x|> [X] </x> <x\n",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa ==================== --------------- \
     ////////// ........ !!!!!!!! ((((((((())))))))) 0000000000000000000000000000 11111111111111122222222222 \
     abababababababababab \\\\\\\\\\\\\\\\ ''''''' \"\"\"\"\" ######## ________ thequickbrownfoxjumpsoverthelazydog \
     Donaudampfschifffahrtsgesellschaftskapitän antidisestablishmentarianism x.y.z->w::v[0](1){2};\n",
];
