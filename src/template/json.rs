//! JSON on its way through a template: arguments that keep their bytes, schemas that print as Python prints them, and
//! the `tojson` filter that writes both.

use std::borrow::Cow;
use std::fmt::{self, Write};
use std::sync::{Arc, OnceLock};

use minijinja::value::{
    Enumerator, Kwargs, Object, ObjectRepr, Rest, ValueKind, ValueOrKwargs, from_args,
};
use minijinja::{Error, ErrorKind, Value};
use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};
use serde_json::value::RawValue;

/// How deep a JSON text is read, in levels. What is done with the values recurses, and the texts come from models and
/// clients: deeper schemas are turned down, deeper arguments keep their text but show no entries below.
const DEPTH_MAX: usize = 64;

/// How deep a value may nest that is written, in levels: also a template can nest values.
const WRITTEN_DEPTH_MAX: usize = 2 * DEPTH_MAX;

/// The widest indentation of one level, in columns; a wider one is a template's mistake.
const INDENT_MAX: i64 = 64;

/// The arguments of a call: a mapping to look into, `text` to print. Text that is no JSON object, or not even JSON, is
/// a mapping without entries: a model's slip must not make a conversation unrenderable.
pub(super) fn verbatim(text: Arc<str>) -> Value {
    Value::from_object(Verbatim {
        text,
        repr: ObjectRepr::Map,
        depth: 0,
        parts: OnceLock::new(),
    })
}

/// A value from JSON text that prints as Python prints the same text after `json.loads`: whole numbers of any size and
/// the order of keys are kept, the last of two equal keys wins. `None` when it is no JSON, nests too deep, or has a
/// string that is not Unicode (half a surrogate pair).
pub(super) fn parse(text: &str) -> Option<Value> {
    let text: &RawValue = serde_json::from_str(text).ok()?;
    element(text.get(), Print::AsPython, 0)
}

/// The mapping `map`, which remembers its JSON text once `tojson` has written it.
pub(super) fn printed_once(map: Value) -> Value {
    Value::from_object(PrintedOnce {
        map,
        json: OnceLock::new(),
    })
}

/// `json.dumps(value, ensure_ascii=False)`, with the options that `transformers` gives its filter:
/// `tojson(ensure_ascii, indent, separators, sort_keys)`.
///
/// Arguments of calls are written as their own text, at any depth, unless `indent` or `sort_keys` asks for another
/// layout.
pub(super) fn tojson(value: &Value, options: Rest<ValueOrKwargs>) -> Result<Value, Error> {
    let style = Style::from_options(&options.into_values())?;
    let mut json = Writer {
        style: &style,
        out: String::new(),
    };
    json.value(value, 0)?;
    Ok(Value::from(json.out))
}

/// What `tojson` makes of a value read from JSON text.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Print {
    /// The text it was read from, as far as a value can carry it: containers and numbers do.
    Verbatim,
    AsPython,
}

/// A JSON container whose JSON is the text it came from, and that is only read when a template looks inside.
struct Verbatim {
    text: Arc<str>,
    repr: ObjectRepr,
    /// How many containers this one is in. The outermost one, the arguments themselves, prints as its text. Those
    /// inside print as Python prints them, since some models are taught to write calls in Python's syntax.
    depth: usize,
    /// A map or sequence as `repr` says; `None` when the text is not one.
    parts: OnceLock<Option<Value>>,
}

impl Verbatim {
    fn parts(&self) -> Option<&Value> {
        let read = || {
            container(&self.text, Print::Verbatim, self.depth)
                .filter(|parts| object_repr(parts) == Some(self.repr))
        };
        self.parts.get_or_init(read).as_ref()
    }
}

impl Object for Verbatim {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        self.repr
    }

    fn get_value(self: &Arc<Self>, key: &Value) -> Option<Value> {
        self.parts()?.as_object()?.get_value(key)
    }

    fn enumerate(self: &Arc<Self>) -> Enumerator {
        enumerate(self.parts())
    }

    fn is_true(self: &Arc<Self>) -> bool {
        match self.parts() {
            Some(parts) => parts.is_true(),
            None => !self.text.is_empty(),
        }
    }

    fn render(self: &Arc<Self>, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&**self, f)
    }
}

