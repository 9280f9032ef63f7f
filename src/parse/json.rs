//! A JSON checker that takes one byte at a time.
//!
//! It knows, without looking back or ahead, whether what it has seen can still become one JSON object, where strings,
//! members and containers begin and end, and at which byte the object is whole. It keeps no text: whoever feeds it
//! has the bytes. It accepts exactly what `serde_json` accepts, up to [`DEPTH_MAX`].

/// How deep containers may nest, in levels: the deepest that `serde_json` reads into a value by default, so that a
/// reader of what passed here never meets its limit.
pub(super) const DEPTH_MAX: u32 = 127;

/// What one byte meant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Event {
    /// The opening quote of a member's name.
    KeyBegin,
    /// The closing quote of a member's name.
    KeyEnd,
    /// The opening quote of a string value.
    StringBegin,
    /// The closing quote of a string value.
    StringEnd,
    /// The first byte of a number, `true`, `false` or `null`.
    Scalar,
    /// `{` or `[`; the depth counts it already.
    Open,
    /// `}` or `]`; the depth counts it no longer. At depth 0 the object is whole.
    Close,
    /// Anything else: the inside of a string or scalar, a colon, a comma, whitespace.
    Inside,
}

/// The byte cannot stand here: what was fed is not the beginning of a JSON object, or nests too deep.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct NotJson;

/// The state of reading one JSON object.
#[derive(Debug, Clone)]
pub(super) struct Scanner {
    state: State,
    /// One bit a level, the innermost lowest: set for an object, clear for an array.
    levels: u128,
    depth: u32,
}

/// What may come next.
#[derive(Debug, Clone, Copy)]
enum State {
    /// Whitespace, then `{`.
    Start,
    /// After `{`: a member or `}`.
    MemberOrClose,
    /// After a comma in an object: a member.
    Member,
    /// After a member's name: `:`.
    Colon,
    /// After `:`, or after a comma in an array: a value.
    Value,
    /// After `[`: a value or `]`.
    ValueOrClose,
    /// After a value: a comma, or the end of the container.
    Next,
    /// In a string.
    String(Role),
    /// After a backslash.
    Escape(Role),
    /// In `\uXXXX`, with so many digits to come.
    Hex(Role, u8),
    Number(Number),
    /// In `true`, `false` or `null`, with these bytes to come.
    Literal(&'static [u8]),
    /// The object is whole.
    Done,
}

#[derive(Debug, Clone, Copy)]
enum Role {
    Key,
    Value,
}

/// The last part of a number that was read.
#[derive(Debug, Clone, Copy)]
enum Number {
    Minus,
    Zero,
    Integer,
    Point,
    Fraction,
    Exponent,
    ExponentSign,
    ExponentDigits,
}

impl Scanner {
    /// A scanner of one object, which whitespace may precede.
    pub(super) fn new() -> Self {
        Self {
            state: State::Start,
            levels: 0,
            depth: 0,
        }
    }

    /// How many containers are open.
    pub(super) fn depth(&self) -> u32 {
        self.depth
    }

    /// Whether the next byte is inside a string, where everything but `"`, `\` and control characters is content.
    pub(super) fn in_string(&self) -> bool {
        matches!(self.state, State::String(_))
    }

    /// Reads the next byte. After an error, or once the object is whole, every further byte is an error.
    pub(super) fn push(&mut self, byte: u8) -> Result<Event, NotJson> {
        match self.state {
            State::String(role) => return self.string(role, byte),
            State::Escape(role) => {
                self.state = match byte {
                    b'"' | b'\\' | b'/' | b'b' | b'f' | b'n' | b'r' | b't' => State::String(role),
                    b'u' => State::Hex(role, 4),
                    _ => return Err(NotJson),
                };
                return Ok(Event::Inside);
            }
            State::Hex(role, left) => {
                if !byte.is_ascii_hexdigit() {
                    return Err(NotJson);
                }
                self.state = if left == 1 {
                    State::String(role)
                } else {
                    State::Hex(role, left - 1)
                };
                return Ok(Event::Inside);
            }
            State::Literal(rest) => {
                let (first, rest) = rest.split_first().ok_or(NotJson)?;
                if byte != *first {
                    return Err(NotJson);
                }
                self.state = if rest.is_empty() {
                    State::Next
                } else {
                    State::Literal(rest)
                };
                return Ok(Event::Inside);
            }
            State::Number(number) => match number.next(byte) {
                NumberStep::In(number) => {
                    self.state = State::Number(number);
                    return Ok(Event::Inside);
                }
                NumberStep::Bad => return Err(NotJson),
                // A number has no last byte of its own: this one belongs to what follows.
                NumberStep::After => self.state = State::Next,
            },
            State::Start
            | State::MemberOrClose
            | State::Member
            | State::Colon
            | State::Value
            | State::ValueOrClose
            | State::Next
            | State::Done => {}
        }
        self.between(byte)
    }

