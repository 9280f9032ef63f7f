//! Where Python and minijinja part: what white space is, which string methods there are, what counts as a sequence.

use jiff::fmt::strtime::{BrokenDownTime, Config};
use minijinja::value::{ValueKind, from_args};
use minijinja::{Environment, Error, ErrorKind, State, Value};
use minijinja_contrib::pycompat;

/// Adds what templates written for Jinja2 expect, and corrects what they would find otherwise.
pub(super) fn extend(environment: &mut Environment<'static>) {
    minijinja_contrib::add_to_environment(environment);
    environment.set_unknown_method_callback(method);
    environment.add_filter("trim", trim);
    environment.add_test("iterable", is_iterable);
    environment.add_test("sequence", is_sequence);
}

/// The function of that name in templates: Python's `datetime.now().strftime(format)`, with the clock stopped at `now`.
pub(super) fn strftime_now(now: jiff::civil::DateTime) -> Value {
    Value::from_function(move |format: &str| -> Result<String, Error> {
        // Lenient: as in Python, a directive that means nothing stays as it is.
        let mut text = String::new();
        let config = Config::new().lenient(true);
        match BrokenDownTime::from(now).format_with_config(&config, format, &mut text) {
            Ok(()) => Ok(text),
            Err(_) => Err(Error::new(
                ErrorKind::InvalidOperation,
                "strftime_now could not format the date",
            )),
        }
    })
}

/// `iter(value)` succeeds. minijinja also says so of `none`.
fn is_iterable(value: &Value) -> bool {
    !value.is_none() && value.try_iter().is_ok()
}

/// It has a length and can be indexed, which in Python holds for strings and mappings too.
fn is_sequence(value: &Value) -> bool {
    value.is_undefined()
        || matches!(
            value.kind(),
            ValueKind::Seq | ValueKind::Map | ValueKind::String
        )
}

fn trim(value: &Value, chars: Option<&str>) -> String {
    let text = value.to_string();
    match chars {
        None => text.trim_matches(is_space).to_owned(),
        Some(chars) => text.trim_matches(|char| chars.contains(char)).to_owned(),
    }
}

/// `str.isspace`: Unicode's white space and the four separators of ASCII.
fn is_space(char: char) -> bool {
    char.is_whitespace() || matches!(char, '\x1c'..='\x1f')
}

/// The methods of Python's strings that minijinja's own emulation lacks or that it cuts at other characters; everything
/// else goes there.
fn method(
    state: &mut State<'_, '_>,
    value: &Value,
    name: &str,
    args: &[Value],
) -> Result<Value, Error> {
    let Some(text) = value.as_str() else {
        return pycompat::unknown_method_callback(state, value, name, args);
    };
    let found = match (name, args) {
        ("strip", []) => Value::from(text.trim_matches(is_space)),
        ("lstrip", []) => Value::from(text.trim_start_matches(is_space)),
        ("rstrip", []) => Value::from(text.trim_end_matches(is_space)),
        ("isspace", []) => Value::from(!text.is_empty() && text.chars().all(is_space)),
        ("split", []) => text
            .split(is_space)
            .filter(|part| !part.is_empty())
            .map(Value::from)
            .collect(),
        ("splitlines", []) => lines(text).into_iter().map(Value::from).collect(),
        ("rsplit", [separator, most]) => rsplit(text, separator, most)?,
        ("removeprefix", _) => {
            let (prefix,): (&str,) = from_args(args)?;
            Value::from(text.strip_prefix(prefix).unwrap_or(text))
        }
        ("removesuffix", _) => {
            let (suffix,): (&str,) = from_args(args)?;
            Value::from(text.strip_suffix(suffix).unwrap_or(text))
        }
        ("partition", _) => {
            let (separator,): (&str,) = from_args(args)?;
            let (before, after) = text.split_once(separator).unwrap_or((text, ""));
            parts(before, &text[before.len()..text.len() - after.len()], after)
        }
        ("rpartition", _) => {
            let (separator,): (&str,) = from_args(args)?;
            let (before, after) = text.rsplit_once(separator).unwrap_or(("", text));
            parts(before, &text[before.len()..text.len() - after.len()], after)
        }
        _ => return pycompat::unknown_method_callback(state, value, name, args),
    };
    Ok(found)
}

fn parts(before: &str, separator: &str, after: &str) -> Value {
    [before, separator, after]
        .into_iter()
        .map(Value::from)
        .collect()
}

fn rsplit(text: &str, separator: &Value, most: &Value) -> Result<Value, Error> {
    let missing = || {
        Error::new(
            ErrorKind::InvalidOperation,
            "rsplit takes a separator and a count",
        )
    };
    let separator = separator
        .as_str()
        .filter(|separator| !separator.is_empty())
        .ok_or_else(missing)?;
    let most = most.as_usize().ok_or_else(missing)?;
    let mut parts: Vec<Value> = text
        .rsplitn(most.saturating_add(1), separator)
        .map(Value::from)
        .collect();
    parts.reverse();
    Ok(Value::from(parts))
}

/// `str.splitlines()`: every Unicode line boundary ends a line, the last one opens none.
fn lines(text: &str) -> Vec<&str> {
    let is_end = |char| {
        matches!(
            char,
            '\n' | '\r' | '\x0b' | '\x0c' | '\x1c'..='\x1e' | '\u{85}' | '\u{2028}' | '\u{2029}'
        )
    };
    let mut lines = Vec::new();
    let mut rest = text;
    while let Some((at, end)) = rest.char_indices().find(|(_, char)| is_end(*char)) {
        lines.push(&rest[..at]);
        rest = &rest[at..];
        rest = rest.strip_prefix("\r\n").unwrap_or(&rest[end.len_utf8()..]);
    }
    if !rest.is_empty() {
        lines.push(rest);
    }
    lines
}