impl fmt::Debug for Verbatim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.parts() {
            Some(parts) if self.depth > 0 => fmt::Debug::fmt(parts, f),
            Some(_) | None => f.write_str(&self.text),
        }
    }
}

/// A number whose text no value of minijinja prints: too large, or written in a way of its own (`1e5`).
struct NumberText(String);

impl Object for NumberText {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Plain
    }

    fn render(self: &Arc<Self>, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for NumberText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// See [`printed_once`]: a prompt prints its tools on every render, and schemas are long.
struct PrintedOnce {
    map: Value,
    json: OnceLock<Box<str>>,
}

impl Object for PrintedOnce {
    fn get_value(self: &Arc<Self>, key: &Value) -> Option<Value> {
        self.map.as_object()?.get_value(key)
    }

    fn enumerate(self: &Arc<Self>) -> Enumerator {
        enumerate(Some(&self.map))
    }
}

impl fmt::Debug for PrintedOnce {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.map, f)
    }
}

/// The items of a sequence or the keys of a map.
fn enumerate(container: Option<&Value>) -> Enumerator {
    match container.map(Value::try_iter) {
        Some(Ok(items)) => Enumerator::Values(items.collect()),
        Some(Err(_)) | None => Enumerator::Empty,
    }
}

fn object_repr(value: &Value) -> Option<ObjectRepr> {
    value.as_object().map(|object| object.repr())
}

fn element(text: &str, print: Print, depth: usize) -> Option<Value> {
    let unread = |repr| Verbatim {
        text: text.into(),
        repr,
        depth,
        parts: OnceLock::new(),
    };
    match text.as_bytes().first()? {
        b'{' | b'[' if print == Print::AsPython => container(text, print, depth),
        b'{' => Some(Value::from_object(unread(ObjectRepr::Map))),
        b'[' => Some(Value::from_object(unread(ObjectRepr::Seq))),
        b'"' => serde_json::from_str::<Cow<'_, str>>(text)
            .ok()
            .map(Value::from),
        b't' => Some(Value::from(true)),
        b'f' => Some(Value::from(false)),
        b'n' => Some(Value::from(())),
        _ => Some(number(text, print)),
    }
}

/// Reads one level; what is inside is read by [`element`].
fn container(text: &str, print: Print, depth: usize) -> Option<Value> {
    if depth >= DEPTH_MAX {
        return None;
    }
    if text.trim_start().starts_with('[') {
        let items: Vec<&RawValue> = serde_json::from_str(text).ok()?;
        return items
            .into_iter()
            .map(|item| element(item.get(), print, depth + 1))
            .collect::<Option<Vec<_>>>()
            .map(Value::from);
    }
    let Fields(fields) = serde_json::from_str(text).ok()?;
    let field =
        |(name, value): (String, &RawValue)| Some((name, element(value.get(), print, depth + 1)?));
    fields
        .into_iter()
        .map(field)
        .collect::<Option<Vec<_>>>()
        .map(Value::from_pairs)
}

/// The fields of an object as they stand, equal keys included.
struct Fields<'t>(Vec<(String, &'t RawValue)>);

impl<'t> Deserialize<'t> for Fields<'t> {
    fn deserialize<D: Deserializer<'t>>(deserializer: D) -> Result<Self, D::Error> {
        struct FieldsVisitor;

        impl<'t> Visitor<'t> for FieldsVisitor {
            type Value = Fields<'t>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'t>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut fields = Vec::new();
                while let Some(field) = map.next_entry()? {
                    fields.push(field);
                }
                Ok(Fields(fields))
            }
        }

        deserializer.deserialize_map(FieldsVisitor)
    }
}

fn number(text: &str, print: Print) -> Value {
    let whole = !text.contains(['.', 'e', 'E']);
    let float = || text.parse::<f64>().unwrap_or(f64::NAN);
    let value = match whole {
        true => text
            .parse::<i64>()
            .map(Value::from)
            .or_else(|_| text.parse::<i128>().map(Value::from))
            .ok(),
        false => Some(Value::from(float())),
    };
    let printed = match print {
        Print::Verbatim => text.to_owned(),
        Print::AsPython if text == "-0" => "0".to_owned(),
        Print::AsPython if whole => text.to_owned(),
        Print::AsPython => python_float(float()),
    };
    match value {
        Some(value) if value.to_string() == printed => value,
        Some(_) | None => Value::from_object(NumberText(printed)),
    }
}