    fn string(&mut self, role: Role, byte: u8) -> Result<Event, NotJson> {
        match byte {
            b'"' => Ok(match role {
                Role::Key => {
                    self.state = State::Colon;
                    Event::KeyEnd
                }
                Role::Value => {
                    self.state = State::Next;
                    Event::StringEnd
                }
            }),
            b'\\' => {
                self.state = State::Escape(role);
                Ok(Event::Inside)
            }
            0..=0x1f => Err(NotJson),
            _ => Ok(Event::Inside),
        }
    }

    /// A byte outside strings and scalars.
    fn between(&mut self, byte: u8) -> Result<Event, NotJson> {
        let value = matches!(self.state, State::Value | State::ValueOrClose);
        let next = matches!(self.state, State::Next);
        match byte {
            b' ' | b'\t' | b'\n' | b'\r' if !matches!(self.state, State::Done) => Ok(Event::Inside),
            b'{' if value || matches!(self.state, State::Start) => self.open(true),
            b'[' if value => self.open(false),
            b'}' if self.in_object() && (next || matches!(self.state, State::MemberOrClose)) => {
                Ok(self.close())
            }
            b']' if !self.in_object() && (next || matches!(self.state, State::ValueOrClose)) => {
                Ok(self.close())
            }
            b',' if next => {
                self.state = if self.in_object() {
                    State::Member
                } else {
                    State::Value
                };
                Ok(Event::Inside)
            }
            b':' if matches!(self.state, State::Colon) => {
                self.state = State::Value;
                Ok(Event::Inside)
            }
            b'"' if matches!(self.state, State::Member | State::MemberOrClose) => {
                self.state = State::String(Role::Key);
                Ok(Event::KeyBegin)
            }
            b'"' if value => {
                self.state = State::String(Role::Value);
                Ok(Event::StringBegin)
            }
            _ if value => {
                self.state = scalar(byte).ok_or(NotJson)?;
                Ok(Event::Scalar)
            }
            _ => Err(NotJson),
        }
    }

    fn in_object(&self) -> bool {
        self.levels & 1 == 1
    }

    fn open(&mut self, object: bool) -> Result<Event, NotJson> {
        if self.depth == DEPTH_MAX {
            return Err(NotJson);
        }
        self.depth += 1;
        self.levels = self.levels << 1 | u128::from(object);
        self.state = if object {
            State::MemberOrClose
        } else {
            State::ValueOrClose
        };
        Ok(Event::Open)
    }

    fn close(&mut self) -> Event {
        self.depth -= 1;
        self.levels >>= 1;
        self.state = if self.depth == 0 {
            State::Done
        } else {
            State::Next
        };
        Event::Close
    }
}

/// The state after the first byte of a number or literal.
fn scalar(byte: u8) -> Option<State> {
    match byte {
        b'-' => Some(State::Number(Number::Minus)),
        b'0' => Some(State::Number(Number::Zero)),
        b'1'..=b'9' => Some(State::Number(Number::Integer)),
        b't' => Some(State::Literal(b"rue")),
        b'f' => Some(State::Literal(b"alse")),
        b'n' => Some(State::Literal(b"ull")),
        _ => None,
    }
}

enum NumberStep {
    In(Number),
    After,
    Bad,
}

impl Number {
    fn next(self, byte: u8) -> NumberStep {
        use Number as N;
        use NumberStep::{After, Bad, In};
        match (self, byte) {
            (N::Minus, b'0') => In(N::Zero),
            (N::Minus, b'1'..=b'9') => In(N::Integer),
            (N::Integer, b'0'..=b'9') => In(N::Integer),
            (N::Zero | N::Integer, b'.') => In(N::Point),
            (N::Point | N::Fraction, b'0'..=b'9') => In(N::Fraction),
            (N::Zero | N::Integer | N::Fraction, b'e' | b'E') => In(N::Exponent),
            (N::Exponent, b'+' | b'-') => In(N::ExponentSign),
            (N::Exponent | N::ExponentSign | N::ExponentDigits, b'0'..=b'9') => {
                In(N::ExponentDigits)
            }
            (N::Zero | N::Integer | N::Fraction | N::ExponentDigits, _) => After,
            (N::Minus | N::Point | N::Exponent | N::ExponentSign, _) => Bad,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde::de::IgnoredAny;

    use super::*;

    /// Whether the scanner finds the object whole exactly at the last byte.
    fn accepts(text: &str) -> bool {
        let mut scanner = Scanner::new();
        let mut whole = false;
        for byte in text.bytes() {
            match scanner.push(byte) {
                Ok(event) => whole = event == Event::Close && scanner.depth() == 0,
                Err(NotJson) => return false,
            }
        }
        whole
    }

    fn is_object(text: &str) -> bool {
        text.trim_start_matches([' ', '\t', '\n', '\r'])
            .starts_with('{')
            && text.ends_with('}')
            && serde_json::from_str::<IgnoredAny>(text).is_ok()
    }

    #[test]
    fn accepts_what_serde_json_accepts() {
        for text in [
            "{}",
            " \n{ \"a\" : [ ] }",
            r#"{"a":-0.5e+10,"b":[1,2.0,0,true,false,null,"x"],"c":{"d":{}}}"#,
            r#"{"\u00e9\"\\":"}{]["}"#,
            r#"{"a":01}"#,
            r#"{"a":1.}"#,
            r#"{"a":-}"#,
            r#"{"a":1e}"#,
            r#"{"a":+1}"#,
            r#"{"a":nul}"#,
            r#"{"a":nulll}"#,
            r#"{"a":"\x"}"#,
            r#"{"a":"\u12g4"}"#,
            "{\"a\":\"\n\"}",
            r#"{"a":1,}"#,
            r#"{"a":[1,]}"#,
            r#"{,}"#,
            r#"{"a"}"#,
            r#"{"a":}"#,
            r#"{"a":[}]"#,
            r#"{"a":[1}"#,
            r#"{a:1}"#,
            "[]",
            "{}{}",
            "é{}",
        ] {
            assert_eq!(accepts(text), is_object(text), "{text}");
        }
    }

    #[test]
    fn the_deepest_accepted_is_the_deepest_that_serde_json_reads() {
        let nested = |depth: usize| {
            format!(
                "{}{{}}{}",
                "{\"a\":".repeat(depth - 1),
                "}".repeat(depth - 1)
            )
        };
        assert!(accepts(&nested(DEPTH_MAX as usize)));
        assert!(serde_json::from_str::<serde_json::Value>(&nested(DEPTH_MAX as usize)).is_ok());
        assert!(!accepts(&nested(DEPTH_MAX as usize + 1)));
        assert!(
            serde_json::from_str::<serde_json::Value>(&nested(DEPTH_MAX as usize + 1)).is_err()
        );
    }

    fn object() -> impl Strategy<Value = serde_json::Value> {
        let leaf = prop_oneof![
            Just(serde_json::Value::Null),
            any::<bool>().prop_map(serde_json::Value::from),
            any::<i64>().prop_map(serde_json::Value::from),
            any::<f64>().prop_map(serde_json::Value::from),
            any::<String>().prop_map(serde_json::Value::from),
        ];
        let value = leaf.prop_recursive(4, 24, 4, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..4).prop_map(serde_json::Value::from),
                prop::collection::hash_map(any::<String>(), inner, 0..4)
                    .prop_map(|map| serde_json::Value::Object(map.into_iter().collect())),
            ]
        });
        prop::collection::hash_map(any::<String>(), value, 0..4)
            .prop_map(|map| serde_json::Value::Object(map.into_iter().collect()))
    }

    proptest! {
        #[test]
        fn every_object_is_whole_at_its_last_byte(value in object()) {
            prop_assert!(accepts(&value.to_string()));
            prop_assert!(accepts(&serde_json::to_string_pretty(&value).unwrap()));
        }

        #[test]
        fn agrees_with_serde_json_on_json_like_noise(
            text in r#"\{("[ab\\"u0]{0,3}":?|[-0-9.eE+]{1,4}|true|null|[\[\]{},: ]){0,9}\}"#,
        ) {
            prop_assert_eq!(accepts(&text), is_object(&text), "{}", text);
        }

        #[test]
        fn agrees_with_serde_json_on_damaged_objects(
            value in object(), at in any::<prop::sample::Index>(), with in prop::option::of(any::<char>()),
        ) {
            let mut characters: Vec<char> = value.to_string().chars().collect();
            let at = at.index(characters.len());
            match with {
                Some(with) => characters[at] = with,
                None => { characters.remove(at); }
            }
            let text: String = characters.into_iter().collect();
            prop_assert_eq!(accepts(&text), is_object(&text), "{}", text);
        }
    }
}