/// `json.dumps` of a Python float: the shortest digits that read back, an exponent below 1e-4 and from 1e16 on.
fn python_float(float: f64) -> String {
    if float.is_nan() {
        return "NaN".to_owned();
    }
    if float.is_infinite() {
        return if float > 0.0 { "Infinity" } else { "-Infinity" }.to_owned();
    }
    // Rust switches to exponents at the same sizes, but writes them without plus sign and padding.
    let text = format!("{float:?}");
    match text.split_once('e') {
        None => text,
        Some((digits, exponent)) => match exponent.strip_prefix('-') {
            Some(exponent) => format!("{digits}e-{exponent:0>2}"),
            None => format!("{digits}e+{exponent:0>2}"),
        },
    }
}

/// The options of `json.dumps`.
struct Style {
    ensure_ascii: bool,
    /// What one level is indented by; `None` keeps everything in one line.
    indent: Option<String>,
    between_items: String,
    after_key: String,
    sort_keys: bool,
}

impl Style {
    fn from_options(options: &[Value]) -> Result<Self, Error> {
        type Positional = (
            Option<Value>,
            Option<Value>,
            Option<Value>,
            Option<Value>,
            Kwargs,
        );
        let (ensure_ascii, indent, separators, sort_keys, named): Positional = from_args(options)?;
        let option = |positional: Option<Value>, name| match positional {
            Some(value) => Ok(value),
            None => named
                .get::<Option<Value>>(name)
                .map(|value| value.unwrap_or_else(|| Value::from(()))),
        };
        let ensure_ascii = option(ensure_ascii, "ensure_ascii")?.is_true();
        let indent = option(indent, "indent")?;
        let separators = option(separators, "separators")?;
        let sort_keys = option(sort_keys, "sort_keys")?.is_true();
        named.assert_all_used()?;

        let indent = if indent.is_none() {
            None
        } else if let Some(text) = indent.as_str() {
            Some(text.to_owned())
        } else {
            let columns = i64::try_from(indent)?.clamp(0, INDENT_MAX);
            Some(" ".repeat(usize::try_from(columns).unwrap_or_default()))
        };
        let (between_items, after_key) = match separators.is_none() {
            true if indent.is_some() => (",".to_owned(), ": ".to_owned()),
            true => (", ".to_owned(), ": ".to_owned()),
            false => (
                separators.get_item_by_index(0)?.to_string(),
                separators.get_item_by_index(1)?.to_string(),
            ),
        };
        Ok(Self {
            ensure_ascii,
            indent,
            between_items,
            after_key,
            sort_keys,
        })
    }

    /// Whether containers are laid out otherwise than their texts stand.
    fn lays_out(&self) -> bool {
        self.indent.is_some() || self.sort_keys
    }

    fn is_default(&self) -> bool {
        !self.lays_out()
            && !self.ensure_ascii
            && self.between_items == ", "
            && self.after_key == ": "
    }
}

struct Writer<'s> {
    style: &'s Style,
    out: String,
}

impl Writer<'_> {
    #[expect(
        clippy::wildcard_enum_match_arm,
        reason = "the enum is minijinja's and may grow"
    )]
    fn value(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        if depth > WRITTEN_DEPTH_MAX {
            return Err(Error::new(
                ErrorKind::InvalidOperation,
                "the value nests too deep for tojson",
            ));
        }
        match value.kind() {
            ValueKind::None => self.out.push_str("null"),
            ValueKind::Bool => self
                .out
                .push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => self.out.push_str(&number_text(value)),
            ValueKind::String => self.string(value.as_str().unwrap_or_default()),
            ValueKind::Seq | ValueKind::Iterable => match self.text_of(value) {
                Some(text) => self.out.push_str(text),
                None => self.sequence(value, depth)?,
            },
            ValueKind::Map => match self.text_of(value) {
                Some(text) => self.out.push_str(text),
                None => self.map(value, depth)?,
            },
            ValueKind::Plain => match value.downcast_object_ref::<NumberText>() {
                Some(NumberText(text)) => self.out.push_str(text),
                None => return Err(unserialisable(value)),
            },
            _ => return Err(unserialisable(value)),
        }
        Ok(())
    }

    /// The text a container is to be copied from instead of being written.
    fn text_of<'v>(&self, value: &'v Value) -> Option<&'v str> {
        if let Some(verbatim) = value.downcast_object_ref::<Verbatim>() {
            return (!self.style.lays_out() || verbatim.parts().is_none())
                .then_some(&*verbatim.text);
        }
        let tool = value
            .downcast_object_ref::<PrintedOnce>()
            .filter(|_| self.style.is_default())?;
        if let Some(json) = tool.json.get() {
            return Some(json);
        }
        let mut json = Writer {
            style: self.style,
            out: String::new(),
        };
        json.value(&tool.map, 0).ok()?;
        Some(tool.json.get_or_init(|| json.out.into()))
    }

    fn sequence(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        let items: Vec<Value> = value.try_iter()?.collect();
        self.out.push('[');
        for (index, item) in items.iter().enumerate() {
            self.before_item(index, depth);
            self.value(item, depth + 1)?;
        }
        self.close(']', items.is_empty(), depth);
        Ok(())
    }

    fn map(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        let mut fields = Vec::new();
        for key in value.try_iter()? {
            let name = key_text(&key).ok_or_else(|| unserialisable(&key))?;
            fields.push((name, value.get_item(&key)?));
        }
        if self.style.sort_keys {
            fields.sort_by(|(a, _), (b, _)| a.cmp(b));
        }
        self.out.push('{');
        for (index, (name, field)) in fields.iter().enumerate() {
            self.before_item(index, depth);
            self.string(name);
            self.out.push_str(&self.style.after_key);
            self.value(field, depth + 1)?;
        }
        self.close('}', fields.is_empty(), depth);
        Ok(())
    }

    fn before_item(&mut self, index: usize, depth: usize) {
        if index > 0 {
            self.out.push_str(&self.style.between_items);
        }
        self.new_line(depth + 1);
    }

    fn close(&mut self, bracket: char, empty: bool, depth: usize) {
        if !empty {
            self.new_line(depth);
        }
        self.out.push(bracket);
    }

    fn new_line(&mut self, depth: usize) {
        if let Some(indent) = &self.style.indent {
            self.out.push('\n');
            (0..depth).for_each(|_| self.out.push_str(indent));
        }
    }

    fn string(&mut self, text: &str) {
        self.out.push('"');
        // Runs without anything to escape, which is nearly all text, are copied whole.
        let mut copied = 0;
        for (at, char) in text.char_indices() {
            let plain = match char {
                '"' | '\\' | '\0'..='\x1f' => false,
                ' '..='~' => true,
                _ => !self.style.ensure_ascii,
            };
            if !plain {
                self.out.push_str(&text[copied..at]);
                self.escape(char);
                copied = at + char.len_utf8();
            }
        }
        self.out.push_str(&text[copied..]);
        self.out.push('"');
    }

    fn escape(&mut self, char: char) {
        let short = match char {
            '"' => "\\\"",
            '\\' => "\\\\",
            '\n' => "\\n",
            '\r' => "\\r",
            '\t' => "\\t",
            '\x08' => "\\b",
            '\x0c' => "\\f",
            _ => {
                for unit in char.encode_utf16(&mut [0; 2]) {
                    // Writing to a string cannot fail.
                    let _ = write!(self.out, "\\u{unit:04x}");
                }
                return;
            }
        };
        self.out.push_str(short);
    }
}

fn number_text(value: &Value) -> String {
    match f64::try_from(value.clone()) {
        Ok(float) if !value.is_integer() => python_float(float),
        Ok(_) | Err(_) => value.to_string(),
    }
}

/// What `json.dumps` makes of a key of a dict.
fn key_text(key: &Value) -> Option<String> {
    if let Some(text) = key.as_str() {
        return Some(text.to_owned());
    }
    if key.is_number() {
        return Some(number_text(key));
    }
    let constant = match (key.is_none(), bool::try_from(key.clone())) {
        (true, _) => "null",
        (false, Ok(true)) => "true",
        (false, Ok(false)) => "false",
        (false, Err(_)) => return None,
    };
    Some(constant.to_owned())
}

fn unserialisable(value: &Value) -> Error {
    Error::new(
        ErrorKind::BadSerialization,
        format!("{} cannot be written as json", value.kind()),
    )
}
